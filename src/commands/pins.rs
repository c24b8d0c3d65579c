//! `temper pin`, `pins` and `unpin`: results that `temper gc` keeps.

use std::time::{SystemTime, UNIX_EPOCH};

use engine::error::Error;
use engine::graph::LoadOptions;
use engine::journal::utc;
use engine::kind::Registry;
use engine::plan::{Flags, PlannedState};
use engine::store::{Pin, PinnedResult};
use serde_json::json;

use super::{CommandResult, existing_store, open_store, options, print_json};
use crate::args::{PipelineArgs, StoreArgs};
use crate::output::counted;
use crate::report::terminal::table;

/// Pins the results of the instances that `stage` selects.
pub fn pin(pipeline: &PipelineArgs, stage: &str, name: Option<&str>, registry: &Registry) -> CommandResult {
    let options = LoadOptions { stage: Some(stage.to_owned()), ..options(pipeline) };
    let graph = engine::graph::load(&pipeline.file, &options, registry)?;
    let store = open_store(pipeline)?;
    let _guard = store.hold_off_collection()?;
    let plan = engine::plan::plan(&graph, registry, &store, &Flags::default())?;
    let mut results = Vec::new();
    for target in &graph.targets {
        let stage = graph.instances[*target].name.to_string();
        match plan.stages[*target].state {
            PlannedState::Reuse { key, digest } => results.push(PinnedResult { stage, key, digest }),
            _ => {
                return Err(Error::user(format!("{stage} has no result with its current recipe"))
                    .help(format!("`temper run PIPELINE --until {stage}` makes it"))
                    .into());
            }
        }
    }
    let name = name.unwrap_or(stage).replace(' ', "");
    let at = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
    let pin = Pin { name, pipeline: graph.name.clone(), at, results };
    store.pin(&pin)?;
    if pipeline.store.json {
        print_json(&json!(pin));
    } else {
        outln!("pinned {} as `{}`", counted(pin.results.len(), "result"), pin.name);
    }
    Ok(0)
}

pub fn pins(at: &StoreArgs) -> CommandResult {
    let pins = existing_store(at)?.pins()?;
    if at.json {
        print_json(&json!(pins));
        return Ok(0);
    }
    let stages = |pin: &Pin| pin.results.iter().map(|result| result.stage.as_str()).collect::<Vec<_>>().join(", ");
    let rows: Vec<Vec<String>> =
        pins.iter().map(|pin| vec![pin.name.clone(), pin.pipeline.clone(), utc(pin.at), stages(pin)]).collect();
    if rows.is_empty() {
        outln!("no pins");
    } else {
        out!("{}", table(&["pin", "pipeline", "since", "results"], 4, &rows));
    }
    Ok(0)
}

pub fn unpin(names: &[String], at: &StoreArgs) -> CommandResult {
    let store = existing_store(at)?;
    names.iter().try_for_each(|name| store.unpin(name))?;
    if at.json {
        print_json(&json!({ "unpinned": names }));
    } else {
        outln!("removed {}; the results stay until `temper gc --delete`", counted(names.len(), "pin"));
    }
    Ok(0)
}
