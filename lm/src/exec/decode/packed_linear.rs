//! A linear layer for decoding, with its weight packed once in the model's precision.

use std::ops::Range;

use temper_gemm::buffer::with_scratch;
use temper_gemm::matmul::matmul_columns;
use temper_gemm::{LowRankUpdate, Mat, PackedRhs, Threads, WriteMode, dense};

use crate::exec::train::linear::{OutputColumns, scaled_transpose};
use crate::model::adapter::LoraAdapter;
use crate::model::linear::Linear;
use crate::tensor::candle_interop::CpuSlice;
use crate::{Precision, Result};

/// `x W + b`, `W [in, out]`, plus `scale (x A') B'` if there is an adapter.
pub struct PackedLinear<'a> {
    b: Option<CpuSlice<'a>>,
    /// The adapter, if it is not merged into the packed weight: its rank, A `[rank, in]` and, scaled, B' `[rank, out]`.
    unmerged_lora: Option<(usize, CpuSlice<'a>, Vec<f32>)>,
    /// The weight, split by columns.
    column_blocks: Vec<(Range<usize>, PackedRhs)>,
    d_in: usize,
    d_out: usize,
}

impl<'a> PackedLinear<'a> {
    /// Callers may ask separately for the columns below `split` and from `split` on. In f32 an adapter is merged into
    /// the weight; in bf16 rounding might lose its contribution, so it stays separate. Errors: a tensor that is not
    /// contiguous f32.
    pub fn new(linear: &'a Linear, precision: Precision, split: usize) -> Result<Self> {
        let (d_in, d_out) = linear.weight.dims2()?;
        let lora = linear.adapter.as_ref().map(|LoraAdapter { a, b, scale, .. }| -> Result<_> {
            let rank = a.dim(0)?;
            Ok((rank, CpuSlice::new(a)?, scaled_transpose(&CpuSlice::new(b)?, rank, *scale as f32)))
        });
        let lora = lora.transpose()?;
        let merged = lora.as_ref().filter(|_| precision == Precision::F32);
        let w = CpuSlice::new(&linear.weight)?;
        let split = split.min(d_out);
        let column_blocks = [0..split, split..d_out].into_iter().filter(|columns| !columns.is_empty());
        let column_blocks = column_blocks.map(|columns| {
            let block = Mat::columns(&w, d_in, columns.len(), d_out, columns.start);
            let rows = merged.iter().flat_map(|(_, _, b)| b.chunks_exact(d_out.max(1)));
            let b: Vec<f32> = rows.flat_map(|row| &row[columns.clone()]).copied().collect();
            let update = merged.map(|(rank, a, _)| LowRankUpdate { a, b: &b, rank: *rank });
            let block = PackedRhs::new(block, update, precision);
            (columns, block)
        });
        let column_blocks = column_blocks.collect();
        let unmerged_lora = lora.filter(|_| precision != Precision::F32);
        let b = linear.bias.as_ref().map(CpuSlice::new).transpose()?;
        Ok(Self { b, unmerged_lora, column_blocks, d_in, d_out })
    }

    pub fn d_in(&self) -> usize {
        self.d_in
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
        let Some((rank, a, b)) = &self.unmerged_lora else { return };
        with_scratch(n * rank, |z| {
            dense::gemm(z, WriteMode::Overwrite, 1.0, x, Mat::new(a, *rank, self.d_in).t(), threads);
            let b = Mat::columns(b, *rank, columns.len(), self.d_out, columns.start);
            dense::gemm_columns(y, stride, offset, WriteMode::Add, 1.0, Mat::new(z, n, *rank), b, threads);
        });
    }
}
