//! Decides whether an instance is reused or must run, once its key is known.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Flags;
use crate::error::Result;
use crate::external::External;
use crate::names::{Digest, InstanceName, Key};
use crate::store::{Content, Presence, Store};

/// The queries that planning makes to a store.
pub trait Index {
    /// The digest in the record at a key.
    fn recorded(&self, key: &Key) -> Result<Option<Digest>>;
    /// Whether an artifact is present and undamaged.
    fn presence(&self, digest: &Digest) -> Result<Presence>;
    /// The digest of files outside the store.
    fn content_of(&self, external: &External) -> Result<Content>;
}

impl Index for Store {
    fn recorded(&self, key: &Key) -> Result<Option<Digest>> {
        Store::recorded(self, key)
    }

    fn presence(&self, digest: &Digest) -> Result<Presence> {
        Store::presence(self, digest)
    }

    fn content_of(&self, external: &External) -> Result<Content> {
        Store::content_of(self, external)
    }
}

/// Whether the artifact's bytes are needed, or only its digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bytes {
    Needed,
    NotNeeded,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Decision {
    Reuse(Digest),
    Run(Reason),
}

/// Why an instance must run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "why", rename_all = "snake_case")]
pub enum Reason {
    /// This recipe has never been run to completion.
    NoRecord,
    /// `--force`.
    Forced,
    /// There is a record, but its artifact is missing and the bytes are needed.
    ArtifactMissing,
    /// There is a record, but its artifact is damaged and the bytes are needed.
    ArtifactRotten { file: String },
}

impl Reason {
    /// Whether this recipe was run to completion before and only its artifact is lost.
    pub fn is_repair(&self) -> bool {
        matches!(self, Self::ArtifactMissing | Self::ArtifactRotten { .. })
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRecord => f.write_str("no record of this recipe"),
            Self::Forced => f.write_str("forced"),
            Self::ArtifactMissing => f.write_str("artifact missing"),
            Self::ArtifactRotten { file } => write!(f, "artifact damaged: {file}"),
        }
    }
}

/// Whether the record at `key` can be reused. Called by the planner and by the runner; the runner calls it again under
/// the key's lock.
pub fn decide(instance: &InstanceName, key: &Key, bytes: Bytes, flags: &Flags, index: &dyn Index) -> Result<Decision> {
    if flags.force.contains(instance) {
        return Ok(Decision::Run(Reason::Forced));
    }
    let Some(digest) = index.recorded(key)? else { return Ok(Decision::Run(Reason::NoRecord)) };
    let lacking = match bytes {
        Bytes::Needed => lacking(index.presence(&digest)?),
        Bytes::NotNeeded => None,
    };
    Ok(lacking.map_or(Decision::Reuse(digest), Decision::Run))
}

/// Why needed bytes must be made again; `None` if they are present.
pub(super) fn lacking(presence: Presence) -> Option<Reason> {
    match presence {
        Presence::Whole => None,
        Presence::Missing => Some(Reason::ArtifactMissing),
        Presence::Rotten { file } => Some(Reason::ArtifactRotten { file }),
    }
}
