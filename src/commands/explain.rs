//! `temper explain`: shows which field of a stage's recipe changed.

use engine::kind::Registry;
use engine::plan::Flags;
use serde_json::json;

use super::{Done, load_to, open_store, print_json};
use crate::args::Pipeline;

pub fn explain(pipeline: &Pipeline, stage: &str, registry: &Registry) -> Done {
    let (graph, target) = load_to(pipeline, stage, registry)?;
    let store = open_store(pipeline)?;
    let plan = engine::plan::plan(&graph, registry, &store, &Flags::default())?;
    let told = engine::plan::explain(&graph, registry, &store, &plan, target)?;
    if pipeline.store.json {
        print_json(&json!(told));
        return Ok(0);
    }
    say!(
        "{}: {}{}",
        told.stage,
        told.action,
        if told.reason.is_empty() { String::new() } else { format!(", {}", told.reason) }
    );
    if let Some(key) = &told.key {
        say!("  key {key}");
    }
    match &told.against {
        Some(against) => say!("  against {} of run {} (key {})", against.stage, against.run, against.key.short()),
        None if told.action != "reuse" => say!("  no earlier record of this kind to compare with"),
        None => {}
    }
    for change in &told.changes {
        let side = |value: &Option<String>| value.clone().unwrap_or_else(|| "(absent)".to_owned());
        let from = change.from.as_ref().map_or_else(String::new, |from| format!("  (from {from})"));
        say!("  {}: {} -> {}{from}", change.field, side(&change.old), side(&change.new));
    }
    for unknown in &told.unknown {
        let after: Vec<String> = unknown.after.iter().map(ToString::to_string).collect();
        say!("  input `{}` ({}): known after {}", unknown.port, unknown.from, after.join(", "));
    }
    Ok(0)
}
