//! `temper push` and `temper pull`, and the remote store of `plan` and `run`.

use std::cell::Cell;
use std::path::Path;
use std::time::{Duration, Instant};

use engine::error::{Blame, Error, Result};
use engine::graph::Graph;
use engine::journal::Event;
use engine::kind::Registry;
use engine::plan::{Flags, Plan, State};
use engine::remote::{Address, Remote, Shared};
use engine::store::Store;
use serde_json::json;

use super::{Done, load, open_store, print_json};
use crate::args::{Cut, Pipeline, RemoteAt};
use crate::progress::{Progress, size};

/// Exit code if something could not be moved, which counts as a fault of the environment.
const INCOMPLETE: u8 = 3;

/// The remote of `--remote` or else of the pipeline file, and whether it is read-only.
pub fn address(pipeline: &Pipeline, at: &RemoteAt, graph: &Graph) -> Result<Option<(Address, bool)>> {
    let beside = pipeline.file.parent().unwrap_or(Path::new(""));
    match (&at.remote, &graph.remote) {
        (Some(url), _) => Ok(Some((Address::parse(url, Path::new(""))?, false))),
        (None, Some(remote)) => Ok(Some((Address::parse(&remote.url, beside)?, remote.read_only))),
        (None, None) => Ok(None),
    }
}

/// Plans with the remote store, unless the local one has everything. A remote that cannot be reached is a warning.
pub fn plan(
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
        match Remote::open(&address, store, read_only) {
            Ok(opened) => remote = Some(opened),
            Err(error) if error.blame == Blame::Surroundings => {
                note!("warning: the remote store is not used: {error}");
            }
            Err(error) => return Err(error),
        }
    }
    let shared = Shared { store, remote: remote.as_ref() };
    let plan = engine::plan::plan_through(graph, registry, store, &shared, flags)?;
    for warning in remote.as_ref().map(Remote::take_warnings).unwrap_or_default() {
        note!("warning: {warning}");
    }
    Ok((plan, remote))
}

pub fn push(pipeline: &Pipeline, cut: &Cut, at: &RemoteAt, all: bool, registry: &Registry) -> Done {
    let graph = load(pipeline, &cut.until, registry)?;
    let store = open_store(pipeline)?;
    let plan = engine::plan::plan(&graph, registry, &store, &Flags::default())?;
    let mut keys = Vec::new();
    for planned in &plan.stages {
        if let State::Reuse { key, .. } = planned.state {
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
    let pushed = watched(json, true, |tell| remote.push(&store, &keys, true, tell))?;
    remote.take_warnings().iter().for_each(|warning| note!("warning: {warning}"));
    if json {
        print_json(&json!({
            "remote": address.to_string(),
            "records": pushed.records,
            "present": pushed.present,
            "other": pushed.other,
            "failed": pushed.failed,
            "files": pushed.files,
            "bytes": pushed.bytes,
        }));
    } else {
        say!(
            "{} records uploaded with {} files ({}), {} were there",
            pushed.records,
            pushed.files,
            size(pushed.bytes),
            pushed.present
        );
        if open > 0 && !all {
            say!("{open} stages of the pipeline have no result yet");
        }
    }
    Ok(if pushed.failed == 0 { 0 } else { INCOMPLETE })
}

pub fn pull(pipeline: &Pipeline, cut: &Cut, at: &RemoteAt, registry: &Registry) -> Done {
    let graph = load(pipeline, &cut.until, registry)?;
    let store = open_store(pipeline)?;
    let (address, _) = required(address(pipeline, at, &graph)?)?;
    let remote = Remote::open(&address, &store, true)?;
    let json = pipeline.store.json;
    let pulled = watched(json, false, |tell| engine::remote::pull(&graph, registry, &store, &remote, tell))?;
    remote.take_warnings().iter().for_each(|warning| note!("warning: {warning}"));
    let open = pulled.plan.stages.iter().filter(|planned| !matches!(planned.state, State::Reuse { .. })).count();
    if json {
        print_json(&json!({
            "remote": address.to_string(),
            "records": pulled.records,
            "artifacts": pulled.artifacts,
            "bytes": pulled.bytes,
            "failed": pulled.failed,
            "not_there": open,
        }));
    } else {
        say!("{} records and {} artifacts fetched ({})", pulled.records, pulled.artifacts, size(pulled.bytes));
        if open > 0 {
            say!("{open} of {} stages are not in the remote store: `temper run` makes them", pulled.plan.stages.len());
        }
    }
    Ok(if pulled.failed == 0 { 0 } else { INCOMPLETE })
}

fn required(address: Option<(Address, bool)>) -> Result<(Address, bool)> {
    address.ok_or_else(|| {
        Error::yours("no remote store is named").help("name it with `--remote URL`, or as `remote: URL` in the file")
    })
}

/// Shows the progress of a transfer.
fn watched<T>(for_machines: bool, upload: bool, transfer: impl FnOnce(&dyn Fn(u64, u64)) -> Result<T>) -> Result<T> {
    const EVERY: Duration = Duration::from_millis(500);
    let (progress, last) = (Progress::new(for_machines), Cell::new(Instant::now()));
    let done = transfer(&|bytes, total_bytes| {
        if last.get().elapsed() >= EVERY {
            last.set(Instant::now());
            progress.tell(&Event::Transfer { upload, bytes, total_bytes });
        }
    });
    progress.end();
    done
}
