//! The laws of the objective (DESIGN.md, section 7) on a real model, and tests of the complete kinds.

use std::collections::BTreeMap;
use std::path::PathBuf;

use candle_core::Tensor;
use engine::context::{Context, Input};
use engine::error::Result;
use engine::kind::{AnyKind, ConnectedInput, Kind};
use engine::names::Digest;
use lm::{CausalLm, CounterRng, LoraConfig, SampleOptions, Sequence, StatOptions, Tokenizer, Variable, WeightType};
use rand::Rng;
use serde_json::json;

use super::SCORING_BATCH;
use super::held_out::Prompt;
use super::loss::{Trunk, Value};
use super::objective::{VarianceReference, token_rewards};
use super::params::{Params, PpoParams};
use super::phase::Phases;
use super::rollout::{Rollout, score_tokens};
use super::update::{Learner, PhaseBatch};
use crate::error::IntoStageResult;
use crate::kinds::rl::{Grpo, Ppo, Rloo};
use crate::random::fixed_generator;
use crate::reward::{LoadedReward, load_ensemble};
use crate::stats::moments;
use crate::stats::{mean, variance};
use crate::testing::{Bench, Out, assert_pinned, run_seeded, toys};
use crate::train::encode;
use crate::types::Objective;
use crate::types::{PolicyRun, Split};

const LORA: LoraConfig = LoraConfig { r: 4, alpha: 8.0, dropout: 0.0 };

/// A base model, two reward models on it, and prompts.
struct World {
    base: CausalLm,
    tokenizer: Tokenizer,
    members: Vec<LoadedReward>,
    prompts: Vec<Prompt>,
    stats: StatOptions,
    ctx: Context,
}

impl World {
    fn new() -> Result<Self> {
        let bench = Bench::new();
        toys::write_ensemble(&bench.path("rewards"), 1, &["1", "2"])?;
        let tokenizer = toys::tokenizer();
        let prompt = |post| Ok(Prompt { ids: encode::fit(&tokenizer, &post, 200)?.ids, post_id: post.id });
        Ok(Self {
            base: CausalLm::load(&bench.path("rewards/base")).into_stage_result()?,
            members: load_ensemble(&bench.path("rewards"))?,
            // Prompts of several lengths, so that batches are padded.
            prompts: toys::posts(11, Split::Rl)
                .into_iter()
                .enumerate()
                .map(|(i, mut post)| {
                    post.post = post.post.repeat(1 + i % 3);
                    prompt(post)
                })
                .collect::<Result<_>>()?,
            stats: StatOptions { min_new_tokens: 2, eos: tokenizer.eos().clone(), entropy: true },
            tokenizer,
            ctx: Context::new(Ppo::NAME, 7, BTreeMap::new(), PathBuf::new(), PathBuf::new()),
        })
    }

    fn sampling(&self) -> SampleOptions {
        SampleOptions {
            temperature: 1.0,
            top_p: 1.0,
            min_new_tokens: 2,
            max_new_tokens: 9,
            eos: self.tokenizer.eos().clone(),
            greedy: false,
        }
    }

    fn phases<'a>(&'a self, params: &'a Params) -> Phases<'a> {
        Phases::new(params, &self.members, &self.prompts, self.sampling(), self.stats.clone(), None, &self.ctx)
    }

    /// pi = pi_ref, V = 0.
    fn learner(&self, params: &Params) -> Result<Learner> {
        let policy = match params.lora {
            Some(_) => self.base.with_adapter(&LORA, &mut fixed_generator(1, "policy")),
            None => self.base.clone().with_full_training(),
        };
        Learner::new(policy.into_stage_result()?, self.base.frozen(), params)
    }

    /// A learner after some training: pi differs from pi_ref, V is still 0.
    fn trained(&self, params: &Params) -> Result<Learner> {
        let learner = self.learner(params)?;
        move_by(&learner.policy.variables(), 0.05, 2)?;
        Ok(learner)
    }

    /// Scored responses to every prompt.
    fn rollout(&self, phases: &mut Phases<'_>, learner: &Learner) -> Result<Rollout> {
        let mut rollout = phases.sample(learner)?;
        phases.score(learner, &mut rollout)?;
        Ok(rollout)
    }

    fn logprobs(&self, lm: &CausalLm, sequences: &[Sequence]) -> Result<Vec<f64>> {
        Ok(score_tokens(lm, None, &self.base, sequences, &self.stats, SCORING_BATCH)?.logprob.concat())
    }
}

/// One response to each of 11 prompts; three minibatches make up the whole batch.
fn params(more: Params) -> Params {
    Params { lambda: 0.2, rollouts: 11, minibatch: 4, epochs: 1, lr: 1e-3, lora: Some(Default::default()), ..more }
}

/// Adds a random number between -`by` and `by` to every entry.
fn move_by(variables: &[Variable], by: f32, seed: u64) -> Result<()> {
    let mut rng = fixed_generator(seed, "moved");
    for v in variables {
        let moved: Vec<f32> = (0..v.var.elem_count()).map(|_| rng.random_range(-by..by)).collect();
        let moved = Tensor::from_vec(moved, v.var.shape(), v.var.device()).into_stage_result()?;
        v.var.set(&(v.var.as_detached_tensor() + moved).into_stage_result()?).into_stage_result()?;
    }
    Ok(())
}

/// The gradient of a minibatch's losses with respect to `variables`; 0 where there is none.
fn gradient(
    learner: &Learner,
    lesson: PhaseBatch<'_>,
    rows: &[usize],
    params: &Params,
    variables: &[Variable],
) -> Result<Vec<f32>> {
    let gradients = lm::backward(&learner.judge(lesson, rows, params)?.surrogate).into_stage_result()?;
    let mut all = Vec::new();
    for v in variables {
        match gradients.get(&v.var) {
            Some(g) => all.extend(g.flatten_all().and_then(|g| g.to_vec1::<f32>()).into_stage_result()?),
            None => all.extend(vec![0.0; v.var.elem_count()]),
        }
    }
    Ok(all)
}

fn largest(x: impl IntoIterator<Item = f64>) -> f64 {
    x.into_iter().map(f64::abs).fold(0.0, f64::max)
}

fn apart<T: Copy + Into<f64>>(a: &[T], b: &[T]) -> f64 {
    assert_eq!(a.len(), b.len());
    largest(a.iter().zip(b).map(|(&a, &b)| a.into() - b.into()))
}

#[test]
fn a_policy_has_an_adapter_unless_none_is_asked_for() {
    let lora = |with| serde_json::from_value::<PpoParams>(with).map(|params| params.lora);
    assert_eq!(lora(json!({})).ok(), Some(Some(Default::default())));
    // Null only removes an earlier value in a variant or a profile.
    assert_eq!(lora(json!({ "lora": "none" })).ok(), Some(None));
    assert_eq!(lora(json!({ "lora": null })).ok(), Some(None));
    assert!(lora(json!({ "lora": "full" })).is_err());
}

#[test]
fn c_where_the_variance_is_that_of_phase_one_the_gradient_is_the_mean_arms() -> Result<()> {
    let world = World::new()?;
    let value = Value { coefficient: 0.0, ..Value::default() };
    let adaptive = params(PpoParams { objective: Objective::Adaptive, value, ..PpoParams::default() }.into());
    let fixed = Params { objective: Objective::Mean, ..adaptive.clone() };
    let learner = world.trained(&adaptive)?;
    let (mut near, mut mean_arm) = (world.phases(&adaptive), world.phases(&fixed));
    let variables = learner.policy.variables();

    // Phase one: the members disagree arbitrarily.
    let first = world.rollout(&mut near, &learner)?;
    let (_, s2) = moments(&first.scores);
    assert!(variance(&s2) > 0.01, "{s2:?}");
    let (a, m) = (near.rewards(&first, 0)?, mean_arm.rewards(&first, 0)?);
    let (a, m) = (near.credit(&first, &a.weights), mean_arm.credit(&first, &m.weights));
    let of = |lesson, rows: &[usize]| gradient(&learner, lesson, rows, &adaptive, &variables);
    let rows: Vec<usize> = (0..11).collect();
    let differ = apart(&of(a.lesson(&first, &world.stats), &rows)?, &of(m.lesson(&first, &world.stats), &rows)?);
    assert!(differ > 1e-3, "unequal variances make another gradient, here by {differ}");

    // Phase two: the members disagree about each response as much as they did on average.
    let mut second = world.rollout(&mut near, &learner)?;
    let (mu, _) = moments(&second.scores);
    let deviation = mean(&s2).sqrt();
    second.scores = [deviation, -deviation].map(|d| mu.iter().map(|mu| mu + d).collect()).to_vec();
    assert_eq!(largest(second.value.concat()), 0.0);
    let (a, m) = (near.rewards(&second, 1)?, mean_arm.rewards(&second, 1)?);
    for (i, (a, m)) in a.weights.iter().zip(&m.weights).enumerate() {
        let log_ratio = second.log_ratio(i);
        assert!(largest(log_ratio.iter().copied()) > 1e-3, "the KL has a part in the rewards");
        let (near, fixed) = (token_rewards(*a, &log_ratio), token_rewards(*m, &log_ratio));
        let scaled: Vec<f64> = fixed.iter().map(|r| r / (1.0 + adaptive.lambda)).collect();
        assert!(apart(&near, &scaled) <= 1e-5, "{near:?} {scaled:?}");
    }
    let (a, m) = (near.credit(&second, &a.weights), mean_arm.credit(&second, &m.weights));
    for rows in [rows.as_slice(), &[3, 0, 7], &[10]] {
        let (a, m) = (of(a.lesson(&second, &world.stats), rows)?, of(m.lesson(&second, &world.stats), rows)?);
        assert!(largest(m.iter().map(|&g| f64::from(g))) > 1e-2);
        assert!(apart(&a, &m) <= 1e-5, "rows {rows:?}: {}", apart(&a, &m));
    }
    Ok(())
}

#[test]
fn g_the_first_minibatch_finds_the_policy_that_drew_it() -> Result<()> {
    let world = World::new()?;
    for lora in [params(Params::default()).lora, None] {
        let params = Params { lora, ..params(Params::default()) };
        let mut learner = world.trained(&params)?;
        let mut phases = world.phases(&params);
        let rollout = world.rollout(&mut phases, &learner)?;
        let rewards = phases.rewards(&rollout, 0)?;
        let credit = phases.credit(&rollout, &rewards.weights);
        let lesson = credit.lesson(&rollout, &world.stats);
        // Before any update, minibatches of any size and order match the scores of the whole batch.
        for rows in [&[0, 1, 2, 3][..], &[10, 4, 7], &[5]] {
            let found = learner.judge(lesson, rows, &params)?.log_ratio;
            assert!(found <= 1e-6, "|log ratio| {found} of rows {rows:?}");
        }
        let report = learner.update(lesson, &params, &mut fixed_generator(3, "order"))?;
        assert_eq!((report.minibatches, report.skipped), (3, 0));
        assert!(report.first_log_ratio <= 1e-6, "{}", report.first_log_ratio);
        let after = learner.judge(lesson, &[0, 1, 2, 3], &params)?.log_ratio;
        assert!(after > 1e-3, "the update moved the policy: {after}");
    }
    Ok(())
}

#[test]
fn g_what_decoding_says_of_a_token_is_what_scoring_says() -> Result<()> {
    let world = World::new()?;
    let policy = world.trained(&params(Params::default()))?.policy;
    let prompts: Vec<&[u32]> = world.prompts.iter().map(|p| p.ids.as_slice()).collect();
    let rows: Vec<u64> = (0..11).collect();
    let sampled =
        lm::sample(&policy.frozen(), &prompts, &world.sampling(), &CounterRng([5; 32]), &rows).into_stage_result()?;
    let drawn: Vec<f64> = sampled.iter().flat_map(|s| s.logprobs.iter().map(|&p| f64::from(p))).collect();
    let sequences: Vec<Sequence> =
        prompts.iter().zip(sampled).map(|(prompt, s)| Sequence::new(*prompt, s.ids)).collect();
    let scored = world.logprobs(&policy, &sequences)?;
    assert!(apart(&drawn, &scored) <= 1e-4, "{}", apart(&drawn, &scored));
    Ok(())
}

#[test]
fn g_before_the_first_update_the_kl_is_zero() -> Result<()> {
    let world = World::new()?;
    for lora in [params(Params::default()).lora, None] {
        let params = Params { lora, ..params(Params::default()) };
        let kl = |learner: &Learner| -> Result<f64> {
            let rollout = world.rollout(&mut world.phases(&params), learner)?;
            Ok(largest(rollout.kl().into_iter().chain(rollout.kl_k3())))
        };
        assert_eq!(kl(&world.learner(&params)?)?, 0.0);
        assert!(kl(&world.trained(&params)?)? > 1e-2);
    }
    Ok(())
}

#[test]
fn h_merged_adapter_off_and_reference_log_probabilities_agree() -> Result<()> {
    // As in a pipeline: SFT trains an adapter and saves the merged model, which both policy and reference start from.
    let mut world = World::new()?;
    let sft = world.base.with_adapter(&LORA, &mut fixed_generator(4, "sft")).into_stage_result()?;
    move_by(&sft.variables(), 0.2, 5)?;
    let folder = Bench::new();
    sft.merged().into_stage_result()?.save(&folder.path("sft"), WeightType::F32).into_stage_result()?;
    let (plain, merged) = (world.base.clone(), CausalLm::load(&folder.path("sft")).into_stage_result()?);
    world.base = merged;

    let params = params(Params::default());
    let mut learner = world.learner(&params)?;
    let mut phases = world.phases(&params);
    let rollout = world.rollout(&mut phases, &learner)?;
    let logprobs = |lm: &CausalLm| world.logprobs(lm, &rollout.sequences);
    let with_adapter = logprobs(&sft)?;
    assert!(apart(&with_adapter, &logprobs(&plain)?) > 1e-2, "SFT did something");
    for lm in [&world.base, &learner.reference, &learner.policy, &learner.policy.base()] {
        let found = apart(&logprobs(lm)?, &with_adapter);
        assert!(found <= 1e-5, "{found}");
    }

    // PPO changes the policy only, not the weights below it.
    let rewards = phases.rewards(&rollout, 0)?;
    let credit = phases.credit(&rollout, &rewards.weights);
    learner.update(credit.lesson(&rollout, &world.stats), &params, &mut fixed_generator(3, "order"))?;
    let policy = logprobs(&learner.policy)?;
    assert!(apart(&policy, &with_adapter) > 1e-3);
    assert!(apart(&logprobs(&learner.policy.merged().into_stage_result()?)?, &policy) <= 1e-5);
    for lm in [&learner.reference, &learner.policy.base()] {
        assert!(apart(&logprobs(lm)?, &with_adapter) <= 1e-5);
    }
    Ok(())
}

#[test]
fn h_full_training_leaves_the_reference_where_it_was() -> Result<()> {
    let world = World::new()?;
    let params = Params { lora: None, ..params(Params::default()) };
    let mut learner = world.learner(&params)?;
    let mut phases = world.phases(&params);
    let rollout = world.rollout(&mut phases, &learner)?;
    let rewards = phases.rewards(&rollout, 0)?;
    let credit = phases.credit(&rollout, &rewards.weights);
    learner.update(credit.lesson(&rollout, &world.stats), &params, &mut fixed_generator(3, "order"))?;
    let before = rollout.reference.concat();
    assert_eq!(apart(&world.logprobs(&learner.reference, &rollout.sequences)?, &before), 0.0);
    assert!(apart(&world.logprobs(&learner.policy, &rollout.sequences)?, &before) > 1e-3);
    Ok(())
}

#[test]
fn i_the_value_loss_alone_moves_a_shared_trunk_and_no_detached_one() -> Result<()> {
    let world = World::new()?;
    for lora in [params(Params::default()).lora, None] {
        for trunk in [Trunk::Shared, Trunk::Detached] {
            let value = Value { trunk, coefficient: 1.0, ..Value::default() };
            let params = Params { lora, ..params(PpoParams { value, ..PpoParams::default() }.into()) };
            let learner = world.trained(&params)?;
            // A value head of zeros passes no gradient on.
            let head = learner.head.as_ref().expect("PPO has a value head").variables();
            move_by(&head, 0.5, 6)?;
            let rollout = world.rollout(&mut world.phases(&params), &learner)?;
            let like = |x: f64| -> Vec<Vec<f64>> { rollout.value.iter().map(|row| vec![x; row.len()]).collect() };
            let (advantages, returns) = (like(0.0), like(1.0));
            let lesson = PhaseBatch {
                rollout: &rollout,
                advantages: &advantages,
                returns: &returns,
                kl: &[],
                first_std: 1.0,
                stats: &world.stats,
            };
            let norm = |variables: &[Variable]| -> Result<f64> {
                let g = gradient(&learner, lesson, &[0, 1, 2, 3], &params, variables)?;
                Ok(largest(g.into_iter().map(f64::from)))
            };
            assert!(norm(&head)? > 1e-3);
            let in_trunk = norm(&learner.policy.variables())?;
            match trunk {
                Trunk::Shared => assert!(in_trunk > 1e-3, "{in_trunk}"),
                Trunk::Detached => assert_eq!(in_trunk, 0.0),
            }
        }
    }
    Ok(())
}

fn ppo(more: serde_json::Value, seed: u64) -> Result<Out> {
    ppo_against(&["1", "2", "3"], more, seed)
}

fn ppo_against(members: &[&str], more: serde_json::Value, seed: u64) -> Result<Out> {
    run_against(&Ppo, members, None, more, seed)
}

/// A run of two phases; `adaptive` is the input at the port of that name.
fn run_against<K: Kind>(
    kind: &K,
    members: &[&str],
    adaptive: Option<&Out>,
    more: serde_json::Value,
    seed: u64,
) -> Result<Out> {
    let mut bench = Bench::new();
    bench.input("policy", "Model", |folder| toys::write_model(folder, 1));
    bench.input("rewards", "Ensemble", |folder| toys::write_ensemble(folder, 1, members));
    let posts = toys::posts(8, Split::Rl).into_iter().chain(toys::posts(4, Split::Valid));
    bench.input("posts", "Posts", |folder| toys::write_posts(folder, posts));
    let mut with = json!({ "lambda": 0.1, "steps": { "n": 2 }, "rollouts": 8, "min_new_tokens": 2, "max_new_tokens": 8,
        "epochs": 2, "minibatch": 3, "lr": 1e-3, "lora": { "r": 4, "alpha": 8 }, "eval_every": 1, "greedy": "none" });
    if let (Some(with), serde_json::Value::Object(more)) = (with.as_object_mut(), more) {
        with.extend(more);
    }
    let mut inputs = bench.inputs();
    if let Some(adaptive) = adaptive {
        inputs.insert(
            "adaptive".to_owned(),
            vec![Input {
                label: "adaptive".to_owned(),
                artifact_type: PolicyRun::NAME.to_owned(),
                digest: Digest::of(b"adaptive"),
                folder: adaptive.path(),
            }],
        );
    }
    run_seeded(kind, with, inputs, seed)
}

#[test]
fn rloo_and_grpo_run_without_a_value_head_and_move_the_policy() -> Result<()> {
    let members = &["1", "2", "3"];
    let grouped = json!({ "rollouts": 4, "responses": 2 });
    let in_loss = json!({ "rollouts": 4, "responses": 2, "kl_term": "loss", "scale": false });
    for out in [
        run_against(&Rloo, members, None, grouped.clone(), 7)?,
        run_against(&Grpo, members, None, grouped, 7)?,
        run_against(&Grpo, members, None, in_loss, 7)?,
    ] {
        assert!(!out.path().join(PolicyRun::VALUE_HEAD).exists());
        let phases = PolicyRun::phases(&out.path())?;
        assert!(phases.iter().all(|p| p.value_loss.is_none() && p.explained_variance.is_none()));
        assert!(phases[1].kl_exact.is_some_and(|kl| kl > 0.0), "{:?}", phases[1]);
    }
    Ok(())
}

#[test]
fn the_exact_kl_is_zero_at_the_reference_and_near_its_estimates_after() -> Result<()> {
    let world = World::new()?;
    let params = params(Params { responses: 40, ..Params::default() });
    let of = |learner: &Learner| world.rollout(&mut world.phases(&params), learner);
    assert_eq!(largest(of(&world.learner(&params)?)?.kl_exact()), 0.0);
    let rollout = of(&world.trained(&params)?)?;
    let (exact, k1, k3) = (rollout.kl_exact(), rollout.kl(), rollout.kl_k3());
    assert!(exact.iter().all(|kl| *kl > 0.0));
    // All three estimate the same number; the exact one varies least.
    let error = 4.0 * (variance(&k1) / k1.len() as f64).sqrt();
    assert!((mean(&exact) - mean(&k1)).abs() < error, "{} {}", mean(&exact), mean(&k1));
    assert!((mean(&exact) - mean(&k3)).abs() < error, "{} {}", mean(&exact), mean(&k3));
    assert!(variance(&exact) < variance(&k1));
    Ok(())
}

#[test]
fn a_matched_arm_takes_the_kl_weighed_coefficient_of_each_phase_or_of_all() -> Result<()> {
    let adaptive = ppo(json!({}), 7)?;
    let rows = PolicyRun::phases(&adaptive.path())?;
    let lambdas = |matching: &str| -> Result<Vec<f64>> {
        let with = json!({ "objective": "matched", "matching": matching });
        let out = run_against(&Ppo, &["1", "2", "3"], Some(&adaptive), with, 7)?;
        Ok(PolicyRun::phases(&out.path())?.iter().map(|p| p.lambda_effective.expect("a coefficient")).collect())
    };
    let term = |row: &crate::types::Phase| (row.c_kl.unwrap(), row.kl_exact.unwrap(), row.c.unwrap());
    let ((c_kl_1, kl_1, c_1), (c_kl_2, kl_2, c_2)) = (term(&rows[0]), term(&rows[1]));
    assert_eq!(kl_1, 0.0, "the policy starts at the reference");
    let phases = lambdas("phases")?;
    assert!((phases[0] - c_1 / (1.0 - c_1)).abs() < 1e-12 && (phases[1] - c_kl_2 / kl_2 / (1.0 - c_2)).abs() < 1e-12);
    let constant = (c_kl_1 + c_kl_2) / (kl_1 + kl_2) / (1.0 - (c_1 + c_2) / 2.0);
    assert!(lambdas("constant")?.iter().all(|lambda| (lambda - constant).abs() < 1e-12));
    // The schedule is the default.
    let default = PpoParams::default().matching;
    assert_eq!(default, super::params::Matching::Phases);
    let error = run_against(
        &Ppo,
        &["1", "2", "3"],
        Some(&ppo(json!({ "objective": "mean" }), 7)?),
        json!({ "objective": "matched" }),
        7,
    );
    assert!(error.err().is_some_and(|e| e.message.contains("no adaptive coefficient")));
    Ok(())
}

#[test]
fn a_fixed_arm_logs_the_coefficient_that_it_would_have_had() -> Result<()> {
    let (adaptive, mean_arm) = (ppo(json!({}), 7)?, ppo(json!({ "objective": "mean" }), 7)?);
    let (a, m) = (PolicyRun::phases(&adaptive.path())?, PolicyRun::phases(&mean_arm.path())?);
    // Phase 1, which fixes b, is the same in both.
    assert_eq!((a[0].c, a[0].c_kl, a[0].one_minus_c_mu), (m[0].c, m[0].c_kl, m[0].one_minus_c_mu));
    assert_eq!((a[0].lambda_effective != m[0].lambda_effective, m[0].lambda_effective), (true, Some(0.1)));
    assert!(m[1].c.is_some() && m[1].c_kl.is_some_and(|x| x > 0.0));
    let no_kl = ppo(json!({ "objective": "mean", "lambda": 0 }), 7)?;
    assert!(PolicyRun::phases(&no_kl.path())?.iter().all(|p| p.c.is_none() && p.lambda_effective == Some(0.0)));
    Ok(())
}

#[test]
fn a_kl_target_steers_lambda_from_phase_to_phase() -> Result<()> {
    // The KL of the first phase is 0, far below any target.
    let out = ppo(json!({ "objective": "mean", "kl_target": 3, "kl_gain": 0.5, "steps": { "n": 3 } }), 7)?;
    let lambdas: Vec<f64> =
        PolicyRun::phases(&out.path())?.iter().map(|p| p.lambda_effective.expect("a coefficient")).collect();
    assert_eq!(lambdas[0], 0.1);
    assert!((lambdas[1] - 0.09).abs() < 1e-12 && (lambdas[2] - 0.081).abs() < 1e-12, "{lambdas:?}");
    Ok(())
}

#[test]
fn a_variance_relative_to_the_sft_response_is_without_offsets_by_prompt() -> Result<()> {
    let world = World::new()?;
    let params = params(Params { variance_reference: VarianceReference::Sft, ..Params::default() });
    let (learner, mut phases) = (world.trained(&params)?, world.phases(&params));
    let mut rollout = world.rollout(&mut phases, &learner)?;
    let reference = rollout.reference_scores.clone().expect("asked for");
    assert_eq!((reference.len(), reference[0].len()), (2, 11));
    let before = phases.rewards(&rollout, 0)?;
    // A member's offset on one prompt moves its score of both responses.
    for scores in [&mut rollout.scores, rollout.reference_scores.as_mut().expect("asked for")] {
        scores[1][4] += 3.0;
    }
    let after = phases.rewards(&rollout, 0)?;
    let (before, after) = (before.s2.expect("two members"), after.s2.expect("two members"));
    assert!(apart(&before, &after) < 1e-9 && before.iter().any(|s2| *s2 > 1e-3));
    // Without the reference scores, the offset becomes variance.
    rollout.reference_scores = None;
    assert!(apart(&phases.rewards(&rollout, 0)?.s2.expect("two members"), &after) > 0.5);
    Ok(())
}

#[test]
fn the_passes_end_where_the_policy_has_moved_as_far_as_stop_kl_allows() -> Result<()> {
    let steps = |with| -> Result<Vec<(i64, i64)>> {
        let phases = PolicyRun::phases(&ppo(with, 7)?.path())?;
        Ok(phases.iter().map(|p| (p.optimiser_steps, p.skipped)).collect())
    };
    assert_eq!(steps(json!({ "stop_kl": 1e9 }))?, [(6, 0), (12, 0)]);
    // Before a phase's first step the policy has not moved; the second minibatch finds that it has.
    assert_eq!(steps(json!({ "stop_kl": 1e-12 }))?, [(1, 5), (2, 5)]);
    Ok(())
}

#[test]
fn settings_that_mean_nothing_are_refused_at_planning() {
    let faults = |kind: &dyn AnyKind, with: serde_json::Value| -> Vec<String> {
        kind.normalise(&with).err().unwrap_or_default().into_iter().map(|(field, _)| field).collect()
    };
    let none: Vec<String> = Vec::new();
    for (with, told) in [
        (json!({ "objective": "mean", "lambda": 0 }), none.clone()),
        (json!({ "objective": "adaptive", "lambda": 0 }), vec!["lambda".to_owned()]),
        (json!({ "objective": "mean", "lambda": -0.1 }), vec!["lambda".to_owned()]),
        (json!({ "value": { "clip": -0.2 } }), vec!["value.clip".to_owned()]),
        (json!({ "value": { "coefficient": -1 } }), vec!["value.coefficient".to_owned()]),
        (json!({ "objective": "soft_min", "beta": 0 }), vec!["beta".to_owned()]),
        (json!({ "objective": "uwo", "k": -1 }), vec!["k".to_owned()]),
        (json!({ "objective": "adaptive", "kl_target": 3 }), vec!["kl_target".to_owned()]),
        (json!({ "objective": "mean", "kl_target": 0 }), vec!["kl_target".to_owned()]),
        (json!({ "stop_kl": 0, "steps": { "n": 2 } }), vec!["stop_kl".to_owned()]),
        (json!({ "stop_kl": 1, "steps": { "n": 2, "unit": "optimiser" } }), vec!["steps.unit".to_owned()]),
        (json!({ "objective": "mean", "kl_target": 3, "kl_gain": 5 }), vec!["kl_gain".to_owned()]),
        (json!({ "objective": "uwo", "variance_reference": "sft" }), vec!["variance_reference".to_owned()]),
    ] {
        assert_eq!(faults(&Ppo, with.clone()), told, "{with}");
    }
    assert_eq!(faults(&Rloo, json!({ "responses": 1 })), ["responses"]);
    assert_eq!(faults(&Grpo, json!({ "responses": 1 })), ["responses"]);
    assert_eq!(faults(&Rloo, json!({ "advantages": "minibatch" })), ["advantages"]);
    assert_eq!(faults(&Grpo, json!({ "objective": "matched", "kl_term": "loss" })), ["kl_term"]);
    assert_eq!(faults(&Rloo, json!({ "gae_lambda": 0.9 })).len(), 1, "RLOO has no value head");
}

#[test]
fn the_small_result_is_pinned_by_the_version() -> Result<()> {
    let phases = PolicyRun::phases(&ppo(json!({}), 7)?.path())?;
    let last = phases.last().expect("two phases");
    assert_eq!((Ppo::VERSION, lm::NUMERICS, last.optimiser_steps), (3, 5, 12));
    let found = [
        ("proxy of phase 1", phases[0].proxy),
        ("c of phase 1", phases[0].c),
        ("proxy of phase 2", last.proxy),
        ("s2", last.s2),
        ("c of phase 2", last.c),
        ("kl", last.kl),
        ("entropy", last.entropy),
        ("policy loss", last.policy_loss),
        ("value loss", last.value_loss),
    ];
    let found = found.map(|(name, x)| (name, x.expect("the adaptive objective fills every column")));
    assert_pinned(&found, &[-0.04874, 0.08898, -0.17539, 3.02297, 0.10809, 0.00590, 5.56203, -0.00746, 0.11806]);
    Ok(())
}

#[test]
fn the_small_results_of_rloo_and_grpo_are_pinned_by_their_versions() -> Result<()> {
    assert_eq!((Rloo::VERSION, Grpo::VERSION, lm::NUMERICS), (1, 1, 5));
    let members = &["1", "2", "3"];
    let with = |more: serde_json::Value| {
        let mut with = json!({ "rollouts": 4, "responses": 2 });
        with.as_object_mut().expect("a map").extend(more.as_object().expect("a map").clone());
        with
    };
    let found = |out: &Out| -> Result<Vec<(&'static str, f64)>> {
        let phases = PolicyRun::phases(&out.path())?;
        let last = phases.last().expect("two phases");
        Ok([("kl", last.kl_exact), ("policy loss", last.policy_loss), ("advantages", phases[0].advantage_std)]
            .map(|(name, x)| (name, x.expect("every kind fills it")))
            .to_vec())
    };
    let runs = [
        run_against(&Rloo, members, None, with(json!({})), 7)?,
        run_against(&Grpo, members, None, with(json!({})), 7)?,
        run_against(&Grpo, members, None, with(json!({ "kl_term": "loss" })), 7)?,
    ];
    let found: Vec<_> = runs.iter().map(found).collect::<Result<Vec<_>>>()?.concat();
    assert_pinned(&found, &[0.00674, -0.07570, 1.13426, 0.00611, -0.00379, 0.70296, 0.00607, -0.00371, 0.70296]);
    Ok(())
}

#[test]
fn a_run_starts_at_the_reference_and_logs_every_phase() -> Result<()> {
    let out = ppo(json!({}), 7)?;
    let phases = PolicyRun::phases(&out.path())?;
    assert_eq!(phases.iter().map(|p| p.phase).collect::<Vec<_>>(), [1, 2]);
    assert_eq!((phases[0].kl, phases[0].kl_k3), (Some(0.0), Some(0.0)));
    assert!(phases[1].kl_k3.is_some_and(|kl| kl > 0.0));
    let samples = PolicyRun::samples(&out.path())?.collect::<Result<Vec<_>>>()?;
    assert_eq!(samples.iter().map(|s| s.step).collect::<Vec<_>>(), [0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2]);
    assert!(samples[..4].iter().all(|s| s.logp == s.logp_ref));
    assert!(samples[8..].iter().all(|s| s.logp != s.logp_ref && s.scores.len() == 3));
    Ok(())
}

#[test]
fn one_reward_model_has_no_variance() -> Result<()> {
    let variances = |members: &[&str]| -> Result<Vec<Option<f64>>> {
        let out = ppo_against(members, json!({ "objective": "standard" }), 7)?;
        PolicyRun::samples(&out.path())?.map(|sample| Ok(sample?.variance)).collect()
    };
    assert!(variances(&["1"])?.iter().all(Option::is_none));
    assert!(variances(&["1", "2"])?.iter().all(Option::is_some));
    Ok(())
}

#[test]
fn objectives_that_read_an_ensemble_refuse_one_reward_model_at_planning() {
    let faults = |objective: &str, inputs: &[(&str, &str, serde_json::Value)]| -> Vec<&'static str> {
        let params = serde_json::from_value(json!({ "objective": objective })).expect("good parameters");
        let inputs: Vec<ConnectedInput<'_>> = inputs
            .iter()
            .map(|(port, output, params)| ConnectedInput { port, kind: Ppo::NAME, output, params })
            .collect();
        Kind::check_wiring(&Ppo, &params, &inputs).into_iter().map(|(port, _)| port).collect()
    };
    for (objective, told) in [
        ("standard", false),
        ("mean", true),
        ("pessimistic", true),
        ("mean_minus_std", true),
        ("uwo", true),
        ("soft_min", true),
        ("adaptive", true),
        ("matched", true),
    ] {
        let single = faults(objective, &[("rewards", "RewardModel", json!({}))]);
        assert_eq!(!single.is_empty(), told, "{objective}");
        assert!(faults(objective, &[("rewards", "Ensemble", json!({}))]).is_empty(), "{objective}");
    }
    let matched = |to: &str| {
        faults("matched", &[("rewards", "Ensemble", json!({})), ("adaptive", "PolicyRun", json!({ "objective": to }))])
    };
    assert_eq!((matched("adaptive"), matched("mean")), (vec![], vec!["adaptive"]));
}

#[test]
fn a_window_that_responses_fill_is_told() {
    for (max_new_tokens, told) in [(250, "post `rl0`"), (256, "`max_new_tokens` 256"), (300, "`max_new_tokens` 300")] {
        let error = ppo(json!({ "max_new_tokens": max_new_tokens }), 7).err().expect("no room for a prompt");
        assert!(error.message.contains(told), "{error}");
    }
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_another_does_not() -> Result<()> {
    let bytes = |seed| Ok::<_, engine::error::Error>(toys::bytes_of(&ppo(json!({}), seed)?.path()));
    assert_eq!(bytes(1)?, bytes(1)?);
    assert_ne!(bytes(1)?, bytes(2)?);
    Ok(())
}

#[test]
fn a_diverging_run_names_phase_step_posts_and_last_finite_loss_wherever_it_shows() {
    // With one step per phase the damage shows in the samples after it; with several, in the step after the first.
    let one = json!({ "lr": 1e30, "minibatch": 8, "epochs": 1, "eval_every": 9 });
    let evaluated = json!({ "lr": 1e30, "minibatch": 8, "epochs": 1 });
    let several = json!({ "lr": 1e30 });
    for (with, place) in
        [(one, "phase 2 of 2: "), (evaluated, "evaluation after phase 1 of 2: "), (several, "phase 1 of 2: ")]
    {
        let error = ppo(with, 7).err().expect("weights beyond all bounds");
        assert_eq!(error.exit_code(), 2);
        assert!(error.message.starts_with(&format!("{place}the ")), "{error}");
        assert!(error.message.contains(" is not finite at step "), "{error}");
        assert!(error.message.contains("(the last finite policy loss was "), "{error}");
        assert!(error.message.contains("posts `rl") || error.message.contains("posts `valid"), "{error}");
        assert!(!error.message.contains(" row "), "{error}");
        assert!(error.help.is_some_and(|help| help.contains("(it is 1e30)")));
    }
}
