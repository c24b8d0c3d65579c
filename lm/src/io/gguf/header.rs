//! The header of a GGUF file: its metadata and the locations of its tensors.
//!
//! candle's own reader divides by whatever alignment the file states, multiplies shapes unchecked, keeps the last of
//! two equal names and spends 32 bytes on each byte of an array. So the header is read here, and candle decodes only
//! the blocks.

use std::collections::BTreeMap;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;

use candle_core::quantized::GgmlDType;

use crate::io::TensorLocation;
use crate::io::encoding::Encoding;
use crate::io::source::{self, Source};
use crate::{Error, Result};

const MAGIC: [u8; 4] = *b"GGUF";
const ALIGNMENT: &str = "general.alignment";
/// If the file states no alignment.
const DEFAULT_ALIGNMENT: u64 = 32;
const MAX_ALIGNMENT: u64 = 1 << 20;
/// Far more than any model has; each also takes at least 13 bytes of the file.
pub(super) const MAX_ENTRIES: u64 = 1 << 16;
/// Texts per array; a vocabulary and its merges have a few hundred thousand.
const MAX_TEXTS: u64 = 1 << 20;
/// Bytes per key; the format's own limit.
const MAX_KEY: u64 = (1 << 16) - 1;
const MAX_DIMS: u32 = 4;

/// A metadata value, in the detail that a model needs.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value {
    Int(i128),
    Float(f64),
    Bool(bool),
    Text(String),
    Texts(Vec<String>),
    Ints(Vec<i32>),
    /// An array of other elements, such as scores.
    Skipped,
}

/// The contents of the file before the tensors' bytes.
pub(super) struct Header {
    pub metadata: BTreeMap<String, Value>,
    /// By name in the file. Shapes are [out, in], as in candle and PyTorch.
    pub tensors: BTreeMap<String, TensorLocation>,
}

impl Header {
    /// Errors: contents that cannot be true of a file of this length.
    pub fn read(source: &Source, path: &Path) -> Result<Self> {
        let mut reader = HeaderReader { reader: BufReader::new(source.reader()), position: 0, len: source.len() };
        reader.header().map_err(|message| Error::model(path, format!("not a supported GGUF file: {message}")))
    }
}

type ScanResult<T> = std::result::Result<T, String>;

/// A position in the header, never beyond the end of the file.
struct HeaderReader<'a> {
    reader: BufReader<source::SourceReader<'a>>,
    position: u64,
    len: u64,
}

impl HeaderReader<'_> {
    fn header(&mut self) -> ScanResult<Header> {
        if self.bytes::<4>()? != MAGIC {
            return Err("it does not begin with `GGUF`".to_owned());
        }
        let version = self.u32()?;
        if !(2..=3).contains(&version) {
            return Err(format!("its version is {version}, expected 2 or 3, little-endian"));
        }
        let (tensors, entries) = (self.u64()?, self.u64()?);
        // A tensor takes at least its name's length, its number of dimensions, a type and an offset; an entry at least
        // a key and a type.
        self.check_count("tensors", tensors, 24)?;
        self.check_count("metadata entries", entries, 13)?;

        let mut metadata = BTreeMap::new();
        for _ in 0..entries {
            let key = self.key()?;
            let value = self.value().map_err(|message| format!("`{key}` {message}"))?;
            if metadata.contains_key(&key) {
                return Err(format!("`{key}` is listed twice"));
            }
            metadata.insert(key, value);
        }
        let alignment = match metadata.get(ALIGNMENT) {
            None => DEFAULT_ALIGNMENT,
            Some(&Value::Int(given)) => u64::try_from(given)
                .ok()
                .filter(|given| (8..=MAX_ALIGNMENT).contains(given) && given.is_power_of_two())
                .ok_or_else(|| format!("`{ALIGNMENT}` is {given}, expected a power of two of at least 8"))?,
            Some(_) => return Err(format!("`{ALIGNMENT}` is not an integer")),
        };

        let mut locations = BTreeMap::new();
        for _ in 0..tensors {
            let name = self.key()?;
            let location = self.location(alignment).map_err(|message| format!("tensor `{name}` {message}"))?;
            if locations.contains_key(&name) {
                return Err(format!("tensor `{name}` is listed twice"));
            }
            locations.insert(name, location);
        }
        // Positions are within the file, far from overflow.
        let data = self.position.next_multiple_of(alignment);
        for (name, location) in &mut locations {
            location.start = self.locate(location, data).map_err(|message| format!("tensor `{name}` {message}"))?;
        }
        Ok(Header { metadata, tensors: locations })
    }

    /// Reads a tensor's entry; its start is still relative to the first tensor's.
    fn location(&mut self, alignment: u64) -> ScanResult<TensorLocation> {
        let dims = self.u32()?;
        if dims > MAX_DIMS {
            return Err(format!("has {dims} dimensions; at most {MAX_DIMS} are supported"));
        }
        let mut shape = Vec::new();
        for _ in 0..dims {
            let size = self.u64()?;
            shape.push(usize::try_from(size).map_err(|_| format!("has a size of {size}"))?);
        }
        // The file lists the fastest dimension first.
        shape.reverse();
        let encoding = encoding(self.u32()?);
        let start = self.u64()?;
        if !start.is_multiple_of(alignment) {
            return Err(format!("begins at {start}, which is not aligned to {alignment}"));
        }
        Ok(TensorLocation { file: 0, shape, encoding, start, interleaved: None })
    }

    /// The offset of a tensor in the file. Errors: it does not lie wholly in the file, or its rows are not whole
    /// blocks.
    fn locate(&self, location: &TensorLocation, data: u64) -> ScanResult<u64> {
        let start = data.checked_add(location.start).ok_or("begins beyond the end of any file")?;
        if let Some((block, _)) = location.encoding.block() {
            let rows = location.shape.last().copied().unwrap_or(1);
            let numbers = location.shape.iter().try_fold(1usize, |all, &size| all.checked_mul(size));
            let Some(bytes) = numbers.and_then(|numbers| location.encoding.size(numbers)) else {
                return Err(format!(
                    "has shape {:?}, which is too large or not a whole number of blocks",
                    location.shape
                ));
            };
            if !rows.is_multiple_of(block) {
                return Err(format!(
                    "has rows of {rows} numbers, but {} has blocks of {block}",
                    location.encoding.name()
                ));
            }
            if start.checked_add(bytes as u64).is_none_or(|end| end > self.len) {
                return Err(format!(
                    "needs {bytes} bytes from byte {start} on, but the file is truncated at {}",
                    self.len
                ));
            }
        }
        Ok(start)
    }

    fn value(&mut self) -> ScanResult<Value> {
        let kind = self.u32()?;
        Ok(match kind {
            0 => Value::Int(i128::from(self.bytes::<1>()?[0])),
            1 => Value::Int(i128::from(i8::from_le_bytes(self.bytes()?))),
            2 => Value::Int(i128::from(u16::from_le_bytes(self.bytes()?))),
            3 => Value::Int(i128::from(i16::from_le_bytes(self.bytes()?))),
            4 => Value::Int(i128::from(u32::from_le_bytes(self.bytes()?))),
            5 => Value::Int(i128::from(i32::from_le_bytes(self.bytes()?))),
            6 => Value::Float(f64::from(f32::from_le_bytes(self.bytes()?))),
            7 => Value::Bool(match self.bytes::<1>()?[0] {
                0 => false,
                1 => true,
                other => return Err(format!("is a boolean of {other}")),
            }),
            8 => Value::Text(self.text(u64::MAX)?),
            9 => self.array()?,
            10 => Value::Int(i128::from(u64::from_le_bytes(self.bytes()?))),
            11 => Value::Int(i128::from(i64::from_le_bytes(self.bytes()?))),
            12 => Value::Float(f64::from_le_bytes(self.bytes()?)),
            other => return Err(format!("has the unknown type {other}")),
        })
    }

    fn array(&mut self) -> ScanResult<Value> {
        let (kind, count) = (self.u32()?, self.u64()?);
        let size = match kind {
            0 | 1 | 7 => 1,
            2 | 3 => 2,
            4..=6 => 4,
            // A text takes at least the bytes of its length.
            8 | 10..=12 => 8,
            9 => return Err("is an array of arrays; no model needs one".to_owned()),
            other => return Err(format!("is an array of the unknown type {other}")),
        };
        if count > self.remaining() / size {
            return Err(format!("is an array of {count}; the file has only {} more bytes", self.remaining()));
        }
        if kind == 8 && count > MAX_TEXTS {
            return Err(format!("is an array of {count} strings; at most {MAX_TEXTS} are supported"));
        }
        Ok(match kind {
            8 => Value::Texts((0..count).map(|_| self.text(u64::MAX)).collect::<ScanResult<_>>()?),
            5 => Value::Ints((0..count).map(|_| Ok(i32::from_le_bytes(self.bytes()?))).collect::<ScanResult<_>>()?),
            _ => {
                self.position += count * size;
                self.reader.seek(SeekFrom::Start(self.position)).map_err(|e| e.to_string())?;
                Value::Skipped
            }
        })
    }

    fn check_count(&self, entries: &str, count: u64, smallest: u64) -> ScanResult<()> {
        if count > MAX_ENTRIES || count > self.remaining() / smallest {
            return Err(format!("it claims {count} {entries} in {} bytes", self.remaining()));
        }
        Ok(())
    }

    fn key(&mut self) -> ScanResult<String> {
        self.text(MAX_KEY)
    }

    fn text(&mut self, max_len: u64) -> ScanResult<String> {
        let len = self.u64()?;
        if len > max_len || len > self.remaining() {
            return Err(format!("has a string of {len} bytes, but the file has only {} more", self.remaining()));
        }
        // Not above the file's length.
        let mut bytes = vec![0; len as usize];
        self.fill(&mut bytes)?;
        String::from_utf8(bytes).map_err(|_| "has a string that is not UTF-8".to_owned())
    }

    fn u32(&mut self) -> ScanResult<u32> {
        Ok(u32::from_le_bytes(self.bytes()?))
    }

    fn u64(&mut self) -> ScanResult<u64> {
        Ok(u64::from_le_bytes(self.bytes()?))
    }

    fn bytes<const N: usize>(&mut self) -> ScanResult<[u8; N]> {
        let mut bytes = [0; N];
        self.fill(&mut bytes)?;
        Ok(bytes)
    }

    fn fill(&mut self, bytes: &mut [u8]) -> ScanResult<()> {
        self.reader.read_exact(bytes).map_err(|e| match e.kind() {
            std::io::ErrorKind::UnexpectedEof => "the file is truncated".to_owned(),
            _ => e.to_string(),
        })?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn remaining(&self) -> u64 {
        self.len - self.position
    }
}

/// The supported types, for messages.
pub(super) const SUPPORTED_TYPES: &str = "F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K or Q6_K";

/// ggml's types by their numbers in files. Those that candle cannot decode to f32 only get a name.
fn encoding(code: u32) -> Encoding {
    let other = |name: &str| Encoding::Other(format!("{name} (ggml's type {code})").into());
    match code {
        0 => Encoding::F32,
        1 => Encoding::F16,
        2 => Encoding::Quantized(GgmlDType::Q4_0),
        3 => Encoding::Quantized(GgmlDType::Q4_1),
        6 => Encoding::Quantized(GgmlDType::Q5_0),
        7 => Encoding::Quantized(GgmlDType::Q5_1),
        8 => Encoding::Quantized(GgmlDType::Q8_0),
        9 => other("Q8_1"),
        10 => Encoding::Quantized(GgmlDType::Q2K),
        11 => Encoding::Quantized(GgmlDType::Q3K),
        12 => Encoding::Quantized(GgmlDType::Q4K),
        13 => Encoding::Quantized(GgmlDType::Q5K),
        14 => Encoding::Quantized(GgmlDType::Q6K),
        15 => other("Q8_K"),
        16 => other("IQ2_XXS"),
        17 => other("IQ2_XS"),
        18 => other("IQ3_XXS"),
        19 => other("IQ1_S"),
        20 => other("IQ4_NL"),
        21 => other("IQ3_S"),
        22 => other("IQ2_S"),
        23 => other("IQ4_XS"),
        24 => other("I8"),
        25 => other("I16"),
        26 => other("I32"),
        27 => other("I64"),
        28 => other("F64"),
        29 => other("IQ1_M"),
        30 => Encoding::Bf16,
        34 => other("TQ1_0"),
        35 => other("TQ2_0"),
        39 => other("MXFP4"),
        _ => Encoding::Other(format!("ggml's type {code}").into()),
    }
}
