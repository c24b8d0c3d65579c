//! Writes the weights of a Llama or Qwen3 as a GGUF file of each family that has the same blocks.

use std::collections::BTreeMap;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use lm::io::Checkpoint;
use lm::{CausalLm, LlamaConfig, ModelConfig, WeightType};

/// Names of a layer's modules in Hugging Face's files and in GGUF.
const MODULES: [(&str, &str); 11] = [
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("self_attn.q_norm", "attn_q_norm"),
    ("self_attn.k_norm", "attn_k_norm"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.up_proj", "ffn_up"),
    ("mlp.down_proj", "ffn_down"),
];

/// A GGUF file in pieces, each of which a test can replace.
pub struct GgufFile {
    pub metadata: BTreeMap<String, Value>,
    pub tensors: BTreeMap<String, Tensor>,
    /// The type of all matrices; vectors are F32.
    pub matrices: GgmlDType,
}

impl GgufFile {
    pub fn write(&self, path: &Path) {
        let quantised = |tensor: &Tensor| {
            let kind = if tensor.rank() == 2 { self.matrices } else { GgmlDType::F32 };
            QTensor::quantize(tensor, kind).unwrap()
        };
        let tensors: Vec<_> = self.tensors.iter().map(|(name, tensor)| (name.as_str(), quantised(tensor))).collect();
        let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (*name, tensor)).collect();
        let metadata: Vec<_> = self.metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        gguf_file::write(&mut std::fs::File::create(path).unwrap(), &metadata, &tensors).unwrap();
    }

    pub fn architecture(&self) -> &str {
        self.metadata["general.architecture"].to_string().unwrap()
    }

    /// Sets a number in the metadata, behind the architecture's name.
    pub fn set(&mut self, architecture: &str, name: &str, value: Value) {
        self.metadata.insert(format!("{architecture}.{name}"), value);
    }

    /// A model's file with the metadata of an architecture and a byte-level tokenizer. The tensors have the names of a
    /// Llama, in Hugging Face's row order.
    fn new(model: &CausalLm, architecture: &str) -> Self {
        let config = match model.config() {
            ModelConfig::Llama(config) => config,
            ModelConfig::Qwen3(config) => &config.llama,
            _ => panic!("a Llama or Qwen3"),
        };
        let folder = tempfile::tempdir().unwrap();
        model.save(folder.path(), WeightType::F32).unwrap();
        let file = Checkpoint::open(folder.path()).unwrap();
        let tensors = file.names().map(|name| (gguf_name(name), file.get(name, file.shape(name).unwrap()).unwrap()));
        let mut gguf =
            Self { metadata: metadata(config, architecture), tensors: tensors.collect(), matrices: GgmlDType::F32 };
        gguf.metadata.extend(tokenizer(config.vocab_size));
        gguf
    }

    /// A Llama: rows of queries and keys in llama.cpp's order.
    pub fn llama(model: &CausalLm) -> Self {
        let mut file = Self::new(model, "llama");
        let head_dim = model.config().width() / 4;
        for (name, tensor) in &mut file.tensors {
            if name.contains("attn_q") || name.contains("attn_k") {
                let (rows, columns) = tensor.dims2().unwrap();
                let halves = tensor.reshape((rows / head_dim, 2, head_dim / 2, columns)).unwrap();
                *tensor = halves.transpose(1, 2).unwrap().contiguous().unwrap().reshape((rows, columns)).unwrap();
            }
        }
        file
    }

    /// A Qwen2: a Llama with biases, here of 0.
    pub fn qwen2(model: &CausalLm) -> Self {
        let mut file = Self::new(model, "qwen2");
        let biases =
            file.tensors.iter().filter(|(name, _)| ["attn_q", "attn_k", "attn_v"].iter().any(|m| name.contains(m)));
        let zeros = |rows: usize| Tensor::zeros(rows, candle_core::DType::F32, &Device::Cpu).unwrap();
        let biases = biases.map(|(name, tensor)| (name.replace("weight", "bias"), zeros(tensor.dims()[0])));
        let biases: Vec<_> = biases.collect();
        file.tensors.extend(biases);
        file
    }

    pub fn qwen3(model: &CausalLm) -> Self {
        Self::new(model, "qwen3")
    }

    /// A Phi 3: a Llama with joined matrices.
    pub fn phi3(model: &CausalLm) -> Self {
        let mut file = Self::new(model, "phi3");
        for layer in 0..2 {
            for (parts, whole) in
                [(&["attn_q", "attn_k", "attn_v"][..], "attn_qkv"), (&["ffn_gate", "ffn_up"], "ffn_up")]
            {
                let mut take = |part: &&str| file.tensors.remove(&format!("blk.{layer}.{part}.weight")).unwrap();
                let parts: Vec<Tensor> = parts.iter().map(&mut take).collect();
                file.tensors.insert(format!("blk.{layer}.{whole}.weight"), Tensor::cat(&parts, 0).unwrap());
            }
        }
        file
    }
}

fn gguf_name(name: &str) -> String {
    match name {
        "model.embed_tokens.weight" => "token_embd.weight".to_owned(),
        "model.norm.weight" => "output_norm.weight".to_owned(),
        "lm_head.weight" => "output.weight".to_owned(),
        _ => {
            let (layer, module) = name.strip_prefix("model.layers.").unwrap().split_once('.').unwrap();
            let module = module.strip_suffix(".weight").unwrap();
            let (_, module) = MODULES.iter().find(|(theirs, _)| *theirs == module).unwrap();
            format!("blk.{layer}.{module}.weight")
        }
    }
}

fn metadata(config: &LlamaConfig, architecture: &str) -> BTreeMap<String, Value> {
    let head_dim = config.head_dim.unwrap_or(config.hidden_size / config.num_attention_heads);
    let counts = [
        ("block_count", config.num_hidden_layers),
        ("context_length", config.max_position_embeddings),
        ("embedding_length", config.hidden_size),
        ("feed_forward_length", config.intermediate_size),
        ("attention.head_count", config.num_attention_heads),
        ("attention.head_count_kv", config.num_key_value_heads.unwrap()),
        ("attention.key_length", head_dim),
        ("attention.value_length", head_dim),
        ("rope.dimension_count", head_dim),
    ];
    let counts = counts.map(|(name, count)| (format!("{architecture}.{name}"), Value::U32(count as u32)));
    let name = ("general.architecture".to_owned(), Value::String(architecture.to_owned()));
    let epsilon = (format!("{architecture}.attention.layer_norm_rms_epsilon"), Value::F32(config.rms_norm_eps as f32));
    counts.into_iter().chain([name, epsilon]).collect()
}

/// A byte-level BPE without merges, as `lm` demands of a Llama's file.
fn tokenizer(vocabulary: usize) -> Vec<(String, Value)> {
    let letters = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().map(String::from);
    let mut tokens: Vec<String> = letters.collect();
    tokens.sort_unstable();
    tokens.push("ab".to_owned());
    let more = (tokens.len() + 1..vocabulary).map(|i| format!("<unused{i}>"));
    let tokens: Vec<String> = ["<|endoftext|>".to_owned()].into_iter().chain(tokens).chain(more).collect();
    let types = (0..tokens.len()).map(|i| Value::I32(if i == 0 { 3 } else { 1 })).collect();
    let text = |text: &str| Value::String(text.to_owned());
    let fields = [
        ("model", text("gpt2")),
        ("pre", text("gpt-2")),
        ("token_type", Value::Array(types)),
        ("tokens", Value::Array(tokens.iter().map(|token| text(token)).collect())),
        ("merges", Value::Array(vec![text("a b")])),
        ("eos_token_id", Value::U32(0)),
    ];
    fields.into_iter().map(|(name, value)| (format!("tokenizer.ggml.{name}"), value)).collect()
}
