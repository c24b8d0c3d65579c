//! `temper explain`: shows which field of a stage's recipe changed.

use engine::kind::Registry;
use engine::plan::Flags;
use serde_json::json;

use super::{CommandResult, load_instance, open_store, print_json};
use crate::args::PipelineArgs;

pub fn explain(pipeline: &PipelineArgs, stage: &str, registry: &Registry) -> CommandResult {
    let (graph, target) = load_instance(pipeline, stage, registry)?;
    let store = open_store(pipeline)?;
    let plan = engine::plan::plan(&graph, registry, &store, &Flags::default())?;
    let explanation = engine::plan::explain(&graph, registry, &store, &plan, target)?;
    if pipeline.store.json {
        print_json(&json!(explanation));
        return Ok(0);
    }
    outln!(
        "{}: {}{}",
        explanation.stage,
        explanation.action,
        if explanation.reason.is_empty() { String::new() } else { format!(", {}", explanation.reason) }
    );
    if let Some(key) = &explanation.key {
        outln!("  key {key}");
    }
    match &explanation.against {
        Some(against) => outln!("  against {} of run {} (key {})", against.stage, against.run, against.key.short()),
        None if explanation.action != "reuse" => outln!("  no earlier record of this kind to compare with"),
        None => {}
    }
    for change in &explanation.changes {
        let shown = |value: &Option<String>| value.clone().unwrap_or_else(|| "(absent)".to_owned());
        let from = change.from.as_ref().map_or_else(String::new, |from| format!("  (from {from})"));
        outln!("  {}: {} -> {}{from}", change.field, shown(&change.old), shown(&change.new));
    }
    for unknown in &explanation.unknown {
        let after: Vec<String> = unknown.after.iter().map(ToString::to_string).collect();
        outln!("  input `{}` ({}): known after {}", unknown.port, unknown.from, after.join(", "));
    }
    Ok(0)
}
