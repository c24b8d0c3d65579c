//! Causal attention, one (batch, head) at a time in blocks of query rows, so that only one block's scores exist at a
//! time. The backward pass recomputes probabilities from the log-sum-exp of each row.

use rayon::prelude::*;
use temper_gemm::buffer::{SubmatrixMut, build_chunked, split_submatrices, with_scratch};
use temper_gemm::dense::gemm_submatrix;
use temper_gemm::simd::{exp, max, sum_map, sum_map2};
use temper_gemm::{Mat, Threads, WriteMode, dense, simd};

/// Query rows per block of scores.
const BLOCK: usize = 64;

/// Sizes: `batch` sequences of `time` rows, heads of `width` columns.
#[derive(Clone, Copy)]
pub struct AttentionShape {
    pub batch: usize,
    pub time: usize,
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key/value heads; each serves `heads / kv_heads` neighbouring query heads.
    pub kv_heads: usize,
    pub width: usize,
}

impl AttentionShape {
    /// Columns of the output.
    pub fn out_width(self) -> usize {
        self.heads * self.width
    }

    /// Columns of joint rows: queries, keys and values side by side.
    pub fn qkv_width(self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.width
    }

    /// Query heads per key/value head.
    pub fn queries_per_kv(self) -> usize {
        self.heads / self.kv_heads
    }

    fn scale(self) -> f32 {
        1.0 / (self.width as f32).sqrt()
    }

    /// Query blocks (start, end) from the last down to the one that holds row `first_row`, so that the first one
    /// computed spans all keys. Empty if there is no such row.
    fn blocks(self, first_row: usize) -> impl Iterator<Item = (usize, usize)> {
        let first = if first_row < self.time { first_row / BLOCK } else { self.time.div_ceil(BLOCK) };
        (first..self.time.div_ceil(BLOCK)).rev().map(move |i| (i * BLOCK, ((i + 1) * BLOCK).min(self.time)))
    }
}

/// One head of one sequence.
#[derive(Clone, Copy)]
pub struct HeadIndex {
    pub sequence: usize,
    /// Index among the query heads, or among the key/value heads.
    pub head: usize,
    /// First row whose output is needed; blocks that lie wholly before it are skipped.
    pub first_row: usize,
}

/// Rows `[batch * time]` of queries, keys or values: a head's columns are the `width` ones from `offset + head * width`
/// on.
#[derive(Clone, Copy)]
pub struct HeadsView<'a> {
    pub data: &'a [f32],
    pub stride: usize,
    pub offset: usize,
}

impl<'a> HeadsView<'a> {
    /// `rows` rows from `start` on, of the given sequence and head.
    fn matrix(self, shape: AttentionShape, sequence: usize, head: usize, start: usize, rows: usize) -> Mat<'a> {
        let first = (sequence * shape.time + start) * self.stride + self.offset + head * shape.width;
        Mat::strided(&self.data[first..], rows, shape.width, self.stride)
    }

    fn row(self, shape: AttentionShape, sequence: usize, head: usize, row: usize) -> &'a [f32] {
        let first = (sequence * shape.time + row) * self.stride + self.offset + head * shape.width;
        &self.data[first..first + shape.width]
    }
}

/// Attention's output `[batch * time, d]` for joint rows of queries, keys and values; heads run in parallel.
pub fn forward(qkv: &[f32], shape: AttentionShape) -> Vec<f32> {
    let AttentionShape { time, heads, width, .. } = shape;
    let mut out = build_chunked(shape.batch * time * shape.out_width(), time * shape.out_width(), |_, _| {});
    split_submatrices(&mut out, time, width, heads).into_par_iter().enumerate().for_each(|(i, out)| {
        let mut lse = vec![0.0; time];
        let head = HeadIndex { sequence: i / heads, head: i % heads, first_row: 0 };
        forward_head(out, &mut lse, split_qkv(qkv, shape), shape, head);
    });
    out
}

/// One query head, on the calling thread.
pub fn forward_head(
    mut out: SubmatrixMut,
    lse: &mut [f32],
    [q, k, v]: [HeadsView; 3],
    shape: AttentionShape,
    index: HeadIndex,
) {
    let HeadIndex { sequence, head, first_row } = index;
    let (time, kv_head) = (shape.time, head / shape.queries_per_kv());
    with_scratch(BLOCK.min(time) * time, |p| {
        for (start, end) in shape.blocks(first_row) {
            let n = end - start;
            let p = &mut p[..n * end];
            let (q, k) = (q.matrix(shape, sequence, head, start, n), k.matrix(shape, sequence, kv_head, 0, end));
            dense::gemm(p, WriteMode::Overwrite, shape.scale(), q, k.t(), Threads::One);
            softmax(p, end, start, &mut lse[start..end]);
            let v = v.matrix(shape, sequence, kv_head, 0, end);
            gemm_submatrix(&mut out.row_range(start, n), WriteMode::Overwrite, 1.0, Mat::new(p, n, end), v);
        }
    });
}

/// Splits a row after the visible columns plus up to 15 more, which become -infinity: whole vectors for `exp`.
fn split_padded(row: &mut [f32], visible: usize) -> (&mut [f32], &mut [f32]) {
    let (padded, future) = row.split_at_mut(visible.next_multiple_of(16).min(row.len()));
    padded[visible..].fill(f32::NEG_INFINITY);
    (padded, future)
}

/// Turns rows of scores into probabilities, in place; row `r` sees the first `first + r + 1` of `keys` columns.
fn softmax(p: &mut [f32], keys: usize, first: usize, lse: &mut [f32]) {
    for (r, (row, lse)) in p.chunks_exact_mut(keys).zip(lse).enumerate() {
        let (padded, future) = split_padded(row, first + r + 1);
        *lse = softmax_row(padded);
        future.fill(0.0);
    }
}

simd! {
    /// Softmax in place; returns the log-sum-exp.
    fn softmax_row(row: &mut [f32]) -> f32 {
        let m = max(row);
        for x in row.iter_mut() {
            *x = exp::<FMA>(*x - m);
        }
        let sum = sum_map(row, |x| x);
        let inverse = 1.0 / sum;
        for x in row.iter_mut() {
            *x *= inverse;
        }
        m + sum.ln()
    }
}

/// Destinations of the gradients of one key/value head and of the query heads that it serves.
pub struct HeadGradients<'a> {
    q: Vec<SubmatrixMut<'a>>,
    k: SubmatrixMut<'a>,
    v: SubmatrixMut<'a>,
}

/// Inputs of a backward pass: queries, keys, values, the output and its gradient.
#[derive(Clone, Copy)]
pub struct BackwardInputs<'a> {
    pub qkv: [HeadsView<'a>; 3],
    pub out: HeadsView<'a>,
    pub g: HeadsView<'a>,
    /// Log-sum-exp `[batch, heads, time]`.
    pub lse: &'a [f32],
}

/// Backward pass of one key/value head and all query heads that it serves, on the calling thread. Does not write the
/// gradients of query rows in blocks that `index.first_row` skips.
pub fn backward_heads(grads: HeadGradients, inputs: BackwardInputs, shape: AttentionShape, index: HeadIndex) {
    let HeadGradients { q, mut k, mut v } = grads;
    for (i, q) in q.into_iter().enumerate() {
        backward_head(
            q,
            [&mut k, &mut v],
            inputs,
            shape,
            HeadIndex { head: index.head * shape.queries_per_kv() + i, ..index },
        );
    }
}

/// Backward pass of one query head: recomputes P from the scores and their log-sum-exp, then dV = P' G, dS = P (G V' -
/// rowsum(G O)), dQ = dS K, dK = dS' Q. The first head of a group overwrites `dk` and `dv`, the others add to them.
fn backward_head(
    mut dq: SubmatrixMut,
    [dk, dv]: [&mut SubmatrixMut; 2],
    BackwardInputs { qkv: [q, k, v], out, g, lse }: BackwardInputs,
    shape: AttentionShape,
    HeadIndex { sequence, head, first_row }: HeadIndex,
) {
    let (time, kv_head) = (shape.time, head / shape.queries_per_kv());
    let lse = &lse[(sequence * shape.heads + head) * time..][..time];
    let block = BLOCK.min(time) * time;
    with_scratch(2 * block, |both| {
        let (p, ds) = both.split_at_mut(block);
        for (start, end) in shape.blocks(first_row) {
            let n = end - start;
            let first = end == time && head % shape.queries_per_kv() == 0;
            let mode = if first { WriteMode::Overwrite } else { WriteMode::Add };
            let (p, ds) = (&mut p[..n * end], &mut ds[..n * end]);
            let q = q.matrix(shape, sequence, head, start, n);
            let k = k.matrix(shape, sequence, kv_head, 0, end);
            let v = v.matrix(shape, sequence, kv_head, 0, end);
            let g_block = g.matrix(shape, sequence, head, start, n);
            dense::gemm(p, WriteMode::Overwrite, shape.scale(), q, k.t(), Threads::One);
            dense::gemm(ds, WriteMode::Overwrite, 1.0, g_block, v.t(), Threads::One);
            for (r, (p, ds)) in p.chunks_exact_mut(end).zip(ds.chunks_exact_mut(end)).enumerate() {
                let (p, p_future) = split_padded(p, start + r + 1);
                let (ds, ds_future) = ds.split_at_mut(p.len());
                score_gradient(
                    p,
                    ds,
                    g.row(shape, sequence, head, start + r),
                    out.row(shape, sequence, head, start + r),
                    lse[start + r],
                    shape.scale(),
                );
                p_future.fill(0.0);
                ds_future.fill(0.0);
            }
            let (p, ds) = (Mat::new(p, n, end), Mat::new(ds, n, end));
            gemm_submatrix(&mut dv.first_rows(end), mode, 1.0, p.t(), g_block);
            gemm_submatrix(&mut dk.first_rows(end), mode, 1.0, ds.t(), q);
            gemm_submatrix(&mut dq.row_range(start, n), WriteMode::Overwrite, 1.0, ds, k);
        }
    });
}

simd! {
    /// Turns scores into probabilities and G V' into the gradient of the unscaled scores, both in place.
    fn score_gradient(p: &mut [f32], ds: &mut [f32], g: &[f32], out: &[f32], lse: f32, scale: f32) {
        let mean = sum_map2(g, out, |g, o| g * o);
        for (p, ds) in p.iter_mut().zip(ds) {
            *p = exp::<FMA>(*p - lse);
            *ds = *p * (*ds - mean) * scale;
        }
    }
}

/// Splits the gradient of joint rows `[batch * time, qkv_width]` into one part per (sequence, key/value head), in
/// order.
pub fn split_qkv_gradients(grad: &mut [f32], shape: AttentionShape) -> Vec<HeadGradients<'_>> {
    let AttentionShape { batch, time, heads, kv_heads, width } = shape;
    let all = heads + 2 * kv_heads;
    let mut submatrices = split_submatrices(grad, time, width, all).into_iter();
    let mut parts = Vec::with_capacity(batch * kv_heads);
    for _ in 0..batch {
        let mut take = |n: usize| submatrices.by_ref().take(n).collect::<Vec<_>>().into_iter();
        let (mut q, k, v) = (take(heads), take(kv_heads), take(kv_heads));
        parts.extend(k.zip(v).map(|(k, v)| HeadGradients {
            q: q.by_ref().take(shape.queries_per_kv()).collect(),
            k,
            v,
        }));
    }
    parts
}

/// Rows of `d` columns that hold nothing but the heads of one operand.
pub fn heads_view(data: &[f32], d: usize) -> HeadsView<'_> {
    HeadsView { data, stride: d, offset: 0 }
}

/// Queries, keys and values side by side.
pub fn split_qkv(data: &[f32], shape: AttentionShape) -> [HeadsView<'_>; 3] {
    let keys = shape.heads * shape.width;
    [0, keys, keys + shape.kv_heads * shape.width].map(|offset| HeadsView { data, stride: shape.qkv_width(), offset })
}
