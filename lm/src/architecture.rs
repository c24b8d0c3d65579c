//! The differences between model families that weights and the forward pass depend on.

use crate::kernels::{Activation, Heads, Pairing};

/// The tensor names of a family and how its files store the tensors. Each module has a `.weight` and may have a
/// `.bias`.
#[derive(Debug)]
pub(crate) struct TensorNames {
    /// Prefix of every name but the output layer's; files of a bare trunk lack it.
    pub prefix: &'static str,
    pub embedding: &'static str,
    /// Learned positions; empty in families with rotary ones.
    pub positions: &'static str,
    pub layers: &'static str,
    pub norm_1: &'static str,
    pub qkv: &'static [&'static str],
    pub attn_out: &'static str,
    /// None: attention and MLP share the first norm.
    pub norm_2: Option<&'static str>,
    pub up: &'static [&'static str],
    pub down: &'static str,
    pub norm: &'static str,
    /// Whether norms are layer norms with a bias; otherwise they are RMS norms without one.
    pub norm_bias: bool,
    /// Whether files hold linear weights as `[out, in]`; in memory they are `[in, out]`.
    pub transposed: bool,
}

/// The output layer's name in every family.
pub(crate) const LM_HEAD: &str = "lm_head";

#[derive(Debug, Clone, PartialEq)]
pub(crate) enum PositionEmbedding {
    /// A table `[window, d]`.
    Learned,
    /// `frequencies` holds radians per position, one value for each pair of columns.
    Rotary { pairing: Pairing, frequencies: Vec<f32> },
}

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
    pub names: &'static TensorNames,
    pub vocab: usize,
    /// The longest sequence, in tokens.
    pub window: usize,
    /// The width of the residual stream.
    pub d: usize,
    pub layers: usize,
    pub heads: Heads,
    /// The width of the MLP.
    pub inner: usize,
    pub eps: f64,
    pub activation: Activation,
    pub positions: PositionEmbedding,
    pub attn_bias: bool,
    pub mlp_bias: bool,
    pub lm_head: LmHeadKind,
}

impl Architecture {
    /// Output widths of the query, key and value projections.
    pub fn qkv_widths(&self) -> [usize; 3] {
        let Heads { query, key_value, width } = self.heads;
        [query, key_value, key_value].map(|heads| heads * width)
    }

    /// Number of weights in one layer's linear layers, biases excluded.
    pub fn weights_per_layer(&self) -> usize {
        let [q, k, v] = self.qkv_widths();
        self.d * (2 * q + k + v + self.inner + self.activation.input_width(self.inner))
    }

    /// Errors: the reason why no model can have this shape.
    pub fn check(&self) -> std::result::Result<(), String> {
        for (name, value) in [
            ("the vocabulary", self.vocab),
            ("the number of positions", self.window),
            ("the hidden size", self.d),
            ("the number of layers", self.layers),
            ("the number of heads", self.heads.query),
            ("the width of a head", self.heads.width),
            ("the width of the MLP", self.inner),
        ] {
            if value == 0 {
                return Err(format!("{name} is 0"));
            }
            // Ids and positions are u32; the bound also keeps a hostile config from overflowing sizes.
            if value > i32::MAX as usize {
                return Err(format!("{name} is {value}, above the limit {}", i32::MAX));
            }
        }
        if !(self.eps > 0.0 && self.eps.is_finite()) {
            return Err(format!("the norm's epsilon is {}, expected a positive number", self.eps));
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
