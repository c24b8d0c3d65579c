//! Fetches everything that a pipeline reuses.

use super::{OnProgress, Remote, Shared, Wanted};
use crate::error::Result;
use crate::graph::Graph;
use crate::kind::Registry;
use crate::plan::{Flags, Plan, State, plan_through};
use crate::store::{Presence, Store};

/// The result of a pull.
#[derive(Clone, Debug)]
pub struct Pulled {
    /// The plan after it: every reused stage has its record and its artifact in the local store, except the `failed`.
    pub plan: Plan,
    pub records: u64,
    pub artifacts: u64,
    pub bytes: u64,
    /// Records and artifacts that could not be had.
    pub failed: u64,
}

/// Fetches the records and artifacts of all stages that the remote has. What it cannot give is left out, with a warning.
///
/// # Errors
/// When the local disk fails, or planning.
pub fn pull(
    graph: &Graph,
    registry: &Registry,
    store: &Store,
    remote: &Remote,
    on_progress: OnProgress,
) -> Result<Pulled> {
    let shared = Shared { store, remote: Some(remote) };
    let (mut records, mut artifacts, mut bytes, mut failed) = (0, 0, 0, 0);
    loop {
        let plan = plan_through(graph, registry, store, &shared, &Flags::default())?;
        let (mut lacking, mut wanted) = (Vec::new(), Vec::new());
        for planned in &plan.stages {
            let State::Reuse { key, digest } = planned.state else { continue };
            if store.recorded(&key)?.is_none() {
                lacking.push((key, digest));
            }
            if remote.holds(&digest) && store.presence(&digest)? != Presence::Whole {
                let artifact_type = graph.instances[planned.instance].signature.output.clone();
                wanted.push(Wanted { digest, artifact_type, needed: true });
            }
        }
        // What fails is refused, so that the next plan does without it.
        let unread = remote.fetch_records(store, &lacking)?;
        records += lacking.len() as u64 - unread;
        failed += unread;
        if unread == 0 {
            let moved = remote.fetch_artifacts(store, &wanted, on_progress)?;
            artifacts += moved.artifacts;
            bytes += moved.bytes;
            failed += moved.failed;
            if moved.failed == 0 {
                return Ok(Pulled { plan, records, artifacts, bytes, failed });
            }
        }
    }
}
