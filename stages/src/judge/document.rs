//! The documents shown to the model, the questions about them, and content-based keys for the answers.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::random::{draw, hash};
use crate::types::{Pair, Side};

/// The side of a pair that is shown first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shown {
    AFirst,
    BFirst,
}

impl Shown {
    /// The side shown at position `place`, 1 or 2.
    pub fn side(self, place: u8) -> Side {
        if (self == Self::AFirst) == (place == 1) { Side::A } else { Side::B }
    }

    fn other(self) -> Self {
        if self == Self::AFirst { Self::BFirst } else { Self::AFirst }
    }
}

/// A post with two summaries in display order.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Document {
    pub prompt: String,
    pub first: String,
    pub second: String,
}

/// The key of an answer about one document.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AnswerKey([u8; 16]);

impl AnswerKey {
    /// Hashes everything that determines an answer, each part prefixed with its length.
    pub fn of(parts: &[&[u8]]) -> Self {
        // The name is that of the first kind; the settings' fingerprint tells the others apart.
        let mut hasher = blake3::Hasher::new_derive_key("temper annotate.claude answer v2");
        for part in parts {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part);
        }
        let mut short = [0; 16];
        short.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
        Self(short)
    }

    /// The key of the `n`th attempt at the same question, after earlier answers gave no label.
    pub fn attempt(self, n: u32) -> Self {
        if n <= 1 { self } else { Self::of(&[b"attempt", &self.0, &n.to_le_bytes()]) }
    }

    /// The key of the same question if its answer is valid only at this slot among these other questions.
    pub fn among(self, company: &[Self], slot: usize) -> Self {
        let company: Vec<u8> = company.iter().flat_map(|key| key.0).collect();
        Self::of(&[b"among", &self.0, &company, &(slot as u64).to_le_bytes()])
    }

    /// A 62-bit number derived from the key; two keys collide with probability 2^-62.
    pub fn number(self) -> u64 {
        let mut first = [0; 8];
        first.copy_from_slice(&self.0[..8]);
        u64::from_le_bytes(first) >> 2
    }
}

impl fmt::Display for AnswerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for AnswerKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl Serialize for AnswerKey {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for AnswerKey {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        let text = String::deserialize(d)?;
        let number = Some(&text).filter(|text| text.len() == 32).and_then(|text| u128::from_str_radix(text, 16).ok());
        number.map(|n| Self(n.to_be_bytes())).ok_or_else(|| serde::de::Error::custom("expected 32 hexadecimal digits"))
    }
}

/// The purpose of a question.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Purpose {
    /// To get the label.
    Label,
    /// To check whether the label is the same with the summaries in the other order.
    Swap,
    /// To check whether the same question gives the same label again.
    Repeat,
}

/// A document to be judged.
#[derive(Clone, Debug)]
pub struct Question {
    pub purpose: Purpose,
    pub document: Document,
    pub shown: Shown,
    pub key: AnswerKey,
    /// Position in the order of requests; determines the request and the slot.
    pub place: u64,
}

/// Generates the questions of a pair from the annotation seed and the pair's content, independent of its position in
/// the table.
pub struct Questions {
    order: [u8; 32],
    swap: ([u8; 32], f64),
    repeat: ([u8; 32], f64),
    /// Hash of everything that determines an answer except the document.
    asked: [u8; 32],
}

impl Questions {
    /// `generator` returns the generator key for a purpose.
    pub fn new(asked: [u8; 32], swap: f64, repeat: f64, generator: impl Fn(&str) -> [u8; 32]) -> Self {
        Self {
            order: generator("order"),
            swap: (generator("swap"), swap),
            repeat: (generator("repeat"), repeat),
            asked,
        }
    }

    /// The questions of a pair; the first one is for the label.
    pub fn of(&self, pair: &Pair) -> Vec<Question> {
        let content = [pair.prompt.as_str(), &pair.a_text, &pair.b_text];
        let shown = if hash(&self.order, &content) & 1 == 0 { Shown::AFirst } else { Shown::BFirst };
        let mut questions = vec![self.question(pair, Purpose::Label, shown)];
        if draw(&self.swap.0, &content) < self.swap.1 {
            questions.push(self.question(pair, Purpose::Swap, shown.other()));
        }
        if draw(&self.repeat.0, &content) < self.repeat.1 {
            questions.push(self.question(pair, Purpose::Repeat, shown));
        }
        questions
    }

    fn question(&self, pair: &Pair, purpose: Purpose, shown: Shown) -> Question {
        let (first, second) =
            if shown == Shown::AFirst { (&pair.a_text, &pair.b_text) } else { (&pair.b_text, &pair.a_text) };
        let document = Document { prompt: pair.prompt.clone(), first: first.clone(), second: second.clone() };
        // A swapped question may share its answer with a pair that is shown in that order; a repeated question needs an
        // answer of its own.
        let repetition = if purpose == Purpose::Repeat { "2" } else { "1" };
        let parts = [&document.prompt, &document.first, &document.second].map(String::as_bytes);
        let key = AnswerKey::of(&[b"document", &self.asked, parts[0], parts[1], parts[2], repetition.as_bytes()]);
        let purposes = match purpose {
            Purpose::Label => "label",
            Purpose::Swap => "swap",
            Purpose::Repeat => "repeat",
        };
        let place = hash(&self.order, &[purposes, &document.prompt, &document.first, &document.second]);
        Question { purpose, document, shown, key, place }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_label_goes_back_to_the_side_that_was_shown_there() {
        assert_eq!([Shown::AFirst.side(1), Shown::AFirst.side(2)], [Side::A, Side::B]);
        assert_eq!([Shown::BFirst.side(1), Shown::BFirst.side(2)], [Side::B, Side::A]);
    }

    #[test]
    fn keys_differ_by_attempt_and_company_and_come_back_from_text() {
        let key = AnswerKey::of(&[b"a"]);
        let other = AnswerKey::of(&[b"b"]);
        assert_eq!(key.attempt(1), key);
        let all = [
            key,
            key.attempt(2),
            key.attempt(3),
            key.among(&[key, other], 0),
            key.among(&[key, other], 1),
            key.among(&[other, key], 0),
        ];
        let distinct: std::collections::BTreeSet<_> = all.iter().collect();
        assert_eq!(distinct.len(), all.len());
        let text = serde_json::to_string(&key).unwrap();
        assert_eq!(serde_json::from_str::<AnswerKey>(&text).unwrap(), key);
        assert!(serde_json::from_str::<AnswerKey>("\"12\"").is_err());
        assert_ne!(AnswerKey::of(&[b"ab", b"c"]), AnswerKey::of(&[b"a", b"bc"]));
    }
}
