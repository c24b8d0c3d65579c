//! The local store together with a remote one, as planner and runner see them.

use super::Remote;
use crate::error::Result;
use crate::external::External;
use crate::names::{Digest, Key};
use crate::plan::{Index, Plan, State};
use crate::store::{Content, Presence, Store};

/// Answers from the local store first. What only the remote has counts as present: the runner fetches it before it is
/// read.
#[derive(Clone, Copy, Debug)]
pub struct Shared<'a> {
    pub store: &'a Store,
    pub remote: Option<&'a Remote>,
}

impl Shared<'_> {
    /// By instance: whether it is reused with a record or bytes that only the remote has.
    pub fn from_remote(&self, plan: &Plan) -> Result<Vec<bool>> {
        let Some(remote) = self.remote else { return Ok(vec![false; plan.stages.len()]) };
        let remote_only = |state: &State| match state {
            State::Reuse { key, digest } => Ok(self.store.recorded(key)?.is_none()
                || (remote.holds(digest) && self.store.presence(digest)? != Presence::Whole)),
            _ => Ok(false),
        };
        plan.stages.iter().map(|planned| remote_only(&planned.state)).collect()
    }
}

impl Index for Shared<'_> {
    fn recorded(&self, key: &Key) -> Result<Option<Digest>> {
        let local = self.store.recorded(key)?;
        Ok(local.or_else(|| self.remote?.lookup(key)))
    }

    fn presence(&self, digest: &Digest) -> Result<Presence> {
        let local = self.store.presence(digest)?;
        let remote = local != Presence::Whole && self.remote.is_some_and(|remote| remote.holds(digest));
        Ok(if remote { Presence::Whole } else { local })
    }

    fn content_of(&self, external: &External) -> Result<Content> {
        self.store.content_of(external)
    }
}

/// The key and digest in the name of an index entry; `None` for any other name.
pub(super) fn parse(name: &str) -> Option<(Key, Digest)> {
    let (key, digest) = name.rsplit('/').next()?.split_once('-')?;
    Some((key.parse().ok()?, digest.parse().ok()?))
}

pub(super) fn name(key: &Key, digest: &Digest) -> String {
    format!("index/{key}-{digest}")
}
