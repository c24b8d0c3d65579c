//! Token sequences and right-padded batches of them.

use std::ops::Range;

use candle_core::Tensor;

use crate::tensor::device::device;
use crate::{Error, Result};

/// A prompt and its response, in ids. The response includes EOS if and only if it was sampled or the caller wants it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Sequence {
    pub prompt: Vec<u32>,
    pub response: Vec<u32>,
}

impl Sequence {
    pub fn new(prompt: impl Into<Vec<u32>>, response: impl Into<Vec<u32>>) -> Self {
        Self { prompt: prompt.into(), response: response.into() }
    }

    /// Tokens of prompt and response together.
    pub fn len(&self) -> usize {
        self.prompt.len() + self.response.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Sequences of several lengths, padded on the right. Causal attention never looks right, so padding needs no mask;
/// only positions of real tokens may be read.
#[derive(Debug, Clone)]
pub struct Batch {
    /// `[batch, time]`, padded with id 0.
    ids: Tensor,
    time: usize,
    prompt_lens: Vec<usize>,
    lens: Vec<usize>,
    /// For each row, the range of its tokens in flat `[response_tokens]` arrays.
    row_ranges: Vec<Range<usize>>,
    /// The response tokens, flat.
    targets: Vec<u32>,
    /// For each response token, the row of `[batch * time]` whose hidden state predicts it.
    predicting_rows: Vec<u32>,
    max_id: u32,
}

impl Batch {
    /// Errors: no rows; a row without prompt (nothing would predict its first token).
    pub fn new(rows: &[&Sequence]) -> Result<Self> {
        if rows.is_empty() {
            return Err(Error::input("a batch needs at least one sequence"));
        }
        let time = rows.iter().map(|r| r.len()).max().unwrap_or(0);
        let mut ids = vec![0u32; rows.len() * time];
        let mut row_ranges = Vec::with_capacity(rows.len());
        let (mut targets, mut predicting_rows) = (Vec::new(), Vec::new());
        for (i, row) in rows.iter().enumerate() {
            if row.prompt.is_empty() {
                return Err(Error::input(format!("sequence {i} of the batch has an empty prompt")));
            }
            let start = i * time;
            ids[start..start + row.prompt.len()].copy_from_slice(&row.prompt);
            ids[start + row.prompt.len()..start + row.len()].copy_from_slice(&row.response);
            let first = targets.len();
            targets.extend_from_slice(&row.response);
            row_ranges.push(first..targets.len());
            predicting_rows.extend((row.prompt.len() - 1..row.len() - 1).map(|t| (start + t) as u32));
        }
        let max_id = ids.iter().copied().max().unwrap_or(0);
        Ok(Self {
            ids: Tensor::from_vec(ids, (rows.len(), time), &device())?,
            time,
            prompt_lens: rows.iter().map(|r| r.prompt.len()).collect(),
            lens: rows.iter().map(|r| r.len()).collect(),
            row_ranges,
            targets,
            predicting_rows,
            max_id,
        })
    }

    /// Sequences in the batch.
    #[allow(clippy::len_without_is_empty)] // A batch is never empty.
    pub fn len(&self) -> usize {
        self.lens.len()
    }

    /// The padded length.
    pub fn time(&self) -> usize {
        self.time
    }

    /// Response tokens of all rows together.
    pub fn response_tokens(&self) -> usize {
        self.targets.len()
    }

    /// For each row, the range of its tokens in flat `[response_tokens]` arrays.
    pub fn row_ranges(&self) -> &[Range<usize>] {
        &self.row_ranges
    }

    /// `[batch, time]`, u32, padded with id 0.
    pub fn ids(&self) -> &Tensor {
        &self.ids
    }

    /// The response tokens, flat `[response_tokens]`.
    pub fn targets(&self) -> &[u32] {
        &self.targets
    }

    /// Real tokens of each row.
    pub fn lens(&self) -> &[usize] {
        &self.lens
    }

    /// Prompt tokens of each row.
    pub fn prompt_lens(&self) -> &[usize] {
        &self.prompt_lens
    }

    /// The largest id, for checking against a vocabulary.
    pub(crate) fn max_id(&self) -> u32 {
        self.max_id
    }

    /// Rows of `[batch * time, d]` that predict the response tokens.
    pub(crate) fn predicting_rows(&self) -> &[u32] {
        &self.predicting_rows
    }

    /// Rows of `[batch * time, d]` that predict the prompt's tokens from the second on, and those tokens.
    pub(crate) fn prompt_predictions(&self) -> Result<(Vec<u32>, Vec<u32>)> {
        let ids = self.ids.to_vec2::<u32>()?;
        let (mut rows, mut targets) = (Vec::new(), Vec::new());
        for (i, (&prompt, ids)) in self.prompt_lens.iter().zip(&ids).enumerate() {
            rows.extend((0..prompt - 1).map(|t| (i * self.time + t) as u32));
            targets.extend_from_slice(&ids[1..prompt]);
        }
        Ok((rows, targets))
    }

    /// Rows of `[batch * time, d]` at the last real token of each sequence.
    pub(crate) fn last_rows(&self) -> Vec<u32> {
        self.lens.iter().enumerate().map(|(i, len)| (i * self.time + len - 1) as u32).collect()
    }

    /// Rows of `[batch * time, d]` at the response tokens themselves, and the index of the sequence each belongs to.
    pub(crate) fn response_rows(&self) -> (Vec<u32>, Vec<u32>) {
        let rows = self.predicting_rows.iter().map(|t| t + 1).collect();
        let sequences =
            self.row_ranges.iter().enumerate().flat_map(|(i, r)| std::iter::repeat_n(i as u32, r.len())).collect();
        (rows, sequences)
    }
}
