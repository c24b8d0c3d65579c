//! Parts of a model that keep their input for the backward pass and nothing else: the backward pass runs the part again. A tape of
//! all operations would keep every intermediate result of every layer.

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Storage, Tensor, Var, bail};

use super::custom_op;
use crate::tensor::grad_accumulator::accumulate_tensor;

/// Computes a part's output; with a tape if gradients are wanted, else with frozen weights.
pub type Run = dyn Fn(&Tensor, Tape) -> Result<Tensor> + Send + Sync;

/// Whether a run of a part records its operations.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tape {
    Off,
    On,
}

/// A part as an operation on its input.
struct Recomputed {
    x: Tensor,
    /// The part's weights that are trained.
    variables: Vec<Tensor>,
    run: Box<Run>,
}

/// `run` of `x` and of the variables among `weights`.
pub fn recomputed<'t>(
    x: &Tensor,
    weights: impl IntoIterator<Item = &'t Tensor>,
    run: impl Fn(&Tensor, Tape) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor> {
    let variables: Vec<Tensor> = weights.into_iter().filter(|tensor| tensor.is_variable()).cloned().collect();
    // Through a variable candle learns that the part has gradients even if its input has none.
    let first = variables.first().cloned();
    let op = Recomputed { x: x.detach(), variables, run: Box::new(run) };
    match first {
        Some(variable) => x.apply_op2(&variable, op),
        None => x.apply_op1(op),
    }
}

impl Recomputed {
    /// The output without any tape; `copy` takes it out of its tensor.
    fn forward<S>(&self, copy: impl Fn(&Storage, &Layout) -> Result<S>) -> Result<(S, Shape)> {
        let y = (self.run)(&self.x, Tape::Off)?.contiguous()?;
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

    /// The gradients of the input and of the first variable; those of the others go to the accumulator.
    fn backward(&self, x: &Tensor, grad: &Tensor, _: bool) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let x = Var::from_tensor(&x.detach())?;
        let y = (self.run)(&x, Tape::On)?;
        let mut grads = (y * grad)?.sum_all()?.backward()?;
        let mut of_variables = self.variables.iter().map(|variable| (variable, grads.remove(variable)));
        let first = of_variables.next().and_then(|(_, grad)| grad);
        for (variable, grad) in of_variables {
            if let Some(grad) = grad {
                accumulate_tensor(variable, grad)?;
            }
        }
        Ok((grads.remove(&x), first))
    }
}

const OTHER_DEVICE: &str = "the tensors of a part of the model are on different devices";

custom_op!(Recomputed, "temper-recomputed");
