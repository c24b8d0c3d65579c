//! Fused CPU kernels with hand-written backward passes, in f32 except for products with weights, whose precision is
//! selectable.
//!
//! Every function is differentiable in the operands that candle tracks ([`Tensor::track_op`]) and computes no gradient
//! for the others: a frozen weight is simply a detached tensor. The result of every reduction is independent of the
//! number of threads.

mod activation;
pub(crate) mod attention;
mod block;
mod embedding;
mod layer_norm;
pub(crate) mod linear;
mod mask;
pub(crate) mod norm;
mod rms_norm;
pub(crate) mod rotary;
#[cfg(test)]
mod tests;
pub mod token_stats;
mod weight_grad_inputs;

use std::sync::{Arc, OnceLock};

use candle_core::{Result, Tensor, bail};

use crate::Precision;
use crate::exec::portable;
use crate::model::block::{Block, Norm};
use crate::tensor::device::is_portable;
pub(crate) use crate::tensor::{candle_interop, grad_accumulator, row_subset};
use candle_interop::CpuSlice;

pub use grad_accumulator::backward;
pub use mask::{BITS, DropoutMask};
pub use rotary::RotaryTable;

/// The direction of a pass through a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the input to the output.
    Forward,
    /// Gradients, from the output to the input.
    Backward,
}

/// `x [.., d]` normalised over the last dimension: `[.., d]`.
pub fn norm(x: &Tensor, norm: &Norm) -> Result<Tensor> {
    let (_, d) = candle_interop::rows_and_width(x)?;
    candle_interop::check_shape("a norm's weight", &norm.weight, &[d])?;
    if is_portable() {
        return portable::norm(x, norm);
    }
    let op = norm::NormOp { d, eps: norm.eps as f32 };
    let (x, weight) = (x.contiguous()?, norm.weight.contiguous()?);
    match &norm.bias {
        Some(bias) => {
            candle_interop::check_shape("a norm's bias", bias, &[d])?;
            x.apply_op3(&weight, &bias.contiguous()?, op)
        }
        None => x.apply_op2(&weight, op),
    }
}

/// Rows of `table [v, d]` at `ids [..]` (u32) -> `[.., d]`; the backward pass adds in the order of `ids`.
pub fn embedding(ids: &Tensor, table: &Tensor) -> Result<Tensor> {
    let (v, d) = table.dims2()?;
    if is_portable() {
        return portable::embedding(ids, table);
    }
    table.contiguous()?.apply_op1(embedding::EmbeddingOp::new(ids, v, d)?)
}

/// The tokens whose statistics [`token_stats`] computes, one per row.
#[derive(Clone, Copy)]
pub struct TargetTokens<'a> {
    /// The token of each row: `[n]`.
    pub targets: &'a [u32],
    /// Tokens (EOS) that are impossible in the rows where the flag is set, `[n]`: there the other tokens' probabilities
    /// sum to one.
    pub forbidden: Option<(&'a [u32], &'a [bool])>,
}

/// Statistics of target tokens, `[n]` each, in nats; of all response tokens of a batch, `[response_tokens]`.
#[derive(Clone, Debug)]
pub struct TokenStats {
    /// log p(token | preceding tokens).
    pub logprob: Tensor,
    /// The entropy of the distribution that the token was drawn from.
    pub entropy: Option<Tensor>,
}

/// The output layer: logits = hidden weight' + bias.
#[derive(Debug, Clone)]
pub struct LmHead {
    /// `[v, d]`; the embedding itself if the two are tied.
    pub weight: Tensor,
    /// `[v]`; a variable or a constant.
    pub bias: Option<Tensor>,
    pub precision: Precision,
}

impl LmHead {
    /// A frozen view that shares storage.
    pub fn frozen(&self) -> Self {
        Self { weight: self.weight.detach(), bias: self.bias.as_ref().map(Tensor::detach), precision: self.precision }
    }
}

/// Log-probabilities (and entropies) from final hidden states `[n, d]`, without holding all logits `[n, v]` at once.
/// Gradients flow from both results to all operands; a trained bias needs [`backward`].
pub fn token_stats(hidden: &Tensor, lm_head: &LmHead, rows: &TargetTokens, entropy: bool) -> Result<TokenStats> {
    let op = token_stats_op(hidden, lm_head, rows, entropy)?;
    if is_portable() {
        return portable::token_stats(hidden, lm_head, rows, entropy);
    }
    let both = hidden.contiguous()?.apply_op2(&lm_head.weight.contiguous()?, op)?;
    let part = |i: usize| both.narrow(0, i, 1)?.squeeze(0);
    Ok(TokenStats { logprob: part(0)?, entropy: if entropy { Some(part(1)?) } else { None } })
}

/// KL(p || q) in nats for each row, `[n]`, over the whole vocabulary: p is the distribution of `own`, q that of
/// `other`, each given by hidden states `[n, d]` and output layer. Not differentiable.
pub fn kl_divergence(own: (&Tensor, &LmHead), other: (&Tensor, &LmHead), rows: &TargetTokens) -> Result<Vec<f32>> {
    let (p, q) = (token_stats_op(own.0, own.1, rows, false)?, token_stats_op(other.0, other.1, rows, false)?);
    if p.v != q.v {
        bail!("KL divergence needs one vocabulary, got {} and {} tokens", p.v, q.v);
    }
    if is_portable() {
        return portable::kl_divergence(own, other, rows);
    }
    let (h, w) = (own.0.contiguous()?, own.1.weight.contiguous()?);
    let (other_h, other_w) = (other.0.contiguous()?, other.1.weight.contiguous()?);
    let own = (CpuSlice::new(&h)?, CpuSlice::new(&w)?);
    let other = (CpuSlice::new(&other_h)?, CpuSlice::new(&other_w)?);
    token_stats::kl_divergence((&p, &own.0, &own.1), (&q, &other.0, &other.1))
}

fn token_stats_op(
    hidden: &Tensor,
    lm_head: &LmHead,
    rows: &TargetTokens,
    entropy: bool,
) -> Result<token_stats::TokenStatsOp> {
    let (n, d) = hidden.dims2()?;
    let v = lm_head.weight.dim(0)?;
    candle_interop::check_shape("the output layer", &lm_head.weight, &[v, d])?;
    if let Some(bias) = &lm_head.bias {
        candle_interop::check_shape("the output layer's bias", bias, &[v])?;
    }
    if rows.targets.len() != n || rows.forbidden.is_some_and(|(_, masked)| masked.len() != n) {
        bail!("token statistics need one target per row, got {} targets for {n} rows", rows.targets.len());
    }
    let mut ids = rows.targets.iter().chain(rows.forbidden.map_or(&[][..], |(tokens, _)| tokens));
    if let Some(id) = ids.find(|&&id| id as usize >= v) {
        bail!("token id {id} is not below the vocabulary of {v}");
    }
    let bias = lm_head.bias.as_ref().map(leaf_or_constant).transpose()?;
    let trained = lm_head.weight.track_op() || bias.as_ref().is_some_and(Tensor::track_op);
    Ok(token_stats::TokenStatsOp {
        n,
        d,
        v,
        bias,
        precision: lm_head.precision,
        targets: rows.targets.to_vec(),
        forbidden: rows.forbidden.map(|(tokens, masked)| (tokens.to_vec(), masked.to_vec())),
        entropy,
        saves_hidden_grads: hidden.track_op() && !trained,
        row_stats: OnceLock::new(),
        hidden_grads: candle_interop::SavedForBackward::default(),
    })
}

/// Accepts a variable, or a tensor that needs no gradient, which becomes contiguous.
fn leaf_or_constant(t: &Tensor) -> Result<Tensor> {
    if t.track_op() && !t.is_variable() {
        bail!("a trained weight must be a variable, not the result of another operation");
    }
    if t.is_variable() { Ok(t.clone()) } else { t.contiguous() }
}

/// The settings of one pass of a batch through a block.
#[derive(Clone)]
pub struct BlockPass {
    /// Rows per sequence.
    pub time: usize,
    /// Precision of products with weights; attention and low-rank adapters are always f32.
    pub precision: Precision,
    /// The angles of at least `time` positions, if the block's positions are rotary.
    pub rotary: Option<Arc<RotaryTable>>,
    /// Rows whose output is computed, ascending; None: all. The steps after attention run on these rows only, and their
    /// dropout masks have these rows only.
    pub output_rows: Option<Vec<u32>>,
    /// Dropout masks of the inputs of the linear layers' adapters, `[rows, in]`, in file order; empty without dropout.
    pub adapter_dropout: Vec<Option<DropoutMask>>,
    /// Dropout masks of the two branches before they join the residual stream, `[output rows, d]`.
    pub residual_dropout: [Option<DropoutMask>; 2],
}

impl BlockPass {
    /// A pass over all rows without rotation and dropout.
    pub fn new(time: usize, precision: Precision) -> Self {
        let (rotary, output_rows, adapter_dropout) = (None, None, vec![]);
        Self { time, precision, rotary, output_rows, adapter_dropout, residual_dropout: [None, None] }
    }

    /// The mask of each linear layer, in file order.
    pub fn adapter_masks(&self) -> impl Iterator<Item = Option<&DropoutMask>> {
        self.adapter_dropout.iter().map(Option::as_ref).chain(std::iter::repeat(None))
    }
}

/// The block as one operation. The rows of `x [.., d]` are sequences of `pass.time`; the result is `[.., d]`, or
/// `[n, d]` for `n` output rows. Right padding needs no mask: attention is causal.
///
/// The loss of a block with variables must go through [`backward`], once; candle's own `backward` reports an error.
pub fn transformer_block(x: &Tensor, block: &Arc<Block>, pass: BlockPass) -> Result<Tensor> {
    if is_portable() {
        // With the errors of the fused operation.
        block::TransformerBlockOp::new(x, block.clone(), pass.clone())?;
        return portable::transformer_block(x, block, pass);
    }
    let op = block::TransformerBlockOp::new(x, block.clone(), pass)?;
    let x = x.contiguous()?;
    match op.variable() {
        Some(variable) => x.apply_op2(&variable, op),
        None => x.apply_op1(op),
    }
}
