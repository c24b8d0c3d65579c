//! `temper doctor`: checks the machine, the store, the network and, if one is given, what a pipeline needs of them.

mod machine;
mod pipeline;
mod services;
mod store;

use std::io::Write;
use std::path::{Path, PathBuf};

use engine::error::Error;
use engine::kind::Registry;
use engine::store::Store;
use serde::Serialize;
use serde_json::json;

use super::{Done, Failure, counted, load, print_json, store_root};
use crate::args::{Changes, Pipeline, StoreAt};

/// The result of one check.
#[derive(Debug, Serialize)]
struct Check {
    subject: String,
    status: Status,
    message: String,
    /// What to do.
    help: Option<String>,
    /// The code that a run would exit with; 0 unless `status` is a fault.
    #[serde(skip)]
    exit_code: u8,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Status {
    Ok,
    /// A run is possible but slow, limited or at risk.
    Warning,
    /// A run would stop.
    Fault,
}

impl Check {
    fn new(subject: &str, status: Status, message: impl Into<String>) -> Self {
        Self { subject: subject.to_owned(), status, message: message.into(), help: None, exit_code: 0 }
    }

    fn ok(subject: &str, message: impl Into<String>) -> Self {
        Self::new(subject, Status::Ok, message)
    }

    fn warning(subject: &str, message: impl Into<String>, help: impl Into<String>) -> Self {
        Self { help: Some(help.into()), ..Self::new(subject, Status::Warning, message) }
    }

    /// A fault, or a warning if nothing is known to need what is missing.
    fn failed(subject: &str, error: Error, is_needed: bool) -> Self {
        let status = if is_needed { Status::Fault } else { Status::Warning };
        let exit_code = if is_needed { error.exit_code() } else { 0 };
        Self { help: error.help, exit_code, ..Self::new(subject, status, error.message) }
    }

    fn fault(subject: &str, error: Error) -> Self {
        Self::failed(subject, error, true)
    }
}

pub fn doctor(file: Option<PathBuf>, changes: Changes, at: StoreAt, registry: &Registry) -> Done {
    let for_machines = at.json;
    if file.is_none() && !(changes.profile.is_empty() && changes.set.is_empty()) {
        return Err(Error::yours("`--profile` and `--set` change a pipeline file, and none is given").into());
    }
    let beside = at.store.clone().unwrap_or_else(|| PathBuf::from("cache"));
    let given = file.map(|file| Pipeline { file, changes, store: at });

    let mut checks = machine::checks();
    let root = given.as_ref().map_or(beside, store_root);
    // Like `plan` and `run`, this creates the store of a pipeline.
    let store = if given.is_some() { Store::open(&root).map(Some) } else { Store::open_existing(&root) };
    checks.extend(store::checks(&root, &store));
    let loaded = given.as_ref().map(|given| load(given, &[], registry));
    let (mut faults, mut open) = (None, None);
    match (&loaded, &store) {
        (Some(Ok(graph)), Ok(Some(store))) => {
            let (found, stages) = pipeline::checks(graph, store, registry);
            checks.extend(found);
            open = stages;
        }
        (Some(Err(Failure::Error(error))), _) => checks.push(Check::fault("pipeline", error.clone())),
        (Some(Err(Failure::File(found))), _) => {
            checks.push(Check::fault(
                "pipeline",
                Error::yours(format!("{}, listed below", counted(found.count(), "fault"))),
            ));
            faults = Some(found);
        }
        // The fault of the store has been found.
        (Some(Ok(_)), _) | (None, _) => {}
    }
    checks.extend(services::checks(open.as_deref()));

    let count = |status| checks.iter().filter(|check| check.status == status).count();
    let (stop, warn) = (count(Status::Fault), count(Status::Warning));
    if for_machines {
        print_json(&json!({ "checks": checks, "faults": stop, "warnings": warn }));
    } else {
        checks.iter().for_each(tell);
        say!("\n{}, {}", counted(stop, "fault"), counted(warn, "warning"));
    }
    if let Some(faults) = faults {
        let mut stderr = std::io::stderr();
        let _ = writeln!(stderr, "\n{}", faults.to_string().trim_end());
    }
    Ok(checks.iter().map(|check| check.exit_code).filter(|code| *code > 0).min().unwrap_or(0))
}

fn tell(check: &Check) {
    let status = match check.status {
        Status::Ok => "ok",
        Status::Warning => "warning",
        Status::Fault => "fault",
    };
    say!("{status:<8} {:<11} {}", check.subject, check.message);
    if let Some(help) = &check.help {
        say!("{:<20} help: {help}", "");
    }
}

/// Bytes in GiB, or in MiB if they are few.
fn size(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib < 1024.0 { format!("{mib:.0} MiB") } else { format!("{:.1} GiB", mib / 1024.0) }
}

/// The closest folder above `path` that exists, or `path` itself.
fn existing(path: &Path) -> PathBuf {
    let whole = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    whole.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("/")).to_owned()
}
