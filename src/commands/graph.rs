//! `temper graph`: draws the graph and its cached stages as Mermaid, DOT or SVG.

use engine::kind::Registry;
use engine::plan::{Flags, PlannedState};

use serde_json::json;

use super::{CommandResult, load, open_store, print_json};
use crate::args::{GraphFormat, PipelineArgs};
use crate::graph_view::{GraphNode, layers_svg};

pub fn graph(pipeline: &PipelineArgs, format: GraphFormat, registry: &Registry) -> CommandResult {
    let graph = load(pipeline, &[], registry)?;
    let store = open_store(pipeline)?;
    let plan = engine::plan::plan(&graph, registry, &store, &Flags::default())?;
    let nodes: Vec<GraphNode> = graph
        .instances
        .iter()
        .zip(&plan.stages)
        .map(|(instance, planned)| {
            let cached = matches!(planned.state, PlannedState::Reuse { .. });
            let state = match planned.state {
                PlannedState::Reuse { .. } => "cached",
                PlannedState::Run { .. } => "to run",
                PlannedState::Pending { .. } => "pending",
            };
            let sources = instance.inputs.iter().flat_map(|port| &port.from);
            GraphNode {
                name: instance.name.to_string(),
                from: sources.map(|s| graph.instances[s.instance].name.to_string()).collect(),
                note: format!("{} · {state}", instance.kind),
                ran: cached,
                unreached: matches!(planned.state, PlannedState::Pending { .. }),
                ..GraphNode::default()
            }
        })
        .collect();
    if pipeline.store.json {
        let stages = nodes.iter().zip(&graph.instances);
        let stages = stages.map(|(b, i)| json!({ "stage": b.name, "kind": i.kind, "needs": b.from, "cached": b.ran }));
        print_json(&json!({ "stages": stages.collect::<Vec<_>>() }));
        return Ok(0);
    }
    match format {
        GraphFormat::Svg => outln!("{}", layers_svg(&nodes)),
        GraphFormat::Mermaid => out!("{}", mermaid(&nodes)),
        GraphFormat::Dot => out!("{}", dot(&nodes)),
    }
    Ok(0)
}

fn mermaid(nodes: &[GraphNode]) -> String {
    let mut out = String::from("flowchart LR\n");
    let position = |name: &str| nodes.iter().position(|b| b.name == name);
    for (i, b) in nodes.iter().enumerate() {
        out.push_str(&format!("  n{i}[\"{}\"]{}\n", b.name, if b.ran { ":::cached" } else { "" }));
        for from in b.from.iter().filter_map(|from| position(from)) {
            out.push_str(&format!("  n{from} --> n{i}\n"));
        }
    }
    out + "  classDef cached stroke:#1d7f4e,stroke-width:2px\n"
}

fn dot(nodes: &[GraphNode]) -> String {
    let mut out = String::from("digraph pipeline {\n  rankdir=LR;\n  node [shape=box];\n");
    for b in nodes {
        out.push_str(&format!("  \"{}\"{};\n", b.name, if b.ran { " [color=\"#1d7f4e\"]" } else { "" }));
        for from in &b.from {
            out.push_str(&format!("  \"{from}\" -> \"{}\";\n", b.name));
        }
    }
    out + "}\n"
}
