//! The expected cost of a stage that sends paid requests, before it runs.

use serde::Serialize;

/// An expected range, from least to most.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct EstimateRange {
    pub low: f64,
    pub high: f64,
}

impl EstimateRange {
    pub fn new(low: f64, high: f64) -> Self {
        Self { low, high }
    }

    pub fn exactly(value: f64) -> Self {
        Self::new(value, value)
    }
}

impl std::ops::Mul<f64> for EstimateRange {
    type Output = Self;

    fn mul(self, factor: f64) -> Self {
        Self::new(self.low * factor, self.high * factor)
    }
}

impl std::ops::Add for EstimateRange {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self::new(self.low + other.low, self.high + other.high)
    }
}

/// Requests, tokens and cost of one stage.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Estimate {
    /// Requests that remain, without those that are paid for already.
    pub requests: u64,
    /// Tokens sent.
    pub input_tokens: EstimateRange,
    /// Tokens received.
    pub output_tokens: EstimateRange,
    /// Total cost; `None` without a price.
    pub dollars: Option<EstimateRange>,
    /// What the figures are based on and what they leave out, one sentence each.
    pub notes: Vec<String>,
}

/// What is known about a stage's cost.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ExpectedCost {
    Known(Estimate),
    /// Not known before something else is; the text says what.
    Unknown(String),
}
