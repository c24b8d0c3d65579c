//! The model in stock candle operations, on any device: what GPUs run, and the reference that the fused CPU kernels are
//! compared with. Its functions have the names and results of those in [`crate::exec::train`].

mod decode;
mod recompute;

use std::ops::Range;
use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, D, DType, Device, Layout, Result, Shape, Storage, Tensor, bail};

use crate::Precision;
use crate::exec::train::{BlockPass, DropoutMask, LmHead, TargetTokens, TokenStats};
use crate::model::adapter::LoraAdapter;
use crate::model::block::{Activation, Attention, Block, Heads, Norm, Pairing};
use crate::model::linear::Linear;

pub(crate) use decode::generate;
use recompute::{Tape, recomputed};

/// See [`crate::exec::train::norm`].
pub fn norm(x: &Tensor, norm: &Norm) -> Result<Tensor> {
    let centred = match &norm.bias {
        Some(_) => x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?,
        None => x.clone(),
    };
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let y = centred.broadcast_div(&(variance + norm.eps)?.sqrt()?)?.broadcast_mul(&norm.weight)?;
    match &norm.bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

/// An operand of a product as `precision` has it.
fn rounded(x: &Tensor, precision: Precision) -> Result<Tensor> {
    match precision {
        Precision::F32 => Ok(x.clone()),
        Precision::Bf16 => x.to_dtype(DType::BF16)?.to_dtype(DType::F32),
    }
}

/// `x [n, in]` times a weight `[in, out]`, with operands rounded to `precision` in both passes. candle's own product
/// computes the gradient of a frozen weight too, and rounds gradients through a conversion.
struct Matmul {
    /// The rounded operands.
    x: Tensor,
    w: Tensor,
    precision: Precision,
}

impl Matmul {
    fn product<S: BackendStorage>(&self, x: &S, w: &S) -> Result<(S, Shape)> {
        let ((n, k), m) = (self.x.dims2()?, self.w.dim(1)?);
        Ok((x.matmul(w, (1, n, m, k), self.x.layout(), self.w.layout())?, Shape::from((n, m))))
    }

    fn on_cpu(&self) -> Result<(CpuStorage, Shape)> {
        match (&*self.x.storage_and_layout().0, &*self.w.storage_and_layout().0) {
            (Storage::Cpu(x), Storage::Cpu(w)) => self.product(x, w),
            _ => bail!("a weight and its input are on different devices"),
        }
    }

    #[cfg(feature = "cuda")]
    fn on_cuda(&self) -> Result<(candle_core::CudaStorage, Shape)> {
        match (&*self.x.storage_and_layout().0, &*self.w.storage_and_layout().0) {
            (Storage::Cuda(x), Storage::Cuda(w)) => self.product(x, w),
            _ => bail!("a weight and its input are on different devices"),
        }
    }

    #[cfg(feature = "metal")]
    fn on_metal(&self) -> Result<(candle_core::MetalStorage, Shape)> {
        match (&*self.x.storage_and_layout().0, &*self.w.storage_and_layout().0) {
            (Storage::Metal(x), Storage::Metal(w)) => self.product(x, w),
            _ => bail!("a weight and its input are on different devices"),
        }
    }

    /// The gradients of `x` and, if it is trained, of the weight.
    fn backward(&self, _: &Tensor, grad: &Tensor, trained: bool) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = rounded(&grad.contiguous()?, self.precision)?;
        let of_x = grad.matmul(&self.w.t()?)?;
        let of_w = if trained { Some(self.x.t()?.matmul(&grad)?) } else { None };
        Ok((Some(of_x), of_w))
    }
}

/// Implements candle's operations by the methods `on_cpu`, `on_cuda`, `on_metal` and `backward` of `$op`. With a second
/// operand, a variable is trained.
macro_rules! custom_op {
    ($op:ty, $name:literal) => {
        impl CustomOp1 for $op {
            fn name(&self) -> &'static str {
                $name
            }

            fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
                self.on_cpu()
            }

            #[cfg(feature = "cuda")]
            fn cuda_fwd(&self, _: &candle_core::CudaStorage, _: &Layout) -> Result<(candle_core::CudaStorage, Shape)> {
                self.on_cuda()
            }

            #[cfg(feature = "metal")]
            fn metal_fwd(
                &self,
                _: &candle_core::MetalStorage,
                _: &Layout,
            ) -> Result<(candle_core::MetalStorage, Shape)> {
                self.on_metal()
            }

            fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
                Ok(self.backward(x, grad, false)?.0)
            }
        }

        impl CustomOp2 for $op {
            fn name(&self) -> &'static str {
                $name
            }

            fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
                self.on_cpu()
            }

            #[cfg(feature = "cuda")]
            fn cuda_fwd(
                &self,
                _: &candle_core::CudaStorage,
                _: &Layout,
                _: &candle_core::CudaStorage,
                _: &Layout,
            ) -> Result<(candle_core::CudaStorage, Shape)> {
                self.on_cuda()
            }

            #[cfg(feature = "metal")]
            fn metal_fwd(
                &self,
                _: &candle_core::MetalStorage,
                _: &Layout,
                _: &candle_core::MetalStorage,
                _: &Layout,
            ) -> Result<(candle_core::MetalStorage, Shape)> {
                self.on_metal()
            }

            fn bwd(
                &self,
                x: &Tensor,
                _: &Tensor,
                _: &Tensor,
                grad: &Tensor,
            ) -> Result<(Option<Tensor>, Option<Tensor>)> {
                self.backward(x, grad, true)
            }
        }
    };
}
use custom_op;

custom_op!(Matmul, "temper-matmul");

/// `x [n, in]` times a weight `[in, out]`.
fn matmul(x: &Tensor, w: &Tensor, precision: Precision) -> Result<Tensor> {
    let x = x.contiguous()?;
    let op = Matmul { x: rounded(&x.detach(), precision)?, w: rounded(&w.detach(), precision)?, precision };
    if w.track_op() { x.apply_op2(w, op) } else { x.apply_op1(op) }
}

/// The layer's output for `x`; `mask` drops entries of the adapter's input.
fn linear(layer: &Linear, x: &Tensor, mask: Option<&DropoutMask>, precision: Precision) -> Result<Tensor> {
    let y = matmul(x, &layer.weight, precision)?;
    let y = match &layer.bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    };
    let Some(LoraAdapter { a, b, scale, .. }) = &layer.adapter else { return Ok(y) };
    let dropped = masked(x, mask)?;
    y + (matmul(&matmul(&dropped, &a.t()?, Precision::F32)?, &b.t()?, Precision::F32)? * *scale)?
}

fn masked(x: &Tensor, mask: Option<&DropoutMask>) -> Result<Tensor> {
    match mask {
        Some(mask) => x * mask.tensor(x.dims(), x.device())?,
        None => Ok(x.clone()),
    }
}

/// Outputs of the layers side by side; takes the mask of each layer.
fn linear_group<'m>(
    layers: &[Linear],
    x: &Tensor,
    masks: &mut impl Iterator<Item = Option<&'m DropoutMask>>,
    precision: Precision,
) -> Result<Tensor> {
    let parts = layers.iter().map(|layer| linear(layer, x, masks.next().flatten(), precision));
    Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, D::Minus1)
}

/// Queries, keys and values of `qkv [batch * time, (query + 2 key_value) width]`: `[batch, heads, time, width]`
/// each. Queries and keys are normalised, and rotated by cosines and sines, which broadcast to `[batch, heads, time,
/// pairs]`.
fn split_heads(
    qkv: &Tensor,
    time: usize,
    attention: &Attention<Linear, Norm>,
    angles: Option<&(Tensor, Tensor)>,
) -> Result<[Tensor; 3]> {
    let Heads { query, key_value, width } = attention.heads;
    let part = |start: usize, n: usize| -> Result<Tensor> {
        let part = qkv.narrow(D::Minus1, start * width, n * width)?.reshape(((), time, n, width))?;
        part.transpose(1, 2)?.force_contiguous()
    };
    let mut parts = [part(0, query)?, part(query, key_value)?];
    if let Some(norms) = &attention.qk_norm {
        for (part, head_norm) in parts.iter_mut().zip(norms) {
            *part = norm(part, head_norm)?;
        }
    }
    if let (Some(rotary), Some((cos, sin))) = (&attention.rotary, angles) {
        for part in &mut parts {
            *part = rotate(part, rotary.pairing, cos, sin)?;
        }
    }
    let [q, k] = parts;
    Ok([q, k, part(query + key_value, key_value)?])
}

/// Attention of queries `[batch, query, n, width]` to keys and values `[batch, key_value, m, width]`, with `mask`, which
/// broadcasts to `[batch, query, n, m]`, added to the scores: `[batch * n, query width]`.
fn attend(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Tensor, heads: Heads) -> Result<Tensor> {
    let Heads { query, key_value, width } = heads;
    let shared = |t: &Tensor| -> Result<Tensor> {
        if query == key_value {
            return t.contiguous();
        }
        let serves: Vec<u32> = (0..query).map(|h| (h / (query / key_value)) as u32).collect();
        t.contiguous()?.index_select(&Tensor::from_vec(serves, query, t.device())?, 1)
    };
    let scores =
        (q.matmul(&shared(k)?.transpose(2, 3)?.contiguous()?)? / (width as f64).sqrt())?.broadcast_add(mask)?;
    let shifted = scores.broadcast_sub(&scores.detach().max_keepdim(D::Minus1)?)?.exp()?;
    let p = shifted.broadcast_div(&shifted.sum_keepdim(D::Minus1)?)?;
    p.matmul(&shared(v)?)?.transpose(1, 2)?.contiguous()?.reshape(((), query * width))
}

/// What is added to the score of a position that a query cannot see. Finite, so that a row without any visible position
/// stays a distribution.
const HIDDEN: f32 = -1e30;

/// The mask of causal attention, `[time, time]`.
fn causal_mask(time: usize, device: &Device) -> Result<Tensor> {
    let mask = (0..time * time).map(|i| if i % time > i / time { HIDDEN } else { 0.0 }).collect();
    Tensor::from_vec(mask, (time, time), device)
}

/// Rotates the heads of `x [batch, heads, time, width]`; see [`split_heads`].
fn rotate(x: &Tensor, pairing: Pairing, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    let (pairs, width) = (cos.dim(D::Minus1)?, x.dim(D::Minus1)?);
    let rotated = |a: &Tensor, b: &Tensor| -> Result<[Tensor; 2]> {
        let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
        let second = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
        Ok([first, second])
    };
    let turned = match pairing {
        Pairing::Halves => {
            let [a, b] = rotated(&x.narrow(3, 0, pairs)?, &x.narrow(3, pairs, pairs)?)?;
            Tensor::cat(&[a, b], 3)?
        }
        Pairing::Interleaved => {
            let (batch, heads, time, _) = x.dims4()?;
            let x = x.narrow(3, 0, 2 * pairs)?.contiguous()?.reshape((batch, heads, time, pairs, 2))?;
            let part = |i: usize| x.narrow(4, i, 1)?.squeeze(4);
            let [a, b] = rotated(&part(0)?, &part(1)?)?;
            Tensor::stack(&[a, b], 4)?.reshape((batch, heads, time, 2 * pairs))?
        }
    };
    if 2 * pairs == width {
        Ok(turned)
    } else {
        Tensor::cat(&[&turned, &x.narrow(3, 2 * pairs, width - 2 * pairs)?], 3)
    }
}

/// See [`crate::exec::train::embedding`].
pub fn embedding(ids: &Tensor, table: &Tensor) -> Result<Tensor> {
    let mut shape = ids.dims().to_vec();
    shape.push(table.dim(1)?);
    table.index_select(&ids.flatten_all()?.to_device(table.device())?, 0)?.reshape(shape)
}

/// Elements of logits that are computed at a time: the backward pass holds about ten results of this size.
const LOGITS: usize = 1 << 24;

/// The tokens of some rows on the device, of which the log-probabilities are computed together.
struct Rows {
    range: Range<usize>,
    /// `[rows, 1]`
    targets: Tensor,
    /// Which of the rows cannot have some tokens, `[rows, 1]`, and which tokens, `[1, v]`.
    forbidden: Option<(Tensor, Tensor)>,
}

/// The rows in parts whose logits fit into memory.
fn row_chunks(rows: &TargetTokens, v: usize, device: &Device) -> Result<Vec<Rows>> {
    let (n, step) = (rows.targets.len(), (LOGITS / v).max(1));
    let part = |start: usize| {
        let range = start..n.min(start + step);
        let targets = Tensor::from_slice(&rows.targets[range.clone()], (range.len(), 1), device)?;
        let forbidden = match rows.forbidden {
            Some((tokens, masked)) => {
                let masked = masked[range.clone()].iter().map(|masked| u8::from(*masked)).collect();
                let mut forbidden = vec![0u8; v];
                tokens.iter().for_each(|id| forbidden[*id as usize] = 1);
                let masked = Tensor::from_vec(masked, (range.len(), 1), device)?;
                Some((masked, Tensor::from_vec(forbidden, (1, v), device)?))
            }
            None => None,
        };
        Ok(Rows { range, targets, forbidden })
    };
    (0..n).step_by(step).map(part).collect()
}

/// Logits `[n, v]` from hidden states `[n, d]`.
fn logits(hidden: &Tensor, lm_head: &LmHead) -> Result<Tensor> {
    let logits = matmul(hidden, &lm_head.weight.t()?, lm_head.precision)?;
    match &lm_head.bias {
        Some(bias) => logits.broadcast_add(bias),
        None => Ok(logits),
    }
}

impl Rows {
    /// The part of `hidden [n, d]` that belongs to these rows.
    fn of(&self, hidden: &Tensor) -> Result<Tensor> {
        hidden.narrow(0, self.range.start, self.range.len())
    }

    /// The log-probabilities of all tokens, `[rows, v]`, from these rows' hidden states.
    fn log_probabilities(&self, hidden: &Tensor, lm_head: &LmHead) -> Result<Tensor> {
        let logits = logits(hidden, lm_head)?;
        let logits = match &self.forbidden {
            Some((masked, tokens)) => {
                let hidden = Tensor::new(HIDDEN, logits.device())?.broadcast_as(logits.dims())?;
                masked.broadcast_mul(tokens)?.where_cond(&hidden, &logits)?
            }
            None => logits,
        };
        let shifted = logits.broadcast_sub(&logits.detach().max_keepdim(D::Minus1)?)?;
        shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)
    }

    /// The log-probability of each row's target, and with `entropy` the entropy: `[1 or 2, rows]`.
    fn stats(&self, hidden: &Tensor, lm_head: &LmHead, entropy: bool) -> Result<Tensor> {
        let logp = self.log_probabilities(hidden, lm_head)?;
        let logprob = logp.gather(&self.targets, 1)?.t()?;
        match entropy {
            true => Tensor::cat(&[logprob, (logp.exp()? * &logp)?.sum_keepdim(1)?.neg()?.t()?], 0),
            false => Ok(logprob),
        }
    }
}

/// See [`crate::exec::train::token_stats`]. Keeps no logits for the backward pass.
pub fn token_stats(hidden: &Tensor, lm_head: &LmHead, rows: &TargetTokens, entropy: bool) -> Result<TokenStats> {
    let parts = row_chunks(rows, lm_head.weight.dim(0)?, hidden.device())?.into_iter().map(|rows| {
        let (part, lm_head) = (rows.of(hidden)?.contiguous()?, lm_head.clone());
        let weights: Vec<Tensor> = [&lm_head.weight].into_iter().chain(&lm_head.bias).cloned().collect();
        recomputed(&part, &weights, move |hidden, tape| match tape {
            Tape::On => rows.stats(hidden, &lm_head, entropy),
            Tape::Off => rows.stats(hidden, &lm_head.frozen(), entropy),
        })
    });
    let both = Tensor::cat(&parts.collect::<Result<Vec<_>>>()?, 1)?;
    Ok(TokenStats { logprob: both.get(0)?, entropy: if entropy { Some(both.get(1)?) } else { None } })
}

/// See [`crate::exec::train::kl_divergence`].
pub fn kl_divergence(own: (&Tensor, &LmHead), other: (&Tensor, &LmHead), rows: &TargetTokens) -> Result<Vec<f32>> {
    let parts = row_chunks(rows, own.1.weight.dim(0)?, own.0.device())?.into_iter().map(|rows| {
        let [p, q] = [own, other].map(|(hidden, lm_head)| rows.log_probabilities(&rows.of(hidden)?, &lm_head.frozen()));
        let p = p?;
        (p.exp()? * (p - q?)?)?.sum(D::Minus1)?.to_vec1::<f32>()
    });
    Ok(parts.collect::<Result<Vec<_>>>()?.concat())
}

/// See [`crate::exec::train::transformer_block`]. Keeps nothing but its input for the backward pass.
pub fn transformer_block(x: &Tensor, block: &Arc<Block>, pass: BlockPass) -> Result<Tensor> {
    let rows = x.reshape(((), x.dim(D::Minus1)?))?.contiguous()?;
    let (all, run) = (pass.output_rows.is_none(), block.clone());
    let y = recomputed(&rows, block.tensors(), move |x, tape| match tape {
        Tape::On => run_block(x, &run, &pass),
        Tape::Off => run_block(x, &run.frozen(), &pass),
    })?;
    if all { y.reshape(x.shape()) } else { Ok(y) }
}

/// The block itself, for `x [batch * time, d]`.
pub fn run_block(x: &Tensor, block: &Block, pass: &BlockPass) -> Result<Tensor> {
    let mut masks = pass.adapter_masks();
    let h = norm(x, &block.norm_1)?;
    let qkv = linear_group(&block.attention.qkv, &h, &mut masks, pass.precision)?;
    let angles = pass.rotary.as_ref().map(|rotary| rotary.tables(0..pass.time, x.device())).transpose()?;
    let [q, k, v] = split_heads(&qkv, pass.time, &block.attention, angles.as_ref())?;
    let attended = attend(&q, &k, &v, &causal_mask(pass.time, x.device())?, block.attention.heads)?;
    let select = |t: Tensor| match &pass.output_rows {
        Some(rows) => t.index_select(&Tensor::from_slice(rows, rows.len(), t.device())?, 0),
        None => Ok(t),
    };
    finish_block(&select(x.clone())?, select(h)?, &select(attended)?, block, pass, &mut masks)
}

/// The rest of a block after attention; `h` is the output of `norm_1`.
fn finish_block<'m>(
    x: &Tensor,
    h: Tensor,
    attended: &Tensor,
    block: &Block,
    pass: &BlockPass,
    masks: &mut impl Iterator<Item = Option<&'m DropoutMask>>,
) -> Result<Tensor> {
    let [attn_dropout, mlp_dropout] = pass.residual_dropout.each_ref().map(Option::as_ref);
    let attended = linear(&block.attention.out, attended, masks.next().flatten(), pass.precision)?;
    let x = (x + masked(&attended, attn_dropout)?)?;
    let h = match &block.norm_2 {
        Some(norm_2) => norm(&x, norm_2)?,
        None => h,
    };
    let up = linear_group(&block.mlp.up, &h, masks, pass.precision)?;
    let active = match block.mlp.activation {
        Activation::GeluTanh => up.gelu()?,
        Activation::SwiGlu => {
            let (gate, value) = (up.narrow(1, 0, up.dim(1)? / 2)?, up.narrow(1, up.dim(1)? / 2, up.dim(1)? / 2)?);
            (gate.silu()? * value)?
        }
    };
    let down = linear(&block.mlp.down, &active, masks.next().flatten(), pass.precision)?;
    x + masked(&down, mlp_dropout)?
}
