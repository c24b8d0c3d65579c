//! Evaluation: a policy run judged by the gold model and by true quality, step by step.

use std::path::Path;

use engine::artifact::{ArtifactType, Facts};
use engine::error::Result;
use serde::{Deserialize, Serialize};

use super::folder;
use super::policy::Half;
use super::reward::FactSensitivity;
use crate::table;

crate::table! {
    /// One point of the curves: a step on one half of the validation prompts, sampled or greedy. Intervals are 95% bootstrap.
    pub struct CurvePoint {
        pub step: i64,
        pub half: Half,
        pub greedy: bool,
        /// Prompts.
        pub n: i64,
        /// Raw score of the gold model.
        pub gold: f64,
        pub gold_low: f64,
        pub gold_high: f64,
        /// In SFT-sample standard deviations above SFT, same half.
        pub gold_sd: f64,
        pub gold_sd_low: f64,
        pub gold_sd_high: f64,
        /// Against the SFT model's sample for the same post; a tie is 0.5.
        pub win_rate: f64,
        pub win_rate_low: f64,
        pub win_rate_high: f64,
        pub proxy: f64,
        pub proxy_low: f64,
        pub proxy_high: f64,
        pub mu: f64,
        /// Of the ensemble's members; absent with one reward model.
        pub variance: Option<f64>,
        pub kl: f64,
        pub kl_low: f64,
        pub kl_high: f64,
        pub length: f64,
        pub length_low: f64,
        pub length_high: f64,
        pub eos_rate: f64,
        pub eos_rate_low: f64,
        pub eos_rate_high: f64,
        /// True quality: only where posts carry facts, as are the next five.
        pub quality: Option<f64>,
        pub quality_low: Option<f64>,
        pub quality_high: Option<f64>,
        pub coverage: Option<f64>,
        pub invented: Option<f64>,
        pub fluency: Option<f64>,
        /// s2 with |mu - gold|, both centred.
        pub spearman_s2_error: Option<f64>,
    }
}

crate::table! {
    /// One sample, scored.
    pub struct Score {
        pub step: i64,
        pub post_id: String,
        pub half: Half,
        pub greedy: bool,
        pub gold: f64,
        pub proxy: f64,
        pub mean: f64,
        pub variance: Option<f64>,
        pub kl: f64,
        pub length: i64,
        pub ended: bool,
        pub quality: Option<f64>,
        pub coverage: Option<f64>,
        pub invented: Option<f64>,
        pub fluency: Option<f64>,
    }
}

crate::table! {
    /// One summary of a post for people to read.
    pub struct Example {
        pub post_id: String,
        pub prompt: String,
        pub reference: String,
        pub step: i64,
        pub text: String,
        pub gold: f64,
        pub proxy: f64,
        pub quality: Option<f64>,
    }
}

/// The gold scores of the SFT model's samples: the scale of `gold_sd`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SftScale {
    pub gold_mean: f64,
    pub gold_std: f64,
}

/// Whether the adaptive coefficient did anything. Absent numbers do not apply to the arm.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mechanism {
    pub c_over_lambda_first: Option<f64>,
    pub c_over_lambda_max: Option<f64>,
    pub c_over_lambda_last: Option<f64>,
    pub one_minus_c: Option<f64>,
    /// Largest over the phases of mean(c KL) / (gain in mean((1 - c) mu) since the first), where that gain is at least a tenth of
    /// its maximum.
    pub c_kl_share_max: Option<f64>,
    /// The constant KL coefficient, least and most over the phases: they differ where a matched arm follows a schedule.
    pub lambda_low: Option<f64>,
    pub lambda_high: Option<f64>,
    pub spearman_s2_kl: Option<f64>,
    pub spearman_s2_error: Option<f64>,
}

/// `evaluation.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EvaluationInfo {
    pub objective: String,
    pub lambda: f64,
    pub seed: u64,
    pub evaluation_seed: u64,
    pub steps: Vec<i64>,
    /// Best gold on half A, sampled.
    pub chosen_step: i64,
    pub final_step: i64,
    pub sft: SftScale,
    /// Of the gold model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fact_sensitivity: Option<FactSensitivity>,
    pub reads_the_post: bool,
    pub mechanism: Mechanism,
    pub prompt_count: u64,
    #[serde(flatten)]
    pub more: serde_json::Map<String, serde_json::Value>,
}

/// The artifact type: `curve.parquet`, `scores.parquet`, `examples.parquet`, `evaluation.json`, `metrics.json`.
pub struct Evaluation;

impl Evaluation {
    pub const NAME: &'static str = "Evaluation";
    pub const CURVE: &'static str = "curve.parquet";
    pub const SCORES: &'static str = "scores.parquet";
    pub const EXAMPLES: &'static str = "examples.parquet";
    pub const INFO: &'static str = "evaluation.json";

    /// # Errors
    /// If `evaluation.json` is missing or broken.
    pub fn info(folder: &Path) -> Result<EvaluationInfo> {
        folder::read_json(&folder::file(folder, Self::INFO)?)
    }

    /// # Errors
    /// If there is no such table.
    pub fn curve(folder: &Path) -> Result<Vec<CurvePoint>> {
        table::read(&folder::file(folder, Self::CURVE)?)
    }

    /// # Errors
    /// If there is no such table.
    pub fn scores(folder: &Path) -> Result<table::Reader<Score>> {
        table::Reader::open(&folder::file(folder, Self::SCORES)?)
    }

    /// # Errors
    /// If there is no such table.
    pub fn examples(folder: &Path) -> Result<Vec<Example>> {
        table::read(&folder::file(folder, Self::EXAMPLES)?)
    }
}

impl ArtifactType for Evaluation {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn schema_version(&self) -> u32 {
        2
    }

    fn about(&self) -> &'static str {
        "a policy run judged by the gold model and by true quality, step by step"
    }

    fn check(&self, folder: &Path) -> Result<Facts> {
        Self::info(folder)?;
        let mut facts = Facts::default();
        table::check::<CurvePoint>(&folder::file(folder, Self::CURVE)?, &mut facts)?;
        table::check::<Score>(&folder::file(folder, Self::SCORES)?, &mut facts)?;
        table::check::<Example>(&folder::file(folder, Self::EXAMPLES)?, &mut facts)?;
        folder::metrics(folder, &mut facts)?;
        Ok(facts)
    }

    fn preview(&self, folder: &Path, rows: usize) -> Result<String> {
        let info = folder::show(folder, Self::INFO)?;
        Ok(info + &table::preview(&folder::file(folder, Self::CURVE)?, rows)?)
    }
}
