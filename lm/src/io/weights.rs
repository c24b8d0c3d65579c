//! Model files: read from a Hugging Face folder or a GGUF file, written as a folder with safetensors.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::Path;

use candle_core::Tensor;
use half::f16;
use safetensors::{Dtype, SafeTensorError, View};

use crate::io::{self, Checkpoint, Gguf};
use crate::model::architecture::LM_HEAD;
use crate::model::transformer::{NamedTensor, Transformer};
use crate::{Error, ModelConfig, Result};

const WEIGHTS_FILE: &str = "model.safetensors";

/// The element type of written weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WeightType {
    F32,
    F16,
}

/// Reads a folder's `config.json` and weights, or a GGUF file; every tensor is frozen.
pub(crate) fn load(path: &Path) -> Result<Transformer> {
    let (config, file) = if io::is_gguf(path) {
        let file = Gguf::open(path)?;
        (ModelConfig::from_json(file.config).map_err(|message| Error::model(path, message))?, file.weights)
    } else {
        (ModelConfig::load(path)?, Checkpoint::open(path)?)
    };
    let prefix = config.architecture().map_err(Error::input)?.prefix;
    // A bare trunk's file has no prefix in its names.
    let without_prefix = !file.names().any(|name| name.starts_with(prefix));
    let mut unused: BTreeSet<&str> = file.names().filter(|name| !is_buffer(name)).collect();
    let model = Transformer::build(&config, |name, shape| {
        let name = if without_prefix { name.strip_prefix(prefix).unwrap_or(name) } else { name };
        unused.remove(name);
        file.get(name, shape)
    })?;
    check_tied(&model, &file, path)?;
    unused.remove(&*lm_head_name());
    if let Some(name) = unused.first() {
        let others = match unused.len() {
            1 => String::new(),
            n => format!(" and {} others", n - 1),
        };
        let message =
            format!("has tensor `{}`{others}, not part of the model that its config describes", name.escape_debug());
        return Err(Error::model(path, message));
    }
    Ok(model)
}

/// Whether a tensor is a buffer that older files keep beside the weights and transformers recomputes: causal masks, and
/// tables of rotary positions.
fn is_buffer(name: &str) -> bool {
    const BUFFERS: [&str; 5] = [
        "attn.bias",
        "attn.masked_bias",
        "attn.embed_positions",
        "self_attn.rotary_emb.inv_freq",
        "rotary_emb.inv_freq",
    ];
    // Buffers belong to the trunk or to one of its layers.
    let mut module = name.strip_prefix("transformer.").or(name.strip_prefix("model.")).unwrap_or(name);
    for layers in ["h.", "layers."] {
        if let Some((number, part)) = module.strip_prefix(layers).and_then(|rest| rest.split_once('.'))
            && number.bytes().all(|digit| digit.is_ascii_digit())
        {
            module = part;
        }
    }
    BUFFERS.contains(&module)
}

fn lm_head_name() -> String {
    format!("{LM_HEAD}.weight")
}

/// Errors: the config ties the output layer to the embedding, but the file has a different output layer, which the
/// program that wrote the file uses.
fn check_tied(model: &Transformer, file: &Checkpoint, path: &Path) -> Result<()> {
    let (lm_head, architecture) = (lm_head_name(), &model.architecture);
    let embedding = format!("{}{}.weight", architecture.prefix, architecture.embedding);
    if model.lm_head.is_some() || !file.has(&lm_head) || file.same_bytes(&lm_head, &embedding) {
        return Ok(());
    }
    let stored = file.get(&lm_head, &[architecture.vocab, architecture.d])?;
    if stored.flatten_all()?.to_vec1::<f32>()? != model.embedding.flatten_all()?.to_vec1::<f32>()? {
        let message = format!(
            "ties the LM head to the embedding, but has a different `{lm_head}`; to use it, set tie_word_embeddings to false"
        );
        return Err(Error::model(path, message));
    }
    Ok(())
}

/// Writes `config.json` and `model.safetensors`. Equal weights give equal bytes.
pub(crate) fn save(model: &Transformer, folder: &Path, dtype: WeightType) -> Result<()> {
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    let torch_dtype = match dtype {
        WeightType::F32 => "float32",
        WeightType::F16 => "float16",
    };
    model.config.save(folder, torch_dtype)?;
    write(&folder.join(WEIGHTS_FILE), &model.tensors(), dtype)
}

/// Writes tensors to a safetensors file, one at a time. Errors: a value that is not finite, or beyond f16's range.
pub(crate) fn write(path: &Path, tensors: &[NamedTensor], dtype: WeightType) -> Result<()> {
    let lazy_tensor = |named: &NamedTensor| {
        let mut shape = named.tensor.dims().to_vec();
        if named.transposed {
            shape.reverse();
        }
        LazyTensor { tensor: named.tensor.clone(), shape, transposed: named.transposed, dtype }
    };
    for named in tensors {
        let (name, values) = (&named.name, lazy_tensor(named).values()?);
        if values.iter().any(|v| !v.is_finite()) {
            return Err(Error::NonFinite { quantity: format!("tensor `{name}`, to be written to {}", path.display()) });
        }
        if dtype == WeightType::F16 && values.iter().any(|&v| f16::from_f32(v).is_infinite()) {
            return Err(Error::model(path, format!("tensor `{name}` exceeds the range of f16")));
        }
    }
    // transformers refuses a file without this entry.
    let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
    let views = tensors.iter().map(|named| (named.name.as_str(), lazy_tensor(named)));
    safetensors::serialize_to_file(views, Some(metadata), path).map_err(|e| match e {
        SafeTensorError::IoError(source) => Error::io(path)(source),
        e => Error::model(path, format!("cannot be written: {e}")),
    })
}

/// A tensor that is serialised only when the file is written.
struct LazyTensor {
    tensor: Tensor,
    /// The shape in the file.
    shape: Vec<usize>,
    transposed: bool,
    dtype: WeightType,
}

impl LazyTensor {
    /// Values in the file's order.
    fn values(&self) -> candle_core::Result<Vec<f32>> {
        let tensor = if self.transposed { self.tensor.t()? } else { self.tensor.clone() };
        tensor.flatten_all()?.to_vec1()
    }
}

impl View for LazyTensor {
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
        let values = self.values().expect("`write` has read the same values before");
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
