//! Fetches from the remote store what a plan reuses.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::ledger::Ledger;
use super::node::Work;
use crate::error::Result;
use crate::graph::Graph;
use crate::journal::Event;
use crate::kind::Registry;
use crate::names::{Digest, Key};
use crate::plan::{Bytes, Flags, Plan, State, plan_through};
use crate::remote::{Remote, Shared, Wanted};
use crate::store::{Presence, Store};

/// Minimum time between two events of a transfer's progress.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// Fetches the records that the plan reuses, and the bytes of targets and of the inputs of stages that run. If something
/// cannot be had, plans again without it; returns the last such plan.
///
/// # Errors
/// When the local disk fails, or planning.
pub(super) fn supply(
    plan: &Plan,
    graph: &Graph,
    registry: &Registry,
    shared: Shared<'_>,
    flags: &Flags,
    ledger: &mut Ledger<'_>,
) -> Result<Option<Plan>> {
    let Some(remote) = shared.remote else { return Ok(None) };
    let mut replanned = None;
    while !fetch(replanned.as_ref().unwrap_or(plan), graph, shared.store, remote, ledger)? {
        warn(shared, ledger);
        let plan = plan_through(graph, registry, shared.store, &shared, flags)?;
        ledger.planned(&plan);
        replanned = Some(plan);
    }
    warn(shared, ledger);
    Ok(replanned)
}

/// Passes the remote's warnings on.
pub(super) fn warn(shared: Shared<'_>, ledger: &mut Ledger<'_>) {
    for message in shared.remote.map(Remote::take_warnings).unwrap_or_default() {
        ledger.tell(Event::Warning { stage: None, message });
    }
}

/// Returns whether everything that is needed is there now.
fn fetch(plan: &Plan, graph: &Graph, store: &Store, remote: &Remote, ledger: &mut Ledger<'_>) -> Result<bool> {
    let mut records = Vec::new();
    for planned in &plan.stages {
        if let State::Reuse { key, digest } = planned.state
            && store.recorded(&key)?.is_none()
        {
            records.push((key, digest));
        }
    }
    let clock = Instant::now();
    if remote.fetch_records(store, &records)? > 0 {
        return Ok(false);
    }
    let needed = needed(plan, graph);
    let mut wanted = Vec::new();
    for planned in &plan.stages {
        if let State::Reuse { digest, .. } = planned.state
            && remote.holds(&digest)
            && store.presence(&digest)? != Presence::Whole
        {
            let artifact_type = graph.instances[planned.instance].signature.output.clone();
            wanted.push(Wanted { digest, artifact_type, needed: needed.contains(&planned.instance) });
        }
    }
    let told = RefCell::new((Instant::now(), &mut *ledger));
    let moved = remote.fetch_artifacts(store, &wanted, &|bytes, total_bytes| {
        let (last, ledger) = &mut *told.borrow_mut();
        if last.elapsed() >= PROGRESS_EVERY {
            *last = Instant::now();
            ledger.tell(Event::Transfer { upload: false, bytes, total_bytes });
        }
    })?;
    if !records.is_empty() || moved.artifacts > 0 {
        let (records, seconds) = (records.len() as u64, clock.elapsed().as_secs_f64());
        ledger.tell(Event::Transferred { upload: false, records, files: moved.artifacts, bytes: moved.bytes, seconds });
    }
    Ok(moved.failed == 0)
}

/// The instances whose bytes are known to be needed: targets, and inputs of those that run.
fn needed(plan: &Plan, graph: &Graph) -> BTreeSet<usize> {
    let runs = plan.stages.iter().filter(|planned| matches!(planned.state, State::Run { .. }));
    let inputs = runs.flat_map(|planned| &graph.instances[planned.instance].inputs);
    let inputs = inputs.flat_map(|port| &port.from).map(|source| source.instance);
    inputs.chain(graph.targets.iter().copied()).collect()
}

impl<'a> Work<'a> {
    /// The store with the remote one.
    pub fn shared(&self) -> Shared<'a> {
        Shared { store: self.store, remote: self.options.remote.as_deref() }
    }

    /// Fetches the record of a reused instance if only the remote has it, and its bytes if they are needed. Returns
    /// false if the remote could not give them.
    pub fn obtain(&self, node: usize, key: &Key, digest: &Digest) -> Result<bool> {
        let Some(remote) = self.shared().remote else { return Ok(true) };
        if self.store.recorded(key)?.is_none() && remote.fetch_records(self.store, &[(*key, *digest)])? > 0 {
            return Ok(false);
        }
        match self.bytes[node] {
            Bytes::Needed if self.store.presence(digest)? != Presence::Whole => self.fetch_input(node, digest),
            _ => Ok(true),
        }
    }

    /// Fetches the artifact of an instance. Returns whether it is there now.
    pub fn fetch_input(&self, node: usize, digest: &Digest) -> Result<bool> {
        let Some(remote) = self.shared().remote.filter(|remote| remote.holds(digest)) else { return Ok(false) };
        let artifact_type = self.instance(node).signature.output.clone();
        let wanted = Wanted { digest: *digest, artifact_type, needed: true };
        Ok(remote.fetch_artifacts(self.store, &[wanted], &|_, _| {})?.failed == 0)
    }

    /// Hands the record at a key to the uploads.
    pub fn offer(&self, key: Key) {
        if let Some(uploads) = &self.uploads {
            // Fails only if the thread has ended with an error, which the end of the run reports.
            let _ = uploads.send(key);
        }
    }
}
