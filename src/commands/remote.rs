//! `temper push` and `temper pull`, and the remote store of `plan` and `run`.

use std::cell::Cell;
use std::path::Path;
use std::time::{Duration, Instant};

use engine::error::{Blame, Error, Result};
use engine::graph::Graph;
use engine::journal::Event;
use engine::kind::Registry;
use engine::plan::{Flags, Plan, PlannedState};
use engine::remote::{Address, CombinedStore, Remote};
use engine::store::Store;
use serde_json::json;

use super::{CommandResult, load, open_store, print_json};
use crate::args::{PipelineArgs, RemoteArgs, UntilArgs};
use crate::output::counted;
use crate::progress::{Progress, size};

/// Exit code if a transfer is incomplete: an error of the environment.
const INCOMPLETE: u8 = 3;

/// The remote of `--remote` or else of the pipeline file, and whether it is read-only.
pub fn address(pipeline: &PipelineArgs, at: &RemoteArgs, graph: &Graph) -> Result<Option<(Address, bool)>> {
    let folder = pipeline.file.parent().unwrap_or(Path::new(""));
    match (&at.remote, &graph.remote) {
        (Some(url), _) => Ok(Some((Address::parse(url, Path::new(""))?, false))),
        (None, Some(remote)) => Ok(Some((Address::parse(&remote.url, folder)?, remote.read_only))),
        (None, None) => Ok(None),
    }
}

/// Plans with the remote store, unless the local one has everything. A remote that cannot be reached is a warning; one
/// that refuses is an error.
pub fn plan_with_remote(
    graph: &Graph,
    registry: &Registry,
    store: &Store,
    flags: &Flags,
    address: Option<(Address, bool)>,
) -> Result<(Plan, Option<Remote>)> {
    let mut remote = None;
    if let Some((address, read_only)) = address
        && store.is_writable()
        && !engine::plan::plan_with(graph, registry, store, flags, &[])?.is_complete()
    {
        // A folder that is not there may be on a disk that is not mounted.
        let is_folder = matches!(address, Address::Folder(_));
        match Remote::open(&address, store, read_only) {
            Ok(opened) => remote = Some(opened),
            Err(error) if error.blame == Blame::Environment && (error.transient || is_folder) => {
                errln!("warning: the remote store is not used: {error}");
            }
            Err(error) => return Err(error),
        }
    }
    let combined = CombinedStore { store, remote: remote.as_ref() };
    let plan = engine::plan::plan_with_view(graph, registry, store, &combined, flags)?;
    for warning in remote.as_ref().map(Remote::take_warnings).unwrap_or_default() {
        errln!("warning: {warning}");
    }
    Ok((plan, remote))
}

pub fn push(
    pipeline: &PipelineArgs,
    until: &UntilArgs,
    at: &RemoteArgs,
    all: bool,
    registry: &Registry,
) -> CommandResult {
    let graph = load(pipeline, &until.until, registry)?;
    let store = open_store(pipeline)?;
    let plan = engine::plan::plan(&graph, registry, &store, &Flags::default())?;
    let mut keys = Vec::new();
    for planned in &plan.stages {
        if let PlannedState::Reuse { key, .. } = planned.state {
            keys.push(key);
        }
    }
    let open = plan.stages.len() - keys.len();
    if all {
        keys = store.actions()?.into_iter().map(|record| record.key).collect();
    }
    let (address, read_only) = required(address(pipeline, at, &graph)?)?;
    if !read_only {
        address.create()?;
    }
    let remote = Remote::open(&address, &store, read_only)?;
    remote.check_writable()?;
    let json = pipeline.store.json;
    let pushed = with_progress(json, true, |on_progress| remote.push(&store, &keys, true, on_progress))?;
    remote.take_warnings().iter().for_each(|warning| errln!("warning: {warning}"));
    if json {
        print_json(&json!({
            "remote": address.to_string(),
            "records": pushed.records,
            "present": pushed.present,
            "conflicts": pushed.conflicts,
            "failed": pushed.failed,
            "files": pushed.files,
            "bytes": pushed.bytes,
        }));
    } else {
        outln!(
            "{} uploaded with {} ({}), {} already present",
            counted(pushed.records as usize, "record"),
            counted(pushed.files as usize, "file"),
            size(pushed.bytes as f64),
            pushed.present
        );
        if open > 0 && !all {
            outln!("{} of the pipeline without a result yet", counted(open, "stage"));
        }
    }
    Ok(if pushed.failed == 0 { 0 } else { INCOMPLETE })
}

pub fn pull(pipeline: &PipelineArgs, until: &UntilArgs, at: &RemoteArgs, registry: &Registry) -> CommandResult {
    let graph = load(pipeline, &until.until, registry)?;
    let store = open_store(pipeline)?;
    let (address, _) = required(address(pipeline, at, &graph)?)?;
    let remote = Remote::open(&address, &store, true)?;
    let json = pipeline.store.json;
    let pulled =
        with_progress(json, false, |on_progress| engine::remote::pull(&graph, registry, &store, &remote, on_progress))?;
    remote.take_warnings().iter().for_each(|warning| errln!("warning: {warning}"));
    let open = pulled.plan.stages.iter().filter(|planned| !matches!(planned.state, PlannedState::Reuse { .. })).count();
    if json {
        print_json(&json!({
            "remote": address.to_string(),
            "records": pulled.records,
            "artifacts": pulled.artifacts,
            "bytes": pulled.bytes,
            "failed": pulled.failed,
            "missing": open,
        }));
    } else {
        let (records, artifacts) =
            (counted(pulled.records as usize, "record"), counted(pulled.artifacts as usize, "artifact"));
        outln!("{records} and {artifacts} fetched ({})", size(pulled.bytes as f64));
        if open > 0 {
            let all = counted(pulled.plan.stages.len(), "stage");
            outln!("not in the remote store: {open} of {all}; `temper run` runs them");
        }
    }
    Ok(if pulled.failed == 0 { 0 } else { INCOMPLETE })
}

fn required(address: Option<(Address, bool)>) -> Result<(Address, bool)> {
    address.ok_or_else(|| {
        Error::user("no remote store is given")
            .help("give it with `--remote URL`, or as `remote: URL` in the pipeline file")
    })
}

/// Shows the progress of a transfer.
fn with_progress<T>(as_json: bool, upload: bool, transfer: impl FnOnce(&dyn Fn(u64, u64)) -> Result<T>) -> Result<T> {
    const EVERY: Duration = Duration::from_millis(500);
    let (progress, last) = (Progress::new(as_json), Cell::new(Instant::now()));
    let done = transfer(&|bytes, total_bytes| {
        if last.get().elapsed() >= EVERY {
            last.set(Instant::now());
            progress.handle(&Event::Transfer { upload, bytes, total_bytes });
        }
    });
    progress.end();
    done
}
