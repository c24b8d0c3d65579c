//! A model's tensors for decoding, rounded or rearranged once.

use super::packed_linear::PackedLinear;
use crate::architecture::Architecture;
use crate::kernels::Rotary;
use crate::kernels::candle_interop::CpuSlice;
use crate::kernels::gemm::Mat;
use crate::kernels::matmul::PackedRhs;
use crate::linear::Linear;
use crate::transformer::{Norm, Transformer};
use crate::{Precision, Result};

/// Read access to a model's tensors.
pub struct DecoderWeights<'a> {
    pub architecture: &'a Architecture,
    pub embedding: CpuSlice<'a>,
    pub positions: Option<CpuSlice<'a>>,
    pub layers: Vec<LayerWeights<'a>>,
    pub norm: NormSlices<'a>,
    /// The output layer as stored, `[vocab, d]`.
    pub lm_head: CpuSlice<'a>,
    /// The output layer packed for matrix products, `[d, vocab]`; None in f32 if it is [`LARGE_LM_HEAD`].
    pub packed_lm_head: Option<PackedRhs>,
    pub lm_head_bias: Option<CpuSlice<'a>>,
    pub rotary: Option<Rotary>,
}

/// From this many elements on, an f32 output layer gets no second, packed copy: for the few rows of a step it is read
/// from memory in either form, and in a small model with a large vocabulary it is most of the weights.
const LARGE_LM_HEAD: usize = 1 << 24;

/// The weight and bias of a norm.
pub type NormSlices<'a> = (CpuSlice<'a>, Option<CpuSlice<'a>>);

pub struct LayerWeights<'a> {
    pub norm_1: NormSlices<'a>,
    pub qkv: Vec<PackedLinear<'a>>,
    pub attn_out: PackedLinear<'a>,
    pub norm_2: Option<NormSlices<'a>>,
    pub up: Vec<PackedLinear<'a>>,
    pub down: PackedLinear<'a>,
}

impl<'a> DecoderWeights<'a> {
    /// For sequences of at most `positions` tokens. Errors: a tensor that is not contiguous f32.
    pub fn new(model: &'a Transformer, positions: usize) -> Result<Self> {
        let norm_slices = |w: &'a candle_core::Tensor, b: Option<&'a candle_core::Tensor>| -> Result<NormSlices<'a>> {
            Ok((CpuSlice::new(w)?, b.map(CpuSlice::new).transpose()?))
        };
        let norm = |n: &'a Norm| norm_slices(&n.weight, n.bias.as_ref());
        let precision = model.precision;
        let layers = model.blocks.iter().map(|block| {
            Ok(LayerWeights {
                norm_1: norm(&block.norm_1)?,
                qkv: linear_group(&block.qkv, precision, model.architecture.qkv_widths()[0])?,
                attn_out: PackedLinear::new(&block.attn_out, precision, 0)?,
                norm_2: block.norm_2.as_ref().map(norm).transpose()?,
                up: linear_group(&block.up, precision, 0)?,
                down: PackedLinear::new(&block.down, precision, 0)?,
            })
        });
        let lm_head = model.lm_head_ref();
        let weight = CpuSlice::new(lm_head.weight)?;
        let (d, vocab) = (model.architecture.d, model.architecture.vocab);
        let is_packed = precision == Precision::Bf16 || vocab * d < LARGE_LM_HEAD;
        let packed_lm_head = is_packed.then(|| PackedRhs::new(Mat::new(&weight, vocab, d).t(), None, precision));
        Ok(Self {
            architecture: &model.architecture,
            embedding: CpuSlice::new(&model.embedding)?,
            positions: model.positions.as_ref().map(CpuSlice::new).transpose()?,
            layers: layers.collect::<Result<_>>()?,
            norm: norm(&model.norm)?,
            lm_head: weight,
            packed_lm_head,
            lm_head_bias: lm_head.bias.map(CpuSlice::new).transpose()?,
            rotary: model.rotary(positions),
        })
    }
}

/// Linear layers of one input. Callers may ask separately for the joint columns below `split` and from `split` on.
fn linear_group(linears: &[Linear], precision: Precision, split: usize) -> Result<Vec<PackedLinear<'_>>> {
    let mut start = 0;
    let pack = |linear| {
        let linear = PackedLinear::new(linear, precision, split.saturating_sub(start))?;
        start += linear.d_out();
        Ok(linear)
    };
    linears.iter().map(pack).collect()
}
