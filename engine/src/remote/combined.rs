//! The local store together with a remote one, as planner and runner see them.

use super::Remote;
use crate::error::Result;
use crate::external::ExternalInput;
use crate::names::{Digest, Key};
use crate::plan::{Plan, PlannedState, StoreView};
use crate::store::{ExternalContent, Presence, Store};

/// Answers from the local store first. Artifacts that only the remote has count as present: the runner fetches
/// them before they are read.
#[derive(Clone, Copy, Debug)]
pub struct CombinedStore<'a> {
    pub store: &'a Store,
    pub remote: Option<&'a Remote>,
}

impl CombinedStore<'_> {
    /// By instance: whether it is reused with a record or bytes that only the remote has.
    pub fn reused_from_remote(&self, plan: &Plan) -> Result<Vec<bool>> {
        let Some(remote) = self.remote else { return Ok(vec![false; plan.stages.len()]) };
        let remote_only = |state: &PlannedState| match state {
            PlannedState::Reuse { key, digest } => Ok(self.store.recorded_digest(key)?.is_none()
                || (remote.has_artifact(digest) && self.store.presence(digest)? != Presence::Intact)),
            _ => Ok(false),
        };
        plan.stages.iter().map(|planned| remote_only(&planned.state)).collect()
    }
}

impl StoreView for CombinedStore<'_> {
    fn recorded_digest(&self, key: &Key) -> Result<Option<Digest>> {
        let local = self.store.recorded_digest(key)?;
        Ok(local.or_else(|| self.remote?.lookup(key)))
    }

    fn presence(&self, digest: &Digest) -> Result<Presence> {
        let local = self.store.presence(digest)?;
        let remote = local != Presence::Intact && self.remote.is_some_and(|remote| remote.has_artifact(digest));
        Ok(if remote { Presence::Intact } else { local })
    }

    fn content_of(&self, external: &ExternalInput) -> Result<ExternalContent> {
        self.store.content_of(external)
    }
}
