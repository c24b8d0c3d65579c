//! The kernels in stock candle operations: slow and plain, the reference for tests and benches.

use candle_core::{D, DType, Result, Tensor};

use super::{
    Activation, BlockArgs, Direction, DropoutMask, Heads, LinearRef, LmHeadRef, LoraRef, NormRef, Rotary, TargetTokens,
    TokenStats,
};

/// See [`super::norm`].
pub fn norm(x: &Tensor, norm: &NormRef, eps: f64) -> Result<Tensor> {
    let centred = match norm.bias {
        Some(_) => x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?,
        None => x.clone(),
    };
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let y = centred.broadcast_div(&(variance + eps)?.sqrt()?)?.broadcast_mul(norm.weight)?;
    match norm.bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

fn linear(p: &LinearRef, x: &Tensor) -> Result<Tensor> {
    let y = x.broadcast_matmul(p.w)?;
    let y = match p.bias {
        Some(bias) => y.broadcast_add(bias)?,
        None => y,
    };
    let Some(LoraRef { a, b, scale, mask }) = p.adapter.as_ref() else { return Ok(y) };
    let dropped = match mask {
        Some(mask) => (x * mask.tensor(x.dims())?)?,
        None => x.clone(),
    };
    y + (dropped.broadcast_matmul(&a.t()?)?.broadcast_matmul(&b.t()?)? * *scale)?
}

/// Outputs of the layers side by side.
fn linear_group(linears: &[LinearRef], x: &Tensor) -> Result<Tensor> {
    let parts = linears.iter().map(|p| linear(p, x)).collect::<Result<Vec<_>>>()?;
    Tensor::cat(&parts, D::Minus1)
}

/// Causal attention over `qkv [batch * time, (query + 2 key_value) width]` -> `[batch * time, query width]`.
fn attention(qkv: &Tensor, time: usize, heads: Heads, rotary: Option<&Rotary>) -> Result<Tensor> {
    let Heads { query, key_value, width } = heads;
    let mut start = 0;
    let mut part = |n: usize| -> Result<Tensor> {
        let part =
            qkv.narrow(D::Minus1, start, n * width)?.reshape(((), time, n, width))?.transpose(1, 2)?.contiguous();
        start += n * width;
        part
    };
    let (q, k, v) = (part(query)?, part(key_value)?, part(key_value)?);
    let (q, k) = match rotary {
        Some(rotary) => (rotate(&q, rotary)?, rotate(&k, rotary)?),
        None => (q, k),
    };
    // Repeats each key/value head for the query heads that it serves.
    let kv_heads: Vec<u32> = (0..query).map(|h| (h / (query / key_value)) as u32).collect();
    let kv_heads = Tensor::from_vec(kv_heads, query, q.device())?;
    let (k, v) = (k.index_select(&kv_heads, 1)?, v.index_select(&kv_heads, 1)?);
    let scores = (q.matmul(&k.transpose(2, 3)?.contiguous()?)? / (width as f64).sqrt())?;
    let future: Vec<u8> = (0..time * time).map(|i| u8::from(i % time > i / time)).collect();
    let future = Tensor::from_vec(future, (time, time), q.device())?.broadcast_as(scores.shape())?;
    let masked_out = Tensor::new(f32::NEG_INFINITY, q.device())?.broadcast_as(scores.shape())?;
    let scores = future.where_cond(&masked_out, &scores)?;
    let shifted = scores.broadcast_sub(&scores.detach().max_keepdim(D::Minus1)?)?.exp()?;
    let p = shifted.broadcast_div(&shifted.sum_keepdim(D::Minus1)?)?;
    p.matmul(&v.contiguous()?)?.transpose(1, 2)?.reshape(((), query * width))
}

/// A rotation is linear: `x [.., time, width]` times a matrix for each position.
fn rotate(x: &Tensor, rotary: &Rotary) -> Result<Tensor> {
    let (_, _, time, width) = x.dims4()?;
    let rotated = (0..time).map(|t| {
        let mut matrix: Vec<f32> = (0..width * width).map(|i| f32::from(u8::from(i / width == i % width))).collect();
        matrix.chunks_exact_mut(width).for_each(|row| rotary.rotate(row, width, t, Direction::Forward));
        let matrix = Tensor::from_vec(matrix, (width, width), x.device())?;
        x.narrow(2, t, 1)?.broadcast_matmul(&matrix)
    });
    Tensor::cat(&rotated.collect::<Result<Vec<_>>>()?, 2)
}

/// See [`super::embedding`].
pub fn embedding(ids: &Tensor, table: &Tensor) -> Result<Tensor> {
    let mut shape = ids.dims().to_vec();
    shape.push(table.dim(1)?);
    table.index_select(&ids.flatten_all()?, 0)?.reshape(shape)
}

/// See [`super::token_stats`].
pub fn token_stats(hidden: &Tensor, lm_head: &LmHeadRef, rows: &TargetTokens, entropy: bool) -> Result<TokenStats> {
    let logits = hidden.matmul(&lm_head.weight.t()?)?;
    let logits = match lm_head.bias {
        Some(bias) => logits.broadcast_add(bias)?,
        None => logits,
    };
    let (n, v) = logits.dims2()?;
    let logits = match rows.forbidden {
        Some((tokens, masked)) => {
            let out: Vec<u8> =
                (0..n * v).map(|i| u8::from(masked[i / v] && tokens.contains(&((i % v) as u32)))).collect();
            let out = Tensor::from_vec(out, (n, v), logits.device())?;
            out.where_cond(&Tensor::new(-1e30f32, logits.device())?.broadcast_as((n, v))?, &logits)?
        }
        None => logits,
    };
    let shifted = logits.broadcast_sub(&logits.detach().max_keepdim(D::Minus1)?)?;
    let logp = shifted.broadcast_sub(&shifted.exp()?.sum_keepdim(D::Minus1)?.log()?)?;
    let targets = Tensor::from_slice(rows.targets, (n, 1), logits.device())?;
    let logprob = logp.gather(&targets, 1)?.squeeze(1)?.to_dtype(DType::F32)?;
    let entropy = match entropy {
        true => Some((logp.exp()? * &logp)?.sum(D::Minus1)?.neg()?),
        false => None,
    };
    Ok(TokenStats { logprob, entropy })
}

/// See [`super::transformer_block`].
pub fn transformer_block(x: &Tensor, block: &BlockArgs) -> Result<Tensor> {
    let masked = |x: Tensor, mask: Option<&DropoutMask>| match mask {
        Some(mask) => &x * mask.tensor(x.dims())?,
        None => Ok(x),
    };
    let h = norm(x, &block.norm_1, block.eps)?;
    let attended = attention(&linear_group(&block.qkv, &h)?, block.time, block.heads, block.rotary.as_deref())?;
    let select = |t: Tensor| match block.output_rows {
        Some(rows) => t.index_select(&Tensor::from_slice(rows, rows.len(), t.device())?, 0),
        None => Ok(t),
    };
    let (x, h, attended) = (select(x.clone())?, select(h)?, select(attended)?);
    let x = (&x + masked(linear(&block.attn_out, &attended)?, block.attn_dropout)?)?;
    let h = match &block.norm_2 {
        Some(norm_2) => norm(&x, norm_2, block.eps)?,
        None => h,
    };
    let up = linear_group(&block.up, &h)?;
    let active = match block.activation {
        Activation::GeluTanh => up.gelu()?,
        Activation::SwiGlu => {
            let (gate, value) = (up.narrow(1, 0, up.dim(1)? / 2)?, up.narrow(1, up.dim(1)? / 2, up.dim(1)? / 2)?);
            (gate.silu()? * value)?
        }
    };
    x + masked(linear(&block.down, &active)?, block.mlp_dropout)?
}
