//! What the paper fixes, to tell where a pipeline departs from it. Knows no pipeline.

use serde_json::{Value, json};

/// A parameter that is not as in the paper.
#[derive(Clone, Debug, PartialEq)]
pub struct Deviation {
    /// JSON pointer into the stage's parameters, without the first slash.
    pub parameter: &'static str,
    pub paper: String,
    pub here: String,
}

/// (kind, JSON pointer, the paper's value). DIGEST of section 4 and appendix A of the paper.
fn fixed() -> Vec<(&'static str, &'static str, Value)> {
    vec![
        ("dataset.filter", "/summary_tokens", json!([20, 48])),
        ("dataset.filter", "/validation", json!(2000)),
        ("sft", "/epochs", json!(1.0)),
        ("sft", "/batch", json!(128)),
        ("sft", "/lr", json!(7e-5)),
        ("sft", "/warmup", json!(50)),
        ("sft", "/lora/r", json!(8)),
        ("sft", "/lora/alpha", json!(32.0)),
        ("sft", "/lora/dropout", json!(0.1)),
        ("generate.pairs", "/pairs", json!(100_000)),
        ("generate.pairs", "/temperature", json!(1.0)),
        ("generate.pairs", "/top_p", json!(1.0)),
        ("generate.pairs", "/min_new_tokens", json!(5)),
        ("generate.pairs", "/max_new_tokens", json!(48)),
        ("reward.train", "/lr", json!(3e-5)),
        ("reward.train", "/batch", json!(64)),
        ("reward.train", "/epochs", json!(1.0)),
        ("reward.train", "/warmup", json!(20)),
        ("reward.train", "/pool", json!("last")),
        ("reward.train", "/centring", json!("none")),
        ("reward.train", "/lora/r", json!(8)),
        ("reward.train", "/lora/alpha", json!(32.0)),
        ("reward.train", "/lora/dropout", json!(0.1)),
        ("rl.ppo", "/rollouts", json!(512)),
        ("rl.ppo", "/epochs", json!(4)),
        ("rl.ppo", "/minibatch", json!(6)),
        ("rl.ppo", "/lr", json!(5e-6)),
        ("rl.ppo", "/weight_decay", json!(0.1)),
        ("rl.ppo", "/clip", json!(0.2)),
        ("rl.ppo", "/lambda", json!(0.005)),
        ("rl.ppo", "/steps/n", json!(50_000)),
        ("rl.ppo", "/max_new_tokens", json!(48)),
        ("rl.ppo", "/min_new_tokens", json!(5)),
        ("rl.ppo", "/eval_every", json!(400)),
        ("rl.ppo", "/lora/r", json!(8)),
        ("rl.ppo", "/lora/alpha", json!(32.0)),
    ]
}

/// Readings of ours that hold whatever the settings.
pub const ALWAYS: &[&str] = &[
    "No dropout in RL: the adapter's dropout is used in SFT and reward training only, so that the ratio of the first minibatch is 1.",
    "The paper's \"50,000 steps\" are read as optimiser steps: one step of 512 rollouts each would be 25.6 million rollouts, which its stated cost excludes.",
    "Gold is told in standard deviations of the SFT model's samples above SFT and as win rate: Bradley-Terry scores have no zero, so the paper's percentages are not repeated.",
    "Two summaries of a pair come from two distinct models; the paper does not say.",
    "Weight decay is decoupled, applies in RL only, and to the adapter's matrices only, that is towards the reference policy.",
    "All arms score their held-out samples by every member of the ensemble; `standard` is trained on the first member alone.",
];

/// Where a stage's parameters differ from the paper's.
pub fn deviations(kind: &str, params: &Value) -> Vec<Deviation> {
    fixed()
        .into_iter()
        .filter(|(of, _, _)| *of == kind)
        .filter_map(|(_, pointer, paper)| {
            let here = params.pointer(pointer).unwrap_or(&Value::Null);
            (!same(here, &paper)).then(|| Deviation {
                parameter: &pointer[1..],
                paper: paper.to_string(),
                here: here.to_string(),
            })
        })
        .collect()
}

/// Equality in which 1 and 1.0 are the same.
fn same(a: &Value, b: &Value) -> bool {
    match (a.as_f64(), b.as_f64()) {
        (Some(a), Some(b)) => a == b,
        _ => match (a.as_array(), b.as_array()) {
            (Some(a), Some(b)) => a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b)),
            _ => a == b,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_differs_is_told() {
        let params = json!({ "rollouts": 64, "epochs": 4.0, "minibatch": 6, "lora": { "r": 8, "alpha": 32 } });
        let told: Vec<&str> = deviations("rl.ppo", &params).iter().map(|d| d.parameter).collect();
        assert!(told.contains(&"rollouts") && !told.contains(&"epochs") && !told.contains(&"lora/r"), "{told:?}");
        assert!(deviations("command", &params).is_empty());
    }
}
