//! `temper report`: renders the report of a finished run.

use std::path::{Path, PathBuf};

use engine::error::Result;
use engine::journal::{self, Event};
use engine::kind::Registry;
use engine::store::Store;
use serde_json::json;

use super::{CommandResult, load, open_store, print_json, runs};
use crate::args::PipelineArgs;
use crate::report;

pub fn report(pipeline: &PipelineArgs, run: Option<&str>, export: Option<&Path>, registry: &Registry) -> CommandResult {
    let store = open_store(pipeline)?;
    let folder = match run {
        Some(id) => runs::find_of(&store, id, pipeline)?,
        None => {
            // Reports the faults of the pipeline file.
            load(pipeline, &[], registry)?;
            runs::find_of(&store, "latest", pipeline)?
        }
    };
    let written = match export {
        Some(to) => report::export(&folder, &store, to)?,
        None => report::render(&folder, &store)?,
    };
    if pipeline.store.json {
        print_json(&json!({ "report": written.path }));
    } else {
        out!("{}", written.summary);
        outln!("report: {}", written.path.display());
    }
    Ok(0)
}

/// The latest run of a pipeline, restricted to these profiles if any are given.
pub fn latest(store: &Store, pipeline: &str, profiles: &[String]) -> Result<Option<PathBuf>> {
    for folder in journal::run_folders(&store.runs())?.into_iter().rev() {
        // Skip runs with a damaged journal; `temper runs` reports them.
        let mut events = journal::read(&folder).unwrap_or_default().into_iter().map(|line| line.event);
        if let Some(Event::Started { pipeline: name, profiles: used, .. }) =
            events.find(|event| matches!(event, Event::Started { .. }))
            && name == pipeline
            && (profiles.is_empty() || profiles == used)
        {
            return Ok(Some(folder));
        }
    }
    Ok(None)
}
