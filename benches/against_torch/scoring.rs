//! Log-probabilities of given tokens without gradients, and their error with bf16 products.

use std::time::Instant;

use lm::{CausalLm, Precision, Sequence, StatOptions};
use serde::Serialize;
use stages::rl::rollout::score_tokens;

use crate::inputs::{self, to_message};
use crate::measure::{MeasureFn, Measurement};
use crate::shapes::Shape;

/// Batch size, as in `rl.ppo`.
const BATCH: usize = 64;

/// Scores the response tokens of as many sequences as a phase has rollouts.
pub fn scoring(s: Shape, precision: Precision) -> Result<MeasureFn, String> {
    let model = inputs::base(&s)?.with_precision(precision);
    let sequences = inputs::sequences(&s, s.rollouts)?;
    let tokens = sequences.iter().map(|s| s.len() as u64).sum();
    Ok(Box::new(move || {
        let clock = Instant::now();
        logprobs(&model, &sequences)?;
        let seconds = clock.elapsed().as_secs_f64();
        Ok(Measurement { seconds, tokens, flops: s.full_pass(s.rollouts, true).forward() })
    }))
}

/// Deviation of log-probabilities from those in f32, in nats.
#[derive(Debug, Serialize)]
pub struct LogprobError {
    rms: f64,
    largest: f64,
}

/// The error of [`scoring`] in bf16.
pub fn bf16_error(s: &Shape) -> Result<LogprobError, String> {
    let model = inputs::base(s)?;
    let sequences = inputs::sequences(s, s.rollouts)?;
    let exact = logprobs(&model, &sequences)?;
    let rounded = logprobs(&model.with_precision(Precision::Bf16), &sequences)?;
    let errors: Vec<f64> = exact.iter().zip(&rounded).map(|(e, r)| (r - e).abs()).collect();
    let rms = (errors.iter().map(|e| e * e).sum::<f64>() / errors.len() as f64).sqrt();
    Ok(LogprobError { rms, largest: errors.into_iter().fold(0.0, f64::max) })
}

/// Log-probabilities of all response tokens, concatenated over the sequences.
fn logprobs(model: &CausalLm, sequences: &[Sequence]) -> Result<Vec<f64>, String> {
    let options = StatOptions { min_new_tokens: 0, eos: 0.into(), entropy: false };
    Ok(score_tokens(model, None, model, sequences, &options, BATCH).map_err(to_message)?.logprob.concat())
}
