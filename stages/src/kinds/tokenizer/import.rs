//! `tokenizer.import`: imports a tokenizer from a file, the hub or the binary itself.

use std::path::PathBuf;

use engine::context::Context;
use engine::error::{Error, Result};
use engine::external::InputPath;
use engine::kind::{Kind, Signature};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::assets::{self, AssetName};
use crate::error::TOKENIZER;
use crate::hub::{self, Hub, HubId, Repo};
use crate::types::Tokenizer;

pub struct Import;

#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// A `tokenizer.json`, a folder that holds one, or a GGUF file.
    pub file: Option<InputPath>,
    /// A model on the hub.
    pub hub: Option<HubId>,
    /// Name of a tokenizer embedded in the binary.
    pub asset: Option<AssetName>,
}

impl Kind for Import {
    type Params = Params;

    const NAME: &'static str = "tokenizer.import";
    const VERSION: u32 = 2;
    const ABOUT: &'static str = "takes a tokenizer from a file, the hub or the binary itself";

    fn signature(&self, params: &Params) -> Signature {
        let signature = Signature::producing(Tokenizer::NAME);
        hub::declare(signature, params.hub.as_ref())
    }

    fn check(&self, params: &Params) -> Vec<(String, String)> {
        let given = [params.file.is_some(), params.hub.is_some(), params.asset.is_some()];
        match given.iter().filter(|&&given| given).count() {
            1 => Vec::new(),
            n => vec![(String::new(), format!("give one of `file`, `hub`, `asset`; found {n}"))],
        }
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        let path: PathBuf = match (params.file, params.hub, params.asset) {
            (Some(InputPath(path)), ..) => path,
            (_, Some(id), _) => {
                let hub = Hub::open(Repo::Model, &id, ctx)?;
                hub.fetch_all(&[Tokenizer::FILE.to_owned()], ctx)?.remove(0)
            }
            (.., Some(AssetName(name))) => return take(lm::Tokenizer::from_bytes(asset(&name)?), ctx),
            (None, None, None) => return Err(Error::internal("tokenizer.import: no source")),
        };
        take(lm::Tokenizer::load(&path), ctx)
    }
}

fn asset(name: &str) -> Result<&'static [u8]> {
    let files = assets::get(name)?.files;
    let found = files.iter().find(|(file, _)| *file == Tokenizer::FILE);
    found.map(|(_, bytes)| *bytes).ok_or_else(|| Error::user(format!("the asset `{name}` holds no tokenizer")))
}

/// Saves the tokenizer in the store's own layout, without the padding and truncation settings of its source.
fn take(tokenizer: lm::Result<lm::Tokenizer>, ctx: &mut Context) -> Result<()> {
    let tokenizer = tokenizer.map_err(|e| Error::user(e.to_string()).help(TOKENIZER))?;
    tokenizer.save(&ctx.out().join(Tokenizer::FILE)).map_err(|e| Error::environment(e.to_string()))?;
    ctx.metric("vocab_size", tokenizer.vocab_size() as f64);
    Ok(())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::testing::{Bench, run};

    #[test]
    fn a_file_and_its_folder_give_the_same_tokenizer() {
        let bench = Bench::new();
        let file = bench.path("tokenizer.json");
        lm::Tokenizer::train_bpe(["one two two"].into_iter(), 260).unwrap().save(&file).unwrap();
        let by_file = run(&Import, json!({ "file": file }), bench.inputs()).unwrap();
        let by_folder = run(&Import, json!({ "file": file.parent() }), bench.inputs()).unwrap();
        let read = |out: &crate::testing::Out| std::fs::read(out.path().join("tokenizer.json")).unwrap();
        assert_eq!(read(&by_file), read(&by_folder));
    }

    #[test]
    fn a_broken_file_and_no_source_are_told() {
        let bench = Bench::new();
        let file = bench.write("tokenizer.json", "{}");
        let error = run(&Import, json!({ "file": file }), bench.inputs()).map(drop).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.message.contains("tokenizer.json"), "{error}");
        assert!(error.help.is_some_and(|help| help.contains("byte-level BPE")));
        assert!(run(&Import, json!({}), bench.inputs()).is_err());
    }
}
