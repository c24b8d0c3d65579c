//! Accumulates gradients of variables in place. candle adds each gradient to a fresh tensor of zeros: three passes over
//! every weight. Under [`backward`] the kernels store the gradients of variables here instead.

use std::cell::Cell;
use std::collections::HashMap;

use candle_core::backprop::GradStore;
use candle_core::{Result, Tensor, TensorId, bail};

use super::buffer::{CHUNK, for_chunks};
use super::glue::gradient;
use super::simd::add_assign;
use crate::threads::in_pool;

#[derive(Default)]
struct Sink {
    place: HashMap<TensorId, usize>,
    sums: Vec<(Tensor, Vec<f32>)>,
}

thread_local! {
    /// The sink of this thread's backward pass. While that pass waits for the pool, this thread may run another one
    /// from beginning to end, so code that works on the sink takes it out meanwhile.
    static SINK: Cell<Option<Sink>> = const { Cell::new(None) };
}

/// The gradients of `loss` with respect to every variable: [`Tensor::backward`], faster, and required for
/// [`super::transformer_block`].
pub fn backward(loss: &Tensor) -> Result<GradStore> {
    in_pool(|| into_sink(loss))
}

/// [`backward`] on this thread, possibly within another backward pass.
fn into_sink(loss: &Tensor) -> Result<GradStore> {
    let before = SINK.replace(Some(Sink::default()));
    let grads = loss.backward();
    let sink = SINK.replace(before).unwrap_or_default();
    let mut grads = grads?;
    for (variable, sum) in sink.sums {
        let sum = gradient(sum, &variable)?;
        let sum = match grads.remove(&variable) {
            Some(other) => (sum + other)?,
            None => sum,
        };
        grads.insert(&variable, sum);
    }
    Ok(grads)
}

/// Adds a variable's gradient to the sink if there is one; otherwise returns it as a tensor for candle.
pub fn deliver(to: &Tensor, grad: Vec<f32>) -> Result<Option<Tensor>> {
    let sink = if to.is_variable() { SINK.take() } else { None };
    let Some(mut sink) = sink else { return gradient(grad, to).map(Some) };
    sink.add(to, grad);
    SINK.set(Some(sink));
    Ok(None)
}

/// [`deliver`] for a gradient that the kernel cannot return to candle.
pub fn deliver_aside(to: &Tensor, grad: Vec<f32>) -> Result<()> {
    match deliver(to, grad)? {
        None => Ok(()),
        Some(_) => bail!("a transformer block's backward pass needs lm::backward(&loss) instead of loss.backward()"),
    }
}

impl Sink {
    fn add(&mut self, to: &Tensor, grad: Vec<f32>) {
        let place = *self.place.entry(to.id()).or_insert(self.sums.len());
        match self.sums.get_mut(place) {
            None => self.sums.push((to.clone(), grad)),
            Some((_, sum)) => {
                for_chunks(sum, CHUNK, |start, part| add_assign(part, &grad[start..start + part.len()]));
            }
        }
    }
}
