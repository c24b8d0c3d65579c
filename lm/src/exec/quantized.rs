//! Models that compute with quantised weights, on the CPU: the families of candle-transformers, from GGUF files.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use candle_core::{Device, Tensor};
use candle_transformers::models::{
    quantized_gemma3, quantized_llama, quantized_phi3, quantized_qwen2, quantized_qwen3,
};

use crate::io::{QuantizedFamily, QuantizedFile};
use crate::{Error, Result};

/// A causal language model with quantised weights: Llama, Qwen2, Qwen3, Gemma 3 or Phi 3. It computes with the blocks of
/// the file; rows of activations are quantised to 8 bits before each product, as in llama.cpp.
///
/// candle's own threads work, as many as its environment variables said when it first used them
/// ([`set_threads`](crate::set_threads)).
pub struct QuantizedLm {
    weights: Weights,
    family: QuantizedFamily,
    window: usize,
    vocabulary: usize,
}

enum Weights {
    Llama(quantized_llama::ModelWeights),
    Qwen2(quantized_qwen2::ModelWeights),
    Qwen3(quantized_qwen3::ModelWeights),
    Gemma3(quantized_gemma3::ModelWeights),
    Phi3(quantized_phi3::ModelWeights),
}

impl QuantizedLm {
    /// Checks the header of a GGUF file: whether [`QuantizedLm::load`] would take it.
    ///
    /// # Errors
    /// As [`QuantizedLm::load`].
    pub fn check(path: &Path) -> Result<()> {
        QuantizedFile::open(path).map(drop)
    }

    /// Reads a GGUF file. Everything that candle-transformers takes from it is checked before.
    ///
    /// # Errors
    /// Not a GGUF, another family, or contents that candle-transformers would not run as the model's authors do: a
    /// mixture of experts, scaled rotary positions, a tensor more or less.
    pub fn load(path: &Path) -> Result<Self> {
        let QuantizedFile { family, content, window, vocabulary } = QuantizedFile::open(path)?;
        let mut reader = BufReader::new(File::open(path).map_err(Error::io(path))?);
        let (file, cpu) = (&mut reader, &Device::Cpu);
        let weights = match family {
            QuantizedFamily::Llama => Weights::Llama(quantized_llama::ModelWeights::from_gguf(content, file, cpu)?),
            QuantizedFamily::Qwen2 => Weights::Qwen2(quantized_qwen2::ModelWeights::from_gguf(content, file, cpu)?),
            QuantizedFamily::Qwen3 => Weights::Qwen3(quantized_qwen3::ModelWeights::from_gguf(content, file, cpu)?),
            QuantizedFamily::Gemma3 => Weights::Gemma3(quantized_gemma3::ModelWeights::from_gguf(content, file, cpu)?),
            QuantizedFamily::Phi3 => Weights::Phi3(quantized_phi3::ModelWeights::from_gguf(false, content, file, cpu)?),
        };
        Ok(Self { weights, family, window, vocabulary })
    }

    /// The family as the file names it: `llama`, `qwen2`, `qwen3`, `gemma3` or `phi3`.
    pub fn family(&self) -> &'static str {
        self.family.name()
    }

    /// Longest sequence, in tokens: the model's, and at most 4,096.
    pub fn window(&self) -> usize {
        self.window
    }

    /// Number of tokens that the model has embeddings of.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary
    }

    /// The log-probability of each token after `ids`, in nats, `[vocabulary]`.
    ///
    /// # Errors
    /// `ids` is empty, longer than the window, or has an id above the vocabulary.
    pub fn next_logprobs(&mut self, ids: &[u32]) -> Result<Vec<f32>> {
        if ids.is_empty() || ids.len() > self.window {
            return Err(Error::input(format!("{} tokens, expected 1 to {}", ids.len(), self.window)));
        }
        if let Some(id) = ids.iter().find(|id| **id as usize >= self.vocabulary) {
            return Err(Error::input(format!("id {id} is above the vocabulary of {}", self.vocabulary)));
        }
        let input = Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?;
        // At position 0, all but Qwen 3 forget the keys and values of earlier calls by themselves.
        let logits = match &mut self.weights {
            Weights::Llama(model) => model.forward(&input, 0)?,
            Weights::Qwen2(model) => model.forward(&input, 0)?,
            Weights::Qwen3(model) => {
                model.clear_kv_cache();
                model.forward(&input, 0)?
            }
            Weights::Gemma3(model) => model.forward(&input, 0)?,
            Weights::Phi3(model) => model.forward(&input, 0)?,
        };
        let logits = logits.flatten_all()?.to_vec1::<f32>()?;
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
        let log_sum = f64::from(max) + sum.ln();
        Ok(logits.into_iter().map(|logit| (f64::from(logit) - log_sum) as f32).collect())
    }
}
