//! Linear layers of one input with their outputs side by side: queries, keys and values, or a gate and a value, whether
//! a model has one weight for them or several.

use candle_core::{Result, Tensor, bail};

use super::gemm::WriteMode;
use super::linear::{LinearSlices, LinearTensors, OutputColumns, PreparedLinear};
use super::{Direction, LinearRef};
use crate::Precision;

/// The tensors of the layers, kept for the backward pass.
pub struct LinearGroup {
    linears: Vec<LinearTensors>,
    pub d_in: usize,
    pub d_out: usize,
}

impl LinearGroup {
    /// Checks the shapes of layers from `d_in` to `d_out` columns in all, applied to `rows` rows.
    pub fn new(linears: &[LinearRef], rows: usize, d_in: usize, d_out: usize) -> Result<Self> {
        let linears: Vec<LinearTensors> =
            linears.iter().map(|p| LinearTensors::new(p, rows, d_in)).collect::<Result<_>>()?;
        let widths: Vec<usize> = linears.iter().map(|p| p.d_out).collect();
        if widths.iter().sum::<usize>() != d_out {
            bail!("linear layers of widths {widths:?} side by side, expected {d_out} in total");
        }
        Ok(Self { linears, d_in, d_out })
    }

    /// The trained tensors.
    pub fn trained_tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.linears.iter().flat_map(LinearTensors::trained_tensors)
    }

    pub fn trains_weights(&self) -> bool {
        self.linears.iter().any(LinearTensors::trains_weight)
    }

    /// Views of the tensors, to be opened once per pass.
    pub fn views(&self) -> Result<Vec<LinearSlices<'_>>> {
        self.linears.iter().map(LinearTensors::views).collect()
    }

    /// Number of elements of the small gradients of all layers.
    pub fn small_grad_len(&self) -> usize {
        self.linears.iter().map(LinearTensors::small_grad_len).sum()
    }

    /// Accumulates the small gradients, in the layout of [`PreparedLinearGroup::small_gradients`].
    pub fn accumulate_small_grads(&self, mut grads: &[f32]) -> Result<()> {
        for linear in &self.linears {
            let (own, rest) = grads.split_at(linear.small_grad_len());
            linear.accumulate_small_grads(own)?;
            grads = rest;
        }
        Ok(())
    }

    /// Accumulates the weights' gradients x' g; `x` and `g` hold the inputs and the output gradients of all rows.
    pub fn accumulate_weight_grads(&self, x: &[f32], g: &[f32], precision: Precision) -> Result<()> {
        let mut offset = 0;
        for linear in &self.linears {
            linear.accumulate_weight_grad(x, g, OutputColumns { stride: self.d_out, offset }, precision)?;
            offset += linear.d_out;
        }
        Ok(())
    }
}

/// The layers prepared for one direction. Methods take the index in the batch of their first row.
pub struct PreparedLinearGroup<'a> {
    linears: Vec<PreparedLinear<'a>>,
    d_out: usize,
}

impl<'a> PreparedLinearGroup<'a> {
    pub fn new(views: &'a [LinearSlices<'_>], precision: Precision, direction: Direction) -> Self {
        let linears: Vec<PreparedLinear> = views.iter().map(|v| v.prepare(precision, direction)).collect();
        let d_out = linears.iter().map(PreparedLinear::d_out).sum();
        Self { linears, d_out }
    }

    /// Each layer and the columns of its output.
    fn with_columns(&self) -> impl Iterator<Item = (&PreparedLinear<'a>, OutputColumns)> {
        self.linears.iter().scan(0, |next, linear| {
            let offset = *next;
            *next += linear.d_out();
            Some((linear, OutputColumns { stride: self.d_out, offset }))
        })
    }

    /// The outputs for `x` side by side, `[rows, d_out]`.
    pub fn apply(&self, x: &[f32], rows: usize, first_row: usize) -> Vec<f32> {
        let mut y = vec![0.0; rows * self.d_out];
        self.with_columns()
            .for_each(|(linear, columns)| linear.forward(&mut y, columns, WriteMode::Overwrite, x, first_row));
        y
    }

    /// Adds the outputs for `x` to `y`.
    pub fn add_to(&self, y: &mut [f32], x: &[f32], first_row: usize) {
        self.with_columns().for_each(|(linear, columns)| linear.forward(y, columns, WriteMode::Add, x, first_row));
    }

    /// Writes the gradient of the input to `dx`, or adds it.
    pub fn input_gradient(&self, dx: &mut [f32], mut mode: WriteMode, g: &[f32], first_row: usize) {
        for (linear, columns) in self.with_columns() {
            linear.input_gradient(dx, mode, g, columns, first_row);
            mode = WriteMode::Add;
        }
    }

    /// Writes the small gradients of each layer to `grads`, one after the other.
    pub fn small_gradients(&self, mut grads: &mut [f32], x: &[f32], g: &[f32], first_row: usize) {
        for (linear, columns) in self.with_columns() {
            let (own, rest) = grads.split_at_mut(linear.small_grad_len());
            linear.small_gradients(own, x, g, columns, first_row);
            grads = rest;
        }
    }
}
