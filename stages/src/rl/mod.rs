//! The loop of `rl.ppo`, `rl.rloo` and `rl.grpo`: policy gradients from the SFT policy against one reward model or an ensemble, with
//! the same phases, sampling, scoring and objectives. Never sees the gold model.

pub mod credit;
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
use engine::estimate::{Forecast, Scaling};
use engine::kind::{ConnectedInput, Signature};
use lm::{CounterRng, LoraConfig, SampleOptions, StatOptions, Tokenizer};
use serde_json::{Value, json};

use crate::error::IntoStageResult;
use crate::model::forecast::{Models, Training, memory};
use crate::model::{self, tokenizer_digest};
use crate::prompt::Truncation;
use crate::reward::{LoadedReward, load_ensemble, load_reward_model};
use crate::stats::quantile;
use crate::train::encode::{fit, room};
use crate::types::Split;
use crate::types::folder::write_json;
use crate::types::reward::BASE;
use crate::types::{Ensemble, Objective, PolicyInfo, PolicyRun, Post, Posts};
use held_out::{HeldOut, Prompt};
use objective::baseline_scores;
use params::{Matching, Params};
use phase::Phases;
use run::Run;
use update::Learner;

/// Sequences per batch when scoring or sampling without gradients.
const SCORING_BATCH: usize = 64;

/// The inputs and output of an RL kind.
pub(crate) fn signature(objective: Objective) -> Signature {
    let signature = Signature::producing("PolicyRun")
        .one("policy", &["Model"])
        .one("rewards", &["RewardModel", "Ensemble"])
        .one("posts", &["Posts"])
        .seeded()
        .numerics(lm::NUMERICS);
    if objective == Objective::Matched { signature.one("adaptive", &["PolicyRun"]) } else { signature }
}

/// Work: tokens sampled and learned from, times the sizes of the models. Output: mostly the samples of each evaluation.
pub(crate) fn scaling(params: &Params, size: &dyn Fn(&str) -> Option<f64>) -> Option<Scaling> {
    let phases = params.phases();
    let evaluations = (0..=phases).filter(|phase| params.evaluates_after(*phase)).count() as f64;
    let responses = phases as f64 * (params.rollouts * params.responses) as f64;
    let models = (1.0 + params.epochs as f64) * size("policy")? + size("rewards")?;
    Some(Scaling::new(responses * params.max_new_tokens as f64 * models, evaluations))
}

/// Memory: the policy, its training on a minibatch or sampling, and the reward models.
pub(crate) fn forecast(params: &Params, inputs: &dyn Fn(&str) -> Vec<Value>) -> Forecast {
    let training = Training {
        rank: params.lora.as_ref().map(|lora| lora.r),
        sequences: params.minibatch,
        // Minibatches are not split.
        tokens_at_once: usize::MAX,
        sampled: SCORING_BATCH.min(params.rollouts * params.responses),
        scored: SCORING_BATCH.min(params.rollouts * params.responses),
        merges: false,
    };
    // With all weights trained, the reference policy has weights of its own.
    let policy = inputs("policy");
    let reference = if params.lora.is_none() { policy.clone() } else { Vec::new() };
    let models = Models::new(policy.iter().chain(&reference).chain(&inputs("rewards")));
    memory(models.map(|models| models.training(&training)))
}

/// Faults of the wiring: a single reward model where an ensemble is needed, a `matched` arm without an adaptive run.
pub(crate) fn check_wiring(objective: Objective, inputs: &[ConnectedInput<'_>]) -> Vec<(&'static str, Error)> {
    let at = |port: &str| inputs.iter().find(|input| input.port == port);
    let single = at("rewards").is_some_and(|rewards| rewards.output != Ensemble::NAME);
    let other = at("adaptive")
        .filter(|run| run.kind.starts_with("rl.") && run.params["objective"] != json!(Objective::Adaptive));
    let mut faults = Vec::new();
    if single && let Err(error) = check_members(objective, 1) {
        faults.push(("rewards", error));
    }
    if let Some(run) = other {
        let what = format!(
            "`matched` takes its KL coefficient from a run with `objective: adaptive`; this one has {}",
            run.params["objective"]
        );
        faults.push(("adaptive", Error::user(what).help("wire the adaptive arm to port `adaptive`")));
    }
    faults
}

/// Trains a policy and writes a PolicyRun.
pub(crate) fn run(params: &Params, ctx: &mut Context) -> Result<()> {
    lm::follow_threads(ctx.thread_limit().clone());
    let mut members = load_members(ctx)?;
    for member in &mut members {
        member.model.lm = params.precision.of(&member.model.lm);
    }
    check_members(params.objective, members.len())?;
    let schedule = matched_schedule(params, ctx)?;

    let input = ctx.one("policy")?.clone();
    let (base, tokenizer) = model::load(&input.folder)?;
    let base = params.precision.of(&base);
    check_tokenizer(ctx, &input.folder)?;
    let policy = match params.lora {
        Some(lora) => {
            base.with_adapter(&LoraConfig { r: lora.r, alpha: lora.alpha, dropout: 0.0 }, &mut ctx.generator("adapter"))
        }
        None => base.clone().with_full_training(),
    }
    .into_stage_result()?;
    let learner = Learner::new(policy, base.frozen(), params)?;

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
    let proxy = |scores: &[Vec<f64>]| baseline_scores(params.objective, scores, params.k, params.beta);
    let held_out = HeldOut {
        prompts: valid,
        members: &members,
        proxy: &proxy,
        sampling: sampling.clone(),
        stats: StatOptions { entropy: false, ..stats.clone() },
        draws: CounterRng(blake3::derive_key("temper evaluation v1", &params.evaluation_seed.to_le_bytes())),
        tokenizer: &tokenizer,
    };

    let phases = Phases::new(params, &members, &train, sampling, stats, schedule, ctx);
    let mut run = Run::new(params, learner, phases, held_out, ctx)?;
    run.go(ctx)?;
    let (learner, phases) = run.finish(ctx)?;
    save(&learner, params, &phases, &tokenizer, &input, ctx)
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
        return Err(Error::user(format!(
            "the objective `{objective}` needs an ensemble of reward models; port `rewards` is given a single one"
        ))
        .help("wire a stage of kind `reward.ensemble` to port `rewards`, or set `objective: standard`"));
    }
    Ok(())
}

/// lambda per phase for `matched`: one constant, or one value for each phase of the adaptive run.
fn matched_schedule(params: &Params, ctx: &Context) -> Result<Option<Vec<f64>>> {
    let Some(adaptive) = ctx.optional("adaptive") else { return Ok(None) };
    let rows = PolicyRun::phases(&adaptive.folder)?;
    let means = rows.iter().filter_map(|row| Some((row.c_kl?, row.kl_exact?, row.c?)));
    let means: Vec<(f64, f64, f64)> = means.collect();
    if PolicyRun::info(&adaptive.folder)?.objective != Objective::Adaptive.to_string() || means.is_empty() {
        return Err(Error::user("the run at port `adaptive` has no adaptive coefficient to match")
            .help("wire a run with `objective: adaptive`"));
    }
    Ok(Some(match params.matching {
        Matching::Constant => {
            let of =
                |column: fn(&(f64, f64, f64)) -> f64| crate::stats::mean(&means.iter().map(column).collect::<Vec<_>>());
            vec![objective::matched_lambda(of(|m| m.0), of(|m| m.1), of(|m| m.2))]
        }
        Matching::Phases => means.iter().map(|&(c_kl, kl, c)| objective::matched_lambda(c_kl, kl, c)).collect(),
    }))
}

/// The reward models score the ids that the policy sampled, so both need the same tokenizer.
pub(crate) fn check_tokenizer(ctx: &Context, policy: &std::path::Path) -> Result<()> {
    let rewards = ctx.one("rewards")?;
    if tokenizer_digest(policy)? == tokenizer_digest(&rewards.folder.join(BASE))? {
        return Ok(());
    }
    Err(Error::user(format!("the policy and the reward models of `{}` have different tokenizers", rewards.label))
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
        return Err(
            Error::user(format!("the posts hold none in split `{split}`")).help("give `dataset.filter` a size for it")
        );
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
        learner
            .policy
            .save_adapter(&ctx.out().join(PolicyRun::ADAPTER), &base.digest.to_string())
            .into_stage_result()?;
    } else {
        let folder = ctx.out().join(PolicyRun::MODEL);
        learner.policy.save(&folder, lm::WeightType::F32).into_stage_result()?;
        tokenizer.save(&folder.join("tokenizer.json")).into_stage_result()?;
    }
    if let Some(head) = &learner.head {
        head.save(&ctx.out().join(PolicyRun::VALUE_HEAD)).into_stage_result()?;
    }
    let more = json!({
        "variance_scope": params.variance_scope,
        "variance_reference": params.variance_reference,
        "kl": {
            "controller": if params.kl_target.is_some() { "target" } else { "constant" },
            "target": params.kl_target,
            "gain": params.kl_target.map(|_| params.kl_gain),
        },
        "matching": params.matching,
        "matched_lambda": phases.schedule.as_ref().map(|lambda| crate::stats::mean(lambda)),
        "k": params.k,
        "beta": params.beta,
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

/// The 10%, 50% and 90% quantiles.
fn spread(x: &[f64]) -> [Option<f64>; 3] {
    [0.1, 0.5, 0.9].map(|q| Some(quantile(x, q)))
}
