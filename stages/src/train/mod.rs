//! Shared parts of all training stages: parameters, batches, the step, tables of sequences.

pub mod batches;
pub mod checkpoint;
pub mod encode;
pub mod fail;
pub mod language;
pub mod params;
pub mod random;
#[cfg(test)]
mod resuming_tests;
pub mod sequences;
pub mod step;

pub use batches::{BatchOrder, by_length, micro_batches};
pub use fail::{IntoStageResult, named, number, on_a_big_stack, rounded};
pub(crate) use params::learning;
pub use params::{Adapter, Learning, Length, Lora, Precision, Weights};
pub use random::{fixed_generator, fixed_key, share_of, shuffle};
pub use sequences::SequenceTable;
pub use step::{Part, TrainPlan, Trainer};
