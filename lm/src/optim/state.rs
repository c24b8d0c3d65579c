//! Optimiser state on disk: variables, moments and step count in one safetensors file.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::io::Read;
use std::ops::Deref;
use std::os::unix::fs::FileExt;
use std::path::Path;

use candle_core::{Device, Tensor};
use safetensors::tensor::{Dtype, Metadata};

use super::AdamW;
use super::adamw::{Moments, ParamState};
use crate::tensor::candle_interop::CpuSlice;
use crate::{Error, Result, Variable};

/// The tensors saved per variable: its values, and the first and second moments of its gradient.
const KINDS: [&str; 3] = ["w", "m", "v"];
/// The metadata key of the step count.
const STEP: &str = "step";
/// Size limit for the header, in bytes: safetensors' own bound.
const MAX_HEADER: u64 = 100_000_000;

impl AdamW {
    /// Writes each variable and its moments as safetensors (`w.NAME`, `m.NAME`, `v.NAME`), and `step` in the metadata.
    /// Equal states give equal bytes. Serialises one tensor at a time to save memory.
    pub fn save(&self, path: &Path) -> Result<()> {
        let mut tensors = Vec::with_capacity(KINDS.len() * self.params.len());
        for ParamState { variable: Variable { name, var, .. }, moments, .. } in &self.params {
            let values = match moments {
                Moments::Fused([m, v]) => [on_host(var)?, Box::new(&m[..]), Box::new(&v[..])],
                Moments::Stock([m, v]) => [on_host(var)?, on_host(m)?, on_host(v)?],
            };
            for (kind, values) in KINDS.into_iter().zip(values) {
                tensors.push((format!("{kind}.{name}"), LazyTensor { shape: var.dims(), values }));
            }
        }
        let step = HashMap::from([(STEP.to_owned(), self.steps.to_string())]);
        safetensors::serialize_to_file(tensors, Some(step), path).map_err(|e| match e {
            safetensors::SafeTensorError::IoError(source) => Error::io(path)(source),
            e => Error::model(path, format!("cannot be written: {e}")),
        })
    }

    /// Checks that `path` holds the state of these variables as [`AdamW::save`] writes it. Changes nothing.
    ///
    /// # Errors
    /// Describes what the file holds instead.
    pub fn check(&self, path: &Path) -> Result<()> {
        SavedState::open(path, &self.params.iter().map(|param| &param.variable).collect::<Vec<_>>()).map(drop)
    }

    /// Restores a state that [`AdamW::save`] wrote for the same variables, which change in place.
    ///
    /// # Errors
    /// As [`AdamW::check`], with nothing changed; or the file cannot be read to its end, with part of the state
    /// changed.
    pub fn load(&mut self, path: &Path) -> Result<()> {
        let saved = SavedState::open(path, &self.params.iter().map(|param| &param.variable).collect::<Vec<_>>())?;
        for ParamState { variable: Variable { name, var, .. }, moments, .. } in &mut self.params {
            let read = |kind| -> Result<Tensor> {
                let mut values = vec![0.0; var.elem_count()];
                saved.read(kind, name, &mut values)?;
                Ok(Tensor::from_vec(values, var.shape(), var.device())?)
            };
            var.set(&read("w")?)?;
            match moments {
                Moments::Fused([m, v]) => {
                    saved.read("m", name, m)?;
                    saved.read("v", name, v)?;
                }
                Moments::Stock([m, v]) => (*m, *v) = (read("m")?, read("v")?),
            }
        }
        self.steps = saved.steps;
        Ok(())
    }
}

/// A file checked to hold the state of the given variables.
struct SavedState<'a> {
    path: &'a Path,
    file: File,
    /// Offset of the tensors' bytes in the file.
    start: u64,
    header: Metadata,
    steps: u64,
}

impl<'a> SavedState<'a> {
    fn open(path: &'a Path, variables: &[&Variable]) -> Result<Self> {
        let bad = |message: String| Error::model(path, message);
        let mut file = File::open(path).map_err(Error::io(path))?;
        let bytes = file.metadata().map_err(Error::io(path))?.len();
        let mut length = [0; 8];
        file.read_exact(&mut length)
            .map_err(|_| bad("not a safetensors file: it is shorter than 8 bytes".to_owned()))?;
        let length = u64::from_le_bytes(length);
        if length > MAX_HEADER || length > bytes.saturating_sub(8) {
            return Err(bad("not a safetensors file, or truncated in its header".to_owned()));
        }
        let mut header = vec![0; length as usize];
        file.read_exact(&mut header).map_err(Error::io(path))?;
        let header: Metadata =
            serde_json::from_slice(&header).map_err(|e| bad(format!("not a valid safetensors file: {e}")))?;
        let start = 8 + length;
        let expected = start + header.data_len() as u64;
        if bytes != expected {
            return Err(bad(format!("has {bytes} bytes, but its header says {expected}: it is truncated or damaged")));
        }
        let steps = header.metadata().as_ref().and_then(|m| m.get(STEP)?.parse::<u64>().ok());
        let steps = steps.ok_or_else(|| bad("has no step count, so it is not an optimiser state".to_owned()))?;
        let (found, expected) = (header.tensors().len(), KINDS.len() * variables.len());
        if found != expected {
            return Err(bad(format!("has {found} tensors, expected {expected}: it belongs to another model")));
        }
        for variable in variables {
            for kind in KINDS {
                let name = format!("{kind}.{}", variable.name);
                let info = header.info(&name).ok_or_else(|| bad(format!("tensor {name} is missing")))?;
                if info.dtype != Dtype::F32 || info.shape != variable.var.dims() {
                    let (dtype, found, expected) = (info.dtype, &info.shape, variable.var.dims());
                    return Err(bad(format!("{name} is {dtype:?} {found:?}, expected F32 {expected:?}")));
                }
            }
        }
        Ok(Self { path, file, start, header, steps })
    }

    /// Fills `values` with a tensor whose shape [`SavedState::open`] has checked.
    fn read(&self, kind: &str, variable: &str, values: &mut [f32]) -> Result<()> {
        /// Values read at once.
        const CHUNK: usize = 256 << 10;
        let name = format!("{kind}.{variable}");
        let info =
            self.header.info(&name).ok_or_else(|| Error::model(self.path, format!("tensor {name} is missing")))?;
        let mut offset = self.start + info.data_offsets.0 as u64;
        let mut bytes = vec![0; 4 * values.len().min(CHUNK)];
        for part in values.chunks_mut(CHUNK) {
            let bytes = &mut bytes[..4 * part.len()];
            self.file.read_exact_at(bytes, offset).map_err(Error::io(self.path))?;
            offset += bytes.len() as u64;
            for (value, &bytes) in part.iter_mut().zip(bytes.as_chunks::<4>().0) {
                *value = f32::from_le_bytes(bytes);
            }
        }
        Ok(())
    }
}

/// A tensor that is serialised only when the file is written.
struct LazyTensor<'a> {
    shape: &'a [usize],
    values: Values<'a>,
}

type Values<'a> = Box<dyn Deref<Target = [f32]> + 'a>;

/// A tensor's values; copies those on another device.
fn on_host(tensor: &Tensor) -> candle_core::Result<Values<'_>> {
    match tensor.device() {
        Device::Cpu => Ok(Box::new(CpuSlice::new(tensor)?)),
        _ => Ok(Box::new(tensor.flatten_all()?.to_vec1::<f32>()?)),
    }
}

impl safetensors::View for LazyTensor<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        self.values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into()
    }

    fn data_len(&self) -> usize {
        4 * self.values.len()
    }
}
