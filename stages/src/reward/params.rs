//! The parameters of `reward.train`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::train::{Adapter, Precision, learning};
use crate::types::Pooling;

/// What the member's seed draws.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Diversity {
    /// The head, the adapter's first weights, dropout and the order of batches: all that "set random seed to m" (Algorithm 1) draws.
    #[default]
    All,
    /// The head and the order of batches only.
    Head,
}

/// In which order pairs are learned.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Any pair at any time.
    #[default]
    Shuffled,
    /// Pairs that differ in swapped facts first, then the mixture: a small model learns to read the post only so.
    ContrastFirst,
}

/// Where the zero of the scores lies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Centring {
    /// At the mean score of one fixed set of samples on calibration prompts.
    #[default]
    Calibration,
    /// Where training left it.
    None,
}

/// What scores are divided by.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Normalise {
    /// 1, as in the paper.
    #[default]
    None,
    /// The standard deviation of the scores of the calibration samples: a KL coefficient then means the same for every model.
    Calibration,
}

/// The defaults are the paper's where it says.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Weight of the squared sum of a pair's scores in Eq. 1.
    pub eta: f64,
    /// Where the scalar is read off.
    pub pool: Pooling,
    /// Standard deviation of the head's first weights; absent: 1/sqrt(d + 1).
    pub head_init_std: Option<f64>,
    /// `{r, alpha, dropout}`; null or `none`: train every weight.
    pub lora: Adapter,
    /// What the seed draws: `all`, or `head` and batch order only.
    pub diversity: Diversity,
    /// `shuffled`, or `contrast_first`.
    pub order: Order,
    /// Share of the swapped-fact pairs that come before the mixture, for `contrast_first`.
    pub contrast_lead: f64,
    /// Passes over the pairs; excludes `steps`. One if neither is given.
    pub epochs: Option<f64>,
    /// Optimiser steps; excludes `epochs`.
    pub steps: Option<u64>,
    /// Pairs of a step.
    pub batch: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Steps of linear warm-up; a cosine to 0 follows.
    pub warmup: u64,
    pub beta1: f64,
    pub beta2: f64,
    /// Decoupled, on matrices only.
    pub weight_decay: f64,
    /// The largest norm of a gradient; null or `none`: no limit.
    #[serde(deserialize_with = "crate::train::params::or_none")]
    #[schemars(schema_with = "crate::train::params::or_none_schema::<f64>")]
    pub clip: Option<f64>,
    /// `true`: leave out pairs of which a summary or the title is too long for the window, counted as `dropped_long`, and
    /// calibration posts likewise. Absent or `false`: such a row is an error.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub drop_long: bool,
    /// The most pairs to learn from, taken in the order of the tables; absent: all.
    pub pairs: Option<usize>,
    /// Draw as many pairs with replacement, by the seed: a bagged member.
    pub bootstrap: bool,
    /// Share of the posts, by hash of their id, whose pairs are kept for the accuracy.
    pub held_out: f64,
    /// Where the scores' zero lies: `calibration` (needs port `posts`) or `none`.
    pub centring: Centring,
    /// What scores are divided by after centring: `none`, or `calibration` (needs port `posts`).
    pub normalise: Normalise,
    /// Draws the calibration samples, the same for every member and for the gold model.
    pub calibration_seed: u64,
    /// Posts of split `calibration` that are used.
    pub calibration_posts: usize,
    /// Length of the calibration samples.
    pub min_new_tokens: usize,
    pub max_new_tokens: usize,
    /// What products with weights are computed in: `f32`, or `bf16` (operands rounded, sums in f32). Weights, norms, attention
    /// scores, losses and the optimiser stay f32.
    pub precision: Precision,
    /// Tokens, with padding, of one forward and backward pass; a batch beyond it is taken in parts. Bounds memory.
    pub tokens_at_once: usize,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            eta: 0.01,
            pool: Pooling::Last,
            head_init_std: None,
            lora: Adapter::default(),
            diversity: Diversity::All,
            order: Order::Shuffled,
            contrast_lead: 0.85,
            epochs: None,
            steps: None,
            batch: 64,
            lr: 3e-5,
            warmup: 20,
            beta1: 0.9,
            beta2: 0.999,
            weight_decay: 0.0,
            clip: Some(1.0),
            drop_long: false,
            pairs: None,
            bootstrap: false,
            held_out: 0.05,
            centring: Centring::Calibration,
            normalise: Normalise::None,
            calibration_seed: 0,
            calibration_posts: 256,
            min_new_tokens: 5,
            max_new_tokens: 48,
            precision: Precision::F32,
            tokens_at_once: 8192,
        }
    }
}

impl Params {
    /// What types cannot say, as (field, message).
    pub fn faults(&self) -> Vec<(String, String)> {
        let p = self;
        let mut faults = learning!(p).faults();
        faults.0.extend(p.lora.faults());
        faults.must(p.eta >= 0.0 && p.eta.is_finite(), "eta", "must not be negative");
        faults.must(p.head_init_std.is_none_or(|s| s >= 0.0 && s.is_finite()), "head_init_std", "must not be negative");
        faults.must((0.0..=1.0).contains(&p.contrast_lead), "contrast_lead", "must be in [0, 1]");
        faults.must(p.pairs.is_none_or(|n| n > 0), "pairs", "must be at least 1");
        faults.share(p.held_out, "held_out");
        faults.must(p.tokens_at_once > 0, "tokens_at_once", "must be at least 1");
        faults.must(p.calibration_posts > 1, "calibration_posts", "must be at least 2");
        faults.must(
            p.max_new_tokens > 0 && p.min_new_tokens <= p.max_new_tokens,
            "max_new_tokens",
            "must be at least `min_new_tokens`, and 1",
        );
        faults.0
    }
}
