//! Decides whether an instance is reused or must run, once its key is known.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::Flags;
use crate::error::Result;
use crate::external::ExternalInput;
use crate::names::{Digest, InstanceName, Key};
use crate::store::{ExternalContent, Presence, Store};

/// The queries that planning makes to a store.
pub trait StoreView {
    /// The digest in the record at a key.
    fn recorded_digest(&self, key: &Key) -> Result<Option<Digest>>;
    /// Whether an artifact is present and undamaged.
    fn presence(&self, digest: &Digest) -> Result<Presence>;
    /// The digest of files outside the store.
    fn content_of(&self, external: &ExternalInput) -> Result<ExternalContent>;
}

impl StoreView for Store {
    fn recorded_digest(&self, key: &Key) -> Result<Option<Digest>> {
        Store::recorded_digest(self, key)
    }

    fn presence(&self, digest: &Digest) -> Result<Presence> {
        Store::presence(self, digest)
    }

    fn content_of(&self, external: &ExternalInput) -> Result<ExternalContent> {
        Store::content_of(self, external)
    }
}

/// Whether the artifact's bytes are needed, or only its digest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ArtifactNeed {
    Bytes,
    DigestOnly,
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
    #[serde(rename = "artifact_rotten")]
    ArtifactDamaged { file: String },
}

impl Reason {
    /// Whether this recipe was run to completion before and only its artifact is lost.
    pub fn is_repair(&self) -> bool {
        matches!(self, Self::ArtifactMissing | Self::ArtifactDamaged { .. })
    }
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::NoRecord => f.write_str("no record of this recipe"),
            Self::Forced => f.write_str("forced"),
            Self::ArtifactMissing => f.write_str("artifact missing"),
            Self::ArtifactDamaged { file } => write!(f, "artifact damaged: {file}"),
        }
    }
}

/// Whether the record at `key` can be reused. Called by the planner and by the runner; the runner calls it again under
/// the key's lock.
pub fn decide(
    instance: &InstanceName,
    key: &Key,
    need: ArtifactNeed,
    flags: &Flags,
    store: &dyn StoreView,
) -> Result<Decision> {
    if flags.force.contains(instance) {
        return Ok(Decision::Run(Reason::Forced));
    }
    let Some(digest) = store.recorded_digest(key)? else { return Ok(Decision::Run(Reason::NoRecord)) };
    let reason = match need {
        ArtifactNeed::Bytes => damage_reason(store.presence(&digest)?),
        ArtifactNeed::DigestOnly => None,
    };
    Ok(reason.map_or(Decision::Reuse(digest), Decision::Run))
}

/// Why needed bytes must be made again; `None` if they are present.
pub(super) fn damage_reason(presence: Presence) -> Option<Reason> {
    match presence {
        Presence::Intact => None,
        Presence::Missing => Some(Reason::ArtifactMissing),
        Presence::Damaged { file } => Some(Reason::ArtifactDamaged { file }),
    }
}
