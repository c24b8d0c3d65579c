//! What an attempt is told and what it tells last: the two documents that cross the process border besides `Tell`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::checkpoint::Cadence;
use crate::context::Input;
use crate::error::{At, Error, Result};
use crate::names::Digest;

/// All that an attempt knows: no pipeline file, no graph. Holds no secrets; those are in its environment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// For messages only.
    pub stage: String,
    pub kind: String,
    /// The kind's version as planned; a binary with another one refuses.
    pub version: u32,
    /// As normalised.
    pub params: Value,
    pub seed: u64,
    /// By port, in the order of the pipeline file.
    pub inputs: BTreeMap<String, Vec<Input>>,
    /// Name of the artifact type to give.
    pub output: String,
    /// Root of the store.
    pub store: PathBuf,
    /// The folder to fill: exists and is empty.
    pub out: PathBuf,
    pub checkpoints: PathBuf,
    /// Where paid answers are kept.
    pub requests: PathBuf,
    /// Whether the kind may ask for what costs money.
    pub may_pay: bool,
    /// Whether the user allowed paying again for what was paid for and is lost (`--pay`).
    pub may_pay_again: bool,
    pub cadence: Cadence,
    pub threads: usize,
}

impl Job {
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text =
            serde_json::to_vec_pretty(self).map_err(|e| Error::ours(format!("a job does not serialise: {e}")))?;
        std::fs::write(path, text).at(path)
    }

    /// # Errors
    /// When the file cannot be read or is no job.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read(path).at(path)?;
        serde_json::from_slice(&text).map_err(|e| Error::yours(format!("{}: no job file: {e}", path.display())))
    }
}

/// The last line that an attempt says.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "tell", rename_all = "lowercase")]
pub enum Last {
    Done {
        digest: Digest,
        /// The most memory that the attempt had resident.
        #[serde(default)]
        peak_bytes: u64,
    },
    Failed {
        error: Error,
    },
}
