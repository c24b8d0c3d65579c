//! Causal attention, one (batch, head) at a time in blocks of query rows: scores of one block are the most that exists.
//! The backward pass recomputes probabilities from the log-sum-exp of each row. Knows no projections.

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp1, CustomOp3, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::buffer::{Band, bands, build, scratch};
use super::gemm::{self, Into, Mat, Threads, gemm_band};
use super::glue::{View, gradient, output, slice};
use super::simd::{exp, max, simd, sum_map, sum_map2};

/// Query rows whose scores are held at once.
const BLOCK: usize = 64;

/// Sizes: `batch` sequences of `time` rows, `heads` heads of `width` columns.
#[derive(Clone, Copy)]
pub struct Size {
    pub batch: usize,
    pub time: usize,
    pub heads: usize,
    pub width: usize,
}

impl Size {
    fn d(self) -> usize {
        self.heads * self.width
    }

    fn scale(self) -> f32 {
        1.0 / (self.width as f32).sqrt()
    }

    /// Query blocks from the last to the first, so that the first one computed spans all keys.
    fn blocks(self) -> impl Iterator<Item = (usize, usize)> {
        (0..self.time.div_ceil(BLOCK)).rev().map(move |i| (i * BLOCK, ((i + 1) * BLOCK).min(self.time)))
    }
}

/// Rows `[batch * time]` of which a head's queries, keys or values are `width` columns from `offset + head * width` on.
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

/// Output `[batch * time, d]` and each row's log-sum-exp `[batch, heads, time]`.
pub fn forward(q: Rows, k: Rows, v: Rows, size: Size) -> (Vec<f32>, Vec<f32>) {
    let Size { time, heads, width, .. } = size;
    let mut out = build(size.batch * time * size.d(), time * size.d(), |_, _| {});
    let mut lse = vec![0.0; size.batch * heads * time];
    bands(&mut out, time, width, heads)
        .into_par_iter()
        .zip(lse.par_chunks_mut(time))
        .enumerate()
        .for_each(|(i, (out, lse))| forward_head(out, lse, q, k, v, size, (i / heads, i % heads)));
    (out, lse)
}

/// One (sequence, head), on the calling thread.
pub fn forward_head(
    mut out: Band,
    lse: &mut [f32],
    q: Rows,
    k: Rows,
    v: Rows,
    size: Size,
    (sequence, head): (usize, usize),
) {
    let time = size.time;
    scratch(BLOCK.min(time) * time, |p| {
        for (start, end) in size.blocks() {
            let n = end - start;
            let p = &mut p[..n * end];
            let (q, k) = (q.of(size, sequence, head, start, n), k.of(size, sequence, head, 0, end));
            gemm::gemm(p, Into::Overwrite, size.scale(), q, k.t(), Threads::One);
            softmax(p, end, start, &mut lse[start..end]);
            let v = v.of(size, sequence, head, 0, end);
            gemm_band(&mut out.part(start, n), Into::Overwrite, 1.0, Mat::new(p, n, end), v);
        }
    });
}

/// Splits a row after the columns that are seen and up to 15 more, which become -infinity: whole vectors for `exp`.
fn padded(row: &mut [f32], seen: usize) -> (&mut [f32], &mut [f32]) {
    let (padded, future) = row.split_at_mut(seen.next_multiple_of(16).min(row.len()));
    padded[seen..].fill(f32::NEG_INFINITY);
    (padded, future)
}

/// Turns rows of scores into probabilities, in place; row `r` sees its first `first + r + 1` of `keys` columns.
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

/// Where the gradients of one (batch, head) go.
pub struct HeadGradients<'a> {
    q: Band<'a>,
    k: Band<'a>,
    v: Band<'a>,
}

/// One (batch, head): P again from the scores and their log-sum-exp, then dV = P' G, dS = P (G V' - rowsum(G O)),
/// dQ = dS K, dK = dS' Q.
pub fn backward_head(
    mut to: HeadGradients,
    [q, k, v]: [Rows; 3],
    out: Rows,
    g: Rows,
    lse: &[f32],
    size: Size,
    (sequence, head): (usize, usize),
) {
    let time = size.time;
    let block = BLOCK.min(time) * time;
    scratch(2 * block, |both| {
        let (p, ds) = both.split_at_mut(block);
        for (start, end) in size.blocks() {
            let n = end - start;
            let into = if end == time { Into::Overwrite } else { Into::Add };
            let (p, ds) = (&mut p[..n * end], &mut ds[..n * end]);
            let q = q.of(size, sequence, head, start, n);
            let k = k.of(size, sequence, head, 0, end);
            let v = v.of(size, sequence, head, 0, end);
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
            gemm_band(&mut to.v.head(end), into, 1.0, p.t(), g_block);
            gemm_band(&mut to.k.head(end), into, 1.0, ds.t(), q);
            gemm_band(&mut to.q.part(start, n), Into::Overwrite, 1.0, ds, k);
        }
    });
}

simd! {
    /// Scores to probabilities, and G V' to the gradient of the unscaled scores, both in place.
    fn score_gradient(p: &mut [f32], ds: &mut [f32], g: &[f32], out: &[f32], lse: f32, scale: f32) {
        let mean = sum_map2(g, out, |g, o| g * o);
        for (p, ds) in p.iter_mut().zip(ds) {
            *p = exp::<FMA>(*p - lse);
            *ds = *p * (*ds - mean) * scale;
        }
    }
}

/// Runs all heads; `parts` holds, for each (batch, head) in order, where its gradients go.
fn backward(parts: Vec<HeadGradients>, qkv: [Rows; 3], out: Rows, g: Rows, lse: &[f32], size: Size) {
    parts.into_par_iter().enumerate().for_each(|(i, to)| {
        let lse = &lse[i * size.time..(i + 1) * size.time];
        backward_head(to, qkv, out, g, lse, size, (i / size.heads, i % size.heads));
    });
}

/// Cuts the gradient of joint rows `[batch * time, 3 d]` into the parts of each (batch, head), in order.
pub fn joint_gradients(grad: &mut [f32], size: Size) -> Vec<HeadGradients<'_>> {
    let Size { batch, time, heads, width } = size;
    let mut all: Vec<Option<Band>> = bands(grad, time, width, 3 * heads).into_iter().map(Some).collect();
    (0..batch * heads)
        .map(|i| {
            let first = i / heads * 3 * heads + i % heads;
            let mut take = |at: usize| all[at].take().expect("each of the 3 heads x batch bands is taken once");
            HeadGradients { q: take(first), k: take(first + heads), v: take(first + 2 * heads) }
        })
        .collect()
}

/// Rows of one of queries, keys, values alone.
pub fn dense(data: &[f32], d: usize) -> Rows<'_> {
    Rows { data, stride: d, offset: 0 }
}

/// Queries, keys and values side by side in rows of 3 d.
pub fn joint(data: &[f32], d: usize) -> [Rows<'_>; 3] {
    [0, 1, 2].map(|i| Rows { data, stride: 3 * d, offset: i * d })
}

fn kept(lse: &OnceLock<Vec<f32>>) -> Result<&[f32]> {
    match lse.get() {
        Some(lse) => Ok(lse),
        None => bail!("attention's backward pass before its forward pass"),
    }
}

/// From the joint projection `[.., 3 d]`.
pub struct Joint {
    pub size: Size,
    pub lse: OnceLock<Vec<f32>>,
}

impl CustomOp1 for Joint {
    fn name(&self) -> &'static str {
        "temper-causal-attention-qkv"
    }

    fn cpu_fwd(&self, qkv: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let d = self.size.d();
        let [q, k, v] = joint(slice(qkv, layout)?, d);
        let (out, lse) = forward(q, k, v, self.size);
        self.lse.get_or_init(|| lse);
        let mut shape = layout.shape().dims().to_vec();
        shape.pop();
        shape.push(d);
        output(out, shape)
    }

    fn bwd(&self, qkv: &Tensor, out: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let g = g.contiguous()?;
        let (qkv_v, out_v, g_v) = (View::of(qkv)?, View::of(out)?, View::of(&g)?);
        let d = self.size.d();
        let mut grad = build(qkv_v.len(), self.size.time * 3 * d, |_, _| {});
        let parts = joint_gradients(&mut grad, self.size);
        backward(parts, joint(&qkv_v, d), dense(&out_v, d), dense(&g_v, d), kept(&self.lse)?, self.size);
        gradient(grad, qkv).map(Some)
    }
}

/// From queries, keys and values apart, `[.., d]` each.
pub struct Apart {
    pub size: Size,
    pub lse: OnceLock<Vec<f32>>,
}

impl CustomOp3 for Apart {
    fn name(&self) -> &'static str {
        "temper-causal-attention"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_l: &Layout,
        k: &CpuStorage,
        k_l: &Layout,
        v: &CpuStorage,
        v_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let d = self.size.d();
        let (out, lse) =
            forward(dense(slice(q, q_l)?, d), dense(slice(k, k_l)?, d), dense(slice(v, v_l)?, d), self.size);
        self.lse.get_or_init(|| lse);
        output(out, q_l.shape())
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        out: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let g = g.contiguous()?;
        let (q_v, k_v, v_v, out_v, g_v) = (View::of(q)?, View::of(k)?, View::of(v)?, View::of(out)?, View::of(&g)?);
        let Size { time, heads, width, .. } = self.size;
        let d = self.size.d();
        let mut grads = [(); 3].map(|()| build(q_v.len(), time * d, |_, _| {}));
        let [dq, dk, dv] = &mut grads;
        let parts = bands(dq, time, width, heads)
            .into_iter()
            .zip(bands(dk, time, width, heads))
            .zip(bands(dv, time, width, heads))
            .map(|((q, k), v)| HeadGradients { q, k, v })
            .collect();
        let rows = [dense(&q_v, d), dense(&k_v, d), dense(&v_v, d)];
        backward(parts, rows, dense(&out_v, d), dense(&g_v, d), kept(&self.lse)?, self.size);
        let [dq, dk, dv] = grads;
        Ok((Some(gradient(dq, q)?), Some(gradient(dk, k)?), Some(gradient(dv, v)?)))
    }
}
