//! Fused CPU kernels (f32) with hand-written backward passes. They know shapes, not models.
//!
//! Every function is differentiable in the operands that candle tracks ([`Tensor::track_op`]) and computes no gradient
//! for the others: a frozen weight is simply a detached tensor. The result of every reduction is independent of the
//! number of threads.

pub(crate) mod attention;
mod bf16;
mod block;
pub(crate) mod buffer;
mod embedding;
pub(crate) mod gelu;
pub mod gemm;
pub(crate) mod glue;
pub(crate) mod layer_norm;
mod linear;
mod lora;
pub mod product;
mod projection;
pub mod reference;
pub(crate) mod simd;
mod sink;
#[cfg(test)]
mod tests;
mod token_stats;

use std::sync::OnceLock;

use candle_core::{Result, Tensor, bail};

pub use sink::backward;

/// Layer normalisation over the last dimension: `(x - mean) / sqrt(variance + eps) * weight + bias`.
/// `x [.., d]`, `weight [d]`, `bias [d]` -> `[.., d]`.
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let (_, d) = glue::rows(x)?;
    glue::expect("a layer norm's weight", weight, &[d])?;
    glue::expect("a layer norm's bias", bias, &[d])?;
    let op = layer_norm::LayerNorm { d, eps: eps as f32 };
    x.contiguous()?.apply_op3(&weight.contiguous()?, &bias.contiguous()?, op)
}

/// GELU in its tanh form (GPT-2's `gelu_new`), elementwise.
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    x.contiguous()?.apply_op1(gelu::Gelu)
}

/// Checks and measures `x [.., in]`, `w [in, out]`, `bias [out]`.
fn linear_size(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<linear::Linear> {
    let (n, d_in) = glue::rows(x)?;
    let (w_in, d_out) = w.dims2()?;
    if w_in != d_in || d_out == 0 {
        bail!("a linear map {:?} of rows {:?}", w.shape(), x.shape());
    }
    if let Some(bias) = bias {
        glue::expect("a linear map's bias", bias, &[d_out])?;
    }
    Ok(linear::Linear { n, d_in, d_out })
}

/// `x w + bias`: `x [.., in]`, `w [in, out]` (Hugging Face's Conv1D), `bias [out]` -> `[.., out]`.
pub fn linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let size = linear_size(x, w, bias)?;
    let (x, w, bias) = (x.contiguous()?, w.contiguous()?, bias.map(Tensor::contiguous).transpose()?);
    if !w.track_op() && bias.as_ref().is_none_or(|b| !b.track_op()) {
        return x.apply_op1(linear::Frozen { size, w, bias });
    }
    match bias {
        Some(bias) => x.apply_op3(&w, &bias, size),
        None => x.apply_op2(&w, size),
    }
}

/// A low-rank adapter beside a frozen weight, as PEFT lays it out.
pub struct Adapter<'a> {
    /// `lora_A [rank, in]`
    pub a: &'a Tensor,
    /// `lora_B [out, rank]`
    pub b: &'a Tensor,
    /// `alpha / rank`
    pub scale: f64,
    /// Dropout on the adapter's input: `[.., in]` of 0 and 1 / (1 - p); none when evaluating.
    pub mask: Option<&'a Tensor>,
}

/// `x w + bias + scale (mask * x) a' b'` with `w` and `bias` frozen: gradients reach `x`, `a` and `b` only.
/// `x [.., in]`, `w [in, out]`, `bias [out]` -> `[.., out]`.
pub fn lora_linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>, adapter: &Adapter) -> Result<Tensor> {
    let size = linear_size(x, w, bias)?;
    let rank = adapter.a.dims2()?.0;
    glue::expect("lora_A", adapter.a, &[rank, size.d_in])?;
    glue::expect("lora_B", adapter.b, &[size.d_out, rank])?;
    if let Some(mask) = adapter.mask {
        glue::expect("an adapter's dropout mask", mask, x.dims())?;
    }
    let frozen = |t: &Tensor| t.detach().contiguous();
    let op = lora::Lora {
        size,
        rank,
        w: frozen(w)?,
        bias: bias.map(frozen).transpose()?,
        scale: adapter.scale as f32,
        mask: adapter.mask.map(frozen).transpose()?,
    };
    x.contiguous()?.apply_op3(&adapter.a.contiguous()?, &adapter.b.contiguous()?, op)
}

fn heads(rows: usize, time: usize, d: usize, n_head: usize) -> Result<attention::Size> {
    if n_head == 0 || !d.is_multiple_of(n_head) || time == 0 || !rows.is_multiple_of(time) {
        bail!("attention over {rows} rows of width {d}, as sequences of {time} with {n_head} heads");
    }
    Ok(attention::Size { batch: rows / time, time, heads: n_head, width: d / n_head })
}

/// Causal scaled dot-product attention: `q`, `k`, `v` `[batch, time, d]`, heads side by side in `d` -> `[batch, time, d]`.
/// Position `t` sees positions `0..=t`, so right padding needs no mask.
pub fn causal_attention(q: &Tensor, k: &Tensor, v: &Tensor, n_head: usize) -> Result<Tensor> {
    let (batch, time, d) = q.dims3()?;
    glue::expect("attention's keys", k, q.dims())?;
    glue::expect("attention's values", v, q.dims())?;
    let op = attention::Apart { size: heads(batch * time, time, d, n_head)?, lse: OnceLock::new() };
    q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)
}

/// [`causal_attention`] straight from the joint projection `[.., 3 d]` (GPT-2's `c_attn`), whose rows are sequences of
/// `time`, one after the other -> `[.., d]`. It saves the three narrows, the reshapes and their backward passes.
pub fn causal_attention_qkv(qkv: &Tensor, time: usize, n_head: usize) -> Result<Tensor> {
    let (rows, width) = glue::rows(qkv)?;
    if width % 3 != 0 {
        bail!("queries, keys and values side by side need a width that 3 divides, not {width}");
    }
    let op = attention::Joint { size: heads(rows, time, width / 3, n_head)?, lse: OnceLock::new() };
    qkv.contiguous()?.apply_op1(op)
}

/// Rows of `table [v, d]` at `ids [..]` (u32) -> `[.., d]`; the backward pass adds in the order of `ids`.
pub fn embedding(ids: &Tensor, table: &Tensor) -> Result<Tensor> {
    let (v, d) = table.dims2()?;
    table.contiguous()?.apply_op1(embedding::Embedding::new(ids, v, d)?)
}

/// What each row of [`token_stats`] is asked about.
pub struct StatRows<'a> {
    /// The token of each row: `[n]`.
    pub targets: &'a [u32],
    /// A token (EOS) that is impossible in the rows where the flag is set, `[n]`: the others' probabilities sum to one.
    pub forbidden: Option<(u32, &'a [bool])>,
}

/// `log p(target)` and the entropy of each row's distribution, in nats: `[n]` each.
#[derive(Clone, Debug)]
pub struct TokenStats {
    pub logprob: Tensor,
    pub entropy: Option<Tensor>,
}

/// Log-probabilities (and entropies) from final hidden states `[n, d]` and the tied embedding `[v, d]`, without ever
/// holding the logits `[n, v]`. Gradients flow from both results to both operands.
pub fn token_stats(hidden: &Tensor, embedding: &Tensor, rows: &StatRows, entropy: bool) -> Result<TokenStats> {
    let (n, d) = hidden.dims2()?;
    let v = embedding.dim(0)?;
    glue::expect("the output embedding", embedding, &[v, d])?;
    if rows.targets.len() != n || rows.forbidden.is_some_and(|(_, masked)| masked.len() != n) {
        bail!("token statistics of {n} rows for {} targets", rows.targets.len());
    }
    let largest = rows.targets.iter().copied().chain(rows.forbidden.map(|(token, _)| token)).max();
    if largest.is_some_and(|id| id as usize >= v) {
        bail!("token id {largest:?} is not below the vocabulary of {v}");
    }
    let op = token_stats::Stats {
        n,
        d,
        v,
        targets: rows.targets.to_vec(),
        forbidden: rows.forbidden.map(|(token, masked)| (token, masked.to_vec())),
        entropy,
        eager: hidden.track_op() && !embedding.track_op(),
        rows: OnceLock::new(),
        slopes: OnceLock::new(),
    };
    let both = hidden.contiguous()?.apply_op2(&embedding.contiguous()?, op)?;
    let part = |i: usize| both.narrow(0, i, 1)?.squeeze(0);
    Ok(TokenStats { logprob: part(0)?, entropy: if entropy { Some(part(1)?) } else { None } })
}

/// A linear map of a [`Block`]: `w [in, out]`, `bias [out]`, and an adapter beside them, which freezes both.
pub struct Projection<'a> {
    pub w: &'a Tensor,
    pub bias: &'a Tensor,
    pub adapter: Option<Adapter<'a>>,
}

/// The weights of a pre-norm transformer block of width `d` as GPT-2 has it, and how to run it. Weights are variables,
/// or tensors that need no gradient.
pub struct Block<'a> {
    /// Weight and bias `[d]`.
    pub ln_1: (&'a Tensor, &'a Tensor),
    /// `d -> 3 d`: queries, keys, values side by side.
    pub c_attn: Projection<'a>,
    /// `d -> d`
    pub attn_proj: Projection<'a>,
    pub ln_2: (&'a Tensor, &'a Tensor),
    /// `d -> inner`
    pub c_fc: Projection<'a>,
    /// `inner -> d`
    pub mlp_proj: Projection<'a>,
    /// Dropout of the two branches before they join the residual stream: `[.., d]` of 0 and 1 / (1 - p).
    pub attn_mask: Option<&'a Tensor>,
    pub mlp_mask: Option<&'a Tensor>,
    pub eps: f64,
    pub n_head: usize,
    /// Rows of a sequence.
    pub time: usize,
}

/// `x1 = x + attn_proj(attention(c_attn(ln_1(x))))`, `y = x1 + mlp_proj(gelu(c_fc(ln_2(x1))))` as one operation:
/// `x [.., d]`, whose rows are sequences of `time`, -> `[.., d]`.
///
/// The loss of a block with variables must go through [`backward`]; candle's own reports an error.
pub fn transformer_block(x: &Tensor, block: &Block) -> Result<Tensor> {
    let op = block::TransformerBlock::new(x, block)?;
    let x = x.contiguous()?;
    match op.variable() {
        Some(variable) => x.apply_op2(&variable, op),
        None => x.apply_op1(op),
    }
}
