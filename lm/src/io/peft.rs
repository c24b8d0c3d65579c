//! Reads and writes LoRA adapters in PEFT's folder layout: adapter_config.json and adapter_model.safetensors or
//! adapter_model.bin.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::io::weights;
use crate::io::{self, Checkpoint};
use crate::model::adapter::{LoraAdapter, LoraConfig};
use crate::model::linear::Linear;
use crate::model::transformer::{NamedTensor, Transformer};
use crate::{Error, Result, WeightType};

const CONFIG_FILE: &str = "adapter_config.json";
const WEIGHTS_FILE: &str = "adapter_model.safetensors";
/// Older PEFT versions write this file; PEFT reads it if there is no safetensors file.
const PICKLE_FILE: &str = "adapter_model.bin";
/// Size limit for a config file, in bytes.
const MAX_CONFIG_BYTES: u64 = 4 << 20;
/// Config keys that may be set: they say where an adapter applies, which tensor names say too, or how it was made. Any
/// other key that is set changes the computation, so it is refused.
const HARMLESS_KEYS: [&str; 10] = [
    "auto_mapping",
    "exclude_modules",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
];
/// Values of `init_lora_weights` that leave the base model's weights unchanged, as `true` and `false` do. With any
/// other, the adapter belongs to changed weights.
const HARMLESS_INITS: [&str; 2] = ["gaussian", "orthogonal"];
/// PEFT's prefix of module names.
const PREFIX: &str = "base_model.model.";

/// The file's names of a layer's A and B.
fn tensor_names(linear: &Linear) -> [String; 2] {
    ["lora_A", "lora_B"].map(|part| format!("{PREFIX}{}.{part}.weight", linear.name))
}

/// The fields of `adapter_config.json` that matter here; `other_keys` holds the rest.
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    init_lora_weights: Option<serde_json::Value>,
    #[serde(flatten)]
    other_keys: serde_json::Map<String, serde_json::Value>,
}

/// Writes the model's adapter. `base` names the model it belongs to, for PEFT's `base_model_name_or_path`.
pub(crate) fn save(model: &Transformer, lora: &LoraConfig, folder: &Path, base: &str) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    // PEFT identifies modules by the last part of their names.
    let targets: BTreeSet<&str> = model.linears().filter_map(|l| l.name.rsplit('.').next()).collect();
    let config = PeftConfig {
        peft_type: "LORA".to_owned(),
        task_type: Some("CAUSAL_LM".to_owned()),
        base_model_name_or_path: Some(base.to_owned()),
        r: lora.r,
        lora_alpha: lora.alpha,
        lora_dropout: lora.dropout,
        fan_in_fan_out: !model.architecture.transposed,
        bias: Some("none".to_owned()),
        target_modules: targets.into_iter().collect(),
        modules_to_save: None,
        inference_mode: true,
        use_rslora: false,
        use_dora: false,
        rank_pattern: Default::default(),
        alpha_pattern: Default::default(),
        init_lora_weights: None,
        other_keys: Default::default(),
    };
    let path = folder.join(CONFIG_FILE);
    let mut text =
        serde_json::to_string_pretty(&config).map_err(|e| Error::model(&path, format!("cannot be written: {e}")))?;
    text.push('\n');
    fs::write(&path, text).map_err(Error::io(&path))?;

    let mut tensors = Vec::new();
    for linear in model.linears() {
        if let Some(adapter) = &linear.adapter {
            for (name, tensor) in tensor_names(linear).into_iter().zip([&adapter.a, &adapter.b]) {
                tensors.push(NamedTensor { name, tensor, transposed: false });
            }
        }
    }
    weights::write(&folder.join(WEIGHTS_FILE), &tensors, WeightType::F32)
}

/// Reads an adapter onto `model`, in place of its own; all frozen.
pub(crate) fn load(model: &Transformer, folder: &Path) -> Result<(Transformer, LoraConfig)> {
    let path = folder.join(CONFIG_FILE);
    let bytes = io::read_small(&path, MAX_CONFIG_BYTES)?;
    let config: PeftConfig =
        serde_json::from_slice(&bytes).map_err(|e| Error::model(&path, format!("not a LoRA config: {e}")))?;
    let lora = config.check().map_err(|message| Error::model(&path, message))?;

    let exists = |name: &&str| folder.join(name).is_file();
    let name = [WEIGHTS_FILE, PICKLE_FILE].into_iter().find(exists);
    let name =
        name.ok_or_else(|| Error::model(folder, format!("has no adapter: neither {WEIGHTS_FILE} nor {PICKLE_FILE}")))?;
    let path = folder.join(name);
    let file = Checkpoint::file(&path)?;
    let mut unused: BTreeSet<String> = file.names().map(str::to_owned).collect();
    let model = model.frozen_with(&mut unused, |unused, linear| {
        let (rows, columns) = linear.weight.dims2()?;
        let [a, b] = tensor_names(&linear);
        // An adapter need not cover every layer, but A without B or B without A is an error.
        let adapter = match unused.contains(&a) || unused.contains(&b) {
            false => None,
            true => Some(LoraAdapter {
                a: file.get(&a, &[lora.r, rows])?,
                b: file.get(&b, &[columns, lora.r])?,
                scale: lora.scale(),
                dropout: lora.dropout,
            }),
        };
        unused.remove(&a);
        unused.remove(&b);
        Ok(Linear { adapter, ..linear.frozen() })
    })?;
    if let Some(name) = unused.first() {
        return Err(Error::model(
            &path,
            format!("tensor `{name}` does not belong to a linear layer of the base model"),
        ));
    }
    if model.linears().all(|linear| linear.adapter.is_none()) {
        return Err(Error::model(&path, "has no LoRA tensors"));
    }
    Ok((model, lora))
}

impl PeftConfig {
    /// The adapter's configuration. Errors: an unsupported setting.
    fn check(&self) -> std::result::Result<LoraConfig, String> {
        if self.peft_type != "LORA" {
            return Err(format!("peft_type is `{}`, expected `LORA`", self.peft_type));
        }
        for (key, is_set) in [
            ("use_dora", self.use_dora),
            ("rank_pattern", !self.rank_pattern.is_empty()),
            ("alpha_pattern", !self.alpha_pattern.is_empty()),
            ("bias", self.bias.as_deref().unwrap_or("none") != "none"),
            ("modules_to_save", self.modules_to_save.as_ref().is_some_and(|m| !m.is_empty())),
        ] {
            if is_set {
                return Err(format!("{key} is set, which is not supported"));
            }
        }
        match &self.init_lora_weights {
            Some(serde_json::Value::String(init)) if !HARMLESS_INITS.contains(&init.as_str()) => {
                return Err(format!(
                    "init_lora_weights is `{}`, which changes the base model; save the adapter converted to plain LoRA",
                    init.escape_debug()
                ));
            }
            _ => (),
        }
        let is_set = |value: &serde_json::Value| match value {
            serde_json::Value::Null | serde_json::Value::Bool(false) => false,
            serde_json::Value::Array(items) => !items.is_empty(),
            serde_json::Value::Object(entries) => !entries.is_empty(),
            _ => true,
        };
        if let Some((key, _)) =
            self.other_keys.iter().find(|(key, value)| !HARMLESS_KEYS.contains(&key.as_str()) && is_set(value))
        {
            return Err(format!("{} is set, which is not supported", key.escape_debug()));
        }
        // Rank-stabilised LoRA (Kalajdzievski 2023) scales by alpha / sqrt(r): plain LoRA with a greater alpha.
        let alpha = if self.use_rslora { self.lora_alpha * (self.r as f64).sqrt() } else { self.lora_alpha };
        let lora = LoraConfig { r: self.r, alpha, dropout: self.lora_dropout };
        lora.check()?;
        Ok(lora)
    }
}
