//! Weights drawn from a seeded generator; knows no model.

use candle_core::{Device, Tensor};
use rand::Rng;
use rand_chacha::ChaCha12Rng;

use crate::Result;

/// Normal values of mean 0: Box-Muller in f64, two from each pair of uniforms.
pub(crate) fn normal(shape: &[usize], std: f64, rng: &mut ChaCha12Rng) -> Result<Tensor> {
    let n: usize = shape.iter().product();
    let mut values = Vec::with_capacity(n + 1);
    while values.len() < n {
        // 1 - u lies in (0, 1], so the logarithm is finite.
        let radius = std * (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt();
        let angle = std::f64::consts::TAU * rng.random::<f64>();
        values.push((radius * angle.cos()) as f32);
        values.push((radius * angle.sin()) as f32);
    }
    values.truncate(n);
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// Uniform values in (-bound, bound).
pub(crate) fn uniform(shape: &[usize], bound: f64, rng: &mut ChaCha12Rng) -> Result<Tensor> {
    let n: usize = shape.iter().product();
    let values: Vec<f32> = (0..n).map(|_| (bound * (2.0 * rng.random::<f64>() - 1.0)) as f32).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// A dropout mask: 1/(1-p) with probability 1-p, else 0.
pub(crate) fn dropout_mask(shape: &[usize], p: f64, rng: &mut ChaCha12Rng) -> Result<Tensor> {
    let n: usize = shape.iter().product();
    let keep = (1.0 / (1.0 - p)) as f32;
    // A 32-bit draw is kept if it is at least p 2^32: exact to 2^-32 and a quarter of the cost of f64 draws.
    let threshold = (p * 4_294_967_296.0) as u64;
    let values: Vec<f32> =
        (0..n).map(|_| if u64::from(rng.random::<u32>()) >= threshold { keep } else { 0.0 }).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}
