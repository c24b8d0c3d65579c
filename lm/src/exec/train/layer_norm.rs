//! Layer normalisation of rows, forward and backward: (x - mean) / sqrt(variance + eps) * w + b. The backward pass
//! recomputes each row's mean and deviation, which is cheaper than storing them.
use temper_gemm::simd;
use temper_gemm::simd::{fma, sum_map, sum_map2, sum_map3};

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
