//! One phase of PPO: sample, score, reward, update, and its row of the table. Knows no file.

use std::time::Instant;

use engine::context::Context;
use engine::error::Result;
use lm::{Draws, SampleOptions, Sequence, StatOptions};
use rand_chacha::ChaCha12Rng;
use serde::{Deserialize, Serialize};

use super::held_out::Prompt;
use super::objective::{
    Objective, Weights, adaptive_weights, baseline_scores, calibrate_b, check_disagreement, coefficients,
    fixed_weights, moments, scoped, token_rewards,
};
use super::params::Params;
use super::passes::{self, Passes};
use super::rollout::{Rollout, score_members, score_tokens};
use super::update::{Learner, Lesson};
use super::{SCORING_BATCH, gae, spread};
use crate::reward::LoadedReward;
use crate::stats::{mean, permutation, spearman, std, variance};
use crate::train::checkpoint::{Exact, Position};
use crate::train::named;
use crate::types::Phase;

/// What one phase hands to the next.
pub struct Phases<'a> {
    params: &'a Params,
    members: &'a [LoadedReward],
    prompts: &'a [Prompt],
    sampling: SampleOptions,
    stats: StatOptions,
    /// lambda of `matched`: constant, or by phase.
    pub schedule: Option<Vec<f64>>,
    /// sigma_2^2 of Eq. 4, fixed in the first phase.
    pub b: Option<f64>,
    /// The first phase's standard deviation of raw advantages.
    first_std: Option<f64>,
    draws: Draws,
    drawn: u64,
    passes: Passes,
    order: ChaCha12Rng,
    shuffle: ChaCha12Rng,
}

/// What a checkpoint between two phases holds of [`Phases`].
#[derive(Serialize, Deserialize)]
pub struct State {
    b: Option<Exact>,
    first_std: Option<Exact>,
    drawn: u64,
    passes: passes::State,
    order: Position,
    shuffle: Position,
}

/// What each response token gets of its response's reward, `[responses][tokens]`.
pub(super) struct Credit {
    /// As the update takes them: normalised over the batch, if at all.
    advantages: Vec<Vec<f64>>,
    returns: Vec<Vec<f64>>,
    /// Of the raw advantages.
    std: f64,
    first_std: f64,
}

impl Credit {
    pub(super) fn lesson<'a>(&'a self, rollout: &'a Rollout, stats: &'a StatOptions) -> Lesson<'a> {
        let Self { advantages, returns, first_std, .. } = self;
        Lesson { rollout, advantages, returns, first_std: *first_std, stats }
    }
}

/// What the arm makes of a phase's scores.
pub(super) struct Rewards {
    pub weights: Vec<Weights>,
    /// The arm's own reward of each response.
    proxy: Vec<f64>,
    mu: Vec<f64>,
    /// Absent with one member.
    s2: Option<Vec<f64>>,
    /// Absent but for the adaptive objective.
    c: Option<Vec<f64>>,
    lambda_effective: f64,
}

impl<'a> Phases<'a> {
    pub fn new(
        params: &'a Params,
        members: &'a [LoadedReward],
        prompts: &'a [Prompt],
        sampling: SampleOptions,
        stats: StatOptions,
        schedule: Option<Vec<f64>>,
        ctx: &Context,
    ) -> Self {
        // `standard` reads phi_1 alone: scoring the rest in training would be work for nothing.
        let members = if params.objective.reads_first_member_only() { &members[..1] } else { members };
        Self {
            params,
            members,
            prompts,
            sampling,
            stats,
            schedule,
            b: None,
            first_std: None,
            draws: Draws(ctx.generator_key("rollouts")),
            drawn: 0,
            passes: Passes::new(prompts.len(), ctx.generator("prompts")),
            order: ctx.generator("minibatches"),
            shuffle: ctx.generator("shuffled variance"),
        }
    }

    pub fn state(&self) -> Result<State> {
        Ok(State {
            b: self.b.map(Exact),
            first_std: self.first_std.map(Exact),
            drawn: self.drawn,
            passes: self.passes.state()?,
            order: Position::of(&self.order)?,
            shuffle: Position::of(&self.shuffle)?,
        })
    }

    /// Puts what [`Phases::new`] made where `state` has it.
    pub fn restore(&mut self, state: State) {
        self.b = state.b.map(|b| b.0);
        self.first_std = state.first_std.map(|std| std.0);
        self.drawn = state.drawn;
        self.passes.restore(state.passes);
        state.order.restore(&mut self.order);
        state.shuffle.restore(&mut self.shuffle);
    }

    /// Runs phase `done + 1`.
    pub fn run(&mut self, learner: &mut Learner, done: u64, ctx: &mut Context) -> Result<Phase> {
        let clock = Instant::now();
        let mut rollout = self.sample(learner)?;
        let sampling = clock.elapsed().as_secs_f64();

        let clock = Instant::now();
        self.score(learner, &mut rollout)?;
        let scoring = clock.elapsed().as_secs_f64();

        let clock = Instant::now();
        let rewards = self.rewards(&rollout, done)?;
        let credit = self.credit(&rollout, &rewards.weights);
        let report = learner.update(credit.lesson(&rollout, &self.stats), self.params, &mut self.order)?;
        let updating = clock.elapsed().as_secs_f64();
        ctx.timing(
            &format!("phase {}", done + 1),
            &[("sampling", sampling), ("scoring", scoring), ("update", updating)],
        );

        let (values, returns) = (rollout.value.concat(), credit.returns.concat());
        let errors: Vec<f64> = returns.iter().zip(&values).map(|(r, v)| r - v).collect();
        let kl = rollout.kl();
        let s2_spread = rewards.s2.as_deref().map_or([None; 3], spread);
        let c_spread = rewards.c.as_deref().map_or([None; 3], spread);
        let responses = rollout.sequences.len() as f64;
        Ok(Phase {
            phase: done as i64 + 1,
            optimiser_steps: learner.steps as i64,
            proxy: Some(mean(&rewards.proxy)),
            mu: Some(mean(&rewards.mu)),
            s2: rewards.s2.as_deref().map(mean),
            s2_q10: s2_spread[0],
            s2_q50: s2_spread[1],
            s2_q90: s2_spread[2],
            c: rewards.c.as_deref().map(mean),
            c_q10: c_spread[0],
            c_q50: c_spread[1],
            c_q90: c_spread[2],
            one_minus_c: rewards.c.as_deref().map(|c| 1.0 - mean(c)),
            lambda_effective: Some(rewards.lambda_effective),
            kl: Some(mean(&kl)),
            kl_k3: Some(mean(&rollout.kl_k3())),
            spearman_s2_kl: rewards.s2.as_deref().and_then(|s2| spearman(s2, &kl)),
            clip_fraction: Some(report.clip_fraction),
            ratio_mean: Some(report.ratio_mean),
            ratio_max: Some(report.ratio_max),
            entropy: Some(mean(&rollout.entropy.concat())),
            explained_variance: (variance(&returns) > 0.0).then(|| 1.0 - variance(&errors) / variance(&returns)),
            eos_rate: Some(rollout.ended.iter().filter(|ended| **ended).count() as f64 / responses),
            length: Some(rollout.sequences.iter().map(|s| s.response.len()).sum::<usize>() as f64 / responses),
            advantage_std: Some(credit.std),
            gradient_norm: Some(report.gradient_norm),
            update_norm: Some(report.update_norm),
            policy_loss: Some(report.policy_loss),
            value_loss: Some(report.value_loss),
            skipped: report.skipped,
            learning_rate: Some(report.learning_rate),
        })
    }

    /// K responses to each of the phase's prompts, at temperature 1.
    pub(super) fn sample(&mut self, learner: &Learner) -> Result<Rollout> {
        let policy = learner.policy.frozen();
        let mut prompts = Vec::with_capacity(self.params.rollouts * self.params.responses);
        let mut rollout = Rollout::default();
        for i in self.passes.take(self.params.rollouts) {
            for _ in 0..self.params.responses {
                prompts.push(self.prompts[i].ids.as_slice());
                rollout.posts.push(self.prompts[i].post_id.clone());
            }
        }
        for chunk in prompts.chunks(SCORING_BATCH) {
            let rows: Vec<u64> = (self.drawn..).take(chunk.len()).collect();
            self.drawn += chunk.len() as u64;
            let sampled = lm::sample(&policy, chunk, &self.sampling, &self.draws, &rows);
            let posts = || named("posts", rollout.posts[rollout.sequences.len()..].iter().take(chunk.len()));
            for (prompt, sampled) in chunk.iter().zip(learner.told(sampled, posts)?) {
                rollout.sequences.push(Sequence { prompt: prompt.to_vec(), response: sampled.ids });
                rollout.ended.push(sampled.ended);
            }
        }
        Ok(rollout)
    }

    /// What policy, reference, value head and members say of the responses.
    pub(super) fn score(&self, learner: &Learner, rollout: &mut Rollout) -> Result<()> {
        let own = score_tokens(&learner.policy, Some(&learner.head), &rollout.sequences, &self.stats, SCORING_BATCH)?;
        let plain = StatOptions { entropy: false, ..self.stats.clone() };
        let reference = score_tokens(&learner.reference, None, &rollout.sequences, &plain, SCORING_BATCH)?;
        rollout.logprob = own.logprob;
        rollout.entropy = own.entropy;
        rollout.value = own.value;
        rollout.reference = reference.logprob;
        rollout.scores = score_members(self.members, &rollout.sequences, SCORING_BATCH)?;
        Ok(())
    }

    /// The arm's rewards of the phase after the first `done`.
    pub(super) fn rewards(&mut self, rollout: &Rollout, done: u64) -> Result<Rewards> {
        let (mu, s2) = moments(&rollout.scores);
        let s2 = (self.members.len() > 1).then_some(s2);
        if let Some(s2) = &s2 {
            check_disagreement(&mu, s2)?;
        }
        if let (Objective::Adaptive, Some(s2)) = (self.params.objective, &s2) {
            let b = *self.b.get_or_insert_with(|| calibrate_b(s2, self.params.lambda));
            let shuffled = permutation(s2.len(), &mut self.shuffle);
            let judged = scoped(s2, self.params.variance_scope, self.params.responses, &shuffled);
            let c = coefficients(&judged, b);
            let lambda_effective = mean(&c) / (1.0 - mean(&c));
            let weights = adaptive_weights(&mu, &c);
            return Ok(Rewards { weights, proxy: mu.clone(), mu, s2: Some(s2.clone()), c: Some(c), lambda_effective });
        }
        let lambda = match &self.schedule {
            Some(schedule) => schedule[(done as usize).min(schedule.len() - 1)],
            None => self.params.lambda,
        };
        let proxy = baseline_scores(self.params.objective, &rollout.scores, self.params.k);
        Ok(Rewards { weights: fixed_weights(&proxy, lambda), proxy, mu, s2, c: None, lambda_effective: lambda })
    }

    /// Advantages and returns of every response token.
    pub(super) fn credit(&mut self, rollout: &Rollout, weights: &[Weights]) -> Credit {
        let (mut advantages, mut returns) = (Vec::new(), Vec::new());
        for (i, weights) in weights.iter().enumerate() {
            let tokens = token_rewards(*weights, &rollout.log_ratio(i));
            let (a, r) = gae::advantages(&tokens, &rollout.value[i], self.params.gamma, self.params.gae_lambda);
            advantages.push(a);
            returns.push(r);
        }
        let raw = advantages.concat();
        let std = std(&raw);
        let first_std = *self.first_std.get_or_insert(std);
        let mut normal = gae::normalised(&raw, self.params.advantages, first_std).into_iter();
        for row in &mut advantages {
            for (slot, a) in row.iter_mut().zip(&mut normal) {
                *slot = a;
            }
        }
        Credit { advantages, returns, std, first_std }
    }

    /// The run's metrics are those of its latest phase.
    pub fn note_metrics(&self, row: &Phase, ctx: &mut Context) {
        let last = [
            ("proxy", row.proxy),
            ("kl", row.kl),
            ("s2", row.s2),
            ("length", row.length),
            ("eos_rate", row.eos_rate),
            ("entropy", row.entropy),
        ];
        for (name, value) in last {
            if let Some(value) = value {
                ctx.metric(format!("final_{name}"), value);
            }
        }
    }
}
