//! A model's tensors for decoding, rounded or rearranged once.

use super::affine::Affine;
use crate::kernels::gemm::Mat;
use crate::kernels::candle_interop::CpuSlice;
use crate::kernels::matmul::PackedRhs;
use crate::kernels::rotary::Rotary;
use crate::linear::Linear;
use crate::spec::Spec;
use crate::transformer::{Norm, Transformer};
use crate::{Precision, Result};

/// Read access to a model's tensors.
pub struct Export<'a> {
    pub spec: &'a Spec,
    pub embedding: CpuSlice<'a>,
    pub positions: Option<CpuSlice<'a>>,
    pub layers: Vec<LayerViews<'a>>,
    pub norm: Pair<'a>,
    /// The output layer as stored, `[vocab, d]`.
    pub output: CpuSlice<'a>,
    /// The output layer prepared for matrix products, `[d, vocab]`; None in f32 if it is [`LARGE`].
    pub table: Option<PackedRhs>,
    pub output_bias: Option<CpuSlice<'a>>,
    pub rotary: Option<Rotary>,
}

/// From this many elements on, an f32 output layer gets no second, prepared copy: for the few rows of a step it is read
/// from memory in either form, and in a small model with a large vocabulary it is most of the weights.
const LARGE: usize = 1 << 24;

/// A weight and its bias.
pub type Pair<'a> = (CpuSlice<'a>, Option<CpuSlice<'a>>);

pub struct LayerViews<'a> {
    pub norm_1: Pair<'a>,
    pub qkv: Vec<Affine<'a>>,
    pub attn_out: Affine<'a>,
    pub norm_2: Option<Pair<'a>>,
    pub up: Vec<Affine<'a>>,
    pub down: Affine<'a>,
}

impl<'a> Export<'a> {
    /// For sequences of at most `positions` tokens. Errors: a tensor that is not contiguous f32.
    pub fn of(model: &'a Transformer, positions: usize) -> Result<Self> {
        let pair = |w: &'a candle_core::Tensor, b: Option<&'a candle_core::Tensor>| -> Result<Pair<'a>> {
            Ok((CpuSlice::new(w)?, b.map(CpuSlice::new).transpose()?))
        };
        let norm = |n: &'a Norm| pair(&n.weight, n.bias.as_ref());
        let precision = model.precision;
        let layers = model.blocks.iter().map(|block| {
            Ok(LayerViews {
                norm_1: norm(&block.norm_1)?,
                qkv: linear_group(&block.qkv, precision, model.spec.qkv_widths()[0])?,
                attn_out: Affine::of(&block.attn_out, precision, 0)?,
                norm_2: block.norm_2.as_ref().map(norm).transpose()?,
                up: linear_group(&block.up, precision, 0)?,
                down: Affine::of(&block.down, precision, 0)?,
            })
        });
        let output = model.output();
        let weight = CpuSlice::new(output.weight)?;
        let (d, vocab) = (model.spec.d, model.spec.vocab);
        let prepared = precision == Precision::Bf16 || vocab * d < LARGE;
        let table = prepared.then(|| PackedRhs::new(Mat::new(&weight, vocab, d).t(), None, precision));
        Ok(Self {
            spec: &model.spec,
            embedding: CpuSlice::new(&model.embedding)?,
            positions: model.positions.as_ref().map(CpuSlice::new).transpose()?,
            layers: layers.collect::<Result<_>>()?,
            norm: norm(&model.norm)?,
            output: weight,
            table,
            output_bias: output.bias.map(CpuSlice::new).transpose()?,
            rotary: model.rotary(positions),
        })
    }
}

/// Linear maps of one input. Callers may ask separately for the joint columns below `cut` and from `cut` on.
fn linear_group(maps: &[Linear], precision: Precision, cut: usize) -> Result<Vec<Affine<'_>>> {
    let mut start = 0;
    let cut = |map| {
        let map = Affine::of(map, precision, cut.saturating_sub(start))?;
        start += map.d_out();
        Ok(map)
    };
    maps.iter().map(cut).collect()
}
