//! Trains a language model on sequences and measures its loss on held-out ones.

use engine::context::Context;
use engine::error::{Error, Result};
use lm::{Batch, CausalLm, Dropout, Sequence};

use super::batches::{BatchOrder, by_length, micro_batches};
use super::sequences::SequenceTable;
use super::step::{MicroBatchLoss, TrainPlan, Trainer};
use crate::error::{IntoStageResult, named};
use crate::types::LearningPoint;

/// A model with the data and settings to train it on.
pub struct LanguageTask<'a> {
    /// Its trainable variables change.
    pub model: &'a CausalLm,
    pub table: &'a SequenceTable,
    pub order: BatchOrder,
    /// Weight of a prompt token relative to a response token; 0 trains on the response alone.
    pub prompt_weight: f64,
    pub dropout: Option<Dropout>,
    /// Tokens per forward and backward pass, including padding.
    pub tokens_at_once: usize,
}

/// Summary of a finished training.
#[derive(Clone, Debug)]
pub struct Trained {
    pub final_loss: f64,
    pub steps: u64,
    /// Tokens seen, excluding padding.
    pub tokens: u64,
    pub curve: Vec<LearningPoint>,
}

/// Takes `plan.steps` steps, starting from the last checkpoint if there is one. Updates the model's variables in place.
///
/// # Errors
/// If there are no rows, or if the loss or a gradient is not finite: names the step, the posts and the tensor.
pub fn train(ctx: &mut Context, task: LanguageTask<'_>, plan: TrainPlan) -> Result<Trained> {
    let LanguageTask { model, table, mut order, prompt_weight, mut dropout, tokens_at_once } = task;
    if table.is_empty() {
        return Err(Error::user("no rows to train on"));
    }
    let mut trainer = Trainer::new(ctx, model.variables(), plan)?;
    trainer.resume(ctx, dropout.as_mut())?;
    let mut tokens = 0;
    let mut next_batch = || {
        let numbers = order.next_batch();
        tokens += numbers.iter().map(|&row| table.length(row) as u64).sum::<u64>();
        numbers
    };
    (0..trainer.done()).for_each(|_| drop(next_batch()));
    while !trainer.finished() {
        let numbers = next_batch();
        let rows = table.get_all(&numbers)?;
        let lengths: Vec<usize> = rows.iter().map(Sequence::len).collect();
        let weight = |rows: &[Sequence]| rows.iter().map(|row| targets(row, prompt_weight)).sum::<f64>();
        let whole = weight(&rows);
        let parts = micro_batches(&lengths, tokens_at_once);
        let parts = parts.into_iter().map(|part| {
            let rows = &rows[part];
            let batch = Batch::new(&rows.iter().collect::<Vec<_>>()).into_stage_result()?;
            let loss = model.lm_loss(&batch, prompt_weight, dropout.as_mut()).into_stage_result()?.loss;
            Ok(MicroBatchLoss { loss, share: if rows.len() == lengths.len() { 1.0 } else { weight(rows) / whole } })
        });
        let ids = || numbers.iter().map(|&row| table.id(row)).collect::<Result<Vec<_>>>();
        trainer.step(ctx, parts, || Ok(named("posts", ids()?)))?;
        trainer.checkpoint(ctx, dropout.as_ref())?;
    }
    Ok(Trained { final_loss: trainer.final_loss(), steps: trainer.done(), tokens, curve: trainer.curve() })
}

/// Weight of a row in the loss: its response tokens, plus `prompt_weight` times its prompt tokens from the second on.
fn targets(row: &Sequence, prompt_weight: f64) -> f64 {
    row.response.len() as f64 + prompt_weight * row.prompt.len().saturating_sub(1) as f64
}

/// Mean negative log-likelihood per response token, in nats; NaN without rows.
pub fn response_nll(model: &CausalLm, rows: &[Sequence], batch: usize) -> Result<f64> {
    let model = model.frozen();
    let lengths: Vec<usize> = rows.iter().map(Sequence::len).collect();
    let (mut sum, mut tokens) = (0.0, 0);
    for numbers in by_length(&lengths, batch) {
        let members: Vec<&Sequence> = numbers.iter().map(|&i| &rows[i]).collect();
        let batch = Batch::new(&members).into_stage_result()?;
        let nll = model
            .lm_loss(&batch, 0.0, None)
            .into_stage_result()?
            .response_nll
            .to_scalar::<f32>()
            .into_stage_result()?;
        sum += f64::from(nll) * batch.response_tokens() as f64;
        tokens += batch.response_tokens();
    }
    Ok(sum / tokens as f64)
}
