//! A linear layer with an optional LoRA adapter.

use candle_core::Tensor;
use rand_chacha::ChaCha12Rng;

use crate::Result;
use crate::exec::train::DropoutMask;
use crate::model::adapter::LoraAdapter;
use crate::tensor::random;

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

/// y = x W + b, W `[in, out]`, plus scale (x A') B' if there is an adapter. With an adapter, W and b are frozen.
#[derive(Debug, Clone)]
pub struct Linear {
    /// The module's name in the model's file, without `.weight`.
    pub name: String,
    pub weight: Tensor,
    pub bias: Option<Tensor>,
    pub adapter: Option<LoraAdapter>,
}

impl Linear {
    /// The tensors, those of the adapter included.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let adapter = self.adapter.iter().flat_map(|adapter| [&adapter.a, &adapter.b]);
        [&self.weight].into_iter().chain(&self.bias).chain(adapter)
    }

    /// The layer with weight and bias replaced by `f` of them, without adapter.
    pub fn try_map(self, mut f: impl FnMut(Tensor) -> Result<Tensor>) -> Result<Self> {
        Ok(Self { name: self.name, weight: f(self.weight)?, bias: self.bias.map(f).transpose()?, adapter: None })
    }

    /// A frozen view that shares storage, with the adapter.
    pub fn frozen(&self) -> Self {
        Self {
            name: self.name.clone(),
            weight: self.weight.detach(),
            bias: self.bias.as_ref().map(Tensor::detach),
            adapter: self.adapter.as_ref().map(LoraAdapter::frozen),
        }
    }

    /// The dropout mask of the adapter's input, `[rows, in]`; None without dropout or without an adapter that has it.
    pub fn draw_mask(&self, rows: usize, dropout: &mut Option<&mut Dropout>) -> Result<Option<DropoutMask>> {
        match (dropout, &self.adapter) {
            (Some(dropout), Some(adapter)) if adapter.dropout > 0.0 => {
                Ok(Some(random::dropout_mask(rows * self.weight.dim(0)?, adapter.dropout, &mut dropout.rng)))
            }
            _ => Ok(None),
        }
    }

    /// A frozen layer with the adapter added into the weight.
    pub fn merged(self) -> Result<Self> {
        let frozen = self.frozen();
        let Some(LoraAdapter { a, b, scale, .. }) = frozen.adapter else { return Ok(frozen) };
        let weight = (frozen.weight + (a.t()?.matmul(&b.t()?)? * scale)?)?;
        Ok(Self { weight, adapter: None, ..frozen })
    }
}
