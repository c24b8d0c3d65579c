//! Results equal those of transformers, PEFT and PyTorch, recorded as fixtures by `tests/fixtures/make.py`.
//!
//! Each claim is tested twice: our numbers agree with the reference's within the tolerance, and disagree within the
//! same tolerance with those of deliberately wrong implementations (mutants).

mod fixture;
mod formats;
mod logprobs;
mod lora;
mod mutants;
mod numbers;
mod sampling;
mod tokens;
mod training;
