//! `temper lm logprobs`: the log-probability of every token of a text after the first.

use std::path::Path;

use engine::error::{Error, Result};
use lm::{Batch, CausalLm, Sequence, StatOptions, Tokenizer};
use serde::{Deserialize, Serialize};
use stages::error::IntoStageResult;
use stages::train::by_length;

use super::{ROWS, batch_size, check_fits, encode, stream, with_adapter};
use crate::args::ModelArgs;

/// Exactly one of the two fields is set.
#[derive(Deserialize)]
struct Question {
    #[serde(default)]
    text: Option<String>,
    #[serde(default)]
    ids: Option<Vec<u32>>,
}

#[derive(Serialize)]
struct Answer {
    ids: Vec<u32>,
    /// Log-probability of each id given the preceding ids, in nats; null for the first.
    logprobs: Vec<Option<f32>>,
}

pub fn logprobs(at: &ModelArgs, adapter: Option<&Path>) -> Result<()> {
    let model = with_adapter(CausalLm::load(&at.model).into_stage_result()?, adapter)?;
    // Questions with ids need no tokenizer.
    let file = if at.model.is_dir() { at.model.join("tokenizer.json") } else { at.model.clone() };
    // EOS is not used here, so it need not be known to the tokenizer.
    let eos = model.config().eos().unwrap_or(0.into());
    let tokenizer = if file.is_file() { Some(Tokenizer::load_with_eos(&file, eos).into_stage_result()?) } else { None };
    tokenizer.as_ref().map_or(Ok(()), |t| t.check_fits(model.config())).into_stage_result()?;
    let prepare = |_, question: Question| {
        let ids = match (question.text, question.ids, &tokenizer) {
            (Some(text), None, Some(tokenizer)) => encode(tokenizer, &text)?,
            (Some(_), None, None) => {
                return Err(Error::user(format!("a text needs {}, which does not exist", file.display()))
                    .help("give `ids`, or add the tokenizer"));
            }
            (None, Some(ids), _) => ids,
            _ => return Err(Error::user("expected either `text` or `ids`")),
        };
        check_fits(&model, &ids, 0)?;
        Ok(ids)
    };
    stream::answer_lines(batch_size(at), prepare, |rows| answers(&model, rows))
}

fn answers(model: &CausalLm, rows: Vec<Vec<u32>>) -> Result<Vec<Answer>> {
    let mut answers: Vec<Answer> =
        rows.into_iter().map(|ids| Answer { logprobs: ids.first().map(|_| None).into_iter().collect(), ids }).collect();
    // Treat all tokens but the first as a response, since the model computes log-probabilities of responses. A text
    // without a second token has none.
    let (numbers, sequences): (Vec<usize>, Vec<Sequence>) = answers
        .iter()
        .enumerate()
        .filter_map(|(number, answer)| match &answer.ids[..] {
            [first, rest @ ..] if !rest.is_empty() => Some((number, Sequence::new([*first], rest))),
            _ => None,
        })
        .unzip();
    let lengths: Vec<usize> = sequences.iter().map(Sequence::len).collect();
    for members in by_length(&lengths, ROWS) {
        let rows: Vec<&Sequence> = members.iter().map(|&member| &sequences[member]).collect();
        let batch = Batch::new(&rows).into_stage_result()?;
        let logprobs = response_logprobs(model, &batch)?;
        for (member, range) in members.into_iter().zip(batch.row_ranges()) {
            answers[numbers[member]].logprobs.extend(logprobs[range.clone()].iter().copied().map(Some));
        }
    }
    Ok(answers)
}

/// Log-probabilities of the batch's response tokens, concatenated.
fn response_logprobs(model: &CausalLm, batch: &Batch) -> Result<Vec<f32>> {
    // No token is masked, so the choice of EOS does not matter.
    let plain = StatOptions { min_new_tokens: 0, eos: 0.into(), entropy: false };
    let predicting = model.hidden_for_responses(batch, None).into_stage_result()?;
    let logprobs = model
        .token_stats(&predicting, batch, &plain)
        .into_stage_result()?
        .logprob
        .to_vec1::<f32>()
        .into_stage_result()?;
    match logprobs.iter().find(|x| !x.is_finite()) {
        Some(bad) => Err(Error::user(format!("a log-probability is {bad}: the model's weights give no distribution"))),
        None => Ok(logprobs),
    }
}
