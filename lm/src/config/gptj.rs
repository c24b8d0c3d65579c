//! GPT-J: rotary positions on neighbouring columns of part of each head, attention and MLP after one shared norm, a
//! separate output layer with a bias.

use serde::{Deserialize, Serialize};

use super::activation;
use super::rope::frequencies;
use crate::kernels::{Activation, Heads, Pairing};
use crate::spec::{Names, OutputLayer, Positions, Spec, head_width};

static NAMES: Names = Names {
    prefix: "transformer.",
    embedding: "wte",
    positions: "",
    layers: "h",
    norm_1: "ln_1",
    qkv: &["attn.q_proj", "attn.k_proj", "attn.v_proj"],
    attn_out: "attn.out_proj",
    norm_2: None,
    up: &["mlp.fc_in"],
    down: "mlp.fc_out",
    norm: "ln_f",
    norm_bias: true,
    transposed: true,
};

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
    #[serde(default = "rotary_dim")]
    pub rotary_dim: usize,
    #[serde(default = "epsilon")]
    pub layer_norm_epsilon: f64,
    /// The tokens that end a text, as the file lists them.
    #[serde(default, deserialize_with = "crate::eos::ids", serialize_with = "crate::eos::serialize")]
    pub eos_token_id: Vec<u32>,
    #[serde(default, deserialize_with = "crate::eos::first_id")]
    pub bos_token_id: Option<u32>,
    /// The width of the MLP; absent means 4 d.
    #[serde(default)]
    pub n_inner: Option<usize>,
    #[serde(default = "gelu")]
    pub activation_function: String,
    #[serde(default)]
    pub tie_word_embeddings: bool,
}

fn rotary_dim() -> usize {
    64
}

fn epsilon() -> f64 {
    1e-5
}

fn gelu() -> String {
    "gelu_new".to_owned()
}

impl GptJConfig {
    pub(super) fn spec(&self) -> std::result::Result<Spec, String> {
        activation("activation_function", &self.activation_function, &["gelu_new", "gelu_pytorch_tanh"])?;
        let width = head_width("n_embd", self.n_embd, "n_head", self.n_head)?;
        let dim = self.rotary_dim;
        if dim == 0 || !dim.is_multiple_of(2) || dim > width {
            return Err(format!("rotary_dim is {dim}; expected an even number of at most the head's {width} columns"));
        }
        if self.tie_word_embeddings {
            return Err("tie_word_embeddings is set; a GPT-J's output layer is its own here".to_owned());
        }
        Ok(Spec {
            names: &NAMES,
            vocab: self.vocab_size,
            window: self.n_positions,
            d: self.n_embd,
            layers: self.n_layer,
            heads: Heads { query: self.n_head, key_value: self.n_head, width },
            inner: self.n_inner.unwrap_or_else(|| self.n_embd.saturating_mul(4)),
            eps: self.layer_norm_epsilon,
            activation: Activation::GeluTanh,
            positions: Positions::Rotary { pairing: Pairing::Interleaved, frequencies: frequencies(THETA, dim)? },
            attn_bias: false,
            mlp_bias: true,
            output: OutputLayer::Own { bias: true },
        })
    }
}
