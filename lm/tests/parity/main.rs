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

/// The same claims of the stock candle operations, in a process of their own.
#[test]
fn the_portable_path_passes_these_tests() {
    if std::env::var_os(lm::DEVICE_VARIABLE).is_some() {
        assert!(lm::is_portable());
        return;
    }
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    let output = command.env(lm::DEVICE_VARIABLE, "portable").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}
