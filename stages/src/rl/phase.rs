//! One phase: sample, score, reward, update, and its row in the table.

use std::time::Instant;

use engine::context::Context;
use engine::error::Result;
use lm::{CounterRng, SampleOptions, Sequence, StatOptions};
use rand_chacha::ChaCha12Rng;
use serde::{Deserialize, Serialize};

use super::credit::{Credit, KlTerm, group_relative, leave_one_out};
use super::held_out::Prompt;
use super::objective::{
    VarianceReference, Weights, adaptive_weights, baseline_scores, calibrate_b, check_disagreement, coefficients,
    controlled_lambda, fixed_weights, scoped, token_rewards,
};
use super::params::Params;
use super::passes::{self, ShuffledPasses};
use super::rollout::{Rollout, score_members, score_tokens};
use super::update::{Learner, PhaseBatch};
use super::{SCORING_BATCH, gae, spread};
use crate::error::{IntoStageResult, named};
use crate::random::bits_of;
use crate::reward::LoadedReward;
use crate::stats::moments;
use crate::stats::{mean, permutation, spearman, std, variance};
use crate::train::checkpoint::{FloatBits, GeneratorPosition};
use crate::types::Objective;
use crate::types::Phase;

/// State carried from phase to phase.
pub struct Phases<'a> {
    params: &'a Params,
    members: &'a [LoadedReward],
    prompts: &'a [Prompt],
    sampling: SampleOptions,
    stats: StatOptions,
    /// lambda of `matched`, per phase; a single element if it is constant.
    pub schedule: Option<Vec<f64>>,
    /// sigma_2^2 of Eq. 4, fixed in the first phase.
    pub b: Option<f64>,
    /// KL coefficient of the fixed objectives; changes only with a KL target.
    lambda: f64,
    /// Standard deviation of the first phase's raw advantages.
    first_std: Option<f64>,
    draws: CounterRng,
    /// Generator of the reference responses that the variance is relative to.
    reference_draws: CounterRng,
    drawn: u64,
    passes: ShuffledPasses,
    order: ChaCha12Rng,
    shuffle: ChaCha12Rng,
}

/// The part of [`Phases`] that a checkpoint between two phases stores.
#[derive(Serialize, Deserialize)]
pub struct State {
    b: Option<FloatBits>,
    lambda: FloatBits,
    first_std: Option<FloatBits>,
    drawn: u64,
    passes: passes::State,
    order: GeneratorPosition,
    shuffle: GeneratorPosition,
}

/// Each response token's share of its response's reward, `[responses][tokens]`.
pub(super) struct Advantages {
    /// In the form used by the update: normalised over the batch, if at all.
    advantages: Vec<Vec<f64>>,
    /// Empty without a value head.
    returns: Vec<Vec<f64>>,
    /// KL coefficient of each response, if the KL is in the loss.
    kl: Vec<f64>,
    /// Standard deviation of the raw advantages.
    std: f64,
    first_std: f64,
}

impl Advantages {
    pub(super) fn lesson<'a>(&'a self, rollout: &'a Rollout, stats: &'a StatOptions) -> PhaseBatch<'a> {
        let Self { advantages, returns, kl, first_std, .. } = self;
        PhaseBatch { rollout, advantages, returns, kl, first_std: *first_std, stats }
    }
}

/// The arm's rewards for a phase's scores.
pub(super) struct Rewards {
    pub weights: Vec<Weights>,
    /// The arm's own reward of each response.
    proxy: Vec<f64>,
    mu: Vec<f64>,
    /// Absent with one member.
    pub s2: Option<Vec<f64>>,
    /// Algorithm 1's coefficients, even if the arm does not use them; absent with one member or lambda 0.
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
        // `standard` reads phi_1 alone: scoring the other members during training would be wasted work.
        let members = if params.objective.reads_first_member_only() { &members[..1] } else { members };
        Self {
            params,
            members,
            prompts,
            sampling,
            stats,
            schedule,
            b: None,
            lambda: params.lambda,
            first_std: None,
            draws: CounterRng(ctx.generator_key("rollouts")),
            reference_draws: CounterRng(ctx.generator_key("variance reference")),
            drawn: 0,
            passes: ShuffledPasses::new(prompts.len(), ctx.generator("prompts")),
            order: ctx.generator("minibatches"),
            shuffle: ctx.generator("shuffled variance"),
        }
    }

    pub fn state(&self) -> Result<State> {
        Ok(State {
            b: self.b.map(FloatBits),
            lambda: FloatBits(self.lambda),
            first_std: self.first_std.map(FloatBits),
            drawn: self.drawn,
            passes: self.passes.state()?,
            order: GeneratorPosition::of(&self.order)?,
            shuffle: GeneratorPosition::of(&self.shuffle)?,
        })
    }

    /// Restores `state` into fresh [`Phases`].
    pub fn restore(&mut self, state: State) {
        self.b = state.b.map(|b| b.0);
        self.lambda = state.lambda.0;
        self.first_std = state.first_std.map(|std| std.0);
        self.drawn = state.drawn;
        self.passes.restore(state.passes);
        state.order.restore(&mut self.order);
        state.shuffle.restore(&mut self.shuffle);
    }

    /// Runs phase `done + 1`.
    pub fn run(&mut self, learner: &mut Learner, done: u64, ctx: &mut Context) -> Result<Phase> {
        ctx.activity("sampling");
        let clock = Instant::now();
        let mut rollout = self.sample(learner)?;
        let sampling = clock.elapsed().as_secs_f64();

        ctx.activity("scoring");
        let clock = Instant::now();
        self.score(learner, &mut rollout)?;
        let scoring = clock.elapsed().as_secs_f64();

        ctx.activity("updating");
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
        let (kl, kl_exact) = (rollout.kl(), rollout.kl_exact());
        let products = |c: &Vec<f64>, x: &[f64]| mean(&c.iter().zip(x).map(|(c, x)| c * x).collect::<Vec<_>>());
        if let Some(target) = self.params.kl_target {
            self.lambda = controlled_lambda(self.lambda, mean(&kl), target, self.params.kl_gain);
        }
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
            c_kl: rewards.c.as_ref().map(|c| products(c, &kl_exact)),
            one_minus_c_mu: rewards.c.as_ref().map(|c| mean(&rewards.mu) - products(c, &rewards.mu)),
            lambda_effective: Some(rewards.lambda_effective),
            kl: Some(mean(&kl)),
            kl_k3: Some(mean(&rollout.kl_k3())),
            kl_exact: Some(mean(&kl_exact)),
            kl_old_new: Some(report.kl_old_new),
            spearman_s2_kl: rewards.s2.as_deref().and_then(|s2| spearman(s2, &kl)),
            clip_fraction: Some(report.clip_fraction),
            ratio_mean: Some(report.ratio_mean),
            ratio_max: Some(report.ratio_max),
            entropy: Some(mean(&rollout.entropy.concat())),
            explained_variance: (!returns.is_empty() && variance(&returns) > 0.0)
                .then(|| 1.0 - variance(&errors) / variance(&returns)),
            eos_rate: Some(rollout.ended.iter().filter(|ended| **ended).count() as f64 / responses),
            length: Some(rollout.sequences.iter().map(|s| s.response.len()).sum::<usize>() as f64 / responses),
            advantage_std: Some(credit.std),
            gradient_norm: Some(report.gradient_norm),
            update_norm: Some(report.update_norm),
            policy_loss: Some(report.policy_loss),
            value_loss: self.params.credit.value().map(|_| report.value_loss),
            skipped: report.skipped,
            learning_rate: Some(report.learning_rate),
        })
    }

    /// Samples K responses to each of the phase's prompts at temperature 1.
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

    /// Scores the responses with the policy, the reference, the value head and the members.
    pub(super) fn score(&self, learner: &Learner, rollout: &mut Rollout) -> Result<()> {
        let (policy, reference) = (&learner.policy, &learner.reference);
        let head = learner.head.as_ref();
        let scored = score_tokens(policy, head, reference, &rollout.sequences, &self.stats, SCORING_BATCH)?;
        rollout.logprob = scored.logprob;
        rollout.entropy = scored.entropy;
        rollout.value = scored.value;
        rollout.reference = scored.reference;
        rollout.divergence = scored.divergence;
        rollout.scores = score_members(self.members, &rollout.sequences, SCORING_BATCH)?;
        if self.params.variance_reference == VarianceReference::Sft && self.members.len() > 1 {
            let responses = self.reference_responses(learner, rollout)?;
            rollout.reference_scores = Some(score_members(self.members, &responses, SCORING_BATCH)?);
        }
        Ok(())
    }

    /// The reference policy's response to each response's prompt; a post always gets the same one.
    fn reference_responses(&self, learner: &Learner, rollout: &Rollout) -> Result<Vec<Sequence>> {
        let mut responses = Vec::with_capacity(rollout.sequences.len());
        let rows: Vec<u64> = rollout.posts.iter().map(|id| bits_of(&self.reference_draws.0, id)).collect();
        for (chunk, rows) in rollout.sequences.chunks(SCORING_BATCH).zip(rows.chunks(SCORING_BATCH)) {
            let prompts: Vec<&[u32]> = chunk.iter().map(|sequence| sequence.prompt.as_slice()).collect();
            let sampled = lm::sample(&learner.reference, &prompts, &self.sampling, &self.reference_draws, rows);
            let sampled = sampled.into_stage_result()?;
            responses
                .extend(chunk.iter().zip(sampled).map(|(s, sampled)| Sequence::new(s.prompt.clone(), sampled.ids)));
        }
        Ok(responses)
    }

    /// The arm's rewards in phase `done + 1`.
    pub(super) fn rewards(&mut self, rollout: &Rollout, done: u64) -> Result<Rewards> {
        let params = self.params;
        let mu = moments(&rollout.scores).0;
        let s2 = (self.members.len() > 1).then(|| disagreement(rollout));
        if let Some(s2) = &s2 {
            check_disagreement(&mu, s2)?;
        }
        let c = match &s2 {
            Some(s2) if params.lambda > 0.0 => {
                let b = *self.b.get_or_insert_with(|| calibrate_b(s2, params.lambda));
                let shuffled = permutation(s2.len(), &mut self.shuffle);
                Some(coefficients(&scoped(s2, params.variance_scope, params.responses, &shuffled), b))
            }
            _ => None,
        };
        if let (Objective::Adaptive, Some(c)) = (params.objective, &c) {
            let lambda_effective = mean(c) / (1.0 - mean(c));
            let weights = adaptive_weights(&mu, c);
            return Ok(Rewards { weights, proxy: mu.clone(), mu, s2, c: Some(c.clone()), lambda_effective });
        }
        let lambda = match &self.schedule {
            Some(schedule) => schedule[(done as usize).min(schedule.len() - 1)],
            None => self.lambda,
        };
        let proxy = baseline_scores(params.objective, &rollout.scores, params.k, params.beta);
        Ok(Rewards { weights: fixed_weights(&proxy, lambda), proxy, mu, s2, c, lambda_effective: lambda })
    }

    /// The advantage, and with a value head the return, of every response token.
    pub(super) fn credit(&mut self, rollout: &Rollout, weights: &[Weights]) -> Advantages {
        let (mut advantages, mut returns, mut kl) = (Vec::new(), Vec::new(), Vec::new());
        let alike = |advantage: Vec<f64>| -> Vec<Vec<f64>> {
            let tokens = rollout.sequences.iter().map(|sequence| sequence.response.len());
            advantage.into_iter().zip(tokens).map(|(advantage, tokens)| vec![advantage; tokens]).collect()
        };
        let whole = |weights: &Weights, i: usize| token_rewards(*weights, &rollout.log_ratio(i)).iter().sum();
        match self.params.credit {
            Credit::Gae { gamma, lambda, .. } => {
                for (i, weights) in weights.iter().enumerate() {
                    let tokens = token_rewards(*weights, &rollout.log_ratio(i));
                    let (a, r) = gae::advantages(&tokens, &rollout.value[i], gamma, lambda);
                    advantages.push(a);
                    returns.push(r);
                }
            }
            Credit::LeaveOneOut { .. } => {
                let rewards: Vec<f64> = weights.iter().enumerate().map(|(i, w)| whole(w, i)).collect();
                advantages = alike(leave_one_out(&rewards, self.params.responses));
            }
            Credit::Group { scale, kl_term } => {
                let rewards: Vec<f64> = match kl_term {
                    KlTerm::Reward => weights.iter().enumerate().map(|(i, w)| whole(w, i)).collect(),
                    KlTerm::Loss => {
                        kl = weights.iter().map(|weights| weights.kl).collect();
                        weights.iter().map(|weights| weights.score).collect()
                    }
                };
                advantages = alike(group_relative(&rewards, self.params.responses, scale));
            }
        }
        let raw = advantages.concat();
        let std = std(&raw);
        let first_std = *self.first_std.get_or_insert(std);
        let mut normal = gae::normalised(&raw, self.params.credit.normalisation(), first_std).into_iter();
        for row in &mut advantages {
            for (slot, a) in row.iter_mut().zip(&mut normal) {
                *slot = a;
            }
        }
        Advantages { advantages, returns, kl, std, first_std }
    }

    /// Sets the run's metrics to those of its latest phase.
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

/// sigma_i^2 of Eq. 6, for the members' scores or for their scores relative to the reference policy's response.
fn disagreement(rollout: &Rollout) -> Vec<f64> {
    match &rollout.reference_scores {
        None => moments(&rollout.scores).1,
        Some(reference) => {
            let less = |(own, sft): (&Vec<f64>, &Vec<f64>)| own.iter().zip(sft).map(|(own, sft)| own - sft).collect();
            moments(&rollout.scores.iter().zip(reference).map(less).collect::<Vec<_>>()).1
        }
    }
}
