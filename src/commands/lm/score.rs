//! `temper lm score`: scores a response with a reward model or an ensemble.

use std::path::Path;

use engine::error::{Error, Result};
use lm::Sequence;
use serde::{Deserialize, Serialize};
use stages::error::IntoStageResult;
use stages::prompt::response_ids;
use stages::reward::{self, LoadedReward};
use stages::stats::moments;
use stages::types::reward::{ENSEMBLE, INFO};

use super::{ROWS, batch_size, check_fits, encode, stream};
use crate::args::ModelArgs;

#[derive(Deserialize)]
struct Question {
    prompt: String,
    response: String,
    /// Whether the response is complete and therefore ends with the end-of-text token.
    #[serde(default = "default_true")]
    ended: bool,
}

fn default_true() -> bool {
    true
}

#[derive(Serialize)]
#[serde(untagged)]
enum Answer {
    One { score: f32 },
    Many { scores: Vec<f32>, mean: f64, variance: f64 },
}

/// A single reward model or the members of an ensemble.
struct Scorer {
    members: Vec<LoadedReward>,
    is_ensemble: bool,
}

impl Scorer {
    fn load(folder: &Path) -> Result<Self> {
        match (folder.join(INFO).is_file(), folder.join(ENSEMBLE).is_file()) {
            (true, false) => Ok(Self { members: vec![reward::load_reward_model(folder)?], is_ensemble: false }),
            (false, true) => Ok(Self { members: reward::load_ensemble(folder)?, is_ensemble: true }),
            _ => Err(Error::user(format!("{}: expected {INFO} or {ENSEMBLE}", folder.display()))
                .help("`temper path PIPELINE STAGE` prints the folder of a RewardModel or an Ensemble")),
        }
    }
}

pub fn score(at: &ModelArgs) -> Result<()> {
    let scorer = Scorer::load(&at.model)?;
    let tokenizer = reward::load_tokenizer(&at.model)?;
    let prepare = |_, question: Question| {
        if question.prompt.is_empty() {
            return Err(Error::user("the prompt is empty"));
        }
        let prompt = encode(&tokenizer, &question.prompt)?;
        tokenizer.check_text(&question.response).into_stage_result()?;
        // Encode prompt and response separately, as in training, so that no token spans the border.
        let response = response_ids(&tokenizer, &question.response, question.ended);
        let sequence = Sequence { prompt, response };
        for member in &scorer.members {
            check_fits(&member.model.lm, &[&sequence.prompt[..], &sequence.response].concat(), 0)?;
        }
        Ok(sequence)
    };
    stream::answer_lines(batch_size(at), prepare, |sequences| answers(&scorer, &sequences))
}

fn answers(scorer: &Scorer, sequences: &[Sequence]) -> Result<Vec<Answer>> {
    let rows: Vec<&Sequence> = sequences.iter().collect();
    let scores = scorer.members.iter().map(|member| reward::score(member, &rows, ROWS)).collect::<Result<Vec<_>>>()?;
    if let Some(bad) = scores.iter().flatten().find(|x| !x.is_finite()) {
        return Err(Error::user(format!("a score is {bad}: the model's weights are not finite")));
    }
    let (mean, variance) = moments(&scores);
    let per_row = mean.into_iter().zip(variance).enumerate();
    Ok(per_row
        .map(|(row, (mean, variance))| match scorer.is_ensemble {
            true => Answer::Many { scores: scores.iter().map(|scores| scores[row]).collect(), mean, variance },
            false => Answer::One { score: scores[0][row] },
        })
        .collect())
}
