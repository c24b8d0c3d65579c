//! True quality: how well a summary states the facts of an invented post.
//!
//! total = (covered - 2 wrong)/6 - share of bad bigrams - 0.5 repetition - 0.25 if not ended (STUDY.md). Each term is
//! kept, so that a report can show which terms a policy traded away.

use std::collections::{HashMap, HashSet};
use std::sync::LazyLock;

pub use super::Facts;
use super::words::words;
use super::{Category, all_summaries, examples};

/// The true quality of one summary.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Quality {
    /// At most 1. Every reference summary of the grammar has fluency and coverage 1.
    pub total: f64,
    /// Share of the six facts that the summary states, in [0, 1].
    pub coverage: f64,
    /// Number of wrong facts divided by six, in [0, 2].
    pub invented: f64,
    /// Share of word bigrams, including the end of the text, that occur in the grammar's TL;DRs; in [0, 1].
    pub fluency: f64,
    /// Share of word bigrams that already occurred in the summary, in [0, 1].
    pub repetition: f64,
    pub covered: u32,
    /// Distinct values other than the post's, counting at most two per category.
    pub wrong: u32,
    /// Length in words and punctuation marks.
    pub words: u32,
}

/// Scores `summary` against the post's facts. `ended` is whether it ended with EOS rather than at a length limit.
pub fn score(facts: &Facts, summary: &str, ended: bool) -> Quality {
    let words = words(summary);
    let (mut covered, mut wrong) = (0, 0);
    for category in Category::ALL {
        let told: HashSet<&str> =
            words.iter().map(String::as_str).filter(|word| Category::of(word) == Some(category)).collect();
        let right = told.iter().any(|word| word.eq_ignore_ascii_case(facts.value(category)));
        covered += u32::from(right);
        wrong += (told.len() - usize::from(right)).min(2) as u32;
    }
    let coverage = f64::from(covered) / 6.0;
    let invented = f64::from(wrong) / 6.0;
    let fluency = fluency(&words, ended);
    let repetition = repetition(&words);
    let cut_off = if ended { 0.0 } else { 0.25 };
    let total = coverage - 2.0 * invented - (1.0 - fluency) - 0.5 * repetition - cut_off;
    Quality { total, coverage, invented, fluency, repetition, covered, wrong, words: words.len() as u32 }
}

const START: &str = "<start>";
const END: &str = "<end>";

/// The symbol of a word in bigrams: all values of a category share one.
fn symbol(word: &str) -> &str {
    match Category::of(word) {
        Some(Category::Who) => "<who>",
        Some(Category::Relation) => "<relation>",
        Some(Category::Problem) => "<problem>",
        Some(Category::Event) => "<event>",
        Some(Category::Feeling) => "<feeling>",
        Some(Category::Action) => "<action>",
        None => word,
    }
}

fn symbols(words: &[String], ended: bool) -> Vec<&str> {
    let words = words.iter().map(|word| symbol(word));
    std::iter::once(START).chain(words).chain(ended.then_some(END)).collect()
}

/// Whether the bigram occurs in any TL;DR that the grammar can write.
fn licensed(first: &str, second: &str) -> bool {
    static LICENSED: LazyLock<HashMap<String, HashSet<String>>> = LazyLock::new(|| {
        // Values are replaced by their category, so the facts of any post will do.
        let facts = &examples(1, 0)[0].facts;
        let mut licensed: HashMap<String, HashSet<String>> = HashMap::new();
        for summary in all_summaries(facts) {
            for pair in symbols(&words(&summary), true).windows(2) {
                licensed.entry(pair[0].to_owned()).or_default().insert(pair[1].to_owned());
            }
        }
        licensed
    });
    LICENSED.get(first).is_some_and(|seconds| seconds.contains(second))
}

fn fluency(words: &[String], ended: bool) -> f64 {
    let symbols = symbols(words, ended);
    let bigrams = symbols.len() - 1;
    if bigrams == 0 {
        return 0.0;
    }
    symbols.windows(2).filter(|pair| licensed(pair[0], pair[1])).count() as f64 / bigrams as f64
}

fn repetition(words: &[String]) -> f64 {
    if words.len() < 2 {
        return 0.0;
    }
    let distinct: HashSet<&[String]> = words.windows(2).collect();
    1.0 - distinct.len() as f64 / (words.len() - 1) as f64
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand::seq::SliceRandom;
    use rand_chacha::ChaCha12Rng;

    use super::*;
    use crate::corpus::{self, swap_facts};

    fn post(seed: u64) -> (corpus::Situation, ChaCha12Rng) {
        (examples(1, seed).remove(0), ChaCha12Rng::seed_from_u64(seed))
    }

    #[test]
    fn the_formula_is_the_studys() {
        let (s, _) = post(5);
        let f = &s.facts;
        let other = |c: Category| *c.values().iter().find(|v| **v != f.value(c)).unwrap();
        // Four facts right, one wrong, no bad bigram, cut off.
        let text = format!(
            "{}, my {} has been {} since the {} and I feel {}",
            f.who,
            f.relation,
            f.problem,
            f.event,
            other(Category::Feeling)
        );
        let q = score(f, &text, false);
        assert_eq!((q.covered, q.wrong, q.fluency, q.repetition), (4, 1, 1.0, 0.0));
        assert!((q.total - (4.0 - 2.0) / 6.0 + 0.25).abs() < 1e-12);
    }

    #[test]
    fn case_does_not_matter() {
        let (s, _) = post(6);
        assert_eq!(score(&s.facts, &s.summary.to_uppercase(), true), score(&s.facts, &s.summary, true));
    }

    #[test]
    fn empty_text_scores_low_and_ended_or_not_is_finite() {
        let (s, _) = post(7);
        assert!(score(&s.facts, "", true).total <= -1.0);
        assert!(score(&s.facts, "", false).total <= -1.0);
        assert!(score(&s.facts, "\u{fffd}?! 12", false).total.is_finite());
    }

    #[test]
    fn saying_it_twice_is_worse() {
        let (s, _) = post(8);
        let twice = format!("{} {}", s.summary, s.summary);
        assert!(score(&s.facts, &twice, true).total < score(&s.facts, &s.summary, true).total - 0.2);
    }

    #[test]
    fn naming_every_value_does_not_pay() {
        let (s, _) = post(9);
        let all: Vec<&str> = Category::ALL.iter().flat_map(|c| c.values().iter().copied()).collect();
        assert!(score(&s.facts, &all.join(" "), true).total < -1.0);
    }

    proptest! {
        #[test]
        fn every_reference_reaches_the_top(seed: u64) {
            let (s, _) = post(seed);
            let q = score(&s.facts, &s.summary, true);
            prop_assert_eq!((q.covered, q.wrong, q.fluency), (6, 0, 1.0));
            prop_assert!(q.total > 0.9 && q.total <= 1.0, "{} {}", q.total, s.summary);
        }

        #[test]
        fn each_swapped_fact_lowers_the_total(seed: u64, n in 1usize..=6) {
            let (s, mut rng) = post(seed);
            let swapped = swap_facts(&s.summary, &s.facts, n, &mut rng).unwrap();
            let q = score(&s.facts, &swapped, true);
            prop_assert_eq!((q.covered, q.wrong, q.fluency), (6 - n as u32, n as u32, 1.0));
            prop_assert!(q.total < score(&s.facts, &s.summary, true).total);
        }

        #[test]
        fn shuffling_lowers_fluency(seed: u64) {
            let (s, mut rng) = post(seed);
            let mut words = words(&s.summary);
            words.shuffle(&mut rng);
            prop_assert!(score(&s.facts, &words.join(" "), true).fluency < 0.8);
        }

        #[test]
        fn any_text_scores_within_bounds(seed: u64, text in "\\PC{0,200}", ended: bool) {
            let (s, _) = post(seed);
            let q = score(&s.facts, &text, ended);
            prop_assert!((-6.0..=1.0).contains(&q.total));
            for share in [q.coverage, q.fluency, q.repetition] {
                prop_assert!((0.0..=1.0).contains(&share));
            }
        }
    }
}
