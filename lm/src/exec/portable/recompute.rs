//! A transformer block that keeps its input for the backward pass and nothing else: the backward pass runs the block
//! again. A tape of all its operations would keep every intermediate result of every layer.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Storage, Tensor, Var, bail};

use super::run_block;
use crate::exec::train::BlockPass;
use crate::model::block::Block;
use crate::tensor::grad_accumulator::accumulate_tensor;

/// The block as an operation on its input.
pub struct RecomputedBlock {
    x: Tensor,
    block: Arc<Block>,
    pass: BlockPass,
}

impl RecomputedBlock {
    pub fn new(x: &Tensor, block: Arc<Block>, pass: BlockPass) -> Self {
        Self { x: x.detach(), block, pass }
    }

    /// A variable of the block, through which candle learns that the block has gradients even if its input has none.
    pub fn variable(&self) -> Option<Tensor> {
        self.block.tensors().into_iter().find(|tensor| tensor.is_variable()).cloned()
    }

    /// The output without any tape; `copy` takes it out of its tensor.
    fn forward<S>(&self, copy: impl Fn(&Storage, &Layout) -> Result<S>) -> Result<(S, Shape)> {
        let y = run_block(&self.x, &self.block.frozen(), &self.pass)?.contiguous()?;
        let (storage, layout) = y.storage_and_layout();
        Ok((copy(&storage, layout)?, layout.shape().clone()))
    }

    /// The gradient of the input; those of variables go to the accumulator.
    fn backward(&self, x: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let x = Var::from_tensor(&x.detach())?;
        let y = run_block(&x, &self.block, &self.pass)?;
        let mut grads = (y * grad)?.sum_all()?.backward()?;
        for variable in self.block.tensors().into_iter().filter(|tensor| tensor.is_variable()) {
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
