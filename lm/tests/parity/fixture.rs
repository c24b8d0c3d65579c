//! The fixtures of one family, and our results that are compared with them.

use std::path::{Path, PathBuf};

use lm::{Batch, CausalLm, Sequence, StatOptions};

use crate::mutants::{FAMILIES, SHARED};
use crate::numbers::{Numbers, floats};

/// A model folder with its inputs and the references' results.
pub struct Fixture {
    pub family: &'static str,
    pub folder: PathBuf,
    /// Sequences of unequal lengths.
    pub rows: Vec<Vec<u32>>,
    pub eos: u32,
    /// A prompt after which EOS is likely.
    pub prompt: Vec<u32>,
    /// Sampling settings: temperature, top-p, whether EOS is masked.
    pub sampling: Vec<(f64, f64, bool)>,
    /// The references' results.
    pub numbers: Numbers,
}

impl Fixture {
    /// The fixtures of all families.
    pub fn all() -> impl Iterator<Item = Self> {
        FAMILIES.iter().map(|&(family, [logprobs, gradient])| {
            let mutants = [&[("logprobs", logprobs), ("gradient", gradient)], SHARED].concat();
            let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(family);
            let inputs = std::fs::read(folder.join("inputs.json")).unwrap();
            let inputs: serde_json::Value = serde_json::from_slice(&inputs).unwrap();
            Self {
                family,
                rows: serde_json::from_value(inputs["rows"].clone()).unwrap(),
                eos: serde_json::from_value(inputs["eos"].clone()).unwrap(),
                prompt: serde_json::from_value(inputs["prompt"].clone()).unwrap(),
                sampling: serde_json::from_value(inputs["sampling"].clone()).unwrap(),
                numbers: Numbers::load(&folder.join("expected.safetensors"), &mutants),
                folder,
            }
        })
    }

    /// The model, frozen.
    pub fn model(&self) -> CausalLm {
        CausalLm::load(&self.folder).unwrap()
    }

    /// The model with PEFT's adapter, frozen.
    pub fn adapted(&self) -> CausalLm {
        self.model().load_adapter(&self.folder.join("adapter")).unwrap()
    }
}

/// The rows as a batch in which every token from the second on is predicted.
pub fn batch(rows: &[Vec<u32>]) -> Batch {
    let rows: Vec<Sequence> = rows.iter().map(|row| Sequence::new([row[0]], &row[1..])).collect();
    Batch::new(&rows.iter().collect::<Vec<_>>()).unwrap()
}

/// log p of every token from the second on, row after row.
pub fn logprobs(lm: &CausalLm, rows: &[Vec<u32>]) -> Vec<f64> {
    let batch = batch(rows);
    let options = StatOptions { min_new_tokens: 0, eos: 0.into(), entropy: false };
    floats(&lm.token_stats(&lm.hidden_for_responses(&batch, None).unwrap(), &batch, &options).unwrap().logprob)
}
