//! Model configurations with Hugging Face's names, read from and written to `config.json`.

mod gpt2;
mod gptj;
mod llama;
mod qwen3;
pub(crate) mod rope;

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::io;
use crate::model::architecture::Architecture;
use crate::{Eos, Error, Result, eos};

pub use gpt2::Gpt2Config;
pub use gptj::GptJConfig;
pub use llama::LlamaConfig;
pub use qwen3::Qwen3Config;

const CONFIG_FILE: &str = "config.json";

/// transformers' generation settings for a model.
const GENERATION_FILE: &str = "generation_config.json";

/// Size limit for a config file, in bytes.
const MAX_CONFIG_BYTES: u64 = 4 << 20;

/// Keys that change the output of a model of any family and are not supported.
const UNSUPPORTED: [&str; 3] = ["per_layer_config", "quantization_config", "sliding_window"];

/// The standard deviation of freshly drawn weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum InitStd {
    /// GPT-2 itself uses `Fixed(0.02)`.
    Fixed(f64),
    /// 1/sqrt(d), which small models need; position embeddings keep 0.02.
    InverseSqrtWidth,
}

/// The config of one family. Its `architecture` is all that the rest of the crate knows of the family.
trait Family {
    /// Errors: an impossible or unsupported configuration.
    fn architecture(&self) -> Result<Architecture, String>;

    /// The vocabulary, the longest sequence, the width of the residual stream.
    fn sizes(&self) -> [usize; 3];

    /// The tokens that end a text, as the file lists them.
    fn eos_ids(&self) -> &[u32];
}

/// A family per line: its config, `model_type` in the file, transformers' class, and its name in messages.
macro_rules! families {
    ($($variant:ident($config:ident), $model_type:literal, $class:literal, $name:literal;)*) => {
        /// The configuration of a causal language model of a supported family.
        #[derive(Debug, Clone, PartialEq)]
        pub enum ModelConfig {
            $($variant(Box<$config>),)*
        }

        $(impl From<$config> for ModelConfig {
            fn from(config: $config) -> Self {
                Self::$variant(Box::new(config))
            }
        })*

        impl ModelConfig {
            fn family(&self) -> &dyn Family {
                match self {
                    $(Self::$variant(config) => &**config,)*
                }
            }

            /// `model_type` as in the file.
            pub fn model_type(&self) -> &'static str {
                match self {
                    $(Self::$variant(_) => $model_type,)*
                }
            }

            /// Reads the config of the family called `model_type`.
            fn of_family(model_type: &str, value: Value) -> Result<Self, String> {
                match model_type {
                    $($model_type => match serde_json::from_value::<$config>(value) {
                        Ok(config) => Ok(config.into()),
                        Err(e) => Err(format!("not a {} config: {e}", $name)),
                    },)*
                    other => {
                        let known = [$($model_type),*].map(|known| format!("\"{known}\"")).join(", ");
                        Err(format!("model_type is \"{other}\", expected one of {known}"))
                    }
                }
            }

            /// The contents of a config file.
            fn text(&self, torch_dtype: &str) -> serde_json::Result<String> {
                match self {
                    $(Self::$variant(config) => serde_json::to_string_pretty(&ConfigFile {
                        architectures: [$class],
                        model_type: $model_type,
                        torch_dtype,
                        config: &**config,
                    }),)*
                }
            }
        }
    };
}

families! {
    Gpt2(Gpt2Config), "gpt2", "GPT2LMHeadModel", "GPT-2";
    GptJ(GptJConfig), "gptj", "GPTJForCausalLM", "GPT-J";
    Llama(LlamaConfig), "llama", "LlamaForCausalLM", "Llama";
    Qwen3(Qwen3Config), "qwen3", "Qwen3ForCausalLM", "Qwen3";
}

#[derive(Serialize)]
struct ConfigFile<'a, T> {
    architectures: [&'a str; 1],
    model_type: &'a str,
    torch_dtype: &'a str,
    #[serde(flatten)]
    config: &'a T,
}

impl ModelConfig {
    pub fn vocab_size(&self) -> usize {
        self.family().sizes()[0]
    }

    /// The longest sequence, in tokens.
    pub fn window(&self) -> usize {
        self.family().sizes()[1]
    }

    /// The width of the residual stream, d.
    pub fn width(&self) -> usize {
        self.family().sizes()[2]
    }

    /// The tokens that end a text, if the file names any that the vocabulary has: small models often keep an id from
    /// the default of a large vocabulary.
    pub fn eos(&self) -> Option<Eos> {
        let ids = self.family().eos_ids().iter().copied();
        Eos::new(ids.filter(|&id| (id as usize) < self.vocab_size()))
    }

    /// The architecture for weights and forward pass. Errors: an impossible or unsupported configuration.
    pub(crate) fn architecture(&self) -> Result<Architecture, String> {
        let architecture = self.family().architecture()?;
        architecture.check()?;
        Ok(architecture)
    }

    /// Reads and checks `folder/config.json`, with the EOS ids of a `generation_config.json` beside it, at which
    /// generation stops as well.
    pub fn load(folder: &Path) -> Result<Self> {
        #[derive(Deserialize)]
        struct EosIds {
            #[serde(default, deserialize_with = "eos::deserialize_ids")]
            eos_token_id: Vec<u32>,
        }
        let path = folder.join(CONFIG_FILE);
        let mut value = read(&path)?;
        let generation = folder.join(GENERATION_FILE);
        if generation.try_exists().map_err(Error::io(&generation))? {
            let bad = |e| Error::model(&generation, format!("not a generation config: {e}"));
            let more = EosIds::deserialize(read(&generation)?).map_err(bad)?;
            // An invalid list of the config itself is reported below.
            if let (Ok(own), Some(object)) = (EosIds::deserialize(&value), value.as_object_mut()) {
                let all = Eos::new(own.eos_token_id.into_iter().chain(more.eos_token_id));
                object.insert("eos_token_id".to_owned(), all.map_or(Value::Null, |eos| eos.ids().into()));
            }
        }
        Self::from_json(value).map_err(|message| Error::model(&path, message))
    }

    /// Parses the contents of a `config.json`; a file without `model_type` is taken for a GPT-2. Errors say what is
    /// wrong.
    pub fn from_json(value: Value) -> Result<Self, String> {
        if !value.is_object() {
            return Err("expected a JSON object such as {\"model_type\": \"gpt2\", …}".to_owned());
        }
        let family = value.get("model_type").map_or(Ok("gpt2"), |v| v.as_str().ok_or_else(|| v.to_string()));
        let family = family.map(str::to_owned).map_err(|v| format!("model_type is {v}, expected a string"))?;
        let is_off =
            |key: &str| key == "sliding_window" && value.get("use_sliding_window") == Some(&Value::Bool(false));
        let is_set = |key: &str| value.get(key).is_some_and(|set| !set.is_null()) && !is_off(key);
        let unsupported = UNSUPPORTED.into_iter().find(|key| is_set(key));
        let config = Self::of_family(&family, value)?;
        if let Some(key) = unsupported {
            return Err(format!("{key} is set, which is not supported"));
        }
        config.architecture()?;
        Ok(config)
    }

    /// The contents of a `config.json`.
    pub fn to_json(&self) -> Value {
        // By way of text, which shows f32 numbers as short as the file does.
        let json = self.text("float32").and_then(|text| serde_json::from_str(&text));
        json.expect("a config is plain JSON")
    }

    /// Writes `folder/config.json` so that `transformers` loads it.
    pub fn save(&self, folder: &Path, torch_dtype: &str) -> Result<()> {
        let path = folder.join(CONFIG_FILE);
        let text = self.text(torch_dtype);
        let mut text = text.map_err(|e| Error::model(&path, format!("cannot be written: {e}")))?;
        text.push('\n');
        fs::write(&path, text).map_err(Error::io(&path))
    }
}

fn read(path: &Path) -> Result<Value> {
    serde_json::from_slice(&io::read_small(path, MAX_CONFIG_BYTES)?)
        .map_err(|e| Error::model(path, format!("not JSON: {e}")))
}

fn default_true() -> bool {
    true
}

/// Errors unless `found` is in `known`, which lists names of one and the same function.
fn check_activation(name: &str, found: &str, known: &[&str]) -> Result<(), String> {
    match known.contains(&found) {
        true => Ok(()),
        false => Err(format!("{name} is `{found}`; only `{}` is supported", known[0])),
    }
}
