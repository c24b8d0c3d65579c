//! Models as folders of safetensors, in and out; knows no forward pass.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use half::{bf16, f16};
use safetensors::{Dtype, SafeTensorError, SafeTensors, View};

use crate::transformer::{Named, Transformer};
use crate::{Error, ModelConfig, Result};

const FILE: &str = "model.safetensors";

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
pub(crate) fn load(folder: &Path) -> Result<Transformer> {
    let config = ModelConfig::load(folder)?;
    let file = Weights::read(&folder.join(FILE))?;
    let prefix = config.spec().map_err(Error::input)?.names.prefix;
    // A bare trunk's file has no prefix in its names.
    let bare = !file.names().iter().any(|name| name.starts_with(prefix));
    Transformer::build(&config, |name, shape| match name.strip_prefix(prefix) {
        Some(within) if bare => file.get(within, shape),
        _ => file.get(name, shape),
    })
}

/// Writes `config.json` and `model.safetensors`. Equal weights give equal bytes.
pub(crate) fn save(model: &Transformer, folder: &Path, dtype: WeightType) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let torch_dtype = match dtype {
        WeightType::F32 => "float32",
        WeightType::F16 => "float16",
    };
    model.config.save(folder, torch_dtype)?;
    write(&folder.join(FILE), &model.tensors(), dtype)
}

/// Writes tensors to a safetensors file, one at a time. Errors: a value that is not finite, or beyond f16's range.
pub(crate) fn write(path: &Path, tensors: &[Named], dtype: WeightType) -> Result<()> {
    let lazy = |named: &Named| {
        let mut shape = named.tensor.dims().to_vec();
        if named.transposed {
            shape.reverse();
        }
        Lazy { tensor: named.tensor.clone(), shape, transposed: named.transposed, dtype }
    };
    for named in tensors {
        let (name, values) = (&named.name, lazy(named).values()?);
        if values.iter().any(|v| !v.is_finite()) {
            return Err(Error::NonFinite { what: format!("tensor `{name}`, to be written to {}", path.display()) });
        }
        if dtype == WeightType::F16 && values.iter().any(|&v| f16::from_f32(v).is_infinite()) {
            return Err(Error::model(path, format!("tensor `{name}` does not fit into f16")));
        }
    }
    // transformers refuses a file without this entry.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let views = tensors.iter().map(|named| (named.name.as_str(), lazy(named)));
    safetensors::serialize_to_file(views, Some(metadata), path).map_err(|e| match e {
        SafeTensorError::IoError(source) => Error::io(path)(source),
        e => Error::model(path, format!("cannot be written: {e}")),
    })
}

/// A tensor whose bytes are made when the file is written.
struct Lazy {
    tensor: Tensor,
    /// As the file holds it.
    shape: Vec<usize>,
    transposed: bool,
    dtype: WeightType,
}

impl Lazy {
    /// In the file's order.
    fn values(&self) -> candle_core::Result<Vec<f32>> {
        let tensor = if self.transposed { self.tensor.t()? } else { self.tensor.clone() };
        tensor.flatten_all()?.to_vec1()
    }
}

impl View for Lazy {
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
        let values = self.values().expect("`write` has taken the same values out before");
        match self.dtype {
            WeightType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>().into(),
            WeightType::F16 => values.iter().flat_map(|&v| f16::from_f32(v).to_le_bytes()).collect::<Vec<u8>>().into(),
        }
    }

    fn data_len(&self) -> usize {
        let bytes = match self.dtype {
            WeightType::F32 => 4,
            WeightType::F16 => 2,
        };
        self.tensor.elem_count() * bytes
    }
}
