//! The device that this process computes on, chosen once by the environment variable `TEMPER_DEVICE`.

use std::sync::OnceLock;

use candle_core::Device;

#[cfg(feature = "cuda")]
use crate::tensor::cuda;
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

/// The name of a device in an artifact's provenance: for CUDA, what results may depend on, if there is a GPU.
pub fn device_name(name: &str) -> String {
    #[cfg(feature = "cuda")]
    if let Some(description) = name.starts_with("cuda").then(cuda::describe).flatten() {
        return description;
    }
    name.to_owned()
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
        #[cfg(feature = "cuda")]
        "cuda" => {
            cuda::start(number).map(Backend::Portable).map_err(|e| device_failure(&e).unwrap_or_else(|| e.to_string()))
        }
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

/// The advice for each failure of a device, found by the names that drivers and libraries give their errors.
const FAILURES: [(&[&str], &str); 5] = [
    (
        &["OUT_OF_MEMORY", "CUBLAS_STATUS_ALLOC_FAILED", "out of memory"],
        "the device has no memory left: halve what a stage computes at once (`tokens_at_once` in training, `minibatch` in RL, `batch` \
         elsewhere), or use a device with more",
    ),
    (
        &["CUDA_ERROR_NO_DEVICE"],
        "there is no CUDA device: `nvidia-smi -L` lists the machine's, and CUDA_VISIBLE_DEVICES may hide them; without one, use \
         `--device cpu`",
    ),
    (
        &["NO_BINARY_FOR_GPU", "INVALID_PTX", "UNSUPPORTED_PTX_VERSION", "ARCH_MISMATCH"],
        "the driver cannot load this program's kernels: update it, or build the program with a CUDA toolkit that is not newer than \
         the version that `nvidia-smi` shows",
    ),
    (
        &[
            "SYSTEM_DRIVER_MISMATCH",
            "STUB_LIBRARY",
            "SYSTEM_NOT_READY",
            "COMPAT_NOT_SUPPORTED",
            "CUBLAS_STATUS_NOT_INITIALIZED",
        ],
        "the CUDA driver does not start: check that `nvidia-smi` works, and that LD_LIBRARY_PATH leads to the driver's own libcuda \
         and to the cuBLAS of the toolkit that built this program",
    ),
    (
        &["DEVICE_UNAVAILABLE", "ECC_UNCORRECTABLE", "LAUNCH_TIMEOUT"],
        "the device cannot be used now: `nvidia-smi` shows its state and the processes that hold it; run again, or choose another by \
         CUDA_VISIBLE_DEVICES",
    ),
];

/// What happened and what to do, if a tensor operation failed for the device's sake rather than through a bug in this project.
pub fn device_failure(error: &candle_core::Error) -> Option<String> {
    let text = error.to_string();
    let (names, advice) = FAILURES.iter().find(|(names, _)| names.iter().any(|name| text.contains(name)))?;
    let memory = if names[0] == "OUT_OF_MEMORY" { memory_left() } else { None };
    Some(format!("{advice} ({}{})", text.lines().next().unwrap_or_default(), memory.unwrap_or_default()))
}

/// The memory of this process's device, for a message.
fn memory_left() -> Option<String> {
    #[cfg(feature = "cuda")]
    if let Some(Ok(Backend::Portable(Device::Cuda(device)))) = BACKEND.get() {
        let (free, total) = cuda::memory(device)?;
        let gib = |bytes| bytes as f64 / f64::from(1 << 30);
        return Some(format!("; {:.2} of {:.2} GiB are free", gib(free), gib(total)));
    }
    None
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

    #[test]
    fn failures_of_a_device_are_told_with_what_to_do() {
        // As cudarc writes errors.
        for (name, advice) in [
            ("DriverError(CUDA_ERROR_OUT_OF_MEMORY, \"out of memory\")", "halve what a stage computes at once"),
            ("CublasError(CUBLAS_STATUS_ALLOC_FAILED)", "`tokens_at_once`"),
            ("DriverError(CUDA_ERROR_NO_DEVICE, \"no CUDA-capable device is detected\")", "CUDA_VISIBLE_DEVICES"),
            ("DriverError(CUDA_ERROR_UNSUPPORTED_PTX_VERSION, \"the provided PTX\")", "not newer than"),
            ("DriverError(CUDA_ERROR_SYSTEM_DRIVER_MISMATCH, \"system has\")", "LD_LIBRARY_PATH"),
            ("DriverError(CUDA_ERROR_DEVICE_UNAVAILABLE, \"busy\")", "the processes that hold it"),
        ] {
            let error = || candle_core::Error::Msg(name.to_owned()).bt();
            let message = device_failure(&error()).unwrap_or_default();
            assert!(message.contains(advice) && message.contains(name) && !message.contains('\n'), "{name}: {message}");
            assert!(matches!(Error::from(error()), Error::Device { .. }));
        }
        assert_eq!(device_failure(&candle_core::Error::Msg("shape mismatch in add".to_owned())), None);
    }
}
