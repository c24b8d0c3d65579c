//! Optimisation: AdamW with checkpointable state, learning-rate schedules.

mod adamw;
mod schedule;
mod state;

pub use adamw::{AdamW, AdamWConfig, StepNorms};
pub use schedule::{LrDecay, LrSchedule};
