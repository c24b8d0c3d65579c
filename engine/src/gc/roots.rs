//! The roots of garbage collection: results of kept runs, of running processes, and of pipelines.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use crate::error::Result;
use crate::graph::Graph;
use crate::journal::{self, Event, PlannedAction, unix_seconds};
use crate::kind::Registry;
use crate::names::{Digest, Key};
use crate::plan::{Flags, PlannedState};
use crate::store::Store;

/// The runs whose results are kept: all, or those that fit one of the limits.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct KeptRuns {
    /// This many of the newest runs.
    pub newest: Option<usize>,
    /// Runs that started at most this many days ago.
    pub days: Option<f64>,
}

impl KeptRuns {
    /// Whether a run is kept that `newer` runs follow, and that started at `started` (seconds since 1970).
    fn keeps(&self, newer: usize, started: f64, now: f64) -> bool {
        let no_limit = self.newest.is_none() && self.days.is_none();
        no_limit
            || self.newest.is_some_and(|newest| newer < newest)
            || self.days.is_some_and(|days| now - started <= days * 86_400.0)
    }
}

/// What a pipeline uses with one choice of profiles.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct PipelineRoots {
    /// For the user: the pipeline file and its profiles.
    pub name: String,
    pub digests: BTreeSet<Digest>,
    /// Known keys with their instances, including those that have not run to completion.
    pub keys: BTreeMap<Key, String>,
}

/// Plans the pipeline, and returns the results and keys that the plan names.
///
/// # Errors
/// As [`crate::plan::plan`].
pub fn pipeline_roots(name: String, graph: &Graph, registry: &Registry, store: &Store) -> Result<PipelineRoots> {
    let plan = crate::plan::plan_with(graph, registry, store, &Flags::default(), &[])?;
    let mut roots = PipelineRoots { name, ..PipelineRoots::default() };
    for planned in &plan.stages {
        let name = graph.instances[planned.instance].name.to_string();
        match planned.state {
            PlannedState::Reuse { key, digest } => {
                roots.keys.insert(key, name);
                roots.digests.insert(digest);
            }
            PlannedState::Run { key, .. } => drop(roots.keys.insert(key, name)),
            PlannedState::Pending { .. } => {}
        }
    }
    Ok(roots)
}

/// What one run of the store uses.
pub(super) struct RunRoots {
    pub id: String,
    pub folder: PathBuf,
    pub running: bool,
    pub kept: bool,
    pub digests: BTreeSet<Digest>,
    /// With the instances.
    pub keys: BTreeMap<Key, String>,
    /// While it is running: the instances whose keys it does not know yet.
    pub pending: BTreeSet<String>,
    /// When it began, by the clock of the file system; `None` before it has written its graph.
    pub began: Option<SystemTime>,
}

/// The runs of the store, oldest first.
pub(super) fn runs(store: &Store, kept: &KeptRuns) -> Result<Vec<RunRoots>> {
    let folders = journal::run_folders(&store.runs())?;
    let (count, now) = (folders.len(), unix_seconds(SystemTime::now()));
    // A job of a batch system goes on when its orchestrator has ended.
    let with_jobs: BTreeSet<String> = store.leases()?.into_iter().map(|lease| lease.run).collect();
    let folders = folders.into_iter().enumerate();
    folders.map(|(i, folder)| run(folder, &with_jobs, kept, count - 1 - i, now)).collect()
}

fn run(folder: PathBuf, with_jobs: &BTreeSet<String>, kept: &KeptRuns, newer: usize, now: f64) -> Result<RunRoots> {
    let id = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let running = with_jobs.contains(&id) || journal::is_running(&folder)?;
    let mut roots = RunRoots {
        id,
        running,
        kept: running,
        digests: BTreeSet::new(),
        keys: BTreeMap::new(),
        pending: BTreeSet::new(),
        began: std::fs::metadata(folder.join("graph.json")).and_then(|graph| graph.modified()).ok(),
        folder: PathBuf::new(),
    };
    let lines = journal::read(&folder)?;
    roots.kept |= kept.keeps(newer, lines.first().map_or(0.0, |line| line.at), now);
    for line in lines {
        match line.event {
            Event::Planned { stages } => {
                for stage in stages {
                    roots.keys.extend(stage.key.map(|key| (key, stage.stage.clone())));
                    if running && stage.action == PlannedAction::Pending {
                        roots.pending.insert(stage.stage);
                    }
                }
            }
            Event::StageStarted { stage, key, .. } => drop(roots.keys.insert(key, stage)),
            Event::StageFinished { stage, key, digest, .. } | Event::StageReused { stage, key, digest, .. } => {
                roots.keys.insert(key, stage);
                roots.digests.insert(digest);
            }
            _ => {}
        }
    }
    roots.folder = folder;
    Ok(roots)
}

/// The bytes on disk of everything below `path`, each hard-linked file once.
pub(super) fn allocated(path: &Path) -> Result<u64> {
    let mut seen = BTreeSet::new();
    let mut total = 0;
    super::survey::walk(path, &mut |_, file| {
        if seen.insert((file.device, file.inode)) {
            total += file.allocated;
        }
    })?;
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_are_kept_by_count_or_by_age() {
        let day = 86_400.0;
        let cases = [
            (KeptRuns::default(), 99, 1000.0, true),
            (KeptRuns { newest: Some(2), days: None }, 1, 1000.0, true),
            (KeptRuns { newest: Some(2), days: None }, 2, 0.0, false),
            (KeptRuns { newest: Some(0), days: None }, 0, 0.0, false),
            (KeptRuns { newest: None, days: Some(7.0) }, 99, 6.9, true),
            (KeptRuns { newest: None, days: Some(7.0) }, 0, 7.1, false),
            (KeptRuns { newest: Some(1), days: Some(7.0) }, 5, 6.0, true),
            (KeptRuns { newest: Some(1), days: Some(7.0) }, 0, 60.0, true),
            (KeptRuns { newest: Some(1), days: Some(7.0) }, 1, 8.0, false),
        ];
        for (kept, newer, days_ago, expected) in cases {
            assert_eq!(kept.keeps(newer, 1e9 - days_ago * day, 1e9), expected, "{kept:?} {newer} {days_ago}");
        }
    }
}
