//! The Tokenizer artifact: a Hugging Face `tokenizer.json`.

use std::fmt::Write as _;
use std::path::Path;

use engine::artifact::{ArtifactType, Facts, FileSpec};
use engine::error::{Error, Result};

use super::folder;

/// The artifact type: `tokenizer.json`.
pub struct Tokenizer;

impl Tokenizer {
    pub const NAME: &'static str = "Tokenizer";
    pub const FILE: &'static str = "tokenizer.json";
}

/// Loads the tokenizer; the error names the file.
fn load(folder: &Path) -> Result<tokenizers::Tokenizer> {
    let path = folder::file(folder, Tokenizer::FILE)?;
    tokenizers::Tokenizer::from_file(&path)
        .map_err(|e| Error::user(format!("{}: not a tokenizer of Hugging Face's format: {e}", path.display())))
}

impl ArtifactType for Tokenizer {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn about(&self) -> &'static str {
        "a tokenizer in Hugging Face's format"
    }

    fn files(&self) -> Vec<FileSpec> {
        vec![FileSpec::new(Self::FILE, "the tokenizer, in Hugging Face's format")]
    }

    fn check(&self, folder: &Path) -> Result<Facts> {
        load(folder)?;
        let mut facts = Facts::default();
        folder::metrics(folder, &mut facts)?;
        Ok(facts)
    }

    /// The number of tokens.
    fn outline(&self, folder: &Path) -> serde_json::Value {
        load(folder).map_or_else(|_| serde_json::Value::Null, |tokenizer| tokenizer.get_vocab_size(true).into())
    }

    fn preview(&self, folder: &Path, rows: usize) -> Result<String> {
        let tokenizer = load(folder)?;
        let size = tokenizer.get_vocab_size(true);
        let mut text = format!("{size} tokens; the last {}:\n", rows.min(size));
        for id in (0..size).rev().take(rows).filter_map(|id| u32::try_from(id).ok()) {
            let _ = writeln!(text, "  {id}  {}", tokenizer.id_to_token(id).unwrap_or_default());
        }
        Ok(text)
    }
}
