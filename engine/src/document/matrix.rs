//! A stage's matrix: dimensions, labels, and the variables that they define.

use std::collections::HashMap;

use super::interpolate::{TextPart, parts};
use super::node::{Map, Node, Value, resolve};
use super::{LABEL_KEYS, Stage, check_names, known_keys};
use crate::diagnostics::{Diagnostic, Diagnostics, Span, did_you_mean};
use crate::names::{MAX_NAME_BYTES, StageName, is_name};

#[derive(Clone, Debug)]
pub struct Dimension {
    pub name: String,
    pub span: Span,
    pub labels: Vec<Label>,
    /// Whether `labels` has every label that the file gives.
    pub valid: bool,
}

#[derive(Clone, Debug)]
pub struct Label {
    pub text: String,
    /// Always a scalar.
    pub value: Value,
    /// The label's changes to the stage: `with`, `needs`, `seed`. Empty if the dimension is a list.
    pub changes: Map,
}

/// Whether `s` may be a matrix label: a name, which may contain dots, such as `0.005`.
pub fn is_label(s: &str) -> bool {
    (1..=MAX_NAME_BYTES).contains(&s.len())
        && s.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'-' | b'.'))
        && s.bytes().any(|b| b != b'.')
}

pub fn read(node: Node, stage: &StageName, faults: &mut Diagnostics) -> Vec<Dimension> {
    let what = node.type_name();
    let map = match node.value {
        Value::Map(map) => map,
        Value::Null => return Vec::new(),
        _ => {
            faults.push(Diagnostic::new(node.span, format!("`matrix` must be a map; this is {what}")));
            return vec![Dimension { name: String::new(), span: node.span, labels: Vec::new(), valid: false }];
        }
    };
    check_names(map.0.iter().map(|e| (e.key.as_str(), e.key_span)), "matrix variable", is_name, faults);
    map.0
        .into_iter()
        .map(|entry| {
            let before = faults.count();
            let labels = labels(&entry.key, entry.value, stage, faults);
            Dimension { name: entry.key, span: entry.key_span, labels, valid: faults.count() == before }
        })
        .collect()
}

fn labels(dimension: &str, node: Node, stage: &StageName, faults: &mut Diagnostics) -> Vec<Label> {
    let mut spanned: Vec<(Label, Span)> = Vec::new();
    match node.value {
        Value::List(items) => {
            for item in items {
                let text = match &item.value {
                    Value::Str(text) => text.clone(),
                    Value::Null | Value::List(_) | Value::Map(_) => {
                        let message = format!(
                            "matrix variable `{dimension}`: expected text or a number, found {}",
                            item.type_name()
                        );
                        let help = "to change a stage by label, use a map of labels to `with`, `needs` and `seed`";
                        faults.push(Diagnostic::new(item.span, message).help(help));
                        continue;
                    }
                    // The label is the number as written in the file.
                    _ => faults.slice(item.span).to_owned(),
                };
                spanned.push((Label { text, value: item.value, changes: Map::default() }, item.span));
            }
        }
        Value::Map(map) => {
            for entry in map.0 {
                let what = entry.value.type_name();
                let changes = match entry.value.value {
                    Value::Map(changes) => changes,
                    Value::Null => Map::default(),
                    _ => {
                        let message = format!(
                            "label `{}` must be a map with `with`, `needs` or `seed`; this is {what}",
                            entry.key
                        );
                        faults.push(Diagnostic::new(entry.value.span, message));
                        Map::default()
                    }
                };
                check_changes(&changes, faults);
                // A quoted key is text; an unquoted key is resolved like any YAML scalar.
                let plain = faults.slice(entry.key_span) == entry.key;
                let value = if plain { resolve(&entry.key).ok() } else { None };
                let value = value.filter(|v| *v != Value::Null).unwrap_or_else(|| Value::Str(entry.key.clone()));
                spanned.push((Label { text: entry.key, value, changes }, entry.key_span));
            }
        }
        _ => {
            let message = format!("matrix variable `{dimension}` must be a list of values or a map of labels");
            faults.push(Diagnostic::new(node.span, message));
            return Vec::new();
        }
    }
    if spanned.is_empty() {
        faults.push(Diagnostic::new(
            node.span,
            format!("matrix variable `{dimension}` of stage `{stage}` has no values"),
        ));
    }
    check_names(spanned.iter().map(|(label, span)| (label.text.as_str(), *span)), "matrix label", is_label, faults);
    let mut first: HashMap<String, Span> = HashMap::new();
    spanned.retain(|(label, span)| match first.get(&label.text) {
        Some(before) => {
            let message = format!("matrix variable `{dimension}` has the value `{}` twice", label.text);
            faults.push(Diagnostic::new(*span, message).also(*before, "first defined here"));
            false
        }
        None => {
            first.insert(label.text.clone(), *span);
            is_label(&label.text)
        }
    });
    spanned.into_iter().map(|(label, _)| label).collect()
}

fn check_changes(changes: &Map, faults: &mut Diagnostics) {
    known_keys(changes, LABEL_KEYS, "a matrix label", faults);
    for key in ["with", "needs"] {
        if let Some(node) = changes.get(key).filter(|node| node.as_map().is_none() && !node.is_null()) {
            faults.push(Diagnostic::new(node.span, format!("`{key}` must be a map; this is {}", node.type_name())));
        }
    }
}

/// Reports references to variables that do not exist. Returns, for each dimension, whether its variable is used.
pub fn check_variables(stage: &Stage, faults: &mut Diagnostics) -> Vec<bool> {
    let mut used = vec![false; stage.matrix.len()];
    let mut pending: Vec<&Node> = Vec::new();
    let label_changes = stage.matrix.iter().flat_map(|d| &d.labels).map(|label| &label.changes);
    for map in [&stage.needs, &stage.with].into_iter().chain(label_changes) {
        pending.extend(map.0.iter().rev().map(|entry| &entry.value));
    }
    pending.extend(&stage.seed);
    while let Some(node) = pending.pop() {
        match &node.value {
            Value::List(items) => pending.extend(items),
            Value::Map(map) => pending.extend(map.0.iter().map(|entry| &entry.value)),
            Value::Str(text) if text.contains("${") => {
                for part in parts(text) {
                    match part {
                        TextPart::Text(_) => {}
                        TextPart::Unclosed(rest) => {
                            let fault = Diagnostic::new(span_of(faults, node.span, rest), "`${` without a closing `}`");
                            faults.push(fault.help("write `$${` for the literal text `${`"));
                        }
                        TextPart::Variable(name) => match stage.matrix.iter().position(|d| d.name == name) {
                            Some(at) => used[at] = true,
                            None => {
                                let span = span_of(faults, node.span, &format!("${{{name}}}"));
                                let near =
                                    crate::diagnostics::nearest(name, stage.matrix.iter().map(|d| d.name.as_str()));
                                let help = match near {
                                    Some(_) => did_you_mean(name, near),
                                    None if stage.matrix.is_empty() => Some(format!(
                                        "stage `{}` has no matrix; write `$${{{name}}}` for the literal text",
                                        stage.name
                                    )),
                                    None => did_you_mean(name, stage.matrix.iter().map(|d| d.name.as_str())),
                                };
                                faults.push(
                                    Diagnostic::new(span, format!("unknown matrix variable `{name}`")).maybe_help(help),
                                );
                            }
                        },
                    }
                }
            }
            _ => {}
        }
    }
    used
}

/// Reports variables that are never used; returns whether all are used.
pub fn check_unused(stage: &Stage, used: &[bool], faults: &mut Diagnostics) -> bool {
    let mut all_used = true;
    for (dimension, used) in stage.matrix.iter().zip(used) {
        if *used || !dimension.valid || dimension.labels.iter().any(|label| !label.changes.0.is_empty()) {
            continue;
        }
        let name = &dimension.name;
        let message = format!("matrix variable `{name}` of stage `{}` is not used", stage.name);
        let help = format!("all instances would be equal: use `${{{name}}}` in `with`, `needs` or `seed`");
        faults.push(Diagnostic::new(dimension.span, message).help(help));
        all_used = false;
    }
    all_used
}

/// The position of `part` within the text at `span`, if it occurs there literally; otherwise `span`.
fn span_of(faults: &Diagnostics, span: Span, part: &str) -> Span {
    match faults.slice(span).find(part) {
        Some(at) => Span { start: span.start + at as u32, length: part.len() as u32, ..span },
        None => span,
    }
}
