//! `temper lm`: runs a model folder on JSON lines, for checks against other implementations.

mod generate;
mod logprobs;
mod score;
mod stream;

use std::path::Path;

use engine::error::{Error, Result};
use lm::{CausalLm, Tokenizer};
use stages::error::IntoStageResult;

use super::CommandResult;
use crate::args::{LmTask, ModelArgs};

/// Rows per model batch. Lines that are read together are first sorted by length to reduce padding.
const ROWS: usize = 8;

pub fn lm(task: &LmTask) -> CommandResult {
    let (LmTask::Logprobs { model: at, .. } | LmTask::Generate { model: at, .. } | LmTask::Score { model: at }) = task;
    let cores = || std::thread::available_parallelism().map_or(1, usize::from);
    lm::set_threads(at.threads.map_or_else(cores, usize::from));
    lm::use_device(&at.device.name()?).into_stage_result()?;
    if !at.model.exists() {
        return Err(Error::user(format!("{}: no such file or folder", at.model.display()))
            .help("`--model` takes a folder with config.json, weights and tokenizer.json, a .gguf file, or an artifact's folder")
            .into());
    }
    match task {
        LmTask::Logprobs { model, adapter } => logprobs::logprobs(model, adapter.as_deref())?,
        LmTask::Generate { model, adapter, sampling } => generate::generate(model, adapter.as_deref(), sampling)?,
        LmTask::Score { model } => score::score(model)?,
    }
    Ok(0)
}

fn batch_size(at: &ModelArgs) -> usize {
    usize::from(at.batch)
}

fn with_adapter(model: CausalLm, adapter: Option<&Path>) -> Result<CausalLm> {
    match adapter {
        Some(folder) => model.load_adapter(folder).into_stage_result(),
        None => Ok(model),
    }
}

/// The ids of a text, after a check that it is not too long to encode.
fn encode(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    tokenizer.check_text(text).into_stage_result()?;
    Ok(tokenizer.encode(text))
}

/// Checks that the model can read these ids with `room` more after them.
fn check_fits(model: &CausalLm, ids: &[u32], room: usize) -> Result<()> {
    let (vocabulary, positions) = (model.config().vocab_size(), model.config().window());
    if let Some(id) = ids.iter().find(|id| **id as usize >= vocabulary) {
        return Err(Error::user(format!("id {id} is outside the model's vocabulary of {vocabulary}")));
    }
    if ids.len().saturating_add(room) > positions {
        let tokens = ids.len();
        let more = if room > 0 { format!(" and {room} new ones") } else { String::new() };
        return Err(Error::user(format!("{tokens} tokens{more} do not fit into the model's window of {positions}")));
    }
    Ok(())
}
