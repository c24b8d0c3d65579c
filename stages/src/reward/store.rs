//! Reward models and ensembles in memory.

use std::path::Path;

use engine::error::Result;
use engine::names::Digest;
use lm::{CausalLm, RewardModel, RewardPooling, ScalarHead, Tokenizer};

use crate::error::IntoStageResult;
use crate::model;
use crate::types::reward::{ADAPTER, BASE, HEAD, MEMBERS};
use crate::types::{self, Ensemble, Pooling, RewardInfo};

/// A reward model in memory, frozen.
#[derive(Clone)]
pub struct LoadedReward {
    pub model: RewardModel,
    /// Subtracted from every score.
    pub centre: f64,
    /// Divisor of the centred score.
    pub scale: f64,
    /// Digest of the Model artifact that training started from.
    pub base_digest: Digest,
    pub config: RewardInfo,
}

/// Loads a RewardModel folder.
pub fn load_reward_model(folder: &Path) -> Result<LoadedReward> {
    let base = CausalLm::load(&folder.join(BASE)).into_stage_result()?;
    load_member(&base, folder)
}

/// Loads an Ensemble folder, in member order. Members share one base in memory, except members with another base or
/// with all weights trained.
pub fn load_ensemble(folder: &Path) -> Result<Vec<LoadedReward>> {
    let info = Ensemble::info(folder)?;
    let base = CausalLm::load(&folder.join(BASE)).into_stage_result()?;
    let mut members = Vec::with_capacity(info.members.len());
    for label in &info.members {
        let own = folder.join(MEMBERS).join(label);
        members.push(if own.join(BASE).is_dir() { load_reward_model(&own)? } else { load_member(&base, &own)? });
    }
    Ok(members)
}

/// The tokenizer of a RewardModel or Ensemble folder.
pub fn load_tokenizer(folder: &Path) -> Result<Tokenizer> {
    model::load_tokenizer(&folder.join(BASE))
}

fn load_member(base: &CausalLm, folder: &Path) -> Result<LoadedReward> {
    let config = types::RewardModel::info(folder)?;
    let adapter = folder.join(ADAPTER);
    let lm = if adapter.is_dir() { base.load_adapter(&adapter).into_stage_result()? } else { base.clone() };
    let head = ScalarHead::load(&folder.join(HEAD), base.config().width()).into_stage_result()?;
    let model = RewardModel { lm, head, pool: pool(config.pool) }.frozen();
    Ok(LoadedReward { model, centre: config.centre, scale: config.scale, base_digest: config.base_digest, config })
}

pub fn pool(pooling: Pooling) -> RewardPooling {
    match pooling {
        Pooling::Last => RewardPooling::Last,
        Pooling::Sum => RewardPooling::Sum,
    }
}
