//! The parameters of `rl.ppo`. Knows no model.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::gae::Normalisation;
use super::loss::Value;
use super::objective::{Objective, VarianceScope};
use crate::train::params::{BATCH, Faults, Precision, RANK, STEPS};
use crate::types::Split;

/// How long to train.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Steps {
    pub n: u64,
    #[serde(default)]
    pub unit: StepUnit,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum StepUnit {
    /// One sampling of `rollouts` prompts and the PPO passes over it.
    #[default]
    Phase,
    /// One minibatch update; the phase in which the last one falls is finished.
    Optimiser,
}

/// Which constant a matched arm takes from its adaptive run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Matching {
    /// mean(c) / mean(1 - c) over the whole run.
    #[default]
    Constant,
    /// The same, phase by phase.
    Phases,
}

/// Which held-out samples are also drawn greedily.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Greedy {
    /// At step 0 and at the last step.
    #[default]
    Ends,
    All,
    None,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// standard | mean | pessimistic | mean_minus_std | adaptive | matched
    pub objective: Objective,
    /// The KL coefficient; for `adaptive` the mean one of the first phase (Algorithm 1).
    pub lambda: f64,
    /// Standard deviations taken off by `mean_minus_std`.
    pub k: f64,
    /// Over what the adaptive objective's variance is taken.
    pub variance_scope: VarianceScope,
    /// How `matched` follows the run at its port `adaptive`.
    pub matching: Matching,
    pub steps: Steps,
    /// Prompts a phase.
    pub rollouts: usize,
    /// Responses per prompt, K.
    pub responses: usize,
    pub min_new_tokens: usize,
    pub max_new_tokens: usize,
    /// Passes over each phase's batch.
    pub epochs: usize,
    /// Responses in a minibatch; the short last one is kept.
    pub minibatch: usize,
    /// PPO's clip range.
    pub clip: f64,
    pub gamma: f64,
    pub gae_lambda: f64,
    pub advantages: Normalisation,
    pub value: Value,
    pub lr: f64,
    /// Optimiser steps over which the learning rate rises.
    pub warmup: u64,
    /// Decoupled decay of the adapter's matrices (towards the reference policy), or of full weights towards the reference's.
    pub weight_decay: f64,
    pub beta1: f64,
    pub beta2: f64,
    /// Largest global gradient norm; null or `none`: not clipped.
    #[serde(deserialize_with = "crate::train::params::or_none")]
    #[schemars(schema_with = "crate::train::params::or_none_schema::<f64>")]
    pub max_gradient_norm: Option<f64>,
    /// The policy's adapter; null (or `none`): full training.
    #[serde(deserialize_with = "crate::train::params::or_none")]
    #[schemars(schema_with = "crate::train::params::or_none_schema::<Lora>")]
    pub lora: Option<Lora>,
    /// The split that prompts are drawn from.
    pub split: Split,
    /// Phases between evaluations on held-out prompts.
    pub eval_every: u64,
    /// Held-out prompts sampled at an evaluation, from the split `valid`; null: all of it.
    pub eval_prompts: Option<usize>,
    /// Keys the generator of held-out samples: the same for every arm, seed and step.
    pub evaluation_seed: u64,
    pub greedy: Greedy,
    /// What products with weights are computed in, the reward models' too: `f32`, or `bf16` (operands rounded, sums in f32).
    /// Weights, norms, attention scores, losses and the optimiser stay f32.
    pub precision: Precision,
}

/// The policy's LoRA, on all linear layers. Unlike [`crate::train::Lora`] it has no dropout: there is none in RL.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Lora {
    pub r: usize,
    pub alpha: f64,
}

impl Default for Lora {
    fn default() -> Self {
        Self { r: 8, alpha: 32.0 }
    }
}

impl Default for Params {
    /// The paper's settings where it states them (DIGEST: RL), DESIGN.md section 8 elsewhere.
    fn default() -> Self {
        Self {
            objective: Objective::Adaptive,
            lambda: 0.005,
            k: 1.0,
            variance_scope: VarianceScope::Sample,
            matching: Matching::Constant,
            steps: Steps { n: 50_000, unit: StepUnit::Optimiser },
            rollouts: 512,
            responses: 1,
            min_new_tokens: 5,
            max_new_tokens: 48,
            epochs: 4,
            minibatch: 6,
            clip: 0.2,
            gamma: 1.0,
            gae_lambda: 0.95,
            advantages: Normalisation::Batch,
            value: Value::default(),
            lr: 5e-6,
            warmup: 0,
            weight_decay: 0.1,
            beta1: 0.9,
            beta2: 0.999,
            max_gradient_norm: Some(1.0),
            lora: Some(Lora::default()),
            split: Split::Rl,
            eval_every: 400,
            eval_prompts: None,
            evaluation_seed: 1234,
            greedy: Greedy::Ends,
            precision: Precision::F32,
        }
    }
}

impl Params {
    /// Optimiser steps in one phase.
    pub fn updates_per_phase(&self) -> u64 {
        (self.epochs * (self.rollouts * self.responses).div_ceil(self.minibatch)) as u64
    }

    pub fn phases(&self) -> u64 {
        match self.steps.unit {
            StepUnit::Phase => self.steps.n,
            StepUnit::Optimiser => self.steps.n.div_ceil(self.updates_per_phase()),
        }
    }

    /// Whether held-out samples are drawn after `phase` phases: when it passes a multiple of `eval_every`, in the unit of
    /// `steps`, at the start and at the end.
    pub fn evaluates_after(&self, phase: u64) -> bool {
        let unit = match self.steps.unit {
            StepUnit::Phase => 1,
            StepUnit::Optimiser => self.updates_per_phase(),
        };
        let passed = |phase: u64| phase * unit / self.eval_every;
        phase == 0 || phase == self.phases() || passed(phase) > passed(phase - 1)
    }

    pub fn faults(&self) -> Vec<(String, String)> {
        let mut faults = Faults::default();
        faults.must(self.lambda > 0.0, "lambda", "must be above 0");
        for (n, most, field) in [
            (self.steps.n, STEPS, "steps.n"),
            (self.rollouts as u64, BATCH, "rollouts"),
            (self.responses as u64, BATCH, "responses"),
            (self.epochs as u64, 10_000, "epochs"),
            (self.minibatch as u64, BATCH, "minibatch"),
            (self.max_new_tokens as u64, BATCH, "max_new_tokens"),
            (self.eval_every, STEPS, "eval_every"),
        ] {
            faults.must(n > 0, field, "must be at least 1");
            faults.at_most(n, most, field);
        }
        faults.at_most(self.warmup, STEPS, "warmup");
        faults.must(
            self.rollouts.saturating_mul(self.responses) as u64 <= BATCH || self.responses == 1,
            "responses",
            "rollouts times responses must be at most 1000000",
        );
        faults.must(self.eval_prompts != Some(0), "eval_prompts", "must be at least 1");
        faults.must(
            self.variance_scope != VarianceScope::Prompt || self.responses > 1,
            "responses",
            "variance_scope: prompt leaves the own response out: it needs at least 2 responses to a prompt",
        );
        faults.must(self.min_new_tokens <= self.max_new_tokens, "min_new_tokens", "must not exceed max_new_tokens");
        faults.optimiser(self.lr, (self.beta1, self.beta2), self.weight_decay);
        faults.limit(self.max_gradient_norm, "max_gradient_norm");
        faults.must(self.clip > 0.0 && self.clip < 1.0, "clip", "must lie between 0 and 1");
        faults.must((0.0..=1.0).contains(&self.gae_lambda), "gae_lambda", "must lie between 0 and 1");
        faults.must((0.0..=1.0).contains(&self.gamma), "gamma", "must lie between 0 and 1");
        if let Some(lora) = self.lora {
            faults.must(lora.r > 0, "lora.r", "must be at least 1");
            faults.at_most(lora.r as u64, RANK, "lora.r");
            faults.must(lora.alpha > 0.0 && lora.alpha.is_finite(), "lora.alpha", "must be above 0");
        }
        faults.0
    }
}
