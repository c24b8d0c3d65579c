//! `temper explain`: shows which field of a stage's recipe, or of one upstream, changed.

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
    } else {
        out!("{explanation}");
    }
    Ok(0)
}
