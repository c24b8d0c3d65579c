//! A Llama's `config.json` from a GGUF file's metadata; knows no weights but their shapes.

use serde_json::{Value, json};

use super::{Metadata, required};
use crate::files::Places;

/// What other models that llama.cpp runs have and a Llama has not: each changes the numbers.
const UNSUPPORTED: [&str; 5] = [
    "llama.attention.scale",
    "llama.attention.sliding_window",
    "llama.embedding_scale",
    "llama.logit_scale",
    "llama.residual_scale",
];

/// The shape of a Llama, under llama.cpp's meanings.
pub(super) struct Llama {
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
    eos: Option<usize>,
}

/// Errors name the key: missing, of another type, or of no Llama that is read.
pub(super) fn read(metadata: &Metadata, tensors: &Places) -> Result<Llama, String> {
    let architecture = required("general.architecture", metadata.text("general.architecture"))?;
    if architecture != "llama" {
        return Err(format!("general.architecture is `{}`; only `llama` is read", architecture.escape_debug()));
    }
    let size = |key: &str| match required(key, metadata.count(key))? {
        0 => Err(format!("`{key}` is 0")),
        size => Ok(size),
    };
    if metadata.count("llama.expert_count")?.unwrap_or(0) > 0 {
        return Err("`llama.expert_count` is set; mixtures of experts are not read".to_owned());
    }
    if let Some(key) = UNSUPPORTED.iter().find(|key| metadata.0.contains_key(**key)) {
        return Err(format!("`{key}` is set; that is not read"));
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
            "heads of {head_dim} keys and {values} values, {rotated} of them rotated; only even and equal ones are read"
        ));
    }
    let positive = |key: &str, value: f64| {
        (value > 0.0).then_some(value).ok_or_else(|| format!("`{key}` is {value}; expected a positive number"))
    };
    let theta = metadata.float("llama.rope.freq_base")?.unwrap_or(10_000.0);
    let epsilon = "llama.attention.layer_norm_rms_epsilon";
    let vocabulary = match tensors.get("token_embd.weight").map(|place| &place.shape[..]) {
        Some(&[rows, columns]) if columns == width && rows > 0 && rows <= i32::MAX as usize => rows,
        Some(other) => return Err(format!("tensor `token_embd.weight` has shape {other:?}; expected rows of {width}")),
        None => return Err("tensor `token_embd.weight` is missing".to_owned()),
    };
    let token = |key: &str| match metadata.count(key)? {
        Some(id) if id >= vocabulary => Err(format!("`{key}` is {id}; the vocabulary has only {vocabulary}")),
        id => Ok(id),
    };
    Ok(Llama {
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
        theta: shortest(positive("llama.rope.freq_base", theta)?),
        scaling: scaling(metadata)?,
        tied: !tensors.contains_key("output.weight"),
        bos: token("tokenizer.ggml.bos_token_id")?,
        eos: token("tokenizer.ggml.eos_token_id")?,
    })
}

impl Llama {
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
            "eos_token_id": self.eos,
            "torch_dtype": "float32",
        })
    }
}

/// Hugging Face's `rope_scaling`. Errors: a kind that is not read. Llama 3.1 keeps its own in a tensor, `rope_freqs`,
/// which is refused by that name.
fn scaling(metadata: &Metadata) -> Result<Option<Value>, String> {
    let linear = |factor: f64| json!({ "rope_type": "linear", "factor": factor });
    match metadata.text("llama.rope.scaling.type")? {
        Some("none") => Ok(None),
        // llama.cpp scales by a factor of which no type is told, too, and knows it by an older name. 0 stands for none.
        None => {
            let factor = metadata.float("llama.rope.scaling.factor")?;
            let factor = factor.map_or_else(|| metadata.float("llama.rope.scale_linear"), |factor| Ok(Some(factor)))?;
            Ok(factor.map(shortest).filter(|&factor| factor != 0.0 && factor != 1.0).map(linear))
        }
        Some("linear") => {
            let key = "llama.rope.scaling.factor";
            let factor = shortest(required(key, metadata.float(key))?);
            if factor < 1.0 {
                return Err(format!("`{key}` is {factor}; expected at least 1"));
            }
            Ok(Some(linear(factor)))
        }
        Some(other) => Err(format!("`llama.rope.scaling.type` is `{}`; only `linear` is read", other.escape_debug())),
    }
}

/// The f64 with an f32's shortest decimals, if the value is an f32.
fn shortest(value: f64) -> f64 {
    let short = value as f32;
    if f64::from(short) == value { short.to_string().parse().unwrap_or(value) } else { value }
}
