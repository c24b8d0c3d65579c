//! A Llama's `config.json` from a GGUF file's metadata.

use serde_json::{Value, json};

use super::{Metadata, required};
use crate::io::encoding::Encoding;
use crate::io::{TensorLocation, TensorLocations, WeightFile};
use crate::model::families::rope::{frequencies, llama3_frequency};

/// Settings of some models that llama.cpp runs, behind the architecture's name. Each changes the model's output, and a
/// Llama has none of them.
pub(super) const UNSUPPORTED: [&str; 7] = [
    "attention.scale",
    "attention.sliding_window",
    "attn_logit_softcapping",
    "embedding_scale",
    "final_logit_softcapping",
    "logit_scale",
    "residual_scale",
];

/// The kind of scaling of rotary positions, behind the architecture's name.
pub(super) const SCALING_TYPE: &str = "rope.scaling.type";

/// The shape of a Llama, as llama.cpp defines it.
pub(super) struct LlamaShape {
    vocabulary: usize,
    width: usize,
    inner: usize,
    layers: usize,
    pub heads: usize,
    pub kv_heads: usize,
    pub head_dim: usize,
    positions: usize,
    epsilon: f64,
    theta: f64,
    scaling: Option<Value>,
    tied: bool,
    bos: Option<usize>,
    /// The ends of a text, of a turn and of a message.
    eos: Vec<usize>,
}

/// The tensor in which llama.cpp stores Llama 3.1's rotary scaling: the divisor of each frequency, `[head / 2]`.
pub(super) const DIVISORS: &str = "rope_freqs.weight";

/// Errors name a key that is missing, of another type, or set to a value of an unsupported model.
pub(super) fn read(
    metadata: &Metadata,
    tensors: &TensorLocations,
    divisors: Option<&[f32]>,
) -> Result<LlamaShape, String> {
    let architecture = required("general.architecture", metadata.text("general.architecture"))?;
    if architecture != "llama" {
        return Err(format!("general.architecture is `{}`; only `llama` is supported", architecture.escape_debug()));
    }
    let size = |key: &str| match required(key, metadata.count(key))? {
        0 => Err(format!("`{key}` is 0")),
        size => Ok(size),
    };
    if metadata.count("llama.expert_count")?.unwrap_or(0) > 0 {
        return Err("`llama.expert_count` is set; mixtures of experts are not supported".to_owned());
    }
    if let Some(key) = UNSUPPORTED.map(|name| format!("llama.{name}")).iter().find(|key| metadata.0.contains_key(*key))
    {
        return Err(format!("`{key}` is set; that is not supported"));
    }
    let (width, heads) = (size("llama.embedding_length")?, size("llama.attention.head_count")?);
    let kv_heads = match metadata.count("llama.attention.head_count_kv")? {
        Some(0) => return Err("`llama.attention.head_count_kv` is 0".to_owned()),
        given => given.unwrap_or(heads),
    };
    let head_dim = match metadata.count("llama.attention.key_length")? {
        Some(given) => given,
        None if width.is_multiple_of(heads) => width / heads,
        None => return Err(format!("llama.embedding_length {width} is not a multiple of {heads} heads")),
    };
    let rotated = metadata.count("llama.rope.dimension_count")?.unwrap_or(head_dim);
    let values = metadata.count("llama.attention.value_length")?.unwrap_or(head_dim);
    if head_dim == 0 || head_dim % 2 == 1 || rotated != head_dim || values != head_dim {
        return Err(format!(
            "heads of {head_dim} keys and {values} values, {rotated} of them rotated; only even and equal sizes are supported"
        ));
    }
    let positive = |key: &str, value: f64| {
        (value > 0.0).then_some(value).ok_or_else(|| format!("`{key}` is {value}, expected a positive number"))
    };
    let theta = metadata.float("llama.rope.freq_base")?.unwrap_or(10_000.0);
    let epsilon = "llama.attention.layer_norm_rms_epsilon";
    let vocabulary = match tensors.get("token_embd.weight").map(|location| &location.shape[..]) {
        Some(&[rows, columns]) if columns == width && rows > 0 && rows <= i32::MAX as usize => rows,
        Some(other) => return Err(format!("tensor `token_embd.weight` has shape {other:?}, expected rows of {width}")),
        None => return Err("tensor `token_embd.weight` is missing".to_owned()),
    };
    let token = |name: &str| {
        let key = format!("tokenizer.ggml.{name}_token_id");
        match metadata.token(&key)? {
            Some(id) if id >= vocabulary => {
                Err(format!("`{key}` is {id}, but the vocabulary has only {vocabulary} tokens"))
            }
            id => Ok(id),
        }
    };
    let theta = shortest(positive("llama.rope.freq_base", theta)?);
    let scaling = match (scaling(metadata)?, divisors.map(|given| llama3(given, head_dim, theta)).transpose()?) {
        (Some(_), Some(_)) => {
            return Err(format!("both `llama.rope.scaling.type` and tensor `{DIVISORS}` scale positions"));
        }
        (linear, divided) => linear.or(divided.flatten()),
    };
    Ok(LlamaShape {
        vocabulary,
        width,
        inner: size("llama.feed_forward_length")?,
        layers: size("llama.block_count")?,
        heads,
        kv_heads,
        head_dim,
        positions: size("llama.context_length")?,
        // The shortest decimals of the file's f32: 1e-5, not 9.999999747378752e-06.
        epsilon: shortest(positive(epsilon, required(epsilon, metadata.float(epsilon))?)?),
        theta,
        scaling,
        tied: !tensors.contains_key("output.weight"),
        bos: token("bos")?,
        eos: ["eos", "eot", "eom"].into_iter().filter_map(|name| token(name).transpose()).collect::<Result<_, _>>()?,
    })
}

impl LlamaShape {
    /// `config.json` as transformers writes it.
    pub fn json(&self) -> Value {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.positions,
            "rms_norm_eps": self.epsilon,
            "rope_theta": self.theta,
            "rope_scaling": self.scaling,
            "attention_bias": false,
            "mlp_bias": false,
            "tie_word_embeddings": self.tied,
            "bos_token_id": self.bos,
            "eos_token_id": match &self.eos[..] {
                [] => Value::Null,
                [id] => json!(id),
                several => json!(several),
            },
            "torch_dtype": "float32",
        })
    }
}

/// The values of [`DIVISORS`]. Errors: they are not f32.
pub(super) fn divisors(file: &WeightFile, location: &TensorLocation) -> Result<Vec<f32>, String> {
    if location.encoding != Encoding::F32 || location.shape.len() != 1 {
        let (kind, shape) = (location.encoding.name(), &location.shape);
        return Err(format!("tensor `{DIVISORS}` is {kind} of shape {shape:?}, expected a row of F32"));
    }
    file.decode(location).map_err(|e| e.to_string())
}

/// The `rope_scaling` of type `llama3` that gives these divisors; None if all are 1. Errors: no such scaling gives
/// them.
fn llama3(divisors: &[f32], head_dim: usize, theta: f64) -> Result<Option<Value>, String> {
    if divisors.len() != head_dim / 2 {
        return Err(format!("tensor `{DIVISORS}` has {} numbers, expected {}", divisors.len(), head_dim / 2));
    }
    let factor = f64::from(divisors.iter().copied().fold(1.0, f32::max));
    if divisors.iter().all(|&divisor| divisor == 1.0) {
        return Ok(None);
    }
    // Every published model has these bounds, and length 8192; another length that gives the same divisors serves as
    // well.
    const LOW: f64 = 1.0;
    const HIGH: f64 = 4.0;
    let plain = frequencies(theta, head_dim)?;
    let gives = |length: &u32| {
        let near = |(&frequency, &divisor): (&f32, &f32)| {
            let scaled = f64::from(llama3_frequency(frequency, factor, LOW, HIGH, f64::from(*length)));
            (f64::from(frequency) / scaled / f64::from(divisor) - 1.0).abs() < 1e-4
        };
        plain.iter().zip(divisors).all(near)
    };
    let length = std::iter::once(8192).chain((4..24).map(|power| 1 << power)).find(gives);
    let length =
        length.ok_or_else(|| format!("tensor `{DIVISORS}` is not a scaling of Llama 3's; others are not supported"))?;
    Ok(Some(json!({
        "rope_type": "llama3", "factor": shortest(factor), "low_freq_factor": LOW, "high_freq_factor": HIGH,
        "original_max_position_embeddings": length,
    })))
}

/// Hugging Face's `rope_scaling`. Errors: an unsupported type.
fn scaling(metadata: &Metadata) -> Result<Option<Value>, String> {
    let linear = |factor: f64| json!({ "rope_type": "linear", "factor": factor });
    match metadata.text("llama.rope.scaling.type")? {
        Some("none") => Ok(None),
        // Without a type, llama.cpp still scales by the factor, which also has an older name. 0 means none.
        None => {
            let factor = metadata.float("llama.rope.scaling.factor")?;
            let factor = factor.map_or_else(|| metadata.float("llama.rope.scale_linear"), |factor| Ok(Some(factor)))?;
            Ok(factor.map(shortest).filter(|&factor| factor != 0.0 && factor != 1.0).map(linear))
        }
        Some("linear") => {
            let key = "llama.rope.scaling.factor";
            let factor = shortest(required(key, metadata.float(key))?);
            if factor < 1.0 {
                return Err(format!("`{key}` is {factor}, expected at least 1"));
            }
            Ok(Some(linear(factor)))
        }
        Some(other) => {
            Err(format!("`llama.rope.scaling.type` is `{}`; only `linear` is supported", other.escape_debug()))
        }
    }
}

/// The f64 with the shortest decimals of an f32, if the value is an f32.
fn shortest(value: f64) -> f64 {
    let short = value as f32;
    if f64::from(short) == value { short.to_string().parse().unwrap_or(value) } else { value }
}
