//! The first and the last message between orchestrator and attempt: the [`Job`] file, and [`FinalMessage`], which ends
//! the stream of [`StageEvent`](crate::context::StageEvent)s.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::context::{Cadence, Input};
use crate::disk;
use crate::error::{AtPath, Error, Result};
use crate::names::Digest;

/// Everything that an attempt is given; it sees neither the pipeline file nor the graph. Holds no secrets; those are in
/// its environment.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// For messages only.
    pub stage: String,
    pub kind: String,
    /// The kind's version at planning; a binary with another version refuses the job.
    pub version: u32,
    /// As normalised by the kind.
    pub params: Value,
    pub seed: u64,
    /// Keyed by port, in the order of the pipeline file.
    pub inputs: BTreeMap<String, Vec<Input>>,
    /// Name of the artifact type to produce.
    pub output: String,
    /// Root of the store.
    pub store: PathBuf,
    /// The folder to fill; exists and is empty.
    pub out: PathBuf,
    pub checkpoints: PathBuf,
    /// Folder for the answers to paid requests.
    pub requests: PathBuf,
    /// Whether the kind may send paid requests.
    pub may_pay: bool,
    /// Whether the user allowed (`--pay`) paying again for answers that were paid for and lost.
    pub may_pay_again: bool,
    pub cadence: Cadence,
    /// The device that the attempt computes on.
    pub device: String,
    pub threads: usize,
    /// Whether to confine the kind to its inputs and its own folders, where the kernel can.
    #[serde(default)]
    pub confine: bool,
    /// For an attempt that runs without a connection to its orchestrator.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub detached: Option<Detached>,
}

/// What ties an attempt on another machine to the store.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Detached {
    /// The file of the key's lease.
    pub lease: PathBuf,
    /// Time between two signs of life.
    pub heartbeat_seconds: f64,
}

impl Job {
    /// # Errors
    /// When the file cannot be written.
    pub fn write(&self, path: &Path) -> Result<()> {
        let text =
            serde_json::to_vec_pretty(self).map_err(|e| Error::internal(format!("cannot serialise a job: {e}")))?;
        disk::write(path, text).at(path)
    }

    /// # Errors
    /// When the file cannot be read or is not a job file.
    pub fn read(path: &Path) -> Result<Self> {
        let text = std::fs::read(path).at(path)?;
        serde_json::from_slice(&text).map_err(|e| Error::user(format!("{}: not a job file: {e}", path.display())))
    }
}

/// The last line that an attempt writes.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "tell", rename_all = "lowercase")]
pub enum FinalMessage {
    Done {
        digest: Digest,
        /// Peak resident memory of the attempt.
        #[serde(default)]
        peak_bytes: u64,
    },
    Failed {
        error: Error,
    },
}
