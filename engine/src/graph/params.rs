//! Checks parameters against their kind: unknown names, wrong types, paths.

use std::path::Path;

use serde_json::Value as Json;

use super::expand::InstanceDraft;
use super::schema_view::SchemaView;
use crate::diagnostics::{Diagnostic, Diagnostics, Span, did_you_mean, nearest};
use crate::document::Stage;
use crate::document::node::{Map, Node, Value};
use crate::external::ExternalInput;
use crate::kind::AnyKind;

/// A kind with its schema, which is computed once.
pub struct KindSchema<'a> {
    pub kind: &'a dyn AnyKind,
    pub schema: Json,
}

/// Parameters as normalised by the kind, with absolute paths.
pub struct CheckedParams {
    pub params: Json,
    /// Each path that the file gives, with its source position.
    pub paths: Vec<(ExternalInput, Span)>,
}

/// Maximum number of times that the parameters of one instance are parsed in search of further faults.
const MAX_ROUNDS: usize = 256;

/// Checks the parameters of one instance. Relative paths start from `folder`.
///
/// # Errors
/// After a fault, which is in `faults`: the parameters without the faulty ones, if they can be parsed.
pub fn check(
    draft: &InstanceDraft,
    stage: &Stage,
    kind_schema: &KindSchema,
    folder: &Path,
    faults: &mut Diagnostics,
) -> Result<CheckedParams, Option<Json>> {
    let before = faults.count();
    let mut with = draft.json.clone();
    let mut names = NameCheck { draft, stage, path: String::new(), unknown: Vec::new() };
    names.check(&draft.with, &mut with, &SchemaView::of(&kind_schema.schema), faults);
    let normal = normalise(with, draft, stage, kind_schema, &names.unknown, faults);
    if faults.count() > before {
        return Err(normal);
    }
    let mut params = normal.ok_or(None)?;
    let mut paths = Vec::new();
    make_paths_absolute(&mut params, Some(&draft.with), folder, &mut paths);
    // Parameters that do not parse are reported where the kind's signature is computed.
    for (path, message) in kind_schema.kind.check_files(&params).unwrap_or_default() {
        let span = node_at(&draft.with, &path).map_or(stage.with_span, |node| node.span);
        let text = format!("stage `{}`: `{path}`: {message}", stage.name);
        faults.push(Diagnostic::new(span, text).of_instance(draft.display_name()));
    }
    Ok(CheckedParams { params, paths })
}

/// The walk that reports names that the schema does not have.
struct NameCheck<'a> {
    draft: &'a InstanceDraft,
    stage: &'a Stage,
    path: String,
    /// Paths of the unknown names.
    unknown: Vec<String>,
}

impl NameCheck<'_> {
    /// Reports unknown names and removes them from `json`; `map` is the same data with source positions.
    fn check(&mut self, map: &Map, json: &mut Json, view: &SchemaView, faults: &mut Diagnostics) {
        let Json::Object(object) = json else { return };
        if !view.is_object() {
            return;
        }
        for entry in &map.0 {
            let length = self.path.len();
            let dot = if length == 0 { "" } else { "." };
            self.path.extend([dot, &entry.key]);
            if let Some(inner) = view.property(&entry.key) {
                if let Some(value) = object.get_mut(&entry.key) {
                    self.check_value(&entry.value, value, &inner, faults);
                }
            } else {
                object.shift_remove(&entry.key);
                self.unknown.push(self.path.clone());
                let kind = self.stage.uses.as_ref().map_or("", |(kind, _)| kind);
                let message = format!("stage `{}`: {kind} has no parameter `{}`", self.stage.name, self.path);
                let help = did_you_mean(&entry.key, view.names());
                let help = help.or_else(|| Some(format!("{kind} takes no parameters")).filter(|_| length == 0));
                faults.push(
                    Diagnostic::new(entry.key_span, message).maybe_help(help).of_instance(self.draft.display_name()),
                );
            }
            self.path.truncate(length);
        }
    }

    fn check_value(&mut self, node: &Node, json: &mut Json, view: &SchemaView, faults: &mut Diagnostics) {
        match (&node.value, json) {
            (Value::Map(map), json) => self.check(map, json, view, faults),
            (Value::List(items), Json::Array(values)) => {
                let view = view.items();
                for (n, (item, value)) in items.iter().zip(values).enumerate() {
                    let length = self.path.len();
                    self.path.push_str(&format!("[{n}]"));
                    self.check_value(item, value, &view, faults);
                    self.path.truncate(length);
                }
            }
            _ => {}
        }
    }
}

/// Parses `with`; after a fault, parses again without the faulty field, in order to report several faults. Returns
/// `None` if the rest cannot be parsed either.
fn normalise(
    mut with: Json,
    draft: &InstanceDraft,
    stage: &Stage,
    kind_schema: &KindSchema,
    unknown: &[String],
    faults: &mut Diagnostics,
) -> Option<Json> {
    let mut removed: Vec<String> = Vec::new();
    for _ in 0..MAX_ROUNDS {
        let found = match kind_schema.kind.normalise(&with) {
            Ok(params) => return Some(params),
            Err(found) => found,
        };
        let mut progress = false;
        for (path, message) in found {
            let at = node_at(&draft.with, &path);
            if message.ends_with("expected a string") && substitute_label_text(&mut with, &path, at, draft) {
                progress = true;
                continue;
            }
            let missing = message.strip_prefix("missing field `").and_then(|rest| rest.strip_suffix('`'));
            let whole = match missing {
                Some(name) if path.is_empty() => name.to_owned(),
                Some(name) => format!("{path}.{name}"),
                None => path.clone(),
            };
            // Skip faults that follow from others: a removed field is missing, and so is the field that an unknown name
            // was meant to be; after a removal, only faults at positions in the file are reliable.
            let follows = removed.iter().any(|gone| overlap(gone, &whole))
                || missing.is_some_and(|name| unknown.iter().any(|typo| is_misspelling(typo, &path, name)))
                || (!removed.is_empty() && missing.is_none() && at.is_none());
            if follows {
                continue;
            }
            let span = at.or_else(|| nearest_ancestor(&draft.with, &path)).map_or(stage.with_span, |node| node.span);
            let (text, help) = match missing {
                Some(_) => (format!("stage `{}`: required parameter `{whole}` is missing", stage.name), None),
                None => {
                    let (text, help) = super::serde_messages::rewrite(&message, kind_schema.schema_at(&path).as_ref());
                    let subject = if path.is_empty() { String::new() } else { format!("`{path}`: ") };
                    (format!("stage `{}`: {subject}{text}", stage.name), help)
                }
            };
            faults.push(Diagnostic::new(span, text).maybe_help(help).of_instance(draft.display_name()));
            if at.is_some() && remove_at(&mut with, &path) {
                removed.push(path);
                progress = true;
            }
        }
        if !progress {
            return None;
        }
    }
    None
}

/// Whether the paths are equal or one contains the other.
fn overlap(a: &str, b: &str) -> bool {
    let within = |inner: &str, outer: &str| {
        inner.strip_prefix(outer).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '[']))
    };
    within(a, b) || within(b, a)
}

/// Whether the unknown parameter at path `typo` is probably a misspelling of `name` in the map at `path`.
fn is_misspelling(typo: &str, path: &str, name: &str) -> bool {
    let (parent, word) = typo.rsplit_once('.').unwrap_or(("", typo));
    parent == path && nearest(word, [name]).is_some()
}

/// If text is expected and the value is a single variable, such as a number in an argument list, puts the label's text
/// there.
fn substitute_label_text(with: &mut Json, path: &str, at: Option<&Node>, draft: &InstanceDraft) -> bool {
    let (Some(Node { value: Value::Str(text), .. }), Some(target)) = (at, json_at(with, path)) else { return false };
    let variable = text.strip_prefix("${").and_then(|rest| rest.strip_suffix('}'));
    let label = draft.matrix.iter().find(|(dimension, _)| Some(dimension.as_str()) == variable);
    if let Some((_, label)) = label.filter(|_| !target.is_string()) {
        *target = label.as_str().into();
        return true;
    }
    false
}

impl KindSchema<'_> {
    fn schema_at(&self, path: &str) -> Option<SchemaView<'_>> {
        let mut view = SchemaView::of(&self.schema);
        for part in path.split('.').filter(|part| !part.is_empty()) {
            let (key, indices) =
                part.split_once('[').map_or((part, 0), |(key, rest)| (key, 1 + rest.matches('[').count()));
            view = view.property(key)?;
            for _ in 0..indices {
                view = view.items();
            }
        }
        Some(view)
    }
}

/// The longest of `keys` that is the first part of a path such as `lora.targets[2].name`; keys may contain dots.
fn first_key<'k>(keys: impl Iterator<Item = &'k str>, path: &str) -> Option<&'k str> {
    keys.filter(|key| path.strip_prefix(key).is_some_and(|rest| rest.is_empty() || rest.starts_with(['.', '['])))
        .max_by_key(|key| key.len())
}

/// The node of the tree at `path`; `None` for the empty path.
fn node_at<'a>(map: &'a Map, path: &str) -> Option<&'a Node> {
    let key = first_key(map.keys(), path)?;
    let mut rest = &path[key.len()..];
    let mut node = map.get(key)?;
    while let Some((index, after)) = rest.strip_prefix('[').and_then(|inside| inside.split_once(']')) {
        let Value::List(items) = &node.value else { return None };
        node = items.get(index.parse::<usize>().ok()?)?;
        rest = after;
    }
    match rest.strip_prefix('.') {
        None => Some(node),
        Some(rest) => node_at(node.as_map()?, rest),
    }
}

/// The JSON value at `path`.
fn json_at<'a>(json: &'a mut Json, path: &str) -> Option<&'a mut Json> {
    let object = json.as_object_mut()?;
    let key = first_key(object.keys().map(String::as_str), path)?.to_owned();
    let mut rest = &path[key.len()..];
    let mut json = object.get_mut(&key)?;
    while let Some((index, after)) = rest.strip_prefix('[').and_then(|inside| inside.split_once(']')) {
        json = json.get_mut(index.parse::<usize>().ok()?)?;
        rest = after;
    }
    match rest.strip_prefix('.') {
        None => Some(json),
        Some(rest) => json_at(json, rest),
    }
}

/// The closest ancestor of `path` that the file has.
fn nearest_ancestor<'a>(map: &'a Map, path: &str) -> Option<&'a Node> {
    let cuts = path.rmatch_indices(['.', '[']).map(|(at, _)| &path[..at]);
    cuts.into_iter().find_map(|cut| node_at(map, cut))
}

/// Removes the field at `path`; if it lies in a list, removes the whole list.
fn remove_at(json: &mut Json, path: &str) -> bool {
    let Json::Object(object) = json else { return false };
    let Some(key) = first_key(object.keys().map(String::as_str), path).map(str::to_owned) else { return false };
    match path[key.len()..].strip_prefix('.') {
        Some(rest) => object.get_mut(&key).is_some_and(|inner| remove_at(inner, rest)),
        None => object.shift_remove(&key).is_some(),
    }
}

/// Makes every path absolute and collects the paths that the file gives.
fn make_paths_absolute(params: &mut Json, map: Option<&Map>, folder: &Path, paths: &mut Vec<(ExternalInput, Span)>) {
    if let Json::Object(object) = params {
        for (key, value) in object {
            make_value_absolute(value, map.and_then(|map| map.get(key)), folder, paths);
        }
    }
}

fn make_value_absolute(value: &mut Json, node: Option<&Node>, folder: &Path, paths: &mut Vec<(ExternalInput, Span)>) {
    if let Some(external) = ExternalInput::from_value(value) {
        let external = external.from_base(folder);
        // A kind may accept a single path where it takes a list.
        let nodes = match node.map(|node| &node.value) {
            Some(Value::List(nodes)) => nodes.as_slice(),
            _ => node.map_or(&[][..], std::slice::from_ref),
        };
        paths.extend(external.split().into_iter().map(|(_, single)| single).zip(nodes.iter().map(|node| node.span)));
        *value = external.to_value();
        return;
    }
    match value {
        Json::Object(_) => make_paths_absolute(value, node.and_then(Node::as_map), folder, paths),
        Json::Array(items) => {
            let nodes = match node.map(|node| &node.value) {
                Some(Value::List(nodes)) => nodes.as_slice(),
                _ => &[],
            };
            for (n, item) in items.iter_mut().enumerate() {
                make_value_absolute(item, nodes.get(n), folder, paths);
            }
        }
        _ => {}
    }
}
