//! `temper lm`: runs a model folder on JSON lines, for checks against other implementations.

mod generate;
mod logprobs;
mod score;
mod stream;

use std::path::Path;

use engine::error::{Error, Result};
use lm::{CausalLm, Tokenizer};
use stages::error::Told;

use super::Done;
use crate::args::{Lm, ModelAt};

/// Rows per model batch. Lines that are read together are first sorted by length to reduce padding.
const ROWS: usize = 8;

pub fn lm(task: &Lm) -> Done {
    let (Lm::Logprobs { model: at, .. } | Lm::Generate { model: at, .. } | Lm::Score { model: at }) = task;
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    lm::set_threads(at.threads.map_or_else(cores, usize::from));
    if !at.model.exists() {
        return Err(Error::yours(format!("{}: there is no such folder or file", at.model.display()))
            .help("`--model` takes a folder with config.json, weights and tokenizer.json, a .gguf file, or an artifact's folder")
            .into());
    }
    match task {
        Lm::Logprobs { model, adapter } => logprobs::logprobs(model, adapter.as_deref())?,
        Lm::Generate { model, adapter, how } => generate::generate(model, adapter.as_deref(), how)?,
        Lm::Score { model } => score::score(model)?,
    }
    Ok(0)
}

fn window(at: &ModelAt) -> usize {
    usize::from(at.batch)
}

fn with_adapter(model: CausalLm, adapter: Option<&Path>) -> Result<CausalLm> {
    match adapter {
        Some(folder) => model.load_adapter(folder).told(),
        None => Ok(model),
    }
}

/// The ids of a text, after a check that it is not too long to encode.
fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    tokenizer.check_text(text).told()?;
    Ok(tokenizer.encode(text))
}

/// Checks that the model can read these ids with `room` more after them.
fn fits(model: &CausalLm, ids: &[u32], room: usize) -> Result<()> {
    let (vocabulary, positions) = (model.config().vocab_size(), model.config().window());
    if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
        return Err(Error::yours(format!("id {id} is not below the model's vocabulary of {vocabulary}")));
    }
    if ids.len().saturating_add(room) > positions {
        let tokens = ids.len();
        let more = if room > 0 { format!(" and {room} new ones") } else { String::new() };
        return Err(Error::yours(format!("{tokens} tokens{more} do not fit into the model's window of {positions}")));
    }
    Ok(())
}
