//! Advantages and returns over response tokens.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::stats::{mean, std};

/// Generalised advantage estimation (Schulman et al. 2016) over one response. V after the last token is 0.
///
/// `rewards`, `values`: `[response_tokens]`. Returns (advantages, returns) of the same length.
pub fn advantages(rewards: &[f64], values: &[f64], gamma: f64, lambda: f64) -> (Vec<f64>, Vec<f64>) {
    let mut advantages = vec![0.0; rewards.len()];
    let (mut running, mut next_value) = (0.0, 0.0);
    for t in (0..rewards.len()).rev() {
        let delta = rewards[t] + gamma * next_value - values[t];
        running = delta + gamma * lambda * running;
        advantages[t] = running;
        next_value = values[t];
    }
    let returns = advantages.iter().zip(values).map(|(a, v)| a + v).collect();
    (advantages, returns)
}

/// The statistics that advantages are normalised with.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Normalisation {
    /// Mean and standard deviation of the phase's batch.
    #[default]
    Batch,
    /// Mean and standard deviation of each minibatch.
    Minibatch,
    /// Mean of the phase's batch, standard deviation of the first phase's.
    FirstBatchStd,
    /// Neither.
    None,
}

/// (A - mean) / max(`std`, 1e-3 * `first_std`).
pub fn normalise(advantages: &[f64], mean: f64, std: f64, first_std: f64) -> Vec<f64> {
    let scale = std.max(1e-3 * first_std).max(f64::MIN_POSITIVE);
    advantages.iter().map(|a| (a - mean) / scale).collect()
}

/// A phase's advantages for the update; `Minibatch` leaves them raw, and the update normalises them.
pub fn normalised(advantages: &[f64], how: Normalisation, first_std: f64) -> Vec<f64> {
    match how {
        Normalisation::Batch => normalise(advantages, mean(advantages), std(advantages), first_std),
        Normalisation::FirstBatchStd => normalise(advantages, mean(advantages), first_std, first_std),
        Normalisation::Minibatch | Normalisation::None => advantages.to_vec(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn at_lambda_one_the_return_is_the_discounted_sum(
            rewards in proptest::collection::vec(-2.0..2.0_f64, 1..12), value in -1.0..1.0_f64, gamma in 0.5..1.0_f64,
        ) {
            let values = vec![value; rewards.len()];
            let (_, returns) = advantages(&rewards, &values, gamma, 1.0);
            for t in 0..rewards.len() {
                let sum: f64 = rewards[t..].iter().enumerate().map(|(k, r)| gamma.powi(k as i32) * r).sum();
                prop_assert!((returns[t] - sum).abs() < 1e-9);
            }
        }

        #[test]
        fn at_lambda_zero_the_advantage_is_the_td_error(
            rewards in proptest::collection::vec(-2.0..2.0_f64, 2..12),
        ) {
            let values: Vec<f64> = rewards.iter().map(|r| r * 0.5 - 0.1).collect();
            let (found, _) = advantages(&rewards, &values, 1.0, 0.0);
            for t in 0..rewards.len() {
                let next = values.get(t + 1).copied().unwrap_or(0.0);
                prop_assert!((found[t] - (rewards[t] + next - values[t])).abs() < 1e-12);
            }
        }

        #[test]
        fn batch_normalised_advantages_have_mean_zero_and_deviation_one(a in proptest::collection::vec(-5.0..5.0_f64, 3..40)) {
            prop_assume!(std(&a) > 1e-3);
            let n = normalised(&a, Normalisation::Batch, 1.0);
            prop_assert!(mean(&n).abs() < 1e-9 && (std(&n) - 1.0).abs() < 1e-9);
        }
    }

    #[test]
    fn advantages_without_spread_stay_finite() {
        assert!(normalised(&[1.0, 1.0], Normalisation::Batch, 0.0).iter().all(|a| a.is_finite()));
    }

    #[test]
    fn e_a_constant_on_all_scores_moves_no_normalised_advantage_unless_c_depends_on_the_response() {
        use crate::rl::objective::{VarianceScope, adaptive_weights, coefficients, scoped, token_rewards};
        use crate::stats::moments;
        let scores = [vec![0.3, -0.4, 1.0, 0.1], vec![0.9, -0.1, 0.2, 0.4]];
        let run = |shift: f64, scope: VarianceScope, one_prompt: bool| -> Vec<f64> {
            let shifted: Vec<Vec<f64>> = scores.iter().map(|m| m.iter().map(|s| s + shift).collect()).collect();
            let (mu, mut s2) = moments(&shifted);
            if one_prompt {
                s2 = vec![s2[0]; 4];
            }
            let c = coefficients(&scoped(&s2, scope, 2, &[]), 2.0);
            let raw: Vec<f64> = adaptive_weights(&mu, &c)
                .iter()
                .flat_map(|w| {
                    let rewards = token_rewards(*w, &[0.1, -0.2, 0.05]);
                    advantages(&rewards, &[0.0; 3], 1.0, 1.0).0
                })
                .collect();
            normalised(&raw, Normalisation::Batch, 1.0)
        };
        let moved = |scope, one_prompt| {
            let (a, b) = (run(0.0, scope, one_prompt), run(5.0, scope, one_prompt));
            a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max)
        };
        assert!(moved(VarianceScope::Batch, false) < 1e-5);
        assert!(moved(VarianceScope::Prompt, true) < 1e-5);
        assert!(moved(VarianceScope::Sample, false) > 1e-3);
    }
}
