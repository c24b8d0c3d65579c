//! Model: a language model as a Hugging Face folder.

use std::fmt::Write as _;
use std::path::Path;

use engine::artifact::{ArtifactType, Facts};
use engine::error::{Error, Result};

use super::folder;

/// The artifact type: `config.json`, `model.safetensors`, `tokenizer.json`.
pub struct Model;

impl Model {
    pub const NAME: &'static str = "Model";
    pub const CONFIG: &'static str = "config.json";
    pub const WEIGHTS: &'static str = "model.safetensors";
    pub const TOKENIZER: &'static str = "tokenizer.json";
    /// The files of a model folder.
    pub const FILES: [&'static str; 3] = [Self::CONFIG, Self::WEIGHTS, Self::TOKENIZER];

    /// Checks that `folder` holds a whole model; returns its number of parameters.
    ///
    /// # Errors
    /// Names the file that is missing or broken.
    pub fn check_folder(folder: &Path) -> Result<u64> {
        let config: serde_json::Map<String, serde_json::Value> =
            folder::read_json(&folder::file(folder, Self::CONFIG)?)?;
        if !config.contains_key("vocab_size") {
            return Err(Error::yours(format!(
                "{}: field `vocab_size` is missing",
                folder.join(Self::CONFIG).display()
            )));
        }
        let tokenizer: serde_json::Map<String, serde_json::Value> =
            folder::read_json(&folder::file(folder, Self::TOKENIZER)?)?;
        if !tokenizer.contains_key("model") {
            return Err(Error::yours(format!("{}: field `model` is missing", folder.join(Self::TOKENIZER).display())));
        }
        parameters(folder, Self::WEIGHTS)
    }
}

fn parameters(folder: &Path, file: &str) -> Result<u64> {
    Ok(folder::tensors(folder, file)?.values().map(|(_, shape)| shape.iter().product::<u64>()).sum())
}

impl ArtifactType for Model {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn about(&self) -> &'static str {
        "a language model with its tokenizer, as a Hugging Face folder"
    }

    fn check(&self, folder: &Path) -> Result<Facts> {
        let mut facts = Facts::default();
        folder::metrics(folder, &mut facts)?;
        facts.metrics.insert("parameters".to_owned(), Self::check_folder(folder)? as f64);
        Ok(facts)
    }

    fn preview(&self, folder: &Path, rows: usize) -> Result<String> {
        let mut text = folder::show(folder, Self::CONFIG)?;
        let _ = writeln!(text, "{} parameters in {}", parameters(folder, Self::WEIGHTS)?, Self::WEIGHTS);
        for (name, (dtype, shape)) in folder::tensors(folder, Self::WEIGHTS)?.into_iter().take(rows) {
            let _ = writeln!(text, "  {name}  {dtype} {shape:?}");
        }
        Ok(text)
    }
}
