//! A frozen linear map with a low-rank adapter: y = x w + bias + scale (m x) a' b', m the dropout mask.
//!
//! Without a mask the two are one product with the weight w + scale a' b', which costs in x rank x out once instead of
//! two thin products and a pass over y for every row. The gradients of the adapter come from thin products only.

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};

use super::buffer::{CHUNK, build, for_chunks};
use super::gemm::{self, Into, Mat, Threads, product};
use super::glue::{View, gradient, output, slice};
use super::linear::{Linear, forward, input_gradient};
use super::simd::multiply;
use super::sink::deliver;

pub struct Lora {
    pub size: Linear,
    pub rank: usize,
    pub w: Tensor,
    pub bias: Option<Tensor>,
    pub scale: f32,
    pub mask: Option<Tensor>,
}

impl Lora {
    /// w + scale a' b'
    fn merged(&self, a: &[f32], b: &[f32]) -> Result<Vec<f32>> {
        let Linear { d_in, d_out, .. } = self.size;
        let mut w = View::of(&self.w)?.to_vec();
        let (a, b) = (Mat::new(a, self.rank, d_in), Mat::new(b, d_out, self.rank));
        gemm::gemm(&mut w, Into::Add, self.scale, a.t(), b.t(), Threads::Pool);
        Ok(w)
    }

    /// What the adapter sees: x, or x under the mask.
    fn seen<'x>(&self, x: &'x [f32]) -> Result<std::borrow::Cow<'x, [f32]>> {
        Ok(match &self.mask {
            None => x.into(),
            Some(mask) => masked(x, &View::of(mask)?).into(),
        })
    }
}

fn masked(x: &[f32], mask: &[f32]) -> Vec<f32> {
    build(x.len(), CHUNK, |start, out| {
        let part = start..start + out.len();
        multiply(out, &x[part.clone()], &mask[part]);
    })
}

impl CustomOp3 for Lora {
    fn name(&self) -> &'static str {
        "temper-lora-linear"
    }

    fn cpu_fwd(
        &self,
        x: &CpuStorage,
        x_l: &Layout,
        a: &CpuStorage,
        a_l: &Layout,
        b: &CpuStorage,
        b_l: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (x, a, b) = (slice(x, x_l)?, slice(a, a_l)?, slice(b, b_l)?);
        let Linear { n, d_in, d_out } = self.size;
        let bias = self.bias.as_ref().map(View::of).transpose()?;
        let y = if self.mask.is_none() {
            forward(x, &self.merged(a, b)?, bias.as_deref(), n, d_in, d_out)
        } else {
            let mut y = forward(x, &View::of(&self.w)?, bias.as_deref(), n, d_in, d_out);
            let low = product(1.0, Mat::new(&self.seen(x)?, n, d_in), Mat::new(a, self.rank, d_in).t());
            let b = Mat::new(b, d_out, self.rank);
            gemm::gemm(&mut y, Into::Add, self.scale, Mat::new(&low, n, self.rank), b.t(), Threads::Pool);
            y
        };
        let mut shape = x_l.shape().dims().to_vec();
        shape.pop();
        shape.push(d_out);
        output(y, shape)
    }

    fn bwd(
        &self,
        x: &Tensor,
        a: &Tensor,
        b: &Tensor,
        _y: &Tensor,
        g: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let g = g.contiguous()?;
        let (x_v, a_v, b_v, g_v) = (View::of(x)?, View::of(a)?, View::of(b)?, View::of(&g)?);
        let Linear { n, d_in, d_out } = self.size;
        let rank = self.rank;
        let (a_m, b_m, g_m) = (Mat::new(&a_v, rank, d_in), Mat::new(&b_v, d_out, rank), Mat::new(&g_v, n, d_out));
        // [n, rank]: the gradient of the low-rank activations.
        let low_gradient = product(self.scale, g_m, b_m);
        let low_gradient = Mat::new(&low_gradient, n, rank);
        let dx = match (x.track_op(), &self.mask) {
            (false, _) => None,
            (true, None) => Some(input_gradient(&g_v, &self.merged(&a_v, &b_v)?, n, d_in, d_out)),
            (true, Some(mask)) => {
                let mask = View::of(mask)?;
                let mut dx = product(1.0, low_gradient, a_m);
                for_chunks(&mut dx, CHUNK, |start, dx| {
                    dx.iter_mut().zip(&mask[start..]).for_each(|(d, &m)| *d *= m);
                });
                let w = View::of(&self.w)?;
                gemm::gemm(&mut dx, Into::Add, 1.0, g_m, Mat::new(&w, d_in, d_out).t(), Threads::Pool);
                Some(dx)
            }
        };
        let (mut da, mut db) = (None, None);
        if a.track_op() || b.track_op() {
            let seen = self.seen(&x_v)?;
            let seen = Mat::new(&seen, n, d_in);
            if a.track_op() {
                da = deliver(a, product(1.0, low_gradient.t(), seen))?;
            }
            if b.track_op() {
                let low = product(self.scale, seen, a_m.t());
                db = deliver(b, product(1.0, g_m.t(), Mat::new(&low, n, rank)))?;
            }
        }
        Ok((dx.map(|v| gradient(v, x)).transpose()?, da, db))
    }
}
