//! The affine map of a Conv1D weight `[in, out]`, with gradients only for what is trained.

use candle_core::{CpuStorage, CustomOp1, CustomOp2, CustomOp3, Layout, Result, Shape, Tensor};

use super::buffer::{CHUNK, build};
use super::gemm::{self, Into, Mat, Threads, product};
use super::glue::{View, gradient, output, slice};
use super::layer_norm::column_sums;
use super::sink::deliver;

/// `x w + bias` for `x [n, in]`, `w [in, out]`.
pub fn forward(x: &[f32], w: &[f32], bias: Option<&[f32]>, n: usize, d_in: usize, d_out: usize) -> Vec<f32> {
    let (x, w) = (Mat::new(x, n, d_in), Mat::new(w, d_in, d_out));
    let Some(bias) = bias else { return product(1.0, x, w) };
    let mut y = repeated(bias, n);
    gemm::gemm(&mut y, Into::Add, 1.0, x, w, Threads::Pool);
    y
}

/// `n` rows, each a copy of `row`.
pub fn repeated(row: &[f32], n: usize) -> Vec<f32> {
    let d = row.len();
    build(n * d, (CHUNK / d).max(1) * d, |_, part| part.chunks_exact_mut(d).for_each(|y| y.copy_from_slice(row)))
}

/// Gradient of the input: `g w'`.
pub fn input_gradient(g: &[f32], w: &[f32], n: usize, d_in: usize, d_out: usize) -> Vec<f32> {
    product(1.0, Mat::new(g, n, d_out), Mat::new(w, d_in, d_out).t())
}

/// Gradient of the weight: `x' g`.
pub fn weight_gradient(x: &[f32], g: &[f32], n: usize, d_in: usize, d_out: usize) -> Vec<f32> {
    product(1.0, Mat::new(x, n, d_in).t(), Mat::new(g, n, d_out))
}

/// Sizes of `x [n, in]`, `w [in, out]`.
#[derive(Clone, Copy)]
pub struct Linear {
    pub n: usize,
    pub d_in: usize,
    pub d_out: usize,
}

impl Linear {
    fn run(&self, x: &[f32], w: &[f32], bias: Option<&[f32]>, x_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let mut shape = x_l.shape().dims().to_vec();
        shape.pop();
        shape.push(self.d_out);
        output(forward(x, w, bias, self.n, self.d_in, self.d_out), shape)
    }

    fn gradients(&self, x: &Tensor, w: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (x_v, w_v, g_v) = (View::of(x)?, View::of(w)?, View::of(g)?);
        let dx = x.track_op().then(|| gradient(input_gradient(&g_v, &w_v, self.n, self.d_in, self.d_out), x));
        let dw = match w.track_op() {
            true => deliver(w, weight_gradient(&x_v, &g_v, self.n, self.d_in, self.d_out))?,
            false => None,
        };
        Ok((dx.transpose()?, dw))
    }
}

impl CustomOp2 for Linear {
    fn name(&self) -> &'static str {
        "temper-linear"
    }

    fn cpu_fwd(&self, x: &CpuStorage, x_l: &Layout, w: &CpuStorage, w_l: &Layout) -> Result<(CpuStorage, Shape)> {
        self.run(slice(x, x_l)?, slice(w, w_l)?, None, x_l)
    }

    fn bwd(&self, x: &Tensor, w: &Tensor, _y: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        self.gradients(x, w, &g.contiguous()?)
    }
}

impl CustomOp3 for Linear {
    fn name(&self) -> &'static str {
        "temper-linear-bias"
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
        self.run(slice(x, x_l)?, slice(w, w_l)?, Some(slice(b, b_l)?), x_l)
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
        let (dx, dw) = self.gradients(x, w, &g)?;
        let db = match b.track_op() {
            true => deliver(b, column_sums(&View::of(&g)?, self.d_out))?,
            false => None,
        };
        Ok((dx, dw, db))
    }
}

/// A linear map whose weight and bias are frozen.
pub struct Frozen {
    pub size: Linear,
    pub w: Tensor,
    pub bias: Option<Tensor>,
}

impl CustomOp1 for Frozen {
    fn name(&self) -> &'static str {
        "temper-linear-frozen"
    }

    fn cpu_fwd(&self, x: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let bias = self.bias.as_ref().map(View::of).transpose()?;
        self.size.run(slice(x, layout)?, &View::of(&self.w)?, bias.as_deref(), layout)
    }

    fn bwd(&self, x: &Tensor, _y: &Tensor, g: &Tensor) -> Result<Option<Tensor>> {
        let g = g.contiguous()?;
        let Linear { n, d_in, d_out } = self.size;
        gradient(input_gradient(&View::of(&g)?, &View::of(&self.w)?, n, d_in, d_out), x).map(Some)
    }
}
