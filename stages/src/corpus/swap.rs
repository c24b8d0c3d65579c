//! Replaces true facts in a text by false ones.

use rand::Rng;
use rand::seq::SliceRandom;

use super::facts::{Category, Facts};
use super::words::spans;

/// Replaces `n` of the true facts in `text` (all of them if there are fewer), at every occurrence, by another value of
/// the same category: never the post's own, and never one that the text already contains. `None` if the text has no
/// true fact.
pub fn swap_facts(text: &str, facts: &Facts, n: usize, rng: &mut impl Rng) -> Option<String> {
    let spans = spans(text);
    let words: Vec<&str> = spans.iter().map(|span| &text[span.clone()]).collect();
    let mut told: Vec<Category> = Category::ALL
        .into_iter()
        .filter(|&category| words.iter().any(|word| word.eq_ignore_ascii_case(facts.value(category))))
        .collect();
    if told.is_empty() || n == 0 {
        return None;
    }
    told.shuffle(rng);
    told.truncate(n);
    let swaps: Vec<(&str, &str)> = told
        .into_iter()
        .filter_map(|category| {
            let not: Vec<&str> =
                words.iter().copied().filter(|w| Category::of(&w.to_lowercase()) == Some(category)).collect();
            Some((facts.value(category), category.other(&not, rng)?))
        })
        .collect();
    if swaps.is_empty() {
        return None;
    }

    let mut out = String::with_capacity(text.len());
    let mut from = 0;
    for (span, word) in spans.iter().zip(&words) {
        if let Some((_, new)) = swaps.iter().find(|(own, _)| word.eq_ignore_ascii_case(own)) {
            out.push_str(&text[from..span.start]);
            out.push_str(new);
            from = span.end;
        }
    }
    out.push_str(&text[from..]);
    Some(out)
}
