//! The shape of a model under Hugging Face's names, read from and written to `config.json`; knows no weights.

mod gpt2;
mod gptj;
mod llama;
mod rope;

use std::fs;
use std::path::Path;

use serde::{Deserialize, Deserializer, Serialize};
use serde_json::Value;

use crate::spec::Spec;
use crate::{Error, Result, files};

pub use gpt2::Gpt2Config;
pub use gptj::GptJConfig;
pub use llama::LlamaConfig;

const FILE: &str = "config.json";

/// The largest config file that is read, in bytes.
const MAX_BYTES: u64 = 4 << 20;

/// What changes the numbers of a model of any family, and is not read here.
const UNSUPPORTED: [&str; 3] = ["per_layer_config", "quantization_config", "sliding_window"];

/// The shape of a causal language model of one of the families known here.
#[derive(Debug, Clone, PartialEq)]
pub enum ModelConfig {
    Gpt2(Gpt2Config),
    GptJ(GptJConfig),
    Llama(Box<LlamaConfig>),
}

/// The standard deviation of freshly drawn weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum InitStd {
    /// GPT-2's own way is `Fixed(0.02)`.
    Fixed(f64),
    /// 1/sqrt(d), which small models need; position embeddings keep 0.02.
    InverseSqrtWidth,
}

impl From<Gpt2Config> for ModelConfig {
    fn from(config: Gpt2Config) -> Self {
        Self::Gpt2(config)
    }
}

impl From<GptJConfig> for ModelConfig {
    fn from(config: GptJConfig) -> Self {
        Self::GptJ(config)
    }
}

impl From<LlamaConfig> for ModelConfig {
    fn from(config: LlamaConfig) -> Self {
        Self::Llama(Box::new(config))
    }
}

impl ModelConfig {
    pub fn vocab_size(&self) -> usize {
        match self {
            Self::Gpt2(c) => c.vocab_size,
            Self::GptJ(c) => c.vocab_size,
            Self::Llama(c) => c.vocab_size,
        }
    }

    /// The longest sequence, in tokens.
    pub fn window(&self) -> usize {
        match self {
            Self::Gpt2(c) => c.n_positions,
            Self::GptJ(c) => c.n_positions,
            Self::Llama(c) => c.max_position_embeddings,
        }
    }

    /// The width of the residual stream, d.
    pub fn width(&self) -> usize {
        match self {
            Self::Gpt2(c) => c.n_embd,
            Self::GptJ(c) => c.n_embd,
            Self::Llama(c) => c.hidden_size,
        }
    }

    /// The token that ends a sequence, if the file names one that the vocabulary has; the first where it names several.
    /// Small models often carry the default of a large vocabulary.
    pub fn eos_token_id(&self) -> Option<u32> {
        let id = match self {
            Self::Gpt2(c) => c.eos_token_id,
            Self::GptJ(c) => c.eos_token_id,
            Self::Llama(c) => c.eos_token_id,
        };
        id.filter(|&id| (id as usize) < self.vocab_size())
    }

    /// `model_type`, as the file has it.
    pub fn model_type(&self) -> &'static str {
        match self {
            Self::Gpt2(_) => "gpt2",
            Self::GptJ(_) => "gptj",
            Self::Llama(_) => "llama",
        }
    }

    /// What the forward pass needs to know, or what makes this shape impossible or unsupported here.
    pub(crate) fn spec(&self) -> std::result::Result<Spec, String> {
        let spec = match self {
            Self::Gpt2(c) => c.spec()?,
            Self::GptJ(c) => c.spec()?,
            Self::Llama(c) => c.spec()?,
        };
        spec.check()?;
        Ok(spec)
    }

    /// Reads and checks `folder/config.json`.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join(FILE);
        let bytes = files::whole(&path, MAX_BYTES)?;
        let value: Value = serde_json::from_slice(&bytes).map_err(|e| Error::model(&path, format!("not JSON: {e}")))?;
        Self::from_json(value).map_err(|what| Error::model(&path, what))
    }

    /// From the contents of a `config.json`; a file without `model_type` is taken for a GPT-2. Errors say what is wrong.
    pub fn from_json(value: Value) -> std::result::Result<Self, String> {
        if !value.is_object() {
            return Err("expected an object, such as {\"model_type\": \"gpt2\", …}".to_owned());
        }
        let family = value.get("model_type").map_or(Ok("gpt2"), |v| v.as_str().ok_or_else(|| v.to_string()));
        let family = family.map(str::to_owned).map_err(|v| format!("model_type is {v}; expected a text"))?;
        let unsupported = UNSUPPORTED.iter().find(|key| value.get(key).is_some_and(|set| !set.is_null()));
        fn read<T: serde::de::DeserializeOwned>(value: Value, name: &str) -> std::result::Result<T, String> {
            serde_json::from_value(value).map_err(|e| format!("not a {name} config: {e}"))
        }
        let config: Self = match family.as_str() {
            "gpt2" => read::<Gpt2Config>(value, "GPT-2")?.into(),
            "gptj" => read::<GptJConfig>(value, "GPT-J")?.into(),
            "llama" => read::<LlamaConfig>(value, "Llama")?.into(),
            other => return Err(format!("model_type is \"{other}\"; expected \"gpt2\", \"gptj\" or \"llama\"")),
        };
        if let Some(key) = unsupported {
            return Err(format!("{key} is set; that is not supported"));
        }
        config.spec()?;
        Ok(config)
    }

    /// Writes `folder/config.json` so that `transformers` loads it.
    pub fn save(&self, folder: &Path, torch_dtype: &str) -> Result<()> {
        #[derive(Serialize)]
        struct File<'a, T> {
            architectures: [&'a str; 1],
            model_type: &'a str,
            torch_dtype: &'a str,
            #[serde(flatten)]
            config: &'a T,
        }
        fn text<T: Serialize>(
            class: &str,
            model_type: &str,
            torch_dtype: &str,
            config: &T,
        ) -> serde_json::Result<String> {
            serde_json::to_string_pretty(&File { architectures: [class], model_type, torch_dtype, config })
        }
        let path = folder.join(FILE);
        let kind = self.model_type();
        let text = match self {
            Self::Gpt2(c) => text("GPT2LMHeadModel", kind, torch_dtype, c),
            Self::GptJ(c) => text("GPTJForCausalLM", kind, torch_dtype, c),
            Self::Llama(c) => text("LlamaForCausalLM", kind, torch_dtype, &**c),
        };
        let mut text = text.map_err(|e| Error::model(&path, format!("cannot be written: {e}")))?;
        text.push('\n');
        fs::write(&path, text).map_err(Error::io(&path))
    }
}

/// An id, or the first of a list of ids.
fn first_id<'de, D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Option<u32>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Ids {
        One(u32),
        Many(Vec<u32>),
    }
    Ok(match Option::<Ids>::deserialize(deserializer)? {
        None => None,
        Some(Ids::One(id)) => Some(id),
        Some(Ids::Many(ids)) => ids.first().copied(),
    })
}

fn yes() -> bool {
    true
}

/// An error unless `found` is one of the activations that are one and the same function here.
fn activation(name: &str, found: &str, known: &[&str]) -> std::result::Result<(), String> {
    match known.contains(&found) {
        true => Ok(()),
        false => Err(format!("{name} is `{found}`; only `{}` is supported", known[0])),
    }
}
