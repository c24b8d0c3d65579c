//! `model.import`: imports an existing model: embedded, from a folder or file, or from the hub.

use std::path::Path;

use engine::context::Context;
use engine::error::{AtPath, Error, Result};
use engine::estimate::Forecast;
use engine::external::InputPath;
use engine::kind::{Kind, Signature};
use lm::{CausalLm, WeightType};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::assets::{self, AssetName};
use crate::error::IntoStageResult;
use crate::hub::{self, HubId};
use crate::model::chat::ChatTemplate;
use crate::model::forecast::Models;
use crate::model::source::Source;
use crate::train::Weights;
use crate::train::params::Faults;
use crate::types::folder::write_json;
use crate::types::{Model, ModelOutline};

pub struct Import;

/// Exactly one of `asset`, `folder`, `file` and `hub`.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// A model embedded in this program.
    pub asset: Option<AssetName>,
    /// A Hugging Face folder: config.json, tokenizer.json, and the weights as model.safetensors or pytorch_model.bin,
    /// in one file or in shards.
    pub folder: Option<InputPath>,
    /// A Llama GGUF file, which includes config and tokenizer; its weights are dequantised to f32.
    pub file: Option<InputPath>,
    /// A repository on the Hugging Face hub.
    pub hub: Option<HubId>,
    /// Whether to take the chat template too (from `tokenizer_config.json`, `chat_template.jinja` or the GGUF's metadata),
    /// for `annotate.local`.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub chat_template: bool,
}

impl Kind for Import {
    type Params = Params;
    const NAME: &'static str = "model.import";
    const VERSION: u32 = 2;
    const ABOUT: &'static str =
        "takes a model from the program's assets, a Hugging Face folder, a GGUF file or the hub";

    fn signature(&self, p: &Params) -> Signature {
        let signature = Signature::producing("Model").optional("tokenizer", &["Tokenizer"]);
        hub::declare(signature, p.hub.as_ref())
    }

    fn check(&self, p: &Params) -> Vec<(String, String)> {
        let mut faults = Faults::default();
        let given = [p.asset.is_some(), p.folder.is_some(), p.file.is_some(), p.hub.is_some()];
        let sources = given.into_iter().filter(|given| *given).count();
        faults.must(sources == 1, "", "give exactly one of `asset`, `folder`, `file` and `hub`");
        if let Some(InputPath(file)) = &p.file {
            let gguf = file.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf"));
            faults.must(gguf, "file", "must be a .gguf file; `folder` takes what Hugging Face's tools write");
        }
        let has_template = !p.chat_template || p.asset.is_none();
        faults.must(has_template, "chat_template", "the program's own models have no chat template");
        faults.0
    }

    fn forecast(&self, p: &Params, _: &dyn Fn(&str) -> Vec<Value>) -> Forecast {
        let outline = match p {
            Params { asset: Some(AssetName(name)), .. } => assets::config(name).map_or(Value::Null, ModelOutline::of),
            Params { folder: Some(folder), .. } => ModelOutline::read(&folder.0),
            Params { file: Some(file), .. } => {
                lm::io::Gguf::open(&file.0).map_or(Value::Null, |file| ModelOutline::of(file.config))
            }
            // A hub is asked by the attempt only.
            _ => Value::Null,
        };
        Forecast { memory: Models::new([&outline]).map(|models| models.loaded()), outline }
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        let port = ctx.optional("tokenizer").map(|input| input.folder.join(Model::TOKENIZER));
        let name = match &params {
            Params { asset: Some(AssetName(name)), .. } => {
                assets::write(name, ctx.out())?;
                name.clone()
            }
            Params { folder: Some(folder), .. } => take(&Source::folder(&folder.0), ctx, port.is_some(), &params)?,
            Params { file: Some(file), .. } => {
                let (model, tokenizer) = crate::model::load(&file.0)?;
                crate::model::save(&model, &tokenizer, ctx.out(), Weights::F32)?;
                if params.chat_template {
                    let config = lm::io::gguf_chat_config(&file.0).into_stage_result()?;
                    if config["chat_template"].is_null() {
                        return Err(no_chat_template(&file.0.display().to_string()));
                    }
                    write_json(&ctx.out().join(Model::TOKENIZER_CONFIG), &config)?;
                }
                file.0.display().to_string()
            }
            Params { hub: Some(id), .. } => take(&Source::hub(id, ctx)?, ctx, port.is_some(), &params)?,
            _ => return Err(Error::internal("model.import: no source")),
        };
        if let Some(tokenizer) = &port {
            // An asset brings its own tokenizer, which the port replaces.
            let to = ctx.out().join(Model::TOKENIZER);
            if to.exists() {
                std::fs::remove_file(&to).at(&to)?;
            }
            ctx.link_or_copy(tokenizer, Model::TOKENIZER)?;
        }
        let (model, tokenizer) = crate::model::load(ctx.out()).map_err(|e| {
            // The loaded files are our copies; the message should name the originals.
            let e = match &port {
                Some(theirs) => renamed(e, &ctx.out().join(Model::TOKENIZER), &theirs.display().to_string()),
                None => e,
            };
            renamed(e, ctx.out(), &name)
        })?;
        if port.is_none() && !tokenizer.bos_ids().is_empty() {
            // Store the tokenizer with a post-processor that prepends the begin tokens used here and appends nothing.
            let to = ctx.out().join(Model::TOKENIZER);
            std::fs::remove_file(&to).at(&to)?;
            tokenizer.save(&to).into_stage_result()?;
        }
        ctx.metric("vocabulary", tokenizer.vocab_size() as f64);
        ctx.metric("window", model.config().window() as f64);
        Ok(())
    }
}

/// Copies a model's files into the artifact and returns the name of their source. Safetensors are kept unchanged;
/// pickles are converted to f32 safetensors, which can hold all their values.
fn take(source: &Source, ctx: &mut Context, has_tokenizer: bool, params: &Params) -> Result<String> {
    take_files(source, ctx, has_tokenizer, params.chat_template).map_err(|e| renamed(e, &source.here, &source.name))?;
    Ok(source.name.clone())
}

fn take_files(source: &Source, ctx: &mut Context, has_tokenizer: bool, chat_template: bool) -> Result<()> {
    let mut files = vec![Model::CONFIG.to_owned()];
    if source.has(Model::GENERATION) {
        files.push(Model::GENERATION.to_owned());
    }
    if !has_tokenizer {
        files.push(Model::TOKENIZER.to_owned());
    }
    if chat_template {
        let held = [Model::TOKENIZER_CONFIG, Model::CHAT_TEMPLATE].into_iter().filter(|file| source.has(file));
        files.extend(held.map(str::to_owned));
    }
    source.fetch(&files, ctx)?;
    if chat_template && !ChatTemplate::is_in(&source.here)? {
        return Err(no_chat_template(&source.name));
    }
    // Check the family before fetching gigabytes of an unknown one.
    lm::ModelConfig::load(&source.here).into_stage_result()?;
    let weights = source.weights(ctx)?;
    source.fetch(&weights.files, ctx)?;
    if weights.pickled {
        CausalLm::load(&source.here).and_then(|model| model.save(ctx.out(), WeightType::F32)).into_stage_result()?;
        files.retain(|file| file != Model::CONFIG);
    } else {
        files.extend(weights.files);
    }
    files.iter().try_for_each(|file| source.put(file, ctx))
}

fn no_chat_template(source: &str) -> Error {
    Error::user(format!("{source}: has no chat template"))
        .help("leave `chat_template` out; `annotate.local` can take a template from a file")
}

/// Replaces the path `from` by `to` in the message; either may end in a slash.
fn renamed(mut e: Error, from: &Path, to: &str) -> Error {
    let from = from.display().to_string();
    e.message = e.message.replace(from.trim_end_matches('/'), to.trim_end_matches('/'));
    e
}
