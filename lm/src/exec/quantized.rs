//! Models that compute with quantised weights, on the CPU: the families of candle-transformers, from GGUF files.

use std::fs::File;
use std::io::BufReader;
use std::ops::Range;
use std::path::Path;

use candle_core::quantized::GgmlDType;
use candle_core::{Device, Tensor};
use candle_transformers::models::{quantized_llama, quantized_phi3, quantized_qwen2, quantized_qwen3};

use crate::io::{QuantizedFamily, QuantizedFile, QuantizedShape};
use crate::{Error, Result};

/// Most tokens of one forward pass; a longer sequence is fed in parts, behind the keys and values of those before it. Scores
/// of attention are held whole, so that their memory grows with it.
const MAX_PART: usize = 512;
/// Bytes of an f32.
const F32: f64 = 4.0;

/// A causal language model with quantised weights: Llama, Qwen2, Qwen3 or Phi 3. It computes with the blocks of the file;
/// rows of activations are quantised to 8 bits before each product, as in llama.cpp.
///
/// candle's own threads work, as many as its environment variables said when it first used them
/// ([`set_threads`](crate::set_threads)).
pub struct QuantizedLm {
    weights: Weights,
    window: usize,
    vocabulary: usize,
}

enum Weights {
    Llama(quantized_llama::ModelWeights),
    Qwen2(quantized_qwen2::ModelWeights),
    Qwen3(quantized_qwen3::ModelWeights),
    Phi3(quantized_phi3::ModelWeights),
}

impl QuantizedLm {
    /// Reads a GGUF file.
    ///
    /// # Errors
    /// As [`QuantizedFile::open`], and if the file cannot be read.
    pub fn load(path: &Path) -> Result<Self> {
        Self::read(QuantizedFile::open(path)?)
    }

    /// Reads the weights of a file.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn read(file: QuantizedFile) -> Result<Self> {
        let QuantizedFile { path, shape, content, vocabulary } = file;
        let mut reader = BufReader::new(File::open(&path).map_err(Error::io(&path))?);
        let (file, cpu) = (&mut reader, &Device::Cpu);
        let weights = match shape.family {
            QuantizedFamily::Llama => Weights::Llama(quantized_llama::ModelWeights::from_gguf(content, file, cpu)?),
            QuantizedFamily::Qwen2 => Weights::Qwen2(quantized_qwen2::ModelWeights::from_gguf(content, file, cpu)?),
            QuantizedFamily::Qwen3 => Weights::Qwen3(quantized_qwen3::ModelWeights::from_gguf(content, file, cpu)?),
            QuantizedFamily::Phi3 => Weights::Phi3(quantized_phi3::ModelWeights::from_gguf(false, content, file, cpu)?),
        };
        Ok(Self { weights, window: shape.window, vocabulary })
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
        // At position 0, the others forget the keys and values of earlier calls by themselves.
        if let Weights::Qwen3(model) = &mut self.weights {
            model.clear_kv_cache();
        }
        let mut logits = Vec::new();
        for part in parts(ids.len()) {
            let (at, input) = (part.start, Tensor::new(&ids[part], &Device::Cpu)?.unsqueeze(0)?);
            let found = match &mut self.weights {
                Weights::Llama(model) => model.forward(&input, at)?,
                Weights::Qwen2(model) => model.forward(&input, at)?,
                Weights::Qwen3(model) => model.forward(&input, at)?,
                Weights::Phi3(model) => model.forward(&input, at)?,
            };
            logits = found.flatten_all()?.to_vec1::<f32>()?;
        }
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sum: f64 = logits.iter().map(|logit| f64::from(logit - max).exp()).sum();
        let log_sum = f64::from(max) + sum.ln();
        Ok(logits.into_iter().map(|logit| (f64::from(logit) - log_sum) as f32).collect())
    }
}

/// The parts in which a sequence is fed: each the largest power of two that remains, at most [`MAX_PART`].
///
/// candle's Llama, Qwen2 and Phi 3 keep every causal mask that they have made, by the lengths of the part and of the
/// sequence up to its end. Sequences of all lengths have few such masks in common.
fn parts(tokens: usize) -> impl Iterator<Item = Range<usize>> {
    let mut start = 0;
    std::iter::from_fn(move || {
        let part = (tokens - start).min(MAX_PART).checked_ilog2().map(|log| start..start + (1 << log))?;
        start = part.end;
        Some(part)
    })
}

/// Bytes of the masks of all sequences of 4,096 tokens or fewer.
const MASKS: f64 = 48e6;

impl QuantizedFile {
    /// The most bytes that the model takes, with a sequence as long as its window.
    pub fn memory(&self) -> f64 {
        let QuantizedShape { family, width, inner, layers, heads, kv_heads, head_dim, window, .. } = self.shape;
        let [width, inner, layers, window] = [width, inner, layers, window].map(|count| count as f64);
        let [queries, keys] = [heads * head_dim, kv_heads * head_dim].map(|columns| columns as f64);
        let weights = self.content.tensor_infos.values().map(|tensor| {
            let (numbers, kind) = (tensor.shape.elem_count() as f64, tensor.ggml_dtype);
            let stored = numbers * kind.type_size() as f64 / kind.block_size() as f64;
            match kind {
                GgmlDType::F32 | GgmlDType::F16 | GgmlDType::BF16 => F32 * numbers,
                // candle expands these to bytes with scales for its fast products, and keeps both.
                GgmlDType::Q4K | GgmlDType::Q6K | GgmlDType::Q8_0 => stored + 1.125 * numbers,
                _ => stored,
            }
        });
        let embeddings = F32 * self.vocabulary as f64 * width;
        // Qwen 3 holds keys and values in two orders, and no scores.
        let (caches, scores) = match family {
            QuantizedFamily::Qwen3 => (2.0, 0.0),
            // Scaled, masked, and their softmax.
            _ => (1.0, 3.0 * heads as f64 * window),
        };
        let cache = F32 * caches * 2.0 * layers * keys * window;
        let rotary = F32 * head_dim as f64 * window;
        // Of a part, in one layer; then keys and values of all tokens, repeated for each head.
        let part = F32 * (MAX_PART as f64).min(window) * (scores + 4.0 * width + 3.0 * inner + 2.0 * queries);
        let pass = part + F32 * 2.0 * window * queries + F32 * 3.0 * self.vocabulary as f64;
        weights.sum::<f64>() + embeddings + cache + rotary + pass + MASKS
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn sequences_of_all_lengths_need_few_masks() {
        let mut masks = BTreeSet::new();
        for tokens in 1..=4096 {
            let parts: Vec<_> = parts(tokens).collect();
            assert!(parts.iter().all(|part| part.len() <= MAX_PART) && parts.len() <= 17);
            assert_eq!(parts.iter().flat_map(Clone::clone).collect::<Vec<_>>(), (0..tokens).collect::<Vec<_>>());
            // A part of one token has no mask.
            masks.extend(parts.into_iter().filter(|part| part.len() > 1).map(|part| (part.len(), part.end)));
        }
        let bytes: usize = masks.iter().map(|(rows, columns)| rows * columns).sum();
        assert!(masks.len() < 2500 && bytes as f64 <= MASKS, "{} masks of {bytes} bytes", masks.len());
    }
}
