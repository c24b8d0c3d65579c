//! Conversions between candle's tensors and slices: read access, new tensors, shape errors.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, D, Device, Layout, Result, Shape, Storage, StorageRef, Tensor, bail};

/// Read access to a contiguous f32 tensor on the CPU.
pub struct CpuSlice<'a> {
    guard: StorageRef<'a>,
    range: (usize, usize),
}

impl<'a> CpuSlice<'a> {
    pub fn new(tensor: &'a Tensor) -> Result<CpuSlice<'a>> {
        let (guard, layout) = tensor.storage_and_layout();
        let Some(range) = layout.contiguous_offsets() else {
            bail!("a kernel needs a contiguous tensor, got strides {:?}", layout.stride())
        };
        match &*guard {
            Storage::Cpu(CpuStorage::F32(_)) => Ok(CpuSlice { guard, range }),
            _ => bail!("a kernel needs an f32 tensor on the CPU, got {:?} on {:?}", tensor.dtype(), tensor.device()),
        }
    }
}

impl std::ops::Deref for CpuSlice<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.guard {
            Storage::Cpu(CpuStorage::F32(v)) => &v[self.range.0..self.range.1],
            _ => unreachable!("checked by CpuSlice::new"),
        }
    }
}

/// Data saved by a forward pass for at most one backward pass. Taking it out frees its memory while gradients are
/// computed.
pub struct SavedForBackward<T>(Mutex<Option<T>>);

impl<T> Default for SavedForBackward<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T> SavedForBackward<T> {
    pub fn save(&self, value: T) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(value);
    }

    pub fn take(&self) -> Option<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The elements of a contiguous operand of a custom op.
pub fn contiguous_slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else {
        bail!("a kernel needs a contiguous operand, got strides {:?}", layout.stride())
    };
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// A custom op's result.
pub fn op_output(data: Vec<f32>, shape: impl Into<Shape>) -> Result<(CpuStorage, Shape)> {
    Ok((CpuStorage::F32(data), shape.into()))
}

/// A gradient with the shape of the tensor it belongs to.
pub fn grad_tensor(data: Vec<f32>, of: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(data, of.shape(), &Device::Cpu)
}

/// `[.., d]` as (rows, d).
pub fn rows_and_width(x: &Tensor) -> Result<(usize, usize)> {
    let d = x.dim(D::Minus1)?;
    if d == 0 {
        bail!("a kernel needs rows of at least one element, got shape {:?}", x.shape());
    }
    Ok((x.elem_count() / d, d))
}

/// Errors unless `t` has the given dimensions.
pub fn check_shape(name: &str, t: &Tensor, dims: &[usize]) -> Result<()> {
    if t.dims() != dims {
        bail!("{name} has shape {:?}, expected {dims:?}", t.dims());
    }
    Ok(())
}
