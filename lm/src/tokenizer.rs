//! A byte-level BPE tokenizer in Hugging Face's file format; knows no prompts.

use std::path::{Path, PathBuf};

use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::{BPE, BpeTrainerBuilder};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, ModelWrapper, TokenizerBuilder};

use crate::{Error, ModelConfig, Result};

const EOS: &str = "<|endoftext|>";

/// Text to ids and back. `<|endoftext|>` is the one special token that is needed; it ends a sequence.
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
    /// Reads a `tokenizer.json`. Errors: unreadable, or no `<|endoftext|>` in it.
    pub fn load(path: &Path) -> Result<Self> {
        let bytes = std::fs::read(path).map_err(Error::io(path))?;
        Self::parse(&bytes, path)
    }

    /// The same from memory.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self> {
        Self::parse(bytes, Path::new("(in memory)"))
    }

    fn parse(bytes: &[u8], path: &Path) -> Result<Self> {
        let inner = tokenizers::Tokenizer::from_bytes(bytes).map_err(|e| error(path, e.to_string()))?;
        Self::of(inner, path)
    }

    fn of(mut inner: tokenizers::Tokenizer, path: &Path) -> Result<Self> {
        let eos = inner.token_to_id(EOS).ok_or_else(|| error(path, format!("has no token `{EOS}`")))?;
        let mut steps = serde_json::to_string(&inner.get_pre_tokenizer()).unwrap_or_default();
        steps.retain(|c| !c.is_whitespace());
        if !steps.contains("\"ByteLevel\"") {
            return Err(error(path, "is not a byte-level tokenizer"));
        }
        if let Some(byte) =
            ByteLevel::alphabet().into_iter().filter(|c| inner.token_to_id(&c.to_string()).is_none()).min()
        {
            return Err(error(path, format!("lacks the byte-level token `{byte}`")));
        }
        if let ModelWrapper::BPE(model) = inner.get_model()
            && let Some(unknown) = &model.unk_token
            && inner.token_to_id(unknown).is_none()
        {
            return Err(error(path, format!("its unknown token `{unknown}` is not in its vocabulary")));
        }
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
            return Err(error(path, format!("vocab_size {vocab_size}; expected at least 257: the bytes and `{EOS}`")));
        }
        let bytes = ByteLevel::new(false, true, true);
        let mut trainer = BpeTrainerBuilder::new()
            .show_progress(false)
            .vocab_size(vocab_size)
            .min_frequency(2)
            .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
            .special_tokens(vec![AddedToken::from(EOS, true)])
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

    /// Ids of a text; no special token is added. `<|endoftext|>` in the text itself is text, not EOS.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        // Byte-level BPE knows every byte, which `of` has checked: nothing is left that could fail.
        let encoding = self.inner.encode_fast(text, false).expect("byte-level BPE encodes any text");
        encoding.get_ids().to_vec()
    }

    /// The text of ids; special tokens and unknown ids are left out. Bytes that are not UTF-8 become U+FFFD.
    pub fn decode(&self, ids: &[u32]) -> String {
        self.inner.decode(ids, true).expect("the byte-level decoder accepts any tokens")
    }

    /// Tokens in all, special ones included.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The id of `<|endoftext|>`.
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

fn error(path: &Path, what: impl Into<String>) -> Error {
    Error::Tokenizer { path: path.to_path_buf(), what: what.into() }
}
