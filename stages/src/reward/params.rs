//! The parameters of `reward.train`.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::train::{Adapter, Precision, learning};
use crate::types::Pooling;

/// The random choices that depend on the member's seed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Diversity {
    /// The head, the adapter's initial weights, dropout and the batch order: everything that "set random seed to m"
    /// (Algorithm 1) covers.
    #[default]
    All,
    /// Only the head and the batch order.
    Head,
}

/// The order in which pairs are trained on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Order {
    /// Any pair at any time.
    #[default]
    Shuffled,
    /// Pairs that differ in swapped facts first, then the mixture: a small model learns to read the post only in this
    /// order.
    ContrastFirst,
}

/// The zero point of the scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Centring {
    /// The mean score of one fixed set of samples on calibration prompts.
    #[default]
    Calibration,
    /// The zero point that training produced.
    None,
}

/// The divisor of the scores.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Normalise {
    /// 1, as in the paper.
    #[default]
    None,
    /// The standard deviation of the calibration samples' scores, so that a KL coefficient means the same for every
    /// model.
    Calibration,
}

/// The defaults are the paper's where it states them.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Weight of the squared sum of a pair's scores in Eq. 1.
    pub eta: f64,
    /// Where the score is read.
    pub pool: Pooling,
    /// Standard deviation of the head's initial weights; absent: 1/sqrt(d + 1).
    pub head_init_std: Option<f64>,
    /// `{r, alpha, dropout}`; null or `none`: train every weight.
    pub lora: Adapter,
    /// What the seed determines: `all`, or only `head` and batch order.
    pub diversity: Diversity,
    /// The order of the training pairs.
    pub order: Order,
    /// With `contrast_first`: share of the swapped-fact pairs that come before the mixture.
    pub contrast_lead: f64,
    /// Passes over the pairs; excludes `steps`. Defaults to 1 if neither is given.
    pub epochs: Option<f64>,
    /// Optimiser steps; excludes `epochs`.
    pub steps: Option<u64>,
    /// Pairs per step.
    pub batch: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Steps of linear warm-up, followed by cosine decay to 0.
    pub warmup: u64,
    pub beta1: f64,
    pub beta2: f64,
    /// Decoupled weight decay, on matrices only.
    pub weight_decay: f64,
    /// The largest gradient norm; null or `none`: no limit.
    #[serde(deserialize_with = "crate::train::params::or_none")]
    #[schemars(schema_with = "crate::train::params::or_none_schema::<f64>")]
    pub clip: Option<f64>,
    /// `true`: skip pairs with a summary or title that is too long for the window, counted as `dropped_long`, and such
    /// calibration posts. Absent or `false`: such a row is an error.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub drop_long: bool,
    /// `true`: the judge's `confidence`, a probability, weighs both orders of a pair in the loss; a row without one counts
    /// as sure. Absent or `false`: every label counts as sure.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub soft_labels: bool,
    /// Maximum number of training pairs, taken in table order; absent: all.
    pub pairs: Option<usize>,
    /// Draw the same number of pairs with replacement, by the seed: a bagged member.
    pub bootstrap: bool,
    /// Share of the posts, by hash of their id, whose pairs are held out to measure accuracy.
    pub held_out: f64,
    /// Zero point of the scores: `calibration` (needs port `posts`) or `none`.
    pub centring: Centring,
    /// Divisor of the centred scores: `none`, or `calibration` (needs port `posts`).
    pub normalise: Normalise,
    /// Seed of the calibration samples, the same for every member and for the gold model.
    pub calibration_seed: u64,
    /// Number of posts used from split `calibration`.
    pub calibration_posts: usize,
    /// Length of the calibration samples, in tokens.
    pub min_new_tokens: usize,
    pub max_new_tokens: usize,
    /// Number type for products with weights: `f32`, or `bf16` (operands rounded, sums in f32). Weights, norms,
    /// attention scores, losses and the optimiser stay f32.
    pub precision: Precision,
    /// Tokens per forward and backward pass, including padding; larger batches are split. Bounds memory.
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
            soft_labels: false,
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
    /// Checks that types cannot express, as (field, message).
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
