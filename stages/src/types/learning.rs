//! The learning curve that training writes into its artifact's folder.

use std::path::Path;

use engine::artifact::Facts;
use engine::error::Result;

use crate::table;

/// File name of the table. Artifacts of older versions, imported models and members of an ensemble have none.
pub const LEARNING: &str = "learning.parquet";

crate::table! {
    /// One optimiser step.
    pub struct LearningPoint {
        /// Counts from 1.
        pub step: i64,
        /// Mean over the step's batch, before the update.
        pub loss: f64,
        /// Learning rate.
        pub lr: f64,
        /// L2 norm over all trained weights, before clipping.
        pub grad_norm: f64,
    }
}

impl LearningPoint {
    /// The curve in an artifact's folder, in step order; empty if there is none.
    ///
    /// # Errors
    /// If the table is damaged.
    pub fn read(folder: &Path) -> Result<Vec<Self>> {
        let path = folder.join(LEARNING);
        if path.is_file() { table::read(&path) } else { Ok(Vec::new()) }
    }

    /// # Errors
    /// If the table cannot be written.
    pub fn write(folder: &Path, curve: Vec<Self>) -> Result<()> {
        table::write(&folder.join(LEARNING), curve).map(drop)
    }

    /// Counts the rows of the table, if there is one.
    ///
    /// # Errors
    /// If the table is damaged or has other columns.
    pub(super) fn check(folder: &Path, facts: &mut Facts) -> Result<()> {
        let path = folder.join(LEARNING);
        if path.exists() { table::check::<Self>(&path, facts) } else { Ok(()) }
    }
}
