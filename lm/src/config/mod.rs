//! Model configurations with Hugging Face's names, read from and written to `config.json`.

mod gpt2;
mod gptj;
mod llama;
pub(crate) mod rope;

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::architecture::Architecture;
use crate::{Eos, Error, Result, eos, files};

pub use gpt2::Gpt2Config;
pub use gptj::GptJConfig;
pub use llama::LlamaConfig;

const CONFIG_FILE: &str = "config.json";

/// transformers' generation settings for a model.
const GENERATION_FILE: &str = "generation_config.json";

/// Size limit for a config file, in bytes.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// Keys that change the output of a model of any family and are not supported.
const UNSUPPORTED: [&str; 3] = ["per_layer_config", "quantization_config", "sliding_window"];

/// The configuration of a causal language model of a supported family.
#[derive(Debug, Clone, PartialEq)]
pub enum ModelConfig {
    Gpt2(Gpt2Config),
    GptJ(GptJConfig),
    Llama(Box<LlamaConfig>),
}

/// The standard deviation of freshly drawn weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum InitStd {
    /// GPT-2 itself uses `Fixed(0.02)`.
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

    /// The tokens that end a text, if the file names any that the vocabulary has: small models often keep an id from
    /// the default of a large vocabulary.
    pub fn eos(&self) -> Option<Eos> {
        let ids = match self {
            Self::Gpt2(c) => &c.eos_token_id,
            Self::GptJ(c) => &c.eos_token_id,
            Self::Llama(c) => &c.eos_token_id,
        };
        Eos::new(ids.iter().copied().filter(|&id| (id as usize) < self.vocab_size()))
    }

    /// `model_type` as in the file.
    pub fn model_type(&self) -> &'static str {
        match self {
            Self::Gpt2(_) => "gpt2",
            Self::GptJ(_) => "gptj",
            Self::Llama(_) => "llama",
        }
    }

    /// The architecture for weights and forward pass. Errors: an impossible or unsupported configuration.
    pub(crate) fn architecture(&self) -> std::result::Result<Architecture, String> {
        let architecture = match self {
            Self::Gpt2(c) => c.architecture()?,
            Self::GptJ(c) => c.architecture()?,
            Self::Llama(c) => c.architecture()?,
        };
        architecture.check()?;
        Ok(architecture)
    }

    /// Reads and checks `folder/config.json`, with the EOS ids of a `generation_config.json` beside it.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join(CONFIG_FILE);
        Self::from_json(read(&path)?).map_err(|message| Error::model(&path, message))?.with_generation(folder)
    }

    /// Appends the EOS ids of the generation config, at which generation stops as well, to the model's own.
    fn with_generation(mut self, folder: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct GenerationConfig {
            #[serde(default, deserialize_with = "eos::deserialize_ids")]
            eos_token_id: Vec<u32>,
        }
        let path = folder.join(GENERATION_FILE);
        if path.try_exists().map_err(Error::io(&path))? {
            let bad = |e| Error::model(&path, format!("not a generation config: {e}"));
            let more: GenerationConfig = serde_json::from_value(read(&path)?).map_err(bad)?;
            let ids = match &mut self {
                Self::Gpt2(c) => &mut c.eos_token_id,
                Self::GptJ(c) => &mut c.eos_token_id,
                Self::Llama(c) => &mut c.eos_token_id,
            };
            let all = ids.iter().chain(&more.eos_token_id).copied();
            *ids = Eos::new(all).map_or_else(Vec::new, |eos| eos.ids().to_vec());
        }
        Ok(self)
    }

    /// Parses the contents of a `config.json`; a file without `model_type` is taken for a GPT-2. Errors say what is
    /// wrong.
    pub fn from_json(value: Value) -> std::result::Result<Self, String> {
        if !value.is_object() {
            return Err("expected a JSON object such as {\"model_type\": \"gpt2\", …}".to_owned());
        }
        let family = value.get("model_type").map_or(Ok("gpt2"), |v| v.as_str().ok_or_else(|| v.to_string()));
        let family = family.map(str::to_owned).map_err(|v| format!("model_type is {v}, expected a string"))?;
        let unsupported = UNSUPPORTED.iter().find(|key| value.get(key).is_some_and(|set| !set.is_null()));
        fn read<T: serde::de::DeserializeOwned>(value: Value, name: &str) -> std::result::Result<T, String> {
            serde_json::from_value(value).map_err(|e| format!("not a {name} config: {e}"))
        }
        let config: Self = match family.as_str() {
            "gpt2" => read::<Gpt2Config>(value, "GPT-2")?.into(),
            "gptj" => read::<GptJConfig>(value, "GPT-J")?.into(),
            "llama" => read::<LlamaConfig>(value, "Llama")?.into(),
            other => return Err(format!("model_type is \"{other}\", expected \"gpt2\", \"gptj\" or \"llama\"")),
        };
        if let Some(key) = unsupported {
            return Err(format!("{key} is set, which is not supported"));
        }
        config.architecture()?;
        Ok(config)
    }

    /// Writes `folder/config.json` so that `transformers` loads it.
    pub fn save(&self, folder: &Path, torch_dtype: &str) -> Result<()> {
        #[derive(Serialize)]
        struct ConfigFile<'a, T> {
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
            serde_json::to_string_pretty(&ConfigFile { architectures: [class], model_type, torch_dtype, config })
        }
        let path = folder.join(CONFIG_FILE);
        let model_type = self.model_type();
        let text = match self {
            Self::Gpt2(c) => text("GPT2LMHeadModel", model_type, torch_dtype, c),
            Self::GptJ(c) => text("GPTJForCausalLM", model_type, torch_dtype, c),
            Self::Llama(c) => text("LlamaForCausalLM", model_type, torch_dtype, &**c),
        };
        let mut text = text.map_err(|e| Error::model(&path, format!("cannot be written: {e}")))?;
        text.push('\n');
        fs::write(&path, text).map_err(Error::io(&path))
    }
}

fn read(path: &Path) -> Result<Value> {
    serde_json::from_slice(&files::read_small(path, MAX_CONFIG_BYTES)?)
        .map_err(|e| Error::model(path, format!("not JSON: {e}")))
}

fn default_true() -> bool {
    true
}

/// Errors unless `found` is in `known`, which lists names of one and the same function.
fn check_activation(name: &str, found: &str, known: &[&str]) -> std::result::Result<(), String> {
    match known.contains(&found) {
        true => Ok(()),
        false => Err(format!("{name} is `{found}`; only `{}` is supported", known[0])),
    }
}
