//! The options `--force` and `--from`.

use std::collections::BTreeSet;

use super::{Plan, PlannedState};
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::names::InstanceName;

/// Command-line options that affect planning.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Flags {
    /// Instances whose records are ignored.
    pub force: BTreeSet<InstanceName>,
    /// Instances whose upstream instances must all be reusable.
    pub from: BTreeSet<InstanceName>,
}

impl Flags {
    /// Parses names as typed: a stage (`sft`: all its instances), an instance (`sft[s]`), or `*` for any label
    /// (`rl[*,11]`).
    ///
    /// # Errors
    /// A name that is not in the graph (user error); suggests the nearest name.
    pub fn new(graph: &Graph, force: &[String], from: &[String]) -> Result<Self> {
        let mut unknown = Vec::new();
        let force = select_all(graph, "--force", force, &mut unknown);
        let from = select_all(graph, "--from", from, &mut unknown);
        match unknown.len() {
            0 => Ok(Self { force, from }),
            1 => Err(unknown.remove(0)),
            _ => {
                let messages: Vec<String> = unknown.iter().map(|error| error.message.clone()).collect();
                Err(Error::user(messages.join("\n       ")).help("`temper plan` lists the stages"))
            }
        }
    }

    pub(super) fn check_from(&self, graph: &Graph, plan: &Plan) -> Result<()> {
        let position = |i: &usize| self.from.contains(&graph.instances[*i].name);
        let mut open: Vec<usize> = (0..graph.instances.len()).filter(position).collect();
        let mut upstream = BTreeSet::new();
        while let Some(i) = open.pop() {
            for source in graph.instances[i].inputs.iter().flat_map(|port| &port.from) {
                if upstream.insert(source.instance) {
                    open.push(source.instance);
                }
            }
        }
        let missing = upstream.iter().filter(|i| !position(i)).filter_map(|i| {
            let name = &graph.instances[*i].name;
            match &plan.stages[*i].state {
                PlannedState::Reuse { .. } => None,
                PlannedState::Run { reason, .. } => Some(format!("`{name}` ({reason})")),
                PlannedState::Pending { .. } => Some(format!("`{name}` (pending)")),
            }
        });
        let missing: Vec<String> = missing.collect();
        if missing.is_empty() {
            return Ok(());
        }
        let from: Vec<String> = self.from.iter().map(|name| format!("`{name}`")).collect();
        Err(Error::user(format!("--from {}: cannot be reused: {}", from.join(", "), missing.join(", ")))
            .help("run without --from, which computes what is missing"))
    }
}

fn select_all(graph: &Graph, flag: &str, names: &[String], unknown: &mut Vec<Error>) -> BTreeSet<InstanceName> {
    let mut selected = BTreeSet::new();
    for name in names {
        let before = selected.len();
        let matching = |instance: &&InstanceName| matches(name, instance);
        selected.extend(graph.instances.iter().map(|i| &i.name).filter(matching).cloned());
        if selected.len() == before && !selected.iter().any(|instance| matches(name, instance)) {
            unknown.push(unknown_stage(graph, flag, name));
        }
    }
    selected
}

fn matches(typed: &str, instance: &InstanceName) -> bool {
    let (stage, labels) = match typed.strip_suffix(']').and_then(|typed| typed.split_once('[')) {
        Some((stage, labels)) => (stage.trim(), Some(labels)),
        None => (typed.trim(), None),
    };
    let Some(labels) = labels else { return stage == instance.stage.as_str() };
    let labels: Vec<&str> = labels.split(',').map(str::trim).collect();
    stage == instance.stage.as_str()
        && labels.len() == instance.labels.len()
        && labels.iter().zip(&instance.labels).all(|(typed, label)| *typed == "*" || typed == label)
}

fn unknown_stage(graph: &Graph, flag: &str, typed: &str) -> Error {
    if graph.not_needed.iter().any(|instance| matches(typed, instance)) {
        return Error::user(format!("{flag} {typed}: no target needs this stage"))
            .help(format!("add it to the targets: `--until {typed}`"));
    }
    let error = Error::user(format!("{flag} {typed}: the pipeline has no such stage"));
    let names = graph.instances.iter().flat_map(|i| [i.name.to_string(), i.name.stage.to_string()]);
    let nearest = names.map(|name| (strsim::damerau_levenshtein(&name, typed), name)).min();
    match nearest {
        Some((distance, name)) if distance <= 1 + typed.len() / 3 => error.help(format!("did you mean `{name}`?")),
        _ => error.help("`temper plan` lists the stages"),
    }
}
