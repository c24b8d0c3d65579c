//! `temper du` and `temper gc`: show what a store's results take, and delete those that nothing keeps.

use std::collections::BTreeSet;

use engine::gc::{ArtifactUse, KeptRuns, PipelineRoots, Survey, WorkUse};
use engine::graph::LoadOptions;
use engine::journal::utc;
use engine::kind::Registry;
use engine::store::Store;
use serde_json::json;

use super::{CommandResult, Failure, print_json, store_root_of};
use crate::args::CollectionArgs;
use crate::output::counted;
use crate::progress::size;
use crate::report::terminal::table;

/// Number of rows that `du` shows without `--all`.
const MAX_ROWS: usize = 30;

pub fn du(args: &CollectionArgs, all: bool, registry: &Registry) -> CommandResult {
    let (store, pipelines) = roots(args, registry)?;
    let found = engine::gc::survey(&store, &kept_runs(args), &pipelines)?;
    if args.store.json {
        print_json(&describe(&found));
        return Ok(0);
    }
    let shown = if all { found.artifacts.len() } else { MAX_ROWS };
    let rows: Vec<Vec<String>> = found
        .artifacts
        .iter()
        .take(shown)
        .map(|artifact| {
            vec![
                size(artifact.bytes as f64),
                stages(artifact),
                artifact.artifact_type.clone(),
                artifact.digest.short(),
                keepers(artifact),
            ]
        })
        .collect();
    if !rows.is_empty() {
        out!("{}", table(&["size", "stage", "type", "artifact", "kept by"], 5, &rows));
    }
    if found.artifacts.len() > shown {
        outln!("… and {} more (--all)", found.artifacts.len() - shown);
    }
    let work: u64 = found.work.iter().map(|work| work.bytes).sum();
    let runs: u64 = found.runs.iter().map(|run| run.bytes).sum();
    outln!("");
    for (bytes, what) in [
        (found.artifact_bytes, counted(found.artifacts.len(), "artifact") + ", shared files once"),
        (work, format!("checkpoints and attempts of {}", counted(found.work.len(), "key"))),
        (runs, counted(found.runs.len(), "run") + " (journals and reports)"),
        (found.requests_bytes, "paid answers".to_owned()),
        (found.quarantine_bytes, "quarantine".to_owned()),
        (found.leftover_bytes, "temporary files left by crashes".to_owned()),
    ] {
        if bytes > 0 {
            outln!("{:>10}  {what}", size(bytes as f64));
        }
    }
    outln!("{:>10}  in total", size(found.total() as f64));
    outln!("`temper gc` would free {}", size(found.freed() as f64));
    Ok(0)
}

pub fn gc(args: &CollectionArgs, delete: bool, registry: &Registry) -> CommandResult {
    let (store, pipelines) = roots(args, registry)?;
    let kept = kept_runs(args);
    let found = match delete {
        true => engine::gc::collect(&store, &kept, &pipelines, || {
            errln!("waiting for a command that is planning or storing results");
        })?,
        false => engine::gc::survey(&store, &kept, &pipelines)?,
    };
    if args.store.json {
        let artifacts: Vec<&ArtifactUse> = unkept(&found).collect();
        let work: Vec<&WorkUse> = found.work.iter().filter(|work| !work.kept).collect();
        print_json(&json!({
            "deleted": delete,
            "bytes": found.freed(),
            "artifacts": artifacts,
            "work": work,
            "unused_blob_bytes": found.unused_blob_bytes,
            "leftover_bytes": found.leftover_bytes,
        }));
        return Ok(0);
    }
    let made = |artifact: &ArtifactUse| match (&artifact.run, artifact.made) {
        (Some(run), Some(made)) => format!("{} by run {run}", utc(made)),
        _ => "no record".to_owned(),
    };
    let rows: Vec<Vec<String>> = unkept(&found)
        .map(|artifact| {
            vec![
                size(artifact.freed as f64),
                stages(artifact),
                artifact.artifact_type.clone(),
                artifact.digest.short(),
                made(artifact),
            ]
        })
        .collect();
    if !rows.is_empty() {
        out!("{}", table(&["frees", "stage", "type", "artifact", "made"], 5, &rows));
        outln!("");
    }
    let work: Vec<&WorkUse> = found.work.iter().filter(|work| !work.kept).collect();
    for finished in [true, false] {
        let of: Vec<&&WorkUse> = work.iter().filter(|work| work.finished == finished).collect();
        let bytes = size(of.iter().map(|work| work.bytes).sum::<u64>() as f64);
        if finished && !of.is_empty() {
            outln!("{bytes} in attempts and logs of {} with a result", counted(of.len(), "key"));
        } else if !of.is_empty() {
            let names: BTreeSet<&str> =
                of.iter().map(|work| work.stage.as_deref().unwrap_or("an unknown stage")).collect();
            let names: Vec<&str> = names.into_iter().collect();
            outln!("{bytes} in checkpoints and attempts that did not finish: {}", names.join(", "));
        }
    }
    if found.unused_blob_bytes + found.leftover_bytes > 0 {
        let bytes = found.unused_blob_bytes + found.leftover_bytes;
        outln!("{} in files that belong to no artifact", size(bytes as f64));
    }
    let freed = size(found.freed() as f64);
    let artifacts = counted(rows.len(), "artifact");
    if delete {
        outln!("deleted {artifacts}: {freed} freed");
    } else if found.freed() == 0 && rows.is_empty() {
        outln!("nothing to delete");
    } else if rows.is_empty() {
        outln!("would free {freed}; `--delete` deletes");
    } else {
        outln!("would delete {artifacts} and free {freed}; `--delete` deletes");
    }
    Ok(0)
}

fn unkept(found: &Survey) -> impl Iterator<Item = &ArtifactUse> {
    found.artifacts.iter().filter(|artifact| artifact.kept_by.is_empty())
}

fn stages(artifact: &ArtifactUse) -> String {
    let names: Vec<&str> = artifact.stages.iter().map(String::as_str).collect();
    match names[..] {
        [] => "–".to_owned(),
        [name] => name.to_owned(),
        [name, ..] => format!("{name} (+{})", names.len() - 1),
    }
}

/// The strongest reason to keep an artifact, and how many more there are.
fn keepers(artifact: &ArtifactUse) -> String {
    let mut kept = artifact.kept_by.iter();
    match (kept.next(), kept.count()) {
        (None, _) => "nothing".to_owned(),
        (Some(keeper), 0) => keeper.to_string(),
        (Some(keeper), more) => format!("{keeper} (+{more})"),
    }
}

fn describe(found: &Survey) -> serde_json::Value {
    let mut all = json!(found);
    all["total_bytes"] = json!(found.total());
    all["collectable_bytes"] = json!(found.freed());
    all
}

fn kept_runs(args: &CollectionArgs) -> KeptRuns {
    KeptRuns { newest: args.keep_runs, days: args.keep_days }
}

/// The store, and what each pipeline uses: as given on the command line, and with each of its profiles.
fn roots(args: &CollectionArgs, registry: &Registry) -> std::result::Result<(Store, Vec<PipelineRoots>), Failure> {
    let store = Store::open(&store_root_of(&args.files[0], &args.store))?;
    let mut pipelines = Vec::new();
    for file in &args.files {
        let given = LoadOptions {
            profiles: args.changes.profile.clone(),
            set: args.changes.set.clone(),
            ..LoadOptions::default()
        };
        let name = |profiles: &[String]| {
            let profiles: String = profiles.iter().map(|profile| format!(" +{profile}")).collect();
            format!("{}{profiles}", file.display())
        };
        let graph = engine::graph::load(file, &given, registry)?;
        pipelines.push(engine::gc::pipeline_roots(name(&given.profiles), &graph, registry, &store)?);
        let alone = std::iter::once(Vec::new())
            .chain(engine::graph::profile_names(file)?.into_iter().map(|profile| vec![profile]));
        for profiles in alone.filter(|profiles| *profiles != given.profiles) {
            let name = name(&profiles);
            // A profile may need a second one, or files that are not here.
            let roots = match engine::graph::load(file, &LoadOptions { profiles, ..given.clone() }, registry) {
                Ok(graph) => engine::gc::pipeline_roots(name.clone(), &graph, registry, &store),
                Err(faults) => {
                    let first = faults.faults().first().map_or_else(String::new, |fault| fault.message.clone());
                    Err(engine::error::Error::user(first))
                }
            };
            match roots {
                Ok(roots) => pipelines.push(roots),
                Err(error) => {
                    errln!("warning: {name} cannot be planned, so it keeps nothing: {}", error.message);
                }
            }
        }
    }
    Ok((store, pipelines))
}
