//! `temper lm generate`: samples a model's continuation of a prompt, without any template.

use std::path::Path;

use engine::error::{Error, Result};
use lm::{CounterRng, SampleOptions};
use serde::{Deserialize, Serialize};
use stages::train::{Told, fixed_key};

use super::{encode, fits, stream, window, with_adapter};
use crate::args::{ModelAt, Sampling};

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
struct Ready {
    prompt: String,
    ids: Vec<u32>,
    row: u64,
}

pub fn generate(at: &ModelAt, adapter: Option<&Path>, how: &Sampling) -> Result<()> {
    if how.min_new_tokens > how.max_new_tokens {
        return Err(Error::yours(format!(
            "--min-new-tokens {} is above --max-new-tokens {}",
            how.min_new_tokens, how.max_new_tokens
        )));
    }
    let (model, tokenizer) = stages::model::load(&at.model)?;
    let model = with_adapter(model, adapter)?.merged().told()?;
    let options = SampleOptions {
        temperature: how.temperature,
        top_p: how.top_p,
        min_new_tokens: how.min_new_tokens,
        max_new_tokens: how.max_new_tokens,
        eos: tokenizer.eos().clone(),
        greedy: how.greedy,
    };
    let draws = CounterRng(fixed_key(how.seed, "temper lm generate"));
    let ready = |row, Question { prompt }| {
        let ids = encode(&tokenizer, &prompt)?;
        if ids.is_empty() {
            return Err(Error::yours("the prompt is empty: a model needs a token to go on from"));
        }
        fits(&model, &ids, how.max_new_tokens)?;
        Ok(Ready { prompt, ids, row })
    };
    stream::answer_lines(window(at), ready, |asked| {
        let prompts: Vec<&[u32]> = asked.iter().map(|ready| &ready.ids[..]).collect();
        let rows: Vec<u64> = asked.iter().map(|ready| ready.row).collect();
        let sampled = lm::sample(&model, &prompts, &options, &draws, &rows).told()?;
        let answers = asked.into_iter().zip(sampled).map(|(Ready { prompt, .. }, sampled)| {
            let response = tokenizer.decode_continuation(&sampled.ids);
            Answer { prompt, response, ids: sampled.ids }
        });
        Ok(answers.collect())
    })
}
