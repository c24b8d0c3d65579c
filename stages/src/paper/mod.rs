//! The paper's settings, to report where a pipeline deviates from them.

mod notes;

pub use notes::{StageInstance, notes};
use serde_json::{Value, json};

/// A parameter that differs from the paper.
#[derive(Clone, Debug, PartialEq)]
pub struct Deviation {
    /// JSON pointer into the stage's parameters, without the first slash.
    pub parameter: &'static str,
    pub paper: String,
    pub here: String,
}

/// (kind, JSON pointer, value that agrees with the paper, the paper's wording if it is not that value). DIGEST of
/// section 4 and appendix A of the paper.
fn fixed() -> Vec<(&'static str, &'static str, Value, Option<&'static str>)> {
    let is = |kind, pointer, value| (kind, pointer, value, None);
    let says = |kind, pointer, value, words| (kind, pointer, value, Some(words));
    vec![
        is("dataset.filter", "/summary_tokens", json!([20, 48])),
        is("dataset.filter", "/validation", json!(2000)),
        says("dataset.filter", "/subreddits", json!("general"), "those that people in general understand"),
        says("dataset.filter", "/overlap", json!("paper"), "RL prompts come from the preference data"),
        says("dataset.filter", "/near_duplicates", Value::Null, "none stated"),
        says("dataset.filter", "/calibration", json!(0), "none held out"),
        says("dataset.filter", "/rl", json!(100_000), "those of the preference data, 100000"),
        is("sft", "/epochs", json!(1.0)),
        is("sft", "/batch", json!(128)),
        is("sft", "/lr", json!(7e-5)),
        says("sft", "/precision", json!("bf16"), "mixed precision"),
        is("sft", "/warmup", json!(50)),
        is("sft", "/weight_decay", json!(0.0)),
        says("sft", "/clip", Value::Null, "no gradient clipping stated"),
        is("sft", "/lora/r", json!(8)),
        is("sft", "/lora/alpha", json!(32.0)),
        is("sft", "/lora/dropout", json!(0.1)),
        is("generate.pairs", "/pairs", json!(100_000)),
        says("generate.pairs", "/same_model", json!(false), "two models drawn at random"),
        is("generate.pairs", "/temperature", json!(1.0)),
        is("generate.pairs", "/top_p", json!(1.0)),
        is("generate.pairs", "/min_new_tokens", json!(5)),
        is("generate.pairs", "/max_new_tokens", json!(48)),
        is("annotate.claude", "/documents_per_request", json!(2)),
        says("annotate.gold", "/labels", json!("hard"), "the gold model's choice"),
        says("annotate.gold", "/label_noise", json!(0.0), "none"),
        is("reward.train", "/lr", json!(3e-5)),
        says("reward.train", "/precision", json!("f32"), "none stated"),
        is("reward.train", "/batch", json!(64)),
        is("reward.train", "/epochs", json!(1.0)),
        is("reward.train", "/warmup", json!(20)),
        is("reward.train", "/weight_decay", json!(0.0)),
        says("reward.train", "/clip", Value::Null, "no gradient clipping stated"),
        says("reward.train", "/pairs", Value::Null, "all of 100000"),
        says("reward.train", "/held_out", json!(0.0), "none stated"),
        says("reward.train", "/order", json!("shuffled"), "none stated"),
        says("reward.train", "/diversity", json!("all"), "all that the member's seed draws"),
        is("reward.train", "/pool", json!("last")),
        is("reward.train", "/centring", json!("none")),
        is("reward.train", "/lora/r", json!(8)),
        is("reward.train", "/lora/alpha", json!(32.0)),
        is("reward.train", "/lora/dropout", json!(0.1)),
        is("rl.ppo", "/rollouts", json!(512)),
        is("rl.ppo", "/epochs", json!(4)),
        is("rl.ppo", "/minibatch", json!(6)),
        is("rl.ppo", "/lr", json!(5e-6)),
        says("rl.ppo", "/precision", json!("f32"), "none stated"),
        is("rl.ppo", "/weight_decay", json!(0.1)),
        says("rl.ppo", "/warmup", json!(0), "none stated"),
        says("rl.ppo", "/max_gradient_norm", Value::Null, "no gradient clipping stated"),
        says("rl.ppo", "/responses", json!(1), "one response to a prompt"),
        says("rl.ppo", "/variance_scope", json!("sample"), "each pair's own (Algorithm 1)"),
        is("rl.ppo", "/clip", json!(0.2)),
        says("rl.ppo", "/lambda", json!(0.005), "0.005, 0.01 or 0.05"),
        is("rl.ppo", "/steps/n", json!(50_000)),
        says("rl.ppo", "/steps/unit", json!("optimiser"), "optimiser, as we read it"),
        is("rl.ppo", "/max_new_tokens", json!(48)),
        is("rl.ppo", "/min_new_tokens", json!(5)),
        is("rl.ppo", "/eval_every", json!(400)),
        says("rl.ppo", "/eval_prompts", Value::Null, "all 2000 held-out posts"),
        is("rl.ppo", "/lora/r", json!(8)),
        is("rl.ppo", "/lora/alpha", json!(32.0)),
    ]
}

/// Whether a value agrees with the paper. The paper tried three KL coefficients.
fn agrees(pointer: &str, here: &Value, paper: &Value) -> bool {
    same(here, paper) || (pointer == "/lambda" && [0.01, 0.05].iter().any(|tried| same(here, &json!(tried))))
}

/// Our readings of the paper that apply to every run with the given kind, whatever its settings.
pub const READINGS: &[(&str, &str)] = &[
    (
        "rl.ppo",
        "No dropout in RL: the adapter's dropout is used in SFT and reward training only, so that the ratio of the first minibatch is 1.",
    ),
    (
        "rl.ppo",
        "The paper's \"50,000 steps\" are read as optimiser steps: one step of 512 rollouts each would be 25.6 million rollouts, which its stated cost excludes.",
    ),
    (
        "evaluate",
        "Gold is told in standard deviations of the SFT model's samples above SFT and as win rate: Bradley-Terry scores have no zero, so the paper's percentages are not repeated.",
    ),
    (
        "rl.ppo",
        "Weight decay is decoupled, applies in RL only, and to the adapter's matrices only, that is towards the reference policy.",
    ),
];

/// The parameters of a stage that differ from the paper's.
pub fn deviations(kind: &str, params: &Value) -> Vec<Deviation> {
    let is_rl = kind.starts_with("rl.");
    let other = (is_rl && kind != "rl.ppo").then(|| Deviation {
        parameter: "uses",
        paper: "rl.ppo".to_owned(),
        here: kind.to_owned(),
    });
    // The kinds of RL share these parameters.
    let shared = |of: &str, pointer: &str| is_rl && of == "rl.ppo" && params.pointer(pointer).is_some();
    let rows = fixed().into_iter().filter(|(of, pointer, ..)| *of == kind || shared(of, pointer)).filter_map(
        |(_, pointer, paper, words)| {
            let here = if pointer == "/epochs" { passes(params) } else { params.pointer(pointer).cloned() };
            let here = here.unwrap_or(Value::Null);
            (!agrees(pointer, &here, &paper)).then(|| Deviation {
                parameter: &pointer[1..],
                paper: words.map_or_else(|| tell(&paper), str::to_owned),
                here: tell(&here),
            })
        },
    );
    other.into_iter().chain(rows).collect()
}

/// The length of training: passes (1 by default) or a number of steps.
fn passes(params: &Value) -> Option<Value> {
    let given = |field: &str| params.get(field).filter(|value| !value.is_null());
    match (given("epochs"), given("steps")) {
        (Some(epochs), _) => Some(epochs.clone()),
        (None, Some(steps)) if steps.is_number() => Some(json!(format!("{steps} steps"))),
        _ => Some(json!(1)),
    }
}

fn tell(value: &Value) -> String {
    match value {
        Value::Null => "none".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Formats a count with commas between thousands.
fn grouped(n: f64) -> String {
    let digits = format!("{n:.0}");
    let mut out = String::new();
    for (i, digit) in digits.chars().enumerate() {
        if i > 0 && (digits.len() - i).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Equality that treats 1 and 1.0 as equal.
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

    #[test]
    fn what_the_paper_does_not_state_is_told_as_such() {
        let params = json!({ "order": "contrast_first", "held_out": 0.05, "clip": 1.0, "steps": null });
        let told = deviations("reward.train", &params);
        let of = |parameter: &str| {
            told.iter().find(|d| d.parameter == parameter).map(|d| (d.paper.as_str(), d.here.as_str()))
        };
        assert_eq!(of("order"), Some(("none stated", "contrast_first")));
        assert_eq!(of("held_out"), Some(("none stated", "0.05")));
        assert_eq!(of("clip"), Some(("no gradient clipping stated", "1.0")));
        // A stage makes one pass by default.
        assert_eq!((of("epochs"), of("pairs")), (None, None));
        let steps = deviations("sft", &json!({ "epochs": null, "steps": 120 }));
        assert!(steps.iter().any(|d| d.parameter == "epochs" && d.here == "120 steps"));
    }

    #[test]
    fn every_coefficient_that_the_paper_tried_is_its_own() {
        let told = |lambda: f64| {
            deviations("rl.ppo", &json!({ "lambda": lambda })).into_iter().any(|d| d.parameter == "lambda")
        };
        assert_eq!([0.005, 0.01, 0.05, 0.02].map(told), [false, false, false, true]);
    }

    #[test]
    fn mixed_precision_is_the_papers_in_fine_tuning_and_stated_nowhere_else() {
        let told = |kind: &str, precision: &str| {
            let found = deviations(kind, &json!({ "precision": precision }));
            found.into_iter().find(|d| d.parameter == "precision").map(|d| (d.paper, d.here))
        };
        let says = |paper: &str, here: &str| Some((paper.to_owned(), here.to_owned()));
        assert_eq!([told("sft", "f32"), told("sft", "bf16")], [says("mixed precision", "f32"), None]);
        for kind in ["reward.train", "rl.ppo"] {
            assert_eq!([told(kind, "f32"), told(kind, "bf16")], [None, says("none stated", "bf16")]);
        }
    }

    #[test]
    fn thousands_are_set_apart() {
        assert_eq!([7.0, 700.0, 8000.0, 129_722.0].map(grouped), ["7", "700", "8,000", "129,722"]);
    }
}
