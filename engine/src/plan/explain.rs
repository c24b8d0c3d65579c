//! Explains why a stage must run: the fields of its recipe that changed since the nearest earlier record.

use std::collections::BTreeSet;
use std::fmt;

use serde::Serialize;

use super::diff::{Change, FieldPath, Leaves, differences, leaves};
use super::{Plan, PlannedState, recipe_draft};
use crate::error::Result;
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
    let draft = recipe_draft::draft_recipe(graph, registry, store, instance, &plan.known())?;
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
    let unknown: Vec<PendingInput> = draft.unknown.iter().map(unknown).collect();
    let mut new = leaves(&draft.recipe);
    let placeholders: Vec<FieldPath> = draft.unknown.iter().map(|u| FieldPath::input(&u.port, u.index)).collect();
    placeholders.iter().for_each(|path| drop(new.remove(path)));
    let own = key.map(|key| store.action(&key)).transpose()?.flatten();
    let nearest = match own {
        Some(record) => Some(record),
        None => nearest_record(store.actions()?, &draft.recipe.kind, name, &new, &placeholders),
    };
    let mut changes = Vec::new();
    if let Some(record) = &nearest {
        let mut old = leaves(&record.recipe);
        placeholders.iter().for_each(|path| drop(old.remove(path)));
        changes = differences(&old, &new);
        changes.iter_mut().for_each(|change| name_input(graph, instance, change));
    }
    let against = nearest.map(|record| ComparedRecord {
        stage: record.provenance.stage,
        key: record.key,
        run: record.provenance.run,
        started: record.provenance.started,
    });
    Ok(Explanation { stage: name.clone(), action, reason, key, against, changes, unknown })
}

/// The record of the same kind to compare with. Preference: same stage, then fewest differing fields, then same
/// instance, then latest.
fn nearest_record(
    records: Vec<ActionRecord>,
    kind: &str,
    name: &InstanceName,
    new: &Leaves,
    placeholders: &[FieldPath],
) -> Option<ActionRecord> {
    let distance = |record: &ActionRecord| {
        let mut old = leaves(&record.recipe);
        placeholders.iter().for_each(|path| drop(old.remove(path)));
        let stage = &record.provenance.stage;
        // Subtracted so that the latest comes first; positive floats sort like their bits.
        let age = u64::MAX - record.provenance.started.max(0.0).to_bits();
        (stage.stage != name.stage, differences(&old, new).len(), stage != name, age, record.key)
    };
    records.into_iter().filter(|record| record.recipe.kind == kind).min_by_key(distance)
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

/// Adds the instance connected to `inputs.PORT[I]`, and drops the index if the port takes only one.
fn name_input(graph: &Graph, instance: usize, change: &mut Change) {
    let place = change.field.strip_prefix("inputs.").and_then(|rest| rest.strip_suffix(']')?.split_once('['));
    let Some((port, index)) = place else { return };
    let Some(inputs) = graph.instances[instance].inputs.iter().find(|inputs| inputs.port == port) else { return };
    let source = index.parse::<usize>().ok().and_then(|index| inputs.from.get(index));
    change.from = source.map(|source| graph.instances[source.instance].name.clone());
    if inputs.arity != Arity::Many {
        change.field = format!("inputs.{port}");
    }
}

impl fmt::Display for Explanation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}: {}: {}", self.stage, self.action, self.reason)?;
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
        for Change { field, old, new, from } in &self.changes {
            let shown = |value: &Option<String>| value.as_deref().map_or("absent".to_owned(), shorten);
            let from = from.as_ref().map_or(String::new(), |from| format!(" (from `{from}`)"));
            writeln!(f, "    {field}{from}: {} -> {}", shown(old), shown(new))?;
        }
        for PendingInput { port, from, after } in &self.unknown {
            let after: Vec<String> = after.iter().map(|name| format!("`{name}`")).collect();
            writeln!(f, "  input `{port}` (from `{from}`): known after {}", after.join(", "))?;
        }
        Ok(())
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
