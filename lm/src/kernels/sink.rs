//! A short way for the gradients of variables. candle adds each gradient to a fresh tensor of zeros: three passes over
//! every weight. Under [`backward`] the kernels leave the gradients of variables here instead, where they are added in
//! place. Knows no kernel.

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
    /// That of this thread's backward pass. While the pass waits for the pool, this thread may run another one from
    /// beginning to end, so whoever works on the sink takes it out meanwhile.
    static SINK: Cell<Option<Sink>> = const { Cell::new(None) };
}

/// The gradients of `loss` by every variable: [`Tensor::backward`], faster, and the only way through
/// [`super::transformer_block`].
pub fn backward(loss: &Tensor) -> Result<GradStore> {
    in_pool(|| into_sink(loss))
}

/// [`backward`] on this thread, which may be within another backward pass.
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

/// Hands a gradient on: a variable's to the sink if there is one, else back, as a tensor for candle.
pub fn deliver(to: &Tensor, grad: Vec<f32>) -> Result<Option<Tensor>> {
    let sink = if to.is_variable() { SINK.take() } else { None };
    let Some(mut sink) = sink else { return gradient(grad, to).map(Some) };
    sink.add(to, grad);
    SINK.set(Some(sink));
    Ok(None)
}

/// [`deliver`] for a kernel that candle cannot return this gradient to.
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
