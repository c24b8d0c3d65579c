//! Weights drawn from a seeded generator; knows no model.

use candle_core::{Device, Tensor};
use rand::Rng;
use rand_chacha::ChaCha12Rng;

use crate::kernels::buffer::{CHUNK, build};
use crate::kernels::simd::simd;
use crate::{Result, philox};

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

/// A dropout mask: 1/(1-p) with probability 1-p, else 0. Takes a key from `rng`, under which element i is draw i: threads share
/// the work and change nothing.
pub(crate) fn dropout_mask(shape: &[usize], p: f64, rng: &mut ChaCha12Rng) -> Result<Tensor> {
    /// Draws that are made before they are used.
    const BLOCKS: usize = 4;
    let n: usize = shape.iter().product();
    let keep = (1.0 / (1.0 - p)) as f32;
    // A 32-bit draw is kept if it is at least p 2^32: exact to 2^-32.
    let threshold = (p * 4_294_967_296.0) as u32;
    let key: [u32; 2] = rng.random();
    let values = build(n, CHUNK, |start, chunk| {
        let mut draws = [[0; philox::DRAWS]; BLOCKS];
        for (i, values) in chunk.chunks_mut(BLOCKS * philox::DRAWS).enumerate() {
            philox::fill(&mut draws, key, (start + i * BLOCKS * philox::DRAWS) as u64);
            select(values, draws.as_flattened(), threshold, keep);
        }
    });
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

simd! {
    fn select(values: &mut [f32], draws: &[u32], threshold: u32, keep: f32) {
        for (value, &draw) in values.iter_mut().zip(draws) {
            *value = if draw >= threshold { keep } else { 0.0 };
        }
    }
}
