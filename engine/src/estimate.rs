//! What a stage that pays for requests is expected to cost before it runs. Plain values; knows no kind.

use serde::Serialize;

/// From the least to the most that something is expected to be.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Range {
    pub low: f64,
    pub high: f64,
}

impl Range {
    pub fn new(low: f64, high: f64) -> Self {
        Self { low, high }
    }

    pub fn exactly(value: f64) -> Self {
        Self::new(value, value)
    }
}

impl std::ops::Mul<f64> for Range {
    type Output = Self;

    fn mul(self, factor: f64) -> Self {
        Self::new(self.low * factor, self.high * factor)
    }
}

impl std::ops::Add for Range {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self::new(self.low + other.low, self.high + other.high)
    }
}

/// Requests, tokens and money of one stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// Requests that are left after what is paid for already.
    pub requests: u64,
    /// Tokens sent.
    pub input_tokens: Range,
    /// Tokens got.
    pub output_tokens: Range,
    /// In all; `None` without a price.
    pub dollars: Option<Range>,
    /// What the figures rest on and what they do not know, one sentence each.
    pub notes: Vec<String>,
}

/// What is known of a stage's cost.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Prospect {
    Known(Estimate),
    /// Not before something else is: what.
    Unknown(String),
}
