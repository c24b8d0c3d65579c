//! `temper runs` and `temper runs rm`: list the runs of a store, and delete some.

use std::path::PathBuf;

use engine::error::{Error, Result};
use engine::journal::{self, Event};
use engine::store::Store;
use serde_json::json;

use super::{CommandResult, existing_store, print_json};
use crate::args::{PipelineArgs, StoreArgs};
use crate::output::counted;

pub fn list(at: &StoreArgs) -> CommandResult {
    let store = existing_store(at)?;
    for folder in journal::run_folders(&store.runs())? {
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
            None if journal::is_running(&folder)? => "running".to_owned(),
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

/// Deletes the journals and reports of runs. Their results stay until the next garbage collection.
pub fn remove(ids: &[String], at: &StoreArgs) -> CommandResult {
    let store = existing_store(at)?;
    let folders = ids.iter().map(|id| find(&store, id)).collect::<Result<Vec<PathBuf>>>()?;
    for (id, folder) in ids.iter().zip(&folders) {
        if journal::is_running(folder)? {
            return Err(Error::user(format!("the run `{id}` has not ended")).help("stop it first").into());
        }
    }
    for folder in &folders {
        // The same run may be given twice.
        if folder.exists() {
            engine::gc::remove_run(folder)?;
        }
    }
    if at.json {
        print_json(&json!({ "removed": ids }));
    } else {
        outln!(
            "removed {}; results that nothing else keeps stay until `temper gc --delete`",
            counted(ids.len(), "run")
        );
    }
    Ok(0)
}

/// The folder of a run of the store, by its id, the beginning of it, or `latest`: the newest run of this pipeline with
/// these profiles.
pub fn find_of(store: &Store, id: &str, pipeline: &PipelineArgs) -> Result<PathBuf> {
    if id != "latest" {
        return find(store, id);
    }
    let name = pipeline.file.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());
    super::report::latest(store, &name, &pipeline.changes.profile)?.ok_or_else(|| {
        let profiles_note = if pipeline.changes.profile.is_empty() { "" } else { " with these profiles" };
        Error::user(format!("{} was never run in this store{profiles_note}", pipeline.file.display()))
    })
}

/// The folder of a run, by its id or the beginning of it.
///
/// # Errors
/// When there is no such run, or several (user error).
pub fn find(store: &Store, id: &str) -> Result<PathBuf> {
    let folders = journal::run_folders(&store.runs())?;
    let name = |folder: &PathBuf| folder.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
    if let Some(exact) = folders.iter().find(|folder| name(folder) == id) {
        return Ok(exact.clone());
    }
    let matching: Vec<&PathBuf> =
        folders.iter().filter(|folder| !id.is_empty() && name(folder).starts_with(id)).collect();
    match matching[..] {
        [one] => Ok(one.clone()),
        [] => Err(Error::user(format!("there is no run `{id}`")).help("`temper runs` lists them")),
        _ => Err(Error::user(format!("{} begin with `{id}`", counted(matching.len(), "run")))
            .help("`temper runs` lists them")),
    }
}
