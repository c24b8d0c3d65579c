//! Reward models: storage, loading and scoring.

pub mod calibration;
pub mod loss;
pub mod measure;
pub mod pairs;
pub mod params;
#[cfg(test)]
pub(crate) mod parity;
pub mod store;

pub use store::{LoadedReward, load_ensemble, load_reward_model, load_tokenizer};

use engine::error::Result;
use lm::{Batch, RewardModel, Sequence};

use crate::error::IntoStageResult;
use crate::train::by_length;

/// Centred and scaled scores of `rows`, in their order. Rows are scored in batches of at most `batch` rows of similar
/// length, so the same rows always give the same bits.
///
/// # Errors
/// If a sequence is longer than the model's window or has ids beyond its vocabulary.
pub fn score(reward: &LoadedReward, rows: &[&Sequence], batch: usize) -> Result<Vec<f32>> {
    let raw = raw_scores(&reward.model, rows, batch)?;
    Ok(raw.into_iter().map(|s| ((f64::from(s) - reward.centre) / reward.scale) as f32).collect())
}

/// Like [`score`], without centring and scaling.
pub fn raw_scores(model: &RewardModel, rows: &[&Sequence], batch: usize) -> Result<Vec<f32>> {
    let lengths: Vec<usize> = rows.iter().map(|row| row.prompt.len() + row.response.len()).collect();
    let mut scores = vec![0.0; rows.len()];
    for numbers in by_length(&lengths, batch) {
        let members: Vec<&Sequence> = numbers.iter().map(|&i| rows[i]).collect();
        let batch = Batch::new(&members).into_stage_result()?;
        let values = model.scores(&batch, None).into_stage_result()?.to_vec1::<f32>().into_stage_result()?;
        for (number, value) in numbers.into_iter().zip(values) {
            scores[number] = value;
        }
    }
    Ok(scores)
}
