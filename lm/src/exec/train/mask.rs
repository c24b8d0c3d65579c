//! Dropout masks with one bit per element: a thirty-second of the memory that f32 factors would need between the
//! forward and the backward pass.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor};
use temper_gemm::buffer::{CHUNK, build_chunked};
use temper_gemm::simd;

/// Elements per word.
pub const BITS: usize = u32::BITS as usize;

/// Dropout's factor for each element of a matrix: 1 / (1 - p) if it is kept, else 0.
#[derive(Clone, Debug)]
pub struct DropoutMask {
    /// Element `i` is kept if bit `i % BITS` of word `i / BITS` is set.
    words: Arc<[u32]>,
    len: usize,
    keep_scale: f32,
}

impl DropoutMask {
    /// A mask of `len` elements with the factor `keep_scale` for elements that are kept. `fill(first, words)` writes
    /// the words from index `first` on, a multiple of `CHUNK / BITS`; bits beyond the last element are ignored.
    pub fn new(len: usize, keep_scale: f32, fill: impl Fn(usize, &mut [u32]) + Sync) -> Self {
        Self { words: build_chunked(len.div_ceil(BITS), CHUNK / BITS, fill).into(), len, keep_scale }
    }

    pub fn elements(&self) -> usize {
        self.len
    }

    /// `out = factors * x`; the first element of `x` is element `offset` of the mask.
    pub fn multiply(&self, out: &mut [f32], x: &[f32], offset: usize) {
        self.check(out, x, offset);
        multiply(out, x, &self.words, offset, self.keep_scale);
    }

    /// `sum += factors * x`; the first element of `x` is element `offset` of the mask.
    pub fn add_product(&self, sum: &mut [f32], x: &[f32], offset: usize) {
        self.check(sum, x, offset);
        add_product(sum, x, &self.words, offset, self.keep_scale);
    }

    fn check(&self, out: &[f32], x: &[f32], offset: usize) {
        assert!(
            out.len() == x.len() && offset + x.len() <= self.len,
            "the dropout mask covers the elements it is applied to"
        );
    }

    /// The factors as a tensor. Only bytes are copied to the device, each of which selects eight factors there.
    pub fn tensor(&self, shape: &[usize], device: &Device) -> Result<Tensor> {
        const BYTE: usize = u8::BITS as usize;
        let table = (0..BYTE << BYTE).map(|i| factor((i / BYTE) as u32, i % BYTE, self.keep_scale)).collect();
        let table = Tensor::from_vec(table, (1 << BYTE, BYTE), device)?;
        let bytes = self.words.iter().flat_map(|word| word.to_le_bytes()).map(u32::from);
        let bytes: Vec<u32> = bytes.take(self.len.div_ceil(BYTE)).collect();
        let n = bytes.len();
        let factors = table.index_select(&Tensor::from_vec(bytes, n, device)?, 0)?;
        factors.flatten_all()?.narrow(0, 0, self.len)?.reshape(shape)
    }
}

simd! {
    fn multiply(out: &mut [f32], x: &[f32], words: &[u32], offset: usize, keep_scale: f32) {
        combine(out, x, words, offset, keep_scale, |_, product| product);
    }
}

simd! {
    fn add_product(sum: &mut [f32], x: &[f32], words: &[u32], offset: usize, keep_scale: f32) {
        combine(sum, x, words, offset, keep_scale, |sum, product| sum + product);
    }
}

#[inline(always)]
fn combine(out: &mut [f32], x: &[f32], words: &[u32], offset: usize, keep_scale: f32, f: impl Fn(f32, f32) -> f32) {
    let (blocks, rest) = out.as_chunks_mut::<BITS>();
    let (x_blocks, x_rest) = x.as_chunks::<BITS>();
    let done = blocks.len() * BITS;
    for (b, (out, x)) in blocks.iter_mut().zip(x_blocks).enumerate() {
        let word = window(words, offset + b * BITS);
        for i in 0..BITS {
            out[i] = f(out[i], x[i] * factor(word, i, keep_scale));
        }
    }
    if !rest.is_empty() {
        let word = window(words, offset + done);
        for (i, (out, &x)) in rest.iter_mut().zip(x_rest).enumerate() {
            *out = f(*out, x * factor(word, i, keep_scale));
        }
    }
}

/// The `BITS` bits from element `offset` on.
#[inline(always)]
fn window(words: &[u32], offset: usize) -> u32 {
    let next = words.get(offset / BITS + 1).copied().unwrap_or_default();
    let both = u64::from(next) << BITS | u64::from(words[offset / BITS]);
    (both >> (offset % BITS)) as u32
}

#[inline(always)]
fn factor(word: u32, i: usize, keep_scale: f32) -> f32 {
    if word >> i & 1 == 1 { keep_scale } else { 0.0 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn a_part_of_a_matrix_is_masked_like_the_whole(words: [u32; 6], offset in 0usize..160, n in 0usize..160, len in 161usize..192) {
            let mask = DropoutMask::new(len, 1.25, |first, part| part.copy_from_slice(&words[first..first + part.len()]));
            let n = n.min(len - offset);
            let expected = |i: usize| if words[(offset + i) / 32] >> ((offset + i) % 32) & 1 == 1 { 1.25 } else { 0.0 };
            let x: Vec<f32> = (0..n).map(|i| i as f32 + 0.5).collect();
            let (mut out, mut sum) = (vec![f32::NAN; n], vec![7.0; n]);
            mask.multiply(&mut out, &x, offset);
            mask.add_product(&mut sum, &x, offset);
            let factors = mask.tensor(&[len], &Device::Cpu).unwrap().to_vec1::<f32>().unwrap();
            for i in 0..n {
                prop_assert_eq!(out[i], x[i] * expected(i));
                prop_assert_eq!(sum[i], 7.0 + x[i] * expected(i));
                prop_assert_eq!(factors[offset + i], expected(i));
            }
        }
    }

    #[test]
    #[should_panic(expected = "dropout mask covers")]
    fn elements_beyond_the_mask_are_refused() {
        DropoutMask::new(40, 2.0, |_, _| {}).multiply(&mut [0.0; 9], &[0.0; 9], 32);
    }
}
