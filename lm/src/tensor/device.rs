//! The device that this process computes on, chosen once by the environment variable `TEMPER_DEVICE`.

use std::collections::BTreeSet;
use std::sync::OnceLock;

use candle_core::Device;

use crate::{Error, Result};

/// The environment variable that names the device: `cpu` (default), `portable`, `cuda`, `cuda:N` or `metal`.
pub const DEVICE_VARIABLE: &str = "TEMPER_DEVICE";

/// How this process computes.
#[derive(Clone, Debug)]
enum Backend {
    /// The fused kernels of [`crate::exec::train`], on the CPU.
    Fused,
    /// Stock candle operations of [`crate::exec::portable`], on any device.
    Portable(Device),
}

static BACKEND: OnceLock<std::result::Result<Backend, String>> = OnceLock::new();

fn backend() -> &'static std::result::Result<Backend, String> {
    BACKEND.get_or_init(|| parse(&std::env::var(DEVICE_VARIABLE).unwrap_or_default()))
}

/// Chooses the device of this process in place of the environment variable. Call it before any model is loaded.
///
/// # Errors
/// As [`check_device`]; another device has been chosen already.
pub fn use_device(name: &str) -> Result<()> {
    if BACKEND.set(parse(name)).is_err() {
        return Err(Error::input("the device of this process is already chosen".to_owned()));
    }
    check_device()
}

/// Checks a device's name without starting the device.
///
/// # Errors
/// It names no device, or one that this program was not built for.
pub fn check_device_name(name: &str) -> Result<()> {
    parts(name).map(drop).map_err(Error::input)
}

/// The name of a device in an artifact's provenance: for CUDA, the models of the machine's GPUs.
pub fn device_name(name: &str) -> String {
    if !name.starts_with("cuda") {
        return name.to_owned();
    }
    let files = std::fs::read_dir("/proc/driver/nvidia/gpus").into_iter().flatten().flatten();
    let models: BTreeSet<String> = files
        .filter_map(|gpu| std::fs::read_to_string(gpu.path().join("information")).ok())
        .filter_map(|text| Some(text.lines().find_map(|line| line.strip_prefix("Model:"))?.trim().to_owned()))
        .collect();
    if models.is_empty() { name.to_owned() } else { models.into_iter().collect::<Vec<_>>().join(", ") }
}

/// The kind and number of the device called `name`, if this program was built for it.
fn parts(name: &str) -> std::result::Result<(&str, usize), String> {
    let (kind, number) = name.split_once(':').unwrap_or((name, "0"));
    let number = number.parse().map_err(|_| format!("{name:?} has no device number after the colon"))?;
    match kind {
        "" | "cpu" | "portable" if name != kind => Err(format!("{kind:?} takes no device number")),
        "" | "cpu" | "portable" => Ok((kind, number)),
        "cuda" if !cfg!(feature = "cuda") => Err(needs_feature("cuda")),
        "metal" if !cfg!(feature = "metal") => Err(needs_feature("metal")),
        "cuda" | "metal" => Ok((kind, number)),
        _ => Err(format!("{name:?} is no device; expected cpu, portable, cuda, cuda:N or metal")),
    }
}

fn parse(name: &str) -> std::result::Result<Backend, String> {
    let (kind, number) = parts(name)?;
    match kind {
        // A stream of its own: passes move between threads, and candle's default stream is that of one thread.
        "cuda" => Device::new_cuda_with_stream(number)
            .map(Backend::Portable)
            .map_err(|e| format!("CUDA device {number} cannot be used ({e}); `nvidia-smi` lists the devices")),
        "metal" => Device::new_metal(number)
            .map(Backend::Portable)
            .map_err(|e| format!("Metal device {number} cannot be used ({e})")),
        "portable" => Ok(Backend::Portable(Device::Cpu)),
        _ => Ok(Backend::Fused),
    }
}

fn needs_feature(feature: &str) -> String {
    format!("this program was built without {feature}: build it with `cargo install --path . --features {feature}`")
}

/// Checks that the device can be used. Models check it when they are loaded or initialised.
///
/// # Errors
/// `TEMPER_DEVICE` names no device, one that this program was not built for, or one that does not start.
pub fn check_device() -> Result<()> {
    match backend() {
        Ok(_) => Ok(()),
        Err(message) => Err(Error::Device { message: message.clone() }),
    }
}

/// Where tensors live. The CPU if the device cannot be used, which [`check_device`] reports.
pub fn device() -> Device {
    match backend() {
        Ok(Backend::Portable(device)) => device.clone(),
        Ok(Backend::Fused) | Err(_) => Device::Cpu,
    }
}

/// Whether to compute by stock candle operations.
pub fn is_portable() -> bool {
    matches!(backend(), Ok(Backend::Portable(_)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn devices_are_named_as_documented_and_others_refused() {
        for (name, portable) in [("", false), ("cpu", false), ("portable", true)] {
            assert_eq!(matches!(parse(name), Ok(Backend::Portable(Device::Cpu))), portable, "{name}");
        }
        for (name, expected) in [("gpu", "expected cpu, portable, cuda"), ("cuda:x", "no device number")] {
            let message = parse(name).unwrap_err();
            assert!(message.contains(expected), "{name}: {message}");
        }
        if cfg!(not(feature = "cuda")) {
            assert!(parse("cuda:1").unwrap_err().contains("--features cuda"));
        }
    }
}
