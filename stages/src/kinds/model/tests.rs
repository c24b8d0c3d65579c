//! Tests of `model.pretrain` and `model.import`.

use std::path::Path;

use engine::error::{Blame, Error, Result};
use engine::kind::Kind;
use serde_json::{Value, json};

use super::import::Import;
use super::pretrain::Pretrain;
use crate::error::IntoStageResult;
use crate::testing::{Bench, Out, assert_pinned, run, run_seeded, toys};
use crate::types::{LearningPoint, Model, Split};

fn bench() -> Bench {
    let mut bench = Bench::new();
    bench.input("posts", "Posts", |folder| toys::write_posts(folder, toys::posts(96, Split::Sft)));
    bench.input("tokenizer", "Tokenizer", toys::write_tokenizer);
    bench
}

fn tiny(more: Value) -> Value {
    let mut with = json!({ "n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128, "batch": 16, "lr": 0.01,
        "warmup": 2, "steps": 30, "held_out": 0.1 });
    if let (Value::Object(with), Value::Object(more)) = (&mut with, more) {
        with.extend(more);
    }
    with
}

fn pretrain(more: Value, seed: u64) -> Result<Out> {
    run_seeded(&Pretrain, tiny(more), bench().inputs(), seed)
}

fn error<T>(result: Result<T>) -> Error {
    result.err().expect("an error")
}

#[test]
fn pretraining_lowers_the_held_out_loss() -> Result<()> {
    let few = pretrain(json!({ "steps": 1 }), 7)?.metric("held_out_response_nll");
    let out = pretrain(json!({}), 7)?;
    let many = out.metric("held_out_response_nll");
    assert!(many < few - 1.0, "{few} {many}");
    assert_eq!(out.metric("steps"), 30.0);
    Ok(())
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_does_not() -> Result<()> {
    let bytes = |seed| Ok::<_, Error>(toys::bytes_of(&pretrain(json!({ "steps": 4 }), seed)?.path()));
    assert_eq!(bytes(1)?, bytes(1)?);
    assert_ne!(bytes(1)?, bytes(2)?);
    Ok(())
}

#[test]
fn the_small_result_is_pinned_by_the_version() -> Result<()> {
    assert_eq!((Pretrain::VERSION, lm::NUMERICS), (2, 5));
    let out = pretrain(json!({ "steps": 8 }), 7)?;
    assert_eq!((out.metric("rows"), out.metric("tokens")), (87.0, 3380.0));
    assert_pinned(&out.metrics(&["train_loss", "held_out_response_nll"]), &[4.75766, 5.18354]);
    assert_eq!(LearningPoint::read(&out.path())?.len(), 8);
    Ok(())
}

#[test]
fn a_batch_taken_in_parts_gives_nearly_the_same_loss() -> Result<()> {
    let loss = |tokens: u64| {
        Ok::<_, Error>(pretrain(json!({ "steps": 5, "tokens_at_once": tokens }), 7)?.metric("train_loss"))
    };
    let (whole, parts) = (loss(100_000)?, loss(120)?);
    assert!((whole - parts).abs() < 1e-3, "{whole} {parts}");
    Ok(())
}

#[test]
fn products_in_bf16_learn_nearly_the_same() -> Result<()> {
    let loss = |precision: &str| {
        Ok::<_, Error>(pretrain(json!({ "precision": precision }), 7)?.metric("held_out_response_nll"))
    };
    let (exact, rounded) = (loss("f32")?, loss("bf16")?);
    assert!(exact != rounded && (exact - rounded).abs() < 0.02 * exact, "{exact} {rounded}");
    Ok(())
}

#[test]
fn half_precision_weights_load_again() -> Result<()> {
    let out = pretrain(json!({ "steps": 2, "weights": "f16" }), 7)?;
    crate::model::load(&out.path()).map(drop)
}

#[test]
fn a_diverging_run_names_its_step_and_the_last_finite_loss() {
    for lr in [1e6, 1e25] {
        let error = error(pretrain(json!({ "lr": lr, "warmup": 0 }), 7));
        assert_eq!(error.blame, Blame::User);
        assert!(error.message.contains("at step ") && error.message.contains("last finite loss"), "{error}");
        assert!(error.help.is_some_and(|help| help.contains("`lr`")));
    }
}

#[test]
fn a_summary_that_fills_the_window_is_left_out_and_counted() -> Result<()> {
    let mut bench = Bench::new();
    bench.input("tokenizer", "Tokenizer", toys::write_tokenizer);
    bench.input("posts", "Posts", |folder| {
        let mut posts = toys::posts(24, Split::Sft);
        posts[3].summary = posts[3].summary.repeat(100);
        toys::write_posts(folder, posts)
    });
    let out = run_seeded(&Pretrain, tiny(json!({ "steps": 1, "held_out": 0.0 })), bench.inputs(), 7)?;
    assert_eq!((out.metric("too_long_rows"), out.metric("rows")), (1.0, 23.0));
    Ok(())
}

#[test]
fn a_split_without_posts_is_named() {
    let error = error(pretrain(json!({ "split": "rl" }), 7));
    assert!(error.message.contains("split `rl`"), "{error}");
    assert_eq!(error.help.as_deref(), Some("give `dataset.filter` a size for it"));
}

#[test]
fn parts_of_no_tokens_are_refused_at_planning() {
    let error = error(pretrain(json!({ "tokens_at_once": 0 }), 7));
    assert!(error.message.contains("tokens_at_once"), "{error}");
}

#[test]
fn a_shape_whose_heads_do_not_divide_its_width_is_refused_at_planning() {
    let error = error(pretrain(json!({ "n_head": 3 }), 7));
    assert!(error.message.contains("n_head"), "{error}");
}

fn import(folder: &Path, tokenizer: bool) -> Result<Out> {
    let mut bench = Bench::new();
    if tokenizer {
        bench.input("tokenizer", "Tokenizer", toys::write_tokenizer);
    }
    run(&Import, json!({ "folder": folder }), bench.inputs())
}

#[test]
fn a_folder_is_imported_as_it_is() -> Result<()> {
    let bench = Bench::new();
    toys::write_model(&bench.path(""), 1)?;
    let out = import(&bench.path(""), false)?;
    let imported: Vec<_> = toys::bytes_of(&out.path()).into_iter().filter(|(name, _)| name != "metrics.json").collect();
    assert_eq!(imported, toys::bytes_of(&bench.path("")));
    Ok(())
}

#[test]
fn a_generation_config_comes_along_for_the_ends_it_names() -> Result<()> {
    let bench = Bench::new();
    toys::write_model(&bench.path(""), 1)?;
    let mut tokenizer: serde_json::Value =
        serde_json::from_str(&toys::tokenizer().to_json().into_stage_result()?).expect("a tokenizer");
    let mut second = tokenizer["added_tokens"][0].clone();
    (second["id"], second["content"]) = (json!(5), tokenizer_token(&tokenizer, 5));
    tokenizer["added_tokens"].as_array_mut().expect("a list").push(second);
    bench.write("tokenizer.json", &tokenizer.to_string());
    bench.write("generation_config.json", r#"{ "eos_token_id": [5, 0], "temperature": 0.6 }"#);
    let out = import(&bench.path(""), false)?;
    let (_, tokenizer) = crate::model::load(&out.path())?;
    assert_eq!(tokenizer.eos().ids(), [0, 5]);
    assert!(Model::files(&out.path())?.contains(&"generation_config.json".to_owned()));
    Ok(())
}

#[test]
fn a_chat_template_comes_along_only_if_asked_for() -> Result<()> {
    let bench = Bench::new();
    toys::write_model(&bench.path(""), 1)?;
    let with = json!({ "folder": bench.path(""), "chat_template": true });
    let missing = error(run(&Import, with.clone(), Bench::new().inputs()));
    assert!(missing.message.ends_with("has no chat template") && missing.exit_code() == 2, "{missing}");
    bench.write("tokenizer_config.json", r#"{ "eos_token": "</s>" }"#);
    bench.write("chat_template.jinja", "{{ messages[0].content }}");
    let out = run(&Import, with, Bench::new().inputs())?;
    for file in [Model::TOKENIZER_CONFIG, Model::CHAT_TEMPLATE] {
        assert!(out.path().join(file).is_file(), "{file}");
        assert!(!import(&bench.path(""), false)?.path().join(file).exists(), "{file}");
    }
    let asset = error(run(&Import, json!({ "asset": "tinytldr-s", "chat_template": true }), Bench::new().inputs()));
    assert!(asset.message.contains("no chat template"), "{asset}");
    Ok(())
}

/// The token of an id.
fn tokenizer_token(tokenizer: &serde_json::Value, id: u32) -> serde_json::Value {
    let vocab = tokenizer["model"]["vocab"].as_object().expect("a vocabulary");
    vocab.iter().find(|(_, found)| **found == json!(id)).map(|(token, _)| json!(token)).expect("a token")
}

#[test]
fn a_tokenizer_that_adds_bos_is_written_as_it_is_used() -> Result<()> {
    let bench = Bench::new();
    toys::write_model(&bench.path(""), 1)?;
    let mut tokenizer: serde_json::Value =
        serde_json::from_str(&toys::tokenizer().to_json().into_stage_result()?).expect("a tokenizer");
    let eos = tokenizer["added_tokens"][0]["content"].clone();
    let special = json!({ "SpecialToken": { "id": eos, "type_id": 0 } });
    tokenizer["post_processor"] = json!({
        "type": "TemplateProcessing", "single": [special, { "Sequence": { "id": "A", "type_id": 0 } }, special],
        "pair": [], "special_tokens": { eos.as_str().expect("a text"): { "id": eos, "ids": [0], "tokens": [eos] } },
    });
    bench.write("tokenizer.json", &tokenizer.to_string());
    let out = import(&bench.path(""), false)?;
    let (_, tokenizer) = crate::model::load(&out.path())?;
    assert_eq!(tokenizer.bos_ids(), [0]);
    let written = std::fs::read_to_string(out.path().join("tokenizer.json")).expect("a tokenizer");
    assert_eq!(written, tokenizer.to_json().into_stage_result()?);
    Ok(())
}

#[test]
fn a_model_without_an_end_of_text_is_refused_with_what_was_looked_for() -> Result<()> {
    let bench = Bench::new();
    toys::write_model(&bench.path(""), 1)?;
    let text = |file: &str| std::fs::read_to_string(bench.path(file)).expect("a file");
    bench.write("tokenizer.json", &text("tokenizer.json").replace("<|endoftext|>", "<end>"));
    import(&bench.path(""), false)?;
    bench.write("config.json", &text("config.json").replace("\"eos_token_id\": 0", "\"eos_token_id\": -1"));
    let error = error(import(&bench.path(""), false));
    assert_eq!(error.exit_code(), 2);
    for part in ["no EOS", "config.json", "generation_config.json", "`<|im_end|>`"] {
        assert!(error.message.contains(part), "{error}");
    }
    Ok(())
}

#[test]
fn a_missing_tokenizer_may_come_from_the_port() -> Result<()> {
    let bench = Bench::new();
    toys::write_model(&bench.path(""), 1)?;
    std::fs::remove_file(bench.path("tokenizer.json")).expect("the file is there");
    assert!(error(import(&bench.path(""), false)).message.contains("tokenizer.json"));
    import(&bench.path(""), true).map(drop)
}

#[test]
fn what_a_model_lacks_is_named() -> Result<()> {
    let bench = Bench::new();
    toys::write_model(&bench.path(""), 1)?;
    // A config with two blocks and weights for one.
    let config = std::fs::read_to_string(bench.path("config.json")).expect("a config");
    bench.write("config.json", &config.replace("\"n_layer\": 1", "\"n_layer\": 2"));
    let error_ = error(import(&bench.path(""), false));
    assert!(error_.message.contains("h.1."), "{error_}");
    // An embedding with fewer rows than the tokenizer has tokens.
    let smaller = toys::tokenizer().vocab_size() - 1;
    bench.write("config.json", &config.replace(&format!("{}", smaller + 1), &format!("{smaller}")));
    let error_ = error(import(&bench.path(""), false));
    assert!(error_.message.contains("wte") || error_.message.contains("tokenizer"), "{error_}");
    Ok(())
}

/// Splits the model's file into two shards with an index.
fn shard(bench: &Bench) {
    use safetensors::SafeTensors;
    let whole = std::fs::read(bench.path("model.safetensors")).expect("the file is there");
    let tensors = SafeTensors::deserialize(&whole).expect("weights").tensors();
    let mut map = serde_json::Map::new();
    for (n, part) in tensors.chunks(tensors.len().div_ceil(2)).enumerate() {
        let file = format!("model-0000{}-of-00002.safetensors", n + 1);
        map.extend(part.iter().map(|(name, _)| (name.clone(), json!(file))));
        let bytes = safetensors::serialize(part.to_vec(), None).expect("weights");
        std::fs::write(bench.path(&file), bytes).expect("written");
    }
    bench.write("model.safetensors.index.json", &json!({ "weight_map": map }).to_string());
    std::fs::remove_file(bench.path("model.safetensors")).expect("the file is there");
}

#[test]
fn shards_stay_as_they_are() -> Result<()> {
    let bench = Bench::new();
    toys::write_model(&bench.path(""), 1)?;
    let whole = import(&bench.path(""), false)?;
    shard(&bench);
    let out = import(&bench.path(""), false)?;
    let imported: Vec<_> = toys::bytes_of(&out.path()).into_iter().filter(|(name, _)| name != "metrics.json").collect();
    assert_eq!(imported, toys::bytes_of(&bench.path("")));
    assert_eq!(Model::check_folder(&out.path())?, Model::check_folder(&whole.path())?);
    Ok(())
}

#[test]
fn an_index_that_leads_elsewhere_is_refused() -> Result<()> {
    for file in ["../evil.safetensors", "/etc/passwd", "a/b.safetensors", "", ".."] {
        let bench = Bench::new();
        toys::write_model(&bench.path(""), 1)?;
        std::fs::remove_file(bench.path("model.safetensors")).expect("the file is there");
        bench.write("model.safetensors.index.json", &json!({ "weight_map": { "wte.weight": file } }).to_string());
        let error = error(import(&bench.path(""), false));
        assert_eq!(error.exit_code(), 2);
        assert!(error.message.contains("expected a file in its own folder"), "{error}");
    }
    Ok(())
}

#[test]
fn a_model_without_weights_is_told() -> Result<()> {
    let bench = Bench::new();
    toys::write_model(&bench.path(""), 1)?;
    std::fs::remove_file(bench.path("model.safetensors")).expect("the file is there");
    let error = error(import(&bench.path(""), false));
    assert!(error.message.contains("file `model.safetensors` is missing"), "{error}");
    assert!(error.help.is_some_and(|help| help.contains("pytorch_model.bin")));
    Ok(())
}

#[test]
fn a_family_that_is_not_known_is_told_by_its_config() -> Result<()> {
    let bench = Bench::new();
    toys::write_model(&bench.path(""), 1)?;
    let config = std::fs::read_to_string(bench.path("config.json")).expect("a config");
    bench.write("config.json", &config.replace("\"gpt2\"", "\"mamba\""));
    let error = error(import(&bench.path(""), false));
    assert!(error.message.contains("model_type is \"mamba\""), "{error}");
    Ok(())
}

#[test]
fn exactly_one_source_is_wanted() {
    let both = json!({ "asset": "tinytldr-s", "folder": "y" });
    for with in [json!({}), both] {
        let error = error(run(&Import, with, Bench::new().inputs()));
        assert!(error.message.contains("exactly one"), "{error}");
    }
}

#[test]
fn a_file_that_cannot_be_read_is_named_where_the_user_has_it() -> Result<()> {
    let bench = Bench::new();
    let place = |file: &str| bench.path(file).display().to_string();
    let told = |tokenizer| error(import(&bench.path(""), tokenizer));
    toys::write_model(&bench.path(""), 1)?;
    let config = std::fs::read(bench.path("config.json")).expect("a config");
    bench.write("config.json", "[1]");
    assert_eq!(
        told(false).message,
        format!("{}: expected a JSON object such as {{\"model_type\": \"gpt2\", …}}", place("config.json"))
    );
    std::fs::write(bench.path("config.json"), config).expect("written");
    let weights = std::fs::read(bench.path("model.safetensors")).expect("weights");
    for kept in [4, 100, weights.len() - 1] {
        std::fs::write(bench.path("model.safetensors"), &weights[..kept]).expect("written");
        let message = told(false).message;
        assert!(message.starts_with(&format!("{}: the file is truncated", place("model.safetensors"))), "{message}");
    }
    std::fs::write(bench.path("model.safetensors"), &weights).expect("written");
    bench.write("tokenizer.json", "{}");
    let broken = told(false);
    assert!(broken.message.starts_with(&format!("tokenizer {}: ", place("tokenizer.json"))), "{broken}");
    assert!(broken.help.is_some_and(|help| help.contains("byte-level BPE")));
    import(&bench.path(""), true).map(drop)
}
