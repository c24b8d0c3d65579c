//! Builds models and sequences of a shape.

use std::path::{Path, PathBuf};

use lm::{CausalLm, Gpt2Config, InitStd, LoraConfig, Sequence, Tokenizer};
use rand::Rng;
use stages::corpus;
use stages::random::fixed_generator;
use stages::train::encode::{Encoder, fit};
use stages::types::Post;

use crate::shapes::{Lora, Shape};

/// The asset's model or a random one, frozen.
pub fn base(shape: &Shape) -> Result<CausalLm, String> {
    if let Some(asset) = &shape.asset {
        return CausalLm::load(&folder(asset)).map_err(to_message);
    }
    let config = Gpt2Config::new(shape.vocab, shape.positions, shape.d, shape.layers, shape.heads);
    CausalLm::init(config, InitStd::Fixed(0.02), &mut fixed_generator(1, "weights")).map_err(to_message)
}

/// The model with a fresh trainable adapter on every linear layer.
pub fn with_adapter(base: &CausalLm, lora: Lora, dropout: f64) -> Result<CausalLm, String> {
    let config = LoraConfig { r: lora.r, alpha: lora.alpha, dropout };
    base.with_adapter(&config, &mut fixed_generator(2, "adapter")).map_err(to_message)
}

/// `n` prompts: from the embedded corpus if there is a tokenizer, otherwise random ids, all of the same length.
pub fn prompts(shape: &Shape, n: usize) -> Result<Vec<Vec<u32>>, String> {
    let Some(asset) = &shape.asset else {
        let mut rng = fixed_generator(3, "prompts");
        let mut one = || (0..shape.prompt).map(|_| rng.random_range(0..shape.vocab as u32)).collect();
        return Ok((0..n).map(|_| one()).collect());
    };
    let tokenizer = tokenizer(asset)?;
    let window = shape.positions - shape.max_new;
    posts(n).map(|post| Ok(fit(&tokenizer, &post, window).map_err(to_message)?.ids)).collect()
}

/// `n` sequences: posts of the embedded corpus with their summaries if there is a tokenizer, otherwise random ids of
/// the shape's full length.
pub fn sequences(shape: &Shape, n: usize) -> Result<Vec<Sequence>, String> {
    if let Some(asset) = &shape.asset {
        let tokenizer = tokenizer(asset)?;
        let mut encoder = Encoder::new(&tokenizer, shape.positions);
        return posts(n).map(|post| encoder.reference(&post).map_err(to_message)).collect();
    }
    let mut rng = fixed_generator(5, "sequences");
    let mut ids = |n: usize| -> Vec<u32> { (0..n).map(|_| rng.random_range(0..shape.vocab as u32)).collect() };
    Ok((0..n).map(|_| Sequence::new(ids(shape.prompt), ids(shape.max_new))).collect())
}

fn posts(n: usize) -> impl Iterator<Item = Post> {
    corpus::examples(n as u64, 4).into_iter().map(|s| s.into_post(String::new(), Vec::new()))
}

fn tokenizer(asset: &str) -> Result<Tokenizer, String> {
    Tokenizer::load(&folder(asset).with_file_name("tinytldr").join("tokenizer.json")).map_err(to_message)
}

fn folder(asset: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("assets").join(asset)
}

/// Converts an error to a message.
pub fn to_message(e: impl std::fmt::Display) -> String {
    e.to_string()
}
