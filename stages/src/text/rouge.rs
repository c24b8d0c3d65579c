//! ROUGE F1 of a summary against a reference (Lin 2004). Tokens as in Google's `rouge-score`: lower case, runs of a-z
//! and 0-9, no stemming.

use std::collections::HashMap;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum Variant {
    /// Overlap of words.
    #[serde(rename = "rouge1")]
    Rouge1,
    /// Overlap of word bigrams.
    #[serde(rename = "rouge2")]
    Rouge2,
    /// Longest common subsequence.
    #[default]
    #[serde(rename = "rougeL")]
    RougeL,
}

impl Variant {
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rouge1 => "rouge1",
            Self::Rouge2 => "rouge2",
            Self::RougeL => "rougeL",
        }
    }

    /// F1 in [0, 1].
    pub fn f1(self, summary: &str, reference: &str) -> f64 {
        let (summary, reference) = (words(summary), words(reference));
        match self {
            Self::Rouge1 => overlap(&summary, &reference, 1),
            Self::Rouge2 => overlap(&summary, &reference, 2),
            Self::RougeL => f1(common(&summary, &reference), summary.len(), reference.len()),
        }
    }
}

fn words(text: &str) -> Vec<String> {
    let lower = text.to_lowercase();
    lower.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty()).map(str::to_owned).collect()
}

fn f1(common: usize, summary: usize, reference: usize) -> f64 {
    if common == 0 { 0.0 } else { 2.0 * common as f64 / (summary + reference) as f64 }
}

fn overlap(summary: &[String], reference: &[String], n: usize) -> f64 {
    let mut left: HashMap<&[String], usize> = HashMap::new();
    reference.windows(n).for_each(|gram| *left.entry(gram).or_default() += 1);
    let mut common = 0;
    for gram in summary.windows(n) {
        if let Some(count) = left.get_mut(gram).filter(|count| **count > 0) {
            *count -= 1;
            common += 1;
        }
    }
    let grams = |words: &[String]| (words.len() + 1).saturating_sub(n);
    f1(common, grams(summary), grams(reference))
}

/// Length of the longest common subsequence.
fn common(a: &[String], b: &[String]) -> usize {
    let mut row = vec![0; b.len() + 1];
    for word in a {
        let mut diagonal = 0;
        for (j, other) in b.iter().enumerate() {
            let above = row[j + 1];
            row[j + 1] = if word == other { diagonal + 1 } else { above.max(row[j]) };
            diagonal = above;
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn close(variant: Variant, summary: &str, reference: &str, expected: f64) {
        let found = variant.f1(summary, reference);
        assert!((found - expected).abs() < 1e-12, "{variant:?}: {found} != {expected}");
    }

    /// A pair of texts with scores from Google's `rouge-score`, computed by `lm/tests/fixtures/rouge.py`.
    #[derive(Deserialize)]
    struct Measured {
        summary: String,
        reference: String,
        f1: BTreeMap<String, f64>,
        mutants: BTreeMap<String, BTreeMap<String, f64>>,
    }

    #[test]
    fn scores_are_those_of_rouge_score_and_not_those_of_wrong_implementations() {
        let file = concat!(env!("CARGO_MANIFEST_DIR"), "/../lm/tests/fixtures/rouge.json");
        let rows: Vec<Measured> = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
        assert!(rows.len() > 60);
        for variant in [Variant::Rouge1, Variant::Rouge2, Variant::RougeL] {
            let name = variant.as_str();
            let apart = |row: &Measured, of: &BTreeMap<String, f64>| {
                (variant.f1(&row.summary, &row.reference) - of[name]).abs() > 1e-12
            };
            for row in &rows {
                assert!(!apart(row, &row.f1), "{name} of {:?} against {:?}", row.summary, row.reference);
            }
            for mutant in ["stemmed", "recall", "precision"] {
                assert!(rows.iter().any(|row| apart(row, &row.mutants[mutant])), "{name} is that of {mutant}");
            }
        }
    }

    #[test]
    fn scores_are_those_worked_out_by_hand() {
        // 5 of 6 and 6 words in common; 3 of 5 and 5 bigrams; the subsequence `the cat on the mat`.
        let (a, b) = ("The cat sat on the mat.", "the cat lay on the mat");
        close(Variant::Rouge1, a, b, 5.0 / 6.0);
        close(Variant::Rouge2, a, b, 3.0 / 5.0);
        close(Variant::RougeL, a, b, 5.0 / 6.0);
        // Counts are clipped: the second `the` of the summary has no match.
        close(Variant::Rouge1, "the the", "the cat", 0.5);
        // Only the subsequence depends on order.
        close(Variant::Rouge1, "b a", "a b", 1.0);
        close(Variant::RougeL, "b a", "a b", 0.5);
    }

    #[test]
    fn empty_texts_and_single_words_score_nothing_rather_than_nan() {
        for variant in [Variant::Rouge1, Variant::Rouge2, Variant::RougeL] {
            close(variant, "", "a b", 0.0);
            close(variant, "…", "—", 0.0);
        }
        close(Variant::Rouge2, "a", "a", 0.0);
    }
}
