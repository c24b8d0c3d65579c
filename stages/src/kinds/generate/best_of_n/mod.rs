//! `generate.best_of_n`: draws `n` responses of a policy to each held-out prompt and scores them with every reward
//! model, so that `evaluate` can compute the value of the best of them by each objective (Stiennon et al. 2020; Gao et
//! al. 2023).

#[cfg(test)]
mod tests;

use engine::context::Context;
use engine::error::{Error, Result};
use engine::estimate::{Forecast, Scaling};
use engine::kind::{ConnectedInput, Kind, Signature};
use lm::{CausalLm, CounterRng, SampleOptions, Sequence, Tokenizer};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::IntoStageResult;
use crate::model;
use crate::model::forecast::{Models, memory};
use crate::prompt::Truncation;
use crate::random::bits_of;
use crate::reward::LoadedReward;
use crate::rl;
use crate::rl::held_out::Prompt;
use crate::rl::objective::baseline_scores;
use crate::rl::rollout::score_members;
use crate::table;
use crate::train::encode::{fit, response_text, room};
use crate::train::params::{BATCH, Faults, Precision};
use crate::types::Objective;
use crate::types::best_of_n::{BestOfN, BestOfNInfo, Candidate};
use crate::types::folder::write_json;
use crate::types::{Ensemble, Posts, Split};

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// The objectives whose phi selects among the responses: any except `adaptive` and `matched`, which select like
    /// `mean`.
    pub objectives: Vec<Objective>,
    /// Number of standard deviations that `mean_minus_std` subtracts from the mean, or of variances that `uwo`
    /// subtracts.
    pub k: f64,
    /// Temperature of `soft_min`, in units of the score.
    pub beta: f64,
    /// Responses per prompt, drawn at temperature 1.
    pub n: usize,
    /// The split that provides the prompts.
    pub split: Split,
    /// Maximum number of prompts, in the order of the posts; null: all of the split.
    pub prompts: Option<usize>,
    /// Minimum number of tokens before EOS is allowed.
    pub min_new_tokens: usize,
    pub max_new_tokens: usize,
    /// Number type for products with weights, the reward models' included: `f32`, or `bf16` (operands rounded, sums in
    /// f32).
    pub precision: Precision,
    /// Responses sampled and scored per batch; bounds memory.
    pub batch: usize,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            objectives: Objective::ALL.iter().copied().filter(|objective| chooses(*objective)).collect(),
            k: 1.0,
            beta: 1.0,
            n: 16,
            split: Split::Valid,
            prompts: None,
            min_new_tokens: 5,
            max_new_tokens: 48,
            precision: Precision::F32,
            batch: 64,
        }
    }
}

/// Whether the objective has its own phi: `adaptive` and `matched` differ from `mean` only in their KL coefficient,
/// which best-of-n lacks.
fn chooses(objective: Objective) -> bool {
    !matches!(objective, Objective::Adaptive | Objective::Matched)
}

pub struct GenerateBestOfN;

impl Kind for GenerateBestOfN {
    type Params = Params;

    const NAME: &'static str = "generate.best_of_n";
    const VERSION: u32 = 1;
    const ABOUT: &'static str =
        "draws n responses of a policy to each held-out prompt and scores them by every reward model, for best-of-n";

    fn signature(&self, _: &Params) -> Signature {
        Signature::producing(BestOfN::NAME)
            .one("policy", &["Model"])
            .one("rewards", &["RewardModel", "Ensemble"])
            .one("posts", &["Posts"])
            .seeded()
            .numerics(lm::NUMERICS)
    }

    fn check(&self, p: &Params) -> Vec<(String, String)> {
        let mut faults = Faults::default();
        faults.must(!p.objectives.is_empty(), "objectives", "must name at least one");
        for (i, objective) in p.objectives.iter().enumerate() {
            let what = format!("`{objective}` chooses as `mean` does: leave it out");
            faults.must(chooses(*objective), "objectives", &what);
            faults.must(!p.objectives[..i].contains(objective), "objectives", &format!("names `{objective}` twice"));
        }
        faults.must(p.k >= 0.0 && p.k.is_finite(), "k", "must not be negative");
        faults.positive(p.beta, "beta");
        faults.must(p.n >= 2, "n", "must be at least 2");
        faults.at_most(p.n as u64, BATCH, "n");
        faults.must(p.prompts != Some(0), "prompts", "must be at least 1");
        faults.must(
            p.max_new_tokens > 0 && p.min_new_tokens <= p.max_new_tokens,
            "max_new_tokens",
            "must be at least `min_new_tokens`, and 1",
        );
        faults.at_most(p.max_new_tokens as u64, BATCH, "max_new_tokens");
        faults.must(p.batch > 0, "batch", "must be at least 1");
        faults.at_most(p.batch as u64, BATCH, "batch");
        faults.0
    }

    fn check_wiring(&self, p: &Params, inputs: &[ConnectedInput<'_>]) -> Vec<(&'static str, Error)> {
        let rewards = inputs.iter().find(|input| input.port == "rewards");
        let members = if rewards.is_some_and(|rewards| rewards.output != Ensemble::NAME) { 1 } else { 2 };
        Vec::from_iter(check_members(&p.objectives, members).err().map(|error| ("rewards", error)))
    }

    fn scaling(&self, p: &Params, size: &dyn Fn(&str) -> Option<f64>) -> Option<Scaling> {
        let responses = p.n as f64 * p.prompts.map_or(1.0, |prompts| prompts as f64);
        let (policy, tokens) = (size("policy")?, p.max_new_tokens as f64);
        Some(Scaling::new(responses * tokens * policy, responses))
    }

    fn forecast(&self, p: &Params, inputs: &dyn Fn(&str) -> Vec<Value>) -> Forecast {
        let models = Models::new(inputs("policy").iter().chain(&inputs("rewards")));
        memory(models.map(|models| models.sampling(p.batch)))
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        lm::follow_threads(ctx.thread_limit().clone());
        generate(&params, ctx)
    }
}

fn check_members(objectives: &[Objective], members: usize) -> Result<()> {
    match objectives.iter().find(|objective| members < 2 && !objective.reads_first_member_only()) {
        None => Ok(()),
        Some(objective) => Err(Error::user(format!(
            "the objective `{objective}` needs an ensemble of reward models; port `rewards` is given a single one"
        ))
        .help("wire a stage of kind `reward.ensemble` to port `rewards`, or set `objectives: [standard]`")),
    }
}

/// Draws and scores responses to prompts.
struct Generator<'a> {
    params: &'a Params,
    policy: CausalLm,
    tokenizer: Tokenizer,
    members: Vec<LoadedReward>,
    /// Key that maps a post to its row number for the draws.
    rows: [u8; 32],
    draws: CounterRng,
}

fn generate(p: &Params, ctx: &mut Context) -> Result<()> {
    let input = ctx.one("policy")?.clone();
    let (policy, tokenizer) = model::load(&input.folder)?;
    rl::check_tokenizer(ctx, &input.folder)?;
    let mut members = rl::load_members(ctx)?;
    check_members(&p.objectives, members.len())?;
    for member in &mut members {
        member.model.lm = p.precision.of(&member.model.lm);
    }
    let window = room(policy.config().window(), p.max_new_tokens)?;
    let generator = Generator {
        params: p,
        policy: p.precision.of(&policy).frozen(),
        tokenizer,
        members,
        rows: ctx.generator_key("rows"),
        draws: CounterRng(ctx.generator_key("samples")),
    };

    let folder = ctx.one("posts")?.folder.clone();
    let posts = || -> Result<_> {
        let posts = Posts::open(&folder)?.filter(|post| post.as_ref().map_or(true, |post| post.is_in(p.split)));
        Ok(posts.take(p.prompts.unwrap_or(usize::MAX)))
    };
    let total = posts()?.count();
    if total == 0 {
        return Err(Error::user(format!("no posts in split `{}`", p.split)).help("give `dataset.filter` a size for it"));
    }
    let mut writer = table::Writer::create(&ctx.out().join(BestOfN::SAMPLES))?;
    let (mut truncation, mut ended, mut length) = (Truncation::default(), 0_u64, 0_u64);
    let mut prompts = Vec::new();
    // As many prompts as fill a batch with their responses.
    let together = p.batch.div_ceil(p.n);
    for (done, post) in posts()?.enumerate() {
        let post = post?;
        let fitted = fit(&generator.tokenizer, &post, window)?;
        truncation.count(fitted.truncated);
        prompts.push(Prompt { post_id: post.id, ids: fitted.ids });
        if prompts.len() == together || done + 1 == total {
            for row in generator.candidates(&prompts)? {
                ended += u64::from(row.ended);
                length += row.ids.len() as u64;
                writer.push(row)?;
            }
            prompts.clear();
            ctx.progress(done as u64 + 1, total as u64, "prompts", None);
        }
    }
    let rows = writer.finish()?;
    truncation.tell(ctx);
    ctx.metric("prompts", total as f64);
    ctx.metric("ended", ended as f64 / rows as f64);
    ctx.metric("mean_tokens", length as f64 / rows as f64);
    let info = BestOfNInfo {
        objectives: p.objectives.clone(),
        k: p.k,
        beta: p.beta,
        n: p.n,
        split: p.split,
        seed: ctx.seed(),
        members: rl::member_labels(ctx.one("rewards")?)?,
        base_digest: input.digest,
        tokenizer_digest: model::tokenizer_digest(&input.folder)?,
        min_new_tokens: p.min_new_tokens,
        max_new_tokens: p.max_new_tokens,
    };
    write_json(&ctx.out().join(BestOfN::INFO), &info)
}

impl Generator<'_> {
    /// The `n` responses to each prompt. The draws depend only on the seed, the post and the response's index.
    fn candidates(&self, prompts: &[Prompt]) -> Result<Vec<Candidate>> {
        let p = self.params;
        let options = SampleOptions {
            temperature: 1.0,
            top_p: 1.0,
            min_new_tokens: p.min_new_tokens,
            max_new_tokens: p.max_new_tokens,
            eos: self.tokenizer.eos().clone(),
            greedy: false,
        };
        let drawn: Vec<(&Prompt, u64)> =
            prompts.iter().flat_map(|prompt| (0..p.n as u64).map(move |index| (prompt, index))).collect();
        let (mut sequences, mut ended) = (Vec::with_capacity(drawn.len()), Vec::with_capacity(drawn.len()));
        for chunk in drawn.chunks(p.batch) {
            let ids: Vec<&[u32]> = chunk.iter().map(|(prompt, _)| prompt.ids.as_slice()).collect();
            let row = |(prompt, index): &(&Prompt, u64)| bits_of(&self.rows, &prompt.post_id).wrapping_add(*index);
            let rows: Vec<u64> = chunk.iter().map(row).collect();
            let sampled = lm::sample(&self.policy, &ids, &options, &self.draws, &rows).into_stage_result()?;
            for ((prompt, _), sample) in chunk.iter().zip(sampled) {
                sequences.push(Sequence { prompt: prompt.ids.clone(), response: sample.ids });
                ended.push(sample.ended);
            }
        }
        let scores = score_members(&self.members, &sequences, p.batch)?;
        let phi: Vec<Vec<f64>> =
            p.objectives.iter().map(|objective| baseline_scores(*objective, &scores, p.k, p.beta)).collect();
        let rows = drawn.iter().zip(sequences).zip(ended).enumerate();
        let rows = rows.map(|(i, (((prompt, index), sequence), ended))| Candidate {
            post_id: prompt.post_id.clone(),
            half: prompt.half(),
            index: *index as i64,
            text: response_text(&self.tokenizer, &sequence.response),
            ids: sequence.response,
            ended,
            scores: scores.iter().map(|member| member[i] as f32).collect(),
            phi: phi.iter().map(|objective| objective[i]).collect(),
        });
        Ok(rows.collect())
    }
}
