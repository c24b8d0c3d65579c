//! What a stage is expected to cost before it runs: how its time grows, and the price of its paid requests.

use serde::Serialize;
use serde_json::Value;

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

/// How the time of an attempt and the size of its artifact grow. Only ratios between two of one kind have a meaning.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Scaling {
    /// Amount of computation.
    pub work: f64,
    /// Size of the artifact.
    pub output: f64,
}

impl Scaling {
    pub fn new(work: f64, output: f64) -> Self {
        Self { work, output }
    }

    /// This divided by another; `None` if a ratio is not a positive number.
    pub fn relative_to(&self, other: &Self) -> Option<Self> {
        let ratio = Self { work: self.work / other.work, output: self.output / other.output };
        let positive = |x: f64| x.is_finite() && x > 0.0;
        (positive(ratio.work) && positive(ratio.output)).then_some(ratio)
    }
}

/// What a kind can tell of an attempt from its parameters, before its inputs exist.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Forecast {
    /// Peak memory in bytes, for data that fills what the parameters allow; `None`: unknown.
    pub memory: Option<f64>,
    /// What [`ArtifactType::outline`](crate::artifact::ArtifactType::outline) will give for the artifact.
    pub outline: Value,
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
