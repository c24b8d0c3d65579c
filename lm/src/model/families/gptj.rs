//! GPT-J: rotary positions on neighbouring columns of part of each head, attention and MLP after one shared norm, a
//! separate output layer with a bias.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::rope::frequencies;
use super::{Family, check_activation};
use crate::model::architecture::{Architecture, LmHeadKind, head_width};
use crate::model::block::{Activation, Attention, Block, Heads, LinearShape, Mlp, NormShape, Pairing, Rotary};

/// The base of GPT-J's rotary frequencies; its config file does not hold it.
const THETA: f64 = 10_000.0;

/// The shape of a GPT-J, with the names and defaults of Hugging Face's `GPTJConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GptJConfig {
    pub vocab_size: usize,
    /// The longest sequence.
    pub n_positions: usize,
    /// The width of the residual stream, d.
    pub n_embd: usize,
    pub n_layer: usize,
    pub n_head: usize,
    /// Columns of each head that are rotated.
    #[serde(default = "default_rotary_dim")]
    pub rotary_dim: usize,
    #[serde(default = "default_epsilon")]
    pub layer_norm_epsilon: f64,
    /// The tokens that end a text, as the file lists them.
    #[serde(default, deserialize_with = "crate::eos::deserialize_ids", serialize_with = "crate::eos::serialize")]
    pub eos_token_id: Vec<u32>,
    #[serde(default, deserialize_with = "crate::eos::deserialize_first_id")]
    pub bos_token_id: Option<u32>,
    /// The width of the MLP; absent means 4 d.
    #[serde(default)]
    pub n_inner: Option<usize>,
    #[serde(default = "default_activation")]
    pub activation_function: String,
    #[serde(default)]
    pub tie_word_embeddings: bool,
}

fn default_rotary_dim() -> usize {
    64
}

fn default_epsilon() -> f64 {
    1e-5
}

fn default_activation() -> String {
    "gelu_new".to_owned()
}

impl Family for GptJConfig {
    fn sizes(&self) -> [usize; 3] {
        [self.vocab_size, self.n_positions, self.n_embd]
    }

    fn eos_ids(&self) -> &[u32] {
        &self.eos_token_id
    }

    fn architecture(&self) -> Result<Architecture, String> {
        check_activation("activation_function", &self.activation_function, &["gelu_new", "gelu_pytorch_tanh"])?;
        let width = head_width("n_embd", self.n_embd, "n_head", self.n_head)?;
        let dim = self.rotary_dim;
        if dim == 0 || !dim.is_multiple_of(2) || dim > width {
            return Err(format!("rotary_dim is {dim}, expected an even number from 2 to the head width {width}"));
        }
        if self.tie_word_embeddings {
            return Err("tie_word_embeddings is set, which is not supported for GPT-J".to_owned());
        }
        let d = self.n_embd;
        let inner = self.n_inner.unwrap_or_else(|| d.saturating_mul(4));
        let norm = |module| NormShape { module, d, bias: true, eps: self.layer_norm_epsilon };
        let linear = |module, d_in, d_out, bias| LinearShape { module, d_in, d_out, bias };
        Ok(Architecture {
            prefix: "transformer.",
            embedding: "wte",
            positions: None,
            blocks: "h",
            transposed: true,
            vocab: self.vocab_size,
            window: self.n_positions,
            d,
            layers: self.n_layer,
            block: Block {
                norm_1: norm("ln_1"),
                attention: Attention {
                    qkv: ["attn.q_proj", "attn.k_proj", "attn.v_proj"].map(|module| linear(module, d, d, false)).into(),
                    out: linear("attn.out_proj", d, d, false),
                    qk_norm: None,
                    heads: Heads { query: self.n_head, key_value: self.n_head, width },
                    rotary: Some(Arc::new(Rotary {
                        pairing: Pairing::Interleaved,
                        frequencies: frequencies(THETA, dim)?,
                    })),
                },
                norm_2: None,
                mlp: Mlp {
                    up: vec![linear("mlp.fc_in", d, inner, true)],
                    down: linear("mlp.fc_out", inner, d, true),
                    activation: Activation::GeluTanh,
                },
            },
            norm: norm("ln_f"),
            lm_head: LmHeadKind::Untied { bias: true },
        })
    }
}
