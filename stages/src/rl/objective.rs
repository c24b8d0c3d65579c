//! The rewards of Algorithm 1 and of its baselines, as functions of values.
//!
//! Symbols as in the paper's section 3: `mu` = mu_1, `s2` = sigma_1^2, `b` = sigma_2^2, phi_m = the members' scores.

use engine::error::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::stats::{mean, moments, variance};
use crate::types::Objective;

/// The set of responses over which the variance of Eq. 6 is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum VarianceScope {
    /// Algorithm 1: each pair's own sigma_i^2. Not the gradient of Eq. 7, since c then depends on y.
    #[default]
    Sample,
    /// The mean over the *other* responses to the same prompt (K >= 2). It does not depend on the response that it
    /// weighs, so the score function adds no term. It is still a biased estimate of Eq. 7, since c is concave in the
    /// variance.
    Prompt,
    /// The mean over the batch.
    Batch,
    /// Control: Algorithm 1 with the sigma_i^2 permuted over the batch.
    Shuffled,
}

/// The quantity whose variance over the members is taken.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum VarianceReference {
    /// phi_m(x, y), as in Eq. 6.
    #[default]
    None,
    /// phi_m(x, y) - phi_m(x, y_sft), with y_sft one fixed response of the SFT model to x. Bradley-Terry leaves each
    /// member's offset per prompt undetermined; the difference cancels it.
    Sft,
}

/// Rejects an ensemble whose members agree: its variance would carry no information.
///
/// # Errors
/// If mean(s2) < 1e-8 * Var_i(mu_i), or mean(s2) = 0.
pub fn check_disagreement(mu: &[f64], s2: &[f64]) -> Result<()> {
    let (s2, spread) = (mean(s2), variance(mu));
    if s2 < 1e-8 * spread || s2 == 0.0 {
        return Err(Error::user(format!(
            "the ensemble's members agree to the digit: mean variance {s2:.3e} beside a variance of the rewards of {spread:.3e}"
        ))
        .help("train the members with different seeds, or on different batch orders"));
    }
    Ok(())
}

/// `b` = mean_i(sigma_i^2) / lambda on the first batch (Algorithm 1), so that the mean KL coefficient there is lambda.
pub fn calibrate_b(first_s2: &[f64], lambda: f64) -> f64 {
    mean(first_s2) / lambda
}

/// c_i = s2_i / (b + s2_i), so that b / (b + s2_i) = 1 - c_i and Eq. 7 reads (1 - c) mu - c KL.
pub fn coefficients(s2: &[f64], b: f64) -> Vec<f64> {
    s2.iter().map(|s2| s2 / (b + s2)).collect()
}

/// The variance used for each response. `responses` = K; the responses to one prompt are adjacent. Only `Shuffled`
/// reads `permutation`.
pub fn scoped(s2: &[f64], scope: VarianceScope, responses: usize, permutation: &[usize]) -> Vec<f64> {
    match scope {
        VarianceScope::Sample => s2.to_vec(),
        VarianceScope::Batch => vec![mean(s2); s2.len()],
        VarianceScope::Shuffled => permutation.iter().map(|&i| s2[i]).collect(),
        VarianceScope::Prompt => s2
            .chunks(responses)
            .flat_map(|group| {
                let sum: f64 = group.iter().sum();
                group.iter().map(move |own| (sum - own) / (responses as f64 - 1.0))
            })
            .collect(),
    }
}

/// Reward weights of one response: `r_t = -kl (log pi_old - log pi_ref)_t`, plus `score` at the last real token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weights {
    pub kl: f64,
    pub score: f64,
}

/// Eq. 2: a constant coefficient lambda and the unscaled score phi.
pub fn fixed_weights(phi: &[f64], lambda: f64) -> Vec<Weights> {
    phi.iter().map(|&score| Weights { kl: lambda, score }).collect()
}

/// Eq. 7: c for the KL, (1 - c) mu for the score.
pub fn adaptive_weights(mu: &[f64], c: &[f64]) -> Vec<Weights> {
    mu.iter().zip(c).map(|(mu, &c)| Weights { kl: c, score: (1.0 - c) * mu }).collect()
}

/// phi of the baselines, `[responses]`. Only `MeanMinusStd` and `Uwo` read `k`, only `SoftMin` reads `beta`.
pub fn baseline_scores(objective: Objective, scores: &[Vec<f64>], k: f64, beta: f64) -> Vec<f64> {
    let (mu, s2) = moments(scores);
    let each = |of: fn(&[f64], f64) -> f64| {
        (0..mu.len()).map(|i| of(&scores.iter().map(|member| member[i]).collect::<Vec<_>>(), beta)).collect()
    };
    match objective {
        Objective::Standard => scores[0].clone(),
        Objective::Pessimistic => each(|phi, _| phi.iter().copied().fold(f64::INFINITY, f64::min)),
        Objective::MeanMinusStd => mu.iter().zip(s2).map(|(mu, s2)| mu - k * s2.sqrt()).collect(),
        Objective::Uwo => mu.iter().zip(s2).map(|(mu, s2)| mu - k * s2).collect(),
        Objective::SoftMin => each(soft_minimum),
        Objective::Mean | Objective::Matched | Objective::Adaptive => mu,
    }
}

/// -beta log mean_m exp(-phi_m / beta), from the least member so that nothing overflows, and as log(1 + mean(exp - 1)) so that
/// nothing cancels at a large beta.
fn soft_minimum(phi: &[f64], beta: f64) -> f64 {
    let least = phi.iter().copied().fold(f64::INFINITY, f64::min);
    least - beta * mean(&phi.iter().map(|phi| (-(phi - least) / beta).exp_m1()).collect::<Vec<_>>()).ln_1p()
}

/// The next KL coefficient of a controller that steers towards `target` nats per response (Ziegler et al. 2019, section
/// 2.2).
pub fn controlled_lambda(lambda: f64, kl: f64, target: f64, gain: f64) -> f64 {
    lambda * (1.0 + gain * (kl / target - 1.0).clamp(-0.2, 0.2))
}

/// The per-token rewards of one response: `log_ratio[t]` = (log pi_old - log pi_ref)_t.
pub fn token_rewards(weights: Weights, log_ratio: &[f64]) -> Vec<f64> {
    let mut rewards: Vec<f64> = log_ratio.iter().map(|log_ratio| -weights.kl * log_ratio).collect();
    if let Some(last) = rewards.last_mut() {
        *last += weights.score;
    }
    rewards
}

/// The constant coefficient that weighs KL against score as an adaptive run did: lambda = [sum c_i KL_i / sum KL_i] /
/// mean(1 - c_i). The arguments are means of c_i KL_i, KL_i and c_i over the same responses.
pub fn matched_lambda(c_kl: f64, kl: f64, c: f64) -> f64 {
    // Before the first update no response has a KL to weigh by; far below this it is rounding.
    let weighed = if kl > 1e-4 { c_kl / kl } else { c };
    weighed / (1.0 - c)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ensemble() -> impl Strategy<Value = Vec<Vec<f64>>> {
        (2_usize..6, 2_usize..20).prop_flat_map(|(members, responses)| {
            proptest::collection::vec(proptest::collection::vec(-3.0..3.0_f64, responses), members)
        })
    }

    fn log_ratios(responses: usize) -> Vec<Vec<f64>> {
        (0..responses).map(|i| (0..3).map(|t| ((i * 7 + t * 3) % 5) as f64 * 0.1 - 0.2).collect()).collect()
    }

    fn adaptive(scores: &[Vec<f64>], b: f64) -> Vec<Vec<f64>> {
        let (mu, s2) = moments(scores);
        let weights = adaptive_weights(&mu, &coefficients(&s2, b));
        weights.iter().zip(log_ratios(mu.len())).map(|(w, r)| token_rewards(*w, &r)).collect()
    }

    proptest! {
        #[test]
        fn a_phase_one_has_the_mean_coefficient_lambda(scores in ensemble(), lambda in 1e-3..1.0_f64) {
            let (_, s2) = moments(&scores);
            prop_assume!(mean(&s2) > 1e-6);
            let b = calibrate_b(&s2, lambda);
            prop_assert!((mean(&s2) / b - lambda).abs() < 1e-9);
        }

        #[test]
        fn b_scaling_the_members_disagreement_in_every_phase_changes_no_reward(
            first in ensemble(), later in ensemble(), k in 0.1..10.0_f64,
        ) {
            let b = |scores: &[Vec<f64>]| calibrate_b(&moments(scores).1, 0.05);
            let wider = |scores: &[Vec<f64>]| -> Vec<Vec<f64>> {
                let (mu, _) = moments(scores);
                let widen = |m: &Vec<f64>| m.iter().zip(&mu).map(|(phi, mu)| mu + k.sqrt() * (phi - mu)).collect();
                scores.iter().map(widen).collect()
            };
            prop_assume!(mean(&moments(&first).1) > 1e-6);
            let near = adaptive(&later, b(&first));
            let far = adaptive(&wider(&later), b(&wider(&first)));
            for (a, b) in near.iter().flatten().zip(far.iter().flatten()) {
                prop_assert!((a - b).abs() < 1e-5);
            }
        }

        #[test]
        fn c_equal_variances_give_the_mean_arm_scaled(mu in proptest::collection::vec(-3.0..3.0_f64, 2..20), s2 in 0.01..2.0_f64) {
            let lambda = 0.05;
            let all = vec![s2; mu.len()];
            let c = coefficients(&all, calibrate_b(&all, lambda));
            let ratios = log_ratios(mu.len());
            let near = adaptive_weights(&mu, &c);
            let mean_arm = fixed_weights(&mu, lambda);
            for i in 0..mu.len() {
                let (a, m) = (token_rewards(near[i], &ratios[i]), token_rewards(mean_arm[i], &ratios[i]));
                for (a, m) in a.iter().zip(m) {
                    prop_assert!((a - m / (1.0 + lambda)).abs() < 1e-5);
                }
            }
        }

        #[test]
        fn f_batch_scope_is_the_mean_arm_with_a_schedule(scores in ensemble(), b in 0.1..10.0_f64) {
            let (mu, s2) = moments(&scores);
            let scoped = scoped(&s2, VarianceScope::Batch, 1, &[]);
            let c = coefficients(&scoped, b);
            let lambda_t = mean(&s2) / b;
            let factor = 1.0 / (1.0 + lambda_t);
            let ratios = log_ratios(mu.len());
            let (near, fixed) = (adaptive_weights(&mu, &c), fixed_weights(&mu, lambda_t));
            for i in 0..mu.len() {
                for (a, m) in token_rewards(near[i], &ratios[i]).iter().zip(token_rewards(fixed[i], &ratios[i])) {
                    prop_assert!((a - factor * m).abs() < 1e-5);
                }
            }
        }

        #[test]
        fn the_soft_minimum_lies_between_minimum_and_mean_and_ends_at_both(scores in ensemble()) {
            let soft = |beta| baseline_scores(Objective::SoftMin, &scores, 1.0, beta);
            let of = |objective| baseline_scores(objective, &scores, 1.0, 1.0);
            let (least, mu, s2) = (of(Objective::Pessimistic), of(Objective::Mean), moments(&scores).1);
            let (cold, warm, hot, wide) = (soft(1e-4), soft(0.5), soft(1e17), soft(200.0));
            for i in 0..mu.len() {
                prop_assert!(least[i] - 1e-9 <= warm[i] && warm[i] <= mu[i] + 1e-9);
                prop_assert!((cold[i] - least[i]).abs() < 1e-3 && (hot[i] - mu[i]).abs() < 1e-3);
                // Second-order expansion: the mean minus variance / (2 beta), which is UWO.
                prop_assert!((wide[i] - (mu[i] - s2[i] / 400.0)).abs() < 1e-3);
            }
        }

        #[test]
        fn prompt_scope_leaves_the_own_response_out(s2 in proptest::collection::vec(0.0..3.0_f64, 6)) {
            let scoped = scoped(&s2, VarianceScope::Prompt, 2, &[]);
            for i in 0..6 {
                prop_assert!((scoped[i] - s2[i ^ 1]).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn d_an_endless_variance_leaves_the_pure_kl_reward() {
        let c = coefficients(&[1e12], 1.0);
        let rewards = token_rewards(adaptive_weights(&[2.0], &c)[0], &[0.3, -0.1]);
        assert!((rewards[0] + 0.3).abs() < 1e-5 && (rewards[1] - 0.1).abs() < 1e-5, "{rewards:?}");
    }

    /// With batch-normalised advantages and prompt scope, a constant cancels exactly only if c is one number
    /// (`gae.rs`), since each draw has its own c. It always cancels in expectation, since the c that weighs a response
    /// does not depend on that response.
    #[test]
    fn e_a_constant_on_all_scores_adds_nothing_to_the_expected_gradient_but_for_sample_scope() {
        let policy = [0.2, 0.5, 0.3_f64];
        let s2 = [0.1, 2.0, 0.7];
        // The exact expectation over two responses to one prompt of sum_i (1 - c_i) d log pi(y_i) / d logit_0.
        let added = |scope| -> f64 {
            let slope = |y: usize| f64::from(u8::from(y == 0)) - policy[0];
            let draws = (0..3).flat_map(|y| (0..3).map(move |z| (y, z)));
            draws
                .map(|(y, z)| {
                    let c = coefficients(&scoped(&[s2[y], s2[z]], scope, 2, &[1, 0]), 1.0);
                    policy[y] * policy[z] * ((1.0 - c[0]) * slope(y) + (1.0 - c[1]) * slope(z))
                })
                .sum()
        };
        assert!(added(VarianceScope::Prompt).abs() < 1e-12);
        assert!(added(VarianceScope::Sample).abs() > 0.05);
    }

    #[test]
    fn an_ensemble_of_copies_is_refused() {
        let (mu, s2) = moments(&[vec![1.0, 2.0], vec![1.0, 2.0]]);
        assert!(check_disagreement(&mu, &s2).is_err());
    }

    #[test]
    fn the_pessimistic_score_is_the_lowest_member() {
        let scores = [vec![1.0, -1.0], vec![0.5, 3.0]];
        assert_eq!(baseline_scores(Objective::Pessimistic, &scores, 0.0, 1.0), [0.5, -1.0]);
        assert_eq!(baseline_scores(Objective::Standard, &scores, 0.0, 1.0), [1.0, -1.0]);
    }

    #[test]
    fn uncertainty_weighted_scores_take_the_variance_off() {
        let scores = [vec![1.0, -1.0], vec![0.0, 3.0]];
        assert_eq!(baseline_scores(Objective::Uwo, &scores, 0.5, 1.0), [0.5 - 0.5 * 0.25, 1.0 - 0.5 * 4.0]);
    }

    #[test]
    fn the_controller_raises_lambda_above_its_target_and_lowers_it_below_by_a_bounded_factor() {
        assert!((controlled_lambda(0.1, 6.0, 5.0, 0.5) - 0.11).abs() < 1e-12);
        assert!((controlled_lambda(0.1, 500.0, 5.0, 0.5) - 0.11).abs() < 1e-12);
        assert!((controlled_lambda(0.1, 0.0, 5.0, 0.5) - 0.09).abs() < 1e-12);
        assert_eq!(controlled_lambda(0.1, 5.0, 5.0, 0.5), 0.1);
    }

    #[test]
    fn a_matched_arm_weighs_c_by_the_kl_it_multiplied() {
        // Two responses: c = 0.1 and 0.3 with KL = 1 and 3.
        let lambda = matched_lambda((0.1 + 0.9) / 2.0, 2.0, 0.2);
        assert!((lambda - 0.25 / 0.8).abs() < 1e-12);
        assert!((matched_lambda(0.0, 0.0, 0.2) - 0.25).abs() < 1e-12);
    }
}
