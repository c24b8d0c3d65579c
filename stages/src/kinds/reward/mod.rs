//! Kinds that train a reward model or combine several into an ensemble.

pub mod ensemble;
pub mod train;

#[cfg(test)]
mod tests;

pub use ensemble::RewardEnsemble;
pub use train::RewardTrain;
