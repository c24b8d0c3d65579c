//! Linear layers on slices that hold some rows of a batch. Layers of one input have their outputs side by side:
//! queries, keys and values, or a gate and a value, whether a model has one weight for them or several.
//!
//! "Small gradients" are those of bias, A and B': they are summed over chunks, unlike the gradient of the weight.

use std::sync::OnceLock;

use candle_core::{Result, Tensor, bail};
use temper_gemm::buffer::with_scratch;
use temper_gemm::matmul::{matmul_columns, matmul_unpacked};
use temper_gemm::simd::add_assign;
use temper_gemm::{LowRankUpdate, Mat, PackedRhs, Rhs, Threads, WriteMode, dense, matmul};

use super::candle_interop::CpuSlice;
use super::grad_accumulator::accumulate;
use super::{Direction, DropoutMask};
use crate::Precision;
use crate::model::adapter::LoraAdapter;
use crate::model::linear::Linear;

/// The columns of a layer's output: `offset` columns into rows of `stride`.
#[derive(Clone, Copy)]
pub struct OutputColumns {
    pub stride: usize,
    pub offset: usize,
}

impl OutputColumns {
    fn matrix<'g>(self, g: &'g [f32], cols: usize) -> Mat<'g> {
        Mat::columns(g, g.len() / self.stride, cols, self.stride, self.offset)
    }
}

/// `scale b'` of `b [n, rank]`: `[rank, n]`.
pub fn scaled_transpose(b: &[f32], rank: usize, scale: f32) -> Vec<f32> {
    (0..rank).flat_map(|r| b.iter().skip(r).step_by(rank).map(|x| scale * x)).collect()
}

/// A layer's elements in memory, for one direction of one pass. Methods take the index in the batch of their first row,
/// for the dropout mask, and the columns that the layer's output occupies.
pub struct LinearView<'a> {
    w: CpuSlice<'a>,
    bias: Option<CpuSlice<'a>>,
    /// The adapter's A `[rank, in]` and B `[out, rank]`.
    lora: Option<[CpuSlice<'a>; 2]>,
    rank: usize,
    /// The adapter's alpha / r.
    scale: f32,
    /// Drops entries of the adapter's input.
    mask: Option<&'a DropoutMask>,
    d_in: usize,
    d_out: usize,
    trains_bias: bool,
    precision: Precision,
    direction: Direction,
    packed: OnceLock<PackedRhs>,
}

impl<'a> LinearView<'a> {
    /// The view computes only after [`LinearView::pack`].
    pub fn new(
        linear: &'a Linear,
        mask: Option<&'a DropoutMask>,
        precision: Precision,
        direction: Direction,
    ) -> Result<Self> {
        let (d_in, d_out) = linear.weight.dims2()?;
        let mut view = Self {
            w: CpuSlice::new(&linear.weight)?,
            bias: linear.bias.as_ref().map(CpuSlice::new).transpose()?,
            lora: None,
            rank: 0,
            scale: 0.0,
            mask,
            d_in,
            d_out,
            trains_bias: linear.trains_bias(),
            precision,
            direction,
            packed: OnceLock::new(),
        };
        if let Some(LoraAdapter { a, b, scale, .. }) = &linear.adapter {
            (view.rank, view.scale) = (a.dim(0)?, *scale as f32);
            view.lora = Some([CpuSlice::new(a)?, CpuSlice::new(b)?]);
        }
        Ok(view)
    }

    /// Whether an adapter is merged into the packed weight, w + scale a' b': in f32 and without dropout. In bf16
    /// rounding may lose its contribution.
    fn merges(&self) -> bool {
        self.mask.is_none() && self.precision == Precision::F32
    }

    /// The adapter's input for `x`, whose first element is element `offset` of the batch; `buffer` is as large as `x`.
    fn dropped_input<'x>(&self, buffer: &'x mut [f32], x: &'x [f32], offset: usize) -> &'x [f32] {
        let Some(mask) = self.mask else { return x };
        mask.multiply(buffer, x, offset);
        buffer
    }

    /// Packs the weight, on any thread.
    pub fn pack(&self) {
        let scaled_b: Vec<f32>;
        let mut update = None;
        if let Some([a, b]) = self.lora.as_ref().filter(|_| self.merges()) {
            scaled_b = scaled_transpose(b, self.rank, self.scale);
            let (a, b) = match self.direction {
                Direction::Forward => (&**a, &*scaled_b),
                Direction::Backward => (&*scaled_b, &**a),
            };
            update = Some(LowRankUpdate { a, b, rank: self.rank });
        }
        let w = Mat::new(&self.w, self.d_in, self.d_out);
        let w = match self.direction {
            Direction::Forward => w,
            Direction::Backward => w.t(),
        };
        self.packed.get_or_init(|| PackedRhs::new(w, update, self.precision));
    }

    fn weight(&self, direction: Direction) -> &PackedRhs {
        assert_eq!(self.direction, direction, "a layer runs in the direction it was prepared for");
        self.packed.get().expect("a layer is packed before it runs")
    }

    /// Writes the layer's output for `x` to `y`, or adds it.
    fn forward(&self, y: &mut [f32], columns: OutputColumns, mode: WriteMode, x: &[f32], first_row: usize) {
        let Self { d_in, d_out, rank, scale, .. } = *self;
        let n = x.len() / d_in;
        let OutputColumns { stride, offset } = columns;
        let w = self.weight(Direction::Forward);
        matmul_columns(y, stride, offset, mode, self.bias.as_deref(), Mat::new(x, n, d_in), w, Threads::One);
        let Some([a, b]) = self.lora.as_ref().filter(|_| !self.merges()) else { return };
        with_scratch(n * (d_in + rank), |buffer| {
            let (dropped, z) = buffer.split_at_mut(n * d_in);
            let dropped = self.dropped_input(dropped, x, first_row * d_in);
            let a = Mat::new(a, rank, d_in);
            dense::gemm(z, WriteMode::Overwrite, 1.0, Mat::new(dropped, n, d_in), a.t(), Threads::One);
            let (z, b) = (Mat::new(z, n, rank), Mat::new(b, d_out, rank));
            dense::gemm_columns(y, stride, offset, WriteMode::Add, scale, z, b.t(), Threads::One);
        });
    }

    /// Writes the gradient of the layer's input to `dx`, or adds it.
    fn input_gradient(&self, dx: &mut [f32], mode: WriteMode, g: &[f32], columns: OutputColumns, first_row: usize) {
        let Self { d_in, d_out, rank, scale, mask, .. } = *self;
        let n = g.len() / columns.stride;
        let g = columns.matrix(g, d_out);
        matmul(dx, mode, 1.0, g, Rhs::Packed(self.weight(Direction::Backward)), Threads::One);
        let Some([a, b]) = self.lora.as_ref().filter(|_| !self.merges()) else { return };
        with_scratch(n * (rank + d_in), |buffer| {
            let (dz, dropped) = buffer.split_at_mut(n * rank);
            dense::gemm(dz, WriteMode::Overwrite, scale, g, Mat::new(b, d_out, rank), Threads::One);
            let (dz, a) = (Mat::new(dz, n, rank), Mat::new(a, rank, d_in));
            let Some(mask) = mask else { return dense::gemm(dx, WriteMode::Add, 1.0, dz, a, Threads::One) };
            dense::gemm(dropped, WriteMode::Overwrite, 1.0, dz, a, Threads::One);
            mask.add_product(dx, dropped, first_row * d_in);
        });
    }

    /// Writes the gradients of bias, A and B' to `grads`, one after the other.
    fn small_gradients(&self, grads: &mut [f32], x: &[f32], g: &[f32], columns: OutputColumns, first_row: usize) {
        let Self { d_in, d_out, rank, scale, .. } = *self;
        let n = x.len() / d_in;
        let (bias, adapter) = grads.split_at_mut(if self.trains_bias { d_out } else { 0 });
        if self.trains_bias {
            for row in g.chunks_exact(columns.stride) {
                add_assign(bias, &row[columns.offset..columns.offset + d_out]);
            }
        }
        let Some([a, b]) = &self.lora else { return };
        let g = columns.matrix(g, d_out);
        let (da, db) = adapter.split_at_mut(rank * d_in);
        with_scratch(n * (2 * rank + d_in), |buffer| {
            let (z, rest) = buffer.split_at_mut(n * rank);
            let (dz, dropped) = rest.split_at_mut(n * rank);
            let x = Mat::new(self.dropped_input(dropped, x, first_row * d_in), n, d_in);
            dense::gemm(dz, WriteMode::Overwrite, scale, g, Mat::new(b, d_out, rank), Threads::One);
            dense::gemm(da, WriteMode::Overwrite, 1.0, Mat::new(dz, n, rank).t(), x, Threads::One);
            dense::gemm(z, WriteMode::Overwrite, scale, x, Mat::new(a, rank, d_in).t(), Threads::One);
            // Transposed: a product of few rows is faster than one of few columns.
            dense::gemm(db, WriteMode::Overwrite, 1.0, Mat::new(z, n, rank).t(), g, Threads::One);
        });
    }
}

/// Each layer of a group, given with the width of its output, and the columns of that output.
fn with_columns<'a, L>(
    group: &'a [L],
    d_out: impl Fn(&L) -> usize + Copy + 'a,
) -> impl Iterator<Item = (&'a L, OutputColumns)> {
    let stride = group.iter().map(d_out).sum();
    group.iter().scan(0, move |next, linear| {
        let offset = *next;
        *next += d_out(linear);
        Some((linear, OutputColumns { stride, offset }))
    })
}

/// Each layer of a group and the columns of its output.
fn columns<'v, 'a>(group: &'v [LinearView<'a>]) -> impl Iterator<Item = (&'v LinearView<'a>, OutputColumns)> {
    with_columns(group, |linear| linear.d_out)
}

/// The outputs of a group for `x` side by side, `[rows, d_out]`.
pub fn apply(group: &[LinearView], x: &[f32], rows: usize, first_row: usize) -> Vec<f32> {
    let mut y = vec![0.0; rows * group.iter().map(|linear| linear.d_out).sum::<usize>()];
    columns(group).for_each(|(linear, columns)| linear.forward(&mut y, columns, WriteMode::Overwrite, x, first_row));
    y
}

/// Adds the outputs of a group for `x` to `y`.
pub fn add_to(group: &[LinearView], y: &mut [f32], x: &[f32], first_row: usize) {
    columns(group).for_each(|(linear, columns)| linear.forward(y, columns, WriteMode::Add, x, first_row));
}

/// Writes the gradient of a group's input to `dx`, or adds it.
pub fn input_gradient(group: &[LinearView], dx: &mut [f32], mut mode: WriteMode, g: &[f32], first_row: usize) {
    for (linear, columns) in columns(group) {
        linear.input_gradient(dx, mode, g, columns, first_row);
        mode = WriteMode::Add;
    }
}

/// Writes the small gradients of each layer of a group to its part of `grads`.
pub fn small_gradients(group: &[LinearView], grads: &mut [&mut [f32]], x: &[f32], g: &[f32], first_row: usize) {
    for ((linear, columns), grads) in columns(group).zip(grads) {
        linear.small_gradients(grads, x, g, columns, first_row);
    }
}

/// Accumulates the gradients x' g of a group's weights; `x` and `g` hold the inputs and the output gradients of all
/// rows.
pub fn accumulate_weight_grads(group: &[Linear], x: &[f32], g: &[f32], precision: Precision) -> Result<()> {
    let d_out = |linear: &Linear| linear.weight.dims()[1];
    for (linear, columns) in with_columns(group, d_out).filter(|(linear, _)| linear.weight.is_variable()) {
        let d_in = linear.weight.dim(0)?;
        let x = Mat::new(x, x.len() / d_in, d_in);
        accumulate(&linear.weight, matmul_unpacked(x.t(), columns.matrix(g, d_out(linear)), precision))?;
    }
    Ok(())
}

impl Linear {
    fn trains_bias(&self) -> bool {
        self.bias.as_ref().is_some_and(Tensor::is_variable)
    }

    /// Number of elements of the small gradients: bias, A, B'.
    pub fn small_grad_len(&self) -> usize {
        let bias = self.bias.as_ref().filter(|bias| bias.is_variable()).map_or(0, Tensor::elem_count);
        bias + self.adapter.as_ref().map_or(0, |adapter| adapter.a.elem_count() + adapter.b.elem_count())
    }

    /// Accumulates the small gradients, in the layout of [`small_gradients`].
    pub fn accumulate_small_grads(&self, mut grads: &[f32]) -> Result<()> {
        let mut take =
            |tensor: &Tensor| grads.split_off(..tensor.elem_count()).expect("small gradients of all tensors");
        if let Some(bias) = self.bias.as_ref().filter(|bias| bias.is_variable()) {
            accumulate(bias, take(bias).to_vec())?;
        }
        let Some(adapter) = &self.adapter else { return Ok(()) };
        let (da, db) = (take(&adapter.a), take(&adapter.b));
        if adapter.a.is_variable() {
            accumulate(&adapter.a, da.to_vec())?;
        }
        if adapter.b.is_variable() {
            let (d_out, rank) = adapter.b.dims2()?;
            let transposed = (0..db.len()).map(|i| db[i % rank * d_out + i / rank]).collect();
            accumulate(&adapter.b, transposed)?;
        }
        Ok(())
    }
}

/// Errors: layers of other widths than `d_in` and, side by side, `d_out`.
pub fn check_widths(group: &[Linear], d_in: usize, d_out: usize) -> Result<()> {
    let shapes: Vec<_> = group.iter().map(|linear| linear.weight.dims()).collect();
    if shapes.iter().any(|shape| shape[0] != d_in) || shapes.iter().map(|shape| shape[1]).sum::<usize>() != d_out {
        bail!("linear layers of shapes {shapes:?} side by side, expected [{d_in}, {d_out}] in all");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// In bf16, 1 and its successor are 2^-7 apart: added to the weight, 2^-10 would be lost.
    #[test]
    fn rounding_does_not_lose_a_small_adapter() -> Result<()> {
        let tensor = |x: f32, rows: usize, cols: usize| Tensor::full(x, (rows, cols), &Device::Cpu);
        let adapter = LoraAdapter { a: tensor(1.0 / 1024.0, 1, 6)?, b: tensor(1.0, 5, 1)?, scale: 1.0, dropout: 0.0 };
        let linear = Linear { name: String::new(), weight: tensor(1.0, 6, 5)?, bias: None, adapter: Some(adapter) };
        for precision in [Precision::F32, Precision::Bf16] {
            let view = |direction| -> Result<[LinearView<'_>; 1]> {
                let view = LinearView::new(&linear, None, precision, direction)?;
                view.pack();
                Ok([view])
            };
            let y = apply(&view(Direction::Forward)?, &[1.0; 2 * 6], 2, 0);
            assert_eq!(y, [6.0 + 6.0 / 1024.0; 2 * 5]);
            let mut dx = [0.0; 2 * 6];
            input_gradient(&view(Direction::Backward)?, &mut dx, WriteMode::Overwrite, &[1.0; 2 * 5], 0);
            assert_eq!(dx, [5.0 + 5.0 / 1024.0; 2 * 6]);
        }
        Ok(())
    }
}
