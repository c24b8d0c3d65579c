//! Reuse or run, once a key is known. Knows no graph.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Flags;
use crate::error::Result;
use crate::external::External;
use crate::names::{Digest, InstanceName, Key};
use crate::store::{Content, Presence, Store};

/// What planning asks of a store.
pub trait Index {
    /// The digest in the record at a key.
    fn recorded(&self, key: &Key) -> Result<Option<Digest>>;
    /// Whether an artifact can be read.
    fn presence(&self, digest: &Digest) -> Result<Presence>;
    /// What files outside the store hold.
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

/// Whether somebody needs the artifact itself, or only its digest.
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
    /// This recipe was never run to its end.
    NoRecord,
    /// `--force`.
    Forced,
    /// There is a record, its artifact is gone, and somebody needs the bytes.
    ArtifactMissing,
    /// The same, the artifact being damaged.
    ArtifactRotten { file: String },
}

impl Reason {
    /// Whether this recipe has run to its end and only its artifact is lost.
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

/// Whether the record at `key` will do. The planner and the runner call this alike; the runner again under the key's lock.
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

/// Why bytes that are needed must be made again, if they must.
pub(super) fn lacking(presence: Presence) -> Option<Reason> {
    match presence {
        Presence::Whole => None,
        Presence::Missing => Some(Reason::ArtifactMissing),
        Presence::Rotten { file } => Some(Reason::ArtifactRotten { file }),
    }
}
