//! `temper explain`: shows which field of a stage's recipe, or of one upstream, changed.

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
    } else {
        put!("{told}");
    }
    Ok(0)
}
