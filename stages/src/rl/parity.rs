//! Compares rewards, advantages and losses with an independent NumPy version (`lm/tests/fixtures/ppo.py`), and PPO's
//! gradient with PyTorch's (`lm/tests/fixtures/rlhf.py`).

use std::path::{Path, PathBuf};

use lm::{CausalLm, ScalarHead, Sequence, StatOptions};

use super::credit::{group_relative, leave_one_out};
use super::gae::{Normalisation, advantages, normalised};
use super::loss::{Targets, Value, losses};
use super::objective::{
    VarianceScope, Weights, adaptive_weights, baseline_scores, calibrate_b, coefficients, fixed_weights,
    matched_lambda, scoped, token_rewards,
};
use super::params::Params;
use super::rollout::Rollout;
use super::update::{Learner, PhaseBatch};
use crate::reward;
use crate::stats::mean;
use crate::stats::moments;
use crate::testing::numbers::{Mutants, Numbers, Within, gradients};
use crate::types::Objective;

const TOLERANCE: Within = Within::Each(1e-5);
/// Same value as in `ppo.py`.
const LAMBDA: f64 = 0.05;
const CLIP: f64 = 0.2;

const MUTANTS: Mutants = &[
    ("advantages/discounted", "bootstraps_past_the_end lambda_one"),
    ("advantages/plain", "bootstraps_past_the_end lambda_one"),
    ("d_logprob", "not_clipped"),
    ("grpo/advantages", "population_deviation"),
    ("grpo/d_logprob", "mean_over_tokens"),
    ("grpo/policy", "kl_upside_down mean_over_tokens"),
    ("d_value", "not_clipped"),
    ("k3", "ratio_upside_down"),
    ("matched_lambda", "mean_of_quotients not_weighed_by_kl"),
    ("normalised/batch", "padding_counted sample_deviation"),
    ("policy", "larger_objective mean_of_row_means mean_over_padding not_clipped"),
    ("returns/discounted", "bootstraps_past_the_end lambda_one"),
    ("returns/plain", "bootstraps_past_the_end lambda_one"),
    ("rewards/prompt", "own_response_counted"),
    ("rewards/sample", "kl_sign_reversed score_not_scaled score_on_every_token"),
    ("rewards/soft_min", "sum_of_members"),
    ("rewards/uwo", "deviation"),
    ("rloo/advantages", "own_response_counted"),
    ("s2", "sample_variance"),
    ("value", "mean_of_row_means not_clipped smaller_error"),
];

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../lm/tests/fixtures/rlhf")
}

/// The recorded rollouts and the numbers derived from them.
struct Recorded {
    numbers: Numbers,
    rollout: Rollout,
    permutation: Vec<usize>,
}

impl Recorded {
    fn new() -> Self {
        let numbers = Numbers::load(&folder().join("rollouts.safetensors"), MUTANTS);
        let whole = |name: &str| numbers.expected(name).into_iter().map(|x| x as usize).collect::<Vec<_>>();
        let lengths = whole("in/lengths");
        let rollout = Rollout {
            sequences: lengths.iter().map(|&n| Sequence::new([1], vec![1; n])).collect(),
            logprob: by_response(&numbers.expected("in/old_logprob"), &lengths),
            reference: by_response(&numbers.expected("in/reference"), &lengths),
            value: by_response(&numbers.expected("in/value"), &lengths),
            scores: numbers.expected("in/scores").chunks(lengths.len()).map(<[f64]>::to_vec).collect(),
            ..Rollout::default()
        };
        Self { permutation: whole("in/permutation"), rollout, numbers }
    }

    /// The token rewards of each response.
    fn rewards(&self, weights: &[Weights]) -> Vec<Vec<f64>> {
        weights.iter().enumerate().map(|(i, w)| token_rewards(*w, &self.rollout.log_ratio(i))).collect()
    }

    /// Rewards of Algorithm 1 as published.
    fn adaptive_rewards(&self, scope: VarianceScope) -> Vec<Vec<f64>> {
        let (mu, s2) = moments(&self.rollout.scores);
        let c = coefficients(&scoped(&s2, scope, 2, &self.permutation), calibrate_b(&s2, LAMBDA));
        self.rewards(&adaptive_weights(&mu, &c))
    }

    /// (advantages, returns) of Algorithm 1's rewards.
    fn credit(&self, gamma: f64, lambda: f64) -> (Vec<f64>, Vec<f64>) {
        let rewards = self.adaptive_rewards(VarianceScope::Sample);
        let credit = rewards.iter().zip(&self.rollout.value).map(|(r, v)| advantages(r, v, gamma, lambda));
        let (advantages, returns): (Vec<_>, Vec<_>) = credit.unzip();
        (advantages.concat(), returns.concat())
    }

    fn claim(&self, name: &str, ours: &[f64]) {
        self.numbers.claim(name, ours, TOLERANCE);
    }
}

/// Splits flat token values by response.
fn by_response(flat: &[f64], lengths: &[usize]) -> Vec<Vec<f64>> {
    let mut rest = flat;
    let mut take = |n: usize| {
        let (own, after) = rest.split_at(n);
        rest = after;
        own.to_vec()
    };
    lengths.iter().map(|&n| take(n)).collect()
}

#[test]
fn rewards_of_every_objective_follow_the_published_formulas() {
    let recorded = Recorded::new();
    let scores = &recorded.rollout.scores;
    let (mu, s2) = moments(scores);
    let b = calibrate_b(&s2, LAMBDA);
    recorded.claim("mu", &mu);
    recorded.claim("s2", &s2);
    recorded.claim("b", &[b]);
    for (scope, name) in [
        (VarianceScope::Sample, "sample"),
        (VarianceScope::Prompt, "prompt"),
        (VarianceScope::Batch, "batch"),
        (VarianceScope::Shuffled, "shuffled"),
    ] {
        recorded.claim(&format!("rewards/{name}"), &recorded.adaptive_rewards(scope).concat());
    }
    for objective in [
        Objective::Standard,
        Objective::Mean,
        Objective::Pessimistic,
        Objective::MeanMinusStd,
        Objective::Uwo,
        Objective::SoftMin,
    ] {
        let weights = fixed_weights(&baseline_scores(objective, scores, 0.5, 0.7), LAMBDA);
        recorded.claim(&format!("rewards/{objective}"), &recorded.rewards(&weights).concat());
    }
    let c = coefficients(&s2, b);
    // The recorded rollouts have no full distributions: k3 replaces their KL.
    let kl = recorded.rollout.kl_k3();
    let c_kl = mean(&c.iter().zip(&kl).map(|(c, kl)| c * kl).collect::<Vec<_>>());
    recorded.claim("matched_lambda", &[matched_lambda(c_kl, mean(&kl), mean(&c))]);
    recorded.claim("k1", &recorded.rollout.kl());
    recorded.claim("k3", &recorded.rollout.kl_k3());
}

#[test]
fn advantages_are_the_double_sum_of_their_definition() {
    let recorded = Recorded::new();
    for (name, gamma, lambda) in [("plain", 1.0, 0.95), ("discounted", 0.9, 0.8)] {
        let (advantages, returns) = recorded.credit(gamma, lambda);
        recorded.claim(&format!("advantages/{name}"), &advantages);
        recorded.claim(&format!("returns/{name}"), &returns);
    }
    let (raw, _) = recorded.credit(1.0, 0.95);
    recorded.claim("normalised/batch", &normalised(&raw, Normalisation::Batch, 1.0));
    recorded.claim("normalised/first_batch_std", &normalised(&raw, Normalisation::FirstBatchStd, 2.0));
}

#[test]
fn ppos_losses_and_their_derivatives_are_those_of_the_masked_arrays() {
    let recorded = Recorded::new();
    let narrow = |name: &str| recorded.numbers.expected(name).iter().map(|&x| x as f32).collect::<Vec<f32>>();
    let (raw, returns) = recorded.credit(1.0, 0.95);
    let targets = Targets {
        old_logprob: &recorded.rollout.logprob.concat(),
        old_value: &recorded.rollout.value.concat(),
        advantage: &normalised(&raw, Normalisation::Batch, 1.0),
        returns: &returns,
        weight: &vec![1.0 / raw.len() as f64; raw.len()],
        kl: &[],
        reference: &[],
    };
    let settings = Value::default();
    assert_eq!((settings.clip, settings.coefficient), (0.2, 0.1), "as in ppo.py");
    let ours = losses(&narrow("in/new_logprob"), &narrow("in/new_value"), targets, CLIP, Some(&settings));
    let wide = |x: &[f32]| x.iter().copied().map(f64::from).collect::<Vec<f64>>();
    recorded.claim("policy", &[ours.policy]);
    recorded.claim("value", &[ours.value]);
    recorded.claim("kl_old_new", &[ours.kl_old_new]);
    recorded.claim("ratio", &[ours.mean_ratio, ours.max_ratio]);
    recorded.claim("clip_fraction", &[ours.clip_fraction]);
    recorded.claim("d_logprob", &wide(&ours.d_logprob));
    recorded.claim("d_value", &wide(&ours.d_value));
}

#[test]
fn rloo_and_grpo_are_those_of_the_grouped_arrays() {
    let recorded = Recorded::new();
    let rewards: Vec<f64> = recorded.adaptive_rewards(VarianceScope::Sample).iter().map(|r| r.iter().sum()).collect();
    recorded.claim("rloo/advantages", &leave_one_out(&rewards, 2));
    recorded.claim("grpo/advantages_without_scale", &group_relative(&rewards, 2, false));
    // With the KL in the loss, weighted by each response's c, the reward is the score alone.
    let (mu, s2) = moments(&recorded.rollout.scores);
    let c = coefficients(&s2, calibrate_b(&s2, LAMBDA));
    let scores: Vec<f64> = adaptive_weights(&mu, &c).iter().map(|w| w.score).collect();
    let advantages = group_relative(&scores, 2, true);
    recorded.claim("grpo/advantages", &advantages);
    let lengths: Vec<usize> = recorded.rollout.logprob.iter().map(Vec::len).collect();
    let by_token =
        |x: &[f64]| -> Vec<f64> { x.iter().zip(&lengths).flat_map(|(x, n)| std::iter::repeat_n(*x, *n)).collect() };
    let weight: Vec<f64> = lengths.iter().map(|n| 1.0 / (lengths.len() * n) as f64).collect();
    let new: Vec<f32> = recorded.numbers.expected("in/new_logprob").iter().map(|&x| x as f32).collect();
    let targets = Targets {
        old_logprob: &recorded.rollout.logprob.concat(),
        old_value: &[],
        advantage: &by_token(&advantages),
        returns: &[],
        weight: &by_token(&weight),
        kl: &by_token(&c),
        reference: &recorded.rollout.reference.concat(),
    };
    let ours = losses(&new, &[], targets, CLIP, None);
    recorded.claim("grpo/policy", &[ours.policy]);
    recorded.claim("grpo/d_logprob", &ours.d_logprob.iter().copied().map(f64::from).collect::<Vec<f64>>());
}

#[test]
fn a_minibatchs_gradient_is_that_of_autograd() {
    let folder = folder();
    let numbers = Numbers::load(&folder.join("expected.safetensors"), reward::parity::MUTANTS);
    let inputs: serde_json::Value =
        serde_json::from_slice(&std::fs::read(folder.join("inputs.json")).unwrap()).unwrap();
    let rows: Vec<(Vec<u32>, Vec<u32>)> = serde_json::from_value(inputs["rows"].clone()).unwrap();
    let lengths: Vec<usize> = rows.iter().map(|(_, response)| response.len()).collect();
    let given = |name: &str| by_response(&numbers.expected(&format!("in/{name}")), &lengths);

    let base = CausalLm::load(&folder).unwrap();
    let head = ScalarHead::load(&folder.join("head.safetensors"), reward::parity::WIDTH).unwrap().trainable().unwrap();
    let params = Params { lora: None, clip: CLIP, ..Params::default() };
    let policy = base.clone().with_full_training().unwrap();
    let learner = Learner::with_head(policy, base, Some(head), &params).unwrap();
    let rollout = Rollout {
        sequences: rows.into_iter().map(|(prompt, response)| Sequence { prompt, response }).collect(),
        logprob: given("old_logprob"),
        value: given("old_value"),
        ..Rollout::default()
    };
    let whole = |name: &str| serde_json::from_value::<u32>(inputs[name].clone()).unwrap();
    let stats =
        &StatOptions { min_new_tokens: whole("min_new_tokens") as usize, eos: whole("eos").into(), entropy: false };
    let (advantages, returns) = (given("advantage"), given("returns"));
    let lesson =
        PhaseBatch { rollout: &rollout, advantages: &advantages, returns: &returns, kl: &[], first_std: 1.0, stats };
    let judged = learner.judge(lesson, &[0, 1, 2, 3, 4, 5], &params).unwrap();
    let loss = judged.losses.policy + Value::default().coefficient * judged.losses.value;
    numbers.claim("ppo/loss", &[loss], TOLERANCE);
    let mut variables = learner.policy.variables();
    variables.extend(learner.head.iter().flat_map(ScalarHead::variables));
    let ours = gradients(&variables, &lm::backward(&judged.surrogate).unwrap());
    numbers.claim_gradients("ppo/gradient", &ours, 1e-5);
}
