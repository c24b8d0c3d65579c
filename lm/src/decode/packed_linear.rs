//! A linear map for decoding, with its weight prepared once in the model's precision.

use std::ops::Range;

use crate::kernels::buffer::with_scratch;
use crate::kernels::gemm::{self, WriteMode, Mat, Threads};
use crate::kernels::candle_interop::CpuSlice;
use crate::kernels::matmul::{LowRankUpdate, PackedRhs, matmul_columns};
use crate::kernels::linear::{At, scaled_transpose};
use crate::linear::Linear;
use crate::{Precision, Result};

/// `x W + b`, `W [in, out]`, plus `scale (x A') B'` if there is an adapter.
pub struct Affine<'a> {
    b: Option<CpuSlice<'a>>,
    /// The adapter, if it is not merged into the prepared weight.
    beside: Option<Low<'a>>,
    /// The weight, split by columns.
    pieces: Vec<(Range<usize>, PackedRhs)>,
    d_in: usize,
    d_out: usize,
}

struct Low<'a> {
    /// `[rank, in]`
    a: CpuSlice<'a>,
    /// B', scaled, `[rank, out]`.
    b: Vec<f32>,
    rank: usize,
}

impl<'a> Affine<'a> {
    /// Callers may ask separately for the columns below `cut` and from `cut` on. In f32 an adapter is merged into the
    /// weight; in bf16 rounding might lose its contribution, so it stays separate. Errors: a tensor that is not
    /// contiguous f32.
    pub fn of(linear: &'a Linear, precision: Precision, cut: usize) -> Result<Self> {
        let (d_in, d_out) = linear.weight.dims2()?;
        let low = linear.adapter.as_ref().map(|low| -> Result<Low> {
            let rank = low.a.dim(0)?;
            Ok(Low { a: CpuSlice::new(&low.a)?, b: scaled_transpose(&CpuSlice::new(&low.b)?, rank, low.scale as f32), rank })
        });
        let low = low.transpose()?;
        let within = low.as_ref().filter(|_| precision == Precision::F32);
        let w = CpuSlice::new(&linear.weight)?;
        let cut = cut.min(d_out);
        let pieces = [0..cut, cut..d_out].into_iter().filter(|columns| !columns.is_empty());
        let pieces = pieces.map(|columns| {
            let piece = Mat::columns(&w, d_in, columns.len(), d_out, columns.start);
            let b: Vec<f32> = within.map_or(vec![], |low| low.columns(columns.clone()));
            let plus = within.map(|low| LowRankUpdate { a: &low.a, b: &b, rank: low.rank });
            let piece = PackedRhs::new(piece, plus, precision);
            (columns, piece)
        });
        let pieces = pieces.collect();
        let beside = low.filter(|_| precision != Precision::F32);
        let b = linear.bias.as_ref().map(CpuSlice::new).transpose()?;
        Ok(Self { b, beside, pieces, d_in, d_out })
    }

    pub fn d_out(&self) -> usize {
        self.d_out
    }

    /// Writes or adds the given output columns for `x [n, in]`.
    pub fn apply(&self, y: &mut [f32], at: At, into: WriteMode, x: &[f32], columns: Range<usize>, threads: Threads) {
        let At { stride, offset } = at;
        let n = x.len() / self.d_in;
        let x = Mat::new(x, n, self.d_in);
        for (own, piece) in &self.pieces {
            if own.start < columns.end && columns.start < own.end {
                assert!(columns.start <= own.start && own.end <= columns.end, "columns are cut where the map was");
                let bias = self.b.as_ref().map(|b| &b[own.clone()]);
                matmul_columns(y, stride, offset + own.start - columns.start, into, bias, x, piece, threads);
            }
        }
        let Some(low) = &self.beside else { return };
        with_scratch(n * low.rank, |z| {
            gemm::gemm(z, WriteMode::Overwrite, 1.0, x, Mat::new(&low.a, low.rank, self.d_in).t(), threads);
            let b = Mat::columns(&low.b, low.rank, columns.len(), self.d_out, columns.start);
            gemm::gemm_columns(y, stride, offset, WriteMode::Add, 1.0, Mat::new(z, n, low.rank), b, threads);
        });
    }
}

impl Low<'_> {
    /// The given columns of B', `[rank, columns]`.
    fn columns(&self, columns: Range<usize>) -> Vec<f32> {
        let width = self.b.len() / self.rank.max(1);
        self.b.chunks_exact(width.max(1)).flat_map(|row| &row[columns.clone()]).copied().collect()
    }
}
