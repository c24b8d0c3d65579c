//! Embedding lookup; the backward pass adds gradients in the order of the ids.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor, bail};
use temper_gemm::buffer::{CHUNK, build_chunked};
use temper_gemm::simd::add_assign;

use super::candle_interop::{CpuSlice, contiguous_slice, op_output};
use super::grad_accumulator::accumulate_or_return;

/// Looks up the rows of its operand, a table of `d` columns.
pub struct EmbeddingOp {
    /// The ids, each below `v`.
    pub ids: Vec<u32>,
    /// Shape of the ids.
    pub shape: Vec<usize>,
    pub d: usize,
}

impl EmbeddingOp {
    /// For a table of `v` rows of `d` elements. Errors: an id without a row.
    pub fn new(ids: &Tensor, v: usize, d: usize) -> Result<Self> {
        let (shape, ids) = (ids.dims().to_vec(), ids.flatten_all()?.to_vec1::<u32>()?);
        if let Some(id) = ids.iter().find(|&&id| id as usize >= v) {
            bail!("token id {id} is not below the table's {v} rows");
        }
        Ok(Self { ids, shape, d })
    }
}

impl CustomOp1 for EmbeddingOp {
    fn name(&self) -> &'static str {
        "temper-embedding"
    }

    fn cpu_fwd(&self, table: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (table, d) = (contiguous_slice(table, layout)?, self.d);
        let rows = build_chunked(self.ids.len() * d, (CHUNK / d).max(1) * d, |start, out| {
            for (row, &id) in out.chunks_exact_mut(d).zip(&self.ids[start / d..]) {
                row.copy_from_slice(&table[id as usize * d..(id as usize + 1) * d]);
            }
        });
        let mut shape = self.shape.clone();
        shape.push(d);
        op_output(rows, shape)
    }

    fn bwd(&self, table: &Tensor, _rows: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let g = g.contiguous()?;
        let (g, d) = (CpuSlice::new(&g)?, self.d);
        // Each task owns some rows of the table and adds their gradients in the order of the ids.
        let chunk = (8 * CHUNK / d).max(1);
        let sum = build_chunked(table.elem_count(), chunk * d, |start, out| {
            let first = start / d;
            let rows = first..first + out.len() / d;
            for (&id, g) in self.ids.iter().zip(g.chunks_exact(d)) {
                let id = id as usize;
                if rows.contains(&id) {
                    add_assign(&mut out[(id - first) * d..(id - first + 1) * d], g);
                }
            }
        });
        accumulate_or_return(table, sum)
    }
}
