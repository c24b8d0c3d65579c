//! Qwen3: a Llama with an RMS norm on each head's queries and keys.

use serde::{Deserialize, Serialize};

use super::{Family, LlamaConfig};
use crate::model::architecture::Architecture;
use crate::model::block::NormShape;

/// The width of a head in a config file without one.
const HEAD_DIM: usize = 128;

/// The shape of a Qwen3, with the names of Hugging Face's `Qwen3Config`: Llama's and its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Qwen3Config {
    #[serde(flatten)]
    pub llama: LlamaConfig,
    #[serde(default)]
    pub use_sliding_window: bool,
    /// The kind of each layer's attention; absent means full attention everywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer_types: Option<Vec<String>>,
}

impl Family for Qwen3Config {
    fn sizes(&self) -> [usize; 3] {
        self.llama.sizes()
    }

    fn eos_ids(&self) -> &[u32] {
        &self.llama.eos_token_id
    }

    fn architecture(&self) -> Result<Architecture, String> {
        let partial = |kinds: &Vec<String>| kinds.iter().any(|kind| kind != "full_attention");
        if self.use_sliding_window || self.layer_types.as_ref().is_some_and(partial) {
            return Err("attention to a sliding window is not supported".to_owned());
        }
        let d = self.llama.head_dim.unwrap_or(HEAD_DIM);
        let mut architecture = LlamaConfig { head_dim: Some(d), ..self.llama.clone() }.architecture()?;
        let norm = |module| NormShape { module, d, bias: false, eps: self.llama.rms_norm_eps };
        architecture.block.attention.qk_norm = Some(["self_attn.q_norm", "self_attn.k_norm"].map(norm));
        Ok(architecture)
    }
}
