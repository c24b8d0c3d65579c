//! `model.import`: a model that exists already: embedded, in a folder, or on the hub. Knows no training.

use std::path::Path;

use engine::context::Context;
use engine::error::{At, Error, Result};
use engine::kind::{InputPath, Kind, Signature};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::assets::{self, AssetName};
use crate::hub::{self, Hub, HubId, Repo};
use crate::train::params::Faults;
use crate::types::Model;

pub struct Import;

/// Exactly one of `asset`, `folder` and `hub`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// A model that is embedded in this program.
    pub asset: Option<AssetName>,
    /// A Hugging Face folder: config.json, model.safetensors, tokenizer.json.
    pub folder: Option<InputPath>,
    /// A repository of the Hugging Face hub.
    pub hub: Option<HubId>,
}

impl Kind for Import {
    type Params = Params;
    const NAME: &'static str = "model.import";
    const VERSION: u32 = 1;
    const ABOUT: &'static str = "takes a model from the program's assets, a Hugging Face folder or the hub";

    fn signature(&self, p: &Params) -> Signature {
        let signature = Signature::gives("Model").optional("tokenizer", &["Tokenizer"]);
        hub::declare(signature, p.hub.as_ref())
    }

    fn check(&self, p: &Params) -> Vec<(String, String)> {
        let mut faults = Faults::default();
        let sources =
            [p.asset.is_some(), p.folder.is_some(), p.hub.is_some()].into_iter().filter(|given| *given).count();
        faults.must(sources == 1, "", "give exactly one of `asset`, `folder` and `hub`");
        faults.0
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        let tokenizer = ctx.optional("tokenizer").map(|input| input.folder.join(Model::TOKENIZER));
        let has_tokenizer = tokenizer.is_some();
        let name = match (&params.asset, &params.folder, &params.hub) {
            (Some(AssetName(name)), None, None) => {
                assets::write(name, ctx.out())?;
                name.clone()
            }
            (None, Some(folder), None) => from_folder(&folder.0, ctx, has_tokenizer)?,
            (None, None, Some(hub)) => from_hub(hub, ctx, has_tokenizer)?,
            _ => return Err(Error::ours("model.import: no source")),
        };
        if let Some(tokenizer) = tokenizer {
            let to = ctx.out().join(Model::TOKENIZER);
            // The folder's own may be a link into the store: replaced, never written to.
            std::fs::remove_file(&to)
                .or_else(|e| if e.kind() == std::io::ErrorKind::NotFound { Ok(()) } else { Err(e) })
                .at(&to)?;
            ctx.take(&tokenizer, Model::TOKENIZER)?;
        }
        let port = if has_tokenizer { ctx.optional("tokenizer") } else { None };
        let (model, tokenizer) = super::load(ctx.out()).map_err(|mut e| {
            // What was loaded is our copy: told is whose it is.
            if let Some(port) = port {
                let theirs = port.folder.join(Model::TOKENIZER);
                e.message = renamed(&e.message, &ctx.out().join(Model::TOKENIZER), &theirs.display().to_string());
            }
            e.message = renamed(&e.message, ctx.out(), &name);
            e
        })?;
        ctx.metric("vocabulary", tokenizer.vocab_size() as f64);
        ctx.metric("window", model.config().window() as f64);
        Ok(())
    }
}

/// A message about `from` as one about `to`.
fn renamed(message: &str, from: &Path, to: &str) -> String {
    message.replace(&from.display().to_string(), to)
}

/// Copies the files: what is outside the store may change later, so it is never linked.
fn from_folder(folder: &Path, ctx: &mut Context, has_tokenizer: bool) -> Result<String> {
    for file in Model::FILES {
        let from = folder.join(file);
        if !from.is_file() {
            if file == Model::TOKENIZER && has_tokenizer {
                continue;
            }
            let other = |file: &str| folder.join(file).is_file();
            return Err(missing(&folder.display().to_string(), file, other));
        }
        std::fs::copy(&from, ctx.out().join(file)).at(&from)?;
    }
    Ok(folder.display().to_string().trim_end_matches('/').to_owned())
}

fn from_hub(id: &HubId, ctx: &mut Context, has_tokenizer: bool) -> Result<String> {
    let hub = Hub::open(Repo::Model, id, &ctx.checkpoints().join("hub"))?;
    let wanted: Vec<String> =
        Model::FILES.iter().filter(|file| !(has_tokenizer && **file == Model::TOKENIZER)).map(|&f| f.into()).collect();
    if let Some(file) = wanted.iter().find(|file| !hub.has(file)) {
        return Err(missing(&format!("model `{}`", id.id), file, |file| hub.has(file)));
    }
    for (file, fetched) in wanted.iter().zip(hub.fetch_all(&wanted, ctx)?) {
        ctx.take(&fetched, file)?;
    }
    Ok(id.id.clone())
}

/// The error for a file that is not there, with what stands in its place.
fn missing(place: &str, file: &str, other: impl Fn(&str) -> bool) -> Error {
    let error = Error::yours(format!("{place}: file `{file}` is missing"));
    if file != Model::WEIGHTS {
        return error.help("a model is a folder with config.json, model.safetensors and tokenizer.json");
    }
    if other("model.safetensors.index.json") {
        return error.help("its weights are sharded (model.safetensors.index.json), which is not built yet: save them as one model.safetensors");
    }
    if other("pytorch_model.bin") {
        return error
            .help("its weights are a pytorch_model.bin, which is not built yet: save them as model.safetensors");
    }
    error.help("save the weights as one model.safetensors")
}
