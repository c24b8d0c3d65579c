//! The shape of a GPT-2 under Hugging Face's names, read from and written to `config.json`; knows no weights.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::{Error, Result};

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
    #[serde(default)]
    pub eos_token_id: Option<u32>,
    #[serde(default)]
    pub bos_token_id: Option<u32>,
    /// The width of the MLP; absent means 4 d.
    #[serde(default)]
    pub n_inner: Option<usize>,
    #[serde(default = "default_activation")]
    pub activation_function: String,
    #[serde(default = "yes")]
    pub scale_attn_weights: bool,
    #[serde(default)]
    pub scale_attn_by_inverse_layer_idx: bool,
    #[serde(default = "yes")]
    pub tie_word_embeddings: bool,
}

fn default_epsilon() -> f64 {
    1e-5
}

fn default_activation() -> String {
    "gelu_new".to_owned()
}

fn yes() -> bool {
    true
}

/// The standard deviation of freshly drawn weights.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum InitStd {
    /// GPT-2's own way is `Fixed(0.02)`.
    Fixed(f64),
    /// 1/sqrt(d), which small models need; position embeddings keep 0.02.
    InverseSqrtWidth,
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
            eos_token_id: None,
            bos_token_id: None,
            n_inner: None,
            activation_function: default_activation(),
            scale_attn_weights: true,
            scale_attn_by_inverse_layer_idx: false,
            tie_word_embeddings: true,
        }
    }

    /// The width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.n_embd / self.n_head
    }

    /// The width of the MLP's hidden layer.
    pub fn inner(&self) -> usize {
        self.n_inner.unwrap_or(4 * self.n_embd)
    }

    /// What makes this shape impossible or unsupported here, if anything.
    pub fn check(&self) -> std::result::Result<(), String> {
        for (name, value) in [
            ("vocab_size", self.vocab_size),
            ("n_positions", self.n_positions),
            ("n_embd", self.n_embd),
            ("n_layer", self.n_layer),
            ("n_head", self.n_head),
            ("n_inner", self.inner()),
        ] {
            if value == 0 {
                return Err(format!("{name} is 0"));
            }
            // Ids and positions are u32; the bound also keeps a hostile config from overflowing sizes.
            if value > i32::MAX as usize {
                return Err(format!("{name} is {value}, above {}", i32::MAX));
            }
        }
        if !self.n_embd.is_multiple_of(self.n_head) {
            return Err(format!("n_embd {} is not a multiple of n_head {}", self.n_embd, self.n_head));
        }
        if !(self.layer_norm_epsilon > 0.0 && self.layer_norm_epsilon.is_finite()) {
            return Err(format!("layer_norm_epsilon is {}; expected a positive number", self.layer_norm_epsilon));
        }
        if !["gelu_new", "gelu_pytorch_tanh"].contains(&self.activation_function.as_str()) {
            return Err(format!("activation_function `{}`; only `gelu_new` is supported", self.activation_function));
        }
        if !self.scale_attn_weights || self.scale_attn_by_inverse_layer_idx {
            return Err("only attention scaled by 1/sqrt(head width) is supported".to_owned());
        }
        if !self.tie_word_embeddings {
            return Err("tie_word_embeddings is false; only a tied lm_head is supported".to_owned());
        }
        if let Some(eos) = self.eos_token_id
            && eos as usize >= self.vocab_size
        {
            return Err(format!("eos_token_id {eos} is not below vocab_size {}", self.vocab_size));
        }
        Ok(())
    }

    /// Reads and checks `folder/config.json`.
    pub fn load(folder: &Path) -> Result<Self> {
        let path = folder.join("config.json");
        let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
        let value: serde_json::Value =
            serde_json::from_str(&text).map_err(|e| Error::model(&path, format!("not JSON: {e}")))?;
        if !value.is_object() {
            return Err(Error::model(&path, "expected an object, such as {\"model_type\": \"gpt2\", …}"));
        }
        if let Some(kind) = value.get("model_type")
            && kind != "gpt2"
        {
            return Err(Error::model(&path, format!("model_type is {kind}; expected \"gpt2\"")));
        }
        let config: Self =
            serde_json::from_value(value).map_err(|e| Error::model(&path, format!("not a GPT-2 config: {e}")))?;
        config.check().map_err(|what| Error::model(&path, what))?;
        Ok(config)
    }

    /// Writes `folder/config.json` so that `transformers` loads it as a GPT2LMHeadModel.
    pub fn save(&self, folder: &Path, torch_dtype: &str) -> Result<()> {
        #[derive(Serialize)]
        struct File<'a> {
            architectures: [&'a str; 1],
            model_type: &'a str,
            torch_dtype: &'a str,
            #[serde(flatten)]
            config: &'a Gpt2Config,
        }
        let file = File { architectures: ["GPT2LMHeadModel"], model_type: "gpt2", torch_dtype, config: self };
        let path = folder.join("config.json");
        let mut text =
            serde_json::to_string_pretty(&file).map_err(|e| Error::model(&path, format!("cannot be written: {e}")))?;
        text.push('\n');
        fs::write(&path, text).map_err(Error::io(&path))
    }
}
