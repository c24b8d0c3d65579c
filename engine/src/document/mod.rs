//! Parses the pipeline file into a [`Document`]: data with source positions, profiles and overrides applied.

use std::collections::{BTreeMap, HashMap, HashSet};

use self::node::{Map, Node, Value};
use crate::diagnostics::{Diagnostic, Diagnostics, Span, did_you_mean};
use crate::names::is_name;

pub mod effective;
pub mod executors;
mod inherit;
pub mod interpolate;
pub mod matrix;
pub mod merge;
pub mod node;
pub mod remote;
pub mod report;
pub mod resources;
pub mod set;
pub mod stage;
pub mod yaml;

pub use effective::EffectivePipeline;
pub use executors::{ExecutorSettings, Executors, SlurmSettings, SubmitSettings, SystemSettings};
pub use remote::RemoteSettings;
pub use report::{REPORT_KEYS, ReportSettings};
pub use resources::Resources;
pub use stage::Stage;

pub const TOP_KEYS: &[&str] =
    &["version", "seed", "targets", "stages", "profiles", "report", "remote", "executors", "pools", "on_finish"];
pub const PROFILE_KEYS: &[&str] = &["seed", "targets", "stages", "report", "remote", "executors", "pools", "on_finish"];
pub const STAGE_KEYS: &[&str] =
    &["uses", "needs", "with", "matrix", "seed", "executor", "resources", "timeout", "retries"];
pub const LABEL_KEYS: &[&str] = &["with", "needs", "seed"];

/// A pipeline file with profiles and overrides applied; kinds and selectors are not resolved yet.
#[derive(Clone, Debug)]
pub struct Document {
    pub seed: u64,
    /// Selectors with their source positions. If the file states no targets: stage names without positions.
    pub targets: Vec<(String, Option<Span>)>,
    pub stages: Vec<Stage>,
    pub report: ReportSettings,
    /// The remote store; never part of a key.
    pub remote: Option<RemoteSettings>,
    /// The command to start after a run; never part of a key.
    pub on_finish: Vec<String>,
    /// Where attempts can run besides here; never part of a key.
    pub executors: Executors,
    /// The size of each named pool of this machine; never part of a key.
    pub pools: BTreeMap<String, u64>,
}

/// Parses the file's text (source number `source`) and applies profiles, then overrides. Returns `None` if nothing
/// usable is left.
pub fn read(source: u32, profiles: &[String], set: &[String], faults: &mut Diagnostics) -> Option<Document> {
    let (root, default_targets) = merged(source, profiles, set, faults)?;
    Some(build(root, default_targets, Span { source, start: 0, length: 0 }, faults))
}

/// The tree of the file with profiles and overrides applied, and the targets that apply if the tree states none.
fn merged(source: u32, profiles: &[String], set: &[String], faults: &mut Diagnostics) -> Option<(Map, Vec<String>)> {
    let text = faults.source(source).to_owned();
    let start = Span { source, start: 0, length: 0 };
    let Some(root) = yaml::parse(source, &text, 0, faults) else {
        if faults.faults().is_empty() {
            faults.push(Diagnostic::new(start, "the file is empty").help("a pipeline file starts with `version: 1`"));
        }
        return None;
    };
    let what = root.type_name();
    let Value::Map(mut root) = root.value else {
        let message = format!("a pipeline file is a map with `version` and `stages`; this is {what}");
        faults.push(Diagnostic::new(root.span, message));
        return None;
    };
    let default_targets = unneeded_stages(&root);
    match root.entry("version") {
        Some(entry) if entry.value.value == Value::Int(1) => {}
        Some(entry) => {
            let fault =
                Diagnostic::new(entry.value.span, "unsupported version of the pipeline format: expected `version: 1`");
            faults.push(fault);
        }
        None => faults.push(Diagnostic::new(start, "`version` is missing").help("start the file with `version: 1`")),
    }
    known_keys(&root, TOP_KEYS, "a pipeline file", faults);
    apply_profiles(&mut root, profiles, faults);
    for argument in set {
        set::apply(&mut root, argument, faults);
    }
    Some((root, default_targets))
}

fn build(mut root: Map, default_targets: Vec<String>, start: Span, faults: &mut Diagnostics) -> Document {
    let seed = root.get("seed").map_or(Ok(0), |node| seed_of(node, &node.value, "the pipeline", faults));
    let seed = seed.unwrap_or_else(|fault| {
        faults.push(fault);
        0
    });
    let report = root.get("report").map_or_else(ReportSettings::default, |node| report::read(node, faults));
    let remote = root.get("remote").and_then(|node| remote::read(node, faults));
    let on_finish = root.get("on_finish").map_or_else(Vec::new, |node| command(node, faults));
    let targets = root.get("targets").filter(|node| !node.is_null()).map(|node| texts(node, "targets", faults));
    let at = root.position("stages").map(|at| root.0.swap_remove(at));
    let mut stages = Vec::new();
    match at {
        Some(entry) => match entry.value.value {
            Value::Map(mut map) => {
                inherit::resolve_matrices(&mut map, faults);
                stages = stage::read(map, faults);
            }
            _ => faults.push(Diagnostic::new(
                entry.value.span,
                format!("`stages` must be a map; this is {}", entry.value.type_name()),
            )),
        },
        None => faults.push(Diagnostic::new(start, "the file has no `stages`")),
    }
    let (mut executors, names) =
        root.get("executors").map_or_else(Default::default, |node| executors::read(node, faults));
    executors::check_stages(&mut executors, &names, &stages, faults);
    let pools = root.get("pools").map_or_else(Default::default, |node| resources::units(node, "`pools`", faults));
    resources::check_pools(&pools, &stages, faults);
    let targets = match targets {
        Some(given) => given.into_iter().map(|(text, span)| (text, Some(span))).collect(),
        None => {
            let existing: HashSet<&str> = stages.iter().map(|stage: &Stage| stage.name.as_str()).collect();
            default_targets
                .into_iter()
                .filter(|name| existing.contains(name.as_str()))
                .map(|name| (name, None))
                .collect()
        }
    };
    Document { seed, targets, stages, report, remote, executors, pools, on_finish }
}

/// Parses `on_finish`: a program and its arguments; null means none.
fn command(node: &Node, faults: &mut Diagnostics) -> Vec<String> {
    let words = match &node.value {
        Value::Null => return Vec::new(),
        Value::List(items) => items.iter().map(|item| match &item.value {
            Value::Str(word) => Some(interpolate::substitute(word, &[]).into_owned()),
            Value::Int(_) | Value::Float(_) | Value::Bool(_) => Some(faults.slice(item.span).to_owned()),
            Value::Null | Value::List(_) | Value::Map(_) => None,
        }),
        _ => {
            let fault = Diagnostic::new(node.span, format!("`on_finish`: expected a list, found {}", node.type_name()));
            faults.push(fault.help("write the program and its arguments as a list: `on_finish: [notify-send, done]`"));
            return Vec::new();
        }
    };
    match words.collect::<Option<Vec<String>>>() {
        Some(words) => words,
        None => {
            faults
                .push(Diagnostic::new(node.span, "`on_finish`: expected a list of texts: a program and its arguments"));
            Vec::new()
        }
    }
}

/// The stages that no other stage needs, in file order.
fn unneeded_stages(root: &Map) -> Vec<String> {
    let Some(stages) = root.get("stages").and_then(Node::as_map) else { return Vec::new() };
    let mut needed: HashSet<&str> = HashSet::new();
    for stage in &stages.0 {
        let Some(map) = stage.value.as_map() else { continue };
        let dimensions = map.get("matrix").and_then(Node::as_map).into_iter().flat_map(|matrix| &matrix.0);
        let labels = dimensions.filter_map(|dimension| dimension.value.as_map()).flat_map(|labels| &labels.0);
        let label_changes = labels.filter_map(|label| label.value.as_map());
        for part in std::iter::once(map).chain(label_changes) {
            for port in part.get("needs").and_then(Node::as_map).into_iter().flat_map(|needs| &needs.0) {
                let selectors = match &port.value.value {
                    Value::List(items) => items.as_slice(),
                    _ => std::slice::from_ref(&port.value),
                };
                for selector in selectors {
                    if let Value::Str(text) = &selector.value {
                        let name = text.split('[').next().unwrap_or(text).trim();
                        if name != stage.key {
                            needed.insert(name);
                        }
                    }
                }
            }
        }
    }
    stages.keys().filter(|name| !needed.contains(name)).map(str::to_owned).collect()
}

fn apply_profiles(root: &mut Map, names: &[String], faults: &mut Diagnostics) {
    let profiles = match root.position("profiles").map(|at| root.0.remove(at).value) {
        None => Map::default(),
        Some(Node { value: Value::Map(map), .. }) => map,
        Some(other) => {
            if !other.is_null() {
                faults.push(Diagnostic::new(
                    other.span,
                    format!("`profiles` must be a map; this is {}", other.type_name()),
                ));
            }
            Map::default()
        }
    };
    check_names(profiles.0.iter().map(|e| (e.key.as_str(), e.key_span)), "profile", is_name, faults);
    for entry in &profiles.0 {
        match &entry.value.value {
            Value::Map(map) => {
                known_keys(map, PROFILE_KEYS, "a profile", faults);
                // An applied profile reports its faults a second time; equal faults are merged because position and
                // message are equal.
                if let Some(node) = map.get("report") {
                    report::read(node, faults);
                }
                if let Some(node) = map.get("remote") {
                    remote::read(node, faults);
                }
                if let Some(node) = map.get("on_finish") {
                    command(node, faults);
                }
                if let Some(node) = map.get("pools") {
                    resources::units(node, "`pools`", faults);
                }
                if let Some(node) = map.get("executors") {
                    executors::check_overlay(node, faults);
                }
                for stage in map.get("stages").and_then(Node::as_map).into_iter().flat_map(|stages| &stages.0) {
                    if let Value::Map(stage) = &stage.value.value {
                        known_keys(stage, STAGE_KEYS, "a stage", faults);
                    }
                }
            }
            Value::Null => {}
            _ => {
                let message = format!("profile `{}` must be a map; this is {}", entry.key, entry.value.type_name());
                faults.push(Diagnostic::new(entry.value.span, message));
            }
        }
    }
    for name in names {
        match profiles.get(name) {
            Some(Node { value: Value::Map(profile), .. }) => merge::profile(root, profile),
            Some(_) => {}
            None => {
                let source = faults.add_source("--profile", name);
                let span = Span { source, start: 0, length: name.len() as u32 };
                let help = did_you_mean(name, profiles.keys()).or(Some("the file has no profiles".into()));
                faults.push(Diagnostic::new(span, format!("unknown profile `{name}`")).maybe_help(help));
            }
        }
    }
}

/// A string, or a list of strings, each with its position.
pub fn texts(node: &Node, what: &str, faults: &mut Diagnostics) -> Vec<(String, Span)> {
    let items = match &node.value {
        Value::List(items) => items.as_slice(),
        _ => std::slice::from_ref(node),
    };
    let mut texts = Vec::with_capacity(items.len());
    for item in items {
        match &item.value {
            Value::Str(text) => texts.push((text.clone(), item.span)),
            _ => {
                let message = format!("{what}: expected `stage` or `stage[label]`, found {}", item.type_name());
                faults.push(Diagnostic::new(item.span, message));
            }
        }
    }
    texts
}

/// Parses `value` (of `node`, variables filled in) as a seed.
///
/// # Errors
/// Describes what is wrong with the seed; `whose` names its owner, such as ``stage `sft` ``.
pub fn seed_of(node: &Node, value: &Value, whose: &str, faults: &Diagnostics) -> Result<u64, Diagnostic> {
    let seed = match (value, &node.value) {
        (Value::Int(n), _) => u64::try_from(*n).ok(),
        // Text that results from variables, such as "1${member}".
        (Value::Str(text), Value::Str(written)) if text != written => text.parse().ok(),
        _ => None,
    };
    seed.ok_or_else(|| {
        let shown = match value {
            Value::Str(text) => text,
            _ => faults.slice(node.span),
        };
        Diagnostic::new(
            node.span,
            format!("seed of {whose}: expected a whole number from 0 to 2^64 - 1, found `{shown}`"),
        )
    })
}

fn known_keys(map: &Map, known: &[&str], what: &str, faults: &mut Diagnostics) {
    for entry in map.0.iter().filter(|entry| !known.contains(&entry.key.as_str())) {
        let fault = Diagnostic::new(entry.key_span, format!("{what} has no key `{}`", entry.key));
        faults.push(fault.maybe_help(did_you_mean(&entry.key, known.iter().copied())));
    }
}

/// Checks that names match `[A-Za-z0-9_-]{1,64}` (labels may contain dots) and differ by more than case.
pub(crate) fn check_names<'a>(
    names: impl Iterator<Item = (&'a str, Span)>,
    what: &str,
    valid: fn(&str) -> bool,
    faults: &mut Diagnostics,
) {
    let mut folded: HashMap<String, (&str, Span)> = HashMap::new();
    for (name, span) in names {
        if !valid(name) {
            let dot = if valid("a.b") { "." } else { "" };
            faults.push(Diagnostic::new(
                span,
                format!("`{name}` is not a valid name for a {what}: expected [A-Za-z0-9_{dot}-]{{1,64}}"),
            ));
        }
        match folded.get(&name.to_ascii_lowercase()) {
            Some((other, before)) if *other != name => {
                let message = format!("{what} `{name}` differs from `{other}` only by case");
                faults.push(Diagnostic::new(span, message).also(*before, "first defined here"));
            }
            _ => {
                folded.insert(name.to_ascii_lowercase(), (name, span));
            }
        }
    }
}
