//! That the numbers are those of transformers, PEFT and PyTorch: fixtures which `tests/fixtures/make.py` made with them.
//!
//! Each claim is held twice: our numbers agree with the reference's within the tolerance, and they do not agree within the
//! same tolerance with those of implementations that are wrong on purpose.

mod fixture;
mod formats;
mod logprobs;
mod lora;
mod mutants;
mod numbers;
mod sampling;
mod tokens;
mod training;
