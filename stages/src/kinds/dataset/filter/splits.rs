//! Assigns posts to splits: a pure function of hashes and amounts, so that adding a few posts moves few others.

use std::borrow::Cow;
use std::collections::BTreeMap;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use crate::random::bits_of;
use crate::types::Split;

/// Number of posts in a split.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Amount {
    #[default]
    None,
    Count(u64),
    /// Fraction of all posts that pass the filter, in (0, 1).
    Fraction(f64),
    /// All posts that no other split takes.
    Rest,
    /// Every post that is in neither `valid` nor `calibration`.
    All,
}

impl Serialize for Amount {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::None => s.serialize_u64(0),
            Self::Count(n) => s.serialize_u64(*n),
            Self::Fraction(f) => s.serialize_f64(*f),
            Self::Rest => s.serialize_str("rest"),
            Self::All => s.serialize_str("all"),
        }
    }
}

impl<'de> Deserialize<'de> for Amount {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected a count, a fraction between 0 and 1, `rest` or `all`")]
        enum Raw {
            Count(u64),
            Fraction(f64),
            Word(String),
        }
        let wrong = |what: String| {
            serde::de::Error::custom(format!("{what}: expected a count, a fraction between 0 and 1, `rest` or `all`"))
        };
        match Raw::deserialize(d)? {
            Raw::Count(0) => Ok(Self::None),
            Raw::Count(n) => Ok(Self::Count(n)),
            Raw::Fraction(f) if f > 0.0 && f < 1.0 => Ok(Self::Fraction(f)),
            Raw::Fraction(f) => Err(wrong(f.to_string())),
            Raw::Word(word) if word == "rest" => Ok(Self::Rest),
            Raw::Word(word) if word == "all" => Ok(Self::All),
            Raw::Word(word) => Err(wrong(format!("`{word}`"))),
        }
    }
}

impl JsonSchema for Amount {
    fn schema_name() -> Cow<'static, str> {
        "Amount".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schemars::json_schema!({ "anyOf": [
            { "type": "integer", "minimum": 0 },
            { "type": "number", "exclusiveMinimum": 0, "exclusiveMaximum": 1 },
            { "enum": ["rest", "all"] }
        ] })
    }
}

/// Whether a post may be in several splits.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Overlap {
    /// No post is in two of gold, proxy, rl, calibration and valid; sft may share posts with gold, proxy and rl.
    #[default]
    Disjoint,
    /// As in the paper: valid and calibration are held out; gold and proxy are independent draws from the rest; the
    /// prompts of rl are drawn from proxy.
    Paper,
}

/// Number of posts in each split.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Amounts {
    pub valid: Amount,
    pub calibration: Amount,
    pub gold: Amount,
    pub proxy: Amount,
    pub rl: Amount,
    pub sft: Amount,
}

impl Amounts {
    fn each(&self) -> [(Split, Amount); 6] {
        [
            (Split::Valid, self.valid),
            (Split::Calibration, self.calibration),
            (Split::Gold, self.gold),
            (Split::Proxy, self.proxy),
            (Split::Rl, self.rl),
            (Split::Sft, self.sft),
        ]
    }
}

/// Sort key of a post in a random order for one purpose, keyed by the seed. It depends on the post's content, not on
/// its position in a file.
pub fn rank(key: &[u8; 32], purpose: &str, fingerprint: &[u8; 16]) -> u64 {
    bits_of(key, [purpose.as_bytes(), fingerprint].concat())
}

/// The splits of every post, given by its fingerprint; the splits of one post are in the order of [`Split::ALL`].
///
/// # Errors
/// If there are too few posts; the error lists the amounts of all splits.
pub fn assign(
    fingerprints: &[[u8; 16]],
    amounts: &Amounts,
    overlap: Overlap,
    key: &[u8; 32],
) -> Result<Vec<Vec<Split>>, String> {
    let total = fingerprints.len() as u64;
    let mut wanted: BTreeMap<Split, u64> = BTreeMap::new();
    for (split, amount) in amounts.each() {
        match amount {
            Amount::Count(n) => drop(wanted.insert(split, n)),
            Amount::Fraction(f) => {
                let n = (f * total as f64).round() as u64;
                if n == 0 {
                    return Err(format!("split {split}: {f} of {total} posts is none"));
                }
                wanted.insert(split, n);
            }
            Amount::None | Amount::Rest | Amount::All => {}
        }
    }
    let mut splits = vec![Vec::new(); fingerprints.len()];
    let mut pool = ordered(fingerprints, (0..fingerprints.len()).collect(), key, "disjoint");
    let parted: &[Split] = match overlap {
        Overlap::Disjoint => &[Split::Valid, Split::Calibration, Split::Gold, Split::Proxy, Split::Rl],
        Overlap::Paper => &[Split::Valid, Split::Calibration],
    };
    for &split in parted {
        let n = wanted.get(&split).copied().unwrap_or(0) as usize;
        if n > pool.len() {
            return Err(too_few(total, &wanted));
        }
        for i in pool.drain(..n) {
            splits[i].push(split);
        }
    }
    if overlap == Overlap::Paper {
        let mut proxies = Vec::new();
        for split in [Split::Gold, Split::Proxy] {
            let n = wanted.get(&split).map_or(0, |&n| n as usize);
            let drawn = ordered(fingerprints, pool.clone(), key, split.as_str());
            if n > drawn.len() {
                return Err(too_few(total, &wanted));
            }
            drawn[..n].iter().for_each(|&i| splits[i].push(split));
            proxies = drawn[..n].to_vec();
        }
        let n = match amounts.rl {
            Amount::None => 0,
            Amount::Rest | Amount::All => proxies.len(),
            _ => wanted.get(&Split::Rl).map_or(0, |&n| n as usize),
        };
        if n > proxies.len() {
            return Err(format!("split rl asks for {n} posts, but is drawn from the {} of proxy", proxies.len()));
        }
        ordered(fingerprints, proxies, key, "rl")[..n].iter().for_each(|&i| splits[i].push(Split::Rl));
    } else if let Some((split, _)) =
        amounts.each().into_iter().find(|(split, amount)| *split != Split::Sft && *amount == Amount::Rest)
    {
        if pool.is_empty() {
            return Err(format!("split {split}: no post is left; {}", too_few(total, &wanted)));
        }
        pool.drain(..).for_each(|i| splits[i].push(split));
    }
    let trains = |held: &[Split]| !held.contains(&Split::Valid) && !held.contains(&Split::Calibration);
    let candidates: Vec<usize> = (0..splits.len())
        .filter(|&i| if amounts.sft == Amount::Rest { splits[i].is_empty() } else { trains(&splits[i]) })
        .collect();
    let n = match amounts.sft {
        Amount::None => 0,
        Amount::Rest | Amount::All if candidates.is_empty() => {
            return Err(format!("split sft: no post is left; {}", too_few(total, &wanted)));
        }
        Amount::Rest | Amount::All => candidates.len(),
        _ => wanted.get(&Split::Sft).map_or(0, |&n| n as usize),
    };
    if n > candidates.len() {
        return Err(format!(
            "split sft asks for {n} posts, {} may train it; {}",
            candidates.len(),
            too_few(total, &wanted)
        ));
    }
    ordered(fingerprints, candidates, key, "sft")[..n].iter().for_each(|&i| splits[i].push(Split::Sft));
    splits.iter_mut().for_each(|held| held.sort());
    Ok(splits)
}

fn ordered(fingerprints: &[[u8; 16]], mut posts: Vec<usize>, key: &[u8; 32], purpose: &str) -> Vec<usize> {
    posts.sort_by_cached_key(|&i| (rank(key, purpose, &fingerprints[i]), fingerprints[i]));
    posts
}

fn too_few(total: u64, wanted: &BTreeMap<Split, u64>) -> String {
    let list = wanted.iter().map(|(split, n)| format!("{split} {n}")).collect::<Vec<_>>().join(", ");
    format!("the filter leaves {total} posts, the splits ask for {list}")
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    fn prints(n: u32) -> Vec<[u8; 16]> {
        (0..n).map(|i| crate::text::clean::fingerprint(&format!("post {i}"))).collect()
    }

    const KEY: [u8; 32] = [3; 32];

    fn amounts() -> Amounts {
        Amounts {
            valid: Amount::Count(20),
            calibration: Amount::Count(10),
            gold: Amount::Fraction(0.2),
            proxy: Amount::Fraction(0.2),
            rl: Amount::Rest,
            sft: Amount::All,
        }
    }

    fn count(splits: &[Vec<Split>], split: Split) -> usize {
        splits.iter().filter(|held| held.contains(&split)).count()
    }

    #[test]
    fn the_papers_draws_overlap_but_never_touch_what_is_held_out() {
        let amounts =
            Amounts { gold: Amount::Count(300), proxy: Amount::Count(300), rl: Amount::Count(250), ..amounts() };
        let splits = assign(&prints(400), &amounts, Overlap::Paper, &KEY).unwrap();
        assert_eq!(
            [Split::Gold, Split::Proxy, Split::Rl, Split::Valid].map(|s| count(&splits, s)),
            [300, 300, 250, 20]
        );
        assert_eq!(count(&splits, Split::Sft), 370);
        assert!(splits.iter().any(|held| held.contains(&Split::Gold) && held.contains(&Split::Proxy)));
        assert!(splits.iter().all(|held| !held.contains(&Split::Rl) || held.contains(&Split::Proxy)));
        assert!(splits.iter().all(|held| held.len() == 1 || !held.contains(&Split::Valid)));
    }

    #[test]
    fn one_more_post_moves_at_most_one_per_split() {
        let amounts = Amounts { rl: Amount::Count(50), gold: Amount::Count(50), proxy: Amount::Count(50), ..amounts() };
        let (few, more) = (prints(400), prints(401));
        let (a, b) = (
            assign(&few, &amounts, Overlap::Disjoint, &KEY).unwrap(),
            assign(&more, &amounts, Overlap::Disjoint, &KEY).unwrap(),
        );
        let moved = a.iter().zip(&b).filter(|(a, b)| a != b).count();
        assert!(moved <= 5, "{moved} moved");
    }

    #[test]
    fn too_few_posts_are_told_with_the_counts() {
        let error = assign(&prints(25), &amounts(), Overlap::Disjoint, &KEY).unwrap_err();
        assert_eq!(error, "the filter leaves 25 posts, the splits ask for gold 5, proxy 5, calibration 10, valid 20");
        let tiny = Amounts { gold: Amount::Fraction(0.01), ..Amounts::default() };
        assert_eq!(
            assign(&prints(25), &tiny, Overlap::Disjoint, &KEY).unwrap_err(),
            "split gold: 0.01 of 25 posts is none"
        );
    }

    #[test]
    fn amounts_are_read_and_written_back_alike() {
        for text in ["0", "2000", "0.25", "\"rest\"", "\"all\""] {
            let amount: Amount = serde_json::from_str(text).unwrap();
            assert_eq!(serde_json::to_string(&amount).unwrap(), text);
        }
        for text in ["1.5", "-1", "\"most\"", "0.0"] {
            assert!(serde_json::from_str::<Amount>(text).is_err(), "{text}");
        }
    }

    proptest! {
        #[test]
        fn splits_are_disjoint_and_do_not_depend_on_the_order_of_posts(n in 60u32..300, turn in 0usize..60, seed in any::<u8>()) {
            let mut posts = prints(n);
            let key = [seed; 32];
            let splits = assign(&posts, &amounts(), Overlap::Disjoint, &key).unwrap();
            let held_out = |held: &[Split]| held.iter().filter(|&&s| s != Split::Sft).count();
            prop_assert!(splits.iter().all(|held| held_out(held) == 1));
            prop_assert_eq!(count(&splits, Split::Valid), 20);
            prop_assert_eq!(count(&splits, Split::Sft), n as usize - 30);
            let by_post: HashMap<_, _> = posts.iter().copied().zip(splits).collect();
            posts.rotate_left(turn);
            let turned = assign(&posts, &amounts(), Overlap::Disjoint, &key).unwrap();
            prop_assert!(posts.iter().zip(&turned).all(|(post, held)| &by_post[post] == held));
        }
    }
}
