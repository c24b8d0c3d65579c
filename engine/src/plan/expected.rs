//! The expected time, memory and disk space of the instances that will run, from earlier attempts.
//!
//! A time is used as it is if the recipe was the same but for what costs no time. It is scaled by the kind's own estimate
//! of the work ([`Kind::scaling`](crate::kind::Kind::scaling)) if parameters or the sizes of inputs differ. If the kind
//! cannot tell, or an input's size cannot be told, the time is unknown. So is the memory unless nothing that it depends on differs.

use std::collections::HashMap;
use std::sync::Arc;

use super::{Expected, Plan, PlannedState, StoreView, recipe_draft};
use crate::error::Result;
use crate::estimate::Scaling;
use crate::graph::Graph;
use crate::kind::Registry;
use crate::names::{Digest, InstanceName, StageName};
use crate::store::{ActionRecord, Store};

/// Largest relative difference of two sizes that count as equal.
const SAME_SIZE: f64 = 0.02;

/// By instance.
///
/// # Errors
/// When the store cannot be read.
pub(super) fn expected(
    graph: &Graph,
    plan: &Plan,
    registry: &Registry,
    store: &Store,
    view: &dyn StoreView,
) -> Result<Vec<Expected>> {
    if plan.is_complete() {
        return Ok(vec![Expected::default(); plan.stages.len()]);
    }
    let known = plan.known();
    let mut history = History { store, timings: store.timings()?, sizes: HashMap::new(), without_key: None };
    let mut sizes: Vec<Option<f64>> = Vec::with_capacity(plan.stages.len());
    let mut expected = Vec::with_capacity(plan.stages.len());
    for planned in &plan.stages {
        if let PlannedState::Reuse { digest, .. } = planned.state {
            sizes.push(history.size(&digest)?);
            expected.push(Expected::default());
            continue;
        }
        let instance = &graph.instances[planned.instance];
        let Some(record) = history.latest(&instance.kind, &instance.name)? else {
            sizes.push(None);
            expected.push(Expected::default());
            continue;
        };
        let kind = registry.get_kind(&instance.kind);
        // The total size at each port: now, and at the recorded attempt.
        let mut now: HashMap<&str, Option<f64>> = HashMap::new();
        for port in &instance.inputs {
            let total = port.from.iter().map(|source| sizes[source.instance]).sum::<Option<f64>>();
            now.insert(&port.port, total);
        }
        let mut then: HashMap<&str, Option<f64>> = HashMap::new();
        for port in &record.recipe.inputs {
            let mut total = Some(0.0);
            for input in &port.from {
                total = total.zip(history.size(&input.digest)?).map(|(sum, size)| sum + size);
            }
            then.insert(&port.port, total);
        }
        let same_sizes = now.len() == then.len()
            && now.iter().all(|(port, now)| match (now, then.get(port).copied().flatten()) {
                (Some(now), Some(then)) => (now - then).abs() <= SAME_SIZE * then.max(*now),
                _ => false,
            });
        let draft = recipe_draft::draft_recipe(graph, registry, view, planned.instance, &known)?;
        let same = same_sizes && draft.recipe.params == record.recipe.params;
        let ratio = if same {
            Some(Scaling::new(1.0, 1.0).memory(1.0))
        } else {
            let of = |params, sizes: &HashMap<&str, Option<f64>>| {
                kind?.scaling(params, &|port| sizes.get(port).copied().flatten())
            };
            let (new, old) = (of(&instance.params, &now), of(&record.recipe.params, &then));
            new.zip(old).and_then(|(new, old)| new.relative_to(&old))
        };
        let size = ratio.zip(history.size(&record.digest)?).map(|(ratio, size)| ratio.output * size);
        sizes.push(size);
        let as_before = ratio.and_then(|ratio| ratio.memory).is_some_and(|ratio| (ratio - 1.0).abs() <= SAME_SIZE);
        let memory = Some(record.provenance.peak_bytes).filter(|bytes| as_before && *bytes > 0);
        let seconds = ratio.map(|ratio| ratio.work * record.provenance.seconds);
        expected.push(Expected { seconds, memory, disk: size.map(|size| size as u64) });
    }
    Ok(expected)
}

/// Earlier attempts and the sizes of their artifacts.
struct History<'a> {
    store: &'a Store,
    timings: crate::store::Timings,
    sizes: HashMap<Digest, Option<f64>>,
    /// The latest records, for timings of older versions, which have no key.
    without_key: Option<LatestRecords>,
}

/// The latest record by kind and instance, and by kind and stage.
#[derive(Default)]
struct LatestRecords {
    instance: HashMap<(String, InstanceName), Arc<ActionRecord>>,
    stage: HashMap<(String, StageName), Arc<ActionRecord>>,
}

impl LatestRecords {
    fn of(mut records: Vec<ActionRecord>) -> Self {
        records.sort_by(|a, b| a.provenance.started.total_cmp(&b.provenance.started));
        let mut latest = Self::default();
        for record in records.into_iter().map(Arc::new) {
            let (kind, name) = (record.recipe.kind.clone(), record.provenance.stage.clone());
            latest.stage.insert((kind.clone(), name.stage.clone()), Arc::clone(&record));
            latest.instance.insert((kind, name), record);
        }
        latest
    }

    fn get(&self, kind: &str, name: &InstanceName) -> Option<Arc<ActionRecord>> {
        let exact = self.instance.get(&(kind.to_owned(), name.clone()));
        exact.or_else(|| self.stage.get(&(kind.to_owned(), name.stage.clone()))).cloned()
    }
}

impl History<'_> {
    /// Bytes of an artifact; `None` if it is gone.
    fn size(&mut self, digest: &Digest) -> Result<Option<f64>> {
        if let Some(size) = self.sizes.get(digest) {
            return Ok(*size);
        }
        let manifest = self.store.open_artifact(digest).ok().map(|artifact| artifact.manifest);
        let size = manifest.map(|manifest| manifest.files.values().map(|file| file.bytes as f64).sum());
        self.sizes.insert(*digest, size);
        Ok(size)
    }

    /// The record of the latest attempt at the instance, or else at another instance of its stage with the same kind.
    fn latest(&mut self, kind: &str, instance: &InstanceName) -> Result<Option<Arc<ActionRecord>>> {
        let Some(timing) = self.timings.latest(kind, instance) else { return Ok(None) };
        if let Some(key) = timing.key {
            return Ok(self.store.action(&key)?.map(Arc::new));
        }
        if self.without_key.is_none() {
            self.without_key = Some(LatestRecords::of(self.store.actions()?));
        }
        Ok(self.without_key.as_ref().and_then(|latest| latest.get(kind, instance)))
    }
}
