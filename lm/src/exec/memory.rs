//! The memory that a model and its passes take, from its config alone: for plans made before there are weights. Bytes, and
//! upper bounds where data decides: every sequence is taken to be as long as it may be.

use temper_gemm::Threads;

use super::decode::sample::SamplingPlan;
use super::train::token_stats::MAX_LOGITS;
use crate::model::architecture::{Architecture, LmHeadKind};
use crate::model::families::ModelConfig;

/// Bytes of an f32.
const F32: f64 = 4.0;

/// What an optimiser trains.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trainable {
    All,
    /// A LoRA adapter of this rank on every linear layer.
    Adapter(usize),
}

/// The memory of a model on the CPU, with fused operations.
#[derive(Debug, Clone)]
pub struct MemoryEstimate(Architecture);

impl MemoryEstimate {
    /// # Errors
    /// The reason why no model can have this config.
    pub fn new(config: &ModelConfig) -> Result<Self, String> {
        config.architecture().map(Self)
    }

    /// The longest sequence, in tokens.
    pub fn window(&self) -> usize {
        self.0.window
    }

    /// The weights, without biases and norms, which are small.
    pub fn weights(&self) -> f64 {
        let Architecture { vocab, window, d, positions, lm_head, .. } = &self.0;
        let tables = vocab + if positions.is_some() { *window } else { 0 };
        let lm_head = if *lm_head == LmHeadKind::Tied { 0 } else { *vocab };
        F32 * (tables + lm_head) as f64 * *d as f64 + self.linear_copies()
    }

    /// The linear layers once more, as a merged adapter or packed for decoding.
    pub fn linear_copies(&self) -> f64 {
        let weights = self.0.block.linears().map(|linear| linear.d_in as f64 * linear.d_out as f64);
        F32 * self.0.layers as f64 * weights.sum::<f64>()
    }

    /// What training adds to the frozen weights between passes: the adapter, and AdamW's two moments.
    pub fn optimiser(&self, trainable: Trainable) -> f64 {
        match trainable {
            Trainable::All => 2.0 * self.weights(),
            Trainable::Adapter(rank) => {
                let widths: usize = self.0.block.linears().map(|linear| linear.d_in + linear.d_out).sum();
                3.0 * F32 * rank as f64 * self.0.layers as f64 * widths as f64
            }
        }
    }

    /// Forward and backward pass over `tokens` tokens. Gradients take the place of the activations that they are computed
    /// from, so that the larger of the two counts.
    pub fn training_pass(&self, tokens: usize, trainable: Trainable) -> f64 {
        let Architecture { block, d, layers, .. } = &self.0;
        let [qkv, out, up, down] = block.groups().map(|group| group.iter().map(|linear| linear.d_out).sum::<usize>());
        let heads = block.attention.heads;
        let norm_input = if block.norm_2.is_some() { *d } else { 0 };
        let qk = if block.attention.qk_norm.is_some() { heads.columns(heads.query + heads.key_value) } else { 0 };
        // As `SavedActivations` of the block lists them, and the block's output.
        let saved = qkv + qk + heads.query + heads.columns(heads.query) + norm_input + up + d;
        let gradients = 2 * d;
        let inner = block.mlp.down.d_in;
        // Inputs and output gradients of one block's linear layers, from which the gradients of its weights are computed.
        let weight_gradients = match trainable {
            Trainable::All => (d + qkv) + (heads.columns(heads.query) + out) + (d + up) + (inner + down),
            Trainable::Adapter(_) => 0,
        };
        let per_token = *layers as f64 * saved as f64 + (gradients + weight_gradients) as f64;
        let pass = F32 * tokens as f64 * per_token + self.logits();
        if trainable == Trainable::All { pass.max(self.weights()) } else { pass }
    }

    /// Forward pass without gradients over `tokens` tokens.
    pub fn scoring_pass(&self, tokens: usize) -> f64 {
        F32 * 2.0 * tokens as f64 * self.0.d as f64 + self.logits()
    }

    /// Sampling of `sequences` of at most `positions` tokens: keys and values, and packed weights.
    pub fn sampling(&self, sequences: usize, positions: usize) -> f64 {
        if sequences == 0 {
            return 0.0;
        }
        let plan = SamplingPlan::new(&self.0, sequences, positions);
        let groups = if plan.threads == Threads::One { rayon::current_num_threads() } else { 1 };
        let sequences = sequences.min(groups * plan.rows);
        let lm_head = F32 * self.0.vocab as f64 * self.0.d as f64;
        sequences as f64 * self.0.cache_bytes(positions) as f64 + self.linear_copies() + lm_head
    }

    /// A chunk of logits.
    fn logits(&self) -> f64 {
        F32 * (MAX_LOGITS as f64).max(64.0 * self.0.vocab as f64)
    }
}

#[cfg(test)]
mod tests {
    use rand_chacha::ChaCha12Rng;
    use rand_chacha::rand_core::SeedableRng;

    use super::*;
    use crate::{CausalLm, Gpt2Config, GptJConfig, InitStd, LlamaConfig, Qwen3Config};

    fn config<T: serde::de::DeserializeOwned>(json: serde_json::Value) -> T {
        serde_json::from_value(json).unwrap()
    }

    #[test]
    fn weights_are_those_of_a_model_of_any_family() {
        let llama = serde_json::json!({
            "vocab_size": 300, "max_position_embeddings": 64, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
            "head_dim": 16, "hidden_act": "silu", "tie_word_embeddings": false, "rope_theta": 1e4,
        });
        let gptj = serde_json::json!({
            "vocab_size": 300, "n_positions": 64, "n_embd": 64, "n_layer": 3, "n_head": 4, "rotary_dim": 8,
        });
        let configs: [ModelConfig; 4] = [
            Gpt2Config::new(300, 64, 64, 3, 4).into(),
            config::<GptJConfig>(gptj).into(),
            config::<LlamaConfig>(llama.clone()).into(),
            config::<Qwen3Config>(llama).into(),
        ];
        for config in configs {
            let estimate = MemoryEstimate::new(&config).unwrap().weights();
            let model = CausalLm::init(config, InitStd::Fixed(0.02), &mut ChaCha12Rng::seed_from_u64(1)).unwrap();
            let weights: usize = model.weights().map(|(_, weight)| 4 * weight.elem_count()).sum();
            assert!(
                (estimate / weights as f64 - 1.0).abs() < 0.02,
                "{}: {estimate}, {weights}",
                model.config().model_type()
            );
        }
    }

    #[test]
    fn memory_grows_with_what_is_trained_and_with_tokens_but_not_with_sequences_that_wait() {
        let estimate = MemoryEstimate::new(&Gpt2Config::new(300, 1024, 768, 12, 12).into()).unwrap();
        let pass = |tokens, trainable| estimate.training_pass(tokens, trainable);
        assert!(pass(64, Trainable::All) == estimate.weights(), "gradients are larger than few activations");
        let [one, two] = [4096, 8192].map(|tokens| pass(tokens, Trainable::Adapter(8)));
        assert!(two > 1.9 * one && one > estimate.scoring_pass(4096));
        assert!(
            pass(4096, Trainable::All) > one
                && estimate.optimiser(Trainable::All) > estimate.optimiser(Trainable::Adapter(8))
        );
        assert_eq!(estimate.sampling(64, 1024), estimate.sampling(640, 1024));
        assert_eq!(estimate.sampling(0, 1024), 0.0);
    }
}
