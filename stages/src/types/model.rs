//! The Model artifact: a language model as a Hugging Face folder.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use engine::artifact::{ArtifactType, Facts, FileSpec};
use engine::error::{Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{LearningPoint, folder, json_lines};
use crate::error::IntoStageResult;

/// The artifact type: `config.json`, optionally `generation_config.json`, `tokenizer.json`, and `model.safetensors` or
/// the shards named by its index; after training also `learning.parquet`.
pub struct Model;

impl Model {
    pub const NAME: &'static str = "Model";
    pub const CONFIG: &'static str = "config.json";
    /// May name more end-of-text tokens.
    pub const GENERATION: &'static str = "generation_config.json";
    pub const WEIGHTS: &'static str = "model.safetensors";
    pub const TOKENIZER: &'static str = "tokenizer.json";
    /// May hold the chat template, and the tokens that it uses.
    pub const TOKENIZER_CONFIG: &'static str = "tokenizer_config.json";
    /// The chat template in a file of its own, as newer tools write it.
    pub const CHAT_TEMPLATE: &'static str = "chat_template.jinja";
    /// Maps tensors to shards if the weights are split.
    pub const INDEX: &'static str = "model.safetensors.index.json";

    /// The files of a model folder.
    ///
    /// # Errors
    /// If the index of shards cannot be read.
    pub fn files(folder: &Path) -> Result<Vec<String>> {
        let mut files = vec![Self::CONFIG.to_owned(), Self::TOKENIZER.to_owned()];
        if folder.join(Self::GENERATION).is_file() {
            files.push(Self::GENERATION.to_owned());
        }
        if Self::is_sharded(folder) {
            files.push(Self::INDEX.to_owned());
        }
        files.extend(weights(folder)?);
        Ok(files)
    }

    fn is_sharded(folder: &Path) -> bool {
        !folder.join(Self::WEIGHTS).is_file() && folder.join(Self::INDEX).is_file()
    }

    /// Checks that `folder` holds a complete model; returns its number of parameters.
    ///
    /// # Errors
    /// Names the file that is missing or broken.
    pub fn check_folder(folder: &Path) -> Result<u64> {
        let config: serde_json::Map<String, serde_json::Value> =
            folder::read_json(&folder::file(folder, Self::CONFIG)?)?;
        if !config.contains_key("vocab_size") {
            return Err(Error::user(format!("{}: field `vocab_size` is missing", folder.join(Self::CONFIG).display())));
        }
        let tokenizer: serde_json::Map<String, serde_json::Value> =
            folder::read_json(&folder::file(folder, Self::TOKENIZER)?)?;
        if !tokenizer.contains_key("model") {
            return Err(Error::user(format!("{}: field `model` is missing", folder.join(Self::TOKENIZER).display())));
        }
        Ok(parameters(&tensors(folder)?))
    }
}

/// What is known of language models before they are made: the outline of artifacts that hold some.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ModelOutline {
    /// `config.json`.
    pub config: Value,
    /// How many weights of this shape are in memory once they are loaded.
    pub copies: usize,
    /// Whether the weights are an adapter's and those of a base that an ensemble shares.
    pub adapter: bool,
}

impl ModelOutline {
    /// Of one model.
    pub fn of(config: Value) -> Value {
        Self { config, copies: 1, adapter: false }.json()
    }

    /// Of the model in `folder`; null if its config cannot be read.
    pub fn read(folder: &Path) -> Value {
        folder::read_json(&folder.join(Model::CONFIG)).map_or(Value::Null, Self::of)
    }

    /// The outline of a reward model that was trained from a model with this outline.
    pub fn trained(outline: &Value, adapter: bool) -> Value {
        serde_json::from_value(outline.clone()).map_or(Value::Null, |outline: Self| Self { adapter, ..outline }.json())
    }

    /// Of an ensemble of models with these outlines. Adapters share one base.
    pub fn ensemble(members: &[Value]) -> Value {
        let members: Result<Vec<Self>, _> =
            members.iter().map(|member| serde_json::from_value(member.clone())).collect();
        let Ok([first, ..]) = members.as_deref() else { return Value::Null };
        let members = members.as_deref().unwrap_or_default();
        let full = members.iter().filter(|member| !member.adapter).count();
        let copies = full + usize::from(full < members.len());
        Self { config: first.config.clone(), copies, adapter: false }.json()
    }

    fn json(self) -> Value {
        json!({ "config": self.config, "copies": self.copies, "adapter": self.adapter })
    }
}

/// Names of the files that hold the weights.
fn weights(folder: &Path) -> Result<Vec<String>> {
    if Model::is_sharded(folder) {
        return Ok(lm::io::shards(&folder.join(Model::INDEX)).into_stage_result()?.into_iter().collect());
    }
    Ok(vec![Model::WEIGHTS.to_owned()])
}

/// All tensors by name, as (dtype, shape).
fn tensors(folder: &Path) -> Result<BTreeMap<String, (String, Vec<u64>)>> {
    let mut tensors = BTreeMap::new();
    for file in weights(folder)? {
        tensors.extend(folder::tensors(folder, &file)?);
    }
    Ok(tensors)
}

fn parameters(tensors: &BTreeMap<String, (String, Vec<u64>)>) -> u64 {
    tensors.values().map(|(_, shape)| shape.iter().product::<u64>()).sum()
}

impl ArtifactType for Model {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn about(&self) -> &'static str {
        "a language model with its tokenizer, as a Hugging Face folder"
    }

    fn files(&self) -> Vec<FileSpec> {
        vec![
            FileSpec::new(Self::CONFIG, "the architecture, with Hugging Face's names"),
            FileSpec::new(Self::GENERATION, "more end-of-text tokens").optional(),
            FileSpec::new(Self::TOKENIZER, "the tokenizer, in Hugging Face's format"),
            FileSpec::new(Self::TOKENIZER_CONFIG, "the chat template, and the tokens that it uses").optional(),
            FileSpec::new(Self::CHAT_TEMPLATE, "the chat template, if it has a file of its own").optional(),
            FileSpec::new(Self::WEIGHTS, "the weights; absent if they are in shards").optional(),
            FileSpec::new(Self::INDEX, "the shard of each tensor, if the weights are in shards").optional(),
            json_lines::table::<LearningPoint>(super::LEARNING).optional(),
        ]
    }

    fn check(&self, folder: &Path) -> Result<Facts> {
        let mut facts = Facts::default();
        folder::metrics(folder, &mut facts)?;
        LearningPoint::check(folder, &mut facts)?;
        facts.metrics.insert("parameters".to_owned(), Self::check_folder(folder)? as f64);
        Ok(facts)
    }

    fn outline(&self, folder: &Path) -> Value {
        ModelOutline::read(folder)
    }

    fn preview(&self, folder: &Path, rows: usize) -> Result<String> {
        let mut text = folder::show(folder, Self::CONFIG)?;
        let tensors = tensors(folder)?;
        let _ = writeln!(text, "{} parameters in {}", parameters(&tensors), weights(folder)?.join(", "));
        for (name, (dtype, shape)) in tensors.into_iter().take(rows) {
            let _ = writeln!(text, "  {name}  {dtype} {shape:?}");
        }
        Ok(text)
    }
}
