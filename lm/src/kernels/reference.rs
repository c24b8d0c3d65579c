//! The kernels written in stock candle operations: slow, plain, and what tests and benches compare with. Knows no fused code.

use candle_core::{D, DType, Result, Tensor};

use super::{Adapter, Block, Projection, StatRows, TokenStats};

/// See [`super::layer_norm`].
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let centred = x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?;
    let variance = centred.sqr()?.mean_keepdim(D::Minus1)?;
    centred.broadcast_div(&(variance + eps)?.sqrt()?)?.broadcast_mul(weight)?.broadcast_add(bias)
}

/// See [`super::gelu_tanh`].
pub fn gelu_tanh(x: &Tensor) -> Result<Tensor> {
    x.gelu()
}

/// See [`super::linear`].
pub fn linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor> {
    let y = x.broadcast_matmul(w)?;
    match bias {
        Some(bias) => y.broadcast_add(bias),
        None => Ok(y),
    }
}

/// See [`super::lora_linear`].
pub fn lora_linear(x: &Tensor, w: &Tensor, bias: Option<&Tensor>, adapter: &Adapter) -> Result<Tensor> {
    let seen = match adapter.mask {
        Some(mask) => (x * mask)?,
        None => x.clone(),
    };
    let low = seen.broadcast_matmul(&adapter.a.t()?)?;
    linear(x, w, bias)? + (low.broadcast_matmul(&adapter.b.t()?)? * adapter.scale)?
}

/// See [`super::causal_attention`].
pub fn causal_attention(q: &Tensor, k: &Tensor, v: &Tensor, n_head: usize) -> Result<Tensor> {
    let (batch, time, d) = q.dims3()?;
    let heads = |t: &Tensor| t.reshape((batch, time, n_head, d / n_head))?.transpose(1, 2)?.contiguous();
    let (q, k, v) = (heads(q)?, heads(k)?, heads(v)?);
    let scores = (q.matmul(&k.transpose(2, 3)?.contiguous()?)? / ((d / n_head) as f64).sqrt())?;
    let future: Vec<u8> = (0..time * time).map(|i| u8::from(i % time > i / time)).collect();
    let future = Tensor::from_vec(future, (time, time), q.device())?.broadcast_as(scores.shape())?;
    let hidden = Tensor::new(f32::NEG_INFINITY, q.device())?.broadcast_as(scores.shape())?;
    let scores = future.where_cond(&hidden, &scores)?;
    let shifted = scores.broadcast_sub(&scores.detach().max_keepdim(D::Minus1)?)?.exp()?;
    let p = shifted.broadcast_div(&shifted.sum_keepdim(D::Minus1)?)?;
    p.matmul(&v)?.transpose(1, 2)?.reshape((batch, time, d))
}

/// See [`super::causal_attention_qkv`].
pub fn causal_attention_qkv(qkv: &Tensor, time: usize, n_head: usize) -> Result<Tensor> {
    let d = qkv.dim(D::Minus1)? / 3;
    let part = |i: usize| qkv.narrow(D::Minus1, i * d, d)?.reshape(((), time, d))?.contiguous();
    let mut shape = qkv.dims().to_vec();
    shape.pop();
    shape.push(d);
    causal_attention(&part(0)?, &part(1)?, &part(2)?, n_head)?.reshape(shape)
}

/// See [`super::embedding`].
pub fn embedding(ids: &Tensor, table: &Tensor) -> Result<Tensor> {
    let mut shape = ids.dims().to_vec();
    shape.push(table.dim(1)?);
    table.index_select(&ids.flatten_all()?, 0)?.reshape(shape)
}

/// See [`super::token_stats`].
pub fn token_stats(hidden: &Tensor, embedding: &Tensor, rows: &StatRows, entropy: bool) -> Result<TokenStats> {
    let logits = hidden.matmul(&embedding.t()?)?;
    let (n, v) = logits.dims2()?;
    let logits = match rows.forbidden {
        Some((token, masked)) => {
            let out: Vec<u8> = (0..n * v).map(|i| u8::from(masked[i / v] && (i % v) as u32 == token)).collect();
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
pub fn transformer_block(x: &Tensor, block: &Block) -> Result<Tensor> {
    let map = |p: &Projection, x: &Tensor| match &p.adapter {
        None => linear(x, p.w, Some(p.bias)),
        Some(adapter) => lora_linear(x, p.w, Some(p.bias), adapter),
    };
    let masked = |x: Tensor, mask: Option<&Tensor>| match mask {
        Some(mask) => x.mul(mask),
        None => Ok(x),
    };
    let h = layer_norm(x, block.ln_1.0, block.ln_1.1, block.eps)?;
    let h = causal_attention_qkv(&map(&block.c_attn, &h)?, block.time, block.n_head)?;
    let x = (x + masked(map(&block.attn_proj, &h)?, block.attn_mask)?)?;
    let h = layer_norm(&x, block.ln_2.0, block.ln_2.1, block.eps)?;
    let h = gelu_tanh(&map(&block.c_fc, &h)?)?;
    x + masked(map(&block.mlp_proj, &h)?, block.mlp_mask)?
}
