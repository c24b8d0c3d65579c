//! `annotate.reference`: labels pairs by the post's own summary (ROUGE) or by the facts of the post.

use std::collections::HashMap;
use std::path::Path;

use engine::context::Context;
use engine::error::{Error, Result};
use engine::estimate::Scaling;
use engine::kind::{Kind, Signature};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::corpus::quality::{self, Facts};
use crate::labels::{HeldOut, PreferenceWriter};
use crate::prompt::Parts;
use crate::random::draw;
use crate::text::clean::fingerprint;
use crate::text::rouge::Variant;
use crate::train::params::Faults;
use crate::types::{Outcome, Pair, Pairs, Posts, Preference, Preferences, Side};

pub struct Reference;

/// The measure by which pairs are judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum By {
    /// ROUGE F1 against the post's own summary; needs `posts`.
    Rouge,
    /// True quality; only for posts with facts.
    Facts,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Params {
    /// The measure by which pairs are judged.
    pub by: By,
    /// The kind of ROUGE, for `by: rouge`.
    #[serde(default)]
    pub variant: Variant,
    /// Probability of flipping a label. Absent: 0.05 for facts, 0 for ROUGE.
    #[serde(default)]
    pub error_rate: Option<f64>,
}

impl Params {
    fn error_rate(&self) -> f64 {
        self.error_rate.unwrap_or(match self.by {
            By::Facts => 0.05,
            By::Rouge => 0.0,
        })
    }
}

/// The reference summaries of posts.
struct References {
    by_id: HashMap<String, String>,
    /// Post ids by normalised text: pairs from another source may have other ids for the same posts.
    by_text: HashMap<[u8; 16], String>,
}

impl References {
    fn load(folder: &Path) -> Result<Self> {
        let (mut by_id, mut by_text) = (HashMap::new(), HashMap::new());
        for post in Posts::open(folder)? {
            let post = post?;
            by_text.insert(fingerprint(&post.post), post.id.clone());
            by_id.insert(post.id, post.summary);
        }
        Ok(Self { by_id, by_text })
    }

    fn of(&self, pair: &Pair) -> Option<&String> {
        self.by_id.get(&pair.post_id).or_else(|| {
            let parts = Parts::parse(&pair.prompt)?;
            self.by_id.get(self.by_text.get(&fingerprint(parts.post))?)
        })
    }
}

/// Computes the quality of each side of a pair.
enum Judge {
    Rouge { variant: Variant, references: References },
    Facts,
}

impl Judge {
    fn scores(&self, pair: &Pair) -> Result<[f64; 2]> {
        match self {
            Self::Rouge { variant, references } => {
                let reference = references.of(pair).ok_or_else(|| {
                    Error::user(format!("pair `{}`: its post `{}` is not among `posts`", pair.id, pair.post_id))
                        .help("give the posts that the pairs were made from")
                })?;
                Ok([&pair.a_text, &pair.b_text].map(|text| variant.f1(text, reference)))
            }
            Self::Facts => {
                let facts = pair.facts.as_deref().ok_or_else(|| {
                    Error::user(format!("pair `{}`: its post `{}` carries no facts to judge by", pair.id, pair.post_id))
                        .help("only posts of `dataset.tinytldr` do; use `by: rouge` for others")
                })?;
                let facts: Facts = Facts::parse(facts)
                    .map_err(|e| Error::user(format!("pair `{}`: its facts cannot be read: {e}", pair.id)))?;
                let sides = [(&pair.a_text, pair.a_ended), (&pair.b_text, pair.b_ended)];
                Ok(sides.map(|(text, ended)| quality::score(&facts, text, ended).total))
            }
        }
    }
}

impl Kind for Reference {
    type Params = Params;

    const NAME: &'static str = "annotate.reference";
    const VERSION: u32 = 3;
    const ABOUT: &'static str = "judges pairs by the post's own summary or by the facts behind it";

    fn signature(&self, params: &Params) -> Signature {
        let signature = Signature::producing(Preferences::NAME).many("pairs", &[Pairs::NAME]);
        let signature = match params.by {
            By::Rouge => signature.one("posts", &[Posts::NAME]),
            By::Facts => signature.optional("posts", &[Posts::NAME]),
        };
        signature.optional("exclude", &[Posts::NAME]).seeded()
    }

    fn check(&self, params: &Params) -> Vec<(String, String)> {
        let mut faults = Faults::default();
        let rate = params.error_rate.unwrap_or_default();
        faults.must((0.0..0.5).contains(&rate), "error_rate", "expected at least 0 and below 0.5");
        // The default value cannot be distinguished from an absent one.
        let unused = params.by == By::Facts && params.variant != Variant::default();
        faults.must(!unused, "variant", "is for `by: rouge`: facts know no variant");
        faults.0
    }

    fn scaling(&self, _: &Params, size: &dyn Fn(&str) -> Option<f64>) -> Option<Scaling> {
        let pairs = size("pairs")?;
        Some(Scaling::new(pairs, pairs))
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        let (judge, annotator) = match params.by {
            By::Facts => (Judge::Facts, "facts".to_owned()),
            By::Rouge => {
                let references = References::load(&ctx.one("posts")?.folder)?;
                (Judge::Rouge { variant: params.variant, references }, params.variant.as_str().to_owned())
            }
        };
        let errors = ctx.generator_key("errors");
        let mut held_out = HeldOut::of(ctx)?;
        let mut judged = PreferenceWriter::create(ctx.out())?;
        let mut flipped = 0_u64;
        for input in ctx.many("pairs") {
            for pair in Pairs::open(&input.folder)? {
                let pair = pair?;
                if held_out.holds(&pair.post_id, Parts::parse(&pair.prompt).map_or("", |parts| parts.post)) {
                    continue;
                }
                let [a, b] = judge.scores(&pair)?;
                let wrong = draw(&errors, &[&pair.id, &pair.a_text, &pair.b_text]) < params.error_rate();
                // Smaller differences are rounding errors.
                let (chosen, outcome) = if (a - b).abs() < 1e-9 {
                    (Side::A, Outcome::Tie)
                } else {
                    flipped += u64::from(wrong);
                    (if (a > b) != wrong { Side::A } else { Side::B }, Outcome::Labelled)
                };
                judged.push(Preference::of(pair, chosen, outcome, &annotator))?;
            }
        }
        ctx.metric("turned_round", flipped as f64);
        ctx.metric("held_out_dropped", held_out.dropped as f64);
        judged.finish(ctx)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::testing::{Bench, run};
    use crate::types::{Post, Split};

    fn pair(id: usize, a: &str, b: &str) -> Pair {
        Pair {
            id: format!("pair {id}"),
            post_id: format!("post {}", id % 3),
            prompt: "Subreddit: r/x\nTITLE: t\nPOST: p\nTL;DR:".into(),
            prompt_ids: vec![1],
            facts: None,
            a_model: "s".into(),
            a_text: a.into(),
            a_ids: vec![2, 0],
            a_ended: true,
            b_model: "m".into(),
            b_text: b.into(),
            b_ids: vec![3],
            b_ended: false,
            corruption: None,
            corrupted: None,
        }
    }

    fn bench(pairs: Vec<Pair>) -> Bench {
        let mut bench = Bench::new();
        bench.input("pairs", "Pairs", |folder| crate::table::write(&folder.join(Pairs::FILE), pairs).map(drop));
        let post = |i: usize| Post {
            id: format!("post {i}"),
            subreddit: "x".into(),
            title: "t".into(),
            post: format!("p {i}"),
            summary: "my cat ate the cake".into(),
            splits: if i == 2 { vec![Split::Valid] } else { vec![] },
            facts: None,
        };
        let posts: Vec<Post> = (0..3).map(post).collect();
        for port in ["posts", "exclude"] {
            bench
                .input(port, "Posts", |folder| crate::table::write(&folder.join(Posts::FILE), posts.clone()).map(drop));
        }
        bench
    }

    fn judge(bench: &Bench, with: serde_json::Value) -> Result<Vec<Preference>> {
        let out = run(&Reference, with, bench.inputs())?;
        crate::types::Preferences::open(&out.path())?.collect()
    }

    #[test]
    fn the_summary_nearer_to_the_posts_own_is_chosen_and_held_out_posts_are_dropped() {
        let bench =
            bench(vec![pair(0, "a dog", "the cat ate cake"), pair(1, "cake", "cake"), pair(2, "my cat", "a dog")]);
        let rows = judge(&bench, json!({ "by": "rouge" })).unwrap();
        assert_eq!(rows.len(), 2);
        assert_eq!((rows[0].chosen_text.as_str(), rows[0].outcome), ("the cat ate cake", Outcome::Labelled));
        assert_eq!(rows[0].chosen_ids.as_deref(), Some(&[3][..]));
        assert!(!rows[0].chosen_ended && rows[0].rejected_ended);
        assert_eq!(rows[1].outcome, Outcome::Tie);
        assert_eq!(rows[0].annotator, "rougeL");
    }

    #[test]
    fn a_post_that_pairs_know_by_another_id_is_found_by_its_text() {
        let other = |id: &str, post: &str| Pair {
            post_id: id.into(),
            prompt: format!("Subreddit: r/x\nTITLE: t\nPOST: {post}\nTL;DR:"),
            ..pair(0, "a dog", "the cat ate cake")
        };
        let rows = judge(&bench(vec![other("elsewhere", "P, 0!")]), json!({ "by": "rouge" })).unwrap();
        assert_eq!(rows[0].chosen_text, "the cat ate cake");
        let error = judge(&bench(vec![other("elsewhere", "q")]), json!({ "by": "rouge" })).unwrap_err();
        assert_eq!(error.message, "pair `pair 0`: its post `elsewhere` is not among `posts`");
    }

    #[test]
    fn pairs_without_facts_are_refused_by_facts_and_ties_alone_are_an_error() {
        let error = judge(&bench(vec![pair(0, "a", "b")]), json!({ "by": "facts" })).unwrap_err();
        assert_eq!(error.message, "pair `pair 0`: its post `post 0` carries no facts to judge by");
        let error = judge(&bench(vec![pair(0, "a", "b")]), json!({ "by": "facts", "variant": "rouge1" })).unwrap_err();
        assert!(error.message.contains("is for `by: rouge`"), "{error}");
        let error = judge(&bench(vec![pair(0, "same", "same")]), json!({ "by": "rouge" })).unwrap_err();
        assert_eq!(error.message, "no preference can be learned from these judgements, 1 rows: 1 tie");
        assert_eq!(error.exit_code(), 2);
    }

    #[test]
    fn facts_decide_but_for_the_stated_share_of_errors() {
        let situations = crate::corpus::examples(400, 5);
        let pairs = situations.iter().enumerate().map(|(i, situation)| Pair {
            facts: Some(situation.facts.to_json()),
            ..pair(3 * i, &situation.summary, "nothing of it")
        });
        let bench = bench(pairs.collect());
        let right = |rate: f64| {
            let rows = judge(&bench, json!({ "by": "facts", "error_rate": rate })).unwrap();
            rows.iter().filter(|row| row.rejected_text == "nothing of it").count()
        };
        assert_eq!(right(0.0), 400);
        assert!((340..=380).contains(&right(0.1)), "{}", right(0.1));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(16))]
        #[test]
        fn labels_do_not_depend_on_the_order_of_rows(turn in 0usize..40) {
            let mut pairs: Vec<Pair> = (0..60).map(|i| pair(3 * i, &format!("cat {i}"), "ate the cake")).collect();
            let with = json!({ "by": "rouge", "error_rate": 0.3 });
            let mut straight = judge(&bench(pairs.clone()), with.clone()).unwrap();
            pairs.rotate_left(turn);
            let mut turned = judge(&bench(pairs), with).unwrap();
            for rows in [&mut straight, &mut turned] {
                rows.sort_by(|a, b| a.id.cmp(&b.id));
            }
            prop_assert_eq!(straight, turned);
        }
    }
}
