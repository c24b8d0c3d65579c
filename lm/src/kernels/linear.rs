//! A linear map with an optional bias and low-rank adapter, on slices that hold some rows of a batch; its output fills
//! some columns of a wider matrix. The building block of a transformer block's maps.

use candle_core::{Result, Tensor, bail};

use super::buffer::scratch;
use super::gemm::{self, Into, Mat, Threads};
use super::glue::{View, expect};
use super::product::{Factor, Plus, Prepared, multiply, multiply_columns, product_once};
use super::simd::add_assign;
use super::sink::deliver_aside;
use super::{Adapter, Mask, Projection};
use crate::Precision;

/// The tensors of a projection, kept for the backward pass.
pub struct Parts {
    w: Tensor,
    bias: Option<Tensor>,
    low: Option<LowParts>,
    pub d_in: usize,
    pub d_out: usize,
}

struct LowParts {
    a: Tensor,
    b: Tensor,
    rank: usize,
    scale: f32,
    mask: Option<Mask>,
}

impl Parts {
    /// Checks the shapes of a map of `d_in` columns, applied to `rows` rows.
    pub fn new(p: &Projection, rows: usize, d_in: usize) -> Result<Self> {
        let (w_in, d_out) = p.w.dims2()?;
        if w_in != d_in || d_out == 0 {
            bail!("a projection {:?} of rows of width {d_in}", p.w.shape());
        }
        if let Some(bias) = p.bias {
            expect("a projection's bias", bias, &[d_out])?;
        }
        let Some(Adapter { a, b, scale, mask }) = &p.adapter else {
            return Ok(Self { w: trained(p.w)?, bias: p.bias.map(trained).transpose()?, low: None, d_in, d_out });
        };
        let rank = a.dims2()?.0;
        expect("lora_A", a, &[rank, d_in])?;
        expect("lora_B", b, &[d_out, rank])?;
        if let Some(mask) = mask
            && mask.elements() != rows * d_in
        {
            bail!("an adapter's dropout mask of {} elements for {rows} rows of width {d_in}", mask.elements());
        }
        let low = LowParts { a: trained(a)?, b: trained(b)?, rank, scale: *scale as f32, mask: mask.cloned() };
        let frozen = |t: &Tensor| t.detach().contiguous();
        Ok(Self { w: frozen(p.w)?, bias: p.bias.map(frozen).transpose()?, low: Some(low), d_in, d_out })
    }

    /// The trained tensors.
    pub fn trained(&self) -> impl Iterator<Item = &Tensor> {
        let low = self.low.iter().flat_map(|l| [&l.a, &l.b]);
        [&self.w].into_iter().chain(&self.bias).chain(low).filter(|t| t.track_op())
    }

    /// Views of the tensors, to be opened once per pass.
    pub fn views(&self) -> Result<Views<'_>> {
        let low = match &self.low {
            Some(l) => Some((View::of(&l.a)?, View::of(&l.b)?)),
            None => None,
        };
        let bias = self.bias.as_ref().map(View::of).transpose()?;
        Ok(Views { w: View::of(&self.w)?, bias, low, parts: self })
    }
}

/// Accepts a variable, or a tensor that needs no gradient.
pub fn trained(t: &Tensor) -> Result<Tensor> {
    if t.track_op() && !t.is_variable() {
        bail!("a transformer block's weights are variables or constants, not results of other operations");
    }
    if t.is_variable() { Ok(t.clone()) } else { t.contiguous() }
}

type LowViews<'a> = (View<'a>, View<'a>);

pub struct Views<'a> {
    w: View<'a>,
    bias: Option<View<'a>>,
    low: Option<LowViews<'a>>,
    parts: &'a Parts,
}

impl Views<'_> {
    /// Prepares the map for one direction. In f32, an adapter without dropout is merged into the weight, w + scale a'
    /// b'; in bf16 it stays separate, since rounding may lose its contribution.
    pub fn map(&self, precision: Precision, way: Way) -> Map<'_> {
        let Parts { d_in, d_out, .. } = *self.parts;
        let mut low = None;
        let merged: Vec<f32>;
        let mut plus = None;
        if let (Some((a, b)), Some(of)) = (&self.low, &self.parts.low) {
            let mask = of.mask.as_ref();
            let within = mask.is_none() && precision == Precision::F32;
            if within {
                merged = scaled_transpose(b, of.rank, of.scale);
                let (a, b) = match way {
                    Way::Forward => (&**a, &*merged),
                    Way::Back => (&*merged, &**a),
                };
                plus = Some(Plus { a, b, rank: of.rank });
            }
            low = Some(Low { a, b, rank: of.rank, scale: of.scale, mask, within });
        }
        let (trains_bias, small) = (self.parts.trains_bias(), self.parts.small());
        let w = Prepared::new(way.of(Mat::new(&self.w, d_in, d_out)), plus, precision);
        Map { w, way, bias: self.bias.as_deref(), low, d_in, d_out, trains_bias, small }
    }
}

/// `scale b'` of `b [n, rank]`: `[rank, n]`.
pub fn scaled_transpose(b: &[f32], rank: usize, scale: f32) -> Vec<f32> {
    (0..rank).flat_map(|r| b.iter().skip(r).step_by(rank).map(|x| scale * x)).collect()
}

struct Low<'a> {
    a: &'a [f32],
    b: &'a [f32],
    rank: usize,
    scale: f32,
    mask: Option<&'a Mask>,
    /// Whether it is merged into the prepared weight.
    within: bool,
}

impl Low<'_> {
    /// The adapter's input for `x`, whose first element is element `at` of the batch; `room` is as large as `x`.
    fn seen<'x>(&self, room: &'x mut [f32], x: &'x [f32], at: usize) -> &'x [f32] {
        let Some(mask) = self.mask else { return x };
        mask.multiply(room, x, at);
        room
    }
}

/// The direction in which rows pass through a map.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Way {
    /// From the input to the output.
    Forward,
    /// Gradients, from the output to the input.
    Back,
}

impl Way {
    fn of(self, w: Mat) -> Mat {
        match self {
            Self::Forward => w,
            Self::Back => w.t(),
        }
    }
}

/// A map prepared for one direction. Methods take the index in the batch of their first row, for the dropout mask, and
/// the columns `at` that the map's output occupies.
pub struct Map<'a> {
    w: Prepared,
    way: Way,
    bias: Option<&'a [f32]>,
    low: Option<Low<'a>>,
    d_in: usize,
    d_out: usize,
    trains_bias: bool,
    small: usize,
}

/// The columns of a map's output: `offset` columns into rows of `stride`.
#[derive(Clone, Copy)]
pub struct At {
    pub stride: usize,
    pub offset: usize,
}

impl At {
    fn of<'g>(self, g: &'g [f32], cols: usize) -> Mat<'g> {
        Mat::columns(g, g.len() / self.stride, cols, self.stride, self.offset)
    }
}

impl Map<'_> {
    pub fn d_out(&self) -> usize {
        self.d_out
    }

    fn weight(&self, way: Way) -> &Prepared {
        assert_eq!(self.way, way, "a map goes the way it was prepared for");
        &self.w
    }

    /// Writes the map's output for `x` to `y`, or adds it.
    pub fn forward(&self, y: &mut [f32], at: At, into: Into, x: &[f32], first: usize) {
        let Self { d_in, d_out, .. } = *self;
        let n = x.len() / d_in;
        let At { stride, offset } = at;
        let w = self.weight(Way::Forward);
        multiply_columns(y, stride, offset, into, self.bias, Mat::new(x, n, d_in), w, Threads::One);
        if let Some(low) = self.low.as_ref().filter(|low| !low.within) {
            scratch(n * (d_in + low.rank), |buffer| {
                let (seen, z) = buffer.split_at_mut(n * d_in);
                let seen = low.seen(seen, x, first * d_in);
                let a = Mat::new(low.a, low.rank, d_in);
                gemm::gemm(z, Into::Overwrite, 1.0, Mat::new(seen, n, d_in), a.t(), Threads::One);
                let (z, b) = (Mat::new(z, n, low.rank), Mat::new(low.b, d_out, low.rank));
                gemm::gemm_columns(y, stride, offset, Into::Add, low.scale, z, b.t(), Threads::One);
            });
        }
    }

    /// Number of elements of [`Map::small_gradients`].
    pub fn small(&self) -> usize {
        self.small
    }

    /// Writes the gradient of the map's input to `dx`, or adds it.
    pub fn input_gradient(&self, dx: &mut [f32], into: Into, g: &[f32], at: At, first: usize) {
        let Self { d_in, d_out, .. } = *self;
        let n = g.len() / at.stride;
        let g = at.of(g, d_out);
        multiply(dx, into, 1.0, g, Factor::Prepared(self.weight(Way::Back)), Threads::One);
        let Some(Low { a, b, rank, scale, mask, within: false }) = self.low else { return };
        scratch(n * (rank + d_in), |buffer| {
            let (dz, seen) = buffer.split_at_mut(n * rank);
            gemm::gemm(dz, Into::Overwrite, scale, g, Mat::new(b, d_out, rank), Threads::One);
            let (dz, a) = (Mat::new(dz, n, rank), Mat::new(a, rank, d_in));
            let Some(mask) = mask else { return gemm::gemm(dx, Into::Add, 1.0, dz, a, Threads::One) };
            gemm::gemm(seen, Into::Overwrite, 1.0, dz, a, Threads::One);
            mask.add_product(dx, seen, first * d_in);
        });
    }

    /// Writes the gradients of bias, A and B' to `small`, one after the other.
    pub fn small_gradients(&self, small: &mut [f32], x: &[f32], g: &[f32], at: At, first: usize) {
        let Self { d_in, d_out, .. } = *self;
        let n = x.len() / d_in;
        let (bias, adapter) = small.split_at_mut(if self.trains_bias { d_out } else { 0 });
        if self.trains_bias {
            for row in g.chunks_exact(at.stride) {
                add_assign(bias, &row[at.offset..at.offset + d_out]);
            }
        }
        let Some(low) = &self.low else { return };
        let Low { a, b, rank, scale, .. } = *low;
        let g = at.of(g, d_out);
        let (da, db) = adapter.split_at_mut(rank * d_in);
        scratch(n * (2 * rank + d_in), |buffer| {
            let (z, rest) = buffer.split_at_mut(n * rank);
            let (dz, seen) = rest.split_at_mut(n * rank);
            let x = Mat::new(low.seen(seen, x, first * d_in), n, d_in);
            gemm::gemm(dz, Into::Overwrite, scale, g, Mat::new(b, d_out, rank), Threads::One);
            gemm::gemm(da, Into::Overwrite, 1.0, Mat::new(dz, n, rank).t(), x, Threads::One);
            gemm::gemm(z, Into::Overwrite, scale, x, Mat::new(a, rank, d_in).t(), Threads::One);
            // Transposed: a product of few rows is faster than one of few columns.
            gemm::gemm(db, Into::Overwrite, 1.0, Mat::new(z, n, rank).t(), g, Threads::One);
        });
    }
}

impl Parts {
    /// Number of elements of the small gradients: bias, A, B'.
    pub fn small(&self) -> usize {
        let bias = if self.trains_bias() { self.d_out } else { 0 };
        bias + self.low.as_ref().map_or(0, |l| l.rank * (self.d_in + self.d_out))
    }

    fn trains_bias(&self) -> bool {
        self.bias.as_ref().is_some_and(Tensor::track_op)
    }

    /// Delivers the small gradients, in the layout of [`Map::small_gradients`].
    pub fn deliver_small(&self, small: &[f32]) -> Result<()> {
        let (bias_gradient, adapter) = small.split_at(if self.trains_bias() { self.d_out } else { 0 });
        if let Some(bias) = &self.bias
            && bias.track_op()
        {
            deliver_aside(bias, bias_gradient.to_vec())?;
        }
        let Some(low) = &self.low else { return Ok(()) };
        let (da, db) = adapter.split_at(low.rank * self.d_in);
        if low.a.track_op() {
            deliver_aside(&low.a, da.to_vec())?;
        }
        if low.b.track_op() {
            let transposed = (0..db.len()).map(|i| db[i % low.rank * self.d_out + i / low.rank]).collect();
            deliver_aside(&low.b, transposed)?;
        }
        Ok(())
    }

    pub fn trains_weight(&self) -> bool {
        self.w.track_op()
    }

    /// Delivers the weight's gradient, x' g.
    pub fn deliver_weight(&self, x: &[f32], g: &[f32], at: At, precision: Precision) -> Result<()> {
        if !self.trains_weight() {
            return Ok(());
        }
        let x = Mat::new(x, x.len() / self.d_in, self.d_in);
        deliver_aside(&self.w, product_once(x.t(), at.of(g, self.d_out), precision))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// In bf16, 1 and its successor are 2^-7 apart: added to the weight, 2^-10 would be lost.
    #[test]
    fn a_small_adapter_beside_a_weight_is_not_lost_in_rounding() -> Result<()> {
        let tensor = |x: f32, rows: usize, cols: usize| Tensor::full(x, (rows, cols), &Device::Cpu);
        let (w, a, b) = (tensor(1.0, 6, 5)?, tensor(1.0 / 1024.0, 1, 6)?, tensor(1.0, 5, 1)?);
        let adapter = Adapter { a: &a, b: &b, scale: 1.0, mask: None };
        let parts = Parts::new(&Projection { w: &w, bias: None, adapter: Some(adapter) }, 2, 6)?;
        let views = parts.views()?;
        for precision in [Precision::F32, Precision::Bf16] {
            let at = At { stride: 5, offset: 0 };
            let mut y = [0.0; 2 * 5];
            views.map(precision, Way::Forward).forward(&mut y, at, Into::Overwrite, &[1.0; 2 * 6], 0);
            assert_eq!(y, [6.0 + 6.0 / 1024.0; 2 * 5]);
            let mut dx = [0.0; 2 * 6];
            views.map(precision, Way::Back).input_gradient(&mut dx, Into::Overwrite, &[1.0; 2 * 5], at, 0);
            assert_eq!(dx, [5.0 + 5.0 / 1024.0; 2 * 6]);
        }
        Ok(())
    }
}
