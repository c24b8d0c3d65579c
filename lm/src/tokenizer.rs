//! BPE tokenizers that can encode any text, in Hugging Face's file format.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::{Value, json};
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, ModelWrapper, PostProcessorWrapper, TokenizerBuilder};

use crate::io::{self, Gguf};
use crate::{Eos, Error, MarkupTokenizer, ModelConfig, Result};

/// Names of EOS tokens to look for, in this order, if no config file names the id: those of GPT-2, Llama 3, Llama 2,
/// Gemma, ChatML and Llama 3's chats.
const EOS_TOKENS: [&str; 6] = ["<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<|eot_id|>"];

/// A character that no vocabulary has. It stands before a text that continues another one, so that steps for the
/// beginning of a text do not apply.
const CONTINUATION_MARK: &str = "\u{10ffff}";

/// Size limit for `tokenizer.json`, in bytes; a vocabulary of 260,000 takes about 35 MB.
const MAX_FILE_BYTES: u64 = 128 << 20;

/// Limit on how much longer a normalizer or decoder may make a text; Llama's make it at most 12 times as long.
const MAX_GROWTH: f64 = 256.0;

/// The longest text that [`Tokenizer::check_text`] accepts, in bytes after normalization.
const MAX_TEXT_BYTES: f64 = (2 << 20) as f64;

/// Converts text to ids and back as transformers does with the same `tokenizer.json`. Tokens that the post-processor
/// puts before a text (BOS) are included, whatever `tokenizer_config.json` says. Tokens behind a text are left to the
/// caller, who knows whether the text ends.
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    /// Ids before every text: none, or BOS.
    bos: Vec<u32>,
    /// The ids of [`CONTINUATION_MARK`]; empty for byte-level tokenizers, which treat the beginning of a text like the
    /// rest.
    mark_ids: Vec<u32>,
    eos: Eos,
    /// Upper bound on the factor by which normalization lengthens a text.
    growth: f64,
    path: PathBuf,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("path", &self.path).field("vocab_size", &self.vocab_size()).finish()
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json`, the one in a folder, or the tokenizer of a GGUF file. EOS is the first of
    /// [`EOS_TOKENS`] that is a special token. Errors: an unreadable file, no EOS, missing bytes, or ids drawn at
    /// random.
    pub fn load(path: &Path) -> Result<Self> {
        let (inner, path) = read(path)?;
        let eos = find_eos(&inner).ok_or_else(|| error(&path, format!("has no EOS: {}", no_eos_message())))?;
        Self::new(inner, eos, &path)
    }

    /// Like [`Tokenizer::load`], for a model: the model's config files name EOS, or else it is the first of
    /// [`EOS_TOKENS`]. Further errors: ids that the model does not have, or an EOS that is not a special token here.
    pub fn load_for(path: &Path, config: &ModelConfig) -> Result<Self> {
        let (inner, path) = read(path)?;
        let added = inner.get_added_tokens_decoder();
        let eos = match config.eos() {
            Some(eos) => match eos.ids().iter().find(|id| !added.get(id).is_some_and(|token| token.special)) {
                None => eos,
                Some(id) => {
                    let message =
                        format!("the model's config names id {id} as EOS, which is not a special token of the tokenizer");
                    return Err(error(&path, message));
                }
            },
            None => find_eos(&inner).ok_or_else(|| {
                let message = format!(
                    "has no EOS: `eos_token_id` in the model's config.json and generation_config.json names no token of its \
                     vocabulary, and {}",
                    no_eos_message()
                );
                error(&path, message)
            })?,
        };
        let tokenizer = Self::new(inner, eos, &path)?;
        tokenizer.check_fits(config)?;
        Ok(tokenizer)
    }

    /// Like [`Tokenizer::load`], with the caller's EOS, which is not checked.
    pub fn load_with_eos(path: &Path, eos: Eos) -> Result<Self> {
        let (inner, path) = read(path)?;
        Self::new(inner, eos, &path)
    }

    /// [`Tokenizer::load`] from memory.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        Self::parse(bytes, Path::new("(in memory)"))
    }

    fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let inner = parse(bytes, path)?;
        let eos = find_eos(&inner).ok_or_else(|| error(path, format!("has no EOS: {}", no_eos_message())))?;
        Self::new(inner, eos, path)
    }

    fn new(mut inner: tokenizers::Tokenizer, eos: Eos, path: &Path) -> Result<Self> {
        check_model(&inner).map_err(|message| error(path, message))?;
        inner.set_encode_special_tokens(true);
        // A file may ask for truncation or padding; callers of this crate want neither.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| error(path, e.to_string()))?;
        let processor = serde_json::to_value(inner.get_post_processor()).map_err(|e| error(path, e.to_string()))?;
        let bos = bos_ids(&processor, &eos).map_err(|message| error(path, message))?;
        if !bos.is_empty() {
            let processor = bos_post_processor(&inner, &bos).map_err(|message| error(path, message))?;
            inner.with_post_processor(Some(processor));
        }
        let mark_ids = continuation_mark_ids(&inner).map_err(|message| error(path, message))?;
        let normalizer = serde_json::to_value(inner.get_normalizer()).map_err(|e| error(path, e.to_string()))?;
        Ok(Self { inner, bos, mark_ids, eos, growth: growth(&normalizer), path: path.to_path_buf() })
    }

    /// Trains a byte-level BPE of exactly `vocab_size` tokens, or fewer if the texts give no more merges; id 0 is
    /// `<|endoftext|>`. Equal texts give equal bytes.
    pub fn train_bpe<S>(texts: impl Iterator<Item = S> + Send, vocab_size: usize) -> Result<Self>
    where
        S: AsRef<str> + Send,
    {
        let path = Path::new("(in training)");
        if vocab_size < 257 {
            return Err(error(
                path,
                format!("vocab_size is {vocab_size}, expected at least 257: the bytes and `{}`", EOS_TOKENS[0]),
            ));
        }
        let bytes = ByteLevel::new(false, true, true);
        let mut trainer = BpeTrainerBuilder::new()
            .show_progress(false)
            .vocab_size(vocab_size)
            .min_frequency(2)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from(EOS_TOKENS[0], true)])
            .build();
        let mut inner = TokenizerBuilder::new()
            .with_model(BPE::default())
            .with_normalizer(None::<tokenizers::NormalizerWrapper>)
            .with_pre_tokenizer(Some(bytes))
            .with_post_processor(None::<tokenizers::PostProcessorWrapper>)
            .with_decoder(Some(ByteLevelDecoder::new(false, true, true)))
            .build()
            .map_err(|e| error(path, e.to_string()))?;
        inner.train(&mut trainer, texts).map_err(|e| error(path, e.to_string()))?;
        // Goes through the file format, so that a trained tokenizer equals the one loaded from its file.
        let json = inner.to_string(false).map_err(|e| error(path, e.to_string()))?;
        Self::parse(json.as_bytes(), path)
    }

    /// Writes `tokenizer.json`.
    pub fn save(&self, path: &Path) -> Result<()> {
        std::fs::write(path, self.to_json()?).map_err(Error::io(path))
    }

    /// The contents of `tokenizer.json`.
    pub fn to_json(&self) -> Result<String> {
        self.inner.to_string(true).map_err(|e| error(&self.path, e.to_string()))
    }

    /// Errors if encoding this text could take hundreds of megabytes.
    pub fn check_text(&self, text: &str) -> Result<()> {
        if text.len() as f64 * self.growth <= MAX_TEXT_BYTES {
            return Ok(());
        }
        let max_bytes = (MAX_TEXT_BYTES / self.growth) as usize;
        Err(Error::BadInput {
            message: format!("a text has {} bytes, but this tokenizer accepts at most {max_bytes}", text.len()),
        })
    }

    /// Ids of a whole text, with BOS if the file asks for it, without EOS. A special token spelled out in the text is
    /// encoded as text. Rare bytes that the vocabulary lacks are dropped, as in transformers.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let mut ids = self.bos.clone();
        ids.extend(encode(&self.inner, text));
        ids
    }

    /// Ids of a text that begins with a space and continues a non-empty text encoded by [`Tokenizer::encode`]. Together
    /// they are the ids of the whole, unless a token of the whole spans the border.
    pub fn encode_continuation(&self, text: &str) -> Vec<u32> {
        let mark = if self.mark_ids.is_empty() { "" } else { CONTINUATION_MARK };
        encode(&self.inner, &format!("{mark}{text}")).split_off(self.mark_ids.len())
    }

    /// The text of ids; special tokens and unknown ids are left out. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.inner.decode(ids, true).expect("decoders accept all tokens")
    }

    /// The text of ids that continue others. Keeps its first space even if the decoder strips that of a whole text.
    pub fn decode_continuation(&self, ids: &[u32]) -> String {
        if self.mark_ids.is_empty() {
            return self.decode(ids);
        }
        let text = self.decode(&[&self.mark_ids, ids].concat());
        // Bytes that belong to a character begun before these ids merge with those of the mark.
        text.trim_start().strip_prefix(CONTINUATION_MARK).map_or_else(|| self.decode(ids), str::to_owned)
    }

    /// An encoder for texts whose markup may hold added tokens.
    pub fn markup(&self) -> MarkupTokenizer {
        MarkupTokenizer::new(&self.inner)
    }

    /// The id of a token, special ones included.
    pub fn token_id(&self, token: &str) -> Option<u32> {
        self.inner.token_to_id(token)
    }

    /// The number of tokens, special ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The ids that end a text.
    pub fn eos(&self) -> &Eos {
        &self.eos
    }

    /// The ids before every text: none, or BOS.
    pub fn bos_ids(&self) -> &[u32] {
        &self.bos
    }

    /// Errors if this tokenizer can give an id that the model does not have.
    pub fn check_fits(&self, config: &ModelConfig) -> Result<()> {
        self.check_ids(config.vocab_size())
    }

    /// Errors if this tokenizer can give an id that is not below `vocab`. The ids of a file may have gaps, so that their
    /// number says little.
    pub fn check_ids(&self, vocab: usize) -> Result<()> {
        let largest = self.inner.get_vocab(true).into_values().max().unwrap_or(0);
        if largest as usize >= vocab {
            let message = format!("has id {largest}, but the model's vocabulary has only {vocab} tokens");
            return Err(error(&self.path, message));
        }
        Ok(())
    }
}

/// The tokenizer of a file or folder, and the path of the file that holds it.
fn read(path: &Path) -> Result<(tokenizers::Tokenizer, PathBuf)> {
    if io::is_gguf(path) {
        let inner = parse(Gguf::open(path)?.tokenizer.to_string().as_bytes(), path)?;
        return Ok((inner, path.to_path_buf()));
    }
    let path = if path.is_dir() { path.join("tokenizer.json") } else { path.to_path_buf() };
    Ok((parse(&io::read_small(&path, MAX_FILE_BYTES)?, &path)?, path))
}

fn parse(bytes: &[u8], path: &Path) -> Result<tokenizers::Tokenizer> {
    check_steps(bytes).map_err(|message| error(path, message))?;
    tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| error(path, e.to_string()))
}

fn encode(inner: &tokenizers::Tokenizer, text: &str) -> Vec<u32> {
    // `check_model` excludes failures: a byte without a token is dropped, or becomes an unknown token that exists.
    inner.encode_fast(text, false).expect("a BPE of all bytes encodes any text").get_ids().to_vec()
}

fn find_eos(inner: &tokenizers::Tokenizer) -> Option<Eos> {
    let added = inner.get_added_tokens_decoder();
    let special = |id: &u32| added.get(id).is_some_and(|token| token.special);
    EOS_TOKENS.iter().find_map(|token| inner.token_to_id(token).filter(special)).map(Eos::from)
}

fn no_eos_message() -> String {
    format!("none of `{}` is a special token of the tokenizer", EOS_TOKENS.join("`, `"))
}

/// The ids that a post-processor puts before a text. Errors: an unsupported kind, or anything but EOS behind the text.
fn bos_ids(processor: &Value, eos: &Eos) -> std::result::Result<Vec<u32>, String> {
    #[derive(Deserialize)]
    #[serde(tag = "type")]
    enum Processor {
        ByteLevel,
        Sequence { processors: Vec<Value> },
        TemplateProcessing { single: Vec<Piece>, special_tokens: BTreeMap<String, SpecialIds> },
    }
    #[derive(Deserialize)]
    enum Piece {
        Sequence {},
        SpecialToken { id: String },
    }
    #[derive(Deserialize)]
    struct SpecialIds {
        ids: Vec<u32>,
    }
    let unsupported = |e| format!("its post-processor is not supported: {e}");
    let (pieces, tokens) = match Option::<Processor>::deserialize(processor).map_err(unsupported)? {
        None | Some(Processor::ByteLevel) => return Ok(vec![]),
        Some(Processor::Sequence { processors }) => {
            let all = processors.iter().rev().map(|processor| bos_ids(processor, eos));
            return Ok(all.collect::<std::result::Result<Vec<_>, _>>()?.concat());
        }
        Some(Processor::TemplateProcessing { single, special_tokens }) => (single, special_tokens),
    };
    let ids = |pieces: &[Piece]| -> std::result::Result<Vec<u32>, String> {
        let ids = pieces.iter().map(|piece| match piece {
            Piece::Sequence {} => Err("its post-processor inserts the text twice".to_owned()),
            Piece::SpecialToken { id } => tokens
                .get(id)
                .map(|special| special.ids.clone())
                .ok_or_else(|| format!("its post-processor does not give the id of `{}`", id.escape_debug())),
        });
        Ok(ids.collect::<std::result::Result<Vec<_>, _>>()?.concat())
    };
    let text = pieces.iter().position(|piece| matches!(piece, Piece::Sequence {}));
    let text = text.ok_or("its post-processor does not insert the text")?;
    match ids(&pieces[text + 1..])?.iter().find(|&&id| !eos.contains(id)) {
        None => ids(&pieces[..text]),
        Some(id) => Err(format!("its post-processor puts id {id} after the text, where only EOS is supported")),
    }
}

/// A post-processor that puts these ids before a text and nothing behind it. Errors: an id without a token.
fn bos_post_processor(inner: &tokenizers::Tokenizer, bos: &[u32]) -> std::result::Result<PostProcessorWrapper, String> {
    let token = |&id: &u32| {
        inner
            .id_to_token(id)
            .ok_or_else(|| format!("its post-processor puts id {id} before the text, which is not a token"))
    };
    let tokens = bos.iter().map(token).collect::<std::result::Result<Vec<_>, _>>()?;
    let template = |sequences: &[&str]| -> Vec<Value> {
        let special = tokens.iter().map(|token| json!({ "SpecialToken": { "id": token, "type_id": 0 } }));
        special.chain(sequences.iter().map(|id| json!({ "Sequence": { "id": id, "type_id": 0 } }))).collect()
    };
    let special: serde_json::Map<String, Value> = tokens
        .iter()
        .zip(bos)
        .map(|(token, id)| (token.clone(), json!({ "id": token, "ids": [id], "tokens": [token] })))
        .collect();
    let template = json!({
        "type": "TemplateProcessing",
        "single": template(&["A"]),
        "pair": template(&["A", "B"]),
        "special_tokens": special,
    });
    serde_json::from_value(template).map_err(|e| e.to_string())
}

/// The ids of [`CONTINUATION_MARK`]. Additions of a step to the beginning of a text come before it, and no token spans
/// the mark and the text behind it. Errors: a token does.
fn continuation_mark_ids(inner: &tokenizers::Tokenizer) -> std::result::Result<Vec<u32>, String> {
    if is_byte_level(inner) {
        return Ok(vec![]);
    }
    let spans_mark = |token: &String| {
        token.contains(CONTINUATION_MARK) || token.strip_prefix("<0xBF>").is_some_and(|rest| !rest.is_empty())
    };
    match inner.get_vocab(true).into_keys().find(spans_mark) {
        Some(token) => {
            Err(format!("has the token `{}`, which begins with the last byte of U+10FFFF", token.escape_debug()))
        }
        None => Ok(encode(inner, CONTINUATION_MARK)),
    }
}

fn is_byte_level(inner: &tokenizers::Tokenizer) -> bool {
    let mut steps = serde_json::to_string(&inner.get_pre_tokenizer()).unwrap_or_default();
    steps.retain(|c| !c.is_whitespace());
    steps.contains("\"ByteLevel\"")
}

/// Upper bound on the factor by which the steps of a normalizer or decoder lengthen a text, in bytes. Unicode's own
/// normalization and case mapping are not counted.
fn growth(steps: &Value) -> f64 {
    let inner = match steps {
        Value::Object(fields) => fields.values().map(growth).product(),
        Value::Array(steps) => steps.iter().map(growth).product(),
        _ => 1.0,
    };
    let length = |value: &Value| value.as_str().map(|text| text.len() as f64);
    // `Replace`: a regex may match the empty string before each byte. `Prepend`: a text may be one byte long.
    let own = match (steps.get("content").and_then(length), steps.get("pattern"), steps.get("prepend").and_then(length))
    {
        (Some(content), Some(pattern), _) => {
            match pattern.get("String").and_then(length).filter(|&length| length > 0.0) {
                Some(length) => content / length,
                None => 1.0 + content,
            }
        }
        (_, _, Some(prepended)) => 1.0 + prepended,
        _ => 1.0,
    };
    inner * own.max(1.0)
}

/// Errors: contents that make the `tokenizers` crate panic or run out of memory: a decoder that is not JSON, an invalid
/// `Precompiled` normalizer (no BPE has one), or steps that make a text far longer.
fn check_steps(bytes: &[u8]) -> std::result::Result<(), String> {
    #[derive(Deserialize)]
    struct Steps {
        #[serde(default)]
        normalizer: Value,
        #[serde(default)]
        decoder: Value,
    }
    fn is_precompiled(step: &Value) -> bool {
        match step {
            Value::Object(fields) => {
                fields.get("type").is_some_and(|kind| kind == "Precompiled") || fields.values().any(is_precompiled)
            }
            Value::Array(steps) => steps.iter().any(is_precompiled),
            _ => false,
        }
    }
    let steps: Steps = serde_json::from_slice(bytes).map_err(|e| e.to_string())?;
    if is_precompiled(&steps.normalizer) {
        return Err("has a `Precompiled` normalizer, which is not supported".to_owned());
    }
    for (name, steps) in [("normalizer", &steps.normalizer), ("decoder", &steps.decoder)] {
        let growth = growth(steps);
        if growth > MAX_GROWTH {
            return Err(format!(
                "its {name} can make a text {growth:.0} times as long; at most {MAX_GROWTH} is supported"
            ));
        }
    }
    Ok(())
}

/// Whether the vocabulary may lack this letter of the byte-level alphabet. SmolLM2 lacks bytes that UTF-8 never has
/// (C0, C1, F5 to FF), control characters other than tab and line ends, and the first bytes of planes without
/// characters (F1, F2, F4).
fn is_rare(letter: char) -> bool {
    // The letters of 00 to 20 are U+0100 and on, that of 7F is U+0121; the others stand for themselves.
    let control = matches!(letter, '\u{100}'..='\u{108}' | '\u{10b}' | '\u{10c}' | '\u{10e}'..='\u{11f}' | '\u{121}');
    control || matches!(letter, '\u{c0}' | '\u{c1}' | '\u{f1}' | '\u{f2}' | '\u{f4}'..='\u{ff}')
}

/// Errors: some text cannot be encoded, or its ids could differ from call to call. Byte-level pre-tokenization needs a
/// token for each letter of its alphabet but rare ones; a BPE that falls back to bytes needs one for each byte.
fn check_model(inner: &tokenizers::Tokenizer) -> std::result::Result<(), String> {
    let ModelWrapper::BPE(model) = inner.get_model() else { return Err("is not a BPE tokenizer".to_owned()) };
    // The only random step in the `tokenizers` crate besides Unigram's sampling, which no file enables.
    if let Some(dropout) = model.dropout.filter(|&dropout| dropout > 0.0) {
        return Err(format!(
            "its model has `dropout` {dropout}, so that ids would change from call to call; set it to null"
        ));
    }
    if is_byte_level(inner) {
        let is_missing = |c: &char| !is_rare(*c) && inner.token_to_id(&c.to_string()).is_none();
        if let Some(byte) = ByteLevel::alphabet().into_iter().filter(is_missing).min() {
            return Err(format!("has no token for the byte-level letter `{byte}`"));
        }
    } else if model.byte_fallback {
        let byte = |byte: u8| format!("<0x{byte:02X}>");
        if let Some(missing) = (0..=255).map(byte).find(|token| inner.token_to_id(token).is_none()) {
            return Err(format!("has no byte token `{missing}`"));
        }
    } else {
        return Err("is neither a byte-level nor a byte-fallback tokenizer".to_owned());
    }
    match &model.unk_token {
        Some(unknown) if inner.token_to_id(unknown).is_none() => {
            Err(format!("its unknown token `{unknown}` is not in its vocabulary"))
        }
        _ => Ok(()),
    }
}

fn error(path: &Path, message: impl Into<String>) -> Error {
    Error::Tokenizer { path: path.to_path_buf(), message: message.into() }
}
