//! RMS normalisation of rows, forward and backward: x / sqrt(mean(x^2) + eps) * w.
use temper_gemm::simd;
use temper_gemm::simd::{fma, sum_map, sum_map3};

/// 1 / sqrt(mean(x^2) + eps).
#[inline(always)]
fn inverse_rms(x: &[f32], eps: f32) -> f32 {
    1.0 / (sum_map(x, |v| v * v) / x.len() as f32 + eps).sqrt()
}

simd! {
    /// Rows of `w.len()` elements.
    pub fn forward(y: &mut [f32], x: &[f32], w: &[f32], eps: f32) {
        let d = w.len();
        for (y, x) in y.chunks_exact_mut(d).zip(x.chunks_exact(d)) {
            let r = inverse_rms(x, eps);
            for ((y, &x), &w) in y.iter_mut().zip(x).zip(w) {
                *y = x * r * w;
            }
        }
    }
}

simd! {
    /// With r = 1 / rms and u = g w: dx += r (u - x r^2 mean(u x)).
    pub fn backward(dx: &mut [f32], x: &[f32], g: &[f32], w: &[f32], eps: f32) {
        let d = w.len();
        for ((dx, x), g) in dx.chunks_exact_mut(d).zip(x.chunks_exact(d)).zip(g.chunks_exact(d)) {
            let r = inverse_rms(x, eps);
            let slope = sum_map3(g, w, x, |g, w, x| g * w * x) * r * r / d as f32;
            for (((dx, &x), &g), &w) in dx.iter_mut().zip(x).zip(g).zip(w) {
                *dx = fma::<FMA>(r, g * w - x * slope, *dx);
            }
        }
    }
}

simd! {
    /// `dw += g x r`, row by row.
    pub fn backward_weight(dw: &mut [f32], x: &[f32], g: &[f32], eps: f32) {
        let d = dw.len();
        for (x, g) in x.chunks_exact(d).zip(g.chunks_exact(d)) {
            let r = inverse_rms(x, eps);
            for ((dw, &x), &g) in dw.iter_mut().zip(x).zip(g) {
                *dw = fma::<FMA>(x * r, g, *dw);
            }
        }
    }
}
