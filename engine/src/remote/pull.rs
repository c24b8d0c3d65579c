//! Fetches every result that a pipeline reuses.

use super::{ArtifactRequest, CombinedStore, OnProgress, Remote};
use crate::error::Result;
use crate::graph::Graph;
use crate::kind::Registry;
use crate::plan::{Flags, Plan, PlannedState, plan_with_view};
use crate::store::{Presence, Store};

/// The result of a pull.
#[derive(Clone, Debug)]
pub struct PullSummary {
    /// The plan after the pull: every reused stage has its record and its artifact in the local store, except the `failed`.
    pub plan: Plan,
    pub records: u64,
    pub artifacts: u64,
    pub bytes: u64,
    /// Records and artifacts that could not be fetched.
    pub failed: u64,
}

/// Fetches the records and artifacts of all stages that the remote has. Those that cannot be fetched are left out, with a warning.
///
/// # Errors
/// When the local disk fails, or planning.
pub fn pull(
    graph: &Graph,
    registry: &Registry,
    store: &Store,
    remote: &Remote,
    on_progress: OnProgress,
) -> Result<PullSummary> {
    let combined = CombinedStore { store, remote: Some(remote) };
    let (mut records, mut artifacts, mut bytes, mut failed) = (0, 0, 0, 0);
    loop {
        let plan = plan_with_view(graph, registry, store, &combined, &Flags::default())?;
        let (mut missing_records, mut requests) = (Vec::new(), Vec::new());
        for planned in &plan.stages {
            let PlannedState::Reuse { key, digest } = planned.state else { continue };
            if store.recorded_digest(&key)?.is_none() {
                missing_records.push((key, digest));
            }
            if remote.has_artifact(&digest) && store.presence(&digest)? != Presence::Intact {
                let artifact_type = graph.instances[planned.instance].signature.output.clone();
                requests.push(ArtifactRequest { digest, artifact_type, needed: true });
            }
        }
        // A failed key or artifact is refused, so that the next plan does without it.
        let unfetched = remote.fetch_records(store, &missing_records)?;
        records += missing_records.len() as u64 - unfetched;
        failed += unfetched;
        if unfetched == 0 {
            let fetched = remote.fetch_artifacts(store, &requests, on_progress)?;
            artifacts += fetched.artifacts;
            bytes += fetched.bytes;
            failed += fetched.failed;
            if fetched.failed == 0 {
                return Ok(PullSummary { plan, records, artifacts, bytes, failed });
            }
        }
    }
}
