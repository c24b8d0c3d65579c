//! A linear layer in GPT-2's layout, with an optional low-rank adapter; knows no model.

use candle_core::Tensor;
use rand_chacha::ChaCha12Rng;

use crate::{Result, kernels, random};

/// Dropout in force during one training forward pass. Adapters drop their input with the probability of their own
/// `LoraConfig`; the model's embeddings and residual branches only if asked to here.
#[derive(Debug, Clone)]
pub struct Dropout {
    /// Probability for embeddings and residual branches; 0 is off.
    pub model: f64,
    pub rng: ChaCha12Rng,
}

impl Dropout {
    /// Adapter dropout alone.
    pub fn new(rng: ChaCha12Rng) -> Self {
        Self { model: 0.0, rng }
    }

    /// Adapter dropout, and model dropout of the given probability.
    pub fn with_model(model: f64, rng: ChaCha12Rng) -> Self {
        Self { model, rng }
    }
}

/// `x` with entries zeroed with probability `p` and the rest scaled by 1/(1-p).
pub(crate) fn dropout(x: &Tensor, p: f64, rng: &mut ChaCha12Rng) -> Result<Tensor> {
    if p == 0.0 {
        return Ok(x.clone());
    }
    Ok(x.mul(&random::dropout_mask(x.dims(), p, rng)?)?)
}

/// y = x W + b, W `[in, out]`, plus scale (x A^T) B^T if there is an adapter.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    pub weight: Tensor,
    pub bias: Tensor,
    pub adapter: Option<LowRank>,
}

/// A `[r, in]`, B `[out, r]` as PEFT stores them; scale = alpha / r.
#[derive(Debug, Clone)]
pub(crate) struct LowRank {
    pub a: Tensor,
    pub b: Tensor,
    pub scale: f64,
    pub dropout: f64,
}

impl LowRank {
    /// A view that shares storage and tracks nothing.
    pub fn detached(&self) -> Self {
        Self { a: self.a.detach(), b: self.b.detach(), ..*self }
    }
}

impl Linear {
    /// `[.., in]` to `[.., out]`. The gradient of a frozen weight is never computed.
    pub fn forward(&self, x: &Tensor, drop: Option<&mut Dropout>) -> Result<Tensor> {
        let Some(adapter) = &self.adapter else {
            return Ok(kernels::linear(x, &self.weight, Some(&self.bias))?);
        };
        let mask = match drop {
            Some(drop) if adapter.dropout > 0.0 => {
                Some(random::dropout_mask(x.dims(), adapter.dropout, &mut drop.rng)?)
            }
            _ => None,
        };
        let adapter = kernels::Adapter { a: &adapter.a, b: &adapter.b, scale: adapter.scale, mask: mask.as_ref() };
        Ok(kernels::lora_linear(x, &self.weight, Some(&self.bias), &adapter)?)
    }

    /// The weight with the adapter's part added, `[in, out]`, detached.
    pub fn merged_weight(&self) -> Result<Tensor> {
        let weight = self.weight.detach();
        let Some(adapter) = &self.adapter else { return Ok(weight) };
        let delta = (adapter.a.detach().t()?.matmul(&adapter.b.detach().t()?)? * adapter.scale)?;
        Ok((weight + delta)?)
    }
}
