//! Weights from untrusted files: safetensors, PyTorch's `.bin`, in one file or several, and GGUF. All contents are
//! checked before use, and nothing in a file is executed.

mod encoding;
mod gguf;
mod index;
mod safetensors;
mod source;
mod table;
#[cfg(test)]
mod tests;
mod torch;

use std::collections::{BTreeMap, BTreeSet, btree_map::Entry};
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};

use self::encoding::Encoding;
pub use self::gguf::Gguf;
use self::source::Source;
use crate::{Error, Result};

/// Numbers decoded at a time: a multiple of every block size.
const CHUNK: usize = 1 << 18;

/// The weights of a Hugging Face folder or of one file. Lists tensors and reads each one on request; holds open files
/// but no weights.
pub struct Checkpoint {
    /// The path it was opened by, for messages about missing tensors.
    path: PathBuf,
    parts: Vec<Part>,
    tensors: Places,
    /// The supported types, for messages.
    types: &'static str,
}

/// The supported types in safetensors and PyTorch files.
const FLOATS: &str = "F32, F16 or BF16";

struct Part {
    path: PathBuf,
    source: Source,
}

/// The location of a tensor's bytes. Code that makes a `Place` must check that the bytes lie within the file.
struct Place {
    /// Index among the checkpoint's parts.
    part: usize,
    shape: Vec<usize>,
    encoding: Encoding,
    start: u64,
    /// The number of heads, if each head's rows are in llama.cpp's rotary order instead of Hugging Face's.
    interleaved: Option<usize>,
}

/// A file's tensors by name.
type Places = BTreeMap<String, Place>;

/// Lists the tensors of one file.
type Reader = fn(&Source, &Path) -> Result<Places>;

impl Checkpoint {
    /// Opens the first of `model.safetensors`, `model.safetensors.index.json`, `pytorch_model.bin`,
    /// `pytorch_model.bin.index.json` in a Hugging Face folder. Errors: none of them exists, or the file is invalid.
    pub fn open(folder: &Path) -> Result<Self> {
        let formats: [(&str, Reader); 2] =
            [("model.safetensors", safetensors::places), ("pytorch_model.bin", torch::places)];
        for (name, reader) in formats {
            let whole = folder.join(name);
            if whole.try_exists().map_err(Error::io(&whole))? {
                return Self::one(&whole, reader);
            }
            let index = folder.join(format!("{name}.index.json"));
            if index.try_exists().map_err(Error::io(&index))? {
                return Self::several(folder, &index, reader);
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
        Self::one(path, if torch { torch::places } else { safetensors::places })
    }

    fn one(path: &Path, reader: Reader) -> Result<Self> {
        Self::of(path, Source::open(path)?, reader)
    }

    fn of(path: &Path, source: Source, reader: Reader) -> Result<Self> {
        let tensors = reader(&source, path)?;
        let path = path.to_path_buf();
        Ok(Self { path: path.clone(), parts: vec![Part { path, source }], tensors, types: FLOATS })
    }

    fn several(folder: &Path, index: &Path, reader: Reader) -> Result<Self> {
        let mut parts: Vec<Part> = Vec::new();
        let mut found: BTreeMap<String, (usize, Places)> = BTreeMap::new();
        let mut tensors = Places::new();
        for (name, file) in index::read(index)? {
            let (part, places) = match found.entry(file) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => {
                    let path = folder.join(new.key());
                    let source = Source::open(&path)?;
                    let places = reader(&source, &path)?;
                    parts.push(Part { path, source });
                    new.insert((parts.len() - 1, places))
                }
            };
            let place = places.remove(&name).ok_or_else(|| {
                let what = format!("puts tensor `{name}` into {}, which lacks it", parts[*part].path.display());
                Error::model(index, what)
            })?;
            tensors.insert(name, Place { part: *part, ..place });
        }
        Ok(Self { path: index.to_path_buf(), parts, tensors, types: FLOATS })
    }

    /// The tensors' names, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub fn has(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Whether two names refer to the same bytes, as those of tied weights do in PyTorch's files.
    pub fn is_one(&self, name: &str, other: &str) -> bool {
        let at = |name| self.tensors.get(name).map(|place| (place.part, place.start, &place.encoding, &place.shape));
        at(name).is_some_and(|place| Some(place) == at(other))
    }

    /// A tensor's shape, if the tensor exists.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|place| &place.shape[..])
    }

    /// Reads a tensor as f32, on the CPU. Errors: missing, another shape, not a float of at most 32 bits, or a number
    /// that is not finite.
    pub fn get(&self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let place = self.tensors.get(name).ok_or_else(|| {
            Error::model(&self.path, format!("tensor `{name}` is missing; expected one of shape {shape:?}"))
        })?;
        let part = &self.parts[place.part];
        let bad = |what: String| Error::model(&part.path, format!("tensor `{name}` {what}"));
        if place.shape != shape {
            return Err(bad(format!("has shape {:?}; expected {shape:?}", place.shape)));
        }
        if place.encoding.block().is_none() {
            return Err(bad(format!("is {}; expected {}", place.encoding.name(), self.types)));
        }
        let mut values = part.decode(place)?;
        if let Some(heads) = place.interleaved {
            values = gguf::halves(&values, heads, shape);
        }
        if let Some(at) = values.iter().position(|v| !v.is_finite()) {
            return Err(bad(format!("holds {} at flat index {at}", values[at])));
        }
        Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
    }
}

impl Part {
    /// Reads a tensor's numbers, in order, a chunk at a time.
    fn decode(&self, place: &Place) -> Result<Vec<f32>> {
        let numbers = place.shape.iter().product();
        let mut values = Vec::with_capacity(numbers);
        let mut start = place.start;
        let mut bytes = Vec::new();
        while values.len() < numbers {
            let count = CHUNK.min(numbers - values.len());
            let len = place.encoding.size(count).expect("a place holds whole blocks, and so does a chunk");
            bytes.resize(len, 0);
            self.source.read_at(start, &mut bytes).map_err(Error::io(&self.path))?;
            place.encoding.decode(&bytes, &mut values)?;
            start += len as u64;
        }
        Ok(values)
    }
}

/// The contents of a small text file, without a byte-order mark. Errors: not a file, or more than `most` bytes.
pub(crate) fn whole(path: &Path, most: u64) -> Result<Vec<u8>> {
    Source::open(path)?.whole(path, most)
}

/// Whether a path is an existing file named `*.gguf`.
pub(crate) fn is_gguf(path: &Path) -> bool {
    path.extension().is_some_and(|end| end.eq_ignore_ascii_case("gguf")) && path.is_file()
}

/// The files named in an index of weights, sorted. Errors: an invalid index, or a name that leads out of its folder.
pub fn shards(index: &Path) -> Result<BTreeSet<String>> {
    Ok(index::read(index)?.into_values().collect())
}

const MEMORY: &str = "(in memory)";

/// Reads a safetensors file and all its weights from memory, for tests with arbitrary bytes. Errors: those of
/// [`Checkpoint`].
#[doc(hidden)]
pub fn check_safetensors(bytes: &[u8]) -> Result<()> {
    check(bytes, safetensors::places)
}

/// Like [`check_safetensors`], for PyTorch's `.bin`.
#[doc(hidden)]
pub fn check_torch(bytes: &[u8]) -> Result<()> {
    check(bytes, torch::places)
}

/// Like [`check_safetensors`], for GGUF; also builds the tokenizer.
#[doc(hidden)]
pub fn check_gguf(bytes: &[u8]) -> Result<()> {
    let file = Gguf::of(Path::new(MEMORY), Source::memory(bytes.to_vec()))?;
    check_weights(&file.weights)?;
    crate::Tokenizer::from_bytes(file.tokenizer.to_string().as_bytes())?;
    Ok(())
}

fn check(bytes: &[u8], reader: Reader) -> Result<()> {
    check_weights(&Checkpoint::of(Path::new(MEMORY), Source::memory(bytes.to_vec()), reader)?)
}

fn check_weights(checkpoint: &Checkpoint) -> Result<()> {
    for (name, place) in &checkpoint.tensors {
        checkpoint.get(name, &place.shape)?;
    }
    Ok(())
}
