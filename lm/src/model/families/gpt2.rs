//! GPT-2: learned positions, layer norms, one joint projection for queries, keys and values, weights as `[in, out]`.

use serde::{Deserialize, Serialize};

use super::{Family, check_activation, default_true};
use crate::model::architecture::{Architecture, LmHeadKind, head_width};
use crate::model::block::{Activation, Attention, Block, Heads, LinearShape, Mlp, NormShape};

/// The shape of a GPT-2, with the names and defaults of Hugging Face's `GPT2Config`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Gpt2Config {
    pub vocab_size: usize,
    /// The longest sequence: rows of the position embedding.
    pub n_positions: usize,
    /// The width of the residual stream, d.
    pub n_embd: usize,
    pub n_layer: usize,
    pub n_head: usize,
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
    #[serde(default = "default_true")]
    pub scale_attn_weights: bool,
    #[serde(default)]
    pub scale_attn_by_inverse_layer_idx: bool,
    #[serde(default = "default_true")]
    pub tie_word_embeddings: bool,
}

fn default_epsilon() -> f64 {
    1e-5
}

fn default_activation() -> String {
    "gelu_new".to_owned()
}

impl Gpt2Config {
    /// A GPT-2 of the given shape, everything else as in the published models.
    pub fn new(vocab_size: usize, n_positions: usize, n_embd: usize, n_layer: usize, n_head: usize) -> Self {
        Self {
            vocab_size,
            n_positions,
            n_embd,
            n_layer,
            n_head,
            layer_norm_epsilon: default_epsilon(),
            eos_token_id: vec![],
            bos_token_id: None,
            n_inner: None,
            activation_function: default_activation(),
            scale_attn_weights: true,
            scale_attn_by_inverse_layer_idx: false,
            tie_word_embeddings: true,
        }
    }

    /// The width of the MLP's hidden layer.
    pub fn inner(&self) -> usize {
        self.n_inner.unwrap_or_else(|| self.n_embd.saturating_mul(4))
    }
}

impl Family for Gpt2Config {
    fn sizes(&self) -> [usize; 3] {
        [self.vocab_size, self.n_positions, self.n_embd]
    }

    fn eos_ids(&self) -> &[u32] {
        &self.eos_token_id
    }

    fn architecture(&self) -> Result<Architecture, String> {
        check_activation("activation_function", &self.activation_function, &["gelu_new", "gelu_pytorch_tanh"])?;
        if !self.scale_attn_weights || self.scale_attn_by_inverse_layer_idx {
            return Err("only attention scaled by 1/sqrt(head width) is supported".to_owned());
        }
        let (d, inner) = (self.n_embd, self.inner());
        let width = head_width("n_embd", d, "n_head", self.n_head)?;
        let norm = |module| NormShape { module, d, bias: true, eps: self.layer_norm_epsilon };
        let linear = |module, d_in, d_out| LinearShape { module, d_in, d_out, bias: true };
        Ok(Architecture {
            prefix: "transformer.",
            embedding: "wte",
            positions: Some("wpe"),
            blocks: "h",
            transposed: false,
            vocab: self.vocab_size,
            window: self.n_positions,
            d,
            layers: self.n_layer,
            block: Block {
                norm_1: norm("ln_1"),
                attention: Attention {
                    qkv: vec![linear("attn.c_attn", d, d.saturating_mul(3))],
                    out: linear("attn.c_proj", d, d),
                    qk_norm: None,
                    heads: Heads { query: self.n_head, key_value: self.n_head, width },
                    rotary: None,
                },
                norm_2: Some(norm("ln_2")),
                mlp: Mlp {
                    up: vec![linear("mlp.c_fc", d, inner)],
                    down: linear("mlp.c_proj", inner, d),
                    activation: Activation::GeluTanh,
                },
            },
            norm: norm("ln_f"),
            lm_head: if self.tie_word_embeddings { LmHeadKind::Tied } else { LmHeadKind::Untied { bias: false } },
        })
    }
}
