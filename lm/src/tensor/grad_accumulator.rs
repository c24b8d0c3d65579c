//! Accumulates gradients of variables in place. candle adds each gradient to a fresh tensor of zeros: three passes over
//! every weight. Under [`backward`] the kernels store the gradients of variables here instead.

use std::cell::Cell;
use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, TensorId, bail};
use temper_gemm::buffer::{CHUNK, for_each_chunk};
use temper_gemm::simd::add_assign;

use super::candle_interop::grad_tensor;
use crate::tensor::threads::in_pool;

/// The gradients summed so far.
#[derive(Default)]
struct GradAccumulator {
    /// Index in `sums` of each variable.
    index: HashMap<TensorId, usize>,
    sums: Vec<(Tensor, Vec<f32>)>,
    /// The sums of gradients that are tensors, with their variables.
    tensors: HashMap<TensorId, (Tensor, Tensor)>,
}

thread_local! {
    /// The accumulator of this thread's backward pass. While that pass waits for the pool, this thread may run another
    /// one from beginning to end, so code that works on the accumulator takes it out meanwhile.
    static ACCUMULATOR: Cell<Option<GradAccumulator>> = const { Cell::new(None) };
}

/// The gradients of `loss` with respect to every variable: [`Tensor::backward`], faster, and required for the blocks of
/// a model.
pub fn backward(loss: &Tensor) -> Result<GradStore> {
    in_pool(|| backward_with_accumulator(loss))
}

/// [`backward`] on this thread, possibly within another backward pass.
fn backward_with_accumulator(loss: &Tensor) -> Result<GradStore> {
    let before = ACCUMULATOR.replace(Some(GradAccumulator::default()));
    let grads = loss.backward();
    let accumulator = ACCUMULATOR.replace(before).unwrap_or_default();
    let mut grads = grads?;
    for (variable, sum) in accumulator.tensors.into_values() {
        let sum = match grads.remove(&variable) {
            Some(other) => (sum + other)?,
            None => sum,
        };
        grads.insert(&variable, sum);
    }
    for (variable, sum) in accumulator.sums {
        let sum = grad_tensor(sum, &variable)?;
        let sum = match grads.remove(&variable) {
            Some(other) => (sum + other)?,
            None => sum,
        };
        grads.insert(&variable, sum);
    }
    Ok(grads)
}

/// Adds a variable's gradient to the accumulator if there is one; otherwise returns it as a tensor for candle.
pub fn accumulate_or_return(to: &Tensor, grad: Vec<f32>) -> Result<Option<Tensor>> {
    let accumulator = if to.is_variable() { ACCUMULATOR.take() } else { None };
    let Some(mut accumulator) = accumulator else { return grad_tensor(grad, to).map(Some) };
    accumulator.add(to, grad);
    ACCUMULATOR.set(Some(accumulator));
    Ok(None)
}

/// [`accumulate_or_return`] for a gradient that the kernel cannot return to candle. Errors: there is no accumulator.
pub fn accumulate(to: &Tensor, grad: Vec<f32>) -> Result<()> {
    match accumulate_or_return(to, grad)? {
        None => Ok(()),
        Some(_) => bail!("{NEEDS_BACKWARD}"),
    }
}

/// [`accumulate`] for a gradient on any device.
pub fn accumulate_tensor(to: &Tensor, grad: Tensor) -> Result<()> {
    let Some(mut accumulator) = ACCUMULATOR.take() else { bail!("{NEEDS_BACKWARD}") };
    let sum = match accumulator.tensors.remove(&to.id()) {
        Some((_, sum)) => (sum + grad)?,
        None => grad,
    };
    accumulator.tensors.insert(to.id(), (to.clone(), sum));
    ACCUMULATOR.set(Some(accumulator));
    Ok(())
}

const NEEDS_BACKWARD: &str = "a transformer block's backward pass needs lm::backward(&loss) instead of loss.backward()";

impl GradAccumulator {
    fn add(&mut self, to: &Tensor, grad: Vec<f32>) {
        let index = *self.index.entry(to.id()).or_insert(self.sums.len());
        match self.sums.get_mut(index) {
            None => self.sums.push((to.clone(), grad)),
            Some((_, sum)) => {
                for_each_chunk(sum, CHUNK, |start, part| add_assign(part, &grad[start..start + part.len()]));
            }
        }
    }
}
