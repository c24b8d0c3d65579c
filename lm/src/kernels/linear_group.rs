//! Linear maps of one input with their outputs side by side: queries, keys and values, or a gate and a value, whether a
//! model has one weight for them or several.

use candle_core::{Result, Tensor, bail};

use super::Projection;
use super::gemm::Into;
use super::projection::{At, Map, Parts, Views, Way};
use crate::Precision;

/// The tensors of the maps, kept for the backward pass.
pub struct Fan {
    parts: Vec<Parts>,
    pub d_in: usize,
    pub d_out: usize,
}

impl Fan {
    /// Checks the shapes of maps from `d_in` to `d_out` columns in all, applied to `rows` rows.
    pub fn new(maps: &[Projection], rows: usize, d_in: usize, d_out: usize) -> Result<Self> {
        let parts: Vec<Parts> = maps.iter().map(|p| Parts::new(p, rows, d_in)).collect::<Result<_>>()?;
        let widths: Vec<usize> = parts.iter().map(|p| p.d_out).collect();
        if widths.iter().sum::<usize>() != d_out {
            bail!("projections of widths {widths:?} side by side; expected {d_out} in all");
        }
        Ok(Self { parts, d_in, d_out })
    }

    /// The trained tensors.
    pub fn trained(&self) -> impl Iterator<Item = &Tensor> {
        self.parts.iter().flat_map(Parts::trained)
    }

    pub fn trains_weights(&self) -> bool {
        self.parts.iter().any(Parts::trains_weight)
    }

    /// Views of the tensors, to be opened once per pass.
    pub fn views(&self) -> Result<Vec<Views<'_>>> {
        self.parts.iter().map(Parts::views).collect()
    }

    /// Number of elements of the small gradients of all maps.
    pub fn small(&self) -> usize {
        self.parts.iter().map(Parts::small).sum()
    }

    /// Delivers the small gradients, in the layout of [`Maps::small_gradients`].
    pub fn deliver_small(&self, mut small: &[f32]) -> Result<()> {
        for part in &self.parts {
            let (own, rest) = small.split_at(part.small());
            part.deliver_small(own)?;
            small = rest;
        }
        Ok(())
    }

    /// Delivers the weights' gradients x' g; `x` and `g` hold the inputs and the output gradients of all rows.
    pub fn deliver_weights(&self, x: &[f32], g: &[f32], precision: Precision) -> Result<()> {
        let mut offset = 0;
        for part in &self.parts {
            part.deliver_weight(x, g, At { stride: self.d_out, offset }, precision)?;
            offset += part.d_out;
        }
        Ok(())
    }
}

/// The maps prepared for one direction. Methods take the index in the batch of their first row.
pub struct Maps<'a> {
    maps: Vec<Map<'a>>,
    d_out: usize,
}

impl<'a> Maps<'a> {
    pub fn new(views: &'a [Views<'_>], precision: Precision, way: Way) -> Self {
        let maps: Vec<Map> = views.iter().map(|v| v.map(precision, way)).collect();
        let d_out = maps.iter().map(Map::d_out).sum();
        Self { maps, d_out }
    }

    /// Each map and the place of its columns.
    fn placed(&self) -> impl Iterator<Item = (&Map<'a>, At)> {
        self.maps.iter().scan(0, |next, map| {
            let offset = *next;
            *next += map.d_out();
            Some((map, At { stride: self.d_out, offset }))
        })
    }

    /// The outputs for `x` side by side, `[rows, d_out]`.
    pub fn apply(&self, x: &[f32], rows: usize, first: usize) -> Vec<f32> {
        let mut y = vec![0.0; rows * self.d_out];
        self.placed().for_each(|(map, at)| map.forward(&mut y, at, Into::Overwrite, x, first));
        y
    }

    /// Adds the outputs for `x` to `y`.
    pub fn add_to(&self, y: &mut [f32], x: &[f32], first: usize) {
        self.placed().for_each(|(map, at)| map.forward(y, at, Into::Add, x, first));
    }

    /// Writes the gradient of the input to `dx`, or adds it.
    pub fn input_gradient(&self, dx: &mut [f32], mut into: Into, g: &[f32], first: usize) {
        for (map, at) in self.placed() {
            map.input_gradient(dx, into, g, at, first);
            into = Into::Add;
        }
    }

    /// Writes the small gradients of each map to `small`, one after the other.
    pub fn small_gradients(&self, mut small: &mut [f32], x: &[f32], g: &[f32], first: usize) {
        for (map, at) in self.placed() {
            let (own, rest) = small.split_at_mut(map.small());
            map.small_gradients(own, x, g, at, first);
            small = rest;
        }
    }
}
