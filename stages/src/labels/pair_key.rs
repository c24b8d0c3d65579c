//! Identity of a pair by content: the post and both summaries, in either order.

use crate::prompt::Parts;
use crate::random::{bits_of, share_of};

/// A key of a pair's content. It ignores white space and the layout of the template.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PairKey([u8; 16]);

/// One of the two texts of a pair, ordered by hash, so that neither is the better or the longer one more often.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Text {
    Low,
    High,
}

impl Text {
    pub fn other(self) -> Self {
        match self {
            Self::Low => Self::High,
            Self::High => Self::Low,
        }
    }
}

/// A hash of a post's content, normalised as in [`PairKey`].
pub fn post_of(prompt: &str) -> u64 {
    let mut first = [0; 8];
    first.copy_from_slice(&digest(&[b"post", plain(prompt).as_bytes()])[..8]);
    u64::from_le_bytes(first)
}

impl PairKey {
    /// The key of two summaries of one prompt, and which of its texts `a` is; `None` if both texts are equal.
    pub fn of(prompt: &str, a: &str, b: &str) -> (Self, Option<Text>) {
        let prompt = plain(prompt);
        let [a, b] = [a, b].map(|text| digest(&[prompt.as_bytes(), squashed(text).as_bytes()]));
        let (low, high) = (a.min(b), a.max(b));
        let side = (a != b).then_some(if a == low { Text::Low } else { Text::High });
        (Self(digest(&[&low, &high])), side)
    }

    pub fn as_bytes(&self) -> &[u8; 16] {
        &self.0
    }

    /// 64 bits that depend only on the generator key and the pair.
    pub fn bits(&self, key: &[u8; 32]) -> u64 {
        bits_of(key, self.0)
    }

    /// A number in [0, 1) that depends only on the generator key and the pair.
    pub fn share(&self, key: &[u8; 32]) -> f64 {
        share_of(key, self.0)
    }
}

impl std::fmt::Display for PairKey {
    /// The first 64 bits in hexadecimal.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.0[..8].iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

fn digest(parts: &[&[u8]]) -> [u8; 16] {
    let mut hasher = blake3::Hasher::new_derive_key("temper pair v1");
    for part in parts {
        hasher.update(&(part.len() as u64).to_le_bytes());
        hasher.update(part);
    }
    let mut short = [0; 16];
    short.copy_from_slice(&hasher.finalize().as_bytes()[..16]);
    short
}

/// A prompt in the A.1 template, with words separated by single spaces.
fn plain(prompt: &str) -> String {
    let template = Parts::parse(prompt).map(Parts::text);
    squashed(template.as_deref().unwrap_or(prompt))
}

/// The words of a text, separated by single spaces.
fn squashed(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PROMPT: &str = "Subreddit: r/tifu\nTITLE: T\nPOST: I fell.\n\nTwice.\nTL;DR:";

    #[test]
    fn the_same_pair_has_one_key_however_its_source_sets_it() {
        let (key, cat) = PairKey::of(PROMPT, "a cat", "a dog");
        assert_eq!(PairKey::of(PROMPT, " a  dog\n", "a cat"), (key, cat.map(Text::other)));
        let doubled = "SUBREDDIT: r/tifu\n\nTITLE: T\n\nPOST: I fell.\nTwice.\n\nTL;DR:";
        assert_eq!(PairKey::of(doubled, "a cat", "a dog").0, key);
    }

    #[test]
    fn another_post_or_another_summary_is_another_pair() {
        let (key, _) = PairKey::of(PROMPT, "a cat", "a dog");
        assert_ne!(PairKey::of(&PROMPT.replace("fell", "stood"), "a cat", "a dog").0, key);
        for (a, b) in [("a cat.", "a dog"), ("A cat", "a dog"), ("a cat a", "dog"), ("a cat", "a cat")] {
            assert_ne!(PairKey::of(PROMPT, a, b).0, key, "{a}, {b}");
        }
        assert_eq!(PairKey::of(PROMPT, "a cat", " a cat").1, None);
    }

    #[test]
    fn sides_are_tossed_by_content() {
        let low = (0..1000).filter(|i| {
            PairKey::of(PROMPT, &format!("a longer summary {i}"), &format!("short {i}")).1 == Some(Text::Low)
        });
        let low = low.count();
        assert!((430..570).contains(&low), "{low} of 1000");
    }

    proptest! {
        #[test]
        fn turning_a_pair_round_turns_its_side(prompt in any::<String>(), a in any::<String>(), b in any::<String>()) {
            let ((key, side), (turned, other)) = (PairKey::of(&prompt, &a, &b), PairKey::of(&prompt, &b, &a));
            prop_assert_eq!(key, turned);
            prop_assert_eq!(side.map(Text::other), other);
        }
    }
}
