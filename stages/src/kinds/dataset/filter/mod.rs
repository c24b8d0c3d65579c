//! `dataset.filter`: filters posts and assigns them to splits.

mod splits;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};

use engine::context::Context;
use engine::error::{Error, Result};
use engine::estimate::Scaling;
use engine::kind::{Kind, Signature};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use self::splits::{Amount, Amounts, Overlap, assign};
use crate::prompt::response_ids;
use crate::text::clean::{fingerprint, normalised};
use crate::text::minhash::NearDuplicates;
use crate::types::{Post, Posts, Split, Tokenizer};

/// The subreddits that Stiennon et al. (2020, appendix A) kept as understandable to the general population.
pub const GENERAL: [&str; 29] = [
    "relationships",
    "AskReddit",
    "relationship_advice",
    "tifu",
    "dating_advice",
    "personalfinance",
    "Advice",
    "legaladvice",
    "offmychest",
    "loseit",
    "jobs",
    "self",
    "BreakUps",
    "askwomenadvice",
    "dogs",
    "running",
    "pettyrevenge",
    "needadvice",
    "travel",
    "Parenting",
    "weddingplanning",
    "Pets",
    "Dogtraining",
    "cats",
    "AskDocs",
    "college",
    "GetMotivated",
    "books",
    "Cooking",
];

pub struct Filter;

/// Selection of subreddits.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Subreddits {
    #[default]
    All,
    /// The subreddits of [`GENERAL`].
    General,
    /// These subreddits, with or without `r/`, in any case.
    Only(Vec<String>),
}

impl Serialize for Subreddits {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::All => s.serialize_str("all"),
            Self::General => s.serialize_str("general"),
            Self::Only(names) => names.serialize(s),
        }
    }
}

impl<'de> Deserialize<'de> for Subreddits {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected `all`, `general` or a list of subreddits")]
        enum Raw {
            Word(String),
            Names(Vec<String>),
        }
        match Raw::deserialize(d)? {
            Raw::Names(names) => Ok(Self::Only(names)),
            Raw::Word(word) if word == "all" => Ok(Self::All),
            Raw::Word(word) if word == "general" => Ok(Self::General),
            Raw::Word(word) => {
                Err(serde::de::Error::custom(format!("`{word}`: expected `all`, `general` or a list of subreddits")))
            }
        }
    }
}

impl JsonSchema for Subreddits {
    fn schema_name() -> Cow<'static, str> {
        "Subreddits".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schemars::json_schema!({ "anyOf": [
            { "enum": ["all", "general"] },
            { "type": "array", "items": { "type": "string" }, "minItems": 1 }
        ] })
    }
}

impl Subreddits {
    fn allowed(&self) -> Option<HashSet<String>> {
        let bare = |name: &str| bare(name);
        match self {
            Self::All => None,
            Self::General => Some(GENERAL.iter().map(|name| bare(name)).collect()),
            Self::Only(names) => Some(names.iter().map(|name| bare(name)).collect()),
        }
    }
}

fn bare(subreddit: &str) -> String {
    let lower = subreddit.trim().to_lowercase();
    lower.strip_prefix("r/").map(str::to_owned).unwrap_or(lower)
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Near {
    /// Minimum Jaccard similarity of the five-word shingles of two posts for the later one to be dropped.
    pub threshold: f64,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Minimum and maximum length of a summary in tokens, inclusive. In the paper: [20, 48].
    pub summary_tokens: Option<[u32; 2]>,
    /// `all`, `general` (the 29 of Stiennon et al. 2020) or a list of subreddits.
    pub subreddits: Subreddits,
    /// `{threshold}`: also drop near-duplicates of earlier posts.
    pub near_duplicates: Option<Near>,
    /// Whether a post may be in several splits.
    pub overlap: Overlap,
    /// Posts held out for evaluation: a count, or a fraction of the remaining posts.
    pub validation: Amount,
    /// Posts for centring the rewards of reward models.
    pub calibration: Amount,
    /// Posts for the first set of pairs (`gold`).
    pub gold: Amount,
    /// Posts for the second set of pairs (`proxy`).
    pub proxy: Amount,
    /// Prompts for reinforcement learning; with `overlap: paper` drawn from `proxy` (`all`: all of them).
    pub rl: Amount,
    /// Posts for fine-tuning: `all` except the held-out posts, the `rest` that no other split takes, or an amount.
    pub sft: Amount,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            summary_tokens: None,
            subreddits: Subreddits::All,
            near_duplicates: None,
            overlap: Overlap::Disjoint,
            validation: Amount::Fraction(0.1),
            calibration: Amount::Fraction(0.05),
            gold: Amount::Fraction(0.25),
            proxy: Amount::Fraction(0.25),
            rl: Amount::Rest,
            sft: Amount::All,
        }
    }
}

/// Number of posts dropped by each rule, in the order of the rules.
#[derive(Default)]
struct Dropped {
    subreddit: u64,
    summary_short: u64,
    summary_long: u64,
    repeated_id: u64,
    duplicate: u64,
    near_duplicate: u64,
}

impl Dropped {
    fn each(&self) -> [(&'static str, u64); 6] {
        [
            ("dropped_subreddit", self.subreddit),
            ("dropped_summary_short", self.summary_short),
            ("dropped_summary_long", self.summary_long),
            ("dropped_repeated_id", self.repeated_id),
            ("dropped_duplicate", self.duplicate),
            ("dropped_near_duplicate", self.near_duplicate),
        ]
    }
}

/// The filter rules and their state from earlier posts.
struct Rules<'a> {
    tokenizer: &'a lm::Tokenizer,
    summary_tokens: Option<[u32; 2]>,
    subreddits: Option<HashSet<String>>,
    near: Option<NearDuplicates>,
    seen: HashSet<[u8; 16]>,
    ids: HashSet<[u8; 16]>,
    dropped: Dropped,
}

impl Rules<'_> {
    /// The fingerprint of a post that passes all rules.
    fn keep(&mut self, post: &Post) -> Option<[u8; 16]> {
        let dropped = self.dropped_by(post);
        match dropped {
            Some(count) => {
                *count += 1;
                None
            }
            None => Some(fingerprint(&post.post)),
        }
    }

    fn dropped_by(&mut self, post: &Post) -> Option<&mut u64> {
        let dropped = &mut self.dropped;
        if self.subreddits.as_ref().is_some_and(|allowed| !allowed.contains(&bare(&post.subreddit))) {
            return Some(&mut dropped.subreddit);
        }
        if let Some([least, greatest]) = self.summary_tokens {
            let tokens = response_ids(self.tokenizer, &post.summary, false).len();
            if tokens < least as usize {
                return Some(&mut dropped.summary_short);
            }
            if tokens > greatest as usize {
                return Some(&mut dropped.summary_long);
            }
        }
        if !self.seen.insert(fingerprint(&post.post)) {
            return Some(&mut dropped.duplicate);
        }
        let mut id = [0; 16];
        id.copy_from_slice(&blake3::hash(post.id.as_bytes()).as_bytes()[..16]);
        if !self.ids.insert(id) {
            return Some(&mut dropped.repeated_id);
        }
        if self.near.as_mut().is_some_and(|near| near.is_near(&normalised(&post.post))) {
            return Some(&mut dropped.near_duplicate);
        }
        None
    }
}

impl Kind for Filter {
    type Params = Params;

    const NAME: &'static str = "dataset.filter";
    const VERSION: u32 = 1;
    const ABOUT: &'static str = "drops unfit and duplicate posts and splits the rest";

    fn signature(&self, _: &Params) -> Signature {
        Signature::producing(Posts::NAME).one("posts", &[Posts::NAME]).one("tokenizer", &[Tokenizer::NAME]).seeded()
    }

    fn check(&self, params: &Params) -> Vec<(String, String)> {
        let mut faults = Vec::new();
        let mut fault = |field: &str, what: &str| faults.push((field.to_owned(), what.to_owned()));
        if params.summary_tokens.is_some_and(|[least, greatest]| least > greatest) {
            fault("summary_tokens", "the least is above the greatest");
        }
        if params.near_duplicates.is_some_and(|near| !(near.threshold > 0.0 && near.threshold <= 1.0)) {
            fault("near_duplicates.threshold", "expected a number above 0, at most 1");
        }
        if params.subreddits == Subreddits::Only(Vec::new()) {
            fault("subreddits", "an empty list leaves no posts");
        }
        let split = [
            ("validation", params.validation),
            ("calibration", params.calibration),
            ("gold", params.gold),
            ("proxy", params.proxy),
            ("rl", params.rl),
        ];
        let all = |(name, amount)| amount == Amount::All && !(name == "rl" && params.overlap == Overlap::Paper);
        if let Some((name, _)) = split.into_iter().find(|&s| all(s)) {
            fault(name, "`all` is for sft: expected a count, a fraction or `rest`");
        }
        let rests: Vec<&str> =
            split.iter().filter(|(_, amount)| *amount == Amount::Rest).map(|(name, _)| *name).collect();
        if params.overlap == Overlap::Paper && rests.iter().any(|&name| name != "rl") {
            fault(rests[0], "draws that overlap leave no rest: expected a count or a fraction");
        } else if rests.len() > 1 {
            fault(rests[1], &format!("`{}` takes the rest already", rests[0]));
        } else if params.overlap == Overlap::Disjoint && rests.len() == 1 && params.sft == Amount::Rest {
            fault("sft", &format!("`{}` takes the rest already", rests[0]));
        }
        faults
    }

    fn scaling(&self, _: &Params, size: &dyn Fn(&str) -> Option<f64>) -> Option<Scaling> {
        let posts = size("posts")?;
        Some(Scaling::new(posts, posts))
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        let folder = ctx.one("posts")?.folder.clone();
        let path = ctx.one("tokenizer")?.folder.join(Tokenizer::FILE);
        let tokenizer = lm::Tokenizer::load(&path).map_err(|e| Error::user(e.to_string()))?;
        let mut rules = Rules {
            tokenizer: &tokenizer,
            summary_tokens: params.summary_tokens,
            subreddits: params.subreddits.allowed(),
            near: params.near_duplicates.map(|near| NearDuplicates::new(near.threshold)),
            seen: HashSet::new(),
            ids: HashSet::new(),
            dropped: Dropped::default(),
        };
        // Reads the table twice: splits can be assigned only once the remaining posts are known, and the texts need not
        // fit into memory.
        let posts = Posts::open(&folder)?;
        let read = posts.rows();
        let mut stays = Vec::with_capacity(read as usize);
        let mut fingerprints = Vec::new();
        for post in posts {
            let print = rules.keep(&post?);
            stays.push(print.is_some());
            fingerprints.extend(print);
            if stays.len() % 4096 == 0 {
                ctx.progress(stays.len() as u64, read, "posts", None);
            }
        }
        let counts = rules.dropped.each();
        let told = || {
            let rules =
                counts.iter().filter(|(_, n)| *n > 0).map(|(rule, n)| format!("{} {n}", rule.replace('_', " ")));
            let list = rules.collect::<Vec<_>>().join(", ");
            format!("{read} read{}{list}", if list.is_empty() { "" } else { ", " })
        };
        if fingerprints.is_empty() {
            return Err(Error::user(format!("the filter leaves no posts: {}", told()))
                .help("widen `summary_tokens` or `subreddits`, or give more posts"));
        }
        let amounts = Amounts {
            valid: params.validation,
            calibration: params.calibration,
            gold: params.gold,
            proxy: params.proxy,
            rl: params.rl,
            sft: params.sft,
        };
        let splits = assign(&fingerprints, &amounts, params.overlap, &ctx.generator_key("splits"))
            .map_err(|what| Error::user(format!("{what} ({})", told())).help("ask for fewer, or give more posts"))?;

        let mut sizes: BTreeMap<Split, u64> = BTreeMap::new();
        splits.iter().flatten().for_each(|&split| *sizes.entry(split).or_default() += 1);
        let mut splits = splits.into_iter();
        let mut writer = Posts::create(ctx.out())?;
        for (post, stays) in Posts::open(&folder)?.zip(stays) {
            if stays {
                // One entry of `splits` per remaining post.
                writer.push(Post { splits: splits.next().unwrap_or_default(), ..post? })?;
            }
        }
        let kept = writer.finish()?;
        ctx.metric("read", read as f64);
        ctx.metric("kept", kept as f64);
        for (rule, n) in counts {
            ctx.metric(rule, n as f64);
        }
        for &split in Split::ALL {
            ctx.metric(format!("split_{split}"), sizes.get(&split).copied().unwrap_or(0) as f64);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use engine::context::Input;
    use serde_json::json;

    use super::*;
    use crate::testing::{Bench, Out, run};

    fn post(i: usize) -> Post {
        Post {
            id: format!("p{i}"),
            subreddit: if i.is_multiple_of(3) { "r/tifu".into() } else { "gaming".into() },
            title: String::new(),
            post: format!("this is the post with number {i} and it has a few words"),
            summary: vec!["word"; 1 + i % 5].join(" "),
            splits: vec![],
            facts: None,
        }
    }

    fn bench(posts: Vec<Post>) -> Bench {
        let mut bench = Bench::new();
        bench.input("posts", "Posts", |folder| crate::table::write(&folder.join(Posts::FILE), posts).map(drop));
        bench.input("tokenizer", "Tokenizer", |folder| {
            let tokenizer = lm::Tokenizer::train_bpe(["word word word"].into_iter(), 300).unwrap();
            tokenizer.save(&folder.join(Tokenizer::FILE)).map_err(|e| Error::internal(e.to_string()))
        });
        bench
    }

    fn filtered(inputs: BTreeMap<String, Vec<Input>>, with: serde_json::Value) -> Result<(Vec<Post>, Out)> {
        let out = run(&Filter, with, inputs)?;
        Ok((Posts::open(&out.path())?.collect::<Result<_>>()?, out))
    }

    #[test]
    fn every_rule_says_how_many_it_dropped() {
        let mut posts: Vec<Post> = (0..100).map(post).collect();
        posts.push(Post {
            id: "again".into(),
            post: "THIS is the post, with number 3 and it has a few words!".into(),
            ..post(3)
        });
        posts.push(Post { post: "another text altogether, nothing like the others".into(), ..post(3) });
        let with = json!({ "summary_tokens": [2, 4], "subreddits": ["tifu"], "gold": 5, "proxy": 5, "validation": 3, "calibration": 2 });
        let (kept, out) = filtered(bench(posts).inputs(), with).unwrap();
        assert_eq!(out.metric("read"), 102.0);
        assert_eq!(out.metric("dropped_subreddit"), 66.0);
        assert_eq!(out.metric("dropped_summary_short"), 7.0);
        assert_eq!(out.metric("dropped_summary_long"), 7.0);
        assert_eq!(out.metric("dropped_duplicate"), 1.0);
        assert_eq!(out.metric("dropped_repeated_id"), 1.0);
        assert_eq!(out.metric("kept"), kept.len() as f64);
        assert_eq!(kept.len(), 20);
        assert_eq!(out.metric("split_valid"), 3.0);
        assert_eq!(out.metric("split_rl"), 5.0);
        assert_eq!(out.metric("split_sft"), 15.0);
    }

    #[test]
    fn a_filter_that_leaves_nothing_or_too_little_is_an_error_with_the_counts() {
        let bench = bench((0..10).map(post).collect());
        let error = filtered(bench.inputs(), json!({ "summary_tokens": [20, 48] })).map(drop).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert_eq!(error.message, "the filter leaves no posts: 10 read, dropped summary short 10");
        let error = filtered(bench.inputs(), json!({ "validation": 8, "gold": 8 })).map(drop).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.message.starts_with("the filter leaves 10 posts, the splits ask for gold 8"), "{error}");
    }

    #[test]
    fn filtering_twice_is_filtering_once() {
        let with = json!({ "summary_tokens": [2, 4], "near_duplicates": { "threshold": 0.9 } });
        let first = bench((0..100).map(post).collect());
        let (once, _) = filtered(first.inputs(), with.clone()).unwrap();
        let again = bench(once.clone());
        let (twice, out) = filtered(again.inputs(), with).unwrap();
        assert_eq!(once, twice);
        assert_eq!(out.metric("kept"), out.metric("read"));
    }

    #[test]
    fn splits_that_contradict_each_other_are_found_at_planning() {
        let faults = |with: serde_json::Value| {
            let kind: &dyn engine::kind::AnyKind = &Filter;
            kind.normalise(&with).err().map_or(String::new(), |faults| faults[0].0.clone())
        };
        assert_eq!(faults(json!({})), "");
        assert_eq!(faults(json!({ "gold": "rest" })), "rl");
        assert_eq!(faults(json!({ "gold": "all" })), "gold");
        assert_eq!(faults(json!({ "sft": "rest" })), "sft");
        assert_eq!(faults(json!({ "overlap": "paper", "rl": "all", "gold": 9, "proxy": 9 })), "");
        assert_eq!(faults(json!({ "summary_tokens": [9, 3] })), "summary_tokens");
    }
}
