//! Random weights and dropout masks from a seeded generator.

use candle_core::Tensor;
use rand::Rng;
use rand_chacha::ChaCha12Rng;
use temper_gemm::simd;

use crate::Result;
use crate::exec::train::{BITS, DropoutMask};
use crate::tensor::device::device;
use crate::tensor::philox;

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
    Ok(Tensor::from_vec(values, shape, &device())?)
}

/// Uniform values in (-bound, bound).
pub(crate) fn uniform(shape: &[usize], bound: f64, rng: &mut ChaCha12Rng) -> Result<Tensor> {
    let n: usize = shape.iter().product();
    let values: Vec<f32> = (0..n).map(|_| (bound * (2.0 * rng.random::<f64>() - 1.0)) as f32).collect();
    Ok(Tensor::from_vec(values, shape, &device())?)
}

/// A dropout mask that keeps each of `len` elements with probability 1 - p. Takes a key from `rng`; element i uses draw
/// i of that key, so the result does not depend on threads.
pub(crate) fn dropout_mask(len: usize, p: f64, rng: &mut ChaCha12Rng) -> DropoutMask {
    /// Blocks of draws computed at a time.
    const BLOCKS: usize = 4;
    const WORDS: usize = BLOCKS * philox::DRAWS / BITS;
    let keep = (1.0 / (1.0 - p)) as f32;
    // An element is kept if its 32-bit draw is at least p 2^32: exact to 2^-32.
    let threshold = (p * 4_294_967_296.0) as u32;
    let key: [u32; 2] = rng.random();
    DropoutMask::new(len, keep, |first, words| {
        let mut draws = [[0; philox::DRAWS]; BLOCKS];
        for (i, words) in words.chunks_mut(WORDS).enumerate() {
            philox::fill(&mut draws, key, ((first + i * WORDS) * BITS) as u64);
            select(words, draws.as_flattened(), threshold);
        }
    })
}

simd! {
    /// Sets the bits of the draws that reach the threshold.
    fn select(words: &mut [u32], draws: &[u32], threshold: u32) {
        for (word, draws) in words.iter_mut().zip(draws.as_chunks::<BITS>().0) {
            *word = 0;
            for (i, &draw) in draws.iter().enumerate() {
                *word |= u32::from(draw >= threshold) << i;
            }
        }
    }
}
