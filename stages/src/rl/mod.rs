//! `rl.ppo`: PPO from the SFT policy against one reward model or an ensemble. Never sees the gold model.

pub mod gae;
pub mod held_out;
pub mod loss;
pub mod objective;
pub mod params;
#[cfg(test)]
mod parity;
mod passes;
pub mod phase;
pub mod rollout;
mod run;
mod tables;
#[cfg(test)]
mod tests;
pub mod update;

use engine::context::Context;
use engine::error::{Error, Result};
use engine::kind::{Kind, Signature, Wired};
use lm::{Draws, LoraConfig, SampleOptions, ScalarHead, StatOptions, Tokenizer};
use serde_json::json;

use crate::model;
use crate::prompt::Truncation;
use crate::reward::{LoadedReward, load_ensemble, load_reward_model};
use crate::stats::quantile;
use crate::train::Told;
use crate::train::encode::{fit, room};
use crate::types::Split;
use crate::types::folder::write_json;
use crate::types::reward::BASE;
use crate::types::{Ensemble, PolicyInfo, PolicyRun, Post, Posts};
use held_out::{HeldOut, Prompt};
use objective::{Objective, baseline_scores};
use params::{Matching, Params};
use phase::Phases;
use run::Run;
use update::Learner;

/// Sequences in a batch that is scored or sampled without a gradient.
const SCORING_BATCH: usize = 64;

pub struct Ppo;

impl Kind for Ppo {
    type Params = Params;

    const NAME: &'static str = "rl.ppo";
    const VERSION: u32 = 2;
    const ABOUT: &'static str =
        "PPO from the SFT policy against a reward model or an ensemble, with the adaptive objective or a baseline";

    fn signature(&self, params: &Params) -> Signature {
        let signature = Signature::gives("PolicyRun")
            .one("policy", &["Model"])
            .one("rewards", &["RewardModel", "Ensemble"])
            .one("posts", &["Posts"])
            .seeded()
            .numerics(lm::NUMERICS);
        if params.objective == Objective::Matched { signature.one("adaptive", &["PolicyRun"]) } else { signature }
    }

    fn check(&self, params: &Params) -> Vec<(String, String)> {
        params.faults()
    }

    fn check_wiring(&self, params: &Params, inputs: &[Wired<'_>]) -> Vec<(&'static str, Error)> {
        let at = |port: &str| inputs.iter().find(|input| input.port == port);
        let single = at("rewards").is_some_and(|rewards| rewards.output != Ensemble::NAME);
        let other = at("adaptive").filter(|run| run.kind == Self::NAME && run.params["objective"] != "adaptive");
        let mut faults = Vec::new();
        if single && let Err(error) = check_members(params.objective, 1) {
            faults.push(("rewards", error));
        }
        if let Some(run) = other {
            let what = format!(
                "`matched` takes its KL coefficient from a run with `objective: adaptive`; this one has {}",
                run.params["objective"]
            );
            faults.push(("adaptive", Error::yours(what).help("wire the adaptive arm to port `adaptive`")));
        }
        faults
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        lm::set_threads(ctx.threads());
        let mut members = load_members(ctx)?;
        for member in &mut members {
            member.model.lm = params.precision.of(&member.model.lm);
        }
        check_members(params.objective, members.len())?;
        let schedule = matched_schedule(&params, ctx)?;

        let input = ctx.one("policy")?.clone();
        let (base, tokenizer) = model::load(&input.folder)?;
        let base = params.precision.of(&base);
        check_tokenizer(ctx, &input.folder)?;
        let policy = match params.lora {
            Some(lora) => base.with_adapter(
                &LoraConfig { r: lora.r, alpha: lora.alpha, dropout: 0.0 },
                &mut ctx.generator("adapter"),
            ),
            None => base.clone().with_full_training(),
        }
        .told()?;
        let head = ScalarHead::zeros(base.config().width()).told()?;
        let learner = Learner::new(policy, base.frozen(), head, &params)?;

        let window = room(base.config().window(), params.max_new_tokens)?;
        let posts = ctx.one("posts")?.folder.clone();
        let mut truncation = Truncation::default();
        let train = prompts(&posts, params.split, None, &tokenizer, window, &mut truncation)?;
        let valid = prompts(&posts, Split::Valid, params.eval_prompts, &tokenizer, window, &mut truncation)?;
        truncation.tell(ctx);
        let sampling = SampleOptions {
            temperature: 1.0,
            top_p: 1.0,
            min_new_tokens: params.min_new_tokens,
            max_new_tokens: params.max_new_tokens,
            eos: tokenizer.eos().clone(),
            greedy: false,
        };
        let stats = StatOptions { min_new_tokens: params.min_new_tokens, eos: tokenizer.eos().clone(), entropy: true };
        let proxy = |scores: &[Vec<f64>]| baseline_scores(params.objective, scores, params.k);
        let held_out = HeldOut {
            prompts: valid,
            members: &members,
            proxy: &proxy,
            sampling: sampling.clone(),
            stats: StatOptions { entropy: false, ..stats.clone() },
            draws: Draws(blake3::derive_key("temper evaluation v1", &params.evaluation_seed.to_le_bytes())),
            tokenizer: &tokenizer,
        };

        let phases = Phases::new(&params, &members, &train, sampling, stats, schedule, ctx);
        let mut run = Run::new(&params, learner, phases, held_out, ctx)?;
        run.go(ctx)?;
        let (learner, phases) = run.finish(ctx)?;
        save(&learner, &params, &phases, &tokenizer, &input, ctx)
    }
}

pub(crate) fn load_members(ctx: &Context) -> Result<Vec<LoadedReward>> {
    let input = ctx.one("rewards")?;
    if input.artifact_type == Ensemble::NAME {
        load_ensemble(&input.folder)
    } else {
        Ok(vec![load_reward_model(&input.folder)?])
    }
}

/// The members' labels, in the order of their scores.
pub(crate) fn member_labels(rewards: &engine::context::Input) -> Result<Vec<String>> {
    if rewards.artifact_type == Ensemble::NAME {
        return Ok(Ensemble::info(&rewards.folder)?.members);
    }
    Ok(vec![rewards.label.clone()])
}

fn check_members(objective: Objective, members: usize) -> Result<()> {
    if members < 2 && !objective.reads_first_member_only() {
        return Err(Error::yours(format!(
            "the objective `{objective}` needs an ensemble of reward models; port `rewards` is given a single one"
        ))
        .help("wire a stage of kind `reward.ensemble` to port `rewards`, or set `objective: standard`"));
    }
    Ok(())
}

/// lambda per phase for `matched`: one number, or one for each phase of the adaptive run.
fn matched_schedule(params: &Params, ctx: &Context) -> Result<Option<Vec<f64>>> {
    let Some(adaptive) = ctx.optional("adaptive") else { return Ok(None) };
    let rows = PolicyRun::phases(&adaptive.folder)?;
    let (c, one_minus_c): (Vec<f64>, Vec<f64>) = rows.iter().filter_map(|row| Some((row.c?, row.one_minus_c?))).unzip();
    if c.is_empty() {
        return Err(Error::yours("rl.ppo: the run at port `adaptive` logged no c: its objective was not `adaptive`"));
    }
    Ok(Some(match params.matching {
        Matching::Constant => vec![objective::matched_lambda(&c, &one_minus_c)],
        Matching::Phases => c.iter().zip(&one_minus_c).map(|(c, rest)| c / rest).collect(),
    }))
}

/// Responses are scored as the ids that the policy sampled, so the reward models must read ids as it does.
pub(crate) fn check_tokenizer(ctx: &Context, policy: &std::path::Path) -> Result<()> {
    let rewards = ctx.one("rewards")?;
    if tokenizer_digest(policy)? == tokenizer_digest(&rewards.folder.join(BASE))? {
        return Ok(());
    }
    Err(Error::yours(format!("the policy and the reward models of `{}` have different tokenizers", rewards.label))
        .help("train both from models of one tokenizer"))
}

/// The prompts of a split, fitted to `window` tokens and counted.
fn prompts(
    posts: &std::path::Path,
    split: Split,
    limit: Option<usize>,
    tokenizer: &Tokenizer,
    window: usize,
    truncation: &mut Truncation,
) -> Result<Vec<Prompt>> {
    let mut found = Posts::load_split(posts, split)?;
    if let Some(limit) = limit {
        found.truncate(limit);
    }
    if found.is_empty() {
        return Err(Error::yours(format!("rl.ppo: the posts hold none in split `{split}`"))
            .help("give `dataset.filter` a size for it"));
    }
    let prompt = |post: &Post| {
        let fitted = fit(tokenizer, post, window)?;
        truncation.count(fitted.truncated);
        Ok(Prompt { post_id: post.id.clone(), ids: fitted.ids })
    };
    found.iter().map(prompt).collect()
}

fn save(
    learner: &Learner,
    params: &Params,
    phases: &Phases<'_>,
    tokenizer: &Tokenizer,
    base: &engine::context::Input,
    ctx: &mut Context,
) -> Result<()> {
    if params.lora.is_some() {
        learner.policy.save_adapter(&ctx.out().join(PolicyRun::ADAPTER), &base.digest.to_string()).told()?;
    } else {
        let folder = ctx.out().join(PolicyRun::MODEL);
        learner.policy.save(&folder, lm::WeightType::F32).told()?;
        tokenizer.save(&folder.join("tokenizer.json")).told()?;
    }
    learner.head.save(&ctx.out().join(PolicyRun::VALUE_HEAD)).told()?;
    let more = json!({
        "variance_scope": params.variance_scope,
        "matched_lambda": phases.schedule.as_ref().map(|lambda| crate::stats::mean(lambda)),
        "k": params.k,
        "evaluation_seed": params.evaluation_seed,
        "optimiser_steps": learner.steps,
        "min_new_tokens": params.min_new_tokens,
        "max_new_tokens": params.max_new_tokens,
        "tokenizer_digest": tokenizer_digest(&base.folder)?,
    });
    let info = PolicyInfo {
        objective: params.objective.to_string(),
        lambda: params.lambda,
        b: phases.b,
        seed: ctx.seed(),
        phases: params.phases(),
        eval_every: params.eval_every,
        members: member_labels(ctx.one("rewards")?)?,
        base_digest: base.digest,
        more: more.as_object().cloned().unwrap_or_default(),
    };
    write_json(&ctx.out().join(PolicyRun::INFO), &info)
}

/// BLAKE3 of a model folder's tokenizer: where two agree, ids need no decoding.
pub fn tokenizer_digest(folder: &std::path::Path) -> Result<engine::names::Digest> {
    use engine::error::At;
    let path = folder.join("tokenizer.json");
    Ok(engine::names::Digest::of(&std::fs::read(&path).at(&path)?))
}

/// Quantiles 10, 50 and 90%.
fn spread(x: &[f64]) -> [Option<f64>; 3] {
    [0.1, 0.5, 0.9].map(|q| Some(quantile(x, q)))
}
