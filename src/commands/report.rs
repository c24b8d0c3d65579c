//! `temper report` and `temper runs`: show finished runs.

use std::path::{Path, PathBuf};

use engine::error::{AtPath, Error, Result};
use engine::journal::{self, Event};
use engine::kind::Registry;
use engine::store::Store;
use serde_json::json;

use super::{CommandResult, existing_store, load, open_store, print_json};
use crate::args::{PipelineArgs, StoreArgs};
use crate::report;

pub fn report(pipeline: &PipelineArgs, run: Option<&str>, export: Option<&Path>, registry: &Registry) -> CommandResult {
    let store = open_store(pipeline)?;
    let folder = match run {
        Some(id) => folders(&store)?
            .into_iter()
            .find(|f| f.file_name().is_some_and(|name| name == id))
            .ok_or_else(|| Error::user(format!("there is no run `{id}`")).help("`temper runs` lists them"))?,
        None => {
            let graph = load(pipeline, &[], registry)?;
            latest(&store, &graph.name, &pipeline.changes.profile)?.ok_or_else(|| {
                let profiles_note = if pipeline.changes.profile.is_empty() { "" } else { " with these profiles" };
                Error::user(format!("{} was never run in this store{profiles_note}", pipeline.file.display()))
            })?
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

pub fn runs(at: &StoreArgs) -> CommandResult {
    let store = existing_store(at)?;
    for folder in folders(&store)? {
        let id = folder.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        let (mut pipeline, mut profiles, mut end) = (String::new(), Vec::new(), None);
        let lines = journal::read(&folder).unwrap_or_else(|error| {
            errln!("warning: {error}");
            Vec::new()
        });
        for line in lines {
            match line.event {
                Event::Started { pipeline: name, profiles: p, .. } => (pipeline, profiles) = (name, p),
                Event::Finished { ran, reused, failed, interrupted, seconds, .. } => {
                    end = Some((ran.len(), reused.len(), failed, interrupted, seconds));
                }
                _ => {}
            }
        }
        if at.json {
            let end = end.map(|(ran, reused, failed, interrupted, seconds)| {
                json!({ "ran": ran, "reused": reused, "failed": failed, "interrupted": interrupted, "seconds": seconds })
            });
            print_json(&json!({ "run": id, "pipeline": pipeline, "profiles": profiles, "end": end }));
            continue;
        }
        let profiles = if profiles.is_empty() { String::new() } else { format!(" +{}", profiles.join(" +")) };
        let end = match end {
            None => "did not end".to_owned(),
            Some((ran, reused, failed, interrupted, seconds)) => {
                let cut = if interrupted { ", interrupted" } else { "" };
                format!("{ran} ran, {reused} reused, {} failed{cut}, {seconds:.1} s", failed.len())
            }
        };
        outln!("{id}  {pipeline}{profiles}  {end}");
    }
    Ok(0)
}

/// The folders of the runs, oldest first: their names sort by time.
fn folders(store: &Store) -> Result<Vec<PathBuf>> {
    let runs = store.runs();
    if !runs.is_dir() {
        return Ok(Vec::new());
    }
    let mut folders = Vec::new();
    for entry in std::fs::read_dir(&runs).at(&runs)? {
        let path = entry.at(&runs)?.path();
        if path.join("journal.jsonl").is_file() {
            folders.push(path);
        }
    }
    folders.sort();
    Ok(folders)
}

/// The latest run of a pipeline, restricted to these profiles if any are given.
fn latest(store: &Store, pipeline: &str, profiles: &[String]) -> Result<Option<PathBuf>> {
    for folder in folders(store)?.into_iter().rev() {
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
