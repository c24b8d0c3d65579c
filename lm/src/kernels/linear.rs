//! A linear layer with an optional bias and LoRA adapter, on slices that hold some rows of a batch; its output fills
//! some columns of a wider matrix. The part that [`LinearGroup`](super::linear_group::LinearGroup) is made of.
//!
//! "Small gradients" are those of bias, A and B': they are summed over chunks, unlike the gradient of the weight.

use candle_core::{Result, Tensor, bail};

use super::buffer::with_scratch;
use super::candle_interop::{CpuSlice, check_shape};
use super::gemm::{self, Mat, Threads, WriteMode};
use super::grad_accumulator::accumulate;
use super::matmul::{LowRankUpdate, PackedRhs, Rhs, matmul, matmul_columns, matmul_unpacked};
use super::simd::add_assign;
use super::{Direction, DropoutMask, LinearRef, LoraRef};
use crate::Precision;

/// The tensors of a linear layer, kept for the backward pass.
pub struct LinearTensors {
    w: Tensor,
    bias: Option<Tensor>,
    lora: Option<LoraTensors>,
    pub d_in: usize,
    pub d_out: usize,
}

struct LoraTensors {
    a: Tensor,
    b: Tensor,
    rank: usize,
    scale: f32,
    mask: Option<DropoutMask>,
}

impl LinearTensors {
    /// Checks the shapes of a layer of `d_in` columns, applied to `rows` rows.
    pub fn new(p: &LinearRef, rows: usize, d_in: usize) -> Result<Self> {
        let (w_in, d_out) = p.w.dims2()?;
        if w_in != d_in || d_out == 0 {
            bail!("a linear weight has shape {:?}, expected [{d_in}, out] with out above 0", p.w.shape());
        }
        if let Some(bias) = p.bias {
            check_shape("a linear bias", bias, &[d_out])?;
        }
        let Some(LoraRef { a, b, scale, mask }) = &p.adapter else {
            return Ok(Self {
                w: leaf_or_constant(p.w)?,
                bias: p.bias.map(leaf_or_constant).transpose()?,
                lora: None,
                d_in,
                d_out,
            });
        };
        let rank = a.dims2()?.0;
        check_shape("lora_A", a, &[rank, d_in])?;
        check_shape("lora_B", b, &[d_out, rank])?;
        if let Some(mask) = mask
            && mask.elements() != rows * d_in
        {
            bail!("a LoRA dropout mask has {} elements, expected {rows} rows of {d_in}", mask.elements());
        }
        let lora = LoraTensors {
            a: leaf_or_constant(a)?,
            b: leaf_or_constant(b)?,
            rank,
            scale: *scale as f32,
            mask: mask.cloned(),
        };
        let frozen = |t: &Tensor| t.detach().contiguous();
        Ok(Self { w: frozen(p.w)?, bias: p.bias.map(frozen).transpose()?, lora: Some(lora), d_in, d_out })
    }

    /// The trained tensors.
    pub fn trained_tensors(&self) -> impl Iterator<Item = &Tensor> {
        let lora = self.lora.iter().flat_map(|l| [&l.a, &l.b]);
        [&self.w].into_iter().chain(&self.bias).chain(lora).filter(|t| t.track_op())
    }

    /// Slices of the tensors, to be taken once per pass.
    pub fn views(&self) -> Result<LinearSlices<'_>> {
        let lora = match &self.lora {
            Some(l) => Some((CpuSlice::new(&l.a)?, CpuSlice::new(&l.b)?)),
            None => None,
        };
        let bias = self.bias.as_ref().map(CpuSlice::new).transpose()?;
        Ok(LinearSlices { w: CpuSlice::new(&self.w)?, bias, lora, tensors: self })
    }
}

/// Accepts a variable, or a tensor that needs no gradient, which becomes contiguous.
pub fn leaf_or_constant(t: &Tensor) -> Result<Tensor> {
    if t.track_op() && !t.is_variable() {
        bail!("a trained weight must be a variable, not the result of another operation");
    }
    if t.is_variable() { Ok(t.clone()) } else { t.contiguous() }
}

type LoraSlices<'a> = (CpuSlice<'a>, CpuSlice<'a>);

/// The elements of a layer's tensors.
pub struct LinearSlices<'a> {
    w: CpuSlice<'a>,
    bias: Option<CpuSlice<'a>>,
    lora: Option<LoraSlices<'a>>,
    tensors: &'a LinearTensors,
}

impl LinearSlices<'_> {
    /// Prepares the layer for one direction. In f32, an adapter without dropout is merged into the weight, w + scale a'
    /// b'; in bf16 it stays separate, since rounding may lose its contribution.
    pub fn prepare(&self, precision: Precision, direction: Direction) -> PreparedLinear<'_> {
        let LinearTensors { d_in, d_out, .. } = *self.tensors;
        let mut lora = None;
        let scaled_b: Vec<f32>;
        let mut update = None;
        if let (Some((a, b)), Some(tensors)) = (&self.lora, &self.tensors.lora) {
            let mask = tensors.mask.as_ref();
            let merged = mask.is_none() && precision == Precision::F32;
            if merged {
                scaled_b = scaled_transpose(b, tensors.rank, tensors.scale);
                let (a, b) = match direction {
                    Direction::Forward => (&**a, &*scaled_b),
                    Direction::Backward => (&*scaled_b, &**a),
                };
                update = Some(LowRankUpdate { a, b, rank: tensors.rank });
            }
            lora = Some(PreparedLora { a, b, rank: tensors.rank, scale: tensors.scale, mask, merged });
        }
        let (trains_bias, small_grad_len) = (self.tensors.trains_bias(), self.tensors.small_grad_len());
        let w = Mat::new(&self.w, d_in, d_out);
        let w = match direction {
            Direction::Forward => w,
            Direction::Backward => w.t(),
        };
        let w = PackedRhs::new(w, update, precision);
        PreparedLinear { w, direction, bias: self.bias.as_deref(), lora, d_in, d_out, trains_bias, small_grad_len }
    }
}

/// `scale b'` of `b [n, rank]`: `[rank, n]`.
pub fn scaled_transpose(b: &[f32], rank: usize, scale: f32) -> Vec<f32> {
    (0..rank).flat_map(|r| b.iter().skip(r).step_by(rank).map(|x| scale * x)).collect()
}

struct PreparedLora<'a> {
    a: &'a [f32],
    b: &'a [f32],
    rank: usize,
    scale: f32,
    mask: Option<&'a DropoutMask>,
    /// Whether it is merged into the packed weight.
    merged: bool,
}

impl PreparedLora<'_> {
    /// The adapter's input for `x`, whose first element is element `offset` of the batch; `buffer` is as large as `x`.
    fn dropped_input<'x>(&self, buffer: &'x mut [f32], x: &'x [f32], offset: usize) -> &'x [f32] {
        let Some(mask) = self.mask else { return x };
        mask.multiply(buffer, x, offset);
        buffer
    }
}

/// A layer prepared for one direction. Methods take the index in the batch of their first row, for the dropout mask,
/// and the columns that the layer's output occupies.
pub struct PreparedLinear<'a> {
    w: PackedRhs,
    direction: Direction,
    bias: Option<&'a [f32]>,
    lora: Option<PreparedLora<'a>>,
    d_in: usize,
    d_out: usize,
    trains_bias: bool,
    small_grad_len: usize,
}

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

impl PreparedLinear<'_> {
    pub fn d_out(&self) -> usize {
        self.d_out
    }

    fn weight(&self, direction: Direction) -> &PackedRhs {
        assert_eq!(self.direction, direction, "a layer runs in the direction it was prepared for");
        &self.w
    }

    /// Writes the layer's output for `x` to `y`, or adds it.
    pub fn forward(&self, y: &mut [f32], columns: OutputColumns, mode: WriteMode, x: &[f32], first_row: usize) {
        let Self { d_in, d_out, .. } = *self;
        let n = x.len() / d_in;
        let OutputColumns { stride, offset } = columns;
        let w = self.weight(Direction::Forward);
        matmul_columns(y, stride, offset, mode, self.bias, Mat::new(x, n, d_in), w, Threads::One);
        if let Some(lora) = self.lora.as_ref().filter(|lora| !lora.merged) {
            with_scratch(n * (d_in + lora.rank), |buffer| {
                let (dropped, z) = buffer.split_at_mut(n * d_in);
                let dropped = lora.dropped_input(dropped, x, first_row * d_in);
                let a = Mat::new(lora.a, lora.rank, d_in);
                gemm::gemm(z, WriteMode::Overwrite, 1.0, Mat::new(dropped, n, d_in), a.t(), Threads::One);
                let (z, b) = (Mat::new(z, n, lora.rank), Mat::new(lora.b, d_out, lora.rank));
                gemm::gemm_columns(y, stride, offset, WriteMode::Add, lora.scale, z, b.t(), Threads::One);
            });
        }
    }

    /// Number of elements of [`PreparedLinear::small_gradients`].
    pub fn small_grad_len(&self) -> usize {
        self.small_grad_len
    }

    /// Writes the gradient of the layer's input to `dx`, or adds it.
    pub fn input_gradient(&self, dx: &mut [f32], mode: WriteMode, g: &[f32], columns: OutputColumns, first_row: usize) {
        let Self { d_in, d_out, .. } = *self;
        let n = g.len() / columns.stride;
        let g = columns.matrix(g, d_out);
        matmul(dx, mode, 1.0, g, Rhs::Packed(self.weight(Direction::Backward)), Threads::One);
        let Some(PreparedLora { a, b, rank, scale, mask, merged: false }) = self.lora else { return };
        with_scratch(n * (rank + d_in), |buffer| {
            let (dz, dropped) = buffer.split_at_mut(n * rank);
            gemm::gemm(dz, WriteMode::Overwrite, scale, g, Mat::new(b, d_out, rank), Threads::One);
            let (dz, a) = (Mat::new(dz, n, rank), Mat::new(a, rank, d_in));
            let Some(mask) = mask else { return gemm::gemm(dx, WriteMode::Add, 1.0, dz, a, Threads::One) };
            gemm::gemm(dropped, WriteMode::Overwrite, 1.0, dz, a, Threads::One);
            mask.add_product(dx, dropped, first_row * d_in);
        });
    }

    /// Writes the gradients of bias, A and B' to `grads`, one after the other.
    pub fn small_gradients(&self, grads: &mut [f32], x: &[f32], g: &[f32], columns: OutputColumns, first_row: usize) {
        let Self { d_in, d_out, .. } = *self;
        let n = x.len() / d_in;
        let (bias, adapter) = grads.split_at_mut(if self.trains_bias { d_out } else { 0 });
        if self.trains_bias {
            for row in g.chunks_exact(columns.stride) {
                add_assign(bias, &row[columns.offset..columns.offset + d_out]);
            }
        }
        let Some(lora) = &self.lora else { return };
        let PreparedLora { a, b, rank, scale, .. } = *lora;
        let g = columns.matrix(g, d_out);
        let (da, db) = adapter.split_at_mut(rank * d_in);
        with_scratch(n * (2 * rank + d_in), |buffer| {
            let (z, rest) = buffer.split_at_mut(n * rank);
            let (dz, dropped) = rest.split_at_mut(n * rank);
            let x = Mat::new(lora.dropped_input(dropped, x, first_row * d_in), n, d_in);
            gemm::gemm(dz, WriteMode::Overwrite, scale, g, Mat::new(b, d_out, rank), Threads::One);
            gemm::gemm(da, WriteMode::Overwrite, 1.0, Mat::new(dz, n, rank).t(), x, Threads::One);
            gemm::gemm(z, WriteMode::Overwrite, scale, x, Mat::new(a, rank, d_in).t(), Threads::One);
            // Transposed: a product of few rows is faster than one of few columns.
            gemm::gemm(db, WriteMode::Overwrite, 1.0, Mat::new(z, n, rank).t(), g, Threads::One);
        });
    }
}

impl LinearTensors {
    /// Number of elements of the small gradients: bias, A, B'.
    pub fn small_grad_len(&self) -> usize {
        let bias = if self.trains_bias() { self.d_out } else { 0 };
        bias + self.lora.as_ref().map_or(0, |l| l.rank * (self.d_in + self.d_out))
    }

    fn trains_bias(&self) -> bool {
        self.bias.as_ref().is_some_and(Tensor::track_op)
    }

    /// Accumulates the small gradients, in the layout of [`PreparedLinear::small_gradients`].
    pub fn accumulate_small_grads(&self, grads: &[f32]) -> Result<()> {
        let (bias_gradient, adapter) = grads.split_at(if self.trains_bias() { self.d_out } else { 0 });
        if let Some(bias) = &self.bias
            && bias.track_op()
        {
            accumulate(bias, bias_gradient.to_vec())?;
        }
        let Some(lora) = &self.lora else { return Ok(()) };
        let (da, db) = adapter.split_at(lora.rank * self.d_in);
        if lora.a.track_op() {
            accumulate(&lora.a, da.to_vec())?;
        }
        if lora.b.track_op() {
            let transposed = (0..db.len()).map(|i| db[i % lora.rank * self.d_out + i / lora.rank]).collect();
            accumulate(&lora.b, transposed)?;
        }
        Ok(())
    }

    pub fn trains_weight(&self) -> bool {
        self.w.track_op()
    }

    /// Accumulates the weight's gradient, x' g.
    pub fn accumulate_weight_grad(
        &self,
        x: &[f32],
        g: &[f32],
        columns: OutputColumns,
        precision: Precision,
    ) -> Result<()> {
        if !self.trains_weight() {
            return Ok(());
        }
        let x = Mat::new(x, x.len() / self.d_in, self.d_in);
        accumulate(&self.w, matmul_unpacked(x.t(), columns.matrix(g, self.d_out), precision))
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// In bf16, 1 and its successor are 2^-7 apart: added to the weight, 2^-10 would be lost.
    #[test]
    fn rounding_does_not_lose_a_small_adapter() -> Result<()> {
        let tensor = |x: f32, rows: usize, cols: usize| Tensor::full(x, (rows, cols), &Device::Cpu);
        let (w, a, b) = (tensor(1.0, 6, 5)?, tensor(1.0 / 1024.0, 1, 6)?, tensor(1.0, 5, 1)?);
        let adapter = LoraRef { a: &a, b: &b, scale: 1.0, mask: None };
        let tensors = LinearTensors::new(&LinearRef { w: &w, bias: None, adapter: Some(adapter) }, 2, 6)?;
        let views = tensors.views()?;
        for precision in [Precision::F32, Precision::Bf16] {
            let columns = OutputColumns { stride: 5, offset: 0 };
            let mut y = [0.0; 2 * 5];
            views.prepare(precision, Direction::Forward).forward(
                &mut y,
                columns,
                WriteMode::Overwrite,
                &[1.0; 2 * 6],
                0,
            );
            assert_eq!(y, [6.0 + 6.0 / 1024.0; 2 * 5]);
            let mut dx = [0.0; 2 * 6];
            views.prepare(precision, Direction::Backward).input_gradient(
                &mut dx,
                WriteMode::Overwrite,
                &[1.0; 2 * 5],
                columns,
                0,
            );
            assert_eq!(dx, [5.0 + 5.0 / 1024.0; 2 * 6]);
        }
        Ok(())
    }
}
