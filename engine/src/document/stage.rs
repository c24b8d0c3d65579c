//! One entry of `stages`: parsing and validation.

use std::time::Duration;

use super::matrix::{self, Dimension};
use super::node::{Map, Node, Value};
use super::resources::{self, Resources};
use super::{STAGE_KEYS, check_names, known_keys};
use crate::diagnostics::{Diagnostic, Diagnostics, Span, nearest};
use crate::names::{StageName, is_name};

#[derive(Clone, Debug)]
pub struct Stage {
    pub name: StageName,
    /// Position of the stage's name.
    pub span: Span,
    pub uses: Option<(String, Span)>,
    /// Keyed by port.
    pub needs: Map,
    pub with: Map,
    /// Position of the key `with`, or of the stage's name.
    pub with_span: Span,
    pub seed: Option<Node>,
    pub matrix: Vec<Dimension>,
    /// Name of the executor of its attempts; never part of a key, like the resources.
    pub executor: Option<(String, Span)>,
    pub resources: Resources,
    /// Maximum wall time of an attempt.
    pub timeout: Option<Duration>,
    /// Further tries after any failure; `None`: only after failures that may pass.
    pub retries: Option<u32>,
    /// Whether no fault has been found so far; used to suppress faults that follow from others.
    pub valid: bool,
    /// Whether each variable of the matrix is used.
    pub all_used: bool,
}

/// Parses every stage of `stages`, in order; a stage with faults is kept, with `valid` unset.
pub fn read(map: Map, faults: &mut Diagnostics) -> Vec<Stage> {
    check_names(map.0.iter().map(|e| (e.key.as_str(), e.key_span)), "stage", is_name, faults);
    let names: Vec<String> = map.keys().map(str::to_owned).collect();
    let mut stages = Vec::with_capacity(names.len());
    for entry in map.0 {
        // `check_names` has reported the invalid name.
        let Ok(name) = StageName::try_from(entry.key) else { continue };
        let span = entry.key_span;
        let what = entry.value.type_name();
        let mut stage = Stage {
            name,
            span,
            uses: None,
            needs: Map::default(),
            with: Map::default(),
            with_span: span,
            seed: None,
            matrix: Vec::new(),
            executor: None,
            resources: Resources::default(),
            timeout: None,
            retries: None,
            valid: true,
            all_used: true,
        };
        match entry.value.value {
            Value::Map(map) => fill_stage(&mut stage, map, &names, faults),
            _ => {
                let message = format!("stage `{}` must be a map; this is {what}", stage.name);
                faults.push(Diagnostic::new(entry.value.span, message));
                stage.valid = false;
            }
        }
        stages.push(stage);
    }
    stages
}

fn fill_stage(stage: &mut Stage, map: Map, names: &[String], faults: &mut Diagnostics) {
    let before = faults.count();
    known_keys(&map, STAGE_KEYS, "a stage", faults);
    if map.entry("uses").is_none() {
        let message = format!("stage `{}` has no `uses`", stage.name);
        let others = names.iter().map(String::as_str).filter(|name| *name != stage.name.as_str());
        let near = nearest(stage.name.as_str(), others);
        let help =
            near.map_or("name a kind: `temper kinds` lists them".into(), |near| format!("did you mean `{near}`?"));
        faults.push(Diagnostic::new(stage.span, message).help(help));
    }
    let name = stage.name.clone();
    let what = |key: &str| format!("stage `{name}`: `{key}`");
    let mut matrix = None;
    for entry in map.0 {
        match (entry.key.as_str(), entry.value) {
            ("uses", Node { value: Value::Str(kind), span }) => stage.uses = Some((kind, span)),
            ("uses", other) => faults.push(Diagnostic::new(other.span, "`uses` must name a kind")),
            ("executor", Node { value: Value::Str(name), span }) => stage.executor = Some((name, span)),
            ("executor", Node { value: Value::Null, .. }) => {}
            ("executor", other) => faults.push(Diagnostic::new(other.span, "`executor` must name an executor")),
            ("resources", node) => stage.resources = resources::read(&node, faults),
            ("timeout", node) if !node.is_null() => {
                stage.timeout = resources::duration(&node, &what("timeout"), faults);
            }
            ("retries", node) if !node.is_null() => {
                stage.retries = resources::count(&node, 0, &what("retries"), faults).map(|n| n as u32);
            }
            ("seed", node) => stage.seed = Some(node),
            ("with", node) => {
                stage.with_span = entry.key_span;
                stage.with = map_of(node, "with", faults);
            }
            ("needs", node) => stage.needs = map_of(node, "needs", faults),
            ("matrix", node) => matrix = Some(node),
            _ => {}
        }
    }
    if let Some(node) = matrix {
        stage.matrix = matrix::read(node, &stage.name, faults);
    }
    let used = matrix::check_variables(stage, faults);
    stage.valid = faults.count() == before;
    stage.all_used = matrix::check_unused(stage, &used, faults);
}

/// The map under `key`; null counts as an empty map.
fn map_of(node: Node, key: &str, faults: &mut Diagnostics) -> Map {
    let what = node.type_name();
    match node.value {
        Value::Map(map) => map,
        Value::Null => Map::default(),
        _ => {
            faults.push(Diagnostic::new(node.span, format!("`{key}` must be a map; this is {what}")));
            Map::default()
        }
    }
}
