//! Log-probabilities, entropies and KL divergences of response tokens from hidden states and the output layer.

use candle_core::{DType, Tensor};

use crate::exec::train;
use crate::tensor::device::device;
use crate::tensor::threads::in_pool;
use crate::{Batch, Eos, Error, Result, TokenStats};

/// Settings for the next-token distribution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct StatOptions {
    /// The first `min_new_tokens` tokens of a response cannot be EOS: its probability is 0 there, the rest
    /// renormalised.
    pub min_new_tokens: usize,
    pub eos: Eos,
    /// Whether to compute the entropy too.
    pub entropy: bool,
}

/// `hidden` `[n, d]` predicts `targets`; if `forbidden.1[i]`, the tokens `forbidden.0` are impossible in row i.
pub(crate) fn token_stats(
    hidden: &Tensor,
    lm_head: &train::LmHead,
    targets: &[u32],
    forbidden: Option<(&Eos, &[bool])>,
    entropy: bool,
) -> Result<TokenStats> {
    if targets.is_empty() {
        let none = Tensor::zeros(0, DType::F32, &device())?;
        return Ok(TokenStats { entropy: entropy.then(|| none.clone()), logprob: none });
    }
    let rows = target_tokens(lm_head, targets, forbidden)?;
    Ok(in_pool(|| train::token_stats(hidden, lm_head, &rows, entropy))?)
}

/// KL(own || other) between next-token distributions, `[n]` in nats. `own` and `other` hold hidden states and output
/// layer; `forbidden` is as in [`token_stats`], for both.
pub(crate) fn kl_divergence(
    own: (&Tensor, &train::LmHead),
    other: (&Tensor, &train::LmHead),
    targets: &[u32],
    forbidden: (&Eos, &[bool]),
) -> Result<Vec<f32>> {
    if targets.is_empty() {
        return Ok(Vec::new());
    }
    let rows = target_tokens(own.1, targets, Some(forbidden))?;
    Ok(in_pool(|| train::kl_divergence(own, other, &rows))?)
}

fn target_tokens<'a>(
    lm_head: &train::LmHead,
    targets: &'a [u32],
    forbidden: Option<(&'a Eos, &'a [bool])>,
) -> Result<train::TargetTokens<'a>> {
    if let Some((eos, _)) = forbidden {
        check_eos(eos, lm_head.weight.dim(0)?)?;
    }
    // A batch without masked rows takes the kernel's plain path.
    let forbidden = forbidden.filter(|(_, rows)| rows.contains(&true)).map(|(eos, rows)| (eos.ids(), rows));
    Ok(train::TargetTokens { targets, forbidden })
}

/// Errors: an id that the model does not have.
pub(crate) fn check_eos(eos: &Eos, vocab: usize) -> Result<()> {
    match eos.ids().iter().find(|&&id| id as usize >= vocab) {
        None => Ok(()),
        Some(id) => Err(Error::input(format!("EOS id {id} is not below the model's vocabulary of {vocab}"))),
    }
}

/// For each response token of the batch, whether EOS is impossible there.
pub(crate) fn eos_forbidden(batch: &Batch, min_new_tokens: usize) -> Vec<bool> {
    batch.row_ranges().iter().flat_map(|range| (0..range.len()).map(|t| t < min_new_tokens)).collect()
}
