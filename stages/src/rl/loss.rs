//! PPO's clipped losses over the response tokens of one minibatch, with explicit derivatives.
//!
//! Explicit derivatives are simple here and exact at ratio 1, where both branches of the clip meet. The update feeds
//! `d_logprob` and `d_value` back as the gradient of the model's outputs.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Placement and training of the value head.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Value {
    /// Whether the value loss also trains the policy's trunk.
    pub trunk: Trunk,
    /// Largest distance that a new value may move from the old one.
    pub clip: f64,
    /// Weight of the value loss relative to the policy loss.
    pub coefficient: f64,
}

impl Default for Value {
    fn default() -> Self {
        Self { trunk: Trunk::Shared, clip: 0.2, coefficient: 0.1 }
    }
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Trunk {
    #[default]
    Shared,
    Detached,
}

/// Quantities that a phase fixes for the tokens of one minibatch, each `[tokens]`.
#[derive(Clone, Copy, Debug)]
pub struct Targets<'a> {
    pub old_logprob: &'a [f64],
    pub old_value: &'a [f64],
    pub advantage: &'a [f64],
    pub returns: &'a [f64],
    /// Weight of each token in the minibatch; the weights sum to 1.
    pub weight: &'a [f64],
    /// Coefficient of each token's KL term in the loss, and log pi_ref; empty if the KL is in the reward.
    pub kl: &'a [f64],
    pub reference: &'a [f64],
}

/// The losses of one minibatch and their derivatives, weighted means over response tokens; ratios, clip fraction and
/// `kl_old_new` are plain means.
#[derive(Clone, Debug, Default)]
pub struct Losses {
    /// mean(max(-A rho, -A clip(rho))) (Schulman et al. 2017, Eq. 7, as a loss), plus the KL term if the KL is in the
    /// loss: coefficient * (r - 1 - log r) per token, with r = pi_ref / pi (Shao et al. 2024, Eq. 4).
    pub policy: f64,
    /// 0.5 mean(max((v - R)^2, (clip(v) - R)^2)).
    pub value: f64,
    /// d(policy + coefficient * value) / d log pi_t.
    pub d_logprob: Vec<f32>,
    /// d(policy + coefficient * value) / d v_t.
    pub d_value: Vec<f32>,
    pub mean_ratio: f64,
    pub max_ratio: f64,
    /// mean(rho - 1 - log rho): an estimate of KL(pi_old || pi) per token, never negative.
    pub kl_old_new: f64,
    /// Share of tokens whose gradient is cut by the clip.
    pub clip_fraction: f64,
}

/// `settings` are those of the value head; `value` is read only if they are given.
pub fn losses(logprob: &[f32], value: &[f32], targets: Targets<'_>, clip: f64, settings: Option<&Value>) -> Losses {
    let n = logprob.len() as f64;
    let mut out = Losses { d_logprob: Vec::with_capacity(logprob.len()), ..Losses::default() };
    for t in 0..logprob.len() {
        let weight = targets.weight[t];
        let log_ratio = f64::from(logprob[t]) - targets.old_logprob[t];
        let ratio = log_ratio.exp();
        let advantage = targets.advantage[t];
        let (plain, clipped) = (-advantage * ratio, -advantage * ratio.clamp(1.0 - clip, 1.0 + clip));
        let cut = clipped > plain;
        out.policy += weight * if cut { clipped } else { plain };
        // d ratio / d log pi = ratio; if the clipped branch is the larger one, it is constant.
        let mut slope = if cut { 0.0 } else { plain };
        if let Some(kl) = targets.kl.get(t) {
            let log_r = targets.reference[t] - f64::from(logprob[t]);
            out.policy += weight * kl * (log_r.exp() - 1.0 - log_r);
            slope += kl * (1.0 - log_r.exp());
        }
        out.d_logprob.push((weight * slope) as f32);
        out.clip_fraction += f64::from(u8::from(cut)) / n;
        out.mean_ratio += ratio / n;
        out.max_ratio = out.max_ratio.max(ratio);
        out.kl_old_new += (ratio - 1.0 - log_ratio) / n;

        let Some(settings) = settings else { continue };
        let v = f64::from(value[t]);
        let (old, target) = (targets.old_value[t], targets.returns[t]);
        let bounded = v.clamp(old - settings.clip, old + settings.clip);
        let (free_error, bounded_error) = ((v - target).powi(2), (bounded - target).powi(2));
        let held = bounded_error > free_error;
        out.value += weight * 0.5 * if held { bounded_error } else { free_error };
        out.d_value.push(if held { 0.0 } else { (weight * settings.coefficient * (v - target)) as f32 });
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn total(logprob: &[f32], value: &[f32], targets: Targets<'_>) -> f64 {
        let settings = Value::default();
        let l = losses(logprob, value, targets, 0.2, Some(&settings));
        l.policy + settings.coefficient * l.value
    }

    proptest! {
        #[test]
        fn the_written_derivatives_agree_with_finite_differences(
            rows in proptest::collection::vec((-2.0..0.0_f64, -0.5..0.5_f64, -2.0..2.0_f64, -1.0..1.0_f64, -1.0..1.0_f64), 1..8),
            kl_in_loss: bool,
        ) {
            let old: Vec<f64> = rows.iter().map(|r| r.0).collect();
            let logprob: Vec<f32> = rows.iter().map(|r| (r.0 + r.1) as f32).collect();
            let advantage: Vec<f64> = rows.iter().map(|r| r.2).collect();
            let old_value: Vec<f64> = rows.iter().map(|r| r.3).collect();
            let value: Vec<f32> = rows.iter().map(|r| (r.3 + 0.3 * r.4) as f32).collect();
            let returns: Vec<f64> = rows.iter().map(|r| r.4).collect();
            // Unequal token weights, and a KL term whose reference differs from the old policy.
            let sum: f64 = (1..=rows.len()).map(|t| t as f64).sum();
            let weight: Vec<f64> = (1..=rows.len()).map(|t| t as f64 / sum).collect();
            let reference: Vec<f64> = rows.iter().map(|r| r.0 + 0.4 * r.4).collect();
            let kl = if kl_in_loss { vec![0.3; rows.len()] } else { vec![] };
            let targets = Targets {
                old_logprob: &old,
                old_value: &old_value,
                advantage: &advantage,
                returns: &returns,
                weight: &weight,
                kl: &kl,
                reference: &reference,
            };
            let found = losses(&logprob, &value, targets, 0.2, Some(&Value::default()));
            let h = 1e-3_f32;
            for t in 0..rows.len() {
                let ratio = (f64::from(logprob[t]) - old[t]).exp();
                let near_kink = [0.8, 1.0, 1.2].iter().any(|k| (ratio - k).abs() < 5e-3);
                if !near_kink {
                    let (mut up, mut down) = (logprob.clone(), logprob.clone());
                    up[t] += h;
                    down[t] -= h;
                    let slope = (total(&up, &value, targets) - total(&down, &value, targets)) / f64::from(up[t] - down[t]);
                    prop_assert!((slope - f64::from(found.d_logprob[t])).abs() < 1e-3, "{slope} {}", found.d_logprob[t]);
                }
                let moved = f64::from(value[t]) - old_value[t];
                let crossing = (moved.abs() - 0.2).abs() < 5e-3;
                if !crossing {
                    let (mut up, mut down) = (value.clone(), value.clone());
                    up[t] += h;
                    down[t] -= h;
                    let slope = (total(&logprob, &up, targets) - total(&logprob, &down, targets)) / f64::from(up[t] - down[t]);
                    prop_assert!((slope - f64::from(found.d_value[t])).abs() < 1e-3, "{slope} {}", found.d_value[t]);
                }
            }
        }
    }

    #[test]
    fn at_ratio_one_the_gradient_is_minus_the_advantage() {
        let targets = Targets {
            old_logprob: &[-1.0, -2.0],
            old_value: &[0.0, 0.0],
            advantage: &[3.0, -1.0],
            returns: &[0.0, 0.0],
            weight: &[0.5, 0.5],
            kl: &[],
            reference: &[],
        };
        let l = losses(&[-1.0, -2.0], &[0.0, 0.0], targets, 0.2, Some(&Value::default()));
        assert_eq!(l.d_logprob, [-1.5, 0.5]);
        assert_eq!((l.clip_fraction, l.kl_old_new), (0.0, 0.0));
        assert_eq!(l.mean_ratio, 1.0);
        let without_head = losses(&[-1.0, -2.0], &[], targets, 0.2, None);
        assert_eq!((without_head.policy, without_head.d_value), (l.policy, vec![]));
    }
}
