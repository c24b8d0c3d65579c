//! A linear layer for decoding, with its weight packed once in the model's precision.

use std::ops::Range;

use crate::kernels::buffer::with_scratch;
use crate::kernels::candle_interop::CpuSlice;
use crate::kernels::gemm::{self, Mat, Threads, WriteMode};
use crate::kernels::linear::{OutputColumns, scaled_transpose};
use crate::kernels::matmul::{LowRankUpdate, PackedRhs, matmul_columns};
use crate::linear::Linear;
use crate::{Precision, Result};

/// `x W + b`, `W [in, out]`, plus `scale (x A') B'` if there is an adapter.
pub struct PackedLinear<'a> {
    b: Option<CpuSlice<'a>>,
    /// The adapter, if it is not merged into the packed weight.
    unmerged_lora: Option<ScaledLora<'a>>,
    /// The weight, split by columns.
    column_blocks: Vec<(Range<usize>, PackedRhs)>,
    d_in: usize,
    d_out: usize,
}

/// An adapter with its scale in B.
struct ScaledLora<'a> {
    /// `[rank, in]`
    a: CpuSlice<'a>,
    /// B', scaled, `[rank, out]`.
    b: Vec<f32>,
    rank: usize,
}

impl<'a> PackedLinear<'a> {
    /// Callers may ask separately for the columns below `split` and from `split` on. In f32 an adapter is merged into
    /// the weight; in bf16 rounding might lose its contribution, so it stays separate. Errors: a tensor that is not
    /// contiguous f32.
    pub fn new(linear: &'a Linear, precision: Precision, split: usize) -> Result<Self> {
        let (d_in, d_out) = linear.weight.dims2()?;
        let lora = linear.adapter.as_ref().map(|lora| -> Result<ScaledLora> {
            let rank = lora.a.dim(0)?;
            Ok(ScaledLora {
                a: CpuSlice::new(&lora.a)?,
                b: scaled_transpose(&CpuSlice::new(&lora.b)?, rank, lora.scale as f32),
                rank,
            })
        });
        let lora = lora.transpose()?;
        let merged = lora.as_ref().filter(|_| precision == Precision::F32);
        let w = CpuSlice::new(&linear.weight)?;
        let split = split.min(d_out);
        let column_blocks = [0..split, split..d_out].into_iter().filter(|columns| !columns.is_empty());
        let column_blocks = column_blocks.map(|columns| {
            let block = Mat::columns(&w, d_in, columns.len(), d_out, columns.start);
            let b: Vec<f32> = merged.map_or(vec![], |lora| lora.columns(columns.clone()));
            let update = merged.map(|lora| LowRankUpdate { a: &lora.a, b: &b, rank: lora.rank });
            let block = PackedRhs::new(block, update, precision);
            (columns, block)
        });
        let column_blocks = column_blocks.collect();
        let unmerged_lora = lora.filter(|_| precision != Precision::F32);
        let b = linear.bias.as_ref().map(CpuSlice::new).transpose()?;
        Ok(Self { b, unmerged_lora, column_blocks, d_in, d_out })
    }

    pub fn d_out(&self) -> usize {
        self.d_out
    }

    /// Writes or adds the given output columns for `x [n, in]`.
    pub fn apply(
        &self,
        y: &mut [f32],
        destination: OutputColumns,
        mode: WriteMode,
        x: &[f32],
        columns: Range<usize>,
        threads: Threads,
    ) {
        let OutputColumns { stride, offset } = destination;
        let n = x.len() / self.d_in;
        let x = Mat::new(x, n, self.d_in);
        for (block_columns, block) in &self.column_blocks {
            if block_columns.start < columns.end && columns.start < block_columns.end {
                assert!(
                    columns.start <= block_columns.start && block_columns.end <= columns.end,
                    "the columns are whole blocks of the layer"
                );
                let bias = self.b.as_ref().map(|b| &b[block_columns.clone()]);
                matmul_columns(y, stride, offset + block_columns.start - columns.start, mode, bias, x, block, threads);
            }
        }
        let Some(lora) = &self.unmerged_lora else { return };
        with_scratch(n * lora.rank, |z| {
            gemm::gemm(z, WriteMode::Overwrite, 1.0, x, Mat::new(&lora.a, lora.rank, self.d_in).t(), threads);
            let b = Mat::columns(&lora.b, lora.rank, columns.len(), self.d_out, columns.start);
            gemm::gemm_columns(y, stride, offset, WriteMode::Add, 1.0, Mat::new(z, n, lora.rank), b, threads);
        });
    }
}

impl ScaledLora<'_> {
    /// The given columns of B', `[rank, columns]`.
    fn columns(&self, columns: Range<usize>) -> Vec<f32> {
        let width = self.b.len() / self.rank.max(1);
        self.b.chunks_exact(width.max(1)).flat_map(|row| &row[columns.clone()]).copied().collect()
    }
}
