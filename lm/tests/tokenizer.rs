//! Byte-complete BPE tokenizers: training, files, encoding and decoding.

mod common;

use common::tiny_config;
use lm::{Eos, Error, ModelConfig, Tokenizer};
use proptest::prelude::*;

const EOS: &str = "<|endoftext|>";

fn texts() -> Vec<String> {
    let (who, what, when) = (
        ["my sister", "an old friend", "the neighbour", "my boss (34M)"],
        ["took my car", "didn't answer", "won't move out", "is lying to me", "lost 200 euros"],
        ["yesterday", "last week", "for two years", "again"],
    );
    let mut texts = Vec::new();
    for a in who {
        for b in what {
            for c in when {
                texts.push(format!("{a} {b} {c}, and I don't know what to do.\nTL;DR: {a} {b}"));
            }
        }
    }
    texts
}

fn trained() -> Tokenizer {
    Tokenizer::train_bpe(texts().into_iter(), 320).unwrap()
}

#[test]
fn training_is_deterministic_and_gives_the_requested_vocabulary_size() {
    let tokenizer = trained();
    assert_eq!(tokenizer.vocab_size(), 320);
    assert_eq!(tokenizer.eos(), &Eos::from(0));
    for _ in 0..3 {
        assert_eq!(tokenizer.to_json().unwrap(), trained().to_json().unwrap());
    }
    let ids = tokenizer.encode(" my sister took my car");
    assert!(ids.len() <= 8, "frequent words are tokens: {ids:?}");
}

#[test]
fn a_tokenizer_file_round_trips_byte_for_byte() {
    let folder = tempfile::tempdir().unwrap();
    let (a, b) = (folder.path().join("a.json"), folder.path().join("b.json"));
    let tokenizer = trained();
    tokenizer.save(&a).unwrap();
    let again = Tokenizer::load(&a).unwrap();
    again.save(&b).unwrap();
    assert_eq!(std::fs::read(&a).unwrap(), std::fs::read(&b).unwrap());
    let from_bytes = Tokenizer::from_bytes(&std::fs::read(&a).unwrap()).unwrap();
    for text in texts() {
        assert_eq!(tokenizer.encode(&text), again.encode(&text));
        assert_eq!(tokenizer.encode(&text), from_bytes.encode(&text));
    }
}

#[test]
fn a_spelled_out_eos_is_encoded_as_text() {
    let tokenizer = trained();
    let ids = tokenizer.encode(&format!("a{EOS}b"));
    assert!(!ids.contains(&tokenizer.eos().first()), "a post cannot end its own prompt");
    assert_eq!(tokenizer.decode(&ids), format!("a{EOS}b"));
    assert_eq!(tokenizer.decode(&[tokenizer.encode("x")[0], tokenizer.eos().first()]), "x");
}

#[test]
fn ids_above_a_models_vocabulary_are_reported() {
    let tokenizer = trained();
    let mut config = tiny_config();
    config.vocab_size = 319;
    let error = tokenizer.check_fits(&config.clone().into()).unwrap_err().to_string();
    assert!(error.contains("id 319") && error.contains("only 319 tokens"), "{error}");
    config.vocab_size = 320;
    tokenizer.check_fits(&config.clone().into()).unwrap();
}

#[test]
fn files_that_are_not_a_byte_level_tokenizer_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tokenizer.json");
    let good = trained().to_json().unwrap();
    let error = |text: &str| {
        std::fs::write(&path, text).unwrap();
        let error = Tokenizer::load(&path).unwrap_err();
        assert!(matches!(error, Error::Tokenizer { .. }), "{error:?}");
        assert!(error.to_string().contains("tokenizer.json"), "{error}");
        error.to_string()
    };
    error("{");
    error("{}");
    assert!(error(&good.replace(EOS, "<end>")).contains("none of `<|endoftext|>`, "));
    let mut value: serde_json::Value = serde_json::from_str(&good).unwrap();
    value["pre_tokenizer"] = serde_json::Value::Null;
    assert!(error(&value.to_string()).contains("neither a byte-level nor a byte-fallback tokenizer"));
    let mut value: serde_json::Value = serde_json::from_str(&good).unwrap();
    value["model"]["vocab"].as_object_mut().unwrap().remove("!");
    assert!(error(&value.to_string()).contains("`!`"));
    assert!(matches!(Tokenizer::load(&folder.path().join("none.json")), Err(Error::Io { .. })));
    assert!(Tokenizer::train_bpe(texts().into_iter(), 256).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_text_round_trips(text in "\\PC{0,60}|[ \\n\\t]{0,9}|.{0,60}") {
        thread_local!(static TOKENIZER: Tokenizer = trained());
        TOKENIZER.with(|t| {
            let ids = t.encode(&text);
            assert!(!ids.contains(&t.eos().first()));
            assert_eq!(t.decode(&ids), text);
        });
    }
}

/// A SentencePiece-like BPE, as Llama 2's: a space is `▁`, and characters without a token are spelled in bytes.
fn with_byte_fallback() -> serde_json::Value {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).to_vec();
    tokens.extend((0..=255).map(|b| format!("<0x{b:02X}>")));
    tokens.extend(["▁", "a", "b", "▁a", "▁ab"].map(str::to_owned));
    let vocab: serde_json::Map<String, serde_json::Value> =
        tokens.iter().enumerate().map(|(i, token)| (token.clone(), i.into())).collect();
    let special = |id: u32, content: &str| {
        serde_json::json!({ "id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": true })
    };
    serde_json::json!({
        "version": "1.0", "truncation": null, "padding": null,
        "added_tokens": [special(0, "<unk>"), special(1, "<s>"), special(2, "</s>")],
        "normalizer": { "type": "Sequence", "normalizers": [
            { "type": "Replace", "pattern": { "String": " " }, "content": "▁" }] },
        "pre_tokenizer": null, "post_processor": null,
        "decoder": { "type": "Sequence", "decoders": [
            { "type": "Replace", "pattern": { "String": "▁" }, "content": " " },
            { "type": "ByteFallback" }, { "type": "Fuse" }] },
        "model": { "type": "BPE", "dropout": null, "unk_token": "<unk>", "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": true, "byte_fallback": true, "ignore_merges": false,
            "vocab": vocab, "merges": [["▁", "a"], ["▁a", "b"]] },
    })
}

#[test]
fn a_byte_fallback_tokenizer_round_trips_any_text() {
    let mut json = with_byte_fallback();
    let tokenizer = Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap();
    assert_eq!(tokenizer.eos(), &Eos::from(2));
    for text in [" ab ba", "é\n\t", "</s>", "日本 ab"] {
        let ids = tokenizer.encode(text);
        assert!(!ids.contains(&2) && !ids.contains(&0), "{text:?}: {ids:?}");
        assert_eq!(tokenizer.decode(&ids), text);
    }
    json["model"]["vocab"].as_object_mut().unwrap().remove("<0x41>");
    let error = Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap_err().to_string();
    assert!(error.contains("<0x41>"), "{error}");
}

#[test]
fn steps_that_would_panic_in_the_tokenizers_crate_are_refused() {
    let json = trained().to_json().unwrap();
    let with = |key: &str, step: &str| {
        let mut file: serde_json::Map<String, serde_json::Value> = serde_json::from_str(&json).unwrap();
        file.insert(key.to_owned(), "here".into());
        Tokenizer::from_bytes(serde_json::to_string(&file).unwrap().replace("\"here\"", step).as_bytes())
    };
    with("normalizer", r#"{"type":"NFC"}"#).unwrap();
    for (key, step, why) in [
        ("decoder", r#"{"type":"ByteLevel""#, "at line 1"),
        ("decoder", r#"{"type":}"#, "at line 1"),
        ("decoder", r#"{"type":"\ud800"}"#, "at line 1"),
        ("normalizer", r#"{"type":"Precompiled"}"#, "Precompiled"),
        (
            "normalizer",
            r#"{"type":"Sequence","normalizers":[{"type":"Precompiled","precompiled_charsmap":"AAAA"}]}"#,
            "Precompiled",
        ),
    ] {
        let message = with(key, step).unwrap_err().to_string();
        assert!(message.contains(why), "{message}");
    }
}

#[test]
fn steps_that_expand_a_text_too_much_and_long_texts_are_refused() {
    let json = trained().to_json().unwrap();
    let with = |key: &str, step: serde_json::Value| {
        let mut file: serde_json::Value = serde_json::from_str(&json).unwrap();
        file[key] = step;
        Tokenizer::from_bytes(file.to_string().as_bytes())
    };
    let replace = |pattern: serde_json::Value, content: &str| serde_json::json!({ "type": "Replace", "pattern": pattern, "content": content });
    let (a, nothing) = (serde_json::json!({ "String": "a" }), serde_json::json!({ "Regex": "" }));
    let doubling = vec![replace(a.clone(), "aa"); 17];
    for (key, step, growth) in [
        ("normalizer", replace(a.clone(), &"b".repeat(100_000)), "100000"),
        ("normalizer", serde_json::json!({ "type": "Sequence", "normalizers": doubling }), "131072"),
        ("normalizer", replace(nothing, &"b".repeat(1000)), "1001"),
        ("normalizer", serde_json::json!({ "type": "Prepend", "prepend": "b".repeat(1000) }), "1001"),
        (
            "decoder",
            serde_json::json!({ "type": "Sequence", "decoders": [replace(a.clone(), &"b".repeat(257))] }),
            "257",
        ),
    ] {
        let message = with(key, step).unwrap_err().to_string();
        assert!(
            message.ends_with(&format!("its {key} can make a text {growth} times as long; at most 256 is supported"))
        );
    }
    let few = "x".repeat(1 << 18);
    trained().check_text(&few.repeat(8)).unwrap();
    assert!(trained().check_text(&few.repeat(9)).is_err());
    let tokenizer = with("normalizer", replace(a, "▁▁▁")).unwrap();
    let error = tokenizer.check_text(&few).unwrap_err().to_string();
    assert!(error.ends_with("a text has 262144 bytes, but this tokenizer accepts at most 233016"), "{error}");
    tokenizer.check_text(&few[..233_016]).unwrap();
}

/// The config of a model with 300 tokens and the given `eos_token_id`.
fn config(eos: serde_json::Value) -> ModelConfig {
    ModelConfig::from_json(serde_json::json!({
        "model_type": "llama", "vocab_size": 300, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 1,
        "num_attention_heads": 2, "eos_token_id": eos,
    }))
    .unwrap()
}

fn load(json: &serde_json::Value, config: &ModelConfig) -> lm::Result<Tokenizer> {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("tokenizer.json"), json.to_string()).unwrap();
    Tokenizer::load_for(folder.path(), config)
}

#[test]
fn the_models_config_has_precedence_over_eos_token_names() {
    let json = with_byte_fallback();
    let of = |eos: serde_json::Value| load(&json, &config(eos)).map(|t| t.eos().ids().to_vec());
    assert_eq!(of(1.into()).unwrap(), [1]);
    assert_eq!(of(serde_json::json!([2, 0, 2])).unwrap(), [2, 0]);
    for none in [serde_json::Value::Null, (-1).into(), serde_json::json!([]), serde_json::json!([-1]), 50_256.into()] {
        assert_eq!(of(none).unwrap(), [2], "by its name");
    }
    let error = of(serde_json::json!([2, 260])).unwrap_err().to_string();
    assert!(error.contains("260 as EOS, which is not a special token"), "{error}");
    let error = load(
        &json,
        &ModelConfig::from_json(serde_json::json!({ "vocab_size": 200, "n_positions": 8, "n_embd": 4,
        "n_layer": 1, "n_head": 1 }))
        .unwrap(),
    );
    assert!(error.unwrap_err().to_string().contains("vocabulary has only 200"));
}

#[test]
fn each_known_eos_name_is_found_if_it_is_a_special_token() {
    for name in ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>"] {
        let json = with_byte_fallback().to_string().replace("</s>", name);
        assert_eq!(Tokenizer::from_bytes(json.as_bytes()).unwrap().eos(), &Eos::from(2), "{name}");
        let mut plain: serde_json::Value = serde_json::from_str(&json).unwrap();
        plain["added_tokens"][2]["special"] = false.into();
        assert!(Tokenizer::from_bytes(plain.to_string().as_bytes()).is_err(), "{name}");
    }
    let unnamed = serde_json::from_str(&with_byte_fallback().to_string().replace("</s>", "<end>")).unwrap();
    assert_eq!(load(&unnamed, &config(2.into())).unwrap().eos(), &Eos::from(2));
    let error = load(&unnamed, &config((-1).into())).unwrap_err().to_string();
    for part in ["config.json", "generation_config.json", "`</s>`", "`<|eot_id|>`"] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn a_tokenizer_with_dropout_is_refused() {
    for mut json in [with_byte_fallback(), serde_json::from_str(&trained().to_json().unwrap()).unwrap()] {
        let mut with = |dropout: serde_json::Value| {
            json["model"]["dropout"] = dropout;
            Tokenizer::from_bytes(json.to_string().as_bytes())
        };
        let error = with(serde_json::json!(0.1)).unwrap_err().to_string();
        assert!(error.contains("`dropout` 0.1"), "{error}");
        with(serde_json::json!(0.0)).unwrap();
        with(serde_json::Value::Null).unwrap();
    }
}

/// The tokenizer with a post-processor of these pieces; `A` is the text.
fn processed(pieces: &[&str]) -> serde_json::Value {
    let piece = |name: &&str| match *name {
        "A" => serde_json::json!({ "Sequence": { "id": "A", "type_id": 0 } }),
        name => serde_json::json!({ "SpecialToken": { "id": name, "type_id": 0 } }),
    };
    let token = |id: u32, name: &str| serde_json::json!({ "id": name, "ids": [id], "tokens": [name] });
    let mut json = with_byte_fallback();
    json["post_processor"] = serde_json::json!({
        "type": "TemplateProcessing", "single": pieces.iter().map(piece).collect::<Vec<_>>(), "pair": [],
        "special_tokens": { "<unk>": token(0, "<unk>"), "<s>": token(1, "<s>"), "</s>": token(2, "</s>") },
    });
    json
}

#[test]
fn bos_of_the_post_processor_is_added_and_eos_is_not() {
    let read = |pieces: &[&str]| Tokenizer::from_bytes(processed(pieces).to_string().as_bytes());
    for (pieces, bos_ids) in
        [(&["A"][..], vec![]), (&["<s>", "A"], vec![1]), (&["<s>", "<unk>", "A", "</s>"], vec![1, 0])]
    {
        let tokenizer = read(pieces).unwrap();
        assert_eq!(tokenizer.bos_ids(), bos_ids);
        assert_eq!(tokenizer.encode(" ab"), [&bos_ids[..], &[263]].concat());
        assert_eq!(tokenizer.encode(""), bos_ids);
        assert_eq!(tokenizer.encode_continuation(" ab"), [263]);
        let again = Tokenizer::from_bytes(tokenizer.to_json().unwrap().as_bytes()).unwrap();
        assert_eq!((again.bos_ids(), again.encode("b")), (tokenizer.bos_ids(), tokenizer.encode("b")));
    }
    for (pieces, why) in [
        (&["<s>", "A", "<unk>"][..], "puts id 0 after the text"),
        (&["<s>"], "does not insert the text"),
        (&["A", "A"], "inserts the text twice"),
        (&["[CLS]", "A"], "does not give the id of `[CLS]`"),
    ] {
        let error = read(pieces).unwrap_err().to_string();
        assert!(error.contains(why), "{error}");
    }
    let mut json = with_byte_fallback();
    json["post_processor"] = serde_json::json!({ "type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1] });
    assert!(Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap_err().to_string().contains("BertProcessing"));
}

#[test]
fn no_token_spans_prompt_and_continuation() {
    let mut json = with_byte_fallback();
    json["normalizer"]["normalizers"]
        .as_array_mut()
        .unwrap()
        .insert(0, serde_json::json!({ "type": "Prepend", "prepend": "▁" }));
    json["decoder"]["decoders"]
        .as_array_mut()
        .unwrap()
        .push(serde_json::json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    for (id, token) in [(264, "b▁"), (265, "b▁a")] {
        json["model"]["vocab"][token] = id.into();
    }
    let merges = json["model"]["merges"].as_array_mut().unwrap();
    merges.splice(0..0, [serde_json::json!(["b", "▁"]), serde_json::json!(["b▁", "a"])]);
    let tokenizer = Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap();
    assert_eq!(tokenizer.encode("b a"), [259, 265], "one token spans the border");
    assert_eq!((tokenizer.encode("b"), tokenizer.encode_continuation(" a")), (vec![259, 261], vec![262]));
    assert_eq!(tokenizer.decode_continuation(&[262]), " a");
    // The second part of a character that began in earlier ids.
    assert_eq!(tokenizer.decode_continuation(&[3 + 0x80, 260]), "\u{fffd}a");
    json["model"]["vocab"]["<0xBF>▁"] = 266.into();
    let error = Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap_err().to_string();
    assert!(error.contains("<0xBF>"), "{error}");
}
