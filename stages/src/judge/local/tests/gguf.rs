//! Judges from GGUF files.

use std::path::{Path, PathBuf};

use candle_core::quantized::gguf_file::{self, Value as Metadata};
use candle_core::quantized::{GgmlDType, QTensor};
use engine::kind::{AnyKind, Kind};
use lm::io::Checkpoint;
use lm::{CausalLm, InitStd, ModelConfig};

use super::*;
use crate::random::fixed_generator;
use crate::train::Weights;

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

/// A random Qwen3 as a Model folder, and the same weights as a GGUF file.
struct Judge {
    folder: tempfile::TempDir,
}

impl Judge {
    fn new(chat_template: Option<&str>) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tokenizer = toys::chat_tokenizer();
        let config = json!({ "model_type": "qwen3", "vocab_size": tokenizer.vocab_size(), "max_position_embeddings": 2048,
            "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2,
            "num_key_value_heads": 1, "head_dim": 16, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "eos_token_id": 0 });
        let config = ModelConfig::from_json(config).unwrap();
        let lm = CausalLm::init(config, InitStd::Fixed(0.2), &mut fixed_generator(8, "judge")).unwrap();
        crate::model::save(&lm, &tokenizer, folder.path(), Weights::F32).unwrap();
        if let Some(template) = chat_template {
            let config = json!({ "chat_template": template, "eos_token": "<|im_end|>" });
            write_json(&folder.path().join(Model::TOKENIZER_CONFIG), &config).unwrap();
        }
        let judge = Self { folder };
        judge.write_gguf("qwen3", chat_template);
        judge
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn write_gguf(&self, architecture: &str, chat_template: Option<&str>) {
        let count = |name: &str, n: u32| (format!("{architecture}.{name}"), Metadata::U32(n));
        let text = |key: &str, text: &str| (key.to_owned(), Metadata::String(text.to_owned()));
        let mut metadata = vec![
            text("general.architecture", architecture),
            count("block_count", 2),
            count("context_length", 2048),
            count("embedding_length", 32),
            count("feed_forward_length", 64),
            count("attention.head_count", 2),
            count("attention.head_count_kv", 1),
            count("attention.key_length", 16),
            (format!("{architecture}.attention.layer_norm_rms_epsilon"), Metadata::F32(1e-5)),
        ];
        metadata.extend(chat_template.map(|template| text("tokenizer.chat_template", template)));
        let tokens = ["<|endoftext|>", "<|im_end|>"].map(|token| Metadata::String(token.to_owned()));
        metadata.push(("tokenizer.ggml.tokens".to_owned(), Metadata::Array(tokens.to_vec())));
        metadata.push(("tokenizer.ggml.eos_token_id".to_owned(), Metadata::U32(1)));
        let weights = Checkpoint::open(self.folder.path()).unwrap();
        let tensor = |name: &str| {
            let tensor = weights.get(name, weights.shape(name).unwrap()).unwrap();
            (gguf_name(name), QTensor::quantize(&tensor, GgmlDType::F32).unwrap())
        };
        let tensors: Vec<_> = weights.names().map(tensor).collect();
        let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let mut file = std::fs::File::create(self.path("judge.gguf")).unwrap();
        gguf_file::write(&mut file, &metadata, &tensors).unwrap();
    }

    /// Runs the judge from the GGUF file, with parameters on top.
    fn run(&self, pairs: Vec<Pair>, with: Value) -> Result<Out> {
        let mut bench = Bench::new();
        bench.input("pairs", Pairs::NAME, |folder| toys::write_pairs(folder, pairs));
        let mut all = json!({ "gguf": self.path("judge.gguf"), "tokenizer": self.path("tokenizer.json"), "shots": 0 });
        all.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
        run(&Local, all, bench.inputs())
    }

    /// Runs the judge from the Model folder.
    fn run_artifact(&self, pairs: Vec<Pair>) -> Out {
        let mut bench = Bench::new();
        bench.input("pairs", Pairs::NAME, |folder| toys::write_pairs(folder, pairs));
        bench.input("model", Model::NAME, |folder| {
            for file in std::fs::read_dir(self.folder.path()).unwrap().flatten() {
                std::fs::copy(file.path(), folder.join(file.file_name())).unwrap();
            }
            Ok(())
        });
        run(&Local, json!({ "shots": 0 }), bench.inputs()).unwrap()
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
            format!("blk.{layer}.{}.weight", MODULES.iter().find(|(theirs, _)| *theirs == module).unwrap().1)
        }
    }
}

fn labels(out: &Out) -> Vec<(String, f64)> {
    rows(out).into_iter().map(|row| (row.chosen_text, row.confidence.unwrap())).collect()
}

#[track_caller]
fn assert_same(a: &[(String, f64)], b: &[(String, f64)]) {
    assert!(a.len() == b.len() && !a.is_empty());
    for ((chosen, confidence), (other_chosen, other_confidence)) in a.iter().zip(b) {
        assert_eq!(chosen, other_chosen);
        assert!((confidence - other_confidence).abs() < 1e-5, "{confidence} {other_confidence}");
    }
}

#[test]
fn a_gguf_file_labels_as_the_artifact_with_the_same_weights() {
    for template in [Some(toys::CHATML), None] {
        let judge = Judge::new(template);
        let pairs = toys::pairs(6, Split::Proxy);
        let (gguf, artifact) = (judge.run(pairs.clone(), json!({})).unwrap(), judge.run_artifact(pairs));
        assert_same(&labels(&gguf), &labels(&artifact));
        let names = ["labelled", "first_shown_share", "swap_consistency", "mean_confidence", "answer_probability"];
        for ((name, a), (_, b)) in gguf.metrics(&names).into_iter().zip(artifact.metrics(&names)) {
            assert!((a - b).abs() < 1e-5, "{name}: {a} {b}");
        }
    }
}

#[test]
fn the_label_of_a_gguf_judge_does_not_depend_on_the_sides_of_a_pair() {
    let judge = Judge::new(Some(toys::CHATML));
    let turned = |pair: Pair| Pair { a_text: pair.b_text.clone(), b_text: pair.a_text.clone(), ..pair };
    let pairs = toys::pairs(4, Split::Proxy);
    let other: Vec<Pair> = pairs.iter().cloned().map(turned).collect();
    let [a, b] = [pairs, other].map(|pairs| labels(&judge.run(pairs, json!({})).unwrap()));
    assert_same(&a, &b);
}

#[test]
fn the_chat_template_is_the_files_or_a_given_one() {
    let pairs = || toys::pairs(2, Split::Proxy);
    let (with, without) = (Judge::new(Some(toys::CHATML)), Judge::new(None));
    let chat = labels(&with.run(pairs(), json!({ "prompt": "chat" })).unwrap());
    let plain = without.run(pairs(), json!({})).unwrap();
    assert!(plain.warnings.iter().any(|warning| warning.contains("judge.gguf has no chat template")));
    assert!(chat.iter().zip(labels(&plain)).any(|(a, b)| (a.1 - b.1).abs() > 1e-7));
    let error = without.run(pairs(), json!({ "prompt": "chat" })).map(drop).unwrap_err();
    assert!(error.message.ends_with("judge.gguf has no chat template"), "{error}");
    assert!(error.exit_code() == 2 && error.help.is_some_and(|help| help.contains("`chat_template`")));
    std::fs::write(without.path("own.jinja"), toys::CHATML).unwrap();
    let own = without.run(pairs(), json!({ "chat_template": without.path("own.jinja") })).unwrap();
    assert_same(&labels(&own), &chat);
    // The template may use the end token that the file names.
    let ending = toys::CHATML.replace("'<|im_end|>'", "eos_token");
    std::fs::write(without.path("own.jinja"), ending).unwrap();
    let own = without.run(pairs(), json!({ "chat_template": without.path("own.jinja") })).unwrap();
    assert_same(&labels(&own), &chat);
}

#[test]
fn a_tokenizer_of_another_model_is_an_error() {
    let judge = Judge::new(None);
    let larger = lm::Tokenizer::train_bpe(["a few words", "and a few more of them"].into_iter(), 300).unwrap();
    let mut file: Value = serde_json::from_str(&larger.to_json().unwrap()).unwrap();
    for id in larger.vocab_size()..600 {
        let token = json!({ "id": id, "content": format!("<{id}>"), "single_word": false, "lstrip": false,
                            "rstrip": false, "normalized": false, "special": true });
        file["added_tokens"].as_array_mut().unwrap().push(token);
    }
    std::fs::write(judge.path("tokenizer.json"), file.to_string()).unwrap();
    let error = judge.run(toys::pairs(1, Split::Proxy), json!({})).map(drop).unwrap_err();
    assert!(error.message.contains("tokenizer.json: has id 599, but") && error.exit_code() == 2, "{error}");
    // Few tokens, but one far above the others.
    let mut file: Value = serde_json::from_str(&toys::chat_tokenizer().to_json().unwrap()).unwrap();
    file["model"]["vocab"]["far away"] = json!(5000);
    std::fs::write(judge.path("tokenizer.json"), file.to_string()).unwrap();
    let error = judge.run(toys::pairs(1, Split::Proxy), json!({})).map(drop).unwrap_err();
    assert!(error.message.contains("tokenizer.json: has id 5000, but") && error.exit_code() == 2, "{error}");
    assert!(error.help.is_some_and(|help| help.contains("of the model in `gguf`")));
}

#[test]
fn wrong_files_are_told_at_planning() {
    let kind: &dyn AnyKind = &Local;
    let faults = |with: Value| -> Vec<(String, String)> { kind.normalise(&with).err().unwrap_or_default() };
    assert_eq!(faults(json!({ "gguf": "m.gguf", "tokenizer": "tokenizer.json" })), []);
    for (with, field, told) in [
        (json!({ "gguf": "m.gguf" }), "tokenizer", "`gguf` needs the model's tokenizer.json"),
        (json!({ "tokenizer": "t.json" }), "tokenizer", "is not used without `gguf`"),
        (json!({ "gguf": "m.safetensors", "tokenizer": "t.json" }), "gguf", "must be a .gguf file"),
    ] {
        let faults = faults(with);
        assert!(faults.len() == 1 && faults[0].0 == field && faults[0].1.contains(told), "{faults:?}");
    }
    let judge = Judge::new(None);
    let files = |tokenizer: &Path| {
        let with = json!({ "gguf": judge.path("judge.gguf"), "tokenizer": tokenizer });
        kind.check_files(&kind.normalise(&with).unwrap()).unwrap()
    };
    assert_eq!(files(&judge.path("tokenizer.json")), []);
    judge.write_gguf("mamba", None);
    let found = files(&judge.path("tokenizer.json"));
    assert!(found[0].0 == "gguf" && found[0].1.contains("supported are `llama`, `qwen2`"), "{found:?}");
}

#[test]
fn a_judge_from_a_gguf_file_takes_no_gpu_and_tells_its_memory() {
    let kind: &dyn AnyKind = &Local;
    let judge = Judge::new(None);
    let with = json!({ "gguf": judge.path("judge.gguf"), "tokenizer": judge.path("tokenizer.json") });
    let with = kind.normalise(&with).unwrap();
    let signature = kind.signature(&with).unwrap();
    assert!(signature.numerics.is_none() && signature.parallel);
    let file = std::fs::metadata(judge.path("judge.gguf")).unwrap().len() as f64;
    assert!(kind.forecast(&with, &|_| Vec::new()).memory.unwrap() > 65e6 + file);
}

#[test]
fn the_keys_of_judges_with_a_model_artifact_are_as_before() {
    let kind: &dyn AnyKind = &Local;
    let normalised = kind.normalise(&json!({})).unwrap();
    assert!(normalised.get("gguf").is_none() && normalised.get("tokenizer").is_none());
    let ports = |with: Value| -> Vec<String> {
        let params = serde_json::from_value(with).unwrap();
        Kind::signature(&Local, &params).ports.into_iter().map(|port| port.name).collect()
    };
    assert_eq!(ports(json!({})), ["pairs", "model", "exclude"]);
    assert_eq!(ports(json!({ "gguf": "m.gguf", "tokenizer": "t.json" })), ["pairs", "exclude"]);
}
