//! Dropout masks with one bit per element: a thirty-second of the memory that f32 factors would need between the
//! forward and the backward pass.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor};

use super::buffer::{CHUNK, build};
use super::simd::simd;

/// Elements per word.
pub const BITS: usize = u32::BITS as usize;

/// Dropout's factor for each element of a matrix: 1 / (1 - p) if it is kept, else 0.
#[derive(Clone, Debug)]
pub struct Mask {
    /// Element `i` is kept if bit `i % BITS` of word `i / BITS` is set.
    words: Arc<[u32]>,
    len: usize,
    kept: f32,
}

impl Mask {
    /// A mask of `len` elements with the factor `kept` for elements that are kept. `fill(first, words)` writes the
    /// words from index `first` on, a multiple of `CHUNK / BITS`; bits beyond the last element are ignored.
    pub fn new(len: usize, kept: f32, fill: impl Fn(usize, &mut [u32]) + Sync) -> Self {
        Self { words: build(len.div_ceil(BITS), CHUNK / BITS, fill).into(), len, kept }
    }

    pub fn elements(&self) -> usize {
        self.len
    }

    /// `out = factors * x`; the first element of `x` is element `at` of the mask.
    pub fn multiply(&self, out: &mut [f32], x: &[f32], at: usize) {
        self.check(out, x, at);
        multiply(out, x, &self.words, at, self.kept);
    }

    /// `sum += factors * x`; the first element of `x` is element `at` of the mask.
    pub fn add_product(&self, sum: &mut [f32], x: &[f32], at: usize) {
        self.check(sum, x, at);
        add_product(sum, x, &self.words, at, self.kept);
    }

    fn check(&self, out: &[f32], x: &[f32], at: usize) {
        assert!(out.len() == x.len() && at + x.len() <= self.len, "a mask covers what it is applied to");
    }

    /// The factors as a tensor.
    pub fn tensor(&self, shape: &[usize]) -> Result<Tensor> {
        let factors = (0..self.len).map(|i| factor(window(&self.words, i), 0, self.kept)).collect();
        Tensor::from_vec(factors, shape, &Device::Cpu)
    }
}

simd! {
    fn multiply(out: &mut [f32], x: &[f32], words: &[u32], at: usize, kept: f32) {
        combine(out, x, words, at, kept, |_, product| product);
    }
}

simd! {
    fn add_product(sum: &mut [f32], x: &[f32], words: &[u32], at: usize, kept: f32) {
        combine(sum, x, words, at, kept, |sum, product| sum + product);
    }
}

#[inline(always)]
fn combine(out: &mut [f32], x: &[f32], words: &[u32], at: usize, kept: f32, f: impl Fn(f32, f32) -> f32) {
    let (blocks, rest) = out.as_chunks_mut::<BITS>();
    let (x_blocks, x_rest) = x.as_chunks::<BITS>();
    let done = blocks.len() * BITS;
    for (b, (out, x)) in blocks.iter_mut().zip(x_blocks).enumerate() {
        let word = window(words, at + b * BITS);
        for i in 0..BITS {
            out[i] = f(out[i], x[i] * factor(word, i, kept));
        }
    }
    if !rest.is_empty() {
        let word = window(words, at + done);
        for (i, (out, &x)) in rest.iter_mut().zip(x_rest).enumerate() {
            *out = f(*out, x * factor(word, i, kept));
        }
    }
}

/// The `BITS` bits from element `at` on.
#[inline(always)]
fn window(words: &[u32], at: usize) -> u32 {
    let next = words.get(at / BITS + 1).copied().unwrap_or_default();
    let both = u64::from(next) << BITS | u64::from(words[at / BITS]);
    (both >> (at % BITS)) as u32
}

#[inline(always)]
fn factor(word: u32, i: usize, kept: f32) -> f32 {
    if word >> i & 1 == 1 { kept } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_part_of_a_matrix_is_masked_as_in_the_whole(words: [u32; 6], at in 0usize..160, n in 0usize..160, len in 161usize..192) {
            let mask = Mask::new(len, 1.25, |first, part| part.copy_from_slice(&words[first..first + part.len()]));
            let n = n.min(len - at);
            let expected = |i: usize| if words[(at + i) / 32] >> ((at + i) % 32) & 1 == 1 { 1.25 } else { 0.0 };
            let x: Vec<f32> = (0..n).map(|i| i as f32 + 0.5).collect();
            let (mut out, mut sum) = (vec![f32::NAN; n], vec![7.0; n]);
            mask.multiply(&mut out, &x, at);
            mask.add_product(&mut sum, &x, at);
            let factors = mask.tensor(&[len]).unwrap().to_vec1::<f32>().unwrap();
            for i in 0..n {
                prop_assert_eq!(out[i], x[i] * expected(i));
                prop_assert_eq!(sum[i], 7.0 + x[i] * expected(i));
                prop_assert_eq!(factors[at + i], expected(i));
            }
        }
    }

    #[test]
    #[should_panic(expected = "a mask covers")]
    fn more_than_a_mask_covers_is_refused() {
        Mask::new(40, 2.0, |_, _| {}).multiply(&mut [0.0; 9], &[0.0; 9], 32);
    }
}
