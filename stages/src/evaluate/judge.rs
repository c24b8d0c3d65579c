//! Scores each held-out sample by the gold model and by its post's facts. Knows no step.

use std::collections::BTreeMap;

use engine::context::Context;
use engine::error::{Error, Result};
use lm::Sequence;

use crate::prompt::Truncation;
use crate::quality::{self, Facts};
use crate::reward::{load_reward_model, load_tokenizer, score};
use crate::types::{PolicyInfo, Post, Posts, RewardInfo, RewardModel, Sample, Score, Split};

const BATCH: usize = 64;

/// The held-out posts by id.
pub fn posts(ctx: &Context) -> Result<BTreeMap<String, Post>> {
    let rows = Posts::load_split(&ctx.one("posts")?.folder, Split::Valid)?;
    Ok(rows.into_iter().map(|post| (post.id.clone(), post)).collect())
}

/// What the gold model says of itself.
pub fn gold_about(ctx: &Context) -> Result<RewardInfo> {
    RewardModel::info(&ctx.one("gold")?.folder)
}

/// One row per sample, in the samples' order.
///
/// # Errors
/// When a sample's post is not among the posts: the run was made on others.
pub fn judge(samples: &[Sample], policy: &PolicyInfo, ctx: &mut Context) -> Result<Vec<Score>> {
    let folder = ctx.one("gold")?.folder.clone();
    let gold = load_reward_model(&folder)?;
    let tokenizer = load_tokenizer(&folder)?;
    let same_ids = policy.more.get("tokenizer_digest")
        == Some(&serde_json::json!(crate::rl::tokenizer_digest(&folder.join("base"))?));
    let posts = posts(ctx)?;
    let longest = samples.iter().map(|s| s.ids.len()).max().unwrap_or(0);
    let window = gold.model.lm.config().window().saturating_sub(longest);

    let mut prompts: BTreeMap<&str, Vec<u32>> = BTreeMap::new();
    let mut facts: BTreeMap<&str, Option<Facts>> = BTreeMap::new();
    let mut truncation = Truncation::default();
    for sample in samples {
        if prompts.contains_key(sample.post_id.as_str()) {
            continue;
        }
        let post = posts.get(&sample.post_id).ok_or_else(|| {
            Error::yours(format!(
                "evaluate: the samples' post `{}` is not in split `valid` of the posts",
                sample.post_id
            ))
            .help("give `posts` the table that the policy run was made with")
        })?;
        let fitted = crate::train::encode::fit(&tokenizer, post, window)?;
        truncation.count(fitted.truncated);
        prompts.insert(&sample.post_id, fitted.ids);
        let parsed = post
            .facts
            .as_deref()
            .map(serde_json::from_str)
            .transpose()
            .map_err(|e| Error::yours(format!("evaluate: the facts of post `{}` do not parse: {e}", post.id)))?;
        facts.insert(&sample.post_id, parsed);
    }

    truncation.warn(ctx, "prompts as the gold model reads them");

    let mut rows = Vec::with_capacity(samples.len());
    for chunk in samples.chunks(BATCH * 8) {
        let sequences: Vec<Sequence> = chunk
            .iter()
            .map(|s| Sequence {
                prompt: prompts[s.post_id.as_str()].clone(),
                response: if same_ids {
                    s.ids.clone()
                } else {
                    crate::prompt::response_ids(&tokenizer, &s.text, s.ended)
                },
            })
            .collect();
        let by_ref: Vec<&Sequence> = sequences.iter().collect();
        let golds = score(&gold, &by_ref, BATCH)?;
        for (sample, gold) in chunk.iter().zip(golds) {
            let quality =
                facts[sample.post_id.as_str()].as_ref().map(|f| quality::score(f, &sample.text, sample.ended));
            rows.push(Score {
                step: sample.step,
                post_id: sample.post_id.clone(),
                half: sample.half,
                greedy: sample.greedy,
                gold: f64::from(gold),
                proxy: sample.proxy,
                mean: sample.mean,
                variance: sample.variance,
                kl: sample.logp - sample.logp_ref,
                kl_exact: sample.kl_exact,
                scores: sample.scores.clone(),
                length: sample.ids.len() as i64,
                ended: sample.ended,
                quality: quality.as_ref().map(|q| q.total),
                coverage: quality.as_ref().map(|q| q.coverage),
                invented: quality.as_ref().map(|q| q.invented),
                fluency: quality.as_ref().map(|q| q.fluency),
            });
        }
        ctx.progress(rows.len() as u64, samples.len() as u64, "samples", None);
    }
    Ok(rows)
}
