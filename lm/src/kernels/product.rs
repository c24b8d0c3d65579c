//! Matrix products of slices in a chosen precision. Knows no tensors.

use super::bf16::{self, Left, Target};
use super::gemm::{self, Into, Mat, Threads};
use crate::Precision;

pub use super::bf16::Right as Rounded;

/// The right factor of a product.
#[derive(Clone, Copy)]
pub enum Factor<'a> {
    /// The product is f32's.
    Exact(Mat<'a>),
    /// The product is that of operands rounded to bf16; this one is already.
    Rounded(&'a Rounded),
}

impl<'a> Factor<'a> {
    /// `b`, or what [`rounded`] made of it.
    pub fn new(b: Mat<'a>, rounded: Option<&'a Rounded>) -> Self {
        rounded.map_or(Self::Exact(b), Self::Rounded)
    }
}

/// What products by `b` in this precision are to be given, several of which may share it: nothing in f32, a rounded copy of
/// half the size in bf16.
pub fn rounded(b: Mat, precision: Precision, threads: Threads) -> Option<Rounded> {
    match precision {
        Precision::F32 => None,
        Precision::Bf16 => Some(Rounded::new(b, threads)),
    }
}

/// `out [a.rows, b.cols] = or += scale * a b`.
pub fn multiply(out: &mut [f32], into: Into, scale: f32, a: Mat, b: Factor, threads: Threads) {
    match b {
        Factor::Exact(b) => gemm::gemm(out, into, scale, a, b, threads),
        Factor::Rounded(b) => round_and_multiply(out, into, scale, a, b, threads),
    }
}

/// [`multiply`] into the columns from `offset` on of rows of `stride` elements.
#[expect(clippy::too_many_arguments, reason = "a product and where it goes")]
pub fn multiply_columns(
    out: &mut [f32],
    stride: usize,
    offset: usize,
    into: Into,
    scale: f32,
    a: Mat,
    b: Factor,
    threads: Threads,
) {
    match b {
        Factor::Exact(b) => gemm::gemm_columns(out, stride, offset, into, scale, a, b, threads),
        Factor::Rounded(b) => {
            // Of no rows, not even the offset need be there.
            let out = out.get_mut(offset..).unwrap_or_default();
            Left::with(a, threads, |a| {
                bf16::product(Target::new(out, a.lanes(), b.lanes(), stride), into, scale, a, b, threads);
            });
        }
    }
}

/// A new `a b` of factors that are used once.
pub fn product_once(a: Mat, b: Mat, precision: Precision) -> Vec<f32> {
    match precision {
        Precision::F32 => gemm::product(1.0, a, b),
        Precision::Bf16 => {
            let mut out = vec![0.0; a.rows() * b.cols()];
            multiply_once(&mut out, Into::Overwrite, 1.0, a, b, precision, Threads::Pool);
            out
        }
    }
}

/// [`multiply`] by a factor that is used once.
pub fn multiply_once(out: &mut [f32], into: Into, scale: f32, a: Mat, b: Mat, precision: Precision, threads: Threads) {
    match precision {
        Precision::F32 => gemm::gemm(out, into, scale, a, b, threads),
        Precision::Bf16 => Rounded::with(b, threads, |b| round_and_multiply(out, into, scale, a, b, threads)),
    }
}

fn round_and_multiply(out: &mut [f32], into: Into, scale: f32, a: Mat, b: &Rounded, threads: Threads) {
    Left::with(a, threads, |a| {
        let target = Target::new(out, a.lanes(), b.lanes(), b.lanes());
        bf16::product(target, into, scale, a, b, threads);
    });
}
