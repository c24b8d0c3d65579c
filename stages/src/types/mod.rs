//! The artifact types: contents of each folder, checks, typed readers and writers.

pub mod agreement;
pub mod best_of_n;
pub mod comparisons;
pub mod evaluation;
pub mod files;
pub mod folder;
pub mod json_lines;
pub mod learning;
pub mod model;
pub mod objective;
pub mod pairs;
pub mod policy;
pub mod posts;
pub mod preferences;
pub mod reward;
pub mod tokenizer;

pub use agreement::Agreement;
pub use best_of_n::BestOfN;
pub use comparisons::Comparisons;
pub use evaluation::{
    BestOfPoint, CalibrationBin, CurvePoint, Evaluation, EvaluationInfo, Example, Mechanism, Score, SftScale,
};
pub use files::Files;
pub use learning::{LEARNING, LearningPoint};
pub use model::{Model, ModelOutline};
pub use objective::Objective;
pub use pairs::{Corruption, Pair, Pairs, Side};
pub use policy::{Half, Phase, PolicyInfo, PolicyRun, Sample};
pub use posts::{Post, Posts, Split};
pub use preferences::{Aspect, Outcome, Preference, Preferences};
pub use reward::{Ensemble, EnsembleInfo, FactSensitivity, Pooling, RewardInfo, RewardModel};
pub use tokenizer::Tokenizer;

use engine::kind::Registry;

#[cfg(test)]
mod tests;

/// Adds every artifact type.
pub fn register(registry: Registry) -> Registry {
    registry
        .artifact_type(Posts)
        .artifact_type(Tokenizer)
        .artifact_type(Model)
        .artifact_type(Pairs)
        .artifact_type(Preferences)
        .artifact_type(RewardModel)
        .artifact_type(Ensemble)
        .artifact_type(PolicyRun)
        .artifact_type(BestOfN)
        .artifact_type(Evaluation)
        .artifact_type(Agreement)
        .artifact_type(Comparisons)
        .artifact_type(Files)
}
