//! Conversions between candle's tensors and slices: read access, new tensors, shape errors.

use std::sync::{Mutex, PoisonError};

use candle_core::{CpuStorage, D, Device, Layout, Result, Shape, Storage, StorageRef, Tensor, bail};

/// Read access to a contiguous f32 tensor on the CPU.
pub struct View<'a> {
    guard: StorageRef<'a>,
    range: (usize, usize),
}

impl<'a> View<'a> {
    pub fn of(tensor: &'a Tensor) -> Result<View<'a>> {
        let (guard, layout) = tensor.storage_and_layout();
        let Some(range) = layout.contiguous_offsets() else {
            bail!("a kernel was given a tensor that is not contiguous")
        };
        match &*guard {
            Storage::Cpu(CpuStorage::F32(_)) => Ok(View { guard, range }),
            _ => bail!("a kernel was given {:?} on {:?}: kernels are f32 on the CPU", tensor.dtype(), tensor.device()),
        }
    }
}

impl std::ops::Deref for View<'_> {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        match &*self.guard {
            Storage::Cpu(CpuStorage::F32(v)) => &v[self.range.0..self.range.1],
            _ => unreachable!("checked by View::of"),
        }
    }
}

/// Data saved by a forward pass for at most one backward pass. Taking it out frees its memory while gradients are
/// computed.
pub struct Handover<T>(Mutex<Option<T>>);

impl<T> Default for Handover<T> {
    fn default() -> Self {
        Self(Mutex::new(None))
    }
}

impl<T> Handover<T> {
    pub fn leave(&self, what: T) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(what);
    }

    pub fn take(&self) -> Option<T> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The elements of a contiguous operand of a custom op.
pub fn slice<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    let Some((start, end)) = layout.contiguous_offsets() else { bail!("a kernel's operand is not contiguous") };
    Ok(&storage.as_slice::<f32>()?[start..end])
}

/// A custom op's result.
pub fn output(data: Vec<f32>, shape: impl Into<Shape>) -> Result<(CpuStorage, Shape)> {
    Ok((CpuStorage::F32(data), shape.into()))
}

/// A gradient with the shape of the tensor it belongs to.
pub fn gradient(data: Vec<f32>, of: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(data, of.shape(), &Device::Cpu)
}

/// `[.., d]` as (rows, d).
pub fn rows(x: &Tensor) -> Result<(usize, usize)> {
    let d = x.dim(D::Minus1)?;
    if d == 0 {
        bail!("a kernel was given rows without elements: {:?}", x.shape());
    }
    Ok((x.elem_count() / d, d))
}

/// Errors unless `t` has the given dimensions.
pub fn expect(name: &str, t: &Tensor, dims: &[usize]) -> Result<()> {
    if t.dims() != dims {
        bail!("{name} has shape {:?}, expected {dims:?}", t.dims());
    }
    Ok(())
}
