//! Starting a CUDA device, and what is asked about it.

use std::collections::BTreeSet;

use candle_core::cuda::cudarc::cublas::sys::{self as cublas, libraryPropertyType_t as Part};
use candle_core::cuda::cudarc::driver::sys::CUdevice_attribute as Attribute;
use candle_core::cuda::cudarc::driver::{CudaContext, result, sys};
use candle_core::cuda::kernels;
use candle_core::{CudaDevice, DType, Device, Error, Result, Tensor};

/// Starts device `number` of those that this process sees, and runs a kernel on it.
pub fn start(number: usize) -> Result<Device> {
    let count = CudaContext::device_count().map_err(Error::wrap)?;
    if number as i64 >= i64::from(count) {
        candle_core::bail!(
            "there is no CUDA device {number}: this process sees {count} device{}, numbered from 0 to {}; \
             `nvidia-smi -L` lists the machine's, and CUDA_VISIBLE_DEVICES chooses among them",
            if count == 1 { "" } else { "s" },
            count - 1
        );
    }
    check_capability(number)?;
    // A stream of its own: passes move between threads, and candle's default stream is that of one thread.
    let device = Device::new_cuda_with_stream(number)?;
    let Device::Cuda(cuda) = &device else { return Ok(device) };
    // SAFETY: all tensors of the device are made, used and freed on its one stream.
    unsafe { cuda.disable_event_tracking() };
    keep_freed_memory(cuda)?;
    Tensor::zeros(1, DType::F32, &device)?.affine(1.0, 1.0)?.to_vec1::<f32>()?;
    Ok(device)
}

/// Errors: the kernels were compiled for devices with more capabilities.
fn check_capability(number: usize) -> Result<()> {
    let target = kernels::AFFINE.ptx().split_once(".target sm_").map_or("", |(_, rest)| rest);
    let digits: String = target.chars().take_while(char::is_ascii_digit).collect();
    let compiled: i32 = digits.parse().unwrap_or(0);
    let device = result::device::get(number as i32).map_err(Error::wrap)?;
    let found = 10 * attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?
        + attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    // Kernels with an `a` run on this one capability, others on all later ones.
    let fits = if target[digits.len()..].starts_with('a') { found == compiled } else { found >= compiled };
    if !fits {
        candle_core::bail!(
            "CUDA device {number} ({}) has compute capability {}, and this program was compiled for {}: build it again with \
             CUDA_COMPUTE_CAP={found} in the environment",
            name(device)?,
            f64::from(found) / 10.0,
            format_args!("{:.1}", f64::from(compiled) / 10.0),
        );
    }
    Ok(())
}

/// Makes the device's pool keep freed memory, which it would otherwise return to the system at every synchronisation. Only this
/// process uses the pool.
fn keep_freed_memory(cuda: &CudaDevice) -> Result<()> {
    let mut threshold = u64::MAX;
    let attribute = sys::CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    // SAFETY: the device is initialised, and the attribute's value is a u64, which outlives the call.
    unsafe {
        let pool =
            result::device::get_default_mem_pool(cuda.cuda_stream().context().cu_device()).map_err(Error::wrap)?;
        result::mem_pool::set_attribute(pool, attribute, (&raw mut threshold).cast()).map_err(Error::wrap)
    }
}

/// Free and total bytes of the device.
pub fn memory(device: &CudaDevice) -> Option<(usize, usize)> {
    device.cuda_stream().context().mem_get_info().ok()
}

/// What results may depend on: models of the GPUs that this process sees with their numbers of multiprocessors, and versions of
/// driver and cuBLAS. Starts no device.
pub fn describe() -> Option<String> {
    let devices = 0..CudaContext::device_count().ok()?;
    let described = devices.map(|number| {
        let device = result::device::get(number).map_err(Error::wrap)?;
        let multiprocessors = attribute(device, Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        Ok(format!("{} ({multiprocessors} SMs)", name(device)?))
    });
    let mut facts = described.collect::<Result<BTreeSet<String>>>().ok()?.into_iter().collect::<Vec<_>>();
    facts.extend(driver_version().map(|version| format!("driver {version}")));
    let part = |part| {
        let mut value = 0;
        // SAFETY: cuBLAS writes one integer.
        let status = unsafe { cublas::cublasGetProperty(part, &raw mut value) };
        status.result().ok().map(|()| value.to_string())
    };
    let version: Option<Vec<_>> =
        [Part::MAJOR_VERSION, Part::MINOR_VERSION, Part::PATCH_LEVEL].map(part).into_iter().collect();
    facts.extend(version.map(|parts| format!("cuBLAS {}", parts.join("."))));
    Some(facts.join(", "))
}

fn name(device: sys::CUdevice) -> Result<String> {
    result::device::get_name(device).map_err(Error::wrap)
}

fn attribute(device: sys::CUdevice, attribute: Attribute) -> Result<i32> {
    // SAFETY: the device comes from the driver.
    unsafe { result::device::get_attribute(device, attribute) }.map_err(Error::wrap)
}

/// The driver's release, such as 580.65.06.
fn driver_version() -> Option<String> {
    let text = std::fs::read_to_string("/proc/driver/nvidia/version").ok()?;
    let is_version = |word: &&str| word.contains('.') && word.chars().all(|c| c.is_ascii_digit() || c == '.');
    text.split_whitespace().find(is_version).map(str::to_owned)
}
