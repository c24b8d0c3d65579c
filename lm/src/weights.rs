//! Safetensors in and out, and GPT-2's names in them; knows no forward pass.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensorError, SafeTensors, View};

use crate::gpt2::Gpt2;
use crate::{Error, Gpt2Config, Result};

const FILE: &str = "model.safetensors";
const PREFIX: &str = "transformer.";

/// How weights are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightType {
    F32,
    F16,
}

/// A safetensors file in memory.
pub(crate) struct Weights {
    path: PathBuf,
    bytes: Vec<u8>,
    header: safetensors::tensor::Metadata,
    /// Where the tensors' bytes begin.
    start: usize,
}

impl Weights {
    /// Reads a file and checks that its header tells the truth about its length.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = fs::read(path).map_err(Error::io(path))?;
        let bad = |e| match e {
            // Its header speaks of other bytes than there are.
            SafeTensorError::HeaderTooSmall
            | SafeTensorError::InvalidHeaderLength
            | SafeTensorError::MetadataIncompleteBuffer => Error::model(
                path,
                format!("the file is cut off: its {} bytes are not what its header says", bytes.len()),
            ),
            e => Error::model(path, format!("not a safetensors file: {e}")),
        };
        SafeTensors::deserialize(&bytes).map_err(bad)?;
        let (header_len, header) = SafeTensors::read_metadata(&bytes).map_err(bad)?;
        Ok(Self { path: path.to_path_buf(), bytes, header, start: header_len + 8 })
    }

    /// The tensors' names, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.header.tensors().into_keys().collect();
        names.sort_unstable();
        names
    }

    pub fn has(&self, name: &str) -> bool {
        self.header.info(name).is_some()
    }

    /// A tensor as f32. Errors: missing, another shape, or not a float of at most 32 bits.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let bad = |what: String| Error::model(&self.path, what);
        let info = self
            .header
            .info(name)
            .ok_or_else(|| bad(format!("tensor `{name}` is missing; expected one of shape {shape:?}")))?;
        if info.shape != shape {
            return Err(bad(format!("tensor `{name}` has shape {:?}; expected {shape:?}", info.shape)));
        }
        let data = &self.bytes[self.start + info.data_offsets.0..self.start + info.data_offsets.1];
        let values: Vec<f32> = match info.dtype {
            Dtype::F32 => data.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Dtype::F16 => data.chunks_exact(2).map(|b| f16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            Dtype::BF16 => data.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect(),
            other => return Err(bad(format!("tensor `{name}` is {other:?}; expected F32, F16 or BF16"))),
        };
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(bad(format!("tensor `{name}` holds {} at flat index {at}", values[at])));
        }
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }
}

/// Reads `config.json` and `model.safetensors`; every tensor is frozen.
pub(crate) fn load(folder: &Path) -> Result<Gpt2> {
    let config = Gpt2Config::load(folder)?;
    let file = Weights::read(&folder.join(FILE))?;
    let prefix = if file.has(&format!("{PREFIX}wte.weight")) { PREFIX } else { "" };
    Gpt2::build(&config, |name, shape| file.get(&format!("{prefix}{name}"), shape))
}

/// Writes `config.json` and `model.safetensors` (names with `transformer.`). Equal weights give equal bytes.
pub(crate) fn save(model: &Gpt2, folder: &Path, dtype: WeightType) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let torch_dtype = match dtype {
        WeightType::F32 => "float32",
        WeightType::F16 => "float16",
    };
    model.config.save(folder, torch_dtype)?;
    let tensors: Vec<(String, &Tensor)> =
        model.tensors().into_iter().map(|(name, tensor)| (format!("{PREFIX}{name}"), tensor)).collect();
    write(&folder.join(FILE), &tensors, dtype)
}

/// Writes tensors to a safetensors file. Errors: a value that is not finite, or beyond f16's range.
pub(crate) fn write(path: &Path, tensors: &[(String, &Tensor)], dtype: WeightType) -> Result<()> {
    let mut views = Vec::with_capacity(tensors.len());
    for (name, tensor) in tensors {
        let values = tensor.flatten_all()?.to_vec1::<f32>()?;
        if values.iter().any(|v| !v.is_finite()) {
            return Err(Error::NonFinite { what: format!("tensor `{name}`, to be written to {}", path.display()) });
        }
        let bytes: Vec<u8> = match dtype {
            WeightType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            WeightType::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect(),
        };
        if dtype == WeightType::F16 && values.iter().any(|&v| f16::from_f32(v).is_infinite()) {
            return Err(Error::model(path, format!("tensor `{name}` does not fit into f16")));
        }
        views.push((name.as_str(), Bytes { bytes, shape: tensor.dims().to_vec(), dtype }));
    }
    // transformers refuses a file without this entry.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let bytes = safetensors::serialize(views, Some(metadata))
        .map_err(|e| Error::model(path, format!("cannot be written: {e}")))?;
    fs::write(path, bytes).map_err(Error::io(path))
}

struct Bytes {
    bytes: Vec<u8>,
    shape: Vec<usize>,
    dtype: WeightType,
}

impl View for Bytes {
    fn dtype(&self) -> Dtype {
        match self.dtype {
            WeightType::F32 => Dtype::F32,
            WeightType::F16 => Dtype::F16,
        }
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}
