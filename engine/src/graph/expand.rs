//! Expands stages into instances: the product of the matrix, with each label's changes merged and variables filled in.

use serde_json::Value as Json;

use super::draft_index::DraftIndex;
use super::select::{Selection, Selector};
use crate::diagnostics::{Diagnostic, Diagnostics, Span};
use crate::document::interpolate::{self, Variable, substitute};
use crate::document::matrix::Label;
use crate::document::node::{Map, Node, Value};
use crate::document::{Stage, merge, seed_of, texts};
use crate::names::InstanceName;

/// Maximum number of connections, over all ports of all instances.
pub const MAX_CONNECTIONS: usize = 2_000_000;

/// An instance before its parameters and wiring are checked.
#[derive(Debug)]
pub struct InstanceDraft {
    /// Index into the document's stages.
    pub stage: usize,
    pub name: InstanceName,
    /// (dimension, label)
    pub matrix: Vec<(String, String)>,
    /// `with` of this instance as a tree, for source positions; variables are not filled in.
    pub with: Map,
    /// `with` as JSON, variables filled in.
    pub json: Json,
    pub needs: Vec<Need>,
    pub seed: u64,
    /// Whether no fault has been found so far.
    pub valid: bool,
}

/// The inputs of one port.
#[derive(Debug)]
pub struct Need {
    pub port: String,
    pub span: Span,
    /// Indices of drafts, each with the position of its selector.
    pub from: Vec<(usize, Span)>,
    /// Whether the notation allows several inputs: a list, a wildcard, or a stage that has a matrix.
    pub allows_many: bool,
    /// Whether every selector matched.
    pub valid: bool,
}

impl InstanceDraft {
    /// The instance's name for faults, if its stage has a matrix.
    pub fn display_name(&self) -> Option<String> {
        (!self.matrix.is_empty()).then(|| self.name.to_string())
    }
}

/// Every instance of every stage: stages in file order; of the labels, the last dimension varies fastest.
pub fn drafts(index: &DraftIndex, faults: &mut Diagnostics) -> Vec<InstanceDraft> {
    let mut drafts = Vec::with_capacity(index.draft_count());
    for (n, stage) in index.document.stages.iter().enumerate() {
        let count = index.drafts_of(n).len();
        for i in 0..count {
            let mut rest = i;
            let mut labels: Vec<&Label> = Vec::with_capacity(stage.matrix.len());
            for dimension in stage.matrix.iter().rev() {
                labels.push(&dimension.labels[rest % dimension.labels.len()]);
                rest /= dimension.labels.len();
            }
            labels.reverse();
            drafts.push(draft(index, n, stage, &labels, faults));
        }
    }
    drafts
}

fn draft(index: &DraftIndex, at: usize, stage: &Stage, labels: &[&Label], faults: &mut Diagnostics) -> InstanceDraft {
    let (mut with, mut needs, mut seed) = (stage.with.clone(), stage.needs.clone(), stage.seed.as_ref());
    for label in labels {
        for (map, key) in [(&mut with, "with"), (&mut needs, "needs")] {
            match label.changes.get(key).map(|node| &node.value) {
                Some(Value::Map(changes)) => merge::plain(map, changes),
                Some(Value::Null) => map.0.clear(),
                _ => {}
            }
        }
        if let Some(node) = label.changes.get("seed") {
            seed = Some(node).filter(|node| !node.is_null());
        }
    }
    let variables: Vec<Variable> = stage
        .matrix
        .iter()
        .zip(labels)
        .map(|(dimension, label)| Variable { name: &dimension.name, text: &label.text, value: &label.value })
        .collect();
    let matrix = variables.iter().map(|v| (v.name.to_owned(), v.text.to_owned())).collect();
    let name = InstanceName { stage: stage.name.clone(), labels: labels.iter().map(|l| l.text.clone()).collect() };
    let json = with.0.iter().map(|e| (e.key.clone(), interpolate::json(&e.value, &variables))).collect();
    let mut draft = InstanceDraft {
        stage: at,
        name,
        matrix,
        with,
        json,
        needs: Vec::new(),
        seed: index.document.seed,
        valid: stage.valid,
    };
    if let Some(node) = seed {
        let value = interpolate::value(&node.value, &variables);
        match seed_of(node, &value, &format!("stage `{}`", stage.name), faults) {
            Ok(seed) => draft.seed = seed,
            Err(fault) => {
                draft.valid = false;
                // A variable that was not filled in has been reported already.
                if !matches!(value.as_ref(), Value::Str(text) if text.contains("${")) {
                    faults.push(fault.of_instance(draft.display_name()));
                }
            }
        }
    }
    for entry in &needs.0 {
        let need = need(index, entry.key.clone(), entry.key_span, &entry.value, &variables, &draft, faults);
        draft.valid &= need.valid;
        draft.needs.push(need);
    }
    draft
}

fn need(
    index: &DraftIndex,
    port: String,
    span: Span,
    node: &Node,
    variables: &[Variable],
    user: &InstanceDraft,
    faults: &mut Diagnostics,
) -> Need {
    let before = faults.count();
    let selectors = texts(node, &format!("`{port}`"), faults);
    let listed = matches!(node.value, Value::List(_));
    let mut need = Need { port, span, from: Vec::new(), allows_many: listed, valid: faults.count() == before };
    for (text, span) in &selectors {
        if index.connections.get() > MAX_CONNECTIONS {
            need.valid = false;
            break;
        }
        let text = substitute(text, variables);
        let found = Selector::parse(&text).and_then(|selector| index.select(&selector));
        match found {
            Ok(Selection::Instances { drafts, allows_many }) => {
                need.allows_many |= allows_many;
                index.connections.set(index.connections.get() + drafts.len());
                if index.connections.get() > MAX_CONNECTIONS {
                    let message = format!("all ports together are connected to more than {MAX_CONNECTIONS} instances");
                    faults.push(Diagnostic::new(*span, message));
                    need.valid = false;
                    break;
                }
                need.from.extend(drafts.into_iter().map(|draft| (draft, *span)));
            }
            Ok(Selection::Faulty) => need.valid = false,
            Err((message, help)) => {
                faults.push(Diagnostic::new(*span, message).maybe_help(help).of_instance(user.display_name()));
                need.valid = false;
            }
        }
    }
    need
}
