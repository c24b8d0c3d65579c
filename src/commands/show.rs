//! `temper show` and `temper path`: show a stage's artifact.

use engine::error::{Error, Result};
use engine::graph::Graph;
use engine::kind::Registry;
use engine::names::{Digest, Key};
use engine::plan::{Flags, Reason, State};
use engine::store::{Artifact, Store};
use serde_json::json;

use super::{Done, load_to, open_store, print_json};
use crate::args::Pipeline;
use crate::output::counted;

pub fn path(pipeline: &Pipeline, stage: &str, registry: &Registry) -> Done {
    let (graph, target) = load_to(pipeline, stage, registry)?;
    let store = open_store(pipeline)?;
    let (_, _, artifact) = find(&graph, target, &store, registry)?;
    if pipeline.store.json {
        print_json(&json!({ "folder": artifact.folder }));
    } else {
        say!("{}", artifact.folder.display());
    }
    Ok(0)
}

pub fn show(pipeline: &Pipeline, stage: &str, rows: usize, registry: &Registry) -> Done {
    let (graph, target) = load_to(pipeline, stage, registry)?;
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
    say!("{}  {} {}", graph.instances[target].name, manifest.artifact_type, digest.short());
    say!("  key {key}\n  folder {}", artifact.folder.display());
    if let Some(p) = provenance {
        say!(
            "  made by run {} in {:.1} s on {} ({}, {})",
            p.run,
            p.seconds,
            p.host,
            p.platform.target,
            p.platform.instructions
        );
        for warning in &p.warnings {
            say!("  warning: {warning}");
        }
    }
    say!("files");
    for (name, file) in &manifest.files {
        say!("  {:>12}  {name}  {}", file.bytes, file.digest.short());
    }
    for (table, count) in &manifest.facts.rows {
        say!("{table}: {}", counted(*count as usize, "row"));
        for (column, kind) in manifest.facts.schema.get(table).into_iter().flatten() {
            say!("  {column}: {kind}");
        }
    }
    if !manifest.facts.metrics.is_empty() {
        say!("metrics");
        for (name, value) in &manifest.facts.metrics {
            say!("  {name}: {value}");
        }
    }
    if let Some(t) = registry.get_type(&manifest.artifact_type) {
        say!("\n{}", t.preview(&artifact.folder, rows)?.trim_end());
    }
    Ok(0)
}

fn find(graph: &Graph, target: usize, store: &Store, registry: &Registry) -> Result<(Key, Digest, Artifact)> {
    let plan = engine::plan::plan(graph, registry, store, &Flags::default())?;
    let name = &graph.instances[target].name;
    match &plan.stages[target].state {
        State::Reuse { key, digest } => Ok((*key, *digest, store.open_artifact(digest)?)),
        State::Run { reason: reason @ (Reason::ArtifactMissing | Reason::ArtifactRotten { .. }), .. } => {
            Err(Error::yours(format!("{name}: {reason}"))
                .help(format!("`temper run PIPELINE --until {name}` makes it again")))
        }
        _ => Err(Error::yours(format!("{name} has not been run in its present form")).help(format!(
            "`temper explain PIPELINE {name}` tells what changed; `temper run PIPELINE --until {name}` makes it"
        ))),
    }
}
