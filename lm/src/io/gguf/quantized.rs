//! Checks a GGUF file for candle-transformers, which trusts what it reads: it divides by counts of heads, allocates what
//! the file states, and leaves out tensors and settings that it does not know.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::{Content, TensorInfo, Value, VersionedMagic};

use super::{Header, Metadata, SCALING_TYPE, UNSUPPORTED, header, required};
use crate::io::encoding::Encoding;
use crate::io::source::Source;
use crate::{Error, Result};

/// Longest sequence, in tokens: what candle's Llama has positions for. Scores of attention are held whole, so memory
/// grows with its square.
const MAX_WINDOW: usize = 4096;

/// The families of candle-transformers that a file may name as `general.architecture`. Its Gemma 3 is not among them:
/// candle-transformers 0.11 computes it with SiLU for GELU, and with sliding windows of one token more than its authors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum QuantizedFamily {
    Llama,
    Qwen2,
    Qwen3,
    Phi3,
}

impl QuantizedFamily {
    const ALL: [Self; 4] = [Self::Llama, Self::Qwen2, Self::Qwen3, Self::Phi3];

    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
            Self::Phi3 => "phi3",
        }
    }

    /// Errors: another family, or none.
    fn of(metadata: &Metadata) -> Result<Self, String> {
        let name = required("general.architecture", metadata.text("general.architecture"))?;
        Self::ALL.into_iter().find(|family| family.name() == name).ok_or_else(|| {
            let names = Self::ALL.map(|family| format!("`{}`", family.name())).join(", ");
            format!("general.architecture is `{}`; supported are {names}", name.escape_debug())
        })
    }
}

/// A GGUF file for [`QuantizedLm`](crate::QuantizedLm), before its weights are read. Its metadata and tensors are those of
/// its family, with shapes that agree.
pub struct QuantizedFile {
    pub(crate) path: PathBuf,
    pub(crate) shape: Shape,
    /// The checked metadata that the family needs, and the tensors, at offsets from the start of the file.
    pub(crate) content: Content,
    pub(crate) vocabulary: usize,
}

impl QuantizedFile {
    /// Reads the header, and checks everything that candle-transformers takes from it.
    ///
    /// # Errors
    /// Not a GGUF, another family, or contents that candle-transformers would not run as the model's authors do: a
    /// mixture of experts, scaled rotary positions, a tensor more or less.
    pub fn open(path: &Path) -> Result<Self> {
        let Header { metadata, tensors } = Header::read(&Source::open(path)?, path)?;
        let invalid = |message: String| Error::model(path, message);
        let metadata = Metadata(metadata);
        let family = QuantizedFamily::of(&metadata).map_err(invalid)?;
        let shape = Shape::read(family, &metadata).map_err(invalid)?;
        let vocabulary = match tensors.get(EMBEDDINGS).map(|location| &location.shape[..]) {
            Some(&[rows, width]) if width == shape.width && rows > 0 => rows,
            Some(other) => {
                let message = format!("tensor `{EMBEDDINGS}` has shape {other:?}, expected rows of {}", shape.width);
                return Err(invalid(message));
            }
            None => return Err(invalid(format!("tensor `{EMBEDDINGS}` is missing"))),
        };
        let mut expected = shape.tensors(vocabulary);
        if family != QuantizedFamily::Phi3 && !tensors.contains_key(OUTPUT) {
            expected.remove(OUTPUT);
        }
        if let Some(name) = expected.keys().find(|name| !tensors.contains_key(*name)) {
            return Err(invalid(format!("tensor `{name}` is missing")));
        }
        let mut infos = HashMap::new();
        for (name, location) in tensors {
            let of_tensor = |message: String| invalid(format!("tensor `{name}` {message}"));
            let Some(dims) = expected.get(&name) else {
                let message = format!("is not part of a {} in candle-transformers", family.name());
                return Err(of_tensor(message));
            };
            if location.shape != *dims {
                return Err(of_tensor(format!("has shape {:?}, expected {dims:?}", location.shape)));
            }
            let ggml_dtype = match &location.encoding {
                Encoding::F32 => GgmlDType::F32,
                Encoding::F16 => GgmlDType::F16,
                Encoding::Bf16 => GgmlDType::BF16,
                Encoding::Quantized(kind) => *kind,
                other => {
                    return Err(of_tensor(format!("is {}, expected {}", other.name(), header::SUPPORTED_TYPES)));
                }
            };
            infos.insert(name, TensorInfo { ggml_dtype, shape: location.shape.into(), offset: location.start });
        }
        let content = Content {
            magic: VersionedMagic::GgufV3,
            metadata: shape.metadata(),
            tensor_infos: infos,
            tensor_data_offset: 0,
        };
        Ok(Self { path: path.to_path_buf(), shape, content, vocabulary })
    }

    /// Number of tokens that the model has embeddings of.
    pub fn vocab_size(&self) -> usize {
        self.vocabulary
    }
}

const EMBEDDINGS: &str = "token_embd.weight";
const OUTPUT: &str = "output.weight";
const SLIDING_WINDOW: &str = "attention.sliding_window";

/// The sizes and settings of a model.
pub(crate) struct Shape {
    pub family: QuantizedFamily,
    pub width: usize,
    pub inner: usize,
    pub layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    /// Longest sequence, in tokens: the model's, and at most [`MAX_WINDOW`].
    pub window: usize,
    epsilon: f64,
    theta: Option<f64>,
}

impl Shape {
    /// Errors name a key that is missing, of another type, or set to a value that candle-transformers does not apply.
    fn read(family: QuantizedFamily, metadata: &Metadata) -> Result<Self, String> {
        use QuantizedFamily::{Phi3, Qwen3};
        let key = |name: &str| format!("{}.{name}", family.name());
        let size = |name: &str| match required(&key(name), metadata.count(&key(name)))? {
            0 => Err(format!("`{}` is 0", key(name))),
            size => Ok(size),
        };
        let positive = |name: &str| match metadata.float(&key(name))? {
            Some(value) if value <= 0.0 => Err(format!("`{}` is {value}, expected a positive number", key(name))),
            value => Ok(value),
        };
        if metadata.count(&key("expert_count"))?.unwrap_or(0) > 0 {
            return Err(format!("`{}` is set; mixtures of experts are not supported", key("expert_count")));
        }
        let unsupported = UNSUPPORTED.iter().filter(|name| family != Phi3 || **name != SLIDING_WINDOW);
        if let Some(key) = unsupported.map(|name| key(name)).find(|key| metadata.0.contains_key(key)) {
            return Err(format!("`{key}` is set; that is not supported"));
        }
        let scaling = metadata.text(&key(SCALING_TYPE))?.unwrap_or("none");
        let factors = ["rope.scaling.factor", "rope.scale_linear"].map(|name| metadata.float(&key(name)));
        if scaling != "none" || factors.iter().any(|factor| !matches!(factor, Ok(None | Some(0.0 | 1.0)))) {
            return Err("its rotary positions are scaled, which candle-transformers does not do".to_owned());
        }
        let (width, heads) = (size("embedding_length")?, size("attention.head_count")?);
        let kv_heads = match metadata.count(&key("attention.head_count_kv"))? {
            Some(0) => return Err(format!("`{}` is 0", key("attention.head_count_kv"))),
            given => given.unwrap_or(heads),
        };
        if !heads.is_multiple_of(kv_heads) {
            return Err(format!("{heads} heads cannot share {kv_heads} heads of keys and values"));
        }
        let given = metadata.count(&key("attention.key_length"))?;
        let head_dim = match given {
            Some(given) if family == Qwen3 => given,
            _ if width.is_multiple_of(heads) => width / heads,
            _ => return Err(format!("`{}` {width} is not a multiple of {heads} heads", key("embedding_length"))),
        };
        let values = metadata.count(&key("attention.value_length"))?.unwrap_or(head_dim);
        let rotated = metadata.count(&key("rope.dimension_count"))?.unwrap_or(head_dim);
        if head_dim == 0 || head_dim % 2 == 1 || [given.unwrap_or(head_dim), values, rotated] != [head_dim; 3] {
            let keys = given.unwrap_or(head_dim);
            return Err(format!(
                "heads of {keys} keys and {values} values, {rotated} of them rotated; only {head_dim} of each is supported, an \
                 even number"
            ));
        }
        let theta = positive("rope.freq_base")?;
        if family == Phi3 && theta.is_some_and(|theta| theta != 10_000.0) {
            return Err(format!("`{}` is not 10000, the only base of candle's phi3", key("rope.freq_base")));
        }
        let epsilon = "attention.layer_norm_rms_epsilon";
        // candle's Phi 3 has no sliding window, which is the same as one for sequences that fit it. 0 means none.
        let sliding = metadata.count(&key(SLIDING_WINDOW))?.filter(|window| *window > 0).unwrap_or(MAX_WINDOW);
        let window = size("context_length")?.min(MAX_WINDOW).min(sliding);
        Ok(Self {
            family,
            width,
            inner: size("feed_forward_length")?,
            layers: size("block_count")?,
            heads,
            kv_heads,
            head_dim,
            window,
            epsilon: required(&key(epsilon), positive(epsilon))?,
            // Qwen 3 has no other default in candle.
            theta: theta.or((family == Qwen3).then_some(10_000.0)),
        })
    }

    /// Shapes of the tensors, `[out, in]`, by name.
    fn tensors(&self, vocabulary: usize) -> BTreeMap<String, Vec<usize>> {
        use QuantizedFamily::{Phi3, Qwen2, Qwen3};
        let (width, inner, head) = (self.width, self.inner, self.head_dim);
        let (queries, keys) = (self.heads * head, self.kv_heads * head);
        let mut block = vec![
            ("attn_norm.weight", vec![width]),
            ("ffn_norm.weight", vec![width]),
            ("attn_output.weight", vec![width, queries]),
            ("ffn_down.weight", vec![width, inner]),
        ];
        if self.family == Phi3 {
            block.extend([
                ("attn_qkv.weight", vec![queries + 2 * keys, width]),
                ("ffn_up.weight", vec![2 * inner, width]),
            ]);
        } else {
            block.extend([
                ("attn_q.weight", vec![queries, width]),
                ("attn_k.weight", vec![keys, width]),
                ("attn_v.weight", vec![keys, width]),
                ("ffn_gate.weight", vec![inner, width]),
                ("ffn_up.weight", vec![inner, width]),
            ]);
        }
        if self.family == Qwen2 {
            block.extend([("attn_q.bias", vec![queries]), ("attn_k.bias", vec![keys]), ("attn_v.bias", vec![keys])]);
        }
        if self.family == Qwen3 {
            block.extend([("attn_q_norm.weight", vec![head]), ("attn_k_norm.weight", vec![head])]);
        }
        let whole = [
            (EMBEDDINGS, vec![vocabulary, width]),
            (OUTPUT, vec![vocabulary, width]),
            ("output_norm.weight", vec![width]),
        ];
        let whole = whole.into_iter().map(|(name, dims)| (name.to_owned(), dims));
        let of_layer = |layer| block.iter().map(move |(name, dims)| (format!("blk.{layer}.{name}"), dims.clone()));
        // A header lists fewer tensors than this, so that the first layer without any is reported.
        whole.chain((0..self.layers.min(header::MAX_ENTRIES as usize)).flat_map(of_layer)).collect()
    }

    /// What the family's constructor reads.
    fn metadata(&self) -> HashMap<String, Value> {
        let key = |name: &str| format!("{}.{name}", self.family.name());
        let counts = [
            ("attention.head_count", self.heads),
            ("attention.head_count_kv", self.kv_heads),
            ("attention.key_length", self.head_dim),
            ("block_count", self.layers),
            ("context_length", self.window),
            ("embedding_length", self.width),
            ("feed_forward_length", self.inner),
            ("rope.dimension_count", self.head_dim),
        ];
        // Counts fit an i32.
        let counts = counts.map(|(name, count)| (key(name), Value::U32(count as u32)));
        let floats = [("attention.layer_norm_rms_epsilon", Some(self.epsilon)), ("rope.freq_base", self.theta)];
        let floats = floats.into_iter().filter_map(|(name, value)| Some((key(name), Value::F32(value? as f32))));
        let architecture = ("general.architecture".to_owned(), Value::String(self.family.name().to_owned()));
        // F32: candle's Qwen 3 would otherwise compute rotary positions in f16, which does not tell apart those above 2,048.
        let dtype = ("general.dtype".to_owned(), Value::U32(0));
        counts.into_iter().chain(floats).chain([architecture, dtype]).collect()
    }
}
