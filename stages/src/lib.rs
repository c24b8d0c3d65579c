//! Stage kinds and artifact types of temper.

#[macro_use]
pub mod table;
pub mod annotate;
pub mod assets;
pub mod best_of_n;
pub mod command;
pub mod contrast;
pub mod corpus;
pub mod data;
pub mod evaluate;
pub mod http;
pub mod hub;
pub mod model;
pub mod pairs;
pub mod paper;
pub mod prompt;
pub mod quality;
pub mod reward;
pub mod rl;
pub mod services;
pub mod sft;
pub mod stats;
pub mod tokenizer;
pub mod train;
pub mod types;

#[cfg(test)]
mod testing;

use engine::kind::Registry;

/// The registry of every artifact type and stage kind.
pub fn registry() -> Registry {
    types::register(Registry::default())
        .kind(annotate::Gold)
        .kind(contrast::GenerateContrast)
        .kind(corpus::DatasetComparisons)
        .kind(corpus::DatasetTinyTldr)
        .kind(model::import::Import)
        .kind(model::pretrain::Pretrain)
        .kind(pairs::GeneratePairs)
        .kind(best_of_n::GenerateBestOfN)
        .kind(reward::ensemble::RewardEnsemble)
        .kind(reward::train::RewardTrain)
        .kind(sft::Sft)
        .kind(data::Tldr)
        .kind(data::Filter)
        .kind(rl::Ppo)
        .kind(rl::Rloo)
        .kind(rl::Grpo)
        .kind(evaluate::Evaluate)
        .kind(tokenizer::Train)
        .kind(tokenizer::Import)
        .kind(annotate::Reference)
        .kind(annotate::Human)
        .kind(annotate::Claude)
        .kind(annotate::Agree)
        .kind(annotate::DatasetPairs)
        .kind(command::Command)
}
