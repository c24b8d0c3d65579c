//! The shape of a whole model, which a family's config is translated into.

use crate::model::block::{Block, LinearShape, NormShape};

/// The output layer's name in every family.
pub(crate) const LM_HEAD: &str = "lm_head";

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LmHeadKind {
    /// The output layer reuses the embedding.
    Tied,
    Untied {
        bias: bool,
    },
}

#[derive(Debug, Clone)]
pub(crate) struct Architecture {
    /// Prefix of every tensor's name but the output layer's; files of a bare trunk lack it.
    pub prefix: &'static str,
    pub embedding: &'static str,
    /// The module of learned positions, if there are any.
    pub positions: Option<&'static str>,
    /// The module of the list of blocks.
    pub blocks: &'static str,
    /// Whether files hold the weights of linear layers as `[out, in]`; in memory they are `[in, out]`.
    pub transposed: bool,
    pub vocab: usize,
    /// The longest sequence, in tokens.
    pub window: usize,
    /// The width of the residual stream.
    pub d: usize,
    pub layers: usize,
    pub block: Block<LinearShape, NormShape>,
    /// The norm after the last block.
    pub norm: NormShape,
    pub lm_head: LmHeadKind,
}

impl Architecture {
    /// Number of weights in one block's linear layers, biases excluded.
    pub fn weights_per_block(&self) -> usize {
        self.block.linears().fold(0, |sum: usize, linear| sum.saturating_add(linear.d_in.saturating_mul(linear.d_out)))
    }

    /// Bytes of the keys and values of one sequence of `positions` tokens.
    pub fn cache_bytes(&self, positions: usize) -> usize {
        let heads = self.block.attention.heads;
        let width = 8 * heads.columns(heads.key_value);
        width.saturating_mul(self.layers).saturating_mul(positions)
    }

    /// Errors: the reason why no model can have this shape.
    pub fn check(&self) -> Result<(), String> {
        let heads = self.block.attention.heads;
        for (name, value) in [
            ("the vocabulary", self.vocab),
            ("the number of positions", self.window),
            ("the hidden size", self.d),
            ("the number of layers", self.layers),
            ("the number of heads", heads.query),
            ("the width of a head", heads.width),
            ("the width of the MLP", self.block.mlp.down.d_in),
        ] {
            if value == 0 {
                return Err(format!("{name} is 0"));
            }
            // Ids and positions are u32; the bound also keeps a hostile config from overflowing sizes.
            if value > i32::MAX as usize {
                return Err(format!("{name} is {value}, above the limit {}", i32::MAX));
            }
        }
        let eps = self.norm.eps;
        if !(eps > 0.0 && eps.is_finite()) {
            return Err(format!("the norm's epsilon is {eps}, expected a positive number"));
        }
        Ok(())
    }
}

/// The width of a head when heads share the model's width evenly.
pub(crate) fn head_width(width_name: &str, width: usize, heads_name: &str, heads: usize) -> Result<usize, String> {
    match heads {
        0 => Err(format!("{heads_name} is 0")),
        _ if !width.is_multiple_of(heads) => {
            Err(format!("{width_name} {width} is not a multiple of {heads_name} {heads}"))
        }
        _ => Ok(width / heads),
    }
}
