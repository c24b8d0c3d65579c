//! `temper show` and `temper path`: show a stage's artifact.

use std::collections::BTreeMap;

use engine::error::{Error, Result};
use engine::graph::Graph;
use engine::journal::{self, Event};
use engine::kind::Registry;
use engine::names::{Digest, Key};
use engine::plan::{Flags, PlannedState, Reason, Recipe};
use engine::store::{Artifact, Store};
use serde_json::json;

use super::{CommandResult, Failure, load_instance, open_store, print_json, runs};
use crate::args::PipelineArgs;
use crate::flatten::flatten;
use crate::output::counted;

/// The result of one instance.
struct Shown {
    /// The instance's name.
    stage: String,
    key: Key,
    digest: Digest,
    artifact: Artifact,
    /// Instances by digest, as far as known, to name the inputs.
    names: BTreeMap<Digest, String>,
}

pub fn path(pipeline: &PipelineArgs, stage: &str, run: Option<&str>, registry: &Registry) -> CommandResult {
    let (Shown { artifact, .. }, _) = find(pipeline, stage, run, registry)?;
    if pipeline.store.json {
        print_json(&json!({ "folder": artifact.folder }));
    } else {
        outln!("{}", artifact.folder.display());
    }
    Ok(0)
}

pub fn show(
    pipeline: &PipelineArgs,
    stage: &str,
    run: Option<&str>,
    rows: usize,
    registry: &Registry,
) -> CommandResult {
    let (Shown { stage, key, digest, artifact, names }, store) = find(pipeline, stage, run, registry)?;
    let record = store.action(&key)?;
    let recipe = record.as_ref().map(|record| record.recipe.clone());
    let provenance = record.map(|record| record.provenance);
    let manifest = &artifact.manifest;
    if pipeline.store.json {
        print_json(&json!({
            "stage": stage,
            "type": manifest.artifact_type,
            "schema_version": manifest.schema_version,
            "digest": digest,
            "key": key,
            "files": manifest.files,
            "rows": manifest.facts.rows,
            "schema": manifest.facts.schema,
            "metrics": manifest.facts.metrics,
            "recipe": recipe,
            "provenance": provenance,
        }));
        return Ok(0);
    }
    outln!("{stage}  {} {}", manifest.artifact_type, digest.short());
    outln!("  key {key}\n  folder {}", artifact.folder.display());
    if let Some(p) = provenance {
        let job = p.job.map_or_else(String::new, |job| format!(" as job {} of {}", job.id, job.executor));
        outln!(
            "  made by run {} in {:.1} s on {}{job} ({}, {})",
            p.run,
            p.seconds,
            p.host,
            p.platform.target,
            p.platform.instructions
        );
        for warning in &p.warnings {
            outln!("  warning: {warning}");
        }
    }
    if let Some(recipe) = recipe {
        print_recipe(&recipe, &names);
    }
    outln!("files");
    for (name, file) in &manifest.files {
        outln!("  {:>12}  {name}  {}", file.bytes, file.digest.short());
    }
    for (table, count) in &manifest.facts.rows {
        outln!("{table}: {}", counted(*count as usize, "row"));
        for (column, kind) in manifest.facts.schema.get(table).into_iter().flatten() {
            outln!("  {column}: {kind}");
        }
    }
    if !manifest.facts.metrics.is_empty() {
        outln!("metrics");
        for (name, value) in &manifest.facts.metrics {
            outln!("  {name}: {value}");
        }
    }
    if let Some(t) = registry.get_type(&manifest.artifact_type) {
        outln!("\n{}", t.preview(&artifact.folder, rows)?.trim_end());
    }
    Ok(0)
}

/// Prints everything that determines the artifact's bytes, with the defaults filled in.
fn print_recipe(recipe: &Recipe, names: &BTreeMap<Digest, String>) {
    let numerics = recipe.numerics.map_or_else(String::new, |numerics| format!(", numerics {numerics}"));
    outln!("recipe\n  uses: {} (version {}{numerics})", recipe.kind, recipe.version);
    if let Some(seed) = recipe.seed {
        outln!("  seed: {seed}");
    }
    for port in &recipe.inputs {
        let inputs = port.from.iter().map(|input| match (names.get(&input.digest), &input.label) {
            (Some(name), _) => format!("{name} {}", input.digest.short()),
            (None, Some(label)) => format!("{label} {}", input.digest.short()),
            (None, None) => input.digest.short(),
        });
        outln!("  needs.{}: {}", port.port, inputs.collect::<Vec<_>>().join(", "));
    }
    for (name, value) in flatten(&recipe.params) {
        outln!("  with.{name}: {value}");
    }
}

/// The result of the current recipe, or that of a run.
fn find(
    pipeline: &PipelineArgs,
    stage: &str,
    run: Option<&str>,
    registry: &Registry,
) -> std::result::Result<(Shown, Store), Failure> {
    if let Some(run) = run {
        let store = open_store(pipeline)?;
        return Ok((find_in_run(&store, run, stage, pipeline)?, store));
    }
    let (graph, target) = load_instance(pipeline, stage, registry)?;
    let store = open_store(pipeline)?;
    Ok((find_current(&graph, target, &store, registry)?, store))
}

fn find_current(graph: &Graph, target: usize, store: &Store, registry: &Registry) -> Result<Shown> {
    let plan = engine::plan::plan(graph, registry, store, &Flags::default())?;
    let name = &graph.instances[target].name;
    match &plan.stages[target].state {
        PlannedState::Reuse { key, digest } => {
            let names = graph.instances.iter().zip(plan.known());
            let names = names.filter_map(|(instance, digest)| Some((digest?, instance.name.to_string())));
            let artifact = store.open_artifact(digest)?;
            Ok(Shown { stage: name.to_string(), key: *key, digest: *digest, artifact, names: names.collect() })
        }
        PlannedState::Run { reason: reason @ (Reason::ArtifactMissing | Reason::ArtifactDamaged { .. }), .. } => {
            Err(Error::user(format!("{name}: {reason}"))
                .help(format!("`temper run PIPELINE --until {name}` makes it again")))
        }
        _ => Err(Error::user(format!("{name} has not been run with its current recipe")).help(format!(
            "`temper explain PIPELINE {name}` shows what changed; `temper run PIPELINE --until {name}` runs it; \
             `--run ID` shows that of an earlier run"
        ))),
    }
}

fn find_in_run(store: &Store, run: &str, stage: &str, pipeline: &PipelineArgs) -> Result<Shown> {
    let folder = runs::find_of(store, run, pipeline)?;
    let id = folder.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let (mut found, mut names) = (BTreeMap::new(), BTreeMap::new());
    for line in journal::read(&folder)? {
        if let Event::StageFinished { stage, key, digest, .. } | Event::StageReused { stage, key, digest, .. } =
            line.event
        {
            names.insert(digest, stage.clone());
            found.insert(stage, (key, digest));
        }
    }
    let typed = stage.replace(' ', "");
    let Some((key, digest)) = found.get(&typed).copied() else {
        let of_stage: Vec<&str> =
            found.keys().map(String::as_str).filter(|name| name.split('[').next() == Some(stage)).collect();
        let help = match of_stage[..] {
            [] => format!("`temper report PIPELINE --run {id}` lists the stages of the run"),
            _ => format!("choose one of {}", of_stage.join(", ")),
        };
        return Err(Error::user(format!("run {id} has no result of `{stage}`")).help(help));
    };
    let artifact = store.open_artifact(&digest).map_err(|error| error.context(&typed))?;
    Ok(Shown { stage: typed, key, digest, artifact, names })
}
