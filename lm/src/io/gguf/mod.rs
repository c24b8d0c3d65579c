//! GGUF files: a Llama with Hugging Face's names (config, tokenizer, and tensors in Hugging Face's row order), the chat
//! metadata of any model, and the models that candle-transformers runs with quantised weights (`quantized`).

mod config;
mod header;
mod quantized;
#[cfg(test)]
mod tests;
mod tokenizer;

use std::path::Path;

use self::config::{SCALING_TYPE, UNSUPPORTED};
use self::header::{Header, Value};
pub use self::quantized::QuantizedFile;
pub(crate) use self::quantized::{QuantizedFamily, Shape as QuantizedShape};
use super::source::Source;
use super::{Checkpoint, TensorLocation, TensorLocations, WeightFile};
use crate::{Error, Result};

/// The contents of a GGUF file, in the form of a Hugging Face folder.
pub struct Gguf {
    /// `config.json`, with `model_type` "llama".
    pub config: serde_json::Value,
    /// `tokenizer.json`.
    pub tokenizer: serde_json::Value,
    /// The weights, dequantised when read: `model.embed_tokens.weight` and so on, `[out, in]`.
    pub weights: Checkpoint,
}

impl Gguf {
    /// Errors: not a GGUF, not a Llama, or a tokenizer other than a byte-level BPE with a known split.
    pub fn open(path: &Path) -> Result<Self> {
        Self::parse(path, Source::open(path)?)
    }

    pub(super) fn parse(path: &Path, source: Source) -> Result<Self> {
        let Header { metadata, mut tensors } = Header::read(&source, path)?;
        let metadata = Metadata(metadata);
        let invalid = |message: String| Error::model(path, message);
        let file = WeightFile { path: path.to_path_buf(), source };
        // Not a weight: the factors by which rotary frequencies are divided.
        let divisors = match tensors.remove(config::DIVISORS) {
            Some(location) => Some(config::divisors(&file, &location).map_err(invalid)?),
            None => None,
        };
        let config = config::read(&metadata, &tensors, divisors.as_deref()).map_err(invalid)?;
        let tokenizer = tokenizer::read(&metadata).map_err(invalid)?;

        let mut locations = TensorLocations::new();
        for (name, location) in tensors {
            let hf_name =
                hugging_face_name(&name).ok_or_else(|| invalid(format!("tensor `{name}` is not part of a Llama")))?;
            locations.insert(
                hf_name,
                mark_interleaved(&name, location, &config)
                    .map_err(|message| invalid(format!("tensor `{name}` {message}")))?,
            );
        }
        let weights = Checkpoint {
            path: path.to_path_buf(),
            files: vec![file],
            tensors: locations,
            supported_types: header::SUPPORTED_TYPES,
        };
        Ok(Self { config: config.json(), tokenizer, weights })
    }
}

/// The fields of `tokenizer_config.json` that concern chats, from a GGUF file of any model: `bos_token`, `eos_token` and
/// `chat_template`, each null if the file has none. Errors: not a GGUF, or a token's id without a token.
pub fn gguf_chat_config(path: &Path) -> Result<serde_json::Value> {
    chat_config(&Source::open(path)?, path)
}

fn chat_config(source: &Source, path: &Path) -> Result<serde_json::Value> {
    let metadata = Metadata(Header::read(source, path)?.metadata);
    tokenizer::chat_config(&metadata).map_err(|message| Error::model(path, message))
}

/// Metadata with errors that name the key.
struct Metadata(std::collections::BTreeMap<String, Value>);

impl Metadata {
    fn get<T>(&self, key: &str, expected: &str, read: impl Fn(&Value) -> Option<T>) -> Result<Option<T>, String> {
        match self.0.get(key) {
            None => Ok(None),
            Some(value) => read(value).map(Some).ok_or_else(|| format!("`{key}` is not {expected}")),
        }
    }

    /// A count; fits an i32, as do all counts of a model.
    fn count(&self, key: &str) -> Result<Option<usize>, String> {
        self.get(key, "a number from 0 to 2^31", |value| match value {
            &Value::Int(int) => i32::try_from(int).ok().and_then(|int| usize::try_from(int).ok()),
            _ => None,
        })
    }

    /// A token's id; -1, signed or as the largest u32, means none.
    fn token(&self, key: &str) -> Result<Option<usize>, String> {
        match self.0.get(key) {
            Some(&Value::Int(-1)) => Ok(None),
            Some(&Value::Int(int)) if int == i128::from(u32::MAX) => Ok(None),
            _ => self.count(key),
        }
    }

    fn float(&self, key: &str) -> Result<Option<f64>, String> {
        self.get(key, "a finite number", |value| match value {
            &Value::Float(float) if float.is_finite() => Some(float),
            _ => None,
        })
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, String> {
        self.get(key, "a boolean", |value| match value {
            &Value::Bool(flag) => Some(flag),
            _ => None,
        })
    }

    fn text(&self, key: &str) -> Result<Option<&str>, String> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Text(text)) => Ok(Some(text)),
            Some(_) => Err(format!("`{key}` is not a string")),
        }
    }

    fn texts(&self, key: &str) -> Result<Option<&[String]>, String> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Texts(texts)) => Ok(Some(texts)),
            Some(_) => Err(format!("`{key}` is not an array of strings")),
        }
    }

    fn ints(&self, key: &str) -> Result<Option<&[i32]>, String> {
        match self.0.get(key) {
            None => Ok(None),
            Some(Value::Ints(ints)) => Ok(Some(ints)),
            Some(_) => Err(format!("`{key}` is not an array of 32-bit integers")),
        }
    }
}

/// A required value. Errors: the key is missing.
fn required<T>(key: &str, value: Result<Option<T>, String>) -> Result<T, String> {
    value?.ok_or_else(|| format!("`{key}` is missing"))
}

/// Hugging Face's name of a Llama's tensor.
fn hugging_face_name(name: &str) -> Option<String> {
    let whole = match name {
        "token_embd.weight" => Some("model.embed_tokens.weight"),
        "output_norm.weight" => Some("model.norm.weight"),
        "output.weight" => Some("lm_head.weight"),
        _ => None,
    };
    if let Some(whole) = whole {
        return Some(whole.to_owned());
    }
    let (layer, module) = name.strip_prefix("blk.")?.split_once('.')?;
    // Only the canonical spelling of a number, so that two names in the file never become one.
    let number: usize = layer.parse().ok().filter(|number: &usize| number.to_string() == layer)?;
    let module = match module {
        "attn_norm.weight" => "input_layernorm.weight",
        "ffn_norm.weight" => "post_attention_layernorm.weight",
        "attn_q.weight" => "self_attn.q_proj.weight",
        "attn_k.weight" => "self_attn.k_proj.weight",
        "attn_v.weight" => "self_attn.v_proj.weight",
        "attn_output.weight" => "self_attn.o_proj.weight",
        "ffn_gate.weight" => "mlp.gate_proj.weight",
        "ffn_up.weight" => "mlp.up_proj.weight",
        "ffn_down.weight" => "mlp.down_proj.weight",
        _ => return None,
    };
    Some(format!("model.layers.{number}.{module}"))
}

/// Marks the rows of queries and keys, which llama.cpp stores in another order. Errors: their number does not match the
/// heads.
fn mark_interleaved(
    name: &str,
    location: TensorLocation,
    config: &config::LlamaShape,
) -> Result<TensorLocation, String> {
    let heads = match name.rsplit_once('.').map(|(start, _)| start.rsplit_once('.').map_or(start, |(_, module)| module))
    {
        Some("attn_q") => config.heads,
        Some("attn_k") => config.kv_heads,
        _ => return Ok(location),
    };
    match location.shape[..] {
        [rows, _] if rows == heads * config.head_dim => Ok(TensorLocation { interleaved: Some(heads), ..location }),
        _ => Err(format!("has shape {:?}, expected {heads} heads of {} rows", location.shape, config.head_dim)),
    }
}

/// Reorders rows `[heads, head / 2, 2]` to Hugging Face's `[heads, 2, head / 2]`: llama.cpp rotates neighbouring
/// columns, Hugging Face the two halves of a head. `shape` is `[heads * head, in]`, with an even head width.
pub(super) fn deinterleave_rows(values: &[f32], heads: usize, shape: &[usize]) -> Vec<f32> {
    let (rows, columns) = (shape[0], shape[1]);
    let head = rows / heads;
    let mut out = Vec::with_capacity(values.len());
    for row in 0..rows {
        let (start, within) = (row - row % head, row % head);
        let from = start + within % (head / 2) * 2 + within / (head / 2);
        out.extend_from_slice(&values[from * columns..][..columns]);
    }
    out
}
