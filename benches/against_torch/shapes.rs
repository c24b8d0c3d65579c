//! `shapes.json`: the models and batches that both sides compute.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

/// The whole file.
#[derive(Debug, Deserialize)]
pub struct Shapes {
    pub lora: Lora,
    pub optimiser: Optimiser,
    pub ppo: Ppo,
    pub shapes: BTreeMap<String, Shape>,
}

#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Lora {
    pub r: usize,
    pub alpha: f64,
}

#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Optimiser {
    pub lr: f64,
    pub weight_decay: f64,
    /// The largest gradient norm.
    pub clip: f64,
}

#[derive(Clone, Copy, Debug, Deserialize)]
pub struct Ppo {
    pub clip: f64,
    pub value_clip: f64,
    pub value_coefficient: f64,
    pub gae_lambda: f64,
    /// KL coefficient.
    pub kl: f64,
}

/// A GPT-2 and its batches.
#[derive(Clone, Debug, Deserialize)]
pub struct Shape {
    /// The model under `assets/` whose weights and tokenizer are used. Absent: random weights and random prompts.
    pub asset: Option<String>,
    pub layers: usize,
    pub d: usize,
    pub heads: usize,
    pub vocab: usize,
    pub positions: usize,
    /// Tokens per prompt; with an asset, the mean.
    pub prompt: usize,
    /// If `min_new` and `max_new` are equal, every response has that many tokens: EOS is masked before.
    pub min_new: usize,
    pub max_new: usize,
    pub train_batch: usize,
    /// Number of training steps timed together.
    pub steps: usize,
    pub decode_batch: usize,
    pub rollouts: usize,
    pub epochs: usize,
    pub minibatch: usize,
}

impl Shapes {
    /// Reads the file.
    pub fn read(path: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(path).map_err(|e| format!("{}: {e}", path.display()))?;
        serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))
    }

    pub fn get(&self, name: &str) -> Result<&Shape, String> {
        let known = || self.shapes.keys().cloned().collect::<Vec<_>>().join(", ");
        self.shapes.get(name).ok_or_else(|| format!("no shape `{name}` in shapes.json, only {}", known()))
    }
}
