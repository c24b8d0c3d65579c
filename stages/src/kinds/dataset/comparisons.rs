//! `dataset.comparisons`: simulated labellers compare summaries of invented posts.

use engine::context::Context;
use engine::error::{Error, Result};
use engine::kind::{Kind, Signature};
use rand::Rng;
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha12Rng;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::corpus::cycle::{self, PostCycle};
use crate::corpus::quality::score;
use crate::corpus::{Facts, STYLES, partial_summary, summary};
use crate::corpus::{Sound, corrupt};
use crate::types::comparisons::{Comparison, Extra, Info, Summary};
use crate::types::{Comparisons, Corruption, Post, Posts, Split};

pub struct DatasetComparisons;

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Params {
    /// Number of comparisons; posts are reused if there are fewer posts.
    #[serde(default = "two_thousand")]
    pub comparisons: u64,
    /// The split to draw posts from; null: every post outside valid and calibration.
    #[serde(default = "gold")]
    pub split: Option<Split>,
    /// Number of labellers who share the work.
    #[serde(default = "five")]
    pub workers: u32,
    /// Probability that a labeller prefers the summary of lower true quality.
    #[serde(default = "tenth")]
    pub error_rate: f64,
}

fn two_thousand() -> u64 {
    2000
}

#[allow(clippy::unnecessary_wraps)] // Serde's default for the field's type.
fn gold() -> Option<Split> {
    Some(Split::Gold)
}

fn five() -> u32 {
    5
}

fn tenth() -> f64 {
    0.1
}

impl Kind for DatasetComparisons {
    type Params = Params;
    const NAME: &'static str = "dataset.comparisons";
    const VERSION: u32 = 1;
    const ABOUT: &'static str =
        "draws comparisons in Stiennon et al.'s schema, labelled by simulated people who err at a stated rate";

    fn signature(&self, _: &Params) -> Signature {
        Signature::producing(Comparisons::NAME).one("posts", &[Posts::NAME]).seeded()
    }

    fn check(&self, p: &Params) -> Vec<(String, String)> {
        let mut faults: Vec<(String, String)> = cycle::fault(p.split).into_iter().collect();
        let mut must = |holds: bool, field: &str, what: &str| {
            if !holds {
                faults.push((field.to_owned(), what.to_owned()));
            }
        };
        must(p.comparisons > 0, "comparisons", "must be at least 1");
        must(p.comparisons <= 1_000_000_000, "comparisons", "must be at most 1000000000");
        must(p.workers > 0, "workers", "must be at least 1");
        must((0.0..=0.5).contains(&p.error_rate), "error_rate", "must be in [0, 0.5]");
        faults
    }

    fn run(&self, p: Params, ctx: &mut Context) -> Result<()> {
        let mut posts = PostCycle::open(&ctx.one("posts")?.folder, p.split)?;
        let rng = ctx.generator("comparisons");
        let mut failure = None;
        let mut errors = 0_u64;
        let rows = (0..p.comparisons).map_while(|number| {
            let mut rng = rng.clone();
            rng.set_stream(number);
            let row = posts.next().and_then(|(_, post)| compare(post, number, &p, &mut rng));
            match row {
                Ok((row, erred)) => {
                    errors += u64::from(erred);
                    Some(row)
                }
                Err(e) => {
                    failure = Some(e);
                    None
                }
            }
        });
        let written = Comparisons::write(ctx.out(), rows)?;
        if let Some(e) = failure {
            return Err(e);
        }
        ctx.metric("comparisons", written as f64);
        ctx.metric("errors", errors as f64 / written as f64);
        Ok(())
    }
}

/// A summary and its source.
struct Candidate {
    policy: String,
    text: String,
    quality: f64,
}

/// Compares two summaries of `post` that differ in true quality; also returns whether the labeller erred.
fn compare(post: Post, number: u64, p: &Params, rng: &mut ChaCha12Rng) -> Result<(Comparison, bool)> {
    const A_BATCH: u64 = 100;
    let facts = post.facts.as_deref().ok_or_else(|| {
        Error::user(format!("post `{}` carries no facts, so nobody knows which summary is better", post.id))
            .help("simulated labellers need the posts of `dataset.tinytldr`")
    })?;
    let facts =
        Facts::parse(facts).map_err(|e| Error::user(format!("post `{}`: its facts do not parse: {e}", post.id)))?;
    let [a, b] = candidates(&post, &facts, rng);
    let gap = a.quality - b.quality;
    let erred = rng.random_bool(p.error_rate);
    let choice = usize::from((gap < 0.0) != erred);
    let worker = rng.random_range(0..p.workers);
    let said =
        |c: Candidate| Summary { text: format!(" {}", c.text), policy: Some(c.policy), note: Some(String::new()) };
    let row = Comparison {
        info: Info {
            id: post.id,
            post: Some(post.post),
            title: Some(post.title),
            subreddit: Some(post.subreddit),
            article: None,
        },
        summaries: vec![said(a), said(b)],
        choice,
        worker: Some(format!("simulated-{worker}")),
        batch: Some(format!("batch{}", number / A_BATCH)),
        split: Some("train".to_owned()),
        // Confidence from 1 to 9, growing with the difference in quality.
        extra: Some(Extra { confidence: Some(1.0 + (8.0 * gap.abs().min(1.0)).round()) }),
    };
    Ok((row, erred))
}

/// Two summaries that differ in true quality, in random order.
fn candidates(post: &Post, facts: &Facts, rng: &mut ChaCha12Rng) -> [Candidate; 2] {
    // A partial summary is always worse than the reference, so the loop ends.
    loop {
        let (a, b) = (candidate(post, facts, rng), candidate(post, facts, rng));
        if let (Some(a), Some(b)) = (a, b)
            && (a.quality - b.quality).abs() > 1e-9
        {
            return [a, b];
        }
    }
}

fn candidate(post: &Post, facts: &Facts, rng: &mut ChaCha12Rng) -> Option<Candidate> {
    // Policies and their weights. Half of the draws have all facts right, so that every kind of fault often meets a
    // sound summary.
    const POLICIES: [(&str, u32); 7] =
        [("ref", 6), ("restyled", 3), ("partial", 3), ("swap", 4), ("shuffle", 1), ("truncate", 1), ("repeat", 1)];
    let (policy, _) = POLICIES.choose_weighted(rng, |(_, weight)| *weight).expect("the weights are positive");
    let text = match *policy {
        "ref" => post.summary.clone(),
        "restyled" => {
            let style = rng.random_range(0..STYLES);
            summary(facts, style, rng)
        }
        "partial" => partial_summary(facts, rng),
        corruption => {
            let corruption: Corruption = corruption.parse().ok()?;
            let sound =
                Sound { text: &post.summary, ended: true, post: &post.post, facts: Some(facts), other_post: "" };
            corrupt(&sound, corruption, rng)?.0
        }
    };
    let quality = score(facts, &text, true).total;
    Some(Candidate { policy: (*policy).to_owned(), text, quality })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::corpus::examples;
    use crate::testing::{Bench, run_seeded};

    /// Comparisons of 300 posts without splits, and the bytes of their file.
    fn run(seed: u64, with: serde_json::Value) -> Result<(Vec<u8>, Vec<Comparison>)> {
        let mut bench = Bench::new();
        bench.input("posts", Posts::NAME, |folder| {
            let mut writer = Posts::create(folder)?;
            for (i, s) in (0..).zip(examples(300, 3)) {
                writer.push(s.into_post(format!("{i}"), Vec::new()))?;
            }
            writer.finish().map(drop)
        });
        let out = run_seeded(&DatasetComparisons, with, bench.inputs(), seed)?;
        let bytes = std::fs::read(out.path().join(Comparisons::FILE)).unwrap();
        Ok((bytes, Comparisons::open(&out.path())?.collect::<Result<_>>()?))
    }

    #[test]
    fn labellers_err_at_the_stated_rate_and_share_the_work() {
        let (_, rows) = run(1, serde_json::json!({"comparisons": 4000, "split": null, "error_rate": 0.2})).unwrap();
        assert_eq!(rows.len(), 4000);
        let posts = examples(300, 3);
        let mut workers: BTreeMap<String, (f64, f64)> = BTreeMap::new();
        for row in &rows {
            let facts = &posts[row.info.id.parse::<usize>().unwrap()].facts;
            let q: Vec<f64> = row.summaries.iter().map(|s| score(facts, &s.text, true).total).collect();
            let (n, errors) = workers.entry(row.worker.clone().unwrap()).or_default();
            *n += 1.0;
            *errors += f64::from(q[row.choice] < q[1 - row.choice]);
            assert!((1.0..=9.0).contains(&row.extra.as_ref().unwrap().confidence.unwrap()));
        }
        assert_eq!(workers.len(), 5);
        for (n, errors) in workers.values() {
            assert!(*n > 600.0 && (errors / n - 0.2).abs() < 0.06, "{workers:?}");
        }
        let first = rows.iter().filter(|r| r.choice == 0).count();
        assert!((1800..2200).contains(&first), "the place tells nothing: {first} of 4000");
    }

    #[test]
    fn the_same_seed_gives_the_same_bytes_and_every_fault_comes_up() {
        let params = serde_json::json!({"comparisons": 400, "split": null});
        let (bytes, rows) = run(1, params.clone()).unwrap();
        assert_eq!(bytes, run(1, params.clone()).unwrap().0);
        assert_ne!(bytes, run(2, params).unwrap().0);
        let policies: std::collections::BTreeSet<&str> =
            rows.iter().flat_map(|r| r.summaries.iter().filter_map(|s| s.policy.as_deref())).collect();
        assert_eq!(policies.len(), 7, "{policies:?}");
    }

    #[test]
    fn held_out_splits_are_refused_and_an_empty_one_is_told() {
        let params: Params = serde_json::from_str(r#"{"split": "valid", "error_rate": 0.7}"#).unwrap();
        let fields: Vec<String> = DatasetComparisons.check(&params).into_iter().map(|(field, _)| field).collect();
        assert_eq!(fields, ["split", "error_rate"]);
        let error = run(1, serde_json::json!({})).unwrap_err();
        assert_eq!(error.message, "no posts in split `gold`");
    }
}
