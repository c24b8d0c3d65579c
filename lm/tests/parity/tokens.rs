//! That GPT-2's and SmolLM2's tokenizers, cut down to their first merges, give the ids that transformers gives.

use std::path::Path;

use lm::Tokenizer;

#[test]
fn ids_are_those_of_transformers() {
    for name in ["gpt2", "smollm2"] {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokens");
        let tokenizer = Tokenizer::load(&folder.join(format!("{name}.json"))).unwrap();
        let texts = std::fs::read(folder.join(format!("{name}.ids.json"))).unwrap();
        let texts: Vec<(String, Vec<u32>)> = serde_json::from_slice(&texts).unwrap();
        assert!(texts.len() > 40);
        for (text, ids) in texts {
            assert_eq!(tokenizer.encode(&text), ids, "{name}: {text:?}");
        }
    }
}

#[test]
fn text_comes_back_from_ids() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokens");
    let tokenizer = Tokenizer::load(&folder.join("gpt2.json")).unwrap();
    let texts = std::fs::read(folder.join("gpt2.ids.json")).unwrap();
    let texts: Vec<(String, Vec<u32>)> = serde_json::from_slice(&texts).unwrap();
    for (text, ids) in texts {
        assert_eq!(tokenizer.decode(&ids), text);
    }
}
