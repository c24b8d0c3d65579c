//! `temper show` and `temper path`: show a stage's artifact.

use engine::error::{Error, Result};
use engine::graph::Graph;
use engine::kind::Registry;
use engine::names::{Digest, Key};
use engine::plan::{Flags, PlannedState, Reason};
use engine::store::{Artifact, Store};
use serde_json::json;

use super::{CommandResult, load_instance, open_store, print_json};
use crate::args::PipelineArgs;
use crate::output::counted;

pub fn path(pipeline: &PipelineArgs, stage: &str, registry: &Registry) -> CommandResult {
    let (graph, target) = load_instance(pipeline, stage, registry)?;
    let store = open_store(pipeline)?;
    let (_, _, artifact) = find(&graph, target, &store, registry)?;
    if pipeline.store.json {
        print_json(&json!({ "folder": artifact.folder }));
    } else {
        outln!("{}", artifact.folder.display());
    }
    Ok(0)
}

pub fn show(pipeline: &PipelineArgs, stage: &str, rows: usize, registry: &Registry) -> CommandResult {
    let (graph, target) = load_instance(pipeline, stage, registry)?;
    let store = open_store(pipeline)?;
    let (key, digest, artifact) = find(&graph, target, &store, registry)?;
    let provenance = store.action(&key)?.map(|record| record.provenance);
    let manifest = &artifact.manifest;
    if pipeline.store.json {
        print_json(&json!({
            "stage": graph.instances[target].name.to_string(),
            "type": manifest.artifact_type,
            "schema_version": manifest.schema_version,
            "digest": digest,
            "key": key,
            "files": manifest.files,
            "rows": manifest.facts.rows,
            "schema": manifest.facts.schema,
            "metrics": manifest.facts.metrics,
            "provenance": provenance,
        }));
        return Ok(0);
    }
    outln!("{}  {} {}", graph.instances[target].name, manifest.artifact_type, digest.short());
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

fn find(graph: &Graph, target: usize, store: &Store, registry: &Registry) -> Result<(Key, Digest, Artifact)> {
    let plan = engine::plan::plan(graph, registry, store, &Flags::default())?;
    let name = &graph.instances[target].name;
    match &plan.stages[target].state {
        PlannedState::Reuse { key, digest } => Ok((*key, *digest, store.open_artifact(digest)?)),
        PlannedState::Run { reason: reason @ (Reason::ArtifactMissing | Reason::ArtifactDamaged { .. }), .. } => {
            Err(Error::user(format!("{name}: {reason}"))
                .help(format!("`temper run PIPELINE --until {name}` makes it again")))
        }
        _ => Err(Error::user(format!("{name} has not been run with its current recipe")).help(format!(
            "`temper explain PIPELINE {name}` shows what changed; `temper run PIPELINE --until {name}` runs it"
        ))),
    }
}
