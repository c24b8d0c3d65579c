//! A complete phase of `rl.ppo`, as that kind runs it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use engine::context::Context;
use engine::names::Digest;
use lm::{CausalLm, RewardModel, RewardPooling, SampleOptions, ScalarHead, StatOptions};
use stages::random::fixed_generator;
use stages::reward::LoadedReward;
use stages::rl::held_out::Prompt;
use stages::rl::loss::Value;
use stages::rl::params::{self, Params};
use stages::rl::phase::Phases;
use stages::rl::update::Learner;
use stages::types::Objective;
use stages::types::{Pooling, RewardInfo};

use crate::flops::TrainedWeights;
use crate::inputs::{self, to_message};
use crate::measure::{MeasureFn, Measurement};
use crate::shapes::{Shape, Shapes};

/// The first phase of a run, from the same state each time: the standard objective with one reward model, the adaptive
/// one with several. `trained` applies to the policy and to the reward models.
pub fn phase(s: Shape, shapes: &Shapes, trained: TrainedWeights, members: usize) -> Result<MeasureFn, String> {
    let params = params(&s, shapes, trained, members);
    let base = inputs::base(&s)?;
    let members = (0..members).map(|i| member(&base, &s, shapes, trained, i)).collect::<Result<Vec<_>, _>>()?;
    let ids = inputs::prompts(&s, s.rollouts)?;
    let prompts: Vec<Prompt> = ids.into_iter().map(|ids| Prompt { post_id: String::new(), ids }).collect();
    let sampling = SampleOptions {
        temperature: 1.0,
        top_p: 1.0,
        min_new_tokens: s.min_new,
        max_new_tokens: s.max_new,
        eos: 0.into(),
        greedy: false,
    };
    let stats = StatOptions { min_new_tokens: s.min_new, eos: 0.into(), entropy: true };
    let lora = shapes.lora;
    Ok(Box::new(move || {
        let policy = match trained {
            TrainedWeights::All => base.clone().with_full_training().map_err(to_message)?,
            TrainedWeights::Lora(_) => inputs::with_adapter(&base, lora, 0.0)?,
        };
        let mut learner = Learner::new(policy, base.frozen(), &params).map_err(to_message)?;
        let mut ctx = Context::new("rl.ppo", 7, BTreeMap::new(), PathBuf::new(), PathBuf::new());
        let mut phases = Phases::new(&params, &members, &prompts, sampling.clone(), stats.clone(), None, &ctx);
        let clock = Instant::now();
        let row = phases.run(&mut learner, 0, &mut ctx).map_err(to_message)?;
        let seconds = clock.elapsed().as_secs_f64();
        let mean_length = row.length.ok_or("a phase has no mean response length")?;
        let tokens = (mean_length * s.rollouts as f64).round() as u64;
        Ok(Measurement { seconds, tokens, flops: s.phase(members.len(), trained) })
    }))
}

fn params(s: &Shape, shapes: &Shapes, trained: TrainedWeights, members: usize) -> Params {
    let (ppo, optimiser) = (shapes.ppo, shapes.optimiser);
    let lora = match trained {
        TrainedWeights::All => None,
        TrainedWeights::Lora(r) => Some(params::Lora { r, alpha: shapes.lora.alpha }),
    };
    let params = params::PpoParams {
        objective: if members == 1 { Objective::Standard } else { Objective::Adaptive },
        lambda: ppo.kl,
        rollouts: s.rollouts,
        min_new_tokens: s.min_new,
        max_new_tokens: s.max_new,
        epochs: s.epochs,
        minibatch: s.minibatch,
        clip: ppo.clip,
        gae_lambda: ppo.gae_lambda,
        value: Value { clip: ppo.value_clip, coefficient: ppo.value_coefficient, ..Value::default() },
        lr: optimiser.lr,
        weight_decay: optimiser.weight_decay,
        max_gradient_norm: Some(optimiser.clip),
        lora,
        ..params::PpoParams::default()
    };
    params.into()
}

/// A reward model with its own head: an adapter on the shared base, or its own weights.
fn member(
    base: &CausalLm,
    s: &Shape,
    shapes: &Shapes,
    trained: TrainedWeights,
    i: usize,
) -> Result<LoadedReward, String> {
    let lm = match trained {
        TrainedWeights::All => base.clone().with_full_training().map_err(to_message)?,
        TrainedWeights::Lora(_) => inputs::with_adapter(base, shapes.lora, 0.0)?,
    };
    let d = s.d;
    let head = ScalarHead::init(d, 0.1, &mut fixed_generator(i as u64, "reward head")).map_err(to_message)?;
    let base_digest = Digest::of(b"bench");
    let config = RewardInfo {
        pool: Pooling::Last,
        centre: 0.0,
        scale: 1.0,
        base_digest,
        member_seed: i as u64,
        fact_sensitivity: None,
        more: serde_json::Map::new(),
    };
    let model = RewardModel { lm, head, pool: RewardPooling::Last }.frozen();
    Ok(LoadedReward { model, centre: 0.0, scale: 1.0, base_digest, config })
}
