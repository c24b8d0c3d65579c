//! Weights from untrusted files: safetensors, PyTorch's `.bin`, in one file or several, and GGUF. All contents are
//! checked before use, and nothing in a file is executed.

mod encoding;
mod gguf;
mod index;
pub(crate) mod peft;
mod safetensors;
mod source;
#[cfg(test)]
mod tests;
mod torch;
mod unique_map;
pub(crate) mod weights;

use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};
use std::path::{Path, PathBuf};

use candle_core::Tensor;

use self::encoding::Encoding;
pub use self::gguf::{Gguf, QuantizedFile, gguf_chat_config};
pub(crate) use self::gguf::{QuantizedFamily, QuantizedShape};
use self::source::Source;
use crate::tensor::device::device;
use crate::{Error, Result};

/// Numbers decoded at a time: a multiple of every block size.
const CHUNK: usize = 1 << 18;

/// The weights of a Hugging Face folder or of one file. Lists tensors and reads each one on request; holds open files
/// but no weights.
pub struct Checkpoint {
    /// The path it was opened by, for messages about missing tensors.
    path: PathBuf,
    files: Vec<WeightFile>,
    tensors: TensorLocations,
    /// The supported types, for messages.
    supported_types: &'static str,
}

/// The supported types in safetensors and PyTorch files.
const FLOATS: &str = "F32, F16 or BF16";

struct WeightFile {
    path: PathBuf,
    source: Source,
}

/// The location of a tensor's bytes. Code that makes a `TensorLocation` must check that the bytes lie within the file.
struct TensorLocation {
    /// Index among the checkpoint's files.
    file: usize,
    shape: Vec<usize>,
    encoding: Encoding,
    start: u64,
    /// The number of heads, if each head's rows are in llama.cpp's rotary order instead of Hugging Face's.
    interleaved: Option<usize>,
}

/// A file's tensors by name.
type TensorLocations = BTreeMap<String, TensorLocation>;

/// Lists the tensors of one file.
type LocateTensors = fn(&Source, &Path) -> Result<TensorLocations>;

impl Checkpoint {
    /// Opens the first of `model.safetensors`, `model.safetensors.index.json`, `pytorch_model.bin`,
    /// `pytorch_model.bin.index.json` in a Hugging Face folder. Errors: none of them exists, or the file is invalid.
    pub fn open(folder: &Path) -> Result<Self> {
        let formats: [(&str, LocateTensors); 2] =
            [("model.safetensors", safetensors::locate_tensors), ("pytorch_model.bin", torch::locate_tensors)];
        for (name, locate) in formats {
            let whole = folder.join(name);
            if whole.try_exists().map_err(Error::io(&whole))? {
                return Self::open_single(&whole, locate);
            }
            let index = folder.join(format!("{name}.index.json"));
            if index.try_exists().map_err(Error::io(&index))? {
                return Self::open_sharded(folder, &index, locate);
            }
        }
        Err(Error::model(
            folder,
            "has no weights: neither model.safetensors nor pytorch_model.bin, nor an index of either",
        ))
    }

    /// Opens one file, as PyTorch's if it ends in `.bin`, `.pt` or `.pth`, otherwise as safetensors.
    pub fn file(path: &Path) -> Result<Self> {
        let torch = path.extension().is_some_and(|end| ["bin", "pt", "pth"].iter().any(|torch| end == *torch));
        Self::open_single(path, if torch { torch::locate_tensors } else { safetensors::locate_tensors })
    }

    fn open_single(path: &Path, locate: LocateTensors) -> Result<Self> {
        Self::parse(path, Source::open(path)?, locate)
    }

    fn parse(path: &Path, source: Source, locate: LocateTensors) -> Result<Self> {
        let tensors = locate(&source, path)?;
        let path = path.to_path_buf();
        Ok(Self { path: path.clone(), files: vec![WeightFile { path, source }], tensors, supported_types: FLOATS })
    }

    fn open_sharded(folder: &Path, index: &Path, locate: LocateTensors) -> Result<Self> {
        let mut files: Vec<WeightFile> = Vec::new();
        let mut found: BTreeMap<String, (usize, TensorLocations)> = BTreeMap::new();
        let mut tensors = TensorLocations::new();
        for (name, file) in index::read(index)? {
            let (file, locations) = match found.entry(file) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => {
                    let path = folder.join(new.key());
                    let source = Source::open(&path)?;
                    let locations = locate(&source, &path)?;
                    files.push(WeightFile { path, source });
                    new.insert((files.len() - 1, locations))
                }
            };
            let location = locations.remove(&name).ok_or_else(|| {
                let message = format!("puts tensor `{name}` into {}, which lacks it", files[*file].path.display());
                Error::model(index, message)
            })?;
            tensors.insert(name, TensorLocation { file: *file, ..location });
        }
        Ok(Self { path: index.to_path_buf(), files, tensors, supported_types: FLOATS })
    }

    /// The tensors' names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Whether two names refer to the same bytes, as those of tied weights do in PyTorch's files.
    pub fn same_bytes(&self, name: &str, other: &str) -> bool {
        let bytes = |name| self.tensors.get(name).map(|it| (it.file, it.start, &it.encoding, &it.shape));
        bytes(name).is_some_and(|location| Some(location) == bytes(other))
    }

    /// A tensor's shape, if the tensor exists.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|location| &location.shape[..])
    }

    /// Reads a tensor as f32, on the device of this process. Errors: missing, another shape, not a float of at most 32 bits, or a number
    /// that is not finite.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let location = self.tensors.get(name).ok_or_else(|| {
            Error::model(&self.path, format!("tensor `{name}` is missing, expected one of shape {shape:?}"))
        })?;
        let file = &self.files[location.file];
        let invalid = |message: String| Error::model(&file.path, format!("tensor `{name}` {message}"));
        if location.shape != shape {
            return Err(invalid(format!("has shape {:?}, expected {shape:?}", location.shape)));
        }
        if location.encoding.block().is_none() {
            return Err(invalid(format!("is {}, expected {}", location.encoding.name(), self.supported_types)));
        }
        let mut values = file.decode(location)?;
        if let Some(heads) = location.interleaved {
            values = gguf::deinterleave_rows(&values, heads, shape);
        }
        if let Some(index) = values.iter().position(|v| !v.is_finite()) {
            return Err(invalid(format!("has {} at flat index {index}", values[index])));
        }
        Ok(Tensor::from_vec(values, shape, &device())?)
    }
}

impl WeightFile {
    /// Reads a tensor's numbers, in order, a chunk at a time.
    fn decode(&self, location: &TensorLocation) -> Result<Vec<f32>> {
        let numbers = location.shape.iter().product();
        let mut values = Vec::with_capacity(numbers);
        let mut start = location.start;
        let mut bytes = Vec::new();
        while values.len() < numbers {
            let count = CHUNK.min(numbers - values.len());
            let len = location.encoding.size(count).expect("a tensor has whole blocks, and so has a chunk");
            bytes.resize(len, 0);
            self.source.read_at(start, &mut bytes).map_err(Error::io(&self.path))?;
            location.encoding.decode(&bytes, &mut values)?;
            start += len as u64;
        }
        Ok(values)
    }
}

/// The contents of a small text file, without a byte-order mark. Errors: not a file, or more than `max_bytes` bytes.
pub(crate) fn read_small(path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
    Source::open(path)?.read_text(path, max_bytes)
}

/// Whether a path is an existing file named `*.gguf`.
pub(crate) fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf")) && path.is_file()
}

/// The files named in an index of weights, sorted. Errors: an invalid index, or a name that leads out of its folder.
pub fn shards(index: &Path) -> Result<BTreeSet<String>> {
    Ok(index::read(index)?.into_values().collect())
}

const IN_MEMORY: &str = "(in memory)";

/// Reads a safetensors file and all its weights from memory, for tests with arbitrary bytes. Errors: those of
/// [`Checkpoint`].
#[doc(hidden)]
pub fn check_safetensors(bytes: &[u8]) -> Result<()> {
    check(bytes, safetensors::locate_tensors)
}

/// Like [`check_safetensors`], for PyTorch's `.bin`.
#[doc(hidden)]
pub fn check_torch(bytes: &[u8]) -> Result<()> {
    check(bytes, torch::locate_tensors)
}

/// Like [`check_safetensors`], for GGUF; also builds the tokenizer.
#[doc(hidden)]
pub fn check_gguf(bytes: &[u8]) -> Result<()> {
    let file = Gguf::parse(Path::new(IN_MEMORY), Source::from_memory(bytes.to_vec()))?;
    check_weights(&file.weights)?;
    crate::Tokenizer::from_bytes(file.tokenizer.to_string().as_bytes())?;
    Ok(())
}

fn check(bytes: &[u8], locate: LocateTensors) -> Result<()> {
    check_weights(&Checkpoint::parse(Path::new(IN_MEMORY), Source::from_memory(bytes.to_vec()), locate)?)
}

fn check_weights(checkpoint: &Checkpoint) -> Result<()> {
    for (name, location) in &checkpoint.tensors {
        checkpoint.get(name, &location.shape)?;
    }
    Ok(())
}
