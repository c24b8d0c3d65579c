//! The update passes over one phase's batch.

use std::collections::BTreeMap;

use candle_core::Tensor;
use engine::error::{Error, Result};
use lm::{AdamW, Batch, CausalLm, ScalarHead, Sequence, StatOptions, Variable};
use rand_chacha::ChaCha12Rng;
use serde::{Deserialize, Serialize};

use super::credit::{Credit, KlTerm};
use super::gae::{Normalisation, normalise};
use super::loss::{Losses, Targets, Trunk, losses};
use super::params::Params;
use super::rollout::Rollout;
use crate::error::{IntoStageResult, named, number, rounded};
use crate::stats::{mean, permutation, std};
use crate::train::checkpoint::FloatBits;
use crate::train::step::suspect;

/// A minibatch with a larger mean ratio is skipped: its old log-probabilities no longer describe the policy.
const RATIO_LIMIT: f64 = 10.0;

/// Summary of a phase's updates: means over its minibatches.
#[derive(Clone, Copy, Debug, Default)]
pub struct Report {
    pub policy_loss: f64,
    pub value_loss: f64,
    pub clip_fraction: f64,
    pub ratio_mean: f64,
    pub ratio_max: f64,
    pub kl_old_new: f64,
    pub gradient_norm: f64,
    pub update_norm: f64,
    pub skipped: i64,
    pub minibatches: i64,
    pub learning_rate: f64,
    /// max |log ratio| of the phase's first minibatch: 0 up to rounding.
    pub first_log_ratio: f64,
}

/// Training data of a phase. `advantages` and `returns`: `[responses][tokens]`; returns only with a value head.
#[derive(Clone, Copy)]
pub struct PhaseBatch<'a> {
    pub rollout: &'a Rollout,
    pub advantages: &'a [Vec<f64>],
    pub returns: &'a [Vec<f64>],
    /// KL coefficient of each response, read if the KL is in the loss.
    pub kl: &'a [f64],
    /// Standard deviation of the first phase's raw advantages.
    pub first_std: f64,
    pub stats: &'a StatOptions,
}

/// A minibatch evaluated under the current policy.
pub(super) struct MinibatchOutputs {
    /// The derivatives are moved into `surrogate`.
    pub losses: Losses,
    /// max |log ratio|.
    pub log_ratio: f64,
    /// A scalar whose gradient is that of policy + coefficient * value.
    pub surrogate: Tensor,
}

/// The policy being trained and its optimiser.
pub struct Learner {
    pub policy: CausalLm,
    /// pi_ref: the initial weights of the policy, frozen; shared with an adapter's base.
    pub reference: CausalLm,
    /// The value head, for `rl.ppo`.
    pub head: Option<ScalarHead>,
    optimiser: AdamW,
    /// Optimiser steps so far.
    pub steps: u64,
    /// The last finite policy loss, for the error message.
    last: Option<f64>,
    /// The peak learning rate, for the same message.
    lr: f64,
}

/// The part of a learner's checkpoint that is not optimiser or variables.
#[derive(Serialize, Deserialize)]
pub(super) struct State {
    steps: u64,
    last: Option<FloatBits>,
}

impl Learner {
    /// The value head starts at 0.
    pub fn new(policy: CausalLm, reference: CausalLm, params: &Params) -> Result<Self> {
        let head = params
            .credit
            .value()
            .map(|_| ScalarHead::zeros(policy.config().width()).into_stage_result())
            .transpose()?;
        Self::with_head(policy, reference, head, params)
    }

    pub(super) fn with_head(
        policy: CausalLm,
        reference: CausalLm,
        head: Option<ScalarHead>,
        params: &Params,
    ) -> Result<Self> {
        let config = lm::AdamWConfig {
            beta1: params.beta1,
            beta2: params.beta2,
            weight_decay: params.weight_decay,
            ..lm::AdamWConfig::default()
        };
        let mut variables = policy.variables();
        // An adapter decays towards zero, which is the reference; full weights must decay towards the reference's
        // weights.
        let start: BTreeMap<String, &Tensor> =
            if params.lora.is_none() { reference.weights().collect() } else { BTreeMap::new() };
        let head_variables = head.iter().flat_map(ScalarHead::variables);
        variables.extend(head_variables.map(|variable| Variable { decays: false, ..variable }));
        let mut optimiser = AdamW::new(variables, config).into_stage_result()?;
        optimiser.decay_towards(|name| start.get(name).map(|&weight| weight.clone())).into_stage_result()?;
        Ok(Self { policy, reference, head, optimiser, steps: 0, last: None, lr: params.lr })
    }

    /// The optimiser, which owns the variables of policy and head.
    pub(super) fn optimiser(&self) -> &AdamW {
        &self.optimiser
    }

    pub(super) fn optimiser_mut(&mut self) -> &mut AdamW {
        &mut self.optimiser
    }

    pub(super) fn state(&self) -> State {
        State { steps: self.steps, last: self.last.map(FloatBits) }
    }

    pub(super) fn restore(&mut self, state: State) {
        self.steps = state.steps;
        self.last = state.last.map(|loss| loss.0);
    }

    /// Makes `epochs` passes over the batch in minibatches.
    ///
    /// # Errors
    /// If a loss or a gradient is not finite: names the step, the posts, the tensor and the last finite loss.
    pub fn update(&mut self, lesson: PhaseBatch<'_>, params: &Params, rng: &mut ChaCha12Rng) -> Result<Report> {
        let mut report = Report::default();
        let mut stopped = false;
        for _ in 0..params.epochs {
            for rows in permutation(lesson.rollout.sequences.len(), rng).chunks(params.minibatch) {
                if stopped {
                    report.skipped += 1;
                } else {
                    stopped = !self.minibatch(lesson, rows, params, &mut report)?;
                }
                report.minibatches += 1;
            }
        }
        let taken = (report.minibatches - report.skipped).max(1) as f64;
        for sum in [
            &mut report.policy_loss,
            &mut report.value_loss,
            &mut report.clip_fraction,
            &mut report.ratio_mean,
            &mut report.kl_old_new,
            &mut report.gradient_norm,
            &mut report.update_norm,
        ] {
            *sum /= taken;
        }
        Ok(report)
    }

    /// Computes the losses of the responses `rows` and a tensor with their gradient. Changes no state.
    pub(super) fn judge(&self, lesson: PhaseBatch<'_>, rows: &[usize], params: &Params) -> Result<MinibatchOutputs> {
        let PhaseBatch { rollout, .. } = lesson;
        let pick = |table: &[Vec<f64>]| -> Vec<f64> { rows.iter().flat_map(|&i| table[i].iter().copied()).collect() };
        let members: Vec<&Sequence> = rows.iter().map(|&i| &rollout.sequences[i]).collect();
        let batch = Batch::new(&members).into_stage_result()?;
        let predicting = self.policy.hidden_for_responses(&batch, None).into_stage_result()?;
        let stats = StatOptions { entropy: false, ..lesson.stats.clone() };
        let logprob = self.policy.token_stats(&predicting, &batch, &stats).into_stage_result()?.logprob;
        let value = match (&self.head, params.credit.value()) {
            (Some(head), Some(settings)) => Some(match settings.trunk {
                Trunk::Shared => head.forward(&predicting).into_stage_result()?,
                Trunk::Detached => head.forward(&predicting.detach()).into_stage_result()?,
            }),
            _ => None,
        };

        let mut advantage = pick(lesson.advantages);
        if params.credit.normalisation() == Normalisation::Minibatch {
            advantage = normalise(&advantage, mean(&advantage), std(&advantage), lesson.first_std);
        }
        let old_logprob = pick(&rollout.logprob);
        let (old_value, returns) =
            if value.is_some() { (pick(&rollout.value), pick(lesson.returns)) } else { Default::default() };
        let new_logprob: Vec<f32> = logprob.to_vec1().into_stage_result()?;
        let new_value: Vec<f32> = value.as_ref().map_or(Ok(Vec::new()), |value| value.to_vec1().into_stage_result())?;
        let (weight, kl) = self.token_weights(lesson, rows, params);
        let reference = if kl.is_empty() { Vec::new() } else { pick(&rollout.reference) };
        let targets = Targets {
            old_logprob: &old_logprob,
            old_value: &old_value,
            advantage: &advantage,
            returns: &returns,
            weight: &weight,
            kl: &kl,
            reference: &reference,
        };
        let mut losses = losses(&new_logprob, &new_value, targets, params.clip, params.credit.value());
        let moved = new_logprob.iter().zip(&old_logprob).map(|(new, old)| (f64::from(*new) - old).abs());
        let log_ratio = moved.fold(0.0, f64::max);

        // The gradient of sum(x * d) with d held fixed is d: this passes the explicit derivatives to autograd.
        let n = new_logprob.len();
        let d_logprob =
            Tensor::from_vec(std::mem::take(&mut losses.d_logprob), n, &lm::device()).into_stage_result()?;
        let mut surrogate = (logprob * d_logprob).and_then(|p| p.sum_all()).into_stage_result()?;
        if let Some(value) = value {
            let d_value =
                Tensor::from_vec(std::mem::take(&mut losses.d_value), n, &lm::device()).into_stage_result()?;
            surrogate = (value * d_value).and_then(|v| v.sum_all()? + surrogate).into_stage_result()?;
        }
        Ok(MinibatchOutputs { losses, log_ratio, surrogate })
    }

    /// Weight of each token in the minibatch, and its KL coefficient if the KL is in the loss. PPO and RLOO take the
    /// mean over tokens; GRPO takes the mean over responses of their token means (Shao et al. 2024, Eq. 3).
    fn token_weights(&self, lesson: PhaseBatch<'_>, rows: &[usize], params: &Params) -> (Vec<f64>, Vec<f64>) {
        let lengths = rows.iter().map(|&i| lesson.rollout.sequences[i].response.len());
        let tokens: usize = lengths.clone().sum();
        let Credit::Group { kl_term, .. } = params.credit else { return (vec![1.0 / tokens as f64; tokens], vec![]) };
        let weight = |length| std::iter::repeat_n(1.0 / (rows.len() * length) as f64, length);
        let kl = match kl_term {
            KlTerm::Reward => vec![],
            KlTerm::Loss => {
                rows.iter().zip(lengths.clone()).flat_map(|(&i, n)| std::iter::repeat_n(lesson.kl[i], n)).collect()
            }
        };
        (lengths.flat_map(weight).collect(), kl)
    }

    /// Evaluates a minibatch and takes its step. Returns false, without a step, if the policy has moved as far as
    /// `stop_kl` allows.
    fn minibatch(
        &mut self,
        lesson: PhaseBatch<'_>,
        rows: &[usize],
        params: &Params,
        report: &mut Report,
    ) -> Result<bool> {
        let MinibatchOutputs { losses, log_ratio, surrogate } = self.judge(lesson, rows, params)?;
        if report.minibatches == 0 {
            report.first_log_ratio = log_ratio;
        }

        let posts = || named("responses to posts", rows.iter().map(|&i| &lesson.rollout.posts[i]));
        if params.stop_kl.is_some_and(|limit| losses.kl_old_new > limit) {
            report.skipped += 1;
            return Ok(false);
        }
        let lr = learning_rate(params, self.steps);
        self.steps += 1;
        report.learning_rate = lr;
        report.ratio_max = report.ratio_max.max(losses.max_ratio);
        if losses.mean_ratio > RATIO_LIMIT {
            report.skipped += 1;
            return Ok(true);
        }
        if !(losses.policy.is_finite() && losses.value.is_finite()) {
            let what = if losses.policy.is_finite() { "the value loss" } else { "the policy loss" };
            return Err(self.diverged(what, &posts()));
        }
        self.last = Some(losses.policy);
        report.policy_loss += losses.policy;
        report.value_loss += losses.value;
        report.clip_fraction += losses.clip_fraction;
        report.ratio_mean += losses.mean_ratio;
        report.kl_old_new += losses.kl_old_new;

        let gradients = lm::backward(&surrogate).into_stage_result()?;
        let norms = match self.optimiser.step(&gradients, lr, params.max_gradient_norm) {
            Err(lm::Error::NonFinite { quantity }) => return Err(self.diverged(&quantity, &posts())),
            other => other.into_stage_result()?,
        };
        report.gradient_norm += norms.grad_norm;
        report.update_norm += norms.update_norm;
        Ok(true)
    }

    /// The error for a non-finite `what` at the latest step, on these posts.
    fn diverged(&self, what: &str, posts: &str) -> Error {
        let last = match self.last {
            Some(loss) => format!("the last finite policy loss was {}", rounded(loss)),
            None => "no finite loss before it".to_owned(),
        };
        let mut variables = self.policy.variables();
        variables.extend(self.head.iter().flat_map(ScalarHead::variables));
        let weights = suspect(&variables);
        Error::user(format!("{what} is not finite at step {}, on {posts} ({last}; {weights})", self.steps))
            .help(format!("lower `lr` (it is {}), or set `max_gradient_norm`", number(self.lr)))
    }

    /// Converts a result of the policy on these posts, reporting non-finite numbers like those of a step.
    pub(super) fn told<T>(&self, result: lm::Result<T>, posts: impl Fn() -> String) -> Result<T> {
        match result {
            Err(lm::Error::NonFinite { quantity }) => Err(self.diverged(&quantity, &posts())),
            other => other.into_stage_result(),
        }
    }
}

/// Constant after a linear rise over `warmup` steps.
pub fn learning_rate(params: &Params, step: u64) -> f64 {
    let rise = if params.warmup == 0 { 1.0 } else { ((step + 1) as f64 / params.warmup as f64).min(1.0) };
    params.lr * rise
}
