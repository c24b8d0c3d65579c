//! What every judge said of every pair, by the pair's content; texts are not kept. Knows no statistics.

use std::collections::HashMap;
use std::path::Path;

use engine::error::Result;

use super::measure::Tally;
use crate::annotate::pair_key::{PairKey, Text};
use crate::types::{Outcome, Preference, Preferences};

/// What one judge said of one pair.
#[derive(Clone, Copy, Debug, Default)]
struct Said {
    low: u32,
    high: u32,
    /// Rows without a preference.
    neither: u32,
}

/// What that comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The pair is not in the judge's table.
    Absent,
    /// Ties, drawn votes, answers without a label.
    Neither,
    For(Text),
}

impl Said {
    fn verdict(self) -> Verdict {
        match (self.low, self.high, self.neither) {
            (0, 0, 0) => Verdict::Absent,
            (low, high, _) if low > high => Verdict::For(Text::Low),
            (low, high, _) if high > low => Verdict::For(Text::High),
            _ => Verdict::Neither,
        }
    }
}

/// A judge's rows as they stand, before several of one pair are taken together.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rows {
    pub rows: u64,
    pub first_chosen: Tally,
    pub longer_chosen: Tally,
}

/// A pair that some judge judged.
struct Heard {
    by: Box<[Said]>,
    /// Words of the low text less words of the high one.
    longer_by: i64,
}

/// All pairs of all judges.
pub struct Pairs {
    judges: usize,
    pairs: HashMap<PairKey, Heard>,
}

impl Pairs {
    pub fn of(judges: usize) -> Self {
        Self { judges, pairs: HashMap::new() }
    }

    /// Hears out a judge's table.
    pub fn hear(&mut self, judge: usize, folder: &Path) -> Result<Rows> {
        let mut rows = Rows::default();
        for row in Preferences::open(folder)? {
            let row = row?;
            rows.rows += 1;
            let (key, chosen) = key_of(&row);
            let (chosen_words, rejected_words) = (words(&row.chosen_text), words(&row.rejected_text));
            let longer_by =
                if chosen == Some(Text::High) { rejected_words - chosen_words } else { chosen_words - rejected_words };
            let judges = self.judges;
            let heard =
                self.pairs.entry(key).or_insert_with(|| Heard { by: vec![Said::default(); judges].into(), longer_by });
            let said = &mut heard.by[judge];
            match chosen.filter(|_| row.outcome == Outcome::Labelled) {
                Some(Text::Low) => said.low += 1,
                Some(Text::High) => said.high += 1,
                None => said.neither += 1,
            }
            if row.outcome == Outcome::Labelled {
                if let Some(first) = row.chosen_first {
                    rows.first_chosen.count(first);
                }
                if chosen_words != rejected_words {
                    rows.longer_chosen.count(chosen_words > rejected_words);
                }
            }
        }
        Ok(rows)
    }

    /// Every pair: its key, the judges' verdicts, and by how many words its low text is the longer one. In no order.
    pub fn verdicts(&self) -> impl Iterator<Item = (PairKey, Vec<Verdict>, i64)> {
        self.pairs
            .iter()
            .map(|(key, heard)| (*key, heard.by.iter().map(|said| said.verdict()).collect(), heard.longer_by))
    }

    /// Pairs in a judge's table, and how many of them it has a preference on.
    pub fn judged(&self, judge: usize) -> (u64, u64) {
        let verdicts = self.pairs.values().map(|heard| heard.by[judge].verdict());
        verdicts.fold((0, 0), |(judged, labelled), verdict| {
            (judged + u64::from(verdict != Verdict::Absent), labelled + u64::from(matches!(verdict, Verdict::For(_))))
        })
    }

    pub fn verdict(&self, key: &PairKey, judge: usize) -> Verdict {
        self.pairs.get(key).map_or(Verdict::Absent, |heard| heard.by[judge].verdict())
    }

    /// Of every two labels that a judge's table has of one pair: whether they are the same.
    pub fn with_itself(&self, judge: usize) -> Tally {
        let mut tally = Tally::default();
        for heard in self.pairs.values() {
            let (low, high) = (u64::from(heard.by[judge].low), u64::from(heard.by[judge].high));
            let twos = |n: u64| n * n.saturating_sub(1) / 2;
            tally.add(twos(low) + twos(high), twos(low + high));
        }
        tally
    }
}

/// A row's pair, and which of its texts is the chosen one.
pub fn key_of(row: &Preference) -> (PairKey, Option<Text>) {
    PairKey::of(&row.prompt, &row.chosen_text, &row.rejected_text)
}

pub fn words(text: &str) -> i64 {
    text.split_whitespace().count() as i64
}
