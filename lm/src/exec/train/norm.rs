//! Layer norm and RMS norm behind one interface, on slices and as a candle operation: layer norm with a bias, RMS norm
//! without.

use std::ops::Deref;

use candle_core::{CpuStorage, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};
use temper_gemm::buffer::{CHUNK, build_chunked, sum_chunks, with_scratch};

use super::candle_interop::{CpuSlice, contiguous_slice, grad_tensor, op_output};
use super::grad_accumulator::{accumulate, accumulate_or_return};
use super::{layer_norm, rms_norm};
use crate::model::block::Norm;

/// Rows per task in the sums for the gradients of weight and bias.
const ROWS: usize = 64;

/// A normalisation of rows of `w.len()` elements.
#[derive(Clone, Copy)]
pub struct RowNorm<S> {
    pub w: S,
    pub b: Option<S>,
    pub eps: f32,
}

impl<'a> RowNorm<CpuSlice<'a>> {
    pub fn new(norm: &'a Norm) -> Result<Self> {
        let b = norm.bias.as_ref().map(CpuSlice::new).transpose()?;
        Ok(Self { w: CpuSlice::new(&norm.weight)?, b, eps: norm.eps as f32 })
    }
}

impl<S: Deref<Target = [f32]>> RowNorm<S> {
    pub fn forward(&self, y: &mut [f32], x: &[f32]) {
        match &self.b {
            Some(b) => layer_norm::forward(y, x, &self.w, b, self.eps),
            None => rms_norm::forward(y, x, &self.w, self.eps),
        }
    }

    /// Adds to `dx` the gradient of `x`, given the gradient `g` of the result.
    pub fn backward(&self, dx: &mut [f32], x: &[f32], g: &[f32]) {
        match self.b {
            Some(_) => layer_norm::backward(dx, x, g, &self.w, self.eps),
            None => rms_norm::backward(dx, x, g, &self.w, self.eps),
        }
    }

    /// Number of elements of the gradients of weight and bias together.
    pub fn size(&self) -> usize {
        self.w.len() + self.b.as_ref().map_or(0, |b| b.len())
    }

    /// Adds to `both` the gradients of the weight and, behind it, of the bias.
    pub fn backward_weights(&self, both: &mut [f32], x: &[f32], g: &[f32]) {
        let (dw, db) = both.split_at_mut(self.w.len());
        match self.b {
            Some(_) => layer_norm::backward_weights(dw, db, x, g, self.eps),
            None => rms_norm::backward_weight(dw, x, g, self.eps),
        }
    }
}

/// Normalises the heads of queries and keys, in place. They begin each row of `stride` columns, in the given numbers of
/// columns.
pub fn norm_heads<S: Deref<Target = [f32]>>(
    norms: &[RowNorm<S>; 2],
    rows: &mut [f32],
    stride: usize,
    columns: [usize; 2],
) {
    let all = columns[0] + columns[1];
    with_scratch(all, |copy| {
        for row in rows.chunks_exact_mut(stride) {
            copy.copy_from_slice(&row[..all]);
            let (q, k) = row[..all].split_at_mut(columns[0]);
            norms[0].forward(q, &copy[..columns[0]]);
            norms[1].forward(k, &copy[columns[0]..]);
        }
    });
}

/// The backward pass of [`norm_heads`]: replaces the gradients in `rows` and adds those of each norm's tensors to its
/// part of `small_grads`, if they are trained. `x [rows, all columns]` holds queries and keys before they were
/// normalised.
pub fn norm_heads_backward<S: Deref<Target = [f32]>>(
    norms: &[RowNorm<S>; 2],
    small_grads: [&mut [f32]; 2],
    rows: &mut [f32],
    x: &[f32],
    stride: usize,
    columns: [usize; 2],
) {
    let all = columns[0] + columns[1];
    let [of_q, of_k] = small_grads;
    with_scratch(all, |g| {
        for (row, x) in rows.chunks_exact_mut(stride).zip(x.chunks_exact(all)) {
            g.copy_from_slice(&row[..all]);
            row[..all].fill(0.0);
            let (q, k) = row[..all].split_at_mut(columns[0]);
            let ((g_q, g_k), (x_q, x_k)) = (g.split_at(columns[0]), x.split_at(columns[0]));
            for (norm, grads, dx, x, g) in [(&norms[0], &mut *of_q, q, x_q, g_q), (&norms[1], &mut *of_k, k, x_k, g_k)]
            {
                norm.backward(dx, x, g);
                if !grads.is_empty() {
                    norm.backward_weights(grads, x, g);
                }
            }
        }
    });
}

/// Normalises the rows `[.., d]` of its first operand; the others are the weight `[d]` and, for layer norm, the bias
/// `[d]`.
pub struct NormOp {
    pub d: usize,
    pub eps: f32,
}

impl NormOp {
    fn chunk(&self) -> usize {
        (CHUNK / self.d).max(1) * self.d
    }

    fn forward(&self, x: &[f32], w: &[f32], b: Option<&[f32]>, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let norm = RowNorm { w, b, eps: self.eps };
        let y = build_chunked(x.len(), self.chunk(), |start, y| norm.forward(y, &x[start..start + y.len()]));
        op_output(y, layout.shape())
    }

    fn backward(&self, x: &Tensor, w: &Tensor, b: Option<&Tensor>, g: &Tensor) -> Result<[Option<Tensor>; 3]> {
        let g = g.contiguous()?;
        let (x_v, w_v, g_v) = (CpuSlice::new(x)?, CpuSlice::new(w)?, CpuSlice::new(&g)?);
        let norm = RowNorm { w: w_v, b: b.map(CpuSlice::new).transpose()?, eps: self.eps };
        let d = self.d;
        let dx = x.track_op().then(|| {
            build_chunked(x_v.len(), self.chunk(), |start, dx| {
                let part = start..start + dx.len();
                norm.backward(dx, &x_v[part.clone()], &g_v[part]);
            })
        });
        let dx = dx.map(|v| grad_tensor(v, x)).transpose()?;
        if !w.track_op() && !b.is_some_and(Tensor::track_op) {
            return Ok([dx, None, None]);
        }
        let mut dw = sum_chunks(norm.size(), (x_v.len() / d).div_ceil(ROWS), |i, acc| {
            let part = i * ROWS * d..((i + 1) * ROWS * d).min(x_v.len());
            norm.backward_weights(acc, &x_v[part.clone()], &g_v[part]);
        });
        let db = dw.split_off(d);
        let dw = if w.track_op() { accumulate_or_return(w, dw)? } else { None };
        let db = match b {
            Some(b) if b.track_op() => accumulate_or_return(b, db)?,
            _ => None,
        };
        Ok([dx, dw, db])
    }
}

impl CustomOp2 for NormOp {
    fn name(&self) -> &'static str {
        "temper-rms-norm"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_l: &Layout, w: &CpuStorage, w_l: &Layout) -> Result<(CpuStorage, Shape)> {
        self.forward(contiguous_slice(x, x_l)?, contiguous_slice(w, w_l)?, None, x_l)
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _y: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, _] = self.backward(x, w, None, g)?;
        Ok((dx, dw))
    }
}

impl CustomOp3 for NormOp {
    fn name(&self) -> &'static str {
        "temper-layer-norm"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_l: &Layout,
        w: &CpuStorage,
        w_l: &Layout,
        b: &CpuStorage,
        b_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        self.forward(contiguous_slice(x, x_l)?, contiguous_slice(w, w_l)?, Some(contiguous_slice(b, b_l)?), x_l)
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let [dx, dw, db] = self.backward(x, w, Some(b), g)?;
        Ok((dx, dw, db))
    }
}

/// The gradients of a norm's tensors, in the layout of [`RowNorm::backward_weights`].
impl Norm {
    /// Number of elements; 0 if none of it is trained.
    pub fn small_grad_len(&self) -> usize {
        if self.tensors().any(Tensor::is_variable) { self.tensors().map(Tensor::elem_count).sum() } else { 0 }
    }

    pub fn accumulate_small_grads(&self, mut grads: &[f32]) -> Result<()> {
        if grads.is_empty() {
            return Ok(());
        }
        for tensor in self.tensors() {
            let own = grads.split_off(..tensor.elem_count()).expect("gradients of all tensors");
            if tensor.is_variable() {
                accumulate(tensor, own.to_vec())?;
            }
        }
        Ok(())
    }
}
