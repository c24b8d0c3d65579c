//! A linear layer with an optional LoRA adapter.

use candle_core::Tensor;
use rand_chacha::ChaCha12Rng;

use crate::lora::LoraAdapter;
use crate::{Result, kernels, random};

/// Dropout of one training forward pass. Adapters drop their input with the probability in their own `LoraConfig`;
/// embeddings and residual branches are dropped only if `model` is above 0.
#[derive(Debug, Clone)]
pub struct Dropout {
    /// Probability for embeddings and residual branches; 0 is off.
    pub model: f64,
    pub rng: ChaCha12Rng,
}

impl Dropout {
    /// Adapter dropout only.
    pub fn new(rng: ChaCha12Rng) -> Self {
        Self { model: 0.0, rng }
    }

    /// Adapter dropout, and model dropout of the given probability.
    pub fn with_model(model: f64, rng: ChaCha12Rng) -> Self {
        Self { model, rng }
    }
}

/// y = x W + b, W `[in, out]`, plus scale (x A^T) B^T if there is an adapter.
#[derive(Debug, Clone)]
pub(crate) struct Linear {
    /// The module's name in the model's file, without `.weight`.
    pub name: String,
    pub weight: Tensor,
    pub bias: Option<Tensor>,
    pub adapter: Option<LoraAdapter>,
}

impl Linear {
    /// The layer as an argument of kernels; `mask` drops entries of the adapter's input.
    pub fn kernel<'a>(&'a self, mask: Option<&'a kernels::DropoutMask>) -> kernels::LinearRef<'a> {
        let adapter = self.adapter.as_ref();
        let adapter = adapter.map(|lora| kernels::LoraRef { a: &lora.a, b: &lora.b, scale: lora.scale, mask });
        kernels::LinearRef { w: &self.weight, bias: self.bias.as_ref(), adapter }
    }

    /// The dropout mask of the adapter's input, `[rows, in]`; None without dropout or without an adapter that has it.
    pub fn adapter_dropout_mask(
        &self,
        rows: usize,
        dropout: Option<&mut Dropout>,
    ) -> Result<Option<kernels::DropoutMask>> {
        match (dropout, &self.adapter) {
            (Some(dropout), Some(adapter)) if adapter.dropout > 0.0 => {
                Ok(Some(random::dropout_mask(rows * self.weight.dim(0)?, adapter.dropout, &mut dropout.rng)))
            }
            _ => Ok(None),
        }
    }

    /// The weight with the adapter added, `[in, out]`, detached.
    pub fn merged_weight(&self) -> Result<Tensor> {
        let weight = self.weight.detach();
        let Some(adapter) = &self.adapter else { return Ok(weight) };
        let delta = (adapter.a.detach().t()?.matmul(&adapter.b.detach().t()?)? * adapter.scale)?;
        Ok((weight + delta)?)
    }
}
