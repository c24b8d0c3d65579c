//! `temper lm generate`: samples a model's continuation of a prompt, without any template.

use std::path::Path;

use engine::error::{Error, Result};
use lm::{CounterRng, SampleOptions};
use serde::{Deserialize, Serialize};
use stages::error::IntoStageResult;
use stages::random::fixed_key;

use super::{batch_size, check_fits, encode, stream, with_adapter};
use crate::args::{ModelArgs, SamplingArgs};

#[derive(Deserialize)]
struct Question {
    prompt: String,
}

#[derive(Serialize)]
struct Answer {
    prompt: String,
    /// The response without the end-of-text token.
    response: String,
    /// Ids of the response, including the end-of-text token if it was sampled.
    ids: Vec<u32>,
}

/// A prompt with its ids and its line index, which selects its random numbers.
struct PreparedPrompt {
    prompt: String,
    ids: Vec<u32>,
    row: u64,
}

pub fn generate(at: &ModelArgs, adapter: Option<&Path>, sampling: &SamplingArgs) -> Result<()> {
    if sampling.min_new_tokens > sampling.max_new_tokens {
        return Err(Error::user(format!(
            "--min-new-tokens {} is above --max-new-tokens {}",
            sampling.min_new_tokens, sampling.max_new_tokens
        )));
    }
    let (model, tokenizer) = stages::model::load(&at.model)?;
    let model = with_adapter(model, adapter)?.merged().into_stage_result()?;
    let options = SampleOptions {
        temperature: sampling.temperature,
        top_p: sampling.top_p,
        min_new_tokens: sampling.min_new_tokens,
        max_new_tokens: sampling.max_new_tokens,
        eos: tokenizer.eos().clone(),
        greedy: sampling.greedy,
    };
    let draws = CounterRng(fixed_key(sampling.seed, "temper lm generate"));
    let prepare = |row, Question { prompt }| {
        let ids = encode(&tokenizer, &prompt)?;
        if ids.is_empty() {
            return Err(Error::user("the prompt is empty: a model needs at least one token"));
        }
        check_fits(&model, &ids, sampling.max_new_tokens)?;
        Ok(PreparedPrompt { prompt, ids, row })
    };
    stream::answer_lines(batch_size(at), prepare, |batch| {
        let prompts: Vec<&[u32]> = batch.iter().map(|prompt| &prompt.ids[..]).collect();
        let rows: Vec<u64> = batch.iter().map(|prompt| prompt.row).collect();
        let sampled = lm::sample(&model, &prompts, &options, &draws, &rows).into_stage_result()?;
        let answers = batch.into_iter().zip(sampled).map(|(PreparedPrompt { prompt, .. }, sampled)| {
            let response = tokenizer.decode_continuation(&sampled.ids);
            Answer { prompt, response, ids: sampled.ids }
        });
        Ok(answers.collect())
    })
}
