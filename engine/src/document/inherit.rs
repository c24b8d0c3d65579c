//! `matrix: { from: STAGE }`: a stage takes the matrix variables of another, so that a label is added in one place.

use super::node::{Entry, Map, Node, Value, resolve};
use crate::diagnostics::{Diagnostic, Diagnostics, did_you_mean};

const FROM: &str = "from";

/// Replaces `from` in every matrix by the variables of the named stage. Labels come without their changes to that
/// stage. A variable that the stage itself gives replaces the inherited one.
///
/// A list or a map under `from` is an ordinary matrix variable of that name.
pub fn resolve_matrices(stages: &mut Map, faults: &mut Diagnostics) {
    let inheriting: Vec<usize> = (0..stages.0.len()).filter(|at| source(&stages.0[*at]).is_some()).collect();
    let mut resolved = Vec::with_capacity(inheriting.len());
    for at in inheriting {
        let own = Map(variables(stages, &stages.0[at], &mut Vec::new(), faults));
        resolved.push((at, own));
    }
    for (at, own) in resolved {
        if let Value::Map(stage) = &mut stages.0[at].value.value
            && let Some(position) = stage.position("matrix")
        {
            stage.0[position].value.value = Value::Map(own);
        }
    }
}

/// The name under `from` in a stage's matrix.
fn source(stage: &Entry) -> Option<(&str, &Node)> {
    let node = stage.value.as_map()?.get("matrix")?.as_map()?.get(FROM)?;
    match &node.value {
        Value::Str(name) => Some((name.trim(), node)),
        _ => None,
    }
}

/// The matrix variables of a stage, `from` replaced. `open`: the stages on the way here.
fn variables<'a>(stages: &'a Map, stage: &'a Entry, open: &mut Vec<&'a str>, faults: &mut Diagnostics) -> Vec<Entry> {
    let own = stage.value.as_map().and_then(|stage| stage.get("matrix")).and_then(Node::as_map);
    let own = own.map(|matrix| matrix.0.clone()).unwrap_or_default();
    let Some((name, node)) = source(stage) else { return own };
    open.push(&stage.key);
    let fault = |message: String| Diagnostic::new(node.span, format!("matrix of stage `{}`: {message}", stage.key));
    let mut all = Vec::new();
    if open.contains(&name) {
        faults.push(fault(format!("`from: {name}` leads back to the stage itself")));
    } else {
        match stages.entry(name) {
            None => faults.push(fault(format!("unknown stage `{name}`")).maybe_help(did_you_mean(name, stages.keys()))),
            Some(other) => {
                all.extend(variables(stages, other, open, faults).into_iter().map(|entry| labels_only(entry, faults)));
                if all.is_empty() && faults.faults().is_empty() {
                    faults.push(fault(format!("stage `{name}` has no matrix")));
                }
            }
        }
    }
    let mut matrix = Map(all);
    own.into_iter().filter(|entry| entry.key != FROM).for_each(|entry| matrix.put(entry));
    matrix.0
}

/// The variable with its labels as a list.
fn labels_only(variable: Entry, faults: &Diagnostics) -> Entry {
    let Value::Map(labels) = variable.value.value else { return variable };
    let labels = labels.0.into_iter().map(|label| {
        // As in a map of labels: a quoted key is text.
        let plain = faults.slice(label.key_span) == label.key;
        let value = if plain { resolve(&label.key).ok() } else { None };
        let value = value.filter(|value| *value != Value::Null).unwrap_or(Value::Str(label.key));
        Node { span: label.key_span, value }
    });
    let value = Node { span: variable.value.span, value: Value::List(labels.collect()) };
    Entry { value, ..variable }
}
