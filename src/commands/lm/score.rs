//! `temper lm score`: scores a response with a reward model or an ensemble.

use std::path::Path;

use engine::error::{Error, Result};
use lm::Sequence;
use serde::{Deserialize, Serialize};
use stages::error::Told;
use stages::prompt::response_ids;
use stages::reward::{self, LoadedReward};
use stages::stats::moments;
use stages::types::reward::{ENSEMBLE, INFO};

use super::{ROWS, encode, fits, stream, window};
use crate::args::ModelAt;

#[derive(Deserialize)]
struct Question {
    prompt: String,
    response: String,
    /// Whether the response is complete and therefore ends with the end-of-text token.
    #[serde(default = "yes")]
    ended: bool,
}

fn yes() -> bool {
    true
}

#[derive(Serialize)]
#[serde(untagged)]
enum Answer {
    One { score: f32 },
    Many { scores: Vec<f32>, mean: f64, variance: f64 },
}

/// A single reward model or the members of an ensemble.
struct Judge {
    members: Vec<LoadedReward>,
    is_ensemble: bool,
}

impl Judge {
    fn load(folder: &Path) -> Result<Self> {
        match (folder.join(INFO).is_file(), folder.join(ENSEMBLE).is_file()) {
            (true, false) => Ok(Self { members: vec![reward::load_reward_model(folder)?], is_ensemble: false }),
            (false, true) => Ok(Self { members: reward::load_ensemble(folder)?, is_ensemble: true }),
            _ => Err(Error::yours(format!("{}: expected {INFO} or {ENSEMBLE}", folder.display()))
                .help("`temper path PIPELINE STAGE` tells the folder of a RewardModel or an Ensemble")),
        }
    }
}

pub fn score(at: &ModelAt) -> Result<()> {
    let judge = Judge::load(&at.model)?;
    let tokenizer = reward::load_tokenizer(&at.model)?;
    let ready = |_, asked: Question| {
        if asked.prompt.is_empty() {
            return Err(Error::yours("the prompt is empty"));
        }
        let prompt = encode(&tokenizer, &asked.prompt)?;
        tokenizer.check_text(&asked.response).told()?;
        // Encode prompt and response separately, as in training, so that no token spans the border.
        let response = response_ids(&tokenizer, &asked.response, asked.ended);
        let sequence = Sequence { prompt, response };
        for member in &judge.members {
            fits(&member.model.lm, &[&sequence.prompt[..], &sequence.response].concat(), 0)?;
        }
        Ok(sequence)
    };
    stream::answer_lines(window(at), ready, |sequences| answers(&judge, &sequences))
}

fn answers(judge: &Judge, sequences: &[Sequence]) -> Result<Vec<Answer>> {
    let rows: Vec<&Sequence> = sequences.iter().collect();
    let scores = judge.members.iter().map(|member| reward::score(member, &rows, ROWS)).collect::<Result<Vec<_>>>()?;
    if let Some(bad) = scores.iter().flatten().find(|x| !x.is_finite()) {
        return Err(Error::yours(format!("a score is {bad}: the model's weights are no numbers")));
    }
    let (mean, variance) = moments(&scores);
    let per_row = mean.into_iter().zip(variance).enumerate();
    Ok(per_row
        .map(|(row, (mean, variance))| match judge.is_ensemble {
            true => Answer::Many { scores: scores.iter().map(|scores| scores[row]).collect(), mean, variance },
            false => Answer::One { score: scores[0][row] },
        })
        .collect())
}
