//! Language models on candle for the CPU, in f32 or with large matrix products in bf16: GPT-2, GPT-J, Llama, LoRA
//! adapters, scalar heads, sampling, tokenizers, optimisers.
//!
//! Shapes are written `[batch, time, d]`. A `Batch` is right-padded; flat arrays of response tokens are
//! `[response_tokens]`, in row order. No result depends on the number of threads.

mod adapter;
mod batch;
mod config;
mod decode;
mod draws;
mod eos;
mod error;
pub mod files;
mod head;
pub mod kernels;
mod linear;
mod model;
pub mod optim;
mod philox;
mod pick;
mod precision;
mod random;
mod sample;
mod spec;
mod stats;
mod threads;
mod tokenizer;
mod transformer;
mod variable;
mod weights;

pub use adapter::LoraConfig;
pub use batch::{Batch, Sequence};
pub use config::{Gpt2Config, GptJConfig, InitStd, LlamaConfig, ModelConfig};
pub use draws::Draws;
pub use eos::Eos;
pub use error::{Error, Result};
pub use head::{Pool, RewardModel, ScalarHead};
pub use kernels::backward;
pub use kernels::simd::{Isa, isa, multiplies_bf16};
pub use linear::Dropout;
pub use model::{CausalLm, LmLoss};
pub use optim::{AdamW, AdamWConfig, Schedule, Shape, StepNorms};
pub use precision::Precision;
pub use sample::{SampleOptions, Sampled, sample};
pub use stats::{StatOptions, TokenStats};
pub use threads::set_threads;
pub use tokenizer::Tokenizer;
pub use variable::Variable;
pub use weights::WeightType;

/// Raised whenever the same weights, data and seeds give different numbers than before; part of the cache key of every
/// stage that trains or samples.
pub const NUMERICS: u32 = 5;
