//! Shared parts of all training stages: parameters, batches, the step, tables of sequences.

pub mod batches;
pub mod checkpoint;
pub mod encode;
pub mod language;
pub mod params;
#[cfg(test)]
mod resuming_tests;
pub mod sequences;
pub mod step;

pub use batches::{BatchOrder, by_length, micro_batches};
pub(crate) use params::learning;
pub use params::{Adapter, Learning, Length, Lora, Precision, Weights};
pub use sequences::SequenceTable;
pub use step::{MicroBatchLoss, TrainPlan, Trainer};
