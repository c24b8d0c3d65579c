//! The PolicyRun artifact of reinforcement learning: the policy, its phases, and its samples on held-out prompts.

use std::path::Path;

use engine::artifact::{ArtifactType, Facts, FileSpec};
use engine::error::Result;
use engine::names::Digest;
use serde::{Deserialize, Serialize};

use super::{folder, json_lines, model, reward};
use crate::table;

crate::words! {
    /// A half of the validation prompts, assigned by hash: half A chooses the best step, half B gives the reported
    /// numbers.
    pub enum Half { A = "A", B = "B" }
}

crate::table! {
    /// One phase: sampling, scoring and the passes over the batch. A column that does not apply to the arm is null.
    pub struct Phase {
        /// Counts from 1.
        pub phase: i64,
        /// Total so far.
        pub optimiser_steps: i64,
        /// Mean of the arm's own reward.
        pub proxy: Option<f64>,
        /// mu_1: mean of the reward models' scores.
        pub mu: Option<f64>,
        /// sigma_1^2: variance of the reward models' scores, mean over responses.
        pub s2: Option<f64>,
        /// Quantile 0.1 of s2 over responses.
        pub s2_q10: Option<f64>,
        /// Median of s2 over responses.
        pub s2_q50: Option<f64>,
        /// Quantile 0.9 of s2 over responses.
        pub s2_q90: Option<f64>,
        /// Mean of Algorithm 1's coefficient, with b fixed in the first phase. For a non-adaptive arm: the value it
        /// would have had.
        pub c: Option<f64>,
        /// Quantile 0.1 of c over responses.
        pub c_q10: Option<f64>,
        /// Median of c over responses.
        pub c_q50: Option<f64>,
        /// Quantile 0.9 of c over responses.
        pub c_q90: Option<f64>,
        /// Mean of 1 - c.
        pub one_minus_c: Option<f64>,
        /// Mean of c_i times the response's exact KL.
        pub c_kl: Option<f64>,
        /// Mean of (1 - c_i) mu_i.
        pub one_minus_c_mu: Option<f64>,
        /// KL coefficient relative to the score's coefficient: lambda, or mean(c) / mean(1 - c) for the adaptive
        /// objective.
        pub lambda_effective: Option<f64>,
        /// k1: mean over responses of the summed log ratio.
        pub kl: Option<f64>,
        /// k3: another estimate of the same KL, never negative.
        pub kl_k3: Option<f64>,
        /// Mean over responses of the KL between the full distributions, summed over the visited positions.
        pub kl_exact: Option<f64>,
        /// KL(old policy || policy) per token, estimated on each minibatch before its step.
        pub kl_old_new: Option<f64>,
        /// Spearman correlation of s2 with KL over responses.
        pub spearman_s2_kl: Option<f64>,
        /// Share of tokens whose ratio was clipped.
        pub clip_fraction: Option<f64>,
        /// Mean probability ratio of new to old policy.
        pub ratio_mean: Option<f64>,
        /// Largest such ratio.
        pub ratio_max: Option<f64>,
        /// Mean entropy of the policy's token distributions, in nats.
        pub entropy: Option<f64>,
        /// 1 - Var(return - value) / Var(return); only with a value head.
        pub explained_variance: Option<f64>,
        /// Share of responses that ended with EOS.
        pub eos_rate: Option<f64>,
        /// Tokens per response.
        pub length: Option<f64>,
        /// Standard deviation of the advantages before normalisation.
        pub advantage_std: Option<f64>,
        /// Mean gradient norm of the steps, before clipping.
        pub gradient_norm: Option<f64>,
        /// Mean norm of the steps' weight changes.
        pub update_norm: Option<f64>,
        /// Mean over minibatches.
        pub policy_loss: Option<f64>,
        /// Mean over minibatches; only with a value head.
        pub value_loss: Option<f64>,
        /// Minibatches skipped because their mean ratio exceeded its bound or because `stop_kl` ended the passes early.
        pub skipped: i64,
        /// Learning rate of the last step.
        pub learning_rate: Option<f64>,
    }
}

crate::table! {
    /// One response to a held-out prompt.
    pub struct Sample {
        /// Phases completed; 0 is the SFT model.
        pub step: i64,
        /// The post that is summarised.
        pub post_id: String,
        /// Half of the prompts that the post belongs to.
        pub half: Half,
        /// Whether it was decoded greedily instead of sampled.
        pub greedy: bool,
        /// Token ids of the response, with EOS if it was sampled.
        pub ids: Vec<u32>,
        /// The response as text.
        pub text: String,
        /// Whether EOS was sampled.
        pub ended: bool,
        /// Summed over the response.
        pub logp: f64,
        /// As `logp`, under the SFT model.
        pub logp_ref: f64,
        /// KL between the full distributions, summed over the response's positions.
        pub kl_exact: f64,
        /// Centred scores, in member order.
        pub scores: Vec<f32>,
        /// The arm's own reward.
        pub proxy: f64,
        /// Mean of the reward models' scores.
        pub mean: f64,
        /// Across the members; absent with one member.
        pub variance: Option<f64>,
    }
}

/// `policy.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct PolicyInfo {
    pub objective: String,
    pub lambda: f64,
    /// sigma_2^2, fixed in the first phase; absent with one reward model or with lambda 0.
    #[serde(default)]
    pub b: Option<f64>,
    pub seed: u64,
    pub phases: u64,
    pub eval_every: u64,
    /// Labels of the reward models, in order.
    pub members: Vec<String>,
    pub base_digest: Digest,
    #[serde(flatten)]
    pub more: serde_json::Map<String, serde_json::Value>,
}

/// The artifact type: `adapter/` or `model/`, `value_head.safetensors` (`rl.ppo` only), `policy.json`,
/// `phases.parquet`, `samples.parquet`, `metrics.json`.
pub struct PolicyRun;

impl PolicyRun {
    pub const NAME: &'static str = "PolicyRun";
    pub const INFO: &'static str = "policy.json";
    pub const PHASES: &'static str = "phases.parquet";
    pub const SAMPLES: &'static str = "samples.parquet";
    pub const ADAPTER: &'static str = "adapter";
    /// Folder that replaces the adapter after full training.
    pub const MODEL: &'static str = "model";
    pub const VALUE_HEAD: &'static str = "value_head.safetensors";

    /// # Errors
    /// If `policy.json` is missing or broken.
    pub fn info(folder: &Path) -> Result<PolicyInfo> {
        folder::read_json(&folder::file(folder, Self::INFO)?)
    }

    /// # Errors
    /// If the table is missing or unreadable.
    pub fn phases(folder: &Path) -> Result<Vec<Phase>> {
        table::read(&folder::file(folder, Self::PHASES)?)
    }

    /// # Errors
    /// If the table is missing or unreadable.
    pub fn samples(folder: &Path) -> Result<table::Reader<Sample>> {
        table::Reader::open(&folder::file(folder, Self::SAMPLES)?)
    }
}

impl ArtifactType for PolicyRun {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn schema_version(&self) -> u32 {
        3
    }

    fn about(&self) -> &'static str {
        "a policy after reinforcement learning, with its phases and its samples on held-out prompts"
    }

    fn files(&self) -> Vec<FileSpec> {
        vec![
            FileSpec::new(
                Self::INFO,
                "the objective, lambda, b, the seed, the reward models' labels and the base model's digest",
            ),
            json_lines::table::<Phase>(Self::PHASES),
            json_lines::table::<Sample>(Self::SAMPLES),
            FileSpec::new("adapter/", "the policy's LoRA, as a PEFT folder; absent after full training").optional(),
            FileSpec::new("model/", "the policy after full training, as in `Model`").optional(),
            FileSpec::new(Self::VALUE_HEAD, "the value head; only from `rl.ppo`").optional(),
        ]
    }

    fn check(&self, folder: &Path) -> Result<Facts> {
        if folder.join(Self::MODEL).exists() {
            model::Model::check_folder(&folder.join(Self::MODEL))?;
        } else {
            reward::check_adapter(&folder.join(Self::ADAPTER))?;
        }
        if folder.join(Self::VALUE_HEAD).exists() {
            folder::tensors(folder, Self::VALUE_HEAD)?;
        }
        Self::info(folder)?;
        let mut facts = Facts::default();
        table::check::<Phase>(&folder::file(folder, Self::PHASES)?, &mut facts)?;
        table::check::<Sample>(&folder::file(folder, Self::SAMPLES)?, &mut facts)?;
        folder::metrics(folder, &mut facts)?;
        Ok(facts)
    }

    fn preview(&self, folder: &Path, rows: usize) -> Result<String> {
        let info = folder::show(folder, Self::INFO)?;
        Ok(info + &table::preview(&folder::file(folder, Self::SAMPLES)?, rows)?)
    }
}
