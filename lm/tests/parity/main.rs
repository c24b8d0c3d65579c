//! Results equal those of transformers, PEFT and PyTorch, recorded as fixtures by `tests/fixtures/make.py`.
//!
//! Each claim is tested twice: our numbers agree with the reference's within the tolerance, and disagree within the
//! same tolerance with those of deliberately wrong implementations (mutants).

#[path = "../common/mod.rs"]
mod common;
mod fixture;
mod formats;
mod logprobs;
mod lora;
mod mutants;
mod numbers;
mod sampling;
mod tokens;
mod training;

/// The same claims of the stock candle operations, in a process of their own.
#[test]
fn the_portable_path_passes_these_tests() {
    common::run_again_on_the_portable_path();
}
