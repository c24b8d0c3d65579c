//! Causal attention, one (batch, head) at a time in blocks of query rows, so that only one block's scores exist at a
//! time. The backward pass recomputes probabilities from the log-sum-exp of each row.

use rayon::prelude::*;

use super::buffer::{Band, bands, build, scratch};
use super::gemm::{self, Into, Mat, Threads, gemm_band};
use super::simd::{exp, max, simd, sum_map, sum_map2};

/// Query rows per block of scores.
const BLOCK: usize = 64;

/// Sizes: `batch` sequences of `time` rows, heads of `width` columns.
#[derive(Clone, Copy)]
pub struct Size {
    pub batch: usize,
    pub time: usize,
    /// Query heads, a multiple of `kv_heads`.
    pub heads: usize,
    /// Key/value heads; each serves `heads / kv_heads` neighbouring query heads.
    pub kv_heads: usize,
    pub width: usize,
}

impl Size {
    /// Columns of the output.
    pub fn d(self) -> usize {
        self.heads * self.width
    }

    /// Columns of joint rows: queries, keys and values side by side.
    pub fn joint(self) -> usize {
        (self.heads + 2 * self.kv_heads) * self.width
    }

    /// Query heads per key/value head.
    pub fn group(self) -> usize {
        self.heads / self.kv_heads
    }

    fn scale(self) -> f32 {
        1.0 / (self.width as f32).sqrt()
    }

    /// Query blocks (start, end) from the last down to the one that holds row `from`, so that the first one computed
    /// spans all keys. Empty if there is no such row.
    fn blocks(self, from: usize) -> impl Iterator<Item = (usize, usize)> {
        let first = if from < self.time { from / BLOCK } else { self.time.div_ceil(BLOCK) };
        (first..self.time.div_ceil(BLOCK)).rev().map(move |i| (i * BLOCK, ((i + 1) * BLOCK).min(self.time)))
    }
}

/// One head of one sequence.
#[derive(Clone, Copy)]
pub struct Head {
    pub sequence: usize,
    /// Index among the query heads, or among the key/value heads.
    pub head: usize,
    /// First row that is needed; blocks that lie wholly before it are skipped.
    pub from: usize,
}

/// Rows `[batch * time]` of queries, keys or values: a head's columns are the `width` ones from `offset + head * width`
/// on.
#[derive(Clone, Copy)]
pub struct Rows<'a> {
    pub data: &'a [f32],
    pub stride: usize,
    pub offset: usize,
}

impl<'a> Rows<'a> {
    /// `rows` rows from `start` on, of the given sequence and head.
    fn of(self, size: Size, sequence: usize, head: usize, start: usize, rows: usize) -> Mat<'a> {
        let first = (sequence * size.time + start) * self.stride + self.offset + head * size.width;
        Mat::strided(&self.data[first..], rows, size.width, self.stride)
    }

    fn row(self, size: Size, sequence: usize, head: usize, at: usize) -> &'a [f32] {
        let first = (sequence * size.time + at) * self.stride + self.offset + head * size.width;
        &self.data[first..first + size.width]
    }
}

/// Attention's output `[batch * time, d]` for joint rows of queries, keys and values; heads run in parallel.
pub fn forward(qkv: &[f32], size: Size) -> Vec<f32> {
    let Size { time, heads, width, .. } = size;
    let mut out = build(size.batch * time * size.d(), time * size.d(), |_, _| {});
    bands(&mut out, time, width, heads).into_par_iter().enumerate().for_each(|(i, out)| {
        let mut lse = vec![0.0; time];
        let head = Head { sequence: i / heads, head: i % heads, from: 0 };
        forward_head(out, &mut lse, joint(qkv, size), size, head);
    });
    out
}

/// One query head, on the calling thread.
pub fn forward_head(mut out: Band, lse: &mut [f32], [q, k, v]: [Rows; 3], size: Size, of: Head) {
    let Head { sequence, head, from } = of;
    let (time, kv_head) = (size.time, head / size.group());
    scratch(BLOCK.min(time) * time, |p| {
        for (start, end) in size.blocks(from) {
            let n = end - start;
            let p = &mut p[..n * end];
            let (q, k) = (q.of(size, sequence, head, start, n), k.of(size, sequence, kv_head, 0, end));
            gemm::gemm(p, Into::Overwrite, size.scale(), q, k.t(), Threads::One);
            softmax(p, end, start, &mut lse[start..end]);
            let v = v.of(size, sequence, kv_head, 0, end);
            gemm_band(&mut out.part(start, n), Into::Overwrite, 1.0, Mat::new(p, n, end), v);
        }
    });
}

/// Splits a row after the visible columns plus up to 15 more, which become -infinity: whole vectors for `exp`.
fn padded(row: &mut [f32], seen: usize) -> (&mut [f32], &mut [f32]) {
    let (padded, future) = row.split_at_mut(seen.next_multiple_of(16).min(row.len()));
    padded[seen..].fill(f32::NEG_INFINITY);
    (padded, future)
}

/// Turns rows of scores into probabilities, in place; row `r` sees the first `first + r + 1` of `keys` columns.
fn softmax(p: &mut [f32], keys: usize, first: usize, lse: &mut [f32]) {
    for (r, (row, lse)) in p.chunks_exact_mut(keys).zip(lse).enumerate() {
        let (padded, future) = padded(row, first + r + 1);
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
    q: Vec<Band<'a>>,
    k: Band<'a>,
    v: Band<'a>,
}

/// Inputs of a backward pass: queries, keys, values, the output and its gradient.
#[derive(Clone, Copy)]
pub struct Known<'a> {
    pub qkv: [Rows<'a>; 3],
    pub out: Rows<'a>,
    pub g: Rows<'a>,
    /// Log-sum-exp `[batch, heads, time]`.
    pub lse: &'a [f32],
}

/// Backward pass of one key/value head and all query heads that it serves, on the calling thread. Does not write the
/// gradients of query rows in blocks that `of.from` skips.
pub fn backward_heads(to: HeadGradients, known: Known, size: Size, of: Head) {
    let HeadGradients { q, mut k, mut v } = to;
    for (i, q) in q.into_iter().enumerate() {
        backward_head(q, [&mut k, &mut v], known, size, Head { head: of.head * size.group() + i, ..of });
    }
}

/// Backward pass of one query head: recomputes P from the scores and their log-sum-exp, then dV = P' G, dS = P (G V' -
/// rowsum(G O)), dQ = dS K, dK = dS' Q. The first head of a group overwrites `dk` and `dv`, the others add to them.
fn backward_head(
    mut dq: Band,
    [dk, dv]: [&mut Band; 2],
    Known { qkv: [q, k, v], out, g, lse }: Known,
    size: Size,
    Head { sequence, head, from }: Head,
) {
    let (time, kv_head) = (size.time, head / size.group());
    let lse = &lse[(sequence * size.heads + head) * time..][..time];
    let block = BLOCK.min(time) * time;
    scratch(2 * block, |both| {
        let (p, ds) = both.split_at_mut(block);
        for (start, end) in size.blocks(from) {
            let n = end - start;
            let first = end == time && head % size.group() == 0;
            let into = if first { Into::Overwrite } else { Into::Add };
            let (p, ds) = (&mut p[..n * end], &mut ds[..n * end]);
            let q = q.of(size, sequence, head, start, n);
            let k = k.of(size, sequence, kv_head, 0, end);
            let v = v.of(size, sequence, kv_head, 0, end);
            let g_block = g.of(size, sequence, head, start, n);
            gemm::gemm(p, Into::Overwrite, size.scale(), q, k.t(), Threads::One);
            gemm::gemm(ds, Into::Overwrite, 1.0, g_block, v.t(), Threads::One);
            for (r, (p, ds)) in p.chunks_exact_mut(end).zip(ds.chunks_exact_mut(end)).enumerate() {
                let (p, p_future) = padded(p, start + r + 1);
                let (ds, ds_future) = ds.split_at_mut(p.len());
                score_gradient(
                    p,
                    ds,
                    g.row(size, sequence, head, start + r),
                    out.row(size, sequence, head, start + r),
                    lse[start + r],
                    size.scale(),
                );
                p_future.fill(0.0);
                ds_future.fill(0.0);
            }
            let (p, ds) = (Mat::new(p, n, end), Mat::new(ds, n, end));
            gemm_band(&mut dv.head(end), into, 1.0, p.t(), g_block);
            gemm_band(&mut dk.head(end), into, 1.0, ds.t(), q);
            gemm_band(&mut dq.part(start, n), Into::Overwrite, 1.0, ds, k);
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

/// Cuts the gradient of joint rows `[batch * time, joint]` into one part per (sequence, key/value head), in order.
pub fn joint_gradients(grad: &mut [f32], size: Size) -> Vec<HeadGradients<'_>> {
    let Size { batch, time, heads, kv_heads, width } = size;
    let all = heads + 2 * kv_heads;
    let mut bands = bands(grad, time, width, all).into_iter();
    let mut parts = Vec::with_capacity(batch * kv_heads);
    for _ in 0..batch {
        let mut of_kind = |n: usize| bands.by_ref().take(n).collect::<Vec<_>>().into_iter();
        let (mut q, k, v) = (of_kind(heads), of_kind(kv_heads), of_kind(kv_heads));
        parts.extend(k.zip(v).map(|(k, v)| HeadGradients { q: q.by_ref().take(size.group()).collect(), k, v }));
    }
    parts
}

/// Rows of `d` columns that hold one operand alone.
pub fn dense(data: &[f32], d: usize) -> Rows<'_> {
    Rows { data, stride: d, offset: 0 }
}

/// Queries, keys and values side by side.
pub fn joint(data: &[f32], size: Size) -> [Rows<'_>; 3] {
    let keys = size.heads * size.width;
    [0, keys, keys + size.kv_heads * size.width].map(|offset| Rows { data, stride: size.joint(), offset })
}
