//! Log-probabilities of answers: of a model of `lm`, or of one with quantised weights.

use std::path::Path;

use engine::error::{Error, Result};
use lm::{Batch, CausalLm, QuantizedFile, QuantizedLm, Sequence, StatOptions, Tokenizer};

use super::prompt::Choice;
use crate::error::IntoStageResult;

/// A model that can tell how probable answers are.
pub trait Scorer {
    /// Longest sequence, in tokens.
    fn window(&self) -> usize;

    /// The log-probabilities of both answers of each choice, in nats.
    ///
    /// # Errors
    /// If the model cannot be evaluated.
    fn score(&mut self, choices: &[Choice]) -> Result<Vec<[f32; 2]>>;
}

/// Most tokens of one forward pass, padding included, unless one sequence alone has more.
pub const MAX_BATCH_TOKENS: usize = 4096;

/// A model of `lm`.
pub struct LmScorer {
    model: CausalLm,
    options: StatOptions,
}

impl LmScorer {
    /// Loads a Model folder, with its tokenizer.
    ///
    /// # Errors
    /// As [`crate::model::load`].
    pub fn load(folder: &Path) -> Result<(Self, Tokenizer)> {
        let (model, tokenizer) = crate::model::load(folder)?;
        let options = StatOptions { min_new_tokens: 0, eos: tokenizer.eos().clone(), entropy: false };
        Ok((Self { model: model.frozen(), options }, tokenizer))
    }

    fn batch(&self, choices: &[&Choice]) -> Result<Vec<[f32; 2]>> {
        let batch = |answer: usize| {
            let sequence = |choice: &&Choice| Sequence::new(choice.prompt.clone(), choice.answers[answer].clone());
            let rows: Vec<Sequence> = choices.iter().map(sequence).collect();
            Batch::new(&rows.iter().collect::<Vec<_>>()).into_stage_result()
        };
        let hidden = |batch: &Batch| self.model.hidden_for_responses(batch, None).into_stage_result();
        let batches = [batch(0)?, batch(1)?];
        let first = hidden(&batches[0])?;
        // An answer of one token is predicted from the prompt alone, so both are read from the same states.
        let is_one_token = choices.iter().all(|choice| choice.answers.iter().all(|answer| answer.len() == 1));
        let second = if is_one_token { first.clone() } else { hidden(&batches[1])? };
        let mut scores = vec![[0.0; 2]; choices.len()];
        for (answer, (batch, hidden)) in batches.iter().zip([first, second]).enumerate() {
            let stats = self.model.token_stats(&hidden, batch, &self.options).into_stage_result()?;
            let logprob = stats.logprob.to_vec1::<f32>().into_stage_result()?;
            for (scores, range) in scores.iter_mut().zip(batch.row_ranges()) {
                scores[answer] = logprob[range.clone()].iter().sum();
            }
        }
        Ok(scores)
    }
}

impl Scorer for LmScorer {
    fn window(&self) -> usize {
        self.model.config().window()
    }

    fn score(&mut self, choices: &[Choice]) -> Result<Vec<[f32; 2]>> {
        let mut order: Vec<usize> = (0..choices.len()).collect();
        // Sequences of similar length need little padding. The sort is stable, so batches depend on the inputs alone.
        order.sort_by_key(|i| choices[*i].len());
        let mut scores = vec![[0.0; 2]; choices.len()];
        let mut rest = &order[..];
        while !rest.is_empty() {
            let fits = |n: &usize| n * choices[rest[n - 1]].len() <= MAX_BATCH_TOKENS;
            let n = (1..=rest.len()).take_while(fits).last().unwrap_or(1);
            let (now, later) = rest.split_at(n);
            let found = self.batch(&now.iter().map(|i| &choices[*i]).collect::<Vec<_>>())?;
            now.iter().zip(found).for_each(|(i, found)| scores[*i] = found);
            rest = later;
        }
        Ok(scores)
    }
}

/// A model that computes with the quantised weights of a GGUF file.
pub struct QuantizedScorer(QuantizedLm);

impl QuantizedScorer {
    /// Loads a GGUF file, with the tokenizer in a `tokenizer.json`.
    ///
    /// # Errors
    /// As [`QuantizedLm::load`], and if the tokenizer cannot be read or can give an id that the model does not have. All
    /// of that is found before the weights are read.
    pub fn load(file: &Path, tokenizer: &Path) -> Result<(Self, Tokenizer)> {
        let file = QuantizedFile::open(file).into_stage_result()?;
        let tokenizer = Tokenizer::load(tokenizer).into_stage_result()?;
        let fits = tokenizer.check_ids(file.vocab_size()).into_stage_result();
        fits.map_err(|error| error.help("`tokenizer` must be the tokenizer.json of the model in `gguf`"))?;
        Ok((Self(QuantizedLm::read(file).into_stage_result()?), tokenizer))
    }

    /// The log-probability of one token, of those of all.
    fn of_token(logprobs: &[f32], id: u32) -> Result<f32> {
        let found = logprobs.get(id as usize).copied();
        found.ok_or_else(|| Error::internal(format!("an answer has id {id}, above {} tokens", logprobs.len())))
    }
}

impl Scorer for QuantizedScorer {
    fn window(&self) -> usize {
        self.0.window()
    }

    fn score(&mut self, choices: &[Choice]) -> Result<Vec<[f32; 2]>> {
        let mut scores = Vec::with_capacity(choices.len());
        for choice in choices {
            // Both answers begin here, and nearly always each is one token.
            let first = self.0.next_logprobs(&choice.prompt).into_stage_result()?;
            let mut of_answers = [0.0; 2];
            for (score, answer) in of_answers.iter_mut().zip(&choice.answers) {
                *score = Self::of_token(&first, answer[0])?;
                for known in 1..answer.len() {
                    let ids = [&choice.prompt, &answer[..known]].concat();
                    let next = self.0.next_logprobs(&ids).into_stage_result()?;
                    *score += Self::of_token(&next, answer[known])?;
                }
            }
            scores.push(of_answers);
        }
        Ok(scores)
    }
}
