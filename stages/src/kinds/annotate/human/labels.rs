//! Turns human choices into preferences: drops filtered and duplicate labels, and merges several labels of a pair.

use std::collections::{BTreeMap, HashMap, HashSet};

use engine::context::Context;
use engine::error::{Error, Result};

use super::filters::{Reason, RowFilter};
use super::formats::{Choice, Record};
use crate::labels::HeldOut;
use crate::labels::pair_key::{PairKey, Text};
use crate::text::clean::{id_of, normalised};
use crate::types::{Outcome, Preference};

crate::words! {
    /// Treatment of several labels of one pair.
    pub enum Labels {
        /// One row per label. Equal labels of one worker, or without a worker, count once.
        Each = "each",
        /// One row per pair, with the majority label: one vote per worker, and one per label without a worker. Equal
        /// votes are a tie.
        Majority = "majority",
    }
}

/// A label that counts.
pub struct Label {
    pub key: PairKey,
    /// The chosen text of the key; `None` if both texts are equal.
    pub text: Option<Text>,
    post_id: String,
    choice: Choice,
}

/// Selects the records that count, and counts the others by reason.
pub struct RecordSelector {
    sieve: RowFilter,
    held_out: HeldOut,
    /// Hashes of (pair, label, worker) seen so far.
    seen: HashSet<[u8; 16]>,
    labels: Labels,
    pub read: u64,
    reasons: BTreeMap<Reason, u64>,
    /// Number of choices of the first and of the second summary, where the file gives the order.
    pub places: [u64; 2],
}

impl RecordSelector {
    pub fn new(sieve: RowFilter, held_out: HeldOut, labels: Labels) -> Self {
        Self { sieve, held_out, seen: HashSet::new(), labels, read: 0, reasons: BTreeMap::new(), places: [0; 2] }
    }

    /// The label of a record, or `None` if it does not count.
    ///
    /// # Errors
    /// If a filter needs a field that this record does not have.
    pub fn take(&mut self, record: Record) -> Result<Option<Label>> {
        self.read += 1;
        let choice = match record {
            Record::Choice(choice) => *choice,
            Record::Article => return Ok(self.leave_out(Reason::Article)),
        };
        if let Some(reason) = self.filtered(&choice)? {
            return Ok(self.leave_out(reason));
        }
        let post_id = choice.post_id.clone().unwrap_or_else(|| id_of(&choice.post));
        if self.held_out.holds(&post_id, &choice.post) {
            return Ok(self.leave_out(Reason::HeldOut));
        }
        let (key, text) = PairKey::of(&choice.prompt, &choice.chosen, &choice.rejected);
        let text = text.filter(|_| normalised(&choice.chosen) != normalised(&choice.rejected));
        let worker = choice.about.as_ref().and_then(|about| about.worker.as_deref());
        let counts_by_itself = worker.is_none() && self.labels == Labels::Majority;
        if !counts_by_itself && !self.seen.insert(print(key, text, worker)) {
            return Ok(self.leave_out(Reason::Duplicate));
        }
        if let Some(about) = &choice.about {
            self.places[about.place.min(1)] += 1;
        }
        Ok(Some(Label { key, text, post_id, choice }))
    }

    fn filtered(&self, choice: &Choice) -> Result<Option<Reason>> {
        match &choice.about {
            Some(about) => Ok(self.sieve.drops(about)),
            None if self.sieve.is_open() => Ok(None),
            None => Err(Error::user(
                "`filters`: rows of prompt, chosen and rejected name no batch, split, worker, policy or confidence",
            )
            .help("filter Stiennon et al.'s own records, or choose among the files of a data set with `hub.files`")),
        }
    }

    fn leave_out(&mut self, reason: Reason) -> Option<Label> {
        self.count(reason);
        None
    }

    pub fn count(&mut self, reason: Reason) {
        *self.reasons.entry(reason).or_default() += 1;
    }

    /// Records the numbers of rows read and dropped as metrics, including zeros.
    pub fn tell(&self, ctx: &mut Context) {
        ctx.metric("rows_read", self.read as f64);
        for reason in Reason::ALL {
            ctx.metric(reason.as_str(), self.reasons.get(reason).copied().unwrap_or(0) as f64);
        }
    }

    pub fn articles(&self) -> u64 {
        self.reasons.get(&Reason::Article).copied().unwrap_or(0)
    }

    /// Counts by reason as text: `3 articles, 2 duplicates`.
    pub fn dropped(&self) -> String {
        let told = self.reasons.iter().map(|(reason, n)| format!("{n} {reason}"));
        told.collect::<Vec<_>>().join(", ")
    }
}

fn print(key: PairKey, text: Option<Text>, worker: Option<&str>) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(key.as_bytes());
    hasher.update(&[u8::from(text == Some(Text::Low)), u8::from(worker.is_some())]);
    hasher.update(worker.unwrap_or_default().as_bytes());
    let mut short = [0; 16];
    short.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    short
}

/// The votes on each pair.
#[derive(Default)]
pub struct Votes(HashMap<PairKey, [u64; 2]>);

impl Votes {
    pub fn count(&mut self, label: &Label) {
        let votes = self.0.entry(label.key).or_default();
        votes[usize::from(label.text == Some(Text::High))] += 1;
    }

    /// The merged row of a pair at its first label; `None` at the others.
    pub fn row(&mut self, label: Label) -> Option<Preference> {
        let [low, high] = self.0.remove(&label.key)?;
        let all = low + high;
        if all == 1 || label.text.is_none() {
            return Some(label.row());
        }
        let winner = if low > high { Text::Low } else { Text::High };
        let turn = label.text != Some(winner);
        let mut row = label.row();
        if turn {
            std::mem::swap(&mut row.chosen_text, &mut row.rejected_text);
        }
        row.outcome = if low == high { Outcome::Tie } else { Outcome::Labelled };
        row.annotator = format!("human:{} of {all}", low.max(high));
        // Several people may have seen the summaries in different orders, each with their own confidence.
        (row.confidence, row.chosen_first) = (None, None);
        Some(row)
    }
}

impl Label {
    pub fn row(self) -> Preference {
        let Self { key, text, post_id, choice } = self;
        let about = choice.about;
        let worker = about.as_ref().and_then(|about| about.worker.as_deref());
        // Labels of different workers on one pair are separate rows, so their ids differ.
        let hash = print(key, text, worker);
        let digits: String = hash[..8].iter().map(|b| format!("{b:02x}")).collect();
        Preference {
            id: format!("{post_id}-{digits}"),
            post_id,
            prompt: choice.prompt,
            prompt_ids: None,
            facts: None,
            chosen_text: choice.chosen,
            chosen_ids: None,
            chosen_ended: true,
            rejected_text: choice.rejected,
            rejected_ids: None,
            rejected_ended: true,
            corruption: None,
            outcome: if text.is_some() { Outcome::Labelled } else { Outcome::Tie },
            annotator: worker.map_or_else(|| "human".to_owned(), |worker| format!("human:{worker}")),
            confidence: about.as_ref().and_then(|about| about.confidence),
            chosen_first: about.as_ref().map(|about| about.place == 0),
            reason: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::kinds::annotate::human::filters::Filters;
    use crate::kinds::annotate::human::formats::About;

    /// Worker, pair, whether the good summary is chosen, and whether it is shown first.
    type Vote = (Option<u8>, u8, bool, bool);

    fn record((worker, pair, good, good_first): Vote) -> Record {
        let (chosen, rejected) = if good { ("a good one", "a bad one") } else { ("a bad one", "a good one") };
        let worker = worker.map(|worker| worker.to_string());
        let about = About { place: usize::from(good != good_first), worker, ..About::default() };
        Record::Choice(Box::new(Choice {
            prompt: format!("Subreddit: \nTITLE: \nPOST: p {pair}\nTL;DR:"),
            post: format!("p {pair}"),
            chosen: chosen.to_owned(),
            rejected: rejected.to_owned(),
            about: Some(about),
            ..Choice::default()
        }))
    }

    fn intake(votes: &[Vote], labels: Labels) -> (RecordSelector, Vec<Label>) {
        let sieve = RowFilter::new(&Filters::default()).unwrap();
        let mut intake = RecordSelector::new(sieve, HeldOut::default(), labels);
        let taken = votes.iter().filter_map(|vote| intake.take(record(*vote)).unwrap()).collect();
        (intake, taken)
    }

    /// By prompt: the outcome, and the chosen text if labelled.
    fn majority(votes: &[Vote]) -> (RecordSelector, BTreeMap<String, (Outcome, Option<String>)>) {
        let mut count = Votes::default();
        intake(votes, Labels::Majority).1.iter().for_each(|label| count.count(label));
        let (mut intake, labels) = intake(votes, Labels::Majority);
        let mut verdicts = BTreeMap::new();
        for label in labels {
            match count.row(label) {
                Some(row) => {
                    let chosen = Some(row.chosen_text).filter(|_| row.outcome == Outcome::Labelled);
                    assert!(verdicts.insert(row.prompt, (row.outcome, chosen)).is_none(), "a pair is one row");
                }
                None => intake.count(Reason::Merged),
            }
        }
        (intake, verdicts)
    }

    /// The same result by counting: a worker's repeated label counts once, a label without a worker every time.
    fn counted(votes: &[Vote]) -> BTreeMap<String, (Outcome, Option<String>)> {
        let mut heard: HashSet<(Option<u8>, u8, bool)> = HashSet::new();
        let mut sums: BTreeMap<u8, i64> = BTreeMap::new();
        for &(worker, pair, good, _) in votes {
            let sum = sums.entry(pair).or_default();
            if worker.is_none() || heard.insert((worker, pair, good)) {
                *sum += if good { 1 } else { -1 };
            }
        }
        let verdict = |sum: i64| match sum {
            0 => (Outcome::Tie, None),
            1.. => (Outcome::Labelled, Some("a good one".to_owned())),
            _ => (Outcome::Labelled, Some("a bad one".to_owned())),
        };
        sums.into_iter()
            .map(|(pair, sum)| (format!("Subreddit: \nTITLE: \nPOST: p {pair}\nTL;DR:"), verdict(sum)))
            .collect()
    }

    fn dropped(intake: &RecordSelector) -> u64 {
        intake.reasons.values().sum()
    }

    proptest! {
        #[test]
        fn a_majority_is_what_counting_gives_and_no_row_is_lost(
            votes in prop::collection::vec((prop::option::of(0u8..4), 0u8..5, any::<bool>(), any::<bool>()), 0..40),
            by in 0usize..40,
        ) {
            let (intake_of, verdicts) = majority(&votes);
            prop_assert_eq!(&verdicts, &counted(&votes));
            prop_assert_eq!(intake_of.read, verdicts.len() as u64 + dropped(&intake_of));
            let mut turned = votes.clone();
            turned.rotate_left(by.min(votes.len()));
            prop_assert_eq!(verdicts, majority(&turned).1);

            let (each, labels) = intake(&votes, Labels::Each);
            let different: HashSet<_> = votes.iter().map(|(worker, pair, good, _)| (worker, pair, good)).collect();
            prop_assert_eq!((labels.len(), each.read), (different.len(), different.len() as u64 + dropped(&each)));
        }
    }
}
