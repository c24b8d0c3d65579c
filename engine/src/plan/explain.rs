//! Explains why a stage must run: the fields of its recipe that changed since the nearest earlier record.

use std::cell::OnceCell;
use std::collections::BTreeSet;
use std::fmt;

use serde::Serialize;
use serde_json::Value;

use super::diff::{Change, FieldPath, Leaves, differences, leaves};
use super::{Plan, PlannedState, recipe_draft};
use crate::error::Result;
use crate::external::ExternalInput;
use crate::graph::Graph;
use crate::kind::{Arity, Registry};
use crate::names::{Digest, InstanceName, Key};
use crate::store::{ActionRecord, Store};

/// Why an instance runs or is reused, for users.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Explanation {
    pub stage: InstanceName,
    /// `reuse`, `run` or `pending`.
    pub action: &'static str,
    /// A few words.
    pub reason: String,
    /// `None` while pending.
    pub key: Option<Key>,
    /// The record that `changes` compares with.
    pub against: Option<ComparedRecord>,
    pub changes: Vec<Change>,
    /// The inputs that are not known yet.
    pub unknown: Vec<PendingInput>,
    /// The instances upstream whose own recipes changed, and with them the inputs; only for the instance asked about.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub causes: Vec<Explanation>,
}

/// An earlier record.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ComparedRecord {
    pub stage: InstanceName,
    pub key: Key,
    pub run: String,
    /// Seconds since 1970.
    pub started: f64,
}

/// An input that is not known yet.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PendingInput {
    pub port: String,
    /// The instance that will produce it.
    pub from: InstanceName,
    /// The instances that must run before it is known.
    pub after: Vec<InstanceName>,
}

/// Explains the plan for one instance. Reads every record of the store, unless the instance's own key has one.
pub fn explain(graph: &Graph, registry: &Registry, store: &Store, plan: &Plan, instance: usize) -> Result<Explanation> {
    let explainer = Explainer { graph, registry, store, plan, known: plan.known(), records: OnceCell::new() };
    let (mut explanation, mut open) = explainer.compare(instance, None)?;
    let mut seen = BTreeSet::from([instance]);
    while let Some(Upstream { instance, old }) = open.pop() {
        if !seen.insert(instance) {
            continue;
        }
        let kind = &graph.instances[instance].kind;
        let Some(record) = explainer.producer(kind, &graph.instances[instance].name, &old)? else { continue };
        let (cause, upstream) = explainer.compare(instance, Some(record))?;
        // An instance that differs only in its inputs is not a cause: the change comes from further upstream.
        if upstream.is_empty() || cause.changes.iter().any(|change| change.from.is_none()) {
            explanation.causes.push(cause);
        }
        open.extend(upstream);
    }
    Ok(explanation)
}

/// An input that differs from, or may differ from, that of an earlier record.
struct Upstream {
    instance: usize,
    /// The digest of the input in the record.
    old: Digest,
}

struct Explainer<'a> {
    graph: &'a Graph,
    registry: &'a Registry,
    store: &'a Store,
    plan: &'a Plan,
    known: Vec<Option<Digest>>,
    records: OnceCell<Vec<ActionRecord>>,
}

impl Explainer<'_> {
    /// Compares an instance with `record`, or else with the record of its own key or the nearest one; also returns the
    /// inputs that differ.
    fn compare(&self, instance: usize, record: Option<&ActionRecord>) -> Result<(Explanation, Vec<Upstream>)> {
        let Self { graph, plan, .. } = self;
        let draft = recipe_draft::draft_recipe(graph, self.registry, self.store, instance, &self.known)?;
        let name = &graph.instances[instance].name;
        let (action, reason, key) = match &plan.stages[instance].state {
            PlannedState::Reuse { key, digest } => ("reuse", format!("artifact {}", digest.short()), Some(*key)),
            PlannedState::Run { key, reason } => ("run", reason.to_string(), Some(*key)),
            PlannedState::Pending { .. } => {
                ("pending", "the key depends on inputs that are not known yet".to_owned(), None)
            }
        };
        let unknown = |u: &recipe_draft::UnknownInput| PendingInput {
            port: u.port.clone(),
            from: graph.instances[u.instance].name.clone(),
            after: roots(graph, plan, u.instance),
        };
        let mut new = leaves(&draft.recipe);
        let placeholders: Vec<FieldPath> = draft.unknown.iter().map(|u| FieldPath::input(&u.port, u.index)).collect();
        placeholders.iter().for_each(|path| drop(new.remove(path)));
        let nearest = match record {
            Some(record) => Some(record.clone()),
            None => match key.map(|key| self.store.action(&key)).transpose()?.flatten() {
                Some(own) => Some(own),
                None => nearest_record(self.records()?, &draft.recipe.kind, name, &new, &placeholders).cloned(),
            },
        };
        let (mut changes, mut upstream) = (Vec::new(), Vec::new());
        if let Some(record) = &nearest {
            let mut old = leaves(&record.recipe);
            placeholders.iter().for_each(|path| drop(old.remove(path)));
            for mut change in differences(&old, &new) {
                if let Some((port, index)) = input_of(&change.field) {
                    let source = self.name_input(instance, &port, index, &mut change);
                    upstream.extend(source.zip(input_in(record, &port, index)));
                    changes.push(change);
                } else {
                    changes.extend(self.by_path(instance, record, change)?);
                }
            }
            let waited = draft.unknown.iter().map(|u| (u.instance, input_in(record, &u.port, u.index)));
            upstream.extend(waited.filter_map(|(instance, old)| Some((instance, old?))));
        }
        let against = nearest.map(|record| ComparedRecord {
            stage: record.provenance.stage,
            key: record.key,
            run: record.provenance.run,
            started: record.provenance.started,
        });
        let unknown = draft.unknown.iter().map(unknown).collect();
        let explanation =
            Explanation { stage: name.clone(), action, reason, key, against, changes, unknown, causes: Vec::new() };
        Ok((explanation, upstream.into_iter().map(|(instance, old)| Upstream { instance, old }).collect()))
    }

    fn records(&self) -> Result<&[ActionRecord]> {
        if self.records.get().is_none() {
            // Cannot fail: one thread, and the cell was empty.
            let _ = self.records.set(self.store.actions()?);
        }
        Ok(self.records.get().map_or(&[], Vec::as_slice))
    }

    /// The record of an artifact, if the same kind produced it: preferably as this instance, and the latest.
    fn producer(&self, kind: &str, name: &InstanceName, digest: &Digest) -> Result<Option<&ActionRecord>> {
        let producers = self.records()?.iter().filter(|record| record.digest == *digest && record.recipe.kind == kind);
        Ok(producers.max_by(|a, b| {
            let [a, b] = [a, b].map(|record| (record.provenance.stage == *name, record.provenance.started));
            a.0.cmp(&b.0).then(a.1.total_cmp(&b.1))
        }))
    }

    /// Adds the instance connected to `inputs.PORT[INDEX]`, and drops the index if the port takes only one.
    fn name_input(&self, instance: usize, port: &str, index: usize, change: &mut Change) -> Option<usize> {
        let inputs = self.graph.instances[instance].inputs.iter().find(|inputs| inputs.port == port)?;
        if inputs.arity != Arity::Many {
            change.field = format!("inputs.{port}");
        }
        let source = inputs.from.get(index)?.instance;
        change.from = Some(self.graph.instances[source].name.clone());
        Some(source)
    }

    /// Splits a change of the content of files into one change per path whose content differs from the record's.
    fn by_path(&self, instance: usize, record: &ActionRecord, change: Change) -> Result<Vec<Change>> {
        let mut field = String::from("params");
        let found = external_at(&self.graph.instances[instance].params, &mut field, &change.field);
        let Some(external) = found else { return Ok(vec![change]) };
        let mut changes = Vec::new();
        for (path, single) in external.split() {
            let new = self.store.content_of(&single)?.digest;
            let old = record.provenance.paths.get(&path);
            if old != Some(&new) {
                let (old, new) = (old.map(ToString::to_string), Some(new.to_string()));
                changes.push(Change { field: field.clone(), old, new, from: None, path: Some(path) });
            }
        }
        // Files may also have changed their order, or have been removed.
        Ok(if changes.is_empty() { vec![Change { field, ..change }] } else { changes })
    }
}

/// The parameter whose content is the recipe's field `leaf`; `field` becomes the path of that parameter.
fn external_at(params: &Value, field: &mut String, leaf: &str) -> Option<ExternalInput> {
    if let Some(external) = ExternalInput::from_value(params) {
        let end = match external {
            ExternalInput::Path(_) => ".content",
            ExternalInput::Files(_) => "[0].content",
        };
        return (leaf.strip_prefix(field.as_str()) == Some(end)).then_some(external);
    }
    let length = field.len();
    let steps: Vec<(String, &Value)> = match params {
        Value::Object(fields) => fields.iter().map(|(name, value)| (format!(".{name}"), value)).collect(),
        Value::Array(items) => items.iter().enumerate().map(|(n, value)| (format!("[{n}]"), value)).collect(),
        _ => Vec::new(),
    };
    for (step, value) in steps {
        field.push_str(&step);
        if let Some(external) = external_at(value, field, leaf) {
            return Some(external);
        }
        field.truncate(length);
    }
    None
}

/// Port and index of the field `inputs.PORT[INDEX]`.
fn input_of(field: &str) -> Option<(String, usize)> {
    let (port, index) = field.strip_prefix("inputs.")?.strip_suffix(']')?.split_once('[')?;
    Some((port.to_owned(), index.parse().ok()?))
}

/// The digest at `inputs.PORT[INDEX]` of a record.
fn input_in(record: &ActionRecord, port: &str, index: usize) -> Option<Digest> {
    let port = record.recipe.inputs.iter().find(|inputs| inputs.port == port)?;
    Some(port.from.get(index)?.digest)
}

/// The record of the same kind to compare with. Preference: same stage, then fewest differing fields, then same
/// instance, then latest.
fn nearest_record<'r>(
    records: &'r [ActionRecord],
    kind: &str,
    name: &InstanceName,
    new: &Leaves,
    placeholders: &[FieldPath],
) -> Option<&'r ActionRecord> {
    let distance = |record: &&ActionRecord| {
        let mut old = leaves(&record.recipe);
        placeholders.iter().for_each(|path| drop(old.remove(path)));
        let stage = &record.provenance.stage;
        // Subtracted so that the latest comes first; positive floats sort like their bits.
        let age = u64::MAX - record.provenance.started.max(0.0).to_bits();
        (stage.stage != name.stage, differences(&old, new).len(), stage != name, age, record.key)
    };
    records.iter().filter(|record| record.recipe.kind == kind).min_by_key(distance)
}

/// The instances that must run before the digest of `instance` is known.
fn roots(graph: &Graph, plan: &Plan, instance: usize) -> Vec<InstanceName> {
    let mut roots = BTreeSet::new();
    let mut seen = BTreeSet::new();
    let mut open = vec![instance];
    while let Some(i) = open.pop() {
        match &plan.stages[i].state {
            PlannedState::Run { .. } => drop(roots.insert(i)),
            PlannedState::Pending { waits_on } => open.extend(waits_on.iter().filter(|i| seen.insert(**i))),
            PlannedState::Reuse { .. } => (),
        }
    }
    roots.into_iter().map(|i| graph.instances[i].name.clone()).collect()
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}: {}", self.stage, self.action, self.reason)?;
        if let Some(key) = &self.key {
            writeln!(f, "  key {key}")?;
        }
        match &self.against {
            Some(against) if Some(against.key) == self.key => {
                writeln!(f, "  made by {} in run {}", against.stage, against.run)?;
            }
            Some(against) => {
                writeln!(f, "  compared with the nearest record, {} of run {}:", against.stage, against.run)?;
                if self.changes.is_empty() {
                    writeln!(f, "    no difference known so far")?;
                }
            }
            None => writeln!(f, "  no earlier record of its kind")?,
        }
        for Change { field, old, new, from, path } in &self.changes {
            let shown = |value: &Option<String>| value.as_deref().map_or("absent".to_owned(), shorten);
            let from = from.as_ref().map_or(String::new(), |from| format!(" (from `{from}`)"));
            let path = path.as_ref().map_or(String::new(), |path| format!(" ({})", path.display()));
            writeln!(f, "    {field}{from}{path}: {} -> {}", shown(old), shown(new))?;
        }
        for PendingInput { port, from, after } in &self.unknown {
            let after: Vec<String> = after.iter().map(|name| format!("`{name}`")).collect();
            writeln!(f, "  input `{port}` (from `{from}`): known after {}", after.join(", "))?;
        }
        self.causes.iter().try_for_each(|cause| write!(f, "because of {cause}"))
    }
}

/// Shortens digests to their first digits, and long texts to their beginning.
fn shorten(value: &str) -> String {
    match value.parse::<Digest>() {
        Ok(digest) => digest.short(),
        Err(_) if value.chars().count() > 120 => format!("{}…", value.chars().take(119).collect::<String>()),
        Err(_) => value.to_owned(),
    }
}
