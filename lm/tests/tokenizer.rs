//! Byte-level BPE: training, files, text in and out.

mod common;

use common::tiny_config;
use lm::{Error, Tokenizer};
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
fn training_gives_the_vocabulary_asked_for_and_the_same_bytes_every_time() {
    let tokenizer = trained();
    assert_eq!(tokenizer.vocab_size(), 320);
    assert_eq!(tokenizer.eos(), 0);
    for _ in 0..3 {
        assert_eq!(tokenizer.to_json().unwrap(), trained().to_json().unwrap());
    }
    let ids = tokenizer.encode(" my sister took my car");
    assert!(ids.len() <= 8, "frequent words are tokens: {ids:?}");
}

#[test]
fn a_tokenizer_survives_its_file_byte_for_byte() {
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
fn the_end_of_text_written_out_is_text() {
    let tokenizer = trained();
    let ids = tokenizer.encode(&format!("a{EOS}b"));
    assert!(!ids.contains(&tokenizer.eos()), "a post cannot end its own prompt");
    assert_eq!(tokenizer.decode(&ids), format!("a{EOS}b"));
    assert_eq!(tokenizer.decode(&[tokenizer.encode("x")[0], tokenizer.eos()]), "x");
}

#[test]
fn ids_above_a_models_vocabulary_are_told() {
    let tokenizer = trained();
    let mut config = tiny_config();
    config.vocab_size = 319;
    let error = tokenizer.check_fits(&config.clone().into()).unwrap_err().to_string();
    assert!(error.contains("id 319") && error.contains("only 319 tokens"), "{error}");
    config.vocab_size = 320;
    tokenizer.check_fits(&config.clone().into()).unwrap();
}

#[test]
fn files_that_are_no_byte_level_tokenizer_are_refused() {
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
    assert!(error(&good.replace(EOS, "<eos>")).contains(EOS));
    let mut value: serde_json::Value = serde_json::from_str(&good).unwrap();
    value["pre_tokenizer"] = serde_json::Value::Null;
    assert!(error(&value.to_string()).contains("neither a byte-level tokenizer"));
    let mut value: serde_json::Value = serde_json::from_str(&good).unwrap();
    value["model"]["vocab"].as_object_mut().unwrap().remove("!");
    assert!(error(&value.to_string()).contains("`!`"));
    assert!(matches!(Tokenizer::load(&folder.path().join("none.json")), Err(Error::Io { .. })));
    assert!(Tokenizer::train_bpe(texts().into_iter(), 256).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn any_text_comes_back(text in "\\PC{0,60}|[ \\n\\t]{0,9}|.{0,60}") {
        thread_local!(static TOKENIZER: Tokenizer = trained());
        TOKENIZER.with(|t| {
            let ids = t.encode(&text);
            assert!(!ids.contains(&t.eos()));
            assert_eq!(t.decode(&ids), text);
        });
    }
}

/// A SentencePiece-like BPE, as Llama 2's: a space is `▁`, what has no token is spelled in bytes.
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
fn a_tokenizer_that_falls_back_to_bytes_gives_any_text_back() {
    let mut json = with_byte_fallback();
    let tokenizer = Tokenizer::from_bytes(json.to_string().as_bytes()).unwrap();
    assert_eq!(tokenizer.eos(), 2);
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
fn steps_at_which_the_crate_would_panic_are_refused() {
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
fn a_models_config_names_its_eos() {
    let of = |eos: u32| {
        let mut config = tiny_config();
        (config.vocab_size, config.eos_token_id) = (300, Some(eos));
        Tokenizer::from_bytes(with_byte_fallback().to_string().as_bytes()).unwrap().for_model(&config.into())
    };
    assert_eq!(of(1).unwrap().eos(), 1);
    let error = of(260).unwrap_err().to_string();
    assert!(error.contains("260 as EOS, which is not a special token"), "{error}");
}
