//! Llama and similar models: rotary positions, RMS norms, grouped-query attention, SwiGLU.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::rope::RopeConfig;
use super::{Family, check_activation};
use crate::model::architecture::{Architecture, LmHeadKind, head_width};
use crate::model::block::{Activation, Attention, Block, Heads, LinearShape, Mlp, NormShape, Pairing, Rotary};

/// The shape of a Llama, with the names and defaults of Hugging Face's `LlamaConfig`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct LlamaConfig {
    pub vocab_size: usize,
    /// The width of the residual stream, d.
    pub hidden_size: usize,
    /// The width of the MLP.
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    /// Key/value heads; absent means as many as query heads.
    #[serde(default)]
    pub num_key_value_heads: Option<usize>,
    /// The width of a head; absent means hidden_size / num_attention_heads.
    #[serde(default)]
    pub head_dim: Option<usize>,
    /// The longest sequence.
    #[serde(default = "default_window")]
    pub max_position_embeddings: usize,
    #[serde(default = "default_epsilon")]
    pub rms_norm_eps: f64,
    #[serde(default = "default_activation")]
    pub hidden_act: String,
    #[serde(flatten)]
    pub rope: RopeConfig,
    #[serde(default)]
    pub attention_bias: bool,
    #[serde(default)]
    pub mlp_bias: bool,
    /// Whether the output layer reuses the embedding. Hugging Face's default is false.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// The tokens that end a text, as the file lists them.
    #[serde(default, deserialize_with = "crate::eos::deserialize_ids", serialize_with = "crate::eos::serialize")]
    pub eos_token_id: Vec<u32>,
    #[serde(default, deserialize_with = "crate::eos::deserialize_first_id")]
    pub bos_token_id: Option<u32>,
}

fn default_window() -> usize {
    2048
}

fn default_epsilon() -> f64 {
    1e-6
}

fn default_activation() -> String {
    "silu".to_owned()
}

impl Family for LlamaConfig {
    fn sizes(&self) -> [usize; 3] {
        [self.vocab_size, self.max_position_embeddings, self.hidden_size]
    }

    fn eos_ids(&self) -> &[u32] {
        &self.eos_token_id
    }

    fn architecture(&self) -> Result<Architecture, String> {
        check_activation("hidden_act", &self.hidden_act, &["silu", "swish"])?;
        let query = self.num_attention_heads;
        let key_value = self.num_key_value_heads.unwrap_or(query);
        if query == 0 || key_value == 0 || !query.is_multiple_of(key_value) {
            return Err(format!("num_attention_heads {query} is not a multiple of num_key_value_heads {key_value}"));
        }
        let width = match self.head_dim {
            Some(width) => width,
            None => head_width("hidden_size", self.hidden_size, "num_attention_heads", query)?,
        };
        if width == 0 || !width.is_multiple_of(2) {
            return Err(format!("the head width is {width}, but rotary embeddings need a positive even number"));
        }
        let heads = Heads { query, key_value, width };
        let (d, inner) = (self.hidden_size, self.intermediate_size);
        let (q, kv) = (heads.columns(query), heads.columns(key_value));
        let norm = |module| NormShape { module, d, bias: false, eps: self.rms_norm_eps };
        let attention = |module, d_in, d_out| LinearShape { module, d_in, d_out, bias: self.attention_bias };
        let mlp = |module, d_in, d_out| LinearShape { module, d_in, d_out, bias: self.mlp_bias };
        Ok(Architecture {
            prefix: "model.",
            embedding: "embed_tokens",
            positions: None,
            blocks: "layers",
            transposed: true,
            vocab: self.vocab_size,
            window: self.max_position_embeddings,
            d,
            layers: self.num_hidden_layers,
            block: Block {
                norm_1: norm("input_layernorm"),
                attention: Attention {
                    qkv: vec![
                        attention("self_attn.q_proj", d, q),
                        attention("self_attn.k_proj", d, kv),
                        attention("self_attn.v_proj", d, kv),
                    ],
                    out: attention("self_attn.o_proj", q, d),
                    qk_norm: None,
                    heads,
                    rotary: Some(Arc::new(Rotary {
                        pairing: Pairing::Halves,
                        frequencies: self.rope.frequencies(width)?,
                    })),
                },
                norm_2: Some(norm("post_attention_layernorm")),
                mlp: Mlp {
                    up: vec![mlp("mlp.gate_proj", d, inner), mlp("mlp.up_proj", d, inner)],
                    down: mlp("mlp.down_proj", inner, d),
                    activation: Activation::SwiGlu,
                },
            },
            norm: norm("norm"),
            lm_head: if self.tie_word_embeddings { LmHeadKind::Tied } else { LmHeadKind::Untied { bias: false } },
        })
    }
}
