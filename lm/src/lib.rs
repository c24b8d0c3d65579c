//! Language models on candle, in f32 or with large matrix products in bf16: GPT-2, GPT-J, Llama, Qwen3, LoRA adapters,
//! scalar heads, sampling, tokenizers, optimisers.
//!
//! Shapes are written `[batch, time, d]`. A `Batch` is right-padded; flat arrays of response tokens are
//! `[response_tokens]`, in row order. No result depends on the number of threads.
//!
//! Models compute on the CPU by fused operations, or on any device by stock candle operations ([`use_device`]).

mod batch;
mod eos;
mod error;
mod exec;
pub mod io;
mod markup;
mod model;
mod optim;
mod tensor;
mod token_stats;
mod tokenizer;
mod variable;

pub use batch::{Batch, Sequence};
pub use eos::Eos;
pub use error::{Error, Result};
pub use exec::decode::sample::{SampledResponse, sample};
pub use exec::decode::token_sampler::SampleOptions;
pub use exec::memory::{MemoryEstimate, Trainable};
pub use exec::quantized::QuantizedLm;
pub use exec::train::{TokenStats, backward};
pub use io::QuantizedFile;
pub use io::weights::WeightType;
pub use markup::{MarkupTokenizer, TextPiece};
pub use model::adapter::LoraConfig;
pub use model::causal_lm::{CausalLm, LmLoss};
pub use model::families::{Gpt2Config, GptJConfig, InitStd, LlamaConfig, ModelConfig, Qwen3Config};
pub use model::head::{RewardModel, RewardPooling, ScalarHead};
pub use model::linear::Dropout;
pub use optim::{AdamW, AdamWConfig, LrDecay, LrSchedule, StepNorms};
pub use temper_gemm::Precision;
pub use temper_gemm::simd::{Isa, has_avx512_bf16, isa};
pub use tensor::counter_rng::CounterRng;
pub use tensor::device::{
    DEVICE_VARIABLE, check_device, check_device_name, device, device_failure, device_name, is_portable, use_device,
};
pub use tensor::threads::{follow_threads, set_threads};
pub use token_stats::StatOptions;
pub use tokenizer::Tokenizer;
pub use variable::Variable;

/// For the benchmarks of the kernels; no part of the library's interface.
#[doc(hidden)]
pub mod internals {
    pub use crate::exec::train::{BlockPass, LmHead, TargetTokens};
    pub use crate::model::adapter::LoraAdapter;
    pub use crate::model::block::{Activation, Attention, Block, Heads, Mlp, Norm};
    pub use crate::model::linear::Linear;
    pub mod kernels {
        pub use crate::exec::train::{backward, embedding, norm, token_stats, transformer_block};
    }
    pub mod portable {
        pub use crate::exec::portable::{embedding, norm, run_block, token_stats};
    }
}

/// Raised whenever the same weights, data and seeds give different numbers than before; part of the cache key of every
/// stage that trains or samples.
pub const NUMERICS: u32 = 5;
