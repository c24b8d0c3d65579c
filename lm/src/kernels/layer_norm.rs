//! Layer normalisation, forward and backward. The backward pass recomputes each row's mean and deviation, which costs
//! less than keeping them apart.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

use super::buffer::{CHUNK, build, sum_chunks};
use super::glue::{View, gradient, output, slice};
use super::simd::{add_assign, fma, simd, sum_map, sum_map2, sum_map3};
use super::sink::deliver;

/// Rows whose contributions to the gradients of weight and bias are summed by one task.
const ROWS: usize = 64;

pub struct LayerNorm {
    pub d: usize,
    pub eps: f32,
}

impl LayerNorm {
    fn chunk(&self) -> usize {
        (CHUNK / self.d).max(1) * self.d
    }
}

impl CustomOp3 for LayerNorm {
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
        let (x, w, b) = (slice(x, x_l)?, slice(w, w_l)?, slice(b, b_l)?);
        let y = build(x.len(), self.chunk(), |start, y| forward(y, &x[start..start + y.len()], w, b, self.eps));
        output(y, x_l.shape())
    }

    fn bwd(
        &self,
        x: &Tensor,
        w: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let g = g.contiguous()?;
        let (x_v, w_v, g_v) = (View::of(x)?, View::of(w)?, View::of(&g)?);
        let d = self.d;
        let dx = x.track_op().then(|| {
            build(x_v.len(), self.chunk(), |start, dx| {
                let part = start..start + dx.len();
                backward(dx, &x_v[part.clone()], &g_v[part], &w_v, self.eps);
            })
        });
        let (dw, db) = if w.track_op() || b.track_op() {
            let both = sum_chunks(2 * d, (x_v.len() / d).div_ceil(ROWS), |i, acc| {
                let part = i * ROWS * d..((i + 1) * ROWS * d).min(x_v.len());
                let (dw, db) = acc.split_at_mut(d);
                backward_weights(dw, db, &x_v[part.clone()], &g_v[part], self.eps);
            });
            let db = b.track_op().then(|| both[d..].to_vec());
            let mut dw = both;
            dw.truncate(d);
            (w.track_op().then_some(dw), db)
        } else {
            (None, None)
        };
        let dx = dx.map(|v| gradient(v, x)).transpose()?;
        let dw = dw.map_or(Ok(None), |v| deliver(w, v))?;
        Ok((dx, dw, db.map_or(Ok(None), |v| deliver(b, v))?))
    }
}

/// Mean and 1 / sqrt(variance + eps) of a row.
#[inline(always)]
fn moments<const FMA: bool>(x: &[f32], eps: f32) -> (f32, f32) {
    let n = x.len() as f32;
    let mean = sum_map(x, |v| v) / n;
    let variance = sum_map(x, |v| (v - mean) * (v - mean)) / n;
    (mean, 1.0 / (variance + eps).sqrt())
}

simd! {
    /// Rows of `w.len()` elements.
    pub fn forward(y: &mut [f32], x: &[f32], w: &[f32], b: &[f32], eps: f32) {
        let d = w.len();
        for (y, x) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
            let (mean, rstd) = moments::<FMA>(x, eps);
            for (((y, &x), &w), &b) in y.iter_mut().zip(x).zip(w).zip(b) {
                *y = fma::<FMA>((x - mean) * rstd, w, b);
            }
        }
    }
}

simd! {
    /// With h = (x - mean) rstd and u = g w: dx += rstd (u - mean(u) - h mean(u h)).
    pub fn backward(dx: &mut [f32], x: &[f32], g: &[f32], w: &[f32], eps: f32) {
        let d = w.len();
        let n = d as f32;
        for ((dx, x), g) in dx.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(g.chunks_exact(d)) {
            let (mean, rstd) = moments::<FMA>(x, eps);
            let mean_u = sum_map2(g, w, |g, w| g * w) / n;
            let slope = sum_map3(g, w, x, |g, w, x| g * w * (x - mean)) * rstd * rstd / n;
            for (((dx, &x), &g), &w) in dx.iter_mut().zip(x).zip(g).zip(w) {
                *dx = fma::<FMA>(rstd, g * w - mean_u - (x - mean) * slope, *dx);
            }
        }
    }
}

simd! {
    /// `dw += g h`, `db += g`, row by row.
    pub fn backward_weights(dw: &mut [f32], db: &mut [f32], x: &[f32], g: &[f32], eps: f32) {
        let d = dw.len();
        for (x, g) in x.chunks_exact(d).zip(g.chunks_exact(d)) {
            let (mean, rstd) = moments::<FMA>(x, eps);
            for (((dw, db), &x), &g) in dw.iter_mut().zip(db.iter_mut()).zip(x).zip(g) {
                *dw = fma::<FMA>((x - mean) * rstd, g, *dw);
                *db += g;
            }
        }
    }
}

/// Column sums of `g [n, d]`: the gradient of a bias.
pub fn column_sums(g: &[f32], d: usize) -> Vec<f32> {
    sum_chunks(d, (g.len() / d).div_ceil(ROWS), |i, acc| {
        add_columns(acc, &g[i * ROWS * d..((i + 1) * ROWS * d).min(g.len())]);
    })
}

/// Adds the rows of `g` to `sums`, one after the other.
pub fn add_columns(sums: &mut [f32], g: &[f32]) {
    for row in g.chunks_exact(sums.len()) {
        add_assign(sums, row);
    }
}
