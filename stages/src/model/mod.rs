//! Language models as artifacts: loading, saving, and downloads from a hub.

pub mod chat;
pub mod forecast;
pub mod source;

use std::path::Path;

use engine::error::{AtPath, Result};
use engine::names::Digest;
use lm::{CausalLm, ModelConfig, Tokenizer, WeightType};

use crate::error::IntoStageResult;
use crate::train::Weights;
use crate::types::Model;

/// Loads a Model folder or a GGUF file, frozen, with its tokenizer.
///
/// # Errors
/// If a file is missing, if a tensor is missing, has another shape or is not part of the model, if the tokenizer has
/// more tokens than the model, or if no end-of-text token can be found.
pub fn load(path: &Path) -> Result<(CausalLm, Tokenizer)> {
    let model = CausalLm::load(path).into_stage_result()?;
    let tokenizer = tokenizer_for(path, model.config())?;
    Ok((model, tokenizer))
}

/// Loads the tokenizer of a Model folder without its weights.
///
/// # Errors
/// Same as [`load`].
pub fn load_tokenizer(folder: &Path) -> Result<Tokenizer> {
    tokenizer_for(folder, &ModelConfig::load(folder).into_stage_result()?)
}

/// BLAKE3 of a model folder's tokenizer: models with equal digests share token ids without decoding.
pub fn tokenizer_digest(folder: &Path) -> Result<Digest> {
    let path = folder.join(Model::TOKENIZER);
    Ok(Digest::of(&std::fs::read(&path).at(&path)?))
}

fn tokenizer_for(path: &Path, config: &ModelConfig) -> Result<Tokenizer> {
    Tokenizer::load_for(path, config).into_stage_result()
}

/// Writes a Model folder.
pub fn save(model: &CausalLm, tokenizer: &Tokenizer, folder: &Path, weights: Weights) -> Result<()> {
    std::fs::create_dir_all(folder).at(folder)?;
    let weights = match weights {
        Weights::F32 => WeightType::F32,
        Weights::F16 => WeightType::F16,
    };
    model.save(folder, weights).into_stage_result()?;
    tokenizer.save(&folder.join(Model::TOKENIZER)).into_stage_result()
}
