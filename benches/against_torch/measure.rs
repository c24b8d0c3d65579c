//! The result of a measurement.

use serde::Serialize;

#[derive(Clone, Copy, Debug, Serialize)]
pub struct Measurement {
    pub seconds: f64,
    /// Tokens of a training step, a prefill or a scoring pass, otherwise generated response tokens.
    pub tokens: u64,
    /// Operations according to `flops.rs`; for sampled lengths, those of the longest.
    pub flops: f64,
}

/// Takes one measurement of a prepared figure.
pub type MeasureFn = Box<dyn FnMut() -> Result<Measurement, String>>;
