//! The parameters of `rl.ppo`, `rl.rloo` and `rl.grpo`.
//!
//! Each kind has its own parameter type, so that it accepts only parameters that it reads; all convert into [`Params`].

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::credit::{Credit, KlTerm};
use super::gae::Normalisation;
use super::loss::Value;
use super::objective::{VarianceReference, VarianceScope};
use crate::train::params::{BATCH, Faults, Precision, RANK, STEPS};
use crate::types::Objective;
use crate::types::Split;

/// Length of the training.
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
    /// Sampling of `rollouts` prompts followed by the PPO passes over them.
    #[default]
    Phase,
    /// One minibatch update; the phase that contains the last update is completed.
    Optimiser,
}

/// The coefficient that a matched arm takes from its adaptive run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Matching {
    /// One coefficient for each phase of the adaptive run.
    #[default]
    Phases,
    /// A single coefficient, computed from all phases together.
    Constant,
}

/// The evaluations at which held-out samples are also drawn greedily.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Greedy {
    /// At step 0 and at the last step.
    #[default]
    Ends,
    All,
    None,
}

/// Declares [`Params`] and one parameter type per kind: the common fields with their defaults, then the kind's own.
macro_rules! kinds {
    (
        common $common:tt
        $($(#[$meta:meta])* $kind:ident $own:tt defaults $changed:tt => |$params:ident| $credit:expr;)*
    ) => {
        settings!($common);
        $(kind!($(#[$meta])* $kind $common $own $changed |$params| $credit);)*
    };
}

macro_rules! settings {
    ({ $($(#[$meta:meta])* $field:ident: $ty:ty = $default:expr,)* }) => {
        /// Settings of an RL run of any kind.
        #[derive(Clone, Debug)]
        pub struct Params {
            $(pub $field: $ty,)*
            pub credit: Credit,
        }

        impl Default for Params {
            fn default() -> Self {
                PpoParams::default().into()
            }
        }
    };
}

macro_rules! kind {
    (
        $(#[$kind_meta:meta])* $kind:ident
        { $($(#[$meta:meta])* $field:ident: $ty:ty = $default:expr,)* }
        { $($(#[$own_meta:meta])* $own:ident: $own_ty:ty = $own_default:expr,)* }
        { $($changed:ident: $value:expr,)* }
        |$params:ident| $credit:expr
    ) => {
        $(#[$kind_meta])*
        #[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
        #[serde(default, deny_unknown_fields)]
        pub struct $kind {
            $($(#[$meta])* pub $field: $ty,)*
            $($(#[$own_meta])* pub $own: $own_ty,)*
        }

        impl Default for $kind {
            fn default() -> Self {
                #[allow(unused_mut, reason = "a kind may change no default of the common fields")]
                let mut params = Self { $($field: $default,)* $($own: $own_default,)* };
                $(params.$changed = $value;)*
                params
            }
        }

        impl From<$kind> for Params {
            fn from($params: $kind) -> Self {
                Self { credit: $credit, $($field: $params.$field,)* }
            }
        }
    };
}

// The defaults are the paper's settings where it states them (DIGEST: RL).
kinds! {
    common {
        /// The objective that the policy maximises.
        objective: Objective = Objective::Adaptive,
        /// The KL coefficient; for `adaptive`, its mean in the first phase (Algorithm 1). 0: no KL penalty.
        lambda: f64 = 0.005,
        /// Number of standard deviations that `mean_minus_std` subtracts, or of variances that `uwo` subtracts.
        k: f64 = 1.0,
        /// Temperature of `soft_min`, in units of the score: near 0 gives the minimum of the members, infinity their
        /// mean.
        beta: f64 = 1.0,
        /// Steers `lambda` towards this KL to the reference, in nats per response (Ziegler et al. 2019, section 2.2);
        /// null or `none`: `lambda` is constant.
        #[serde(deserialize_with = "crate::train::params::or_none")]
        #[schemars(schema_with = "crate::train::params::or_none_schema::<f64>")]
        kl_target: Option<f64> = None,
        /// With `kl_target`: after each phase, lambda is multiplied by 1 + gain * clip(KL / target - 1, -0.2, 0.2).
        kl_gain: f64 = 0.1,
        /// The responses over which the adaptive objective's variance is taken.
        variance_scope: VarianceScope = VarianceScope::Sample,
        /// `none`: variance of the members' scores; `sft`: variance of their scores minus their scores of the SFT
        /// model's response to the prompt.
        variance_reference: VarianceReference = VarianceReference::None,
        /// How `matched` follows the run at its port `adaptive`.
        matching: Matching = Matching::Phases,
        steps: Steps = Steps { n: 50_000, unit: StepUnit::Optimiser },
        /// Prompts per phase.
        rollouts: usize = 512,
        /// Responses per prompt, K.
        responses: usize = 1,
        min_new_tokens: usize = 5,
        max_new_tokens: usize = 48,
        /// Passes over each phase's batch.
        epochs: usize = 4,
        /// Responses per minibatch; a short last one is kept.
        minibatch: usize = 6,
        /// PPO's clip range.
        clip: f64 = 0.2,
        /// Ends a phase's passes at the first minibatch whose estimated KL(old policy || policy), in nats per token,
        /// exceeds this; null or `none`: never.
        #[serde(deserialize_with = "crate::train::params::or_none")]
        #[schemars(schema_with = "crate::train::params::or_none_schema::<f64>")]
        stop_kl: Option<f64> = None,
        lr: f64 = 5e-6,
        /// Optimiser steps over which the learning rate rises.
        warmup: u64 = 0,
        /// Decoupled decay of the adapter's matrices (towards the reference policy), or of full weights towards the
        /// reference's weights.
        weight_decay: f64 = 0.1,
        beta1: f64 = 0.9,
        beta2: f64 = 0.999,
        /// Largest global gradient norm; null or `none`: no clipping.
        #[serde(deserialize_with = "crate::train::params::or_none")]
        #[schemars(schema_with = "crate::train::params::or_none_schema::<f64>")]
        max_gradient_norm: Option<f64> = Some(1.0),
        /// The policy's adapter; null or `none`: full training.
        #[serde(deserialize_with = "crate::train::params::or_none")]
        #[schemars(schema_with = "crate::train::params::or_none_schema::<Lora>")]
        lora: Option<Lora> = Some(Lora::default()),
        /// The split that provides the prompts.
        split: Split = Split::Rl,
        /// Interval between evaluations on held-out prompts, in the unit of `steps`.
        eval_every: u64 = 400,
        /// Held-out prompts per evaluation, from the split `valid`; null: all of them.
        eval_prompts: Option<usize> = None,
        /// Seed of the generator of held-out samples: the same for every arm, seed and step.
        evaluation_seed: u64 = 1234,
        greedy: Greedy = Greedy::Ends,
        /// Number type for products with weights, the reward models' included: `f32`, or `bf16` (operands rounded, sums
        /// in f32). Weights, norms, attention scores, losses and the optimiser stay f32.
        precision: Precision = Precision::F32,
    }

    /// The parameters of `rl.ppo`.
    PpoParams {
        gamma: f64 = 1.0,
        gae_lambda: f64 = 0.95,
        advantages: Normalisation = Normalisation::Batch,
        value: Value = Value::default(),
    } defaults {} => |p| Credit::Gae { gamma: p.gamma, lambda: p.gae_lambda, advantages: p.advantages, value: p.value };

    /// The parameters of `rl.rloo`.
    RlooParams {
        advantages: Normalisation = Normalisation::None,
    } defaults { rollouts: 128, responses: 4, } => |p| Credit::LeaveOneOut { advantages: p.advantages };

    /// The parameters of `rl.grpo`.
    GrpoParams {
        /// Whether advantages are divided by the standard deviation of their group's rewards.
        scale: bool = true,
        /// Where the KL enters: `reward`, or `loss` (k3 per token, weighted by lambda or by the adaptive c).
        kl_term: KlTerm = KlTerm::Reward,
    } defaults { rollouts: 64, responses: 8, } => |p| Credit::Group { scale: p.scale, kl_term: p.kl_term };
}

/// The policy's LoRA, on all linear layers. Unlike [`crate::train::Lora`] it has no dropout, since RL uses none.
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

impl Params {
    /// Optimiser steps per phase.
    pub fn updates_per_phase(&self) -> u64 {
        (self.epochs * (self.rollouts * self.responses).div_ceil(self.minibatch)) as u64
    }

    pub fn phases(&self) -> u64 {
        match self.steps.unit {
            StepUnit::Phase => self.steps.n,
            StepUnit::Optimiser => self.steps.n.div_ceil(self.updates_per_phase()),
        }
    }

    /// Whether held-out samples are drawn after `phase` phases: at the start, at the end, and whenever the run passes a
    /// multiple of `eval_every` in the unit of `steps`.
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
        match self.objective {
            // b = mean(s2) / lambda.
            Objective::Adaptive => faults.positive(self.lambda, "lambda"),
            _ => faults.must(self.lambda >= 0.0 && self.lambda.is_finite(), "lambda", "must not be negative"),
        }
        faults.must(self.k >= 0.0 && self.k.is_finite(), "k", "must not be negative");
        faults.positive(self.beta, "beta");
        if let Some(target) = self.kl_target {
            faults.positive(target, "kl_target");
            faults.must(self.lambda > 0.0, "lambda", "must be above 0 to be steered by `kl_target`");
            faults.must(
                !matches!(self.objective, Objective::Adaptive | Objective::Matched),
                "kl_target",
                "cannot steer the coefficient of `adaptive` or `matched`, which have their own",
            );
        }
        // At 5 the clipped step of a fifth takes lambda to 0, from where it never returns; beyond, below 0.
        faults.must(self.kl_gain > 0.0 && self.kl_gain < 5.0, "kl_gain", "must be above 0 and below 5");
        faults.must(
            self.variance_reference == VarianceReference::None || self.objective == Objective::Adaptive,
            "variance_reference",
            "`sft` is for `objective: adaptive`: the others take the variance of the scores themselves",
        );
        if let Some(limit) = self.stop_kl {
            faults.positive(limit, "stop_kl");
            faults.must(
                self.steps.unit == StepUnit::Phase,
                "steps.unit",
                "must be `phase` with `stop_kl`, which takes fewer optimiser steps than planned",
            );
        }
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
        match &self.credit {
            Credit::Gae { gamma, lambda, value, .. } => {
                faults.must((0.0..=1.0).contains(lambda), "gae_lambda", "must lie between 0 and 1");
                faults.must((0.0..=1.0).contains(gamma), "gamma", "must lie between 0 and 1");
                faults.positive(value.clip, "value.clip");
                faults.must(
                    value.coefficient >= 0.0 && value.coefficient.is_finite(),
                    "value.coefficient",
                    "must not be negative",
                );
            }
            Credit::LeaveOneOut { .. } | Credit::Group { .. } => {
                faults.must(self.responses > 1, "responses", "must be at least 2: each is judged beside the others");
            }
        }
        faults.must(
            !matches!(self.credit, Credit::LeaveOneOut { advantages: Normalisation::Minibatch }),
            "advantages",
            "`minibatch` is for token-wise advantages; use `none`, `batch` or `first_batch_std`",
        );
        if let Credit::Group { kl_term: KlTerm::Loss, .. } = self.credit {
            faults.must(
                self.objective != Objective::Matched,
                "kl_term",
                "must be `reward` for `matched`: in the loss the KL is not weighed against the score as in the adaptive run",
            );
        }
        if let Some(lora) = self.lora {
            faults.must(lora.r > 0, "lora.r", "must be at least 1");
            faults.at_most(lora.r as u64, RANK, "lora.r");
            faults.must(lora.alpha > 0.0 && lora.alpha.is_finite(), "lora.alpha", "must be above 0");
        }
        faults.0
    }
}
