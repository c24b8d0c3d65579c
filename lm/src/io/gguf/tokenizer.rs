//! A `tokenizer.json` from a GGUF file's metadata, for byte-level BPE.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::{Metadata, required};

const TOKENS: &str = "tokenizer.ggml.tokens";
const TYPES: &str = "tokenizer.ggml.token_type";
const MERGES: &str = "tokenizer.ggml.merges";
const BOS: &str = "tokenizer.ggml.bos_token_id";

/// llama.cpp's types of tokens that are matched before any merge.
const CONTROL: i32 = 3;
const USER_DEFINED: i32 = 4;

/// Llama 3's split pattern, from its own `tokenizer.json`.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Splits as the tokenizers that llama.cpp names do; transformers' own GGUF reader does not split SmolLM2's digits.
///
/// Errors name an unsupported tokenizer model or split, or a contradiction in the vocabulary.
pub(super) fn read(metadata: &Metadata) -> Result<Value, String> {
    let model = required("tokenizer.ggml.model", metadata.text("tokenizer.ggml.model"))?;
    if model != "gpt2" {
        return Err(format!(
            "tokenizer.ggml.model is `{}`; only `gpt2`, a byte-level BPE, is supported",
            model.escape_debug()
        ));
    }
    let split = required("tokenizer.ggml.pre", metadata.text("tokenizer.ggml.pre"))?;
    if metadata.flag("tokenizer.ggml.add_space_prefix")?.unwrap_or(false) {
        return Err("tokenizer.ggml.add_space_prefix is set; that is not supported for a byte-level BPE".to_owned());
    }
    let bytes = |regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": regex });
    let (steps, ignore_merges) = match split {
        "gpt-2" => (bytes(true), false),
        "smollm" => {
            let digits = json!({ "type": "Digits", "individual_digits": true });
            (json!({ "type": "Sequence", "pretokenizers": [digits, bytes(true)] }), false)
        }
        "llama-bpe" => {
            let split =
                json!({ "type": "Split", "pattern": { "Regex": LLAMA3 }, "behavior": "Isolated", "invert": false });
            (json!({ "type": "Sequence", "pretokenizers": [split, bytes(false)] }), true)
        }
        other => {
            return Err(format!(
                "tokenizer.ggml.pre is `{}`; only `gpt-2`, `smollm` and `llama-bpe` are supported",
                other.escape_debug()
            ));
        }
    };

    let tokens = required(TOKENS, metadata.texts(TOKENS))?;
    // As in llama.cpp, Llama 3's tokenizer adds BOS unless the file says otherwise.
    let adds_bos = metadata.flag("tokenizer.ggml.add_bos_token")?.unwrap_or(split == "llama-bpe");
    let bos = match metadata.token(BOS)? {
        Some(id) if adds_bos => {
            Some((id, tokens.get(id).ok_or_else(|| format!("`{BOS}` is {id}, which is not a token"))?))
        }
        None if metadata.flag("tokenizer.ggml.add_bos_token")? == Some(true) => {
            return Err(format!("`tokenizer.ggml.add_bos_token` is set, but `{BOS}` is missing"));
        }
        _ => None,
    };
    let merges = required(MERGES, metadata.texts(MERGES))?;
    Ok(json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added_tokens(tokens, required(TYPES, metadata.ints(TYPES))?)?,
        "normalizer": null,
        "pre_tokenizer": steps,
        "post_processor": bos.map_or_else(|| bytes(true), |(id, token)| bos_post_processor(id, token)),
        "decoder": bytes(true),
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": ignore_merges,
            "vocab": token_ids(tokens)?,
            "merges": merge_pairs(tokens, merges)?,
        },
    }))
}

/// The chat template and the tokens that it may use, with transformers' names. Errors: a token's id without a token.
pub(super) fn chat_config(metadata: &Metadata) -> Result<Value, String> {
    let template = metadata.text("tokenizer.chat_template")?;
    let tokens = required(TOKENS, metadata.texts(TOKENS))?;
    let token = |key: &str| match metadata.token(key)? {
        Some(id) => tokens.get(id).map(Some).ok_or_else(|| format!("`{key}` is {id}, which is not a token")),
        None => Ok(None),
    };
    let (bos, eos) = (token(BOS)?, token("tokenizer.ggml.eos_token_id")?);
    Ok(json!({ "bos_token": bos, "eos_token": eos, "chat_template": template }))
}

/// A post-processor that puts a token before every text.
fn bos_post_processor(id: usize, token: &str) -> Value {
    let piece = |name: &str, id: &str| json!({ name: { "id": id, "type_id": 0 } });
    let (bos, a, b) = (piece("SpecialToken", token), piece("Sequence", "A"), piece("Sequence", "B"));
    json!({
        "type": "TemplateProcessing",
        "single": [bos, a],
        "pair": [bos, a, b],
        "special_tokens": { token: { "id": token, "ids": [id], "tokens": [token] } },
    })
}

/// Ids by token.
fn token_ids(tokens: &[String]) -> Result<Map<String, Value>, String> {
    let mut ids = Map::new();
    for (id, token) in tokens.iter().enumerate() {
        if ids.insert(token.clone(), json!(id)).is_some() {
            return Err(format!("`{TOKENS}` has `{}` twice", token.escape_debug()));
        }
    }
    Ok(ids)
}

/// Merges as pairs of tokens. Errors: a part or the whole of a merge is not a token.
fn merge_pairs(tokens: &[String], merges: &[String]) -> Result<Vec<Value>, String> {
    let known: BTreeSet<&str> = tokens.iter().map(String::as_str).collect();
    let pair = |merge: &String| {
        // A byte-level token contains no space: the alphabet has another letter for it.
        let (left, right) = merge.split_once(' ')?;
        let whole = format!("{left}{right}");
        [left, right, &whole].iter().all(|text| known.contains(text)).then(|| json!([left, right]))
    };
    merges
        .iter()
        .map(|merge| {
            pair(merge).ok_or_else(|| format!("`{MERGES}` has `{}`, which is not two tokens", merge.escape_debug()))
        })
        .collect()
}

/// The tokens that are matched in a text before it is split.
fn added_tokens(tokens: &[String], types: &[i32]) -> Result<Vec<Value>, String> {
    if types.len() != tokens.len() {
        return Err(format!("`{TYPES}` has {} entries for {} tokens", types.len(), tokens.len()));
    }
    let entry = |(id, (token, kind)): (usize, (&String, &i32))| {
        (*kind == CONTROL || *kind == USER_DEFINED).then(|| {
            json!({
                "id": id,
                "content": token,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": *kind == CONTROL,
            })
        })
    };
    Ok(tokens.iter().zip(types).enumerate().filter_map(entry).collect())
}
