//! Models with quantised weights against `lm`'s own, and files that are not what they say.

mod common;

use std::path::Path;
use std::process::Command;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use candle_core::{DType, Device, Tensor};
use common::gguf::GgufFile;
use common::*;
use lm::{Batch, CausalLm, InitStd, ModelConfig, QuantizedFile, QuantizedLm, Sequence, StatOptions};

/// A random model of two layers: heads of 16 in a width of 64.
fn tiny(model_type: &str, head_dim: usize, theta: f64) -> CausalLm {
    with_kv_heads(2, model_type, head_dim, theta)
}

fn with_kv_heads(kv_heads: usize, model_type: &str, head_dim: usize, theta: f64) -> CausalLm {
    let config = serde_json::json!({
        "model_type": model_type, "vocab_size": 288, "max_position_embeddings": 64, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": kv_heads,
        "head_dim": head_dim, "rms_norm_eps": 1e-5, "rope_theta": theta, "eos_token_id": EOS,
    });
    let lm = CausalLm::init(ModelConfig::from_json(config).unwrap(), InitStd::Fixed(0.1), &mut rng(5)).unwrap();
    let lm = lm.with_full_training().unwrap();
    // Norms too. Of the usual size, so that no softmax is all but one-hot.
    randomise(&lm.variables(), 0.1, 6);
    lm.frozen()
}

fn llama() -> CausalLm {
    tiny("llama", 16, 10_000.0)
}

fn ids() -> Vec<u32> {
    (0..40).map(|i| (i * 37 + 11) % 288).collect()
}

/// The log-probability of each token of [`ids`] after the first.
fn expected(model: &CausalLm) -> Vec<f32> {
    let ids = ids();
    let rows = [Sequence::new(&ids[..1], &ids[1..])];
    let batch = Batch::new(&refs(&rows)).unwrap();
    let options = StatOptions { min_new_tokens: 0, eos: EOS.into(), entropy: false };
    let hidden = model.hidden_for_responses(&batch, None).unwrap();
    floats(&model.token_stats(&hidden, &batch, &options).unwrap().logprob)
}

/// The same from a GGUF file.
fn found(file: &GgufFile) -> Vec<f32> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    file.write(&path);
    let mut model = QuantizedLm::load(&path).unwrap();
    assert_eq!((model.window(), model.vocab_size()), (64, 288));
    let ids = ids();
    // Most lengths are fed in parts, and `lm` has all tokens in one pass.
    (1..ids.len()).map(|n| model.next_logprobs(&ids[..n]).unwrap()[ids[n] as usize]).collect()
}

#[test]
fn each_family_gives_the_log_probabilities_of_lms_model_with_the_same_weights() {
    let (llama, qwen3) = (llama(), tiny("qwen3", 24, 500.0));
    let unshared = with_kv_heads(4, "llama", 16, 10_000.0);
    let theta = |mut file: GgufFile| {
        file.set("qwen3", "rope.freq_base", Value::F32(500.0));
        file
    };
    for (name, file, model) in [
        ("llama", GgufFile::llama(&llama), &llama),
        ("qwen2", GgufFile::qwen2(&llama), &llama),
        ("phi3", GgufFile::phi3(&llama), &llama),
        ("phi3, as many keys as queries", GgufFile::phi3(&unshared), &unshared),
        ("qwen3", theta(GgufFile::qwen3(&qwen3)), &qwen3),
    ] {
        let (found, expected) = (found(&file), expected(model));
        let furthest = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(furthest < 1e-4, "{name}: {furthest}");
    }
}

#[test]
fn one_quantised_file_is_nearly_the_same_model_with_quantised_and_dequantised_products() {
    let mut file = GgufFile::llama(&llama());
    for matrices in [GgmlDType::Q8_0, GgmlDType::Q4_0] {
        file.matrices = matrices;
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        file.write(&path);
        let (found, expected) = (found(&file), expected(&CausalLm::load(&path).unwrap()));
        let furthest = found.iter().zip(&expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(furthest < 0.05 && furthest > 0.0, "{matrices:?}: {furthest}");
    }
}

#[test]
fn a_call_forgets_those_before_it() {
    let (llama, qwen3) = (llama(), tiny("qwen3", 24, 10_000.0));
    let files = [GgufFile::llama(&llama), GgufFile::qwen2(&llama), GgufFile::phi3(&llama), GgufFile::qwen3(&qwen3)];
    for file in files {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        file.write(&path);
        let mut model = QuantizedLm::load(&path).unwrap();
        let first = model.next_logprobs(&ids()[..20]).unwrap();
        model.next_logprobs(&ids()).unwrap();
        model.next_logprobs(&ids()[..1]).unwrap();
        assert_eq!(model.next_logprobs(&ids()[..20]).unwrap(), first, "{}", file.architecture());
        let sum: f64 = first.iter().map(|p| f64::from(*p).exp()).sum();
        assert!(first.len() == 288 && (sum - 1.0).abs() < 1e-5, "{}: {sum}", file.architecture());
    }
}

#[test]
fn impossible_prompts_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    GgufFile::llama(&llama()).write(&path);
    let mut model = QuantizedLm::load(&path).unwrap();
    for (ids, why) in [
        (vec![], "0 tokens, expected 1 to 64"),
        (vec![1; 65], "65 tokens, expected 1 to 64"),
        (vec![288], "id 288 is above the vocabulary of 288"),
    ] {
        let error = model.next_logprobs(&ids).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
}

#[test]
fn a_file_that_candle_would_run_wrongly_is_refused_with_the_reason() {
    let (llama, qwen3) = (llama(), tiny("qwen3", 24, 10_000.0));
    let refusal = |file: &GgufFile| {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        file.write(&path);
        let error = QuantizedFile::open(&path).map(drop).unwrap_err().to_string();
        assert_eq!(error, QuantizedLm::load(&path).map(drop).unwrap_err().to_string());
        error
    };
    let text = |text: &str| Value::String(text.to_owned());
    for (name, value, why) in [
        ("attention.head_count", Value::U32(0), "`llama.attention.head_count` is 0"),
        ("attention.head_count", Value::U32(u32::MAX), "not a number from 0 to 2^31"),
        ("attention.head_count", Value::U32(3), "3 heads cannot share 2"),
        ("attention.head_count", text("4"), "`llama.attention.head_count` is not a number"),
        ("attention.head_count_kv", Value::U32(0), "`llama.attention.head_count_kv` is 0"),
        ("attention.head_count_kv", Value::U32(4), "has shape [32, 64], expected [64, 64]"),
        ("attention.key_length", Value::U32(8), "heads of 8 keys and 16 values, 16 of them rotated; only 16"),
        ("rope.dimension_count", Value::U32(8), "8 of them rotated"),
        ("block_count", Value::U32(0), "`llama.block_count` is 0"),
        ("block_count", Value::U32(1), "tensor `blk.1.attn_k.weight` is not part of a llama"),
        ("block_count", Value::U32(3), "tensor `blk.2.attn_k.weight` is missing"),
        ("block_count", Value::U32(i32::MAX as u32), "tensor `blk.10.attn_k.weight` is missing"),
        ("embedding_length", Value::U32(32), "only 8 of each is supported"),
        ("feed_forward_length", Value::U32(64), "expected [64, 64]"),
        ("context_length", Value::U32(0), "`llama.context_length` is 0"),
        ("expert_count", Value::U32(8), "mixtures of experts"),
        ("attention.sliding_window", Value::U32(8), "`llama.attention.sliding_window` is set"),
        ("logit_scale", Value::F32(0.5), "`llama.logit_scale` is set"),
        ("rope.freq_base", Value::F32(-1.0), "expected a positive number"),
        ("rope.scaling.type", text("yarn"), "rotary positions are scaled"),
        ("rope.scaling.factor", Value::F32(8.0), "rotary positions are scaled"),
        ("attention.layer_norm_rms_epsilon", Value::F32(f32::NAN), "not a finite number"),
    ] {
        let mut file = GgufFile::llama(&llama);
        file.set("llama", name, value);
        let error = refusal(&file);
        assert!(error.contains(why), "{name}: {error}");
    }
    let vector = |n: usize| Tensor::ones(n, DType::F32, &Device::Cpu).unwrap();
    for (file, name, tensor, why) in [
        (GgufFile::llama(&llama), "rope_freqs.weight", vector(8), "`rope_freqs.weight` is not part of a llama"),
        (GgufFile::llama(&llama), "blk.0.attn_q.bias", vector(64), "`blk.0.attn_q.bias` is not part of a llama"),
        (GgufFile::llama(&llama), "output_norm.weight", vector(1), "has shape [1], expected [64]"),
        (GgufFile::qwen2(&llama), "blk.1.attn_q.bias", vector(63), "has shape [63], expected [64]"),
        (GgufFile::qwen3(&qwen3), "blk.1.attn_q_norm.weight", vector(64), "has shape [64], expected [24]"),
    ] {
        let mut file = file;
        file.tensors.insert(name.to_owned(), tensor);
        let error = refusal(&file);
        assert!(error.contains(why), "{name}: {error}");
    }
    let mut phi3 = GgufFile::phi3(&llama);
    phi3.tensors.remove("output.weight");
    assert!(refusal(&phi3).contains("tensor `output.weight` is missing"));
    let mut phi3 = GgufFile::phi3(&llama);
    phi3.set("phi3", "rope.freq_base", Value::F32(500.0));
    assert!(refusal(&phi3).contains("`phi3.rope.freq_base` is not 10000"));
    for name in ["mamba", "gemma3"] {
        let mut other = GgufFile::llama(&llama);
        other.metadata.insert("general.architecture".to_owned(), text(name));
        let error = refusal(&other);
        assert!(error.ends_with(&format!("`{name}`; supported are `llama`, `qwen2`, `qwen3`, `phi3`")), "{error}");
    }
}

#[test]
fn a_long_context_is_cut_to_the_positions_that_candle_has() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut file = GgufFile::qwen3(&tiny("qwen3", 24, 10_000.0));
    file.set("qwen3", "context_length", Value::U32(i32::MAX as u32));
    file.write(&path);
    assert_eq!(QuantizedLm::load(&path).unwrap().window(), 4096);
}

#[test]
fn the_window_of_phi_3_is_its_sliding_window() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut file = GgufFile::phi3(&llama());
    // llama.cpp writes 0 for models without one.
    for (sliding, window) in [(0, 64), (47, 47), (2047, 64)] {
        file.set("phi3", "attention.sliding_window", Value::U32(sliding));
        file.write(&path);
        assert_eq!(QuantizedLm::load(&path).unwrap().window(), window);
    }
}

#[test]
fn memory_is_more_than_the_weights_and_grows_with_what_candle_expands() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let mut file = GgufFile::llama(&llama());
    let mut memory = |matrices, context| {
        file.matrices = matrices;
        file.set("llama", "context_length", Value::U32(context));
        file.write(&path);
        QuantizedFile::open(&path).unwrap().memory()
    };
    let numbers = f64::from(2 * 288 * 64 + 2 * (64 * 64 * 2 + 32 * 64 * 2 + 3 * 64 * 96));
    let short = memory(GgmlDType::F16, 64);
    assert!(short > 4.0 * numbers, "{short}");
    // F16 is held as F32.
    assert_eq!(memory(GgmlDType::F32, 64), short);
    assert!(memory(GgmlDType::Q4_0, 64) < short && memory(GgmlDType::F16, 4096) > short + 4.0 * 4.0 * 512.0 * 4096.0);
}

const THREADS: &str = "TEMPER_LM_TEST_QUANTIZED";

/// Not a test of its own: the test below runs it in child processes, since candle makes its threads once.
#[test]
fn child() {
    let Ok(path) = std::env::var(THREADS) else { return };
    let mut model = QuantizedLm::load(Path::new(&path)).unwrap();
    let bits = |ids: &[u32]| model.next_logprobs(ids).unwrap().into_iter().map(f32::to_bits).collect::<Vec<_>>();
    println!("bits {:?}", [&ids()[..], &ids()[..1]].map(bits));
}

#[test]
fn results_are_the_same_bytes_at_one_and_two_threads() {
    let (llama, qwen3) = (llama(), tiny("qwen3", 32, 10_000.0));
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    for mut file in [GgufFile::llama(&llama), GgufFile::qwen2(&llama), GgufFile::phi3(&llama), GgufFile::qwen3(&qwen3)]
    {
        file.matrices = GgmlDType::Q8_0;
        file.write(&path);
        let run = |threads: &str| {
            let output = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "child", "--nocapture", "--test-threads=1"])
                .env(THREADS, &path)
                .env("RAYON_NUM_THREADS", threads)
                .env("CANDLE_NUM_THREADS", threads)
                .output()
                .unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let text = String::from_utf8(output.stdout).unwrap();
            text.lines().find_map(|line| line.find("bits ").map(|at| line[at..].to_owned())).expect("a line")
        };
        assert_eq!(run("1"), run("2"), "{:?}", file.metadata["general.architecture"]);
    }
}
