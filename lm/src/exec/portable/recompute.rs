//! A transformer block that keeps its input for the backward pass and nothing else: the backward pass runs the block
//! again. A tape of all its operations would keep every intermediate result of every layer.

use std::sync::Arc;

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Storage, Tensor, Var, bail};

use super::{custom_op, run_block};
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

    fn on_cpu(&self) -> Result<(CpuStorage, Shape)> {
        self.forward(|storage, layout| match storage {
            Storage::Cpu(storage) => storage.try_clone(layout),
            _ => bail!("{OTHER_DEVICE}"),
        })
    }

    #[cfg(feature = "cuda")]
    fn on_cuda(&self) -> Result<(candle_core::CudaStorage, Shape)> {
        self.forward(|storage, layout| match storage {
            Storage::Cuda(storage) => storage.try_clone(layout),
            _ => bail!("{OTHER_DEVICE}"),
        })
    }

    #[cfg(feature = "metal")]
    fn on_metal(&self) -> Result<(candle_core::MetalStorage, Shape)> {
        self.forward(|storage, layout| match storage {
            Storage::Metal(storage) => storage.try_clone(layout),
            _ => bail!("{OTHER_DEVICE}"),
        })
    }

    /// The gradient of the input; those of variables go to the accumulator.
    fn backward(&self, x: &Tensor, grad: &Tensor, _: bool) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let x = Var::from_tensor(&x.detach())?;
        let y = run_block(&x, &self.block, &self.pass)?;
        let mut grads = (y * grad)?.sum_all()?.backward()?;
        for variable in self.block.tensors().into_iter().filter(|tensor| tensor.is_variable()) {
            if let Some(grad) = grads.remove(variable) {
                accumulate_tensor(variable, grad)?;
            }
        }
        Ok((grads.remove(&x), None))
    }
}

const OTHER_DEVICE: &str = "the tensors of a block are on different devices";

custom_op!(RecomputedBlock, "temper-recomputed-block");
