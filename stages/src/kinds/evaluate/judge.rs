//! Scores each held-out sample with the gold model and with its post's facts.

use std::collections::BTreeMap;

use engine::context::Context;
use engine::error::{Error, Result};
use lm::Sequence;

use crate::corpus::quality::{self, Facts};
use crate::prompt::Truncation;
use crate::reward::{LoadedReward, load_reward_model, load_tokenizer, score};
use crate::types::reward::BASE;
use crate::types::{PolicyInfo, Post, Posts, RewardInfo, RewardModel, Sample, Score, Split};

pub const BATCH: usize = 64;

/// The posts of a split by id.
pub fn posts(ctx: &Context, split: Split) -> Result<BTreeMap<String, Post>> {
    let rows = Posts::load_split(&ctx.one("posts")?.folder, split)?;
    Ok(rows.into_iter().map(|post| (post.id.clone(), post)).collect())
}

/// The gold model's `reward.json`.
pub fn gold_about(ctx: &Context) -> Result<RewardInfo> {
    RewardModel::info(&ctx.one("gold")?.folder)
}

/// One row per sample of a policy run, in sample order.
///
/// # Errors
/// If a sample's post is missing from port `posts`: the run used another table.
pub fn judge(samples: &[Sample], policy: &PolicyInfo, ctx: &mut Context) -> Result<Vec<Score>> {
    let digest = policy.more.get("tokenizer_digest").and_then(|digest| digest.as_str());
    let longest = samples.iter().map(|s| s.ids.len()).max().unwrap_or(0);
    let mut judge = Judge::new(ctx, Split::Valid, digest, longest)?;
    let mut rows = Vec::with_capacity(samples.len());
    for chunk in samples.chunks(CHUNK) {
        rows.extend(judge.scores(chunk)?);
        ctx.progress(rows.len() as u64, samples.len() as u64, "samples", None);
    }
    judge.warn(ctx);
    Ok(rows)
}

/// Recommended number of samples per call of [`Judge::scores`].
pub const CHUNK: usize = BATCH * 8;

/// The gold model and the posts that the samples answer.
pub struct Judge {
    gold: LoadedReward,
    tokenizer: lm::Tokenizer,
    /// Whether the samples' ids come from the gold model's tokenizer.
    same_ids: bool,
    /// Maximum number of prompt tokens.
    window: usize,
    posts: BTreeMap<String, Post>,
    /// By post id: the prompt encoded for the gold model, and the facts.
    known: BTreeMap<String, (Vec<u32>, Option<Facts>)>,
    truncation: Truncation,
    split: Split,
}

impl Judge {
    /// A judge for samples that answer posts of `split`, with at most `longest` tokens of the tokenizer with this
    /// digest.
    pub fn new(ctx: &Context, split: Split, tokenizer_digest: Option<&str>, longest: usize) -> Result<Self> {
        let folder = &ctx.one("gold")?.folder;
        let gold = load_reward_model(folder)?;
        let own = crate::model::tokenizer_digest(&folder.join(BASE))?.to_string();
        Ok(Self {
            tokenizer: load_tokenizer(folder)?,
            same_ids: tokenizer_digest == Some(own.as_str()),
            window: gold.model.lm.config().window().saturating_sub(longest),
            gold,
            posts: posts(ctx, split)?,
            known: BTreeMap::new(),
            truncation: Truncation::default(),
            split,
        })
    }

    /// The posts of the split by id.
    pub fn posts(&self) -> &BTreeMap<String, Post> {
        &self.posts
    }

    /// Warns of prompts that were truncated for the gold model.
    pub fn warn(&self, ctx: &mut Context) {
        self.truncation.warn(ctx, "prompts as the gold model reads them");
    }

    /// One row per sample, in sample order.
    ///
    /// # Errors
    /// If a sample's post is not among the posts: the samples answer other posts.
    pub fn scores(&mut self, samples: &[Sample]) -> Result<Vec<Score>> {
        for sample in samples {
            self.learn(&sample.post_id)?;
        }
        let sequence = |s: &Sample| Sequence {
            prompt: self.known[&s.post_id].0.clone(),
            response: if self.same_ids {
                s.ids.clone()
            } else {
                crate::prompt::response_ids(&self.tokenizer, &s.text, s.ended)
            },
        };
        let sequences: Vec<Sequence> = samples.iter().map(sequence).collect();
        let golds = score(&self.gold, &sequences.iter().collect::<Vec<_>>(), BATCH)?;
        let rows = samples.iter().zip(golds).map(|(sample, gold)| {
            let facts = self.known[&sample.post_id].1.as_ref();
            let quality = facts.map(|f| quality::score(f, &sample.text, sample.ended));
            Score {
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
            }
        });
        Ok(rows.collect())
    }

    /// Encodes a post's prompt and parses its facts, once.
    fn learn(&mut self, post_id: &str) -> Result<()> {
        if self.known.contains_key(post_id) {
            return Ok(());
        }
        let split = self.split;
        let post = self.posts.get(post_id).ok_or_else(|| {
            Error::user(format!("evaluate: the samples' post `{post_id}` is not in split `{split}` of the posts"))
                .help("give `posts` the table that the samples were drawn with")
        })?;
        let fitted = crate::train::encode::fit(&self.tokenizer, post, self.window)?;
        self.truncation.count(fitted.truncated);
        let facts = post
            .facts
            .as_deref()
            .map(serde_json::from_str)
            .transpose()
            .map_err(|e| Error::user(format!("evaluate: the facts of post `{}` do not parse: {e}", post.id)))?;
        self.known.insert(post_id.to_owned(), (fitted.ids, facts));
        Ok(())
    }
}
