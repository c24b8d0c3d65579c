//! `on_finish`: starts the pipeline's own command after a run, with the run as JSON on its standard input.

use std::collections::BTreeMap;
use std::io::Write;
use std::path::Path;
use std::process::{Command, Stdio};

use engine::error::{AtPath, Error, Result};
use engine::graph::Graph;
use engine::run::RunOutcome;
use engine::store::Store;
use serde_json::{Value, json};

/// Starts the command, if the pipeline has one, in the folder of the pipeline file, and waits for its end. Its standard
/// output goes to standard error, so that it cannot mix with ours.
///
/// # Errors
/// When the command cannot be started or fails.
pub fn start(graph: &Graph, file: &Path, run: &Value) -> Result<()> {
    let [program, arguments @ ..] = &graph.on_finish[..] else { return Ok(()) };
    let mut command = Command::new(program);
    if let Some(folder) = file.parent().filter(|folder| !folder.as_os_str().is_empty()) {
        command.current_dir(folder);
    }
    let mut child =
        command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::from(std::io::stderr())).spawn().at(program)?;
    if let Some(mut stdin) = child.stdin.take() {
        // A command that does not read its input closes the pipe.
        let _ = writeln!(stdin, "{run}");
    }
    let status = child.wait().at(program)?;
    if status.success() { Ok(()) } else { Err(Error::user(format!("`{program}` failed ({status})"))) }
}

/// The run as the command gets it.
pub fn describe(
    graph: &Graph,
    profiles: &[String],
    outcome: &RunOutcome,
    report: Option<&Path>,
    store: &Store,
) -> Value {
    let mut metrics: BTreeMap<String, BTreeMap<String, f64>> = BTreeMap::new();
    for target in &graph.targets {
        let artifact = outcome.digests[*target].and_then(|digest| store.open_artifact(&digest).ok());
        if let Some(artifact) = artifact {
            metrics.insert(graph.instances[*target].name.to_string(), artifact.manifest.facts.metrics);
        }
    }
    let names = |names: &[engine::names::InstanceName]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
    let failed = outcome
        .failed
        .iter()
        .map(|failure| json!({ "stage": failure.stage.to_string(), "error": failure.error.message }));
    json!({
        "run": outcome.run_id,
        "pipeline": graph.name,
        "profiles": profiles,
        "folder": outcome.folder,
        "report": report,
        "exit_code": outcome.exit_code(),
        "interrupted": outcome.interrupted,
        "seconds": outcome.seconds,
        "ran": names(&outcome.ran),
        "reused": names(&outcome.reused),
        "skipped": names(&outcome.skipped),
        "failed": failed.collect::<Vec<_>>(),
        "metrics": metrics,
    })
}
