//! The Evaluation artifact: a policy run judged by the gold model and by true quality at each evaluated step.

use std::path::Path;

use engine::artifact::{ArtifactType, Facts, FileSpec};
use engine::error::Result;
use serde::{Deserialize, Serialize};

use super::policy::Half;
use super::reward::FactSensitivity;
use super::{Objective, folder, json_lines};
use crate::table;

crate::table! {
    /// One point of the curves: one step on one half of the validation prompts, sampled or greedy. Intervals are 95%
    /// bootstrap.
    pub struct CurvePoint {
        /// Phases completed; 0 is the SFT model.
        pub step: i64,
        /// Half of the prompts.
        pub half: Half,
        /// Whether the responses were decoded greedily instead of sampled.
        pub greedy: bool,
        /// Number of prompts.
        pub n: i64,
        /// Raw score of the gold model.
        pub gold: f64,
        pub gold_low: f64,
        pub gold_high: f64,
        /// Gold score in standard deviations of the SFT samples above their mean, on the same half.
        pub gold_sd: f64,
        pub gold_sd_low: f64,
        pub gold_sd_high: f64,
        /// Win rate against the SFT model's sample for the same post; a tie counts 0.5.
        pub win_rate: f64,
        pub win_rate_low: f64,
        pub win_rate_high: f64,
        /// The arm's own reward.
        pub proxy: f64,
        pub proxy_low: f64,
        pub proxy_high: f64,
        /// Mean of the reward models' scores.
        pub mu: f64,
        /// Variance across the ensemble's members; absent with one reward model.
        pub variance: Option<f64>,
        /// The three parts that sum to `variance`: the members' offsets, their slopes on mu, and the rest.
        pub variance_offset: Option<f64>,
        /// See `variance_offset`.
        pub variance_slope: Option<f64>,
        /// See `variance_offset`.
        pub variance_rest: Option<f64>,
        /// KL to the SFT model in nats per response: mean log pi - log pi_ref.
        pub kl: f64,
        pub kl_low: f64,
        pub kl_high: f64,
        /// Mean KL between the full distributions at the visited positions: same expectation as `kl`, less noise.
        pub kl_exact: f64,
        /// Tokens per response.
        pub length: f64,
        pub length_low: f64,
        pub length_high: f64,
        /// Share of responses that ended with EOS.
        pub eos_rate: f64,
        pub eos_rate_low: f64,
        pub eos_rate_high: f64,
        /// True quality. This and the next five columns are present only if posts carry facts.
        pub quality: Option<f64>,
        pub quality_low: Option<f64>,
        pub quality_high: Option<f64>,
        /// Share of the post's six facts that a summary states.
        pub coverage: Option<f64>,
        /// Number of wrong facts divided by six.
        pub invented: Option<f64>,
        /// Share of word bigrams that occur in the grammar's summaries.
        pub fluency: Option<f64>,
        /// Spearman correlation of s2 with (mu - (gold - a) / b)^2, where gold = a + b mu is fitted on the SFT model's
        /// samples of half A.
        pub spearman_s2_error: Option<f64>,
    }
}

crate::table! {
    /// One scored sample.
    pub struct Score {
        /// Phases completed; 0 is the SFT model.
        pub step: i64,
        /// The post that is summarised.
        pub post_id: String,
        /// Half of the prompts that the post belongs to.
        pub half: Half,
        /// Whether the response was decoded greedily instead of sampled.
        pub greedy: bool,
        /// Raw score of the gold model.
        pub gold: f64,
        /// The arm's own reward.
        pub proxy: f64,
        /// Mean of the reward models' scores.
        pub mean: f64,
        /// Variance of the reward models' scores; absent with one model.
        pub variance: Option<f64>,
        /// k1: log pi - log pi_ref of the response.
        pub kl: f64,
        /// KL between the full distributions, summed over the response's positions.
        pub kl_exact: f64,
        /// Scores of the reward models, in member order.
        pub scores: Vec<f32>,
        /// Tokens of the response.
        pub length: i64,
        /// Whether EOS was sampled.
        pub ended: bool,
        /// True quality. This and the next three columns are present only if posts carry facts.
        pub quality: Option<f64>,
        /// Share of the post's six facts that the summary states.
        pub coverage: Option<f64>,
        /// Number of wrong facts divided by six.
        pub invented: Option<f64>,
        /// Share of word bigrams that occur in the grammar's summaries.
        pub fluency: Option<f64>,
    }
}

crate::table! {
    /// The ensemble's variance next to its squared error, over samples of half B in one range of KL. Errors are in
    /// units of the variance: (mu - (truth - a) / b)^2 with truth = a + b mu fitted on the SFT model's samples of half
    /// A.
    pub struct CalibrationBin {
        /// Lower edge of the range of KL.
        pub kl_low: f64,
        /// Upper edge; only the last range includes it.
        pub kl_high: f64,
        /// Mean KL of the samples.
        pub kl: f64,
        /// Number of samples.
        pub n: i64,
        /// Mean variance across the ensemble's members.
        pub variance: f64,
        /// Error against the gold score; absent if mu does not rise with it.
        pub gold_error: Option<f64>,
        /// Error against true quality; absent if posts carry no facts.
        pub quality_error: Option<f64>,
    }
}

crate::table! {
    /// One summary of a post, shown to readers of the report.
    pub struct Example {
        /// The post that is summarised.
        pub post_id: String,
        /// Prompt text.
        pub prompt: String,
        /// The author's own summary.
        pub reference: String,
        /// Phases completed; 0 is the SFT model.
        pub step: i64,
        /// The summary.
        pub text: String,
        /// Raw score of the gold model.
        pub gold: f64,
        /// The arm's own reward.
        pub proxy: f64,
        /// True quality; absent if posts carry no facts.
        pub quality: Option<f64>,
    }
}

crate::table! {
    /// The expected outcome of best-of-`n` by one objective on one half of the prompts: the mean over prompts of the
    /// unbiased estimate from all subsets of `n` of a prompt's samples. Intervals are 95% bootstrap over prompts.
    pub struct BestOfPoint {
        /// The objective that chooses among the samples.
        pub objective: Objective,
        /// Samples to choose from.
        pub n: i64,
        /// Half of the prompts.
        pub half: Half,
        /// Number of prompts.
        pub prompts: i64,
        /// log n - (n - 1) / n, in nats: an upper bound on the KL to the sampled policy.
        pub kl: f64,
        /// Raw score of the gold model.
        pub gold: f64,
        pub gold_low: f64,
        pub gold_high: f64,
        /// Gold score in standard deviations of all samples' gold scores above their mean, on the same half.
        pub gold_sd: f64,
        pub gold_sd_low: f64,
        pub gold_sd_high: f64,
        /// True quality; present only if posts carry facts.
        pub quality: Option<f64>,
        pub quality_low: Option<f64>,
        pub quality_high: Option<f64>,
        /// Score phi of this point's objective.
        pub proxy: f64,
        pub proxy_low: f64,
        pub proxy_high: f64,
        /// Mean of the reward models' scores.
        pub mu: f64,
        pub mu_low: f64,
        pub mu_high: f64,
        /// Variance across the ensemble's members; absent with one reward model.
        pub variance: Option<f64>,
        pub variance_low: Option<f64>,
        pub variance_high: Option<f64>,
        /// Tokens per response.
        pub length: f64,
        pub length_low: f64,
        pub length_high: f64,
    }
}

/// Mean and standard deviation of the gold scores of the SFT model's samples: the scale of `gold_sd`.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct SftScale {
    pub gold_mean: f64,
    pub gold_std: f64,
}

/// Whether the adaptive coefficient had an effect or, in an arm with another objective, would have had one on the same
/// trajectory with b fixed in the first phase. Numbers that do not apply to the arm are absent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Mechanism {
    pub c_over_lambda_first: Option<f64>,
    pub c_over_lambda_max: Option<f64>,
    pub c_over_lambda_last: Option<f64>,
    pub one_minus_c: Option<f64>,
    /// The largest value over phases of mean(c KL) divided by the gain of mean((1 - c) mu) since the first phase.
    /// Phases whose gain is below a tenth of the largest gain are ignored.
    pub c_kl_share_max: Option<f64>,
    /// Smallest and largest constant KL coefficient over the phases; they differ if a matched arm follows a schedule.
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
    /// Step with the best gold score on half A, sampled.
    pub chosen_step: i64,
    pub final_step: i64,
    pub sft: SftScale,
    /// Fact sensitivity of the gold model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fact_sensitivity: Option<FactSensitivity>,
    pub reads_the_post: bool,
    pub mechanism: Mechanism,
    pub prompt_count: u64,
    #[serde(flatten)]
    pub more: serde_json::Map<String, serde_json::Value>,
}

/// The artifact type: `curve.parquet`, `scores.parquet`, `calibration.parquet`, `examples.parquet`, `evaluation.json`,
/// `metrics.json`. An evaluation of best-of-n adds `best_of_n.parquet`; its curve has the single step 0 with the first
/// sample of each prompt, and its scores cover all samples.
pub struct Evaluation;

impl Evaluation {
    pub const NAME: &'static str = "Evaluation";
    pub const CURVE: &'static str = "curve.parquet";
    pub const SCORES: &'static str = "scores.parquet";
    pub const CALIBRATION: &'static str = "calibration.parquet";
    pub const EXAMPLES: &'static str = "examples.parquet";
    pub const INFO: &'static str = "evaluation.json";
    pub const BEST_OF_N: &'static str = "best_of_n.parquet";
    /// Value of `objective` in the `evaluation.json` of a best-of-n evaluation.
    pub const BEST_OF_N_OBJECTIVE: &'static str = "best_of_n";

    /// # Errors
    /// If `evaluation.json` is missing or broken.
    pub fn info(folder: &Path) -> Result<EvaluationInfo> {
        folder::read_json(&folder::file(folder, Self::INFO)?)
    }

    /// # Errors
    /// If the table is missing or unreadable.
    pub fn curve(folder: &Path) -> Result<Vec<CurvePoint>> {
        table::read(&folder::file(folder, Self::CURVE)?)
    }

    /// # Errors
    /// If the table is missing or unreadable.
    pub fn calibration(folder: &Path) -> Result<Vec<CalibrationBin>> {
        table::read(&folder::file(folder, Self::CALIBRATION)?)
    }

    /// # Errors
    /// If the table is missing or unreadable.
    pub fn scores(folder: &Path) -> Result<table::Reader<Score>> {
        table::Reader::open(&folder::file(folder, Self::SCORES)?)
    }

    /// # Errors
    /// If the table is missing or unreadable.
    pub fn examples(folder: &Path) -> Result<Vec<Example>> {
        table::read(&folder::file(folder, Self::EXAMPLES)?)
    }

    /// The best-of-n points; `None` for the evaluation of a policy run.
    ///
    /// # Errors
    /// If the table is broken.
    pub fn best_of_n(folder: &Path) -> Result<Option<Vec<BestOfPoint>>> {
        let file = folder.join(Self::BEST_OF_N);
        file.is_file().then(|| table::read(&file)).transpose()
    }
}

impl ArtifactType for Evaluation {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn schema_version(&self) -> u32 {
        3
    }

    fn about(&self) -> &'static str {
        "a policy run judged by the gold model and by true quality, step by step"
    }

    fn files(&self) -> Vec<FileSpec> {
        vec![
            FileSpec::new(
                Self::INFO,
                "the arm, the steps, the chosen step, the scale of `gold_sd`, and whether the mechanism was engaged",
            ),
            json_lines::table::<CurvePoint>(Self::CURVE),
            json_lines::table::<Score>(Self::SCORES),
            json_lines::table::<CalibrationBin>(Self::CALIBRATION),
            json_lines::table::<Example>(Self::EXAMPLES),
            json_lines::table::<BestOfPoint>(Self::BEST_OF_N).optional(),
        ]
    }

    fn check(&self, folder: &Path) -> Result<Facts> {
        Self::info(folder)?;
        let mut facts = Facts::default();
        table::check::<CurvePoint>(&folder::file(folder, Self::CURVE)?, &mut facts)?;
        table::check::<Score>(&folder::file(folder, Self::SCORES)?, &mut facts)?;
        table::check::<CalibrationBin>(&folder::file(folder, Self::CALIBRATION)?, &mut facts)?;
        table::check::<Example>(&folder::file(folder, Self::EXAMPLES)?, &mut facts)?;
        if folder.join(Self::BEST_OF_N).exists() {
            table::check::<BestOfPoint>(&folder.join(Self::BEST_OF_N), &mut facts)?;
        }
        folder::metrics(folder, &mut facts)?;
        Ok(facts)
    }

    fn preview(&self, folder: &Path, rows: usize) -> Result<String> {
        let info = folder::show(folder, Self::INFO)?;
        Ok(info + &table::preview(&folder::file(folder, Self::CURVE)?, rows)?)
    }
}
