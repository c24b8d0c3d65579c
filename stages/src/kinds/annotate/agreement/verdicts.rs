//! Verdicts of all judges on all pairs, keyed by the pair's content; texts are not kept.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use engine::context::Input;
use engine::error::Result;

use crate::labels::agreement::Counts;
use crate::labels::pair_key::{PairKey, Text, post_of};
use crate::types::{Outcome, Preference, Preferences};

/// Counts of one judge's labels on one pair.
#[derive(Clone, Copy, Debug, Default)]
struct LabelCounts {
    low: u32,
    high: u32,
    /// Rows without a preference.
    neither: u32,
}

/// A judge's overall answer on a pair.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// The pair is not in the judge's table.
    Absent,
    /// Ties, equal votes, or answers without a label.
    Neither,
    For(Text),
}

impl LabelCounts {
    fn verdict(self) -> Verdict {
        match (self.low, self.high, self.neither) {
            (0, 0, 0) => Verdict::Absent,
            (low, high, _) if low > high => Verdict::For(Text::Low),
            (low, high, _) if high > low => Verdict::For(Text::High),
            _ => Verdict::Neither,
        }
    }
}

/// Statistics of a judge's rows, before several rows of one pair are merged.
#[derive(Clone, Copy, Debug, Default)]
pub struct Rows {
    pub rows: u64,
    pub first_chosen: Counts<2>,
    pub longer_chosen: Counts<2>,
}

/// A pair judged by at least one judge.
pub struct JudgedPair {
    by: Box<[LabelCounts]>,
    /// Words of the low text minus words of the high text.
    pub longer_by: i64,
    /// Hash of the post.
    post: u64,
}

impl JudgedPair {
    pub fn verdict(&self, judge: usize) -> Verdict {
        self.by[judge].verdict()
    }
}

/// All pairs of all judges.
pub struct Pairs {
    judges: usize,
    pairs: HashMap<PairKey, JudgedPair>,
}

impl Pairs {
    pub fn of(judges: usize) -> Self {
        Self { judges, pairs: HashMap::new() }
    }

    /// Adds a judge's table.
    pub fn hear(&mut self, judge: usize, folder: &Path) -> Result<Rows> {
        let mut rows = Rows::default();
        // By post: labels for the summary shown first and for the other one, for the longer summary and for the other
        // one.
        let mut chosen_by_post: HashMap<u64, [[u64; 2]; 2]> = HashMap::new();
        for row in Preferences::open(folder)? {
            let row = row?;
            rows.rows += 1;
            let (key, chosen) = key_of(&row);
            let (chosen_words, rejected_words) = (words(&row.chosen_text), words(&row.rejected_text));
            let longer_by =
                if chosen == Some(Text::High) { rejected_words - chosen_words } else { chosen_words - rejected_words };
            let post = post_of(&row.prompt);
            self.count(judge, key, (longer_by, post), chosen.filter(|_| row.outcome == Outcome::Labelled));
            if row.outcome == Outcome::Labelled {
                let [first_chosen, longer_chosen] = chosen_by_post.entry(post).or_default();
                if let Some(first) = row.chosen_first {
                    first_chosen[usize::from(!first)] += 1;
                }
                if chosen_words != rejected_words {
                    longer_chosen[usize::from(chosen_words < rejected_words)] += 1;
                }
            }
        }
        for [first_chosen, longer_chosen] in chosen_by_post.into_values() {
            rows.first_chosen.add_post(first_chosen);
            rows.longer_chosen.add_post(longer_chosen);
        }
        Ok(rows)
    }

    /// Adds one label of a judge; `pair` is [`JudgedPair::longer_by`] and the hash of the post.
    fn count(&mut self, judge: usize, key: PairKey, pair: (i64, u64), label: Option<Text>) {
        let (judges, (longer_by, post)) = (self.judges, pair);
        let heard = self.pairs.entry(key);
        let heard =
            heard.or_insert_with(|| JudgedPair { by: vec![LabelCounts::default(); judges].into(), longer_by, post });
        let said = &mut heard.by[judge];
        match label {
            Some(Text::Low) => said.low += 1,
            Some(Text::High) => said.high += 1,
            None => said.neither += 1,
        }
    }

    /// Every pair with its key, in arbitrary order.
    pub fn all(&self) -> impl Iterator<Item = (PairKey, &JudgedPair)> {
        self.pairs.iter().map(|(key, heard)| (*key, heard))
    }

    /// The pairs of each post.
    pub fn by_post(&self) -> Vec<Vec<&JudgedPair>> {
        let mut posts: HashMap<u64, Vec<&JudgedPair>> = HashMap::new();
        for heard in self.pairs.values() {
            posts.entry(heard.post).or_default().push(heard);
        }
        posts.into_values().collect()
    }

    /// Number of pairs in a judge's table, and how many of them have a preference.
    pub fn judged(&self, judge: usize) -> (u64, u64) {
        let verdicts = self.pairs.values().map(|heard| heard.verdict(judge));
        verdicts.fold((0, 0), |(judged, labelled), verdict| {
            (judged + u64::from(verdict != Verdict::Absent), labelled + u64::from(matches!(verdict, Verdict::For(_))))
        })
    }

    pub fn verdict(&self, key: &PairKey, judge: usize) -> Verdict {
        self.pairs.get(key).map_or(Verdict::Absent, |heard| heard.verdict(judge))
    }

    /// For every two labels of one pair in a judge's table, whether they are equal.
    pub fn with_itself(&self, judge: usize) -> Counts<2> {
        let mut counts = Counts::default();
        for post in self.by_post() {
            let mut alike = [0, 0];
            for heard in post {
                let (low, high) = (u64::from(heard.by[judge].low), u64::from(heard.by[judge].high));
                let twos = |n: u64| n * n.saturating_sub(1) / 2;
                alike[0] += twos(low) + twos(high);
                alike[1] += low * high;
            }
            counts.add_post(alike);
        }
        counts
    }
}

/// The answers of all judges to single questions, by the question's name.
pub fn questions(inputs: &[Input]) -> Result<BTreeMap<String, Pairs>> {
    let mut questions: BTreeMap<String, Pairs> = BTreeMap::new();
    for (judge, input) in inputs.iter().enumerate() {
        let Some(rows) = Preferences::with_aspects(&input.folder)? else { continue };
        for row in rows {
            let (row, aspects) = row?;
            let (key, chosen) = key_of(&row);
            let longer_by = words(&row.chosen_text) - words(&row.rejected_text);
            let longer_by = if chosen == Some(Text::High) { -longer_by } else { longer_by };
            for aspect in aspects {
                let label = chosen.zip(aspect.for_chosen).map(|(text, own)| if own { text } else { text.other() });
                let pairs = questions.entry(aspect.question).or_insert_with(|| Pairs::of(inputs.len()));
                pairs.count(judge, key, (longer_by, post_of(&row.prompt)), label);
            }
        }
    }
    Ok(questions)
}

/// A row's pair key, and which of its texts is chosen.
pub fn key_of(row: &Preference) -> (PairKey, Option<Text>) {
    PairKey::of(&row.prompt, &row.chosen_text, &row.rejected_text)
}

pub fn words(text: &str) -> i64 {
    text.split_whitespace().count() as i64
}
