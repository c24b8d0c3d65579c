//! A BPE tokenizer that knows every byte, in Hugging Face's file format; knows no prompts.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, ModelWrapper, TokenizerBuilder};

use crate::files::{self, Gguf};
use crate::{Error, ModelConfig, Result};

/// The end of a sequence in GPT-2, Llama 3 and Llama 2, in the order in which they are looked for.
const EOS: [&str; 3] = ["<|endoftext|>", "<|end_of_text|>", "</s>"];

/// The largest `tokenizer.json` that is read, in bytes; that of a vocabulary of 260,000 has about 35 MB.
const MAX_BYTES: u64 = 128 << 20;

/// Text to ids and back. The one special token that is needed is EOS, which ends a sequence: `<|endoftext|>`,
/// `<|end_of_text|>` or `</s>`, or what a model's config file names (`for_model`).
#[derive(Clone)]
pub struct Tokenizer {
    inner: tokenizers::Tokenizer,
    eos: u32,
    path: PathBuf,
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer").field("path", &self.path).field("vocab_size", &self.vocab_size()).finish()
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json`, that of a folder, or what a GGUF file holds. Errors: unreadable, no token for EOS in it, or
    /// not all bytes.
    pub fn load(path: &Path) -> Result<Self> {
        if files::is_gguf(path) {
            return Self::parse(Gguf::open(path)?.tokenizer.to_string().as_bytes(), path);
        }
        let path = if path.is_dir() { path.join("tokenizer.json") } else { path.to_path_buf() };
        let bytes = files::whole(&path, MAX_BYTES)?;
        Self::parse(&bytes, &path)
    }

    /// The tokenizer for a model: with the EOS that the model's config file names, if it does. Errors: ids that the model does
    /// not have, or an EOS that is not a special token here.
    pub fn for_model(mut self, config: &ModelConfig) -> Result<Self> {
        self.check_fits(config)?;
        if let Some(eos) = config.eos_token_id() {
            let added = self.inner.get_added_tokens_decoder();
            if !added.get(&eos).is_some_and(|token| token.special) {
                let what = format!("the model's config names {eos} as EOS, which is not a special token here");
                return Err(error(&self.path, what));
            }
            self.eos = eos;
        }
        Ok(self)
    }

    /// The same from memory.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        Self::parse(bytes, Path::new("(in memory)"))
    }

    fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        check_steps(bytes).map_err(|what| error(path, what))?;
        let inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| error(path, e.to_string()))?;
        Self::of(inner, path)
    }

    fn of(mut inner: tokenizers::Tokenizer, path: &Path) -> Result<Self> {
        let known = EOS.iter().find_map(|token| inner.token_to_id(token));
        let eos = known.ok_or_else(|| error(path, format!("has no token for EOS; expected one of {EOS:?}")))?;
        check_bytes(&inner).map_err(|what| error(path, what))?;
        inner.set_encode_special_tokens(true);
        // A file may ask for truncation or padding; neither is ours to want here.
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| error(path, e.to_string()))?;
        Ok(Self { inner, eos, path: path.to_path_buf() })
    }

    /// Trains a byte-level BPE of exactly `vocab_size` tokens, or fewer if the texts give no more merges; id 0 is
    /// `<|endoftext|>`. The same texts give the same bytes.
    pub fn train_bpe<S>(texts: impl Iterator<Item = S> + Send, vocab_size: usize) -> Result<Self>
    where
        S: AsRef<str> + Send,
    {
        let path = Path::new("(in training)");
        if vocab_size < 257 {
            return Err(error(
                path,
                format!("vocab_size {vocab_size}; expected at least 257: the bytes and `{}`", EOS[0]),
            ));
        }
        let bytes = ByteLevel::new(false, true, true);
        let mut trainer = BpeTrainerBuilder::new()
            .show_progress(false)
            .vocab_size(vocab_size)
            .min_frequency(2)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from(EOS[0], true)])
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
        // Through the file format, so that a trained tokenizer is the one that its file gives.
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

    /// Ids of a text; no special token is added. A special token written out in the text is text, not that token. Rare bytes
    /// that the vocabulary lacks are left out, as transformers leaves them out.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        // `of` has checked what could fail: a byte without a token is dropped, or is an unknown token that exists.
        let encoding = self.inner.encode_fast(text, false).expect("a BPE of all bytes encodes any text");
        encoding.get_ids().to_vec()
    }

    /// The text of ids; special tokens and unknown ids are left out. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.inner.decode(ids, true).expect("decoders accept any tokens")
    }

    /// Tokens in all, special ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The id of EOS.
    pub fn eos(&self) -> u32 {
        self.eos
    }

    /// Errors if this tokenizer can give an id that the model does not have.
    pub fn check_fits(&self, config: &ModelConfig) -> Result<()> {
        let largest = self.inner.get_vocab(true).into_values().max().unwrap_or(0);
        let vocab = config.vocab_size();
        if largest as usize >= vocab {
            let what = format!("has id {largest}; the model's vocabulary has only {vocab} tokens");
            return Err(error(&self.path, what));
        }
        Ok(())
    }
}

/// What makes the crate panic instead of giving an error: a decoder that is not JSON, and a `Precompiled` normalizer that is
/// not what it should be. No BPE has the latter.
fn check_steps(bytes: &[u8]) -> std::result::Result<(), String> {
    #[derive(Deserialize)]
    struct Steps {
        #[serde(default)]
        normalizer: Value,
        #[serde(default, rename = "decoder")]
        _decoder: Value,
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
        return Err("has a `Precompiled` normalizer, as no BPE has; it is not read".to_owned());
    }
    Ok(())
}

/// Whether a byte, by its letter of the byte-level alphabet, may be missing. SmolLM2 lacks bytes that UTF-8 never has (C0, C1,
/// F5 to FF), control characters other than tab and line ends, and the first bytes of planes without characters (F1, F2, F4).
fn is_rare(letter: char) -> bool {
    // The letters of 00 to 20 are U+0100 and on, that of 7F is U+0121; the others stand for themselves.
    let control = matches!(letter, '\u{100}'..='\u{108}' | '\u{10b}' | '\u{10c}' | '\u{10e}'..='\u{11f}' | '\u{121}');
    control || matches!(letter, '\u{c0}' | '\u{c1}' | '\u{f1}' | '\u{f2}' | '\u{f4}'..='\u{ff}')
}

/// What keeps some text from being encoded, if anything: byte-level pre-tokenization needs a token for each letter of its
/// alphabet but rare ones, a BPE that falls back to bytes one for each byte.
fn check_bytes(inner: &tokenizers::Tokenizer) -> std::result::Result<(), String> {
    let ModelWrapper::BPE(model) = inner.get_model() else { return Err("is not a BPE".to_owned()) };
    let mut steps = serde_json::to_string(&inner.get_pre_tokenizer()).unwrap_or_default();
    steps.retain(|c| !c.is_whitespace());
    if steps.contains("\"ByteLevel\"") {
        let lacks = |c: &char| !is_rare(*c) && inner.token_to_id(&c.to_string()).is_none();
        if let Some(byte) = ByteLevel::alphabet().into_iter().filter(lacks).min() {
            return Err(format!("lacks the byte-level token `{byte}`"));
        }
    } else if model.byte_fallback {
        let byte = |byte: u8| format!("<0x{byte:02X}>");
        if let Some(missing) = (0..=255).map(byte).find(|token| inner.token_to_id(token).is_none()) {
            return Err(format!("lacks the byte token `{missing}`"));
        }
    } else {
        return Err("is neither a byte-level tokenizer nor one that falls back to bytes".to_owned());
    }
    match &model.unk_token {
        Some(unknown) if inner.token_to_id(unknown).is_none() => {
            Err(format!("its unknown token `{unknown}` is not in its vocabulary"))
        }
        _ => Ok(()),
    }
}

fn error(path: &Path, what: impl Into<String>) -> Error {
    Error::Tokenizer { path: path.to_path_buf(), what: what.into() }
}
