//! LoRA adapters in PEFT's folder layout: adapter_config.json and adapter_model.safetensors; knows no training.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::files::Checkpoint;
use crate::linear::{Linear, LowRank};
use crate::transformer::{Named, Transformer};
use crate::weights;
use crate::{Error, Result, WeightType};

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What PEFT puts in front of a model's module names.
const PREFIX: &str = "base_model.model.";

/// The names of a layer's two tensors.
fn names(linear: &Linear) -> [String; 2] {
    ["lora_A", "lora_B"].map(|part| format!("{PREFIX}{}.{part}.weight", linear.name))
}

/// The shape of a LoRA adapter: W x + alpha/r B A dropout(x).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LoraConfig {
    pub r: usize,
    pub alpha: f64,
    /// Probability of dropping an entry of the adapter's input in training.
    pub dropout: f64,
}

impl LoraConfig {
    /// alpha / r.
    pub fn scale(&self) -> f64 {
        self.alpha / self.r as f64
    }

    pub(crate) fn check(&self) -> std::result::Result<(), String> {
        if self.r == 0 {
            return Err("a LoRA adapter of rank 0".to_owned());
        }
        if !self.alpha.is_finite() {
            return Err(format!("lora alpha {}", self.alpha));
        }
        if !(0.0..1.0).contains(&self.dropout) {
            return Err(format!("lora dropout {}; expected at least 0 and below 1", self.dropout));
        }
        Ok(())
    }
}

/// `adapter_config.json`, as far as it means anything here.
#[derive(Debug, Serialize, Deserialize)]
struct PeftConfig {
    peft_type: String,
    #[serde(default)]
    task_type: Option<String>,
    #[serde(default)]
    base_model_name_or_path: Option<String>,
    r: usize,
    lora_alpha: f64,
    #[serde(default)]
    lora_dropout: f64,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    bias: Option<String>,
    target_modules: serde_json::Value,
    #[serde(default)]
    modules_to_save: Option<Vec<String>>,
    #[serde(default)]
    inference_mode: bool,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    rank_pattern: serde_json::Map<String, serde_json::Value>,
    #[serde(default)]
    alpha_pattern: serde_json::Map<String, serde_json::Value>,
}

/// Writes the model's adapter. `base` names the model it belongs to, as PEFT's `base_model_name_or_path`.
pub(crate) fn save(model: &Transformer, lora: &LoraConfig, folder: &Path, base: &str) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    // PEFT knows modules by the last part of their names.
    let targets: BTreeSet<&str> = model.linears().filter_map(|l| l.name.rsplit('.').next()).collect();
    let config = PeftConfig {
        peft_type: "LORA".to_owned(),
        task_type: Some("CAUSAL_LM".to_owned()),
        base_model_name_or_path: Some(base.to_owned()),
        r: lora.r,
        lora_alpha: lora.alpha,
        lora_dropout: lora.dropout,
        fan_in_fan_out: !model.spec.names.transposed,
        bias: Some("none".to_owned()),
        target_modules: targets.into_iter().collect(),
        modules_to_save: None,
        inference_mode: true,
        use_rslora: false,
        use_dora: false,
        rank_pattern: Default::default(),
        alpha_pattern: Default::default(),
    };
    let path = folder.join(CONFIG);
    let mut text =
        serde_json::to_string_pretty(&config).map_err(|e| Error::model(&path, format!("cannot be written: {e}")))?;
    text.push('\n');
    fs::write(&path, text).map_err(Error::io(&path))?;

    let mut tensors = Vec::new();
    for linear in model.linears() {
        if let Some(adapter) = &linear.adapter {
            for (name, tensor) in names(linear).into_iter().zip([&adapter.a, &adapter.b]) {
                tensors.push(Named { name, tensor, transposed: false });
            }
        }
    }
    weights::write(&folder.join(WEIGHTS), &tensors, WeightType::F32)
}

/// Reads an adapter and puts it, frozen, on `model`, a model without one.
pub(crate) fn load(model: Transformer, folder: &Path) -> Result<(Transformer, LoraConfig)> {
    let path = folder.join(CONFIG);
    let text = fs::read_to_string(&path).map_err(Error::io(&path))?;
    let config: PeftConfig =
        serde_json::from_str(&text).map_err(|e| Error::model(&path, format!("not a LoRA config: {e}")))?;
    let lora = config.check().map_err(|what| Error::model(&path, what))?;

    let path = folder.join(WEIGHTS);
    let file = Checkpoint::file(&path)?;
    let mut unused: BTreeSet<String> = file.names().map(str::to_owned).collect();
    let model = model.map_adapters(|linear| {
        let (rows, columns) = linear.weight.dims2()?;
        let [a, b] = names(linear);
        // An adapter need not cover every layer, but half a pair is an error.
        if !unused.contains(&a) && !unused.contains(&b) {
            return Ok(None);
        }
        let adapter = LowRank {
            a: file.get(&a, &[lora.r, rows])?,
            b: file.get(&b, &[columns, lora.r])?,
            scale: lora.scale(),
            dropout: lora.dropout,
        };
        unused.remove(&a);
        unused.remove(&b);
        Ok(Some(adapter))
    })?;
    if let Some(name) = unused.first() {
        return Err(Error::model(&path, format!("tensor `{name}` belongs to no linear layer of the base model")));
    }
    if model.linears().all(|linear| linear.adapter.is_none()) {
        return Err(Error::model(&path, "holds no LoRA tensors"));
    }
    Ok((model, lora))
}

impl PeftConfig {
    /// The adapter's shape, or what in the file is not supported.
    fn check(&self) -> std::result::Result<LoraConfig, String> {
        if self.peft_type != "LORA" {
            return Err(format!("peft_type is `{}`; expected `LORA`", self.peft_type));
        }
        for (what, on) in [
            ("use_rslora", self.use_rslora),
            ("use_dora", self.use_dora),
            ("rank_pattern", !self.rank_pattern.is_empty()),
            ("alpha_pattern", !self.alpha_pattern.is_empty()),
            ("bias", self.bias.as_deref().unwrap_or("none") != "none"),
            ("modules_to_save", self.modules_to_save.as_ref().is_some_and(|m| !m.is_empty())),
        ] {
            if on {
                return Err(format!("{what} is set; that is not supported"));
            }
        }
        let lora = LoraConfig { r: self.r, alpha: self.lora_alpha, dropout: self.lora_dropout };
        lora.check()?;
        Ok(lora)
    }
}
