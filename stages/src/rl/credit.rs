//! Turns a phase's rewards into token advantages, for PPO, RLOO and GRPO.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::gae::Normalisation;
use super::loss::Value;
use crate::stats::mean;

/// Where GRPO puts the KL to the reference policy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum KlTerm {
    /// In the reward, as in PPO and RLOO.
    #[default]
    Reward,
    /// In the loss, as the k3 estimate of each token (Shao et al. 2024, Eq. 4).
    Loss,
}

/// How a phase's rewards are turned into token advantages.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Credit {
    /// PPO: generalised advantage estimation over token rewards, with a value head (Schulman et al. 2016).
    Gae { gamma: f64, lambda: f64, advantages: Normalisation, value: Value },
    /// RLOO: the response's reward minus the mean reward of the other responses to its prompt (Ahmadian et al. 2024). The loss is PPO's
    /// clipped one by token; at ratio 1 its gradient is that of the response's log-probability.
    LeaveOneOut { advantages: Normalisation },
    /// GRPO: the response's reward minus its group's mean, divided by the group's standard deviation if `scale` (Shao
    /// et al. 2024).
    Group { scale: bool, kl_term: KlTerm },
}

impl Credit {
    pub fn value(&self) -> Option<&Value> {
        match self {
            Self::Gae { value, .. } => Some(value),
            Self::LeaveOneOut { .. } | Self::Group { .. } => None,
        }
    }

    pub fn normalisation(&self) -> Normalisation {
        match *self {
            Self::Gae { advantages, .. } | Self::LeaveOneOut { advantages } => advantages,
            Self::Group { .. } => Normalisation::None,
        }
    }
}

/// RLOO's advantage of each response: its reward minus the mean reward of the other responses to the same prompt.
/// `responses` = K; the responses to one prompt are adjacent.
pub fn leave_one_out(rewards: &[f64], responses: usize) -> Vec<f64> {
    let group = |group: &[f64]| {
        let sum: f64 = group.iter().sum();
        let others = group.len() as f64 - 1.0;
        group.iter().map(|own| own - (sum - own) / others).collect::<Vec<_>>()
    };
    rewards.chunks(responses).flat_map(group).collect()
}

/// Added to a group's standard deviation, as in TRL, so that equal rewards give advantages of 0.
const SCALE_FLOOR: f64 = 1e-4;

/// GRPO's advantage of each response: its reward minus its group's mean, divided by the group's sample standard
/// deviation if `scale`.
pub fn group_relative(rewards: &[f64], responses: usize, scale: bool) -> Vec<f64> {
    let group = |group: &[f64]| {
        let centre = mean(group);
        let squares: f64 = group.iter().map(|r| (r - centre).powi(2)).sum();
        let deviation = (squares / (group.len() as f64 - 1.0)).sqrt();
        let over = if scale { deviation + SCALE_FLOOR } else { 1.0 };
        group.iter().map(|r| (r - centre) / over).collect::<Vec<_>>()
    };
    rewards.chunks(responses).flat_map(group).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_constant_on_all_rewards_of_a_prompt_moves_no_advantage(
            rewards in proptest::collection::vec(-2.0..2.0_f64, 12), shift in -5.0..5.0_f64,
        ) {
            let moved: Vec<f64> = rewards.iter().enumerate().map(|(i, r)| r + if i < 4 { shift } else { 0.0 }).collect();
            for of in [
                |r: &[f64]| leave_one_out(r, 4),
                |r: &[f64]| group_relative(r, 4, true),
                |r: &[f64]| group_relative(r, 4, false),
            ] {
                for (a, b) in of(&rewards).iter().zip(of(&moved)) {
                    prop_assert!((a - b).abs() < 1e-9);
                }
            }
        }

        #[test]
        fn leave_one_out_is_the_centred_reward_times_k_over_k_minus_one(
            rewards in proptest::collection::vec(-2.0..2.0_f64, 12),
        ) {
            for (a, b) in leave_one_out(&rewards, 3).iter().zip(group_relative(&rewards, 3, false)) {
                prop_assert!((a - b * 1.5).abs() < 1e-12);
            }
        }
    }

    #[test]
    fn equal_rewards_have_no_advantage() {
        assert_eq!(group_relative(&[1.0; 4], 4, true), [0.0; 4]);
        assert_eq!(leave_one_out(&[1.0, 1.0, 3.0, 1.0], 2), [0.0, 0.0, 2.0, -2.0]);
    }
}
