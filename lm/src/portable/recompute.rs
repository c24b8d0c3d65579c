//! A transformer block that keeps its input for the backward pass and nothing else: the backward pass runs the block
//! again. A tape of all its operations would keep every intermediate result of every layer.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Storage, Tensor, Var, bail};

use super::run_block;
use crate::Precision;
use crate::kernels::grad_accumulator::accumulate_tensor;
use crate::kernels::{Activation, BlockArgs, DropoutMask, Heads, LinearRef, LoraRef, NormRef, Rotary};

/// A linear layer's tensors; see [`LinearRef`].
struct OwnedLinear {
    w: Tensor,
    bias: Option<Tensor>,
    /// `lora_A`, `lora_B`, scale and dropout.
    adapter: Option<(Tensor, Tensor, f64, Option<DropoutMask>)>,
}

impl OwnedLinear {
    fn new(linear: &LinearRef) -> Self {
        let adapter = linear.adapter.as_ref();
        Self {
            w: linear.w.clone(),
            bias: linear.bias.cloned(),
            adapter: adapter.map(|lora| (lora.a.clone(), lora.b.clone(), lora.scale, lora.mask.cloned())),
        }
    }

    fn as_ref(&self) -> LinearRef<'_> {
        let adapter = self.adapter.as_ref();
        let adapter = adapter.map(|(a, b, scale, mask)| LoraRef { a, b, scale: *scale, mask: mask.as_ref() });
        LinearRef { w: &self.w, bias: self.bias.as_ref(), adapter }
    }

    /// With every tensor replaced by `f` of it.
    fn map(&self, f: &impl Fn(&Tensor) -> Tensor) -> Self {
        let adapter = self.adapter.as_ref();
        Self {
            w: f(&self.w),
            bias: self.bias.as_ref().map(f),
            adapter: adapter.map(|(a, b, scale, mask)| (f(a), f(b), *scale, mask.clone())),
        }
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let adapter = self.adapter.iter().flat_map(|(a, b, ..)| [a, b]);
        [&self.w].into_iter().chain(&self.bias).chain(adapter)
    }
}

/// The weights of a block.
struct Weights {
    norm_1: (Tensor, Option<Tensor>),
    norm_2: Option<(Tensor, Option<Tensor>)>,
    qkv: Vec<OwnedLinear>,
    attn_out: OwnedLinear,
    up: Vec<OwnedLinear>,
    down: OwnedLinear,
}

impl Weights {
    fn map(&self, f: &impl Fn(&Tensor) -> Tensor) -> Self {
        let norm = |(w, b): &(Tensor, Option<Tensor>)| (f(w), b.as_ref().map(f));
        let group = |linears: &[OwnedLinear]| linears.iter().map(|linear| linear.map(f)).collect();
        Self {
            norm_1: norm(&self.norm_1),
            norm_2: self.norm_2.as_ref().map(norm),
            qkv: group(&self.qkv),
            attn_out: self.attn_out.map(f),
            up: group(&self.up),
            down: self.down.map(f),
        }
    }

    fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let norms = [Some(&self.norm_1), self.norm_2.as_ref()].into_iter().flatten();
        let norms = norms.flat_map(|(w, b)| [w].into_iter().chain(b));
        let linears = self.qkv.iter().chain([&self.attn_out]).chain(&self.up).chain([&self.down]);
        norms.chain(linears.flat_map(OwnedLinear::tensors))
    }
}

/// The block as an operation on its input.
pub struct RecomputedBlock {
    x: Tensor,
    weights: Weights,
    activation: Activation,
    precision: Precision,
    attn_dropout: Option<DropoutMask>,
    mlp_dropout: Option<DropoutMask>,
    rotary: Option<Arc<Rotary>>,
    eps: f64,
    heads: Heads,
    time: usize,
    output_rows: Option<Vec<u32>>,
}

impl RecomputedBlock {
    pub fn new(x: &Tensor, block: &BlockArgs) -> Self {
        let norm = |norm: &NormRef| (norm.weight.clone(), norm.bias.cloned());
        let group = |linears: &[LinearRef]| linears.iter().map(OwnedLinear::new).collect();
        Self {
            x: x.detach(),
            weights: Weights {
                norm_1: norm(&block.norm_1),
                norm_2: block.norm_2.as_ref().map(norm),
                qkv: group(&block.qkv),
                attn_out: OwnedLinear::new(&block.attn_out),
                up: group(&block.up),
                down: OwnedLinear::new(&block.down),
            },
            activation: block.activation,
            precision: block.precision,
            attn_dropout: block.attn_dropout.cloned(),
            mlp_dropout: block.mlp_dropout.cloned(),
            rotary: block.rotary.clone(),
            eps: block.eps,
            heads: block.heads,
            time: block.time,
            output_rows: block.output_rows.map(<[u32]>::to_vec),
        }
    }

    /// A variable of the block, through which candle learns that the block has gradients even if its input has none.
    pub fn variable(&self) -> Option<Tensor> {
        self.weights.tensors().find(|tensor| tensor.is_variable()).cloned()
    }

    fn run(&self, x: &Tensor, weights: &Weights) -> Result<Tensor> {
        fn norm((weight, bias): &(Tensor, Option<Tensor>)) -> NormRef<'_> {
            NormRef { weight, bias: bias.as_ref() }
        }
        let block = BlockArgs {
            norm_1: norm(&weights.norm_1),
            qkv: weights.qkv.iter().map(OwnedLinear::as_ref).collect(),
            attn_out: weights.attn_out.as_ref(),
            norm_2: weights.norm_2.as_ref().map(norm),
            up: weights.up.iter().map(OwnedLinear::as_ref).collect(),
            down: weights.down.as_ref(),
            activation: self.activation,
            precision: self.precision,
            attn_dropout: self.attn_dropout.as_ref(),
            mlp_dropout: self.mlp_dropout.as_ref(),
            rotary: self.rotary.clone(),
            eps: self.eps,
            heads: self.heads,
            time: self.time,
            output_rows: self.output_rows.as_deref(),
        };
        run_block(x, &block)
    }

    /// The output without any tape; `copy` takes it out of its tensor.
    fn forward<S>(&self, copy: impl Fn(&Storage, &Layout) -> Result<S>) -> Result<(S, Shape)> {
        let y = self.run(&self.x, &self.weights.map(&Tensor::detach))?.contiguous()?;
        let (storage, layout) = y.storage_and_layout();
        Ok((copy(&storage, layout)?, layout.shape().clone()))
    }

    /// The gradient of the input; those of variables go to the accumulator.
    fn backward(&self, x: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let x = Var::from_tensor(&x.detach())?;
        let y = self.run(&x, &self.weights)?;
        let mut grads = (y * grad)?.sum_all()?.backward()?;
        for variable in self.weights.tensors().filter(|tensor| tensor.is_variable()) {
            if let Some(grad) = grads.remove(variable) {
                accumulate_tensor(variable, grad)?;
            }
        }
        Ok(grads.remove(&x))
    }
}

fn copy_cpu(storage: &Storage, layout: &Layout) -> Result<CpuStorage> {
    match storage {
        Storage::Cpu(storage) => storage.try_clone(layout),
        _ => bail!("the tensors of a block are on different devices"),
    }
}

#[cfg(feature = "cuda")]
fn copy_cuda(storage: &Storage, layout: &Layout) -> Result<candle_core::CudaStorage> {
    match storage {
        Storage::Cuda(storage) => storage.try_clone(layout),
        _ => bail!("the tensors of a block are on different devices"),
    }
}

#[cfg(feature = "metal")]
fn copy_metal(storage: &Storage, layout: &Layout) -> Result<candle_core::MetalStorage> {
    match storage {
        Storage::Metal(storage) => storage.try_clone(layout),
        _ => bail!("the tensors of a block are on different devices"),
    }
}

const NAME: &str = "temper-recomputed-block";

impl CustomOp1 for RecomputedBlock {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward(copy_cpu)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(&self, _: &candle_core::CudaStorage, _: &Layout) -> Result<(candle_core::CudaStorage, Shape)> {
        self.forward(copy_cuda)
    }

    #[cfg(feature = "metal")]
    fn metal_fwd(&self, _: &candle_core::MetalStorage, _: &Layout) -> Result<(candle_core::MetalStorage, Shape)> {
        self.forward(copy_metal)
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        self.backward(x, grad)
    }
}

impl CustomOp2 for RecomputedBlock {
    fn name(&self) -> &'static str {
        NAME
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward(copy_cpu)
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _: &candle_core::CudaStorage,
        _: &Layout,
        _: &candle_core::CudaStorage,
        _: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        self.forward(copy_cuda)
    }

    #[cfg(feature = "metal")]
    fn metal_fwd(
        &self,
        _: &candle_core::MetalStorage,
        _: &Layout,
        _: &candle_core::MetalStorage,
        _: &Layout,
    ) -> Result<(candle_core::MetalStorage, Shape)> {
        self.forward(copy_metal)
    }

    fn bwd(&self, x: &Tensor, _: &Tensor, _: &Tensor, grad: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        Ok((self.backward(x, grad)?, None))
    }
}
