//! Qwen3: a Llama with an RMS norm on each head's queries and keys.

use serde::de::Error;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

use super::{Family, LlamaConfig};
use crate::model::architecture::Architecture;
use crate::model::block::NormShape;

/// The defaults of `Qwen3Config` that are not Llama's.
const DEFAULTS: [(&str, usize); 3] =
    [("head_dim", 128), ("max_position_embeddings", 32_768), ("num_key_value_heads", 32)];

/// The shape of a Qwen3, with the names of Hugging Face's `Qwen3Config`: Llama's and its own.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Qwen3Config {
    #[serde(flatten, deserialize_with = "with_defaults")]
    pub llama: LlamaConfig,
    #[serde(default)]
    pub use_sliding_window: bool,
    /// The kind of each layer's attention; absent means full attention everywhere.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub layer_types: Option<Vec<String>>,
}

fn with_defaults<'de, D: Deserializer<'de>>(fields: D) -> Result<LlamaConfig, D::Error> {
    let mut fields = Map::deserialize(fields)?;
    for (key, default) in DEFAULTS {
        // Without a width, heads would share the model's, as no Qwen3 does.
        if !fields.contains_key(key) || key == "head_dim" && fields[key].is_null() {
            fields.insert(key.to_owned(), default.into());
        }
    }
    LlamaConfig::deserialize(Value::Object(fields)).map_err(D::Error::custom)
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
        let mut architecture = self.llama.architecture()?;
        let d = architecture.block.attention.heads.width;
        let norm = |module| NormShape { module, d, bias: false, eps: self.llama.rms_norm_eps };
        architecture.block.attention.qk_norm = Some(["self_attn.q_norm", "self_attn.k_norm"].map(norm));
        Ok(architecture)
    }
}

#[cfg(test)]
mod tests {
    use crate::ModelConfig;

    #[test]
    fn what_a_file_leaves_out_is_as_in_transformers() {
        let read = |head_dim: Option<Option<usize>>| {
            let mut json = serde_json::json!({ "model_type": "qwen3", "vocab_size": 9, "hidden_size": 64,
                "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 64 });
            head_dim.into_iter().for_each(|given| json["head_dim"] = given.into());
            ModelConfig::from_json(json).expect("a config")
        };
        for config in [read(None), read(Some(None))] {
            let heads = config.architecture().expect("a possible shape").block.attention.heads;
            assert_eq!((heads.width, heads.key_value, config.window()), (128, 32, 32_768));
            let text = config.text("float32").expect("JSON");
            assert!(text.contains("\"head_dim\": 128"), "{text}");
            assert_eq!(ModelConfig::from_json(serde_json::from_str(&text).expect("JSON")), Ok(config));
        }
        assert_eq!(read(Some(Some(6))).architecture().expect("a possible shape").block.attention.heads.width, 6);
    }
}
