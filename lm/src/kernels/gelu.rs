//! GELU in its tanh form. gelu(x) = x / 2 (1 + tanh u) = x sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3), which
//! needs one exponential and no tanh.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};

use super::buffer::{CHUNK, build};
use super::glue::{View, gradient, output, slice};
use super::simd::{exp, fma, simd};

/// 2 sqrt(2/pi)
const SLOPE: f32 = 1.595_769;
const CUBIC: f32 = 0.044_715;

pub struct Gelu;

impl CustomOp1 for Gelu {
    fn name(&self) -> &'static str {
        "temper-gelu-tanh"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let x = slice(x, layout)?;
        output(build(x.len(), CHUNK, |start, y| forward(y, &x[start..start + y.len()])), layout.shape())
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let g = g.contiguous()?;
        let (x_v, g_v) = (View::of(x)?, View::of(&g)?);
        let dx = build(x_v.len(), CHUNK, |start, dx| {
            let part = start..start + dx.len();
            backward(dx, &x_v[part.clone()], &g_v[part]);
        });
        gradient(dx, x).map(Some)
    }
}

/// sigmoid(2u)
#[inline(always)]
fn gate<const FMA: bool>(x: f32) -> f32 {
    let u2 = SLOPE * x * fma::<FMA>(CUBIC, x * x, 1.0);
    1.0 / (1.0 + exp::<FMA>(-u2))
}

simd! {
    pub fn forward(y: &mut [f32], x: &[f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = x * gate::<FMA>(x);
        }
    }
}

simd! {
    /// With s = sigmoid(2u): dx = g (s + x s (1 - s) 2u').
    pub fn backward(dx: &mut [f32], x: &[f32], g: &[f32]) {
        for ((dx, &x), &g) in dx.iter_mut().zip(x).zip(g) {
            let s = gate::<FMA>(x);
            let slope = SLOPE * fma::<FMA>(3.0 * CUBIC, x * x, 1.0);
            *dx = g * fma::<FMA>(x * slope, s * (1.0 - s), s);
        }
    }
}

simd! {
    /// [`forward`] again beside [`backward`]: `y` = gelu(x), and `g` becomes the gradient of x.
    pub fn both(y: &mut [f32], x: &[f32], g: &mut [f32]) {
        for ((y, &x), g) in y.iter_mut().zip(x).zip(g) {
            let s = gate::<FMA>(x);
            let slope = SLOPE * fma::<FMA>(3.0 * CUBIC, x * x, 1.0);
            *y = x * s;
            *g *= fma::<FMA>(x * slope, s * (1.0 - s), s);
        }
    }
}
