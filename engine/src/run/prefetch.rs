//! Fetches the records and artifacts that a plan reuses from the remote store.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use super::node_runner::NodeRunner;
use super::run_state::RunState;
use crate::error::Result;
use crate::graph::Graph;
use crate::journal::Event;
use crate::kind::Registry;
use crate::names::{Digest, Key};
use crate::plan::{ArtifactNeed, Flags, Plan, PlannedState, plan_with_view};
use crate::remote::{ArtifactRequest, CombinedStore, Remote};
use crate::store::{Presence, Store};

/// Minimum time between two events of a transfer's progress.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// Fetches the records that the plan reuses, and the bytes of targets and of the inputs of stages that run. If something
/// cannot be fetched, plans again without it; returns the last such plan.
///
/// # Errors
/// When the local disk fails, or planning.
pub(super) fn prefetch(
    plan: &Plan,
    graph: &Graph,
    registry: &Registry,
    combined: CombinedStore<'_>,
    flags: &Flags,
    run_state: &mut RunState<'_>,
) -> Result<Option<Plan>> {
    let Some(remote) = combined.remote else { return Ok(None) };
    let mut replanned = None;
    while !fetch(replanned.as_ref().unwrap_or(plan), graph, combined.store, remote, run_state)? {
        emit_warnings(combined, run_state);
        let plan = plan_with_view(graph, registry, combined.store, &combined, flags)?;
        run_state.planned(&plan);
        replanned = Some(plan);
    }
    emit_warnings(combined, run_state);
    Ok(replanned)
}

/// Emits the remote's warnings.
pub(super) fn emit_warnings(combined: CombinedStore<'_>, run_state: &mut RunState<'_>) {
    for message in combined.remote.map(Remote::take_warnings).unwrap_or_default() {
        run_state.emit(Event::Warning { stage: None, message });
    }
}

/// Fetches for one plan. Returns whether everything that it needs is now in the local store.
fn fetch(plan: &Plan, graph: &Graph, store: &Store, remote: &Remote, run_state: &mut RunState<'_>) -> Result<bool> {
    let mut records = Vec::new();
    for planned in &plan.stages {
        if let PlannedState::Reuse { key, digest } = planned.state
            && store.recorded_digest(&key)?.is_none()
        {
            records.push((key, digest));
        }
    }
    let clock = Instant::now();
    if remote.fetch_records(store, &records)? > 0 {
        return Ok(false);
    }
    let needed = needed(plan, graph);
    let mut requests = Vec::new();
    for planned in &plan.stages {
        if let PlannedState::Reuse { digest, .. } = planned.state
            && remote.has_artifact(&digest)
            && store.presence(&digest)? != Presence::Intact
        {
            let artifact_type = graph.instances[planned.instance].signature.output.clone();
            requests.push(ArtifactRequest { digest, artifact_type, needed: needed.contains(&planned.instance) });
        }
    }
    let listener = RefCell::new((Instant::now(), &mut *run_state));
    let fetched = remote.fetch_artifacts(store, &requests, &|bytes, total_bytes| {
        let (last, run_state) = &mut *listener.borrow_mut();
        if last.elapsed() >= PROGRESS_EVERY {
            *last = Instant::now();
            run_state.emit(Event::Transfer { upload: false, bytes, total_bytes });
        }
    })?;
    if !records.is_empty() || fetched.artifacts > 0 {
        let (records, seconds) = (records.len() as u64, clock.elapsed().as_secs_f64());
        run_state.emit(Event::Transferred {
            upload: false,
            records,
            files: fetched.artifacts,
            bytes: fetched.bytes,
            seconds,
        });
    }
    Ok(fetched.failed == 0)
}

/// The instances whose bytes are known to be needed: targets, and inputs of those that run.
fn needed(plan: &Plan, graph: &Graph) -> BTreeSet<usize> {
    let runs = plan.stages.iter().filter(|planned| matches!(planned.state, PlannedState::Run { .. }));
    let inputs = runs.flat_map(|planned| &graph.instances[planned.instance].inputs);
    let inputs = inputs.flat_map(|port| &port.from).map(|source| source.instance);
    inputs.chain(graph.targets.iter().copied()).collect()
}

impl<'a> NodeRunner<'a> {
    /// The local store together with the remote one.
    pub fn combined_store(&self) -> CombinedStore<'a> {
        CombinedStore { store: self.store, remote: self.options.remote.as_deref() }
    }

    /// Fetches the record of a reused instance if only the remote has it, and its bytes if they are needed. Returns
    /// whether the local store now has them.
    pub fn fetch_reused(&self, node: usize, key: &Key, digest: &Digest) -> Result<bool> {
        let Some(remote) = self.combined_store().remote else { return Ok(true) };
        if self.store.recorded_digest(key)?.is_none() && remote.fetch_records(self.store, &[(*key, *digest)])? > 0 {
            return Ok(false);
        }
        match self.needs[node] {
            ArtifactNeed::Bytes if self.store.presence(digest)? != Presence::Intact => self.fetch_input(node, digest),
            _ => Ok(true),
        }
    }

    /// Fetches the artifact of an instance. Returns whether the local store now has it.
    pub fn fetch_input(&self, node: usize, digest: &Digest) -> Result<bool> {
        let Some(remote) = self.combined_store().remote.filter(|remote| remote.has_artifact(digest)) else {
            return Ok(false);
        };
        let artifact_type = self.instance(node).signature.output.clone();
        let request = ArtifactRequest { digest: *digest, artifact_type, needed: true };
        Ok(remote.fetch_artifacts(self.store, &[request], &|_, _| {})?.failed == 0)
    }

    /// Queues the record at a key, with its artifact, for upload.
    pub fn queue_upload(&self, key: Key) {
        if let Some(uploads) = &self.uploads {
            // Fails only if the thread has ended with an error, which the end of the run reports.
            let _ = uploads.send(key);
        }
    }
}
