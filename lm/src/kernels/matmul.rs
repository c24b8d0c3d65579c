//! Matrix products of slices in a chosen precision.

use super::gemm::{self, Into, Mat, Threads};
use super::panels::{Pair, Right, Rounded, Rows, Target, product};
use crate::Precision;

pub use super::panels::Plus;

/// A right factor packed once for many products, in their precision.
pub enum Prepared {
    F32(Right<f32>),
    /// Rounded to bf16, half the size.
    Bf16(Right<Pair>),
}

impl Prepared {
    /// Packs `b`, or the sum of `b` and a low-rank matrix.
    pub fn new(b: Mat, plus: Option<Plus>, precision: Precision) -> Self {
        match precision {
            Precision::F32 => Self::F32(Right::new(b, plus)),
            Precision::Bf16 => Self::Bf16(Right::new(b, plus)),
        }
    }

    pub fn cols(&self) -> usize {
        match self {
            Self::F32(b) => b.cols(),
            Self::Bf16(b) => b.cols(),
        }
    }
}

/// The right factor of a product.
#[derive(Clone, Copy)]
pub enum Factor<'a> {
    /// Used once and read in place; the product is f32.
    Once(Mat<'a>),
    Prepared(&'a Prepared),
}

/// `out [a.rows, b.cols] = or += scale * a b`. The rows of `a` must be contiguous.
pub fn multiply(out: &mut [f32], into: Into, scale: f32, a: Mat, b: Factor, threads: Threads) {
    match b {
        Factor::Once(b) => gemm::gemm(out, into, scale, a, b, threads),
        Factor::Prepared(b) => {
            let target = Target::new(out, a.rows(), b.cols(), b.cols());
            by_prepared(target, into, None, scale, a, b, threads);
        }
    }
}

/// `out = or += a b + bias`, in the columns from `offset` on of rows of `stride` elements.
#[expect(clippy::too_many_arguments, reason = "a product and where it goes")]
pub fn multiply_columns(
    out: &mut [f32],
    stride: usize,
    offset: usize,
    into: Into,
    bias: Option<&[f32]>,
    a: Mat,
    b: &Prepared,
    threads: Threads,
) {
    // A product without rows may have an offset beyond `out`.
    let target = Target::new(out.get_mut(offset..).unwrap_or_default(), a.rows(), b.cols(), stride);
    by_prepared(target, into, bias, 1.0, a, b, threads);
}

fn by_prepared(target: Target, into: Into, bias: Option<&[f32]>, scale: f32, a: Mat, b: &Prepared, threads: Threads) {
    match b {
        Prepared::F32(b) => product(target, into, bias, scale, &Rows::of(a), b, threads),
        Prepared::Bf16(b) => Rounded::with(a, threads, |a| product(target, into, bias, scale, a, b, threads)),
    }
}

/// `out [a.rows, b.rows] = or += scale * a b^T` in f32; the rows of both must be contiguous. `b` is read in place and
/// `a` is packed, which pays if `b` is by far the larger. Bit-for-bit equal to [`multiply`] with a prepared transpose.
pub fn multiply_by_rows(out: &mut [f32], into: Into, scale: f32, a: Mat, b: Mat, threads: Threads) {
    let target = Target::new(out, a.rows(), b.rows(), b.rows()).t();
    product(target, into, None, scale, &Rows::of(b), &Right::new(a.t(), None), threads);
}

/// A new `a b`, of factors used only once.
pub fn product_once(a: Mat, b: Mat, precision: Precision) -> Vec<f32> {
    match precision {
        Precision::F32 => gemm::product(1.0, a, b),
        Precision::Bf16 => {
            let mut out = vec![0.0; a.rows() * b.cols()];
            multiply_once(&mut out, Into::Overwrite, 1.0, a, b, precision);
            out
        }
    }
}

/// [`multiply`] with factors used only once, on all threads; `a` may be a transpose.
pub fn multiply_once(out: &mut [f32], into: Into, scale: f32, a: Mat, b: Mat, precision: Precision) {
    match precision {
        Precision::F32 => gemm::gemm(out, into, scale, a, b, Threads::Pool),
        Precision::Bf16 => {
            multiply(out, into, scale, a, Factor::Prepared(&Prepared::new(b, None, precision)), Threads::Pool);
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
        fn a_factor_read_as_it_lies_gives_what_a_prepared_one_gives(
            (m, k, n) in (1..60usize, 0..70usize, 1..200usize),
            add: bool,
            pool: bool,
            seed: u64,
        ) {
            let mut rng = ChaCha12Rng::seed_from_u64(seed);
            let mut random = |len: usize| (0..len).map(|_| rng.random_range(-2.0..2.0)).collect::<Vec<f32>>();
            let (a, b, mut as_it_lies) = (random(m * k), random(n * k), random(m * n));
            let mut prepared = as_it_lies.clone();
            let (a, b) = (Mat::new(&a, m, k), Mat::new(&b, n, k));
            let into = if add { Into::Add } else { Into::Overwrite };
            let threads = if pool { Threads::Pool } else { Threads::One };
            multiply_by_rows(&mut as_it_lies, into, 0.7, a, b, threads);
            let factor = Prepared::new(b.t(), None, Precision::F32);
            multiply(&mut prepared, into, 0.7, a, Factor::Prepared(&factor), threads);
            prop_assert_eq!(as_it_lies, prepared);
        }
    }

    #[test]
    fn a_large_factor_read_as_it_lies_is_shared_between_threads() {
        let mut rng = ChaCha12Rng::seed_from_u64(7);
        // Two blocks along the inner dimension, and enough parts for tasks in both directions.
        let (m, k, n) = (101, 1500, 333);
        let mut random = |len: usize| (0..len).map(|_| rng.random_range(-2.0..2.0)).collect::<Vec<f32>>();
        let (a, b) = (random(m * k), random(n * k));
        let (a, b) = (Mat::new(&a, m, k), Mat::new(&b, n, k));
        let (mut as_it_lies, mut prepared) = (vec![0.0; m * n], vec![0.0; m * n]);
        multiply_by_rows(&mut as_it_lies, Into::Overwrite, 1.0, a, b, Threads::Pool);
        let factor = Prepared::new(b.t(), None, Precision::F32);
        multiply(&mut prepared, Into::Overwrite, 1.0, a, Factor::Prepared(&factor), Threads::One);
        assert!(as_it_lies == prepared);
    }
}
