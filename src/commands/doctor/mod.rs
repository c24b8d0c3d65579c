//! `temper doctor`: checks the machine, the store and the network. With a pipeline file, also the needs of its stages.

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

use super::{CommandResult, Failure, counted, load, print_json, store_root};
use crate::args::{ChangeArgs, PipelineArgs, StoreArgs};

/// The result of one check.
#[derive(Debug, Serialize)]
struct Check {
    subject: String,
    status: Status,
    message: String,
    /// The suggested fix.
    help: Option<String>,
    /// The exit code that a run would have; 0 unless `status` is an error.
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
    Error,
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

    /// An error if `is_needed`, otherwise a warning.
    fn failed(subject: &str, error: Error, is_needed: bool) -> Self {
        let status = if is_needed { Status::Error } else { Status::Warning };
        let exit_code = if is_needed { error.exit_code() } else { 0 };
        Self { help: error.help, exit_code, ..Self::new(subject, status, error.message) }
    }

    fn error(subject: &str, error: Error) -> Self {
        Self::failed(subject, error, true)
    }
}

pub fn doctor(file: Option<PathBuf>, changes: ChangeArgs, store_args: StoreArgs, registry: &Registry) -> CommandResult {
    let json = store_args.json;
    if file.is_none() && !(changes.profile.is_empty() && changes.set.is_empty()) {
        return Err(Error::user("`--profile` and `--set` need a pipeline file").into());
    }
    let default_root = store_args.store.clone().unwrap_or_else(|| PathBuf::from("cache"));
    let given = file.map(|file| PipelineArgs { file, changes, store: store_args });

    let mut checks = machine::checks();
    let root = given.as_ref().map_or(default_root, store_root);
    // Like `plan` and `run`, this creates the store of a pipeline.
    let store = if given.is_some() { Store::open(&root).map(Some) } else { Store::open_existing(&root) };
    checks.extend(store::checks(&root, &store));
    let loaded = given.as_ref().map(|given| load(given, &[], registry));
    let (mut diagnostics, mut to_run) = (None, None);
    match (&loaded, &store) {
        (Some(Ok(graph)), Ok(Some(store))) => {
            let (found, stages) = pipeline::checks(graph, store, registry);
            checks.extend(found);
            to_run = stages;
        }
        (Some(Err(Failure::Error(error))), _) => checks.push(Check::error("pipeline", error.clone())),
        (Some(Err(Failure::File(found))), _) => {
            checks.push(Check::error(
                "pipeline",
                Error::user(format!("{}, listed below", counted(found.count(), "error"))),
            ));
            diagnostics = Some(found);
        }
        // The store's error is among the checks already.
        (Some(Ok(_)), _) | (None, _) => {}
    }
    checks.extend(services::checks(to_run.as_deref()));

    let count = |status| checks.iter().filter(|check| check.status == status).count();
    let (error_count, warning_count) = (count(Status::Error), count(Status::Warning));
    if json {
        print_json(&json!({ "checks": checks, "errors": error_count, "warnings": warning_count }));
    } else {
        checks.iter().for_each(print_check);
        outln!("\n{}, {}", counted(error_count, "error"), counted(warning_count, "warning"));
    }
    if let Some(diagnostics) = diagnostics {
        let mut stderr = std::io::stderr();
        let _ = writeln!(stderr, "\n{}", diagnostics.to_string().trim_end());
    }
    Ok(checks.iter().map(|check| check.exit_code).filter(|code| *code > 0).min().unwrap_or(0))
}

fn print_check(check: &Check) {
    let status = match check.status {
        Status::Ok => "ok",
        Status::Warning => "warning",
        Status::Error => "error",
    };
    outln!("{status:<8} {:<11} {}", check.subject, check.message);
    if let Some(help) = &check.help {
        outln!("{:<20} help: {help}", "");
    }
}

/// Bytes in GiB, or in MiB if they are few.
fn size(bytes: u64) -> String {
    let mib = bytes as f64 / f64::from(1 << 20);
    if mib < 1024.0 { format!("{mib:.0} MiB") } else { format!("{:.1} GiB", mib / 1024.0) }
}

/// `path` if it is a folder, otherwise its nearest existing parent.
fn nearest_folder(path: &Path) -> PathBuf {
    let whole = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    whole.ancestors().find(|folder| folder.is_dir()).unwrap_or(Path::new("/")).to_owned()
}
