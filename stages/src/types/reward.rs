//! The RewardModel and Ensemble artifacts: language models with scalar heads.

use std::path::Path;

use engine::artifact::{ArtifactType, Facts, FileSpec};
use engine::error::{Error, Result};
use engine::names::Digest;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::model::{Model, ModelOutline};
use super::{LearningPoint, folder, json_lines};

/// Where the score is read.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Pooling {
    /// At the last real token, as in the paper.
    #[default]
    Last,
    /// Summed over the response's tokens.
    Sum,
}

/// Mean score of references minus the mean score of the same texts with facts swapped, with its 95% interval.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct FactSensitivity {
    pub mean: f64,
    pub low: f64,
    pub high: f64,
    /// Number of text pairs measured.
    pub n: u64,
}

impl FactSensitivity {
    /// Whether the interval lies above zero. If not, the report says "the gold model does not read the post".
    pub fn reads_the_post(&self) -> bool {
        self.low > 0.0
    }
}

/// `reward.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct RewardInfo {
    pub pool: Pooling,
    /// Subtracted from every raw score.
    pub centre: f64,
    /// Divisor of the centred score.
    #[serde(default = "one")]
    pub scale: f64,
    /// Digest of the Model that this was trained from.
    pub base_digest: Digest,
    pub member_seed: u64,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fact_sensitivity: Option<FactSensitivity>,
    #[serde(flatten)]
    pub more: serde_json::Map<String, serde_json::Value>,
}

fn one() -> f64 {
    1.0
}

/// `ensemble.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EnsembleInfo {
    /// Member labels in order; each names a folder below `members/`.
    pub members: Vec<String>,
    /// Digest of the first member's base. A member with another base keeps that base next to its adapter.
    pub base_digest: Digest,
    #[serde(flatten)]
    pub more: serde_json::Map<String, serde_json::Value>,
}

pub const BASE: &str = "base";
pub const ADAPTER: &str = "adapter";
pub const HEAD: &str = "head.safetensors";
pub const INFO: &str = "reward.json";
pub const ENSEMBLE: &str = "ensemble.json";
pub const MEMBERS: &str = "members";

/// Checks a PEFT folder.
///
/// # Errors
/// Names the file that is missing or broken.
pub fn check_adapter(folder: &Path) -> Result<()> {
    let _: serde_json::Map<String, serde_json::Value> =
        folder::read_json(&folder::file(folder, "adapter_config.json")?)?;
    folder::tensors(folder, "adapter_model.safetensors").map(drop)
}

fn check_member(folder: &Path) -> Result<RewardInfo> {
    if folder.join(ADAPTER).exists() {
        check_adapter(&folder.join(ADAPTER))?;
    }
    folder::tensors(folder, HEAD)?;
    folder::read_json(&folder::file(folder, INFO)?)
}

/// The artifact type: `base/`, `adapter/` (absent after full training), `head.safetensors`, `reward.json`,
/// `metrics.json`, and `learning.parquet` (absent in artifacts of older versions).
pub struct RewardModel;

impl RewardModel {
    pub const NAME: &'static str = "RewardModel";

    /// # Errors
    /// If `reward.json` is missing or broken.
    pub fn info(folder: &Path) -> Result<RewardInfo> {
        folder::read_json(&folder::file(folder, INFO)?)
    }
}

impl ArtifactType for RewardModel {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn about(&self) -> &'static str {
        "a language model with a scalar head that scores summaries"
    }

    fn files(&self) -> Vec<FileSpec> {
        vec![
            FileSpec::new("base/", "the language model that it was trained from, as in `Model`"),
            FileSpec::new("adapter/", "the LoRA, as a PEFT folder; absent after full training").optional(),
            FileSpec::new(HEAD, "the scalar head"),
            FileSpec::new(INFO, "where the score is read, its centre and scale, the base model's digest, the seed"),
            json_lines::table::<LearningPoint>(super::LEARNING).optional(),
        ]
    }

    fn check(&self, folder: &Path) -> Result<Facts> {
        Model::check_folder(&folder.join(BASE))?;
        let info = check_member(folder)?;
        let mut facts = Facts::default();
        folder::metrics(folder, &mut facts)?;
        LearningPoint::check(folder, &mut facts)?;
        facts.metrics.insert("centre".to_owned(), info.centre);
        Ok(facts)
    }

    fn outline(&self, folder: &Path) -> Value {
        ModelOutline::trained(&ModelOutline::read(&folder.join(BASE)), folder.join(ADAPTER).is_dir())
    }

    fn preview(&self, folder: &Path, _rows: usize) -> Result<String> {
        folder::show(folder, INFO)
    }
}

/// The artifact type: `base/`, `members/<label>/{adapter/, head.safetensors, reward.json}` (plus `base/` if the
/// member's base differs), `ensemble.json`.
pub struct Ensemble;

impl Ensemble {
    pub const NAME: &'static str = "Ensemble";

    /// # Errors
    /// If `ensemble.json` is missing or broken.
    pub fn info(folder: &Path) -> Result<EnsembleInfo> {
        folder::read_json(&folder::file(folder, ENSEMBLE)?)
    }
}

impl ArtifactType for Ensemble {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn about(&self) -> &'static str {
        "reward models whose disagreement is the uncertainty"
    }

    fn files(&self) -> Vec<FileSpec> {
        vec![
            FileSpec::new("base/", "the first member's language model, as in `Model`"),
            FileSpec::new(
                "members/",
                "a folder per member: `adapter/`, `head.safetensors`, `reward.json`, and `base/` if it has another base",
            ),
            FileSpec::new(ENSEMBLE, "the members' labels in order, and the digest of the base"),
        ]
    }

    fn check(&self, folder: &Path) -> Result<Facts> {
        Model::check_folder(&folder.join(BASE))?;
        let info = Self::info(folder)?;
        for label in &info.members {
            let own = folder.join(MEMBERS).join(label);
            let member = check_member(&own)?;
            if own.join(BASE).exists() {
                Model::check_folder(&own.join(BASE))?;
            } else if member.base_digest != info.base_digest {
                return Err(Error::user(format!(
                    "{}: member `{label}` is made from the base {}, which is missing; the ensemble's is {}",
                    folder.display(),
                    member.base_digest.short(),
                    info.base_digest.short()
                )));
            }
        }
        let mut facts = Facts::default();
        folder::metrics(folder, &mut facts)?;
        facts.metrics.insert("members".to_owned(), info.members.len() as f64);
        Ok(facts)
    }

    fn outline(&self, folder: &Path) -> Value {
        let base = ModelOutline::read(&folder.join(BASE));
        let member = |label: &String| {
            let own = folder.join(MEMBERS).join(label);
            ModelOutline::trained(&base, !own.join(BASE).is_dir())
        };
        Self::info(folder)
            .map_or(Value::Null, |info| ModelOutline::ensemble(&info.members.iter().map(member).collect::<Vec<_>>()))
    }

    fn preview(&self, folder: &Path, _rows: usize) -> Result<String> {
        folder::show(folder, ENSEMBLE)
    }
}
