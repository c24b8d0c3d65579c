//! A linear map as decoding uses it: its weight in the model's precision, prepared once, and an adapter beside it. Knows no
//! layers.

use std::ops::Range;

use crate::kernels::buffer::scratch;
use crate::kernels::gemm::{self, Into, Mat, Threads};
use crate::kernels::glue::View;
use crate::kernels::product::{Factor, Rounded, multiply_columns, rounded};
use crate::kernels::projection::At;
use crate::linear::Linear;
use crate::{Precision, Result};

/// `x W + b`, `W [in, out]`, plus `scale (x A') B'` if there is an adapter.
pub struct Affine<'a> {
    w: View<'a>,
    b: Option<View<'a>>,
    low: Option<Low<'a>>,
    /// In bf16, the weight in pieces of some columns; none in f32.
    rounded: Vec<(Range<usize>, Rounded)>,
    d_in: usize,
    d_out: usize,
}

struct Low<'a> {
    a: View<'a>,
    b: View<'a>,
    rank: usize,
    scale: f32,
}

impl<'a> Affine<'a> {
    /// Columns below and from `cut` on may be asked for apart. Errors: a tensor that is not contiguous f32.
    pub fn of(linear: &'a Linear, precision: Precision, cut: usize) -> Result<Self> {
        let (d_in, d_out) = linear.weight.dims2()?;
        let low = linear.adapter.as_ref().map(|low| -> Result<Low> {
            let rank = low.a.dim(0)?;
            Ok(Low { a: View::of(&low.a)?, b: View::of(&low.b)?, rank, scale: low.scale as f32 })
        });
        let w = View::of(&linear.weight)?;
        let cut = cut.min(d_out);
        let pieces = [0..cut, cut..d_out].into_iter().filter(|columns| !columns.is_empty());
        let rounded = pieces.filter_map(|columns| {
            let piece = Mat::columns(&w, d_in, columns.len(), d_out, columns.start);
            rounded(piece, precision, Threads::Pool).map(|piece| (columns, piece))
        });
        let rounded = rounded.collect();
        let b = linear.bias.as_ref().map(View::of).transpose()?;
        Ok(Self { w, b, low: low.transpose()?, rounded, d_in, d_out })
    }

    pub fn d_out(&self) -> usize {
        self.d_out
    }

    /// Writes or adds some columns of the map of `x [n, in]`.
    pub fn apply(&self, y: &mut [f32], at: At, into: Into, x: &[f32], columns: Range<usize>, threads: Threads) {
        let At { stride, offset } = at;
        let into = at.place_bias(y, into, self.b.as_ref().map(|b| &b[columns.clone()]));
        let n = x.len() / self.d_in;
        let x = Mat::new(x, n, self.d_in);
        if self.rounded.is_empty() {
            let w = Mat::columns(&self.w, self.d_in, columns.len(), self.d_out, columns.start);
            gemm::gemm_columns(y, stride, offset, into, 1.0, x, w, threads);
        }
        for (own, piece) in &self.rounded {
            if own.start < columns.end && columns.start < own.end {
                assert!(columns.start <= own.start && own.end <= columns.end, "columns are cut where the map was");
                let offset = offset + own.start - columns.start;
                multiply_columns(y, stride, offset, into, 1.0, x, Factor::Rounded(piece), threads);
            }
        }
        let Some(Low { a, b, rank, scale }) = &self.low else { return };
        scratch(n * rank, |z| {
            gemm::gemm(z, Into::Overwrite, 1.0, x, Mat::new(a, *rank, self.d_in).t(), threads);
            let b = Mat::new(&b[columns.start * rank..], columns.len(), *rank);
            gemm::gemm_columns(y, stride, offset, Into::Add, *scale, Mat::new(z, n, *rank), b.t(), threads);
        });
    }
}
