//! Hand-made GGUF files, valid and malicious.

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};

use super::*;
use crate::io::check_gguf;

const U32: u32 = 4;
const F32: u32 = 6;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// A file in pieces, each of which a test can replace.
#[derive(Clone)]
struct GgufBuilder {
    entries: Vec<(String, Vec<u8>)>,
    tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

fn text(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

fn typed(kind: u32, value: &[u8]) -> Vec<u8> {
    [&kind.to_le_bytes()[..], value].concat()
}

fn number(value: u32) -> Vec<u8> {
    typed(U32, &value.to_le_bytes())
}

fn array(kind: u32, count: u64, items: &[u8]) -> Vec<u8> {
    typed(ARRAY, &[&kind.to_le_bytes()[..], &count.to_le_bytes(), items].concat())
}

fn texts(items: &[String]) -> Vec<u8> {
    array(TEXT, items.len() as u64, &items.iter().flat_map(|item| text(item)).collect::<Vec<_>>())
}

/// All letters of the byte-level alphabet, one merge, and a special token.
fn vocabulary() -> Vec<String> {
    let mut letters: Vec<String> =
        tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet().into_iter().map(String::from).collect();
    letters.sort_unstable();
    [vec!["<|endoftext|>".to_owned()], letters, vec!["he".to_owned()]].concat()
}

impl GgufBuilder {
    /// A Llama of one layer: width 32, two query heads of 16, one key/value head.
    fn llama() -> Self {
        let tokens = vocabulary();
        let mut types = vec![1i32; tokens.len()];
        types[0] = 3;
        let entry = |key: &str, value: Vec<u8>| (key.to_owned(), value);
        let entries = vec![
            entry("general.architecture", typed(TEXT, &text("llama"))),
            entry("llama.embedding_length", number(32)),
            entry("llama.feed_forward_length", number(64)),
            entry("llama.block_count", number(1)),
            entry("llama.context_length", number(128)),
            entry("llama.attention.head_count", number(2)),
            entry("llama.attention.head_count_kv", number(1)),
            entry("llama.attention.layer_norm_rms_epsilon", typed(F32, &1e-5f32.to_le_bytes())),
            entry("tokenizer.ggml.model", typed(TEXT, &text("gpt2"))),
            entry("tokenizer.ggml.pre", typed(TEXT, &text("smollm"))),
            entry("tokenizer.ggml.tokens", texts(&tokens)),
            entry(
                "tokenizer.ggml.token_type",
                array(5, tokens.len() as u64, &types.iter().flat_map(|t| t.to_le_bytes()).collect::<Vec<_>>()),
            ),
            entry("tokenizer.ggml.merges", texts(&["h e".to_owned()])),
            entry("tokenizer.ggml.scores", array(F32, 2, &[0; 8])),
            entry("tokenizer.ggml.eos_token_id", number(0)),
        ];
        let vocab = tokens.len() as u64;
        let tensors = [
            ("token_embd.weight", vec![32, vocab]),
            ("blk.0.attn_q.weight", vec![32, 32]),
            ("blk.0.attn_k.weight", vec![32, 16]),
            ("output_norm.weight", vec![32]),
        ]
        .into_iter()
        .map(|(name, dims)| {
            let count: u64 = dims.iter().product();
            let data = (0..count).flat_map(|i| (i as f32).to_le_bytes()).collect();
            (name.to_owned(), dims, 0, data)
        })
        .collect();
        Self { entries, tensors }
    }

    fn with(mut self, key: &str, value: Vec<u8>) -> Self {
        self.entries.retain(|(known, _)| known != key);
        self.entries.push((key.to_owned(), value));
        self
    }

    fn without(mut self, key: &str) -> Self {
        self.entries.retain(|(known, _)| known != key);
        self
    }

    fn with_tensor(mut self, name: &str, dims: &[u64], kind: u32, data: Vec<u8>) -> Self {
        self.tensors.push((name.to_owned(), dims.to_vec(), kind, data));
        self
    }

    fn head(&self) -> Vec<u8> {
        let mut out = b"GGUF\x03\0\0\0".to_vec();
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.entries.len() as u64).to_le_bytes());
        for (key, value) in &self.entries {
            out.extend(text(key));
            out.extend(value);
        }
        let mut offset = 0u64;
        for (name, dims, kind, data) in &self.tensors {
            out.extend(text(name));
            out.extend((dims.len() as u32).to_le_bytes());
            out.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += (data.len() as u64).next_multiple_of(32);
        }
        out
    }

    fn bytes(&self) -> Vec<u8> {
        let mut out = self.head();
        for (_, _, _, data) in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(data);
        }
        out
    }

    fn open(&self) -> Result<Gguf> {
        Gguf::parse(Path::new("model.gguf"), Source::from_memory(self.bytes()))
    }
}

#[track_caller]
fn assert_refused(bytes: &[u8], why: &str) {
    let message = check_gguf(bytes).expect_err("accepted").to_string();
    assert!(message.contains(why), "{message}");
}

fn values(file: &Gguf, name: &str) -> Vec<f32> {
    let shape = file.weights.shape(name).unwrap();
    file.weights.get(name, shape).unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn the_chat_template_comes_with_the_tokens_that_it_uses() {
    let file = GgufBuilder::llama().with("tokenizer.chat_template", typed(TEXT, &text("{{ messages }}")));
    let config = |file: &GgufBuilder| chat_config(&Source::from_memory(file.bytes()), Path::new("model.gguf"));
    let expected = |template: Option<&str>| serde_json::json!({ "bos_token": null, "eos_token": "<|endoftext|>", "chat_template": template });
    assert_eq!(config(&file).unwrap(), expected(Some("{{ messages }}")));
    assert_eq!(config(&GgufBuilder::llama()).unwrap(), expected(None));
}

#[test]
fn an_odd_chat_template_matters_only_to_those_who_want_it() {
    for (key, value, why) in [
        ("tokenizer.chat_template", number(3), "`tokenizer.chat_template` is not a string"),
        ("tokenizer.ggml.bos_token_id", number(999), "`tokenizer.ggml.bos_token_id` is 999, which is not a token"),
    ] {
        let file = GgufBuilder::llama().with("tokenizer.chat_template", typed(TEXT, &text("x"))).with(key, value);
        let error = chat_config(&Source::from_memory(file.bytes()), Path::new("model.gguf")).unwrap_err();
        assert!(error.to_string().contains(why), "{error}");
        if key == "tokenizer.chat_template" {
            file.open().map(drop).unwrap();
        }
    }
}

#[test]
fn a_llama_has_hugging_faces_names() {
    let file = GgufBuilder::llama().open().unwrap();
    let names: Vec<_> = file.weights.names().collect();
    assert_eq!(
        names,
        [
            "model.embed_tokens.weight",
            "model.layers.0.self_attn.k_proj.weight",
            "model.layers.0.self_attn.q_proj.weight",
            "model.norm.weight"
        ]
    );
    assert_eq!(file.weights.shape("model.embed_tokens.weight"), Some(&[258, 32][..]));
    let config = &file.config;
    for (key, value) in [
        ("model_type", serde_json::json!("llama")),
        ("vocab_size", 258.into()),
        ("num_key_value_heads", 1.into()),
        ("head_dim", 16.into()),
        ("rms_norm_eps", serde_json::json!(1e-5)),
        ("rope_theta", serde_json::json!(10000.0)),
        ("tie_word_embeddings", true.into()),
        ("eos_token_id", 0.into()),
        ("bos_token_id", serde_json::Value::Null),
    ] {
        assert_eq!(config[key], value, "{key}");
    }
    let untied =
        GgufBuilder::llama().with_tensor("output.weight", &[32, 258], 0, vec![0; 32 * 258 * 4]).open().unwrap();
    assert_eq!(untied.config["tie_word_embeddings"], false);
}

#[test]
fn a_rope_factor_applies_with_or_without_a_type() {
    let scaling = |entries: &[(&str, f32)]| {
        let file = entries
            .iter()
            .fold(GgufBuilder::llama(), |file, (key, value)| file.with(key, typed(F32, &value.to_le_bytes())));
        file.open().unwrap().config["rope_scaling"].clone()
    };
    let linear = serde_json::json!({ "rope_type": "linear", "factor": 4.0 });
    assert_eq!(scaling(&[("llama.rope.scaling.factor", 4.0)]), linear);
    assert_eq!(scaling(&[("llama.rope.scale_linear", 4.0)]), linear);
    for none in [0.0, 1.0] {
        assert_eq!(scaling(&[("llama.rope.scaling.factor", none)]), serde_json::Value::Null);
    }
}

/// The output of Hugging Face's converter for `llama3` scaling with heads of 16, theta 10000, a factor of 8 and Llama
/// 3.1's other numbers.
const LLAMA3_DIVISORS: [f32; 8] = [1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 4.681_482_3, 8.0];

fn divided(divisors: &[f32]) -> GgufBuilder {
    let data = divisors.iter().flat_map(|divisor| divisor.to_le_bytes()).collect();
    GgufBuilder::llama().with_tensor("rope_freqs.weight", &[divisors.len() as u64], 0, data)
}

#[test]
fn frequency_divisors_become_llama3_scaling() {
    let scaling = |divisors: &[f32]| divided(divisors).open().unwrap().config["rope_scaling"].clone();
    let llama3 = |factor: f64, length: u32| {
        serde_json::json!({ "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": length })
    };
    assert_eq!(scaling(&LLAMA3_DIVISORS), llama3(8.0, 8192));
    // A factor of 32 and a length of 64.
    let short = [1.0, 1.336_058_3, 26.843_077, 32.0, 32.0, 32.0, 32.0, 32.0];
    assert_eq!(scaling(&short), llama3(32.0, 64));
    assert_eq!(scaling(&[1.0; 8]), serde_json::Value::Null);
    assert!(!divided(&LLAMA3_DIVISORS).open().unwrap().weights.has("rope_freqs.weight"));
}

#[test]
fn all_end_tokens_of_the_file_become_eos() {
    let ids = |entries: &[(&str, Vec<u8>)]| {
        let without = GgufBuilder::llama().without("tokenizer.ggml.eos_token_id");
        let with = |file: GgufBuilder, (name, value): &(&str, Vec<u8>)| {
            file.with(&format!("tokenizer.ggml.{name}_token_id"), value.clone())
        };
        entries.iter().fold(without, with).open().unwrap().config["eos_token_id"].clone()
    };
    let minus_one = typed(5, &(-1i32).to_le_bytes());
    assert_eq!(ids(&[]), serde_json::Value::Null);
    assert_eq!(ids(&[("eot", number(3))]), 3);
    assert_eq!(ids(&[("eom", number(4)), ("eot", number(3)), ("eos", number(9))]), serde_json::json!([9, 3, 4]));
    assert_eq!(ids(&[("eos", minus_one), ("eot", number(u32::MAX)), ("eom", number(4))]), 4);
    let config = GgufBuilder::llama().with("tokenizer.ggml.bos_token_id", number(u32::MAX)).open().unwrap().config;
    assert_eq!(config["bos_token_id"], serde_json::Value::Null);
}

#[test]
fn bos_is_added_if_the_file_asks_for_it_or_is_llama_3s() {
    let bos_ids = |pre: &str, asks: Option<u8>| {
        let file = GgufBuilder::llama()
            .with("tokenizer.ggml.pre", typed(TEXT, &text(pre)))
            .with("tokenizer.ggml.bos_token_id", number(0));
        let file =
            asks.into_iter().fold(file, |file, asks| file.with("tokenizer.ggml.add_bos_token", typed(7, &[asks])));
        let tokenizer = file.open().unwrap().tokenizer.to_string();
        crate::Tokenizer::from_bytes(tokenizer.as_bytes()).unwrap().bos_ids().to_vec()
    };
    for (pre, asks, expected) in [
        ("gpt-2", None, &[][..]),
        ("smollm", Some(0), &[]),
        ("smollm", Some(1), &[0]),
        ("llama-bpe", None, &[0]),
        ("llama-bpe", Some(0), &[]),
    ] {
        assert_eq!(bos_ids(pre, asks), expected, "{pre} {asks:?}");
    }
}

#[test]
fn a_file_written_by_llama_cpp_is_read() {
    let bytes = include_bytes!("../../../fuzz/seeds/gguf/llama.gguf").to_vec();
    let file = Gguf::parse(Path::new("llama.gguf"), Source::from_memory(bytes)).unwrap();
    for name in file.weights.names() {
        assert!(values(&file, name).iter().any(|value| *value != 0.0), "{name}");
    }
}

#[test]
fn query_and_key_rows_are_deinterleaved() {
    // convert_hf_to_gguf does reshape(heads, 2, head / 2, in).swapaxes(1, 2). Row r of the file holds the values from
    // 32 r on.
    let file = GgufBuilder::llama().open().unwrap();
    for (name, heads) in [("q_proj", 2), ("k_proj", 1)] {
        let values = values(&file, &format!("model.layers.0.self_attn.{name}.weight"));
        let rows: Vec<usize> = values.chunks(32).map(|row| row[0] as usize / 32).collect();
        let expected: Vec<usize> = (0..heads)
            .flat_map(|head| (0..2).flat_map(move |half| (0..8).map(move |i| head * 16 + i * 2 + half)))
            .collect();
        assert_eq!(rows, expected, "{name}");
        assert!(values.chunks(32).all(|row| row.windows(2).all(|pair| pair[1] == pair[0] + 1.0)), "{name}");
    }
}

#[test]
fn quantised_tensors_equal_candles_dequantisation() {
    let source: Vec<f32> = (0..4 * 256).map(|i| ((i * 37 % 101) as f32 - 50.0) / 25.0).collect();
    let source = Tensor::from_vec(source, (4, 256), &Device::Cpu).unwrap();
    for (kind, code) in [
        (GgmlDType::Q4_0, 2),
        (GgmlDType::Q4_1, 3),
        (GgmlDType::Q5_0, 6),
        (GgmlDType::Q5_1, 7),
        (GgmlDType::Q8_0, 8),
        (GgmlDType::Q2K, 10),
        (GgmlDType::Q3K, 11),
        (GgmlDType::Q4K, 12),
        (GgmlDType::Q5K, 13),
        (GgmlDType::Q6K, 14),
    ] {
        let quantised = QTensor::quantize(&source, kind).unwrap();
        let data = quantised.data().unwrap().into_owned();
        let file = GgufBuilder::llama().with_tensor("blk.0.ffn_down.weight", &[256, 4], code, data).open().unwrap();
        let expected: Vec<f32> = quantised.dequantize(&Device::Cpu).unwrap().flatten_all().unwrap().to_vec1().unwrap();
        assert_eq!(values(&file, "model.layers.0.mlp.down_proj.weight"), expected, "{kind:?}");
    }
}

#[test]
fn the_tokenizer_uses_the_files_split_pattern() {
    let encode = |pre: &str| {
        let file = GgufBuilder::llama().with("tokenizer.ggml.pre", typed(TEXT, &text(pre))).open().unwrap();
        let tokenizer = tokenizers::Tokenizer::from_bytes(file.tokenizer.to_string()).unwrap();
        let encoding = tokenizer.encode("hehe 12<|endoftext|>", false).unwrap();
        encoding.get_tokens().to_vec()
    };
    for pre in ["gpt-2", "smollm", "llama-bpe"] {
        assert_eq!(encode(pre), ["he", "he", "Ġ", "1", "2", "<|endoftext|>"], "{pre}");
    }
    assert_refused(
        &GgufBuilder::llama().with("tokenizer.ggml.pre", typed(TEXT, &text("qwen2"))).bytes(),
        "`qwen2`; only",
    );
    assert_refused(
        &GgufBuilder::llama().with("tokenizer.ggml.model", typed(TEXT, &text("llama"))).bytes(),
        "`llama`; only `gpt2`",
    );
}

#[test]
fn an_unsupported_model_is_refused_with_the_reason() {
    let llama = GgufBuilder::llama;
    for (file, why) in [
        (llama().with("general.architecture", typed(TEXT, &text("mamba"))), "general.architecture is `mamba`"),
        (llama().without("general.architecture"), "`general.architecture` is missing"),
        (llama().without("llama.block_count"), "`llama.block_count` is missing"),
        (llama().with("llama.block_count", number(0)), "`llama.block_count` is 0"),
        (llama().with("llama.block_count", typed(TEXT, &text("1"))), "`llama.block_count` is not a number"),
        (llama().with("llama.attention.head_count", number(0)), "`llama.attention.head_count` is 0"),
        (llama().with("llama.attention.head_count_kv", number(0)), "`llama.attention.head_count_kv` is 0"),
        (llama().with("llama.attention.head_count", number(u32::MAX)), "not a number from 0 to 2^31"),
        (llama().with("llama.attention.head_count", number(3)), "not a multiple of 3 heads"),
        (llama().with("llama.attention.head_count", number(32)), "only even and equal sizes"),
        (llama().with("llama.attention.head_count", number(1)), "expected 1 heads of 32 rows"),
        (llama().with("llama.rope.dimension_count", number(8)), "8 of them rotated"),
        (llama().with("llama.expert_count", number(8)), "mixtures of experts"),
        (llama().with("llama.logit_scale", typed(F32, &0.5f32.to_le_bytes())), "`llama.logit_scale` is set"),
        (llama().with("llama.attention.sliding_window", number(8)), "`llama.attention.sliding_window` is set"),
        (llama().with("llama.rope.scaling.type", typed(TEXT, &text("yarn"))), "is `yarn`; only `linear`"),
        (llama().with("llama.rope.freq_base", typed(F32, &f32::NAN.to_le_bytes())), "not a finite number"),
        (llama().with("llama.rope.freq_base", typed(F32, &(-1f32).to_le_bytes())), "expected a positive number"),
        (llama().with("tokenizer.ggml.eos_token_id", number(258)), "the vocabulary has only 258"),
        (llama().with("tokenizer.ggml.merges", texts(&["he h".into()])), "`he h`, which is not two tokens"),
        (llama().with("tokenizer.ggml.tokens", texts(&["a".into(), "a".into()])), "258 entries for 2 tokens"),
        (llama().with("tokenizer.ggml.tokens", texts(&vec!["a".into(); 258])), "has `a` twice"),
        (
            llama().with_tensor("rope_freqs.weight", &[8], 0, vec![0; 32]),
            "`rope_freqs.weight` is not a scaling of Llama 3's",
        ),
        (
            llama().with_tensor("rope_freqs.weight", &[4], 0, vec![0; 16]),
            "`rope_freqs.weight` has 4 numbers, expected 8",
        ),
        (llama().with_tensor("rope_freqs.weight", &[8], 1, vec![0; 16]), "`rope_freqs.weight` is F16 of shape [8]"),
        (
            divided(&LLAMA3_DIVISORS).with("llama.rope.scaling.factor", typed(F32, &4f32.to_le_bytes())),
            "both `llama.rope.scaling.type` and tensor `rope_freqs.weight`",
        ),
        (llama().with("tokenizer.ggml.eot_token_id", number(258)), "`tokenizer.ggml.eot_token_id` is 258"),
        (llama().with("tokenizer.ggml.add_bos_token", typed(7, &[1])), "`tokenizer.ggml.bos_token_id` is missing"),
        (llama().with_tensor("blk.00.attn_v.weight", &[32, 16], 0, vec![0; 2048]), "not part of a Llama"),
        (
            llama().with_tensor("blk.0.attn_v.weight", &[32, 16], 16, vec![0; 64]),
            "is IQ2_XXS (ggml's type 16), expected F32, F16, BF16, Q4_0",
        ),
        (
            llama().with_tensor("blk.0.attn_v.weight", &[32, 16], 99, vec![0; 64]),
            "is ggml's type 99, expected F32, F16",
        ),
    ] {
        assert_refused(&file.bytes(), why);
    }
}

#[test]
fn absurd_counts_are_refused_before_anything_is_allocated() {
    let head = |tensors: u64, entries: u64| {
        [b"GGUF\x03\0\0\0".to_vec(), tensors.to_le_bytes().to_vec(), entries.to_le_bytes().to_vec(), vec![0; 64]]
            .concat()
    };
    assert_refused(&head(u64::MAX, 0), "18446744073709551615 tensors");
    assert_refused(&head(0, u64::MAX), "18446744073709551615 metadata entries");
    assert_refused(&head(4, 0), "4 tensors in 64 bytes");
    let entry = |value: Vec<u8>| [head(0, 1)[..24].to_vec(), text("k"), value, vec![0; 64]].concat();
    for (value, why) in [
        (typed(TEXT, &u64::MAX.to_le_bytes()), "string of 18446744073709551615 bytes"),
        (typed(TEXT, &(1u64 << 40).to_le_bytes()), "string of 1099511627776 bytes"),
        (array(TEXT, u64::MAX, &[]), "array of 18446744073709551615"),
        (array(U32, u64::MAX / 4, &[]), "the file has only"),
        (array(5, 17, &[]), "the file has only 64 more"),
        (array(ARRAY, 1, &array(ARRAY, 1, &[])), "array of arrays"),
        (array(99, 1, &[]), "array of the unknown type 99"),
        (typed(77, &[]), "has the unknown type 77"),
        (typed(7, &[2]), "a boolean of 2"),
        (typed(TEXT, &[1, 0, 0, 0, 0, 0, 0, 0, 0xff]), "not UTF-8"),
    ] {
        assert_refused(&entry(value), why);
    }
    let mut key = head(0, 1)[..24].to_vec();
    key.extend(u64::MAX.to_le_bytes());
    key.extend([0; 64]);
    assert_refused(&key, "string of 18446744073709551615 bytes");
}

#[test]
fn too_many_strings_are_refused() {
    let many = array(TEXT, (1 << 20) + 1, &vec![0; 8 * ((1 << 20) + 1)]);
    assert_refused(
        &GgufBuilder::llama().with("tokenizer.ggml.merges", many).bytes(),
        "1048577 strings; at most 1048576",
    );
}

#[test]
fn a_tensor_with_an_impossible_location_is_refused() {
    let name = "blk.0.attn_v.weight";
    for (dims, kind, why) in [
        (&[u64::MAX, u64::MAX][..], 0, "too large"),
        (&[1 << 40, 1 << 40], 0, "too large"),
        (&[1 << 40], 0, "truncated"),
        (&[33], 8, "not a whole number of blocks"),
        (&[16, 2], 8, "blocks of 32"),
        (&[1; 5], 0, "5 dimensions"),
        (&[32, 17], 0, "truncated"),
    ] {
        assert_refused(&GgufBuilder::llama().with_tensor(name, dims, kind, vec![0; 2048]).bytes(), why);
    }
    // The last tensor's offset ends the header.
    let file = GgufBuilder::llama();
    for (offset, why) in
        [(u64::MAX - 31, "beyond the end of any file"), (1 << 40, "truncated"), (7, "not aligned to 32")]
    {
        let mut bytes = file.bytes();
        let at = file.head().len() - 8;
        bytes[at..at + 8].copy_from_slice(&offset.to_le_bytes());
        assert_refused(&bytes, why);
    }
    let doubled = GgufBuilder::llama().with_tensor("output_norm.weight", &[32], 0, vec![0; 128]);
    assert_refused(&doubled.bytes(), "tensor `output_norm.weight` is listed twice");
}

#[test]
fn an_inconsistent_header_is_refused() {
    for alignment in [0, 1, 24, 1 << 21, u32::MAX] {
        assert_refused(
            &GgufBuilder::llama().with("general.alignment", number(alignment)).bytes(),
            "expected a power of two",
        );
    }
    let mut twice = GgufBuilder::llama();
    twice.entries.push(("general.architecture".to_owned(), typed(TEXT, &text("llama"))));
    assert_refused(&twice.bytes(), "`general.architecture` is listed twice");
    let mut version = GgufBuilder::llama().bytes();
    version[4..8].copy_from_slice(&3u32.to_be_bytes());
    assert_refused(&version, "expected 2 or 3, little-endian");
    assert_refused(b"GGML\0\0\0\0", "does not begin with `GGUF`");
}

#[test]
fn a_truncated_gguf_file_is_refused_at_any_length() {
    let whole = GgufBuilder::llama().bytes();
    for sixteenth in 0..16 {
        check_gguf(&whole[..whole.len() * sixteenth / 16]).unwrap_err();
    }
    for len in 0..GgufBuilder::llama().head().len() {
        Gguf::parse(Path::new("cut"), Source::from_memory(whole[..len].to_vec())).err().expect("accepted");
    }
    check_gguf(&whole).unwrap();
}
