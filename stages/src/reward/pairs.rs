//! Preferences as pairs of sequences, split into training pairs and held-out pairs for the accuracy.

use engine::context::Context;
use engine::error::{Error, Result};
use lm::{Sequence, Tokenizer};

use super::params::Params;
use crate::labels::HeldOut;
use crate::prompt::Parts;
use crate::random::{fixed_key, share_of};
use crate::train::SequenceTable;
use crate::train::encode::{Encoder, Text, fitting};
pub use crate::types::Corruption;
use crate::types::{Outcome, Preferences};

/// The labelled pairs of several Preferences tables.
pub struct PreferenceTable {
    /// Rows 2 i and 2 i + 1 are the chosen and the rejected summary of pair i.
    sequences: SequenceTable,
    corruptions: Vec<Option<Corruption>>,
    /// The probability that the label of each pair is right; empty unless labels are soft.
    certainties: Vec<f32>,
    /// Training pairs, in table order.
    pub training: Vec<usize>,
    /// Pairs of held-out posts.
    pub held_out: Vec<usize>,
}

impl PreferenceTable {
    /// Reads port `preferences`. Holds out the pairs of a fixed share of the posts, the same for every seed. Skips
    /// pairs of posts that port `posts`, if wired, assigns to split `valid` or `calibration`.
    ///
    /// # Errors
    /// If there is no labelled pair, or if both summaries are equal in every pair.
    pub fn read(ctx: &mut Context, tokenizer: &Tokenizer, window: usize, p: &Params) -> Result<Self> {
        let mut reserved =
            ctx.optional("posts").map(|input| HeldOut::load(&input.folder)).transpose()?.unwrap_or_default();
        let key = fixed_key(0, "held-out pairs");
        let mut encoder = Encoder::new(tokenizer, window);
        let sequences = SequenceTable::create(ctx.checkpoints())?;
        let mut table = Self {
            sequences,
            corruptions: Vec::new(),
            certainties: Vec::new(),
            training: Vec::new(),
            held_out: Vec::new(),
        };
        let (mut unlabelled, mut same, mut dropped) = (0_u64, 0_u64, 0_u64);
        for input in ctx.many("preferences") {
            let mut own = None;
            for row in Preferences::open(&input.folder)? {
                let row = row?;
                if row.outcome != Outcome::Labelled {
                    unlabelled += 1;
                    continue;
                }
                if reserved.holds(&row.post_id, Parts::parse(&row.prompt).map_or("", |parts| parts.post)) {
                    continue;
                }
                let prompt = Text { text: &row.prompt, ids: row.prompt_ids.as_deref() };
                let chosen = Text { text: &row.chosen_text, ids: row.chosen_ids.as_deref() };
                let rejected = Text { text: &row.rejected_text, ids: row.rejected_ids.as_deref() };
                let own = *own.get_or_insert_with(|| encoder.made(prompt));
                let truncation = encoder.truncation;
                let both = encoder.row(&row.post_id, prompt, chosen, row.chosen_ended, own).and_then(|chosen| {
                    Ok((chosen, encoder.row(&row.post_id, prompt, rejected, row.rejected_ended, own)?))
                });
                let Some((chosen, rejected)) = fitting(both, p.drop_long, &mut dropped)? else {
                    encoder.truncation = truncation;
                    continue;
                };
                same += u64::from(chosen.response == rejected.response);
                let pair = table.corruptions.len();
                table.sequences.push(&row.id, &chosen)?;
                table.sequences.push(&row.id, &rejected)?;
                table.corruptions.push(row.corruption);
                if p.soft_labels {
                    table.certainties.push(certainty(&row.id, row.confidence)?);
                }
                let kept = share_of(&key, &row.post_id) < p.held_out;
                if kept { &mut table.held_out } else { &mut table.training }.push(pair);
            }
        }
        table.sequences.finish()?;
        let pairs = table.corruptions.len();
        if table.training.is_empty() {
            return Err(Error::user(format!(
                "no labelled pair to learn from: {unlabelled} rows without a label, {} of posts kept for evaluation, {dropped} too long, {} kept for the accuracy",
                reserved.dropped,
                table.held_out.len()
            ))
            .help("look at the preferences with `temper show`, and at `held_out`"));
        }
        if same == pairs as u64 {
            return Err(Error::user(format!(
                "all {pairs} pairs prefer a summary to itself: there is nothing to learn"
            )));
        }
        ctx.metric("rows_without_label", unlabelled as f64);
        ctx.metric("rows_of_reserved_posts", reserved.dropped as f64);
        encoder.truncation.tell(ctx);
        if p.drop_long {
            ctx.metric("dropped_long", dropped as f64);
        }
        Ok(table)
    }

    /// The chosen and the rejected sequence of pair `pair`.
    pub fn get(&self, pair: usize) -> Result<(Sequence, Sequence)> {
        Ok((self.sequences.get(2 * pair)?, self.sequences.get(2 * pair + 1)?))
    }

    /// The pair's id in its table.
    pub fn id(&self, pair: usize) -> Result<String> {
        self.sequences.id(2 * pair)
    }

    /// Tokens in the longer of the two sequences.
    pub fn length(&self, pair: usize) -> usize {
        self.sequences.length(2 * pair).max(self.sequences.length(2 * pair + 1))
    }

    /// The probability that the label of the pair is right, if labels are soft.
    pub fn certainty(&self, pair: usize) -> Option<f32> {
        self.certainties.get(pair).copied()
    }

    /// The corruption applied to one of the two summaries, if any.
    pub fn corruption(&self, pair: usize) -> Option<Corruption> {
        self.corruptions[pair]
    }
}

/// A judge's confidence as a probability; people give it on scales of their own.
fn certainty(id: &str, confidence: Option<f64>) -> Result<f32> {
    let certainty = confidence.unwrap_or(1.0);
    if (0.0..=1.0).contains(&certainty) {
        return Ok(certainty as f32);
    }
    Err(Error::user(format!("`soft_labels`: the confidence of row {id} is {certainty}, not a probability"))
        .help("soft labels need a judge that gives probabilities, such as `annotate.openai` with `verdict: logprobs`"))
}
