//! Corrupts a summary in one given way.

use std::collections::HashSet;

use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};

use super::quality::{Facts, score};
use super::swap_facts;
use super::words::{join, spans};
use crate::types::Corruption;

/// A summary with the information about its post that corruptions use.
#[derive(Clone, Copy, Debug)]
pub struct Sound<'a> {
    pub text: &'a str,
    pub ended: bool,
    /// The post with its title.
    pub post: &'a str,
    /// `None` for real text.
    pub facts: Option<&'a Facts>,
    /// Another post, without its title, as the source of false words for real text.
    pub other_post: &'a str,
}

/// Makes `sound` worse: `swap` replaces one to three facts, `shuffle` reorders at least five consecutive words (four if
/// there are no more) or at least four sentences, `truncate` drops the end, `repeat` says a phrase three or four times.
/// The second value is `ended`: false if a truncated text should also look as if it hit the length limit. `None` if
/// this corruption cannot make this text worse: with facts, worse means a lower true quality; for real text, a
/// different text.
///
/// Real text has no facts. There, a swap replaces one to three words that occur in both summary and post (numbers, or
/// content words of at least five letters) by words of the same sort from another post.
pub fn corrupt(sound: &Sound, corruption: Corruption, rng: &mut impl Rng) -> Option<(String, bool)> {
    let mut ended = sound.ended;
    let text = match corruption {
        Corruption::Swap => {
            let n = rng.random_range(1..=3);
            match sound.facts {
                Some(facts) => swap_facts(sound.text, facts, n, rng)?,
                None => swap_words(sound, n, rng)?,
            }
        }
        Corruption::Shuffle => shuffle(sound.text, rng)?,
        Corruption::Truncate => {
            ended &= rng.random_bool(0.5);
            truncate(sound.text, rng)?
        }
        Corruption::Repeat => repeat(sound.text, rng)?,
    };
    is_worse(sound, &text, ended).then_some((text, ended))
}

/// Whether a corrupted copy of `sound` is worse: of lower true quality or, for real text, a different text.
pub(crate) fn is_worse(sound: &Sound, text: &str, ended: bool) -> bool {
    match sound.facts {
        Some(facts) => score(facts, text, ended).total < score(facts, sound.text, sound.ended).total,
        None => text.trim() != sound.text.trim() || ended != sound.ended,
    }
}

fn shuffle(text: &str, rng: &mut impl Rng) -> Option<String> {
    let sentences = sentences(text);
    let by_sentence = sentences.len() >= 4 && rng.random();
    let mut pieces = if by_sentence { sentences } else { words(text) };
    if pieces.len() < 4 {
        return None;
    }
    let size = if by_sentence { pieces.len() } else { rng.random_range(pieces.len().min(5)..=pieces.len()) };
    let from = rng.random_range(0..=pieces.len() - size);
    pieces[from..from + size].shuffle(rng);
    Some(join(&pieces))
}

/// Keeps the first 30 to 70 per cent of the words.
fn truncate(text: &str, rng: &mut impl Rng) -> Option<String> {
    let spans = spans(text);
    let keep = (spans.len() as f64 * rng.random_range(0.3..0.7)) as usize;
    (keep > 0).then(|| text[..spans[keep - 1].end].to_owned())
}

/// Repeats a phrase of two to six words two or three more times in place.
fn repeat(text: &str, rng: &mut impl Rng) -> Option<String> {
    let spans = spans(text);
    if spans.len() < 2 {
        return None;
    }
    let size = rng.random_range(2..=spans.len().min(6));
    let from = rng.random_range(0..=spans.len() - size);
    let end = spans[from + size - 1].end;
    let phrase = &text[spans[from].start..end];
    let again = format!(" {phrase}").repeat(rng.random_range(2..=3));
    Some(format!("{}{again}{}", &text[..end], &text[end..]))
}

fn swap_words(sound: &Sound, n: usize, rng: &mut impl Rng) -> Option<String> {
    let own: HashSet<String> = words(sound.post).iter().map(|word| word.to_lowercase()).collect();
    let donors: Vec<&str> = words(sound.other_post).into_iter().filter(|w| !own.contains(&w.to_lowercase())).collect();
    let mut shared: Vec<_> = spans(sound.text)
        .into_iter()
        .filter(|span| own.contains(&sound.text[span.clone()].to_lowercase()))
        .filter_map(|span| Some((sort(&sound.text[span.clone()])?, span)))
        .collect();
    shared.shuffle(rng);
    shared.truncate(n);
    shared.sort_by_key(|(_, span)| span.start);
    let mut text = sound.text.to_owned();
    // Backwards, so that the remaining spans stay valid.
    for (sort_of, span) in shared.into_iter().rev() {
        let fitting: Vec<&&str> = donors.iter().filter(|word| sort(word) == Some(sort_of)).collect();
        if let Some(new) = fitting.choose(rng) {
            text.replace_range(span, new);
        }
    }
    Some(text)
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Sort {
    Number,
    Word,
}

/// Words of at least five letters without content of their own.
const FUNCTION_WORDS: [&str; 32] = [
    "about",
    "after",
    "again",
    "because",
    "before",
    "being",
    "could",
    "doesn",
    "every",
    "might",
    "never",
    "other",
    "really",
    "should",
    "since",
    "something",
    "still",
    "their",
    "there",
    "these",
    "thing",
    "things",
    "those",
    "though",
    "through",
    "under",
    "until",
    "where",
    "which",
    "while",
    "without",
    "would",
];

/// The sort of a word that is likely to carry content.
fn sort(word: &str) -> Option<Sort> {
    if FUNCTION_WORDS.contains(&word.to_lowercase().as_str()) {
        None
    } else if word.chars().all(|c| c.is_ascii_digit()) {
        Some(Sort::Number)
    } else if word.chars().count() >= 5 && word.chars().all(char::is_alphabetic) {
        Some(Sort::Word)
    } else {
        None
    }
}

fn words(text: &str) -> Vec<&str> {
    spans(text).into_iter().map(|span| &text[span]).collect()
}

fn sentences(text: &str) -> Vec<&str> {
    text.split_inclusive(['.', '?', '!', '\n']).map(str::trim).filter(|s| !s.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::SeedableRng;
    use rand_chacha::ChaCha12Rng;

    use super::*;
    use crate::corpus::{Situation, examples};

    fn sound(s: &Situation) -> Sound<'_> {
        Sound { text: &s.summary, ended: true, post: &s.post, facts: Some(&s.facts), other_post: "" }
    }

    proptest! {
        #[test]
        fn a_corrupted_reference_is_worse_in_the_way_it_says(seed: u64) {
            let s = &examples(1, seed)[0];
            let before = score(&s.facts, &s.summary, true);
            let mut rng = ChaCha12Rng::seed_from_u64(seed);
            for &corruption in Corruption::ALL {
                let Some((text, ended)) = corrupt(&sound(s), corruption, &mut rng) else { continue };
                let q = score(&s.facts, &text, ended);
                prop_assert!(q.total < before.total);
                match corruption {
                    Corruption::Swap => prop_assert!((1..=3).contains(&q.wrong) && q.covered + q.wrong == 6),
                    Corruption::Shuffle => prop_assert!((q.covered, q.wrong, q.words) == (6, 0, before.words)),
                    Corruption::Truncate => prop_assert!(q.covered < 6 || q.fluency < 1.0 || !ended),
                    Corruption::Repeat => prop_assert!(q.repetition > before.repetition && q.covered == 6),
                }
            }
        }

        #[test]
        fn no_text_is_too_odd_to_be_corrupted(text in "\\PC{0,80}", post in "\\PC{0,80}", other_post in "\\PC{0,80}", seed: u64) {
            let mut rng = ChaCha12Rng::seed_from_u64(seed);
            for facts in [None, Some(&examples(1, seed)[0].facts)] {
                for &corruption in Corruption::ALL {
                    let sound = Sound { text: &text, ended: true, post: &post, facts, other_post: &other_post };
                    let _ = corrupt(&sound, corruption, &mut rng);
                }
            }
        }
    }

    #[test]
    fn references_can_be_corrupted_in_every_way() {
        let mut rng = ChaCha12Rng::seed_from_u64(3);
        for &corruption in Corruption::ALL {
            let done = examples(200, 3).iter().filter(|s| corrupt(&sound(s), corruption, &mut rng).is_some()).count();
            assert!(done > 190, "{corruption:?}: {done} of 200");
        }
    }

    #[test]
    fn real_text_swaps_what_summary_and_post_share_for_words_of_another_post() {
        let sound = Sound {
            text: "my parents took 300 dollars",
            ended: true,
            post: "last month my parents took 300 dollars from me",
            facts: None,
            other_post: "the teacher gave 15 lessons about where dollars go",
        };
        let mut rng = ChaCha12Rng::seed_from_u64(1);
        let mut seen = HashSet::new();
        for _ in 0..100 {
            let (text, ended) = corrupt(&sound, Corruption::Swap, &mut rng).expect("three words are shared");
            assert!(ended && text.starts_with("my ") && text.contains(" took "));
            seen.extend(words(&text).into_iter().map(str::to_owned));
        }
        assert!(["teacher", "lessons", "15"].iter().all(|w| seen.contains(*w)), "{seen:?}");
        assert!(["gave", "the", "about", "where"].iter().all(|w| !seen.contains(*w)), "{seen:?}");
    }

    #[test]
    fn a_text_without_shared_words_is_left_alone() {
        let sound =
            Sound { text: "so it goes", ended: true, post: "a story", facts: None, other_post: "another story" };
        assert_eq!(corrupt(&sound, Corruption::Swap, &mut ChaCha12Rng::seed_from_u64(1)), None);
    }
}
