//! The activations of an MLP, on slices: GELU in its tanh form, and SwiGLU's gate.
//!
//! gelu(x) = x / 2 (1 + tanh u) = x sigmoid(2u) with u = sqrt(2/pi) (x + 0.044715 x^3), which needs one exponential and
//! no tanh. swiglu(a, b) = a sigmoid(a) b.

use temper_gemm::buffer::with_scratch;
use temper_gemm::simd;
use temper_gemm::simd::{exp, fma};

use crate::model::block::Activation;

/// 2 sqrt(2/pi)
const SLOPE: f32 = 1.595_769;
const CUBIC: f32 = 0.044_715;

impl Activation {
    /// `y [n, inner]` from `x [n, input_width]`.
    pub fn forward(self, y: &mut [f32], x: &[f32], inner: usize) {
        match self {
            Self::GeluTanh => gelu(y, x),
            Self::SwiGlu => {
                for (y, x) in y.chunks_exact_mut(inner).zip(x.chunks_exact(2 * inner)) {
                    let (gate, value) = x.split_at(inner);
                    swiglu(y, gate, value);
                }
            }
        }
    }

    /// Recomputes `y [n, inner]` and computes `dx [n, input_width]`; `output_gradient` fills the gradient of `y`.
    pub fn backward(
        self,
        y: &mut [f32],
        dx: &mut [f32],
        x: &[f32],
        inner: usize,
        output_gradient: impl FnOnce(&mut [f32]),
    ) {
        match self {
            Self::GeluTanh => {
                output_gradient(dx);
                gelu_with_grad(y, x, dx);
            }
            Self::SwiGlu => with_scratch(y.len(), |g| {
                output_gradient(g);
                let rows = y.chunks_exact_mut(inner).zip(g.chunks_exact(inner));
                let wide = x.chunks_exact(2 * inner).zip(dx.chunks_exact_mut(2 * inner));
                for ((y, g), (x, dx)) in rows.zip(wide) {
                    let (gate, value) = x.split_at(inner);
                    let (d_gate, d_value) = dx.split_at_mut(inner);
                    swiglu_with_grad(y, d_gate, d_value, gate, value, g);
                }
            }),
        }
    }
}

/// sigmoid(2u)
#[inline(always)]
fn gate<const FMA: bool>(x: f32) -> f32 {
    let u2 = SLOPE * x * fma::<FMA>(CUBIC, x * x, 1.0);
    1.0 / (1.0 + exp::<FMA>(-u2))
}

simd! {
    fn gelu(y: &mut [f32], x: &[f32]) {
        for (y, &x) in y.iter_mut().zip(x) {
            *y = x * gate::<FMA>(x);
        }
    }
}

simd! {
    /// Computes `y` = gelu(x) and turns `g` into the gradient of x: with s = sigmoid(2u), g (s + x s (1 - s) 2u').
    fn gelu_with_grad(y: &mut [f32], x: &[f32], g: &mut [f32]) {
        for ((y, &x), g) in y.iter_mut().zip(x).zip(g) {
            let s = gate::<FMA>(x);
            let slope = SLOPE * fma::<FMA>(3.0 * CUBIC, x * x, 1.0);
            *y = x * s;
            *g *= fma::<FMA>(x * slope, s * (1.0 - s), s);
        }
    }
}

simd! {
    fn swiglu(y: &mut [f32], gate: &[f32], value: &[f32]) {
        for ((y, &a), &b) in y.iter_mut().zip(gate).zip(value) {
            *y = a * b / (1.0 + exp::<FMA>(-a));
        }
    }
}

simd! {
    /// With s = sigmoid(a): y = a s b, da = g b s (1 + a (1 - s)), db = g a s.
    fn swiglu_with_grad(y: &mut [f32], da: &mut [f32], db: &mut [f32], gate: &[f32], value: &[f32], g: &[f32]) {
        let gradients = da.iter_mut().zip(db);
        for (((y, (da, db)), (&a, &b)), &g) in y.iter_mut().zip(gradients).zip(gate.iter().zip(value)).zip(g) {
            let s = 1.0 / (1.0 + exp::<FMA>(-a));
            *y = a * s * b;
            *da = g * b * s * fma::<FMA>(a, 1.0 - s, 1.0);
            *db = g * a * s;
        }
    }
}
