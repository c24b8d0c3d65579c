//! The stage kinds. The path of a kind is its name: `generate.pairs` is in `generate/pairs`.

pub mod annotate;
pub mod command;
pub mod dataset;
pub mod evaluate;
pub mod generate;
pub mod model;
pub mod reward;
pub mod rl;
pub mod sft;
pub mod tokenizer;

use engine::kind::Registry;

/// Adds every kind.
pub fn register(registry: Registry) -> Registry {
    registry
        .kind(annotate::Gold)
        .kind(generate::GenerateContrast)
        .kind(dataset::DatasetComparisons)
        .kind(dataset::DatasetTinyTldr)
        .kind(model::import::Import)
        .kind(model::pretrain::Pretrain)
        .kind(generate::GeneratePairs)
        .kind(generate::GenerateBestOfN)
        .kind(reward::RewardEnsemble)
        .kind(reward::RewardTrain)
        .kind(sft::Sft)
        .kind(dataset::Tldr)
        .kind(dataset::Filter)
        .kind(rl::Ppo)
        .kind(rl::Rloo)
        .kind(rl::Grpo)
        .kind(evaluate::Evaluate)
        .kind(tokenizer::Train)
        .kind(tokenizer::Import)
        .kind(annotate::Reference)
        .kind(annotate::Human)
        .kind(annotate::Claude)
        .kind(annotate::Openai)
        .kind(annotate::Local)
        .kind(annotate::Agree)
        .kind(dataset::DatasetPairs)
        .kind(command::Command)
}
