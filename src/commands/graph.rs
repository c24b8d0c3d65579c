//! `temper graph`: draws the graph and its cached stages as Mermaid, DOT or SVG.

use engine::kind::Registry;
use engine::plan::{Flags, State};

use serde_json::json;

use super::{Done, load, open_store, print_json};
use crate::args::{GraphFormat, Pipeline};
use crate::graph_view::{Box, layers_svg};

pub fn graph(pipeline: &Pipeline, format: GraphFormat, registry: &Registry) -> Done {
    let graph = load(pipeline, &[], registry)?;
    let store = open_store(pipeline)?;
    let plan = engine::plan::plan(&graph, registry, &store, &Flags::default())?;
    let boxes: Vec<Box> = graph
        .instances
        .iter()
        .zip(&plan.stages)
        .map(|(instance, planned)| {
            let cached = matches!(planned.state, State::Reuse { .. });
            let state = match planned.state {
                State::Reuse { .. } => "cached",
                State::Run { .. } => "to run",
                State::Pending { .. } => "pending",
            };
            let sources = instance.inputs.iter().flat_map(|port| &port.from);
            Box {
                name: instance.name.to_string(),
                from: sources.map(|s| graph.instances[s.instance].name.to_string()).collect(),
                note: format!("{} · {state}", instance.kind),
                ran: cached,
                unreached: matches!(planned.state, State::Pending { .. }),
                ..Box::default()
            }
        })
        .collect();
    if pipeline.store.json {
        let stages = boxes.iter().zip(&graph.instances);
        let stages = stages.map(|(b, i)| json!({ "stage": b.name, "kind": i.kind, "needs": b.from, "cached": b.ran }));
        print_json(&json!({ "stages": stages.collect::<Vec<_>>() }));
        return Ok(0);
    }
    match format {
        GraphFormat::Svg => say!("{}", layers_svg(&boxes)),
        GraphFormat::Mermaid => put!("{}", mermaid(&boxes)),
        GraphFormat::Dot => put!("{}", dot(&boxes)),
    }
    Ok(0)
}

fn mermaid(boxes: &[Box]) -> String {
    let mut out = String::from("flowchart LR\n");
    let place = |name: &str| boxes.iter().position(|b| b.name == name);
    for (i, b) in boxes.iter().enumerate() {
        out.push_str(&format!("  n{i}[\"{}\"]{}\n", b.name, if b.ran { ":::cached" } else { "" }));
        for from in b.from.iter().filter_map(|from| place(from)) {
            out.push_str(&format!("  n{from} --> n{i}\n"));
        }
    }
    out + "  classDef cached stroke:#1d7f4e,stroke-width:2px\n"
}

fn dot(boxes: &[Box]) -> String {
    let mut out = String::from("digraph pipeline {\n  rankdir=LR;\n  node [shape=box];\n");
    for b in boxes {
        out.push_str(&format!("  \"{}\"{};\n", b.name, if b.ran { " [color=\"#1d7f4e\"]" } else { "" }));
        for from in &b.from {
            out.push_str(&format!("  \"{from}\" -> \"{}\";\n", b.name));
        }
    }
    out + "}\n"
}
