//! Matrix products of slices in a chosen precision.

use crate::Precision;
use crate::dense::{self, Mat, Threads, WriteMode};
use crate::packed::{Bf16Pair, Destination, LhsPanels, LhsRows, RhsPanels, gemm_packed};

pub use crate::packed::LowRankUpdate;

/// A right operand packed once for many products, in their precision.
pub enum PackedRhs {
    F32(RhsPanels<f32>),
    /// Rounded to bf16, half the size.
    Bf16(RhsPanels<Bf16Pair>),
}

impl PackedRhs {
    /// Packs `b`, or the sum of `b` and a low-rank matrix.
    pub fn new(b: Mat, update: Option<LowRankUpdate>, precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32(RhsPanels::new(b, update)),
            Precision::Bf16 => Self::Bf16(RhsPanels::new(b, update)),
        }
    }

    pub fn cols(&self) -> usize {
        match self {
            Self::F32(b) => b.cols(),
            Self::Bf16(b) => b.cols(),
        }
    }
}

/// The right operand of a product.
#[derive(Clone, Copy)]
pub enum Rhs<'a> {
    /// Used once and read in place; the product is f32.
    InPlace(Mat<'a>),
    Packed(&'a PackedRhs),
}

/// `out [a.rows, b.cols] = or += scale * a b`. The rows of `a` must be contiguous.
pub fn matmul(out: &mut [f32], mode: WriteMode, scale: f32, a: Mat, b: Rhs, threads: Threads) {
    match b {
        Rhs::InPlace(b) => dense::gemm(out, mode, scale, a, b, threads),
        Rhs::Packed(b) => {
            let destination = Destination::new(out, a.rows(), b.cols(), b.cols());
            matmul_packed(destination, mode, None, scale, a, b, threads);
        }
    }
}

/// `out = or += a b + bias`, in the columns from `offset` on of rows of `stride` elements.
#[expect(clippy::too_many_arguments, reason = "a product and its destination")]
pub fn matmul_columns(
    out: &mut [f32],
    stride: usize,
    offset: usize,
    mode: WriteMode,
    bias: Option<&[f32]>,
    a: Mat,
    b: &PackedRhs,
    threads: Threads,
) {
    // A product without rows may have an offset beyond `out`.
    let destination = Destination::new(out.get_mut(offset..).unwrap_or_default(), a.rows(), b.cols(), stride);
    matmul_packed(destination, mode, bias, 1.0, a, b, threads);
}

fn matmul_packed(
    destination: Destination,
    mode: WriteMode,
    bias: Option<&[f32]>,
    scale: f32,
    a: Mat,
    b: &PackedRhs,
    threads: Threads,
) {
    match b {
        PackedRhs::F32(b) => gemm_packed(destination, mode, bias, scale, &LhsRows::new(a), b, threads),
        PackedRhs::Bf16(b) => {
            LhsPanels::with_packed(a, threads, |a| gemm_packed(destination, mode, bias, scale, a, b, threads))
        }
    }
}

/// `out [a.rows, b.rows] = or += scale * a b^T` in f32; the rows of both must be contiguous. `b` is read in place and
/// `a` is packed, which pays if `b` is by far the larger. Bit-for-bit equal to [`matmul`] with a packed transpose.
pub fn matmul_transposed_rhs(out: &mut [f32], mode: WriteMode, scale: f32, a: Mat, b: Mat, threads: Threads) {
    let destination = Destination::new(out, a.rows(), b.rows(), b.rows()).t();
    gemm_packed(destination, mode, None, scale, &LhsRows::new(b), &RhsPanels::new(a.t(), None), threads);
}

/// A new `a b`, of operands used only once.
pub fn matmul_unpacked(a: Mat, b: Mat, precision: Precision) -> Vec<f32> {
    match precision {
        Precision::F32 => dense::gemm_to_vec(1.0, a, b),
        Precision::Bf16 => {
            let mut out = vec![0.0; a.rows() * b.cols()];
            matmul_unpacked_into(&mut out, WriteMode::Overwrite, 1.0, a, b, precision);
            out
        }
    }
}

/// [`matmul`] with operands used only once, on all threads; `a` may be a transpose.
pub fn matmul_unpacked_into(out: &mut [f32], mode: WriteMode, scale: f32, a: Mat, b: Mat, precision: Precision) {
    match precision {
        Precision::F32 => dense::gemm(out, mode, scale, a, b, Threads::Pool),
        Precision::Bf16 => {
            matmul(out, mode, scale, a, Rhs::Packed(&PackedRhs::new(b, None, precision)), Threads::Pool);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha12Rng;

    use super::*;

    proptest! {
        #[test]
        fn a_rhs_read_in_place_gives_the_result_of_a_packed_one(
            (m, k, n) in (1..60usize, 0..70usize, 1..200usize),
            add: bool,
            pool: bool,
            seed: u64,
        ) {
            let mut rng = ChaCha12Rng::seed_from_u64(seed);
            let mut random = |len: usize| (0..len).map(|_| rng.random_range(-2.0..2.0)).collect::<Vec<f32>>();
            let (a, b, mut in_place) = (random(m * k), random(n * k), random(m * n));
            let mut packed = in_place.clone();
            let (a, b) = (Mat::new(&a, m, k), Mat::new(&b, n, k));
            let mode = if add { WriteMode::Add } else { WriteMode::Overwrite };
            let threads = if pool { Threads::Pool } else { Threads::One };
            matmul_transposed_rhs(&mut in_place, mode, 0.7, a, b, threads);
            let rhs = PackedRhs::new(b.t(), None, Precision::F32);
            matmul(&mut packed, mode, 0.7, a, Rhs::Packed(&rhs), threads);
            prop_assert_eq!(in_place, packed);
        }
    }

    #[test]
    fn a_large_rhs_read_in_place_is_split_between_threads() {
        let mut rng = ChaCha12Rng::seed_from_u64(7);
        // Two blocks along the inner dimension, and enough parts for tasks in both directions.
        let (m, k, n) = (101, 1500, 333);
        let mut random = |len: usize| (0..len).map(|_| rng.random_range(-2.0..2.0)).collect::<Vec<f32>>();
        let (a, b) = (random(m * k), random(n * k));
        let (a, b) = (Mat::new(&a, m, k), Mat::new(&b, n, k));
        let (mut in_place, mut packed) = (vec![0.0; m * n], vec![0.0; m * n]);
        matmul_transposed_rhs(&mut in_place, WriteMode::Overwrite, 1.0, a, b, Threads::Pool);
        let rhs = PackedRhs::new(b.t(), None, Precision::F32);
        matmul(&mut packed, WriteMode::Overwrite, 1.0, a, Rhs::Packed(&rhs), Threads::One);
        assert!(in_place == packed);
    }
}
