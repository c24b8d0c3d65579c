//! The expected time, memory and disk space of the instances that will run.
//!
//! Time and disk space come from earlier attempts. A time is used as it is if the recipe was the same but for what costs no
//! time. It is scaled by the kind's own estimate of the work ([`Kind::scaling`](crate::kind::Kind::scaling)) if parameters or
//! the sizes of inputs differ. If the kind cannot tell, or an input's size cannot be told, the time is unknown.
//!
//! Memory is that on the CPU: the kind's forecast ([`Kind::forecast`](crate::kind::Kind::forecast)), which needs no earlier
//! attempt; if there is one, times the ratio of its peak to its own forecast.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::Value;

use super::{Expected, Plan, PlannedState, StoreView, recipe_draft};
use crate::error::Result;
use crate::estimate::Scaling;
use crate::graph::Graph;
use crate::kind::Registry;
use crate::names::{Digest, InstanceName, StageName};
use crate::store::{ActionRecord, Artifact, Provenance, Store};

/// Largest relative difference of two sizes that count as equal.
const SAME_SIZE: f64 = 0.02;

/// What is known of an artifact, before or after it is made.
#[derive(Clone, Default)]
struct ArtifactFacts {
    /// Bytes.
    size: Option<f64>,
    /// See [`ArtifactType::outline`](crate::artifact::ArtifactType::outline).
    outline: Value,
}

/// The artifacts at each port, in the order of the pipeline file.
type InputFacts<'a> = HashMap<&'a str, Vec<ArtifactFacts>>;

/// The total size at a port.
fn size(inputs: &InputFacts, port: &str) -> Option<f64> {
    inputs.get(port)?.iter().map(|input| input.size).sum()
}

fn outlines(inputs: &InputFacts, port: &str) -> Vec<Value> {
    inputs.get(port).into_iter().flatten().map(|input| input.outline.clone()).collect()
}

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
    let digests = plan.known();
    let timings = store.timings()?;
    let mut history = History { store, registry, timings, artifacts: HashMap::new(), without_key: None };
    let mut known: Vec<ArtifactFacts> = Vec::with_capacity(plan.stages.len());
    let mut expected = Vec::with_capacity(plan.stages.len());
    for planned in &plan.stages {
        if let PlannedState::Reuse { digest, .. } = planned.state {
            known.push(history.artifact(&digest));
            expected.push(Expected::default());
            continue;
        }
        let instance = &graph.instances[planned.instance];
        let kind = registry.get_kind(&instance.kind);
        let planned_inputs: InputFacts = instance
            .inputs
            .iter()
            .map(|port| (&*port.port, port.from.iter().map(|source| known[source.instance].clone()).collect()))
            .collect();
        let forecast = |params: &Value, inputs: &InputFacts| {
            kind.map(|kind| kind.forecast(params, &|port| outlines(inputs, port))).unwrap_or_default()
        };
        let new = forecast(&instance.params, &planned_inputs);
        let memory = new.memory.map(|bytes| bytes as u64);
        let Some(record) = history.latest(&instance.kind, &instance.name)? else {
            known.push(ArtifactFacts { size: None, outline: new.outline });
            expected.push(Expected { memory, ..Expected::default() });
            continue;
        };
        let mut recorded_inputs: InputFacts = HashMap::new();
        for port in &record.recipe.inputs {
            let artifacts = port.from.iter().map(|input| history.artifact(&input.digest)).collect();
            recorded_inputs.insert(&port.port, artifacts);
        }
        let same_sizes = planned_inputs.len() == recorded_inputs.len()
            && planned_inputs.keys().all(|port| match (size(&planned_inputs, port), size(&recorded_inputs, port)) {
                (Some(a), Some(b)) => (a - b).abs() <= SAME_SIZE * f64::max(a, b),
                _ => false,
            });
        let draft = recipe_draft::draft_recipe(graph, registry, view, planned.instance, &digests)?;
        let same = same_sizes && draft.recipe.params == record.recipe.params;
        let ratio = if same {
            Some(Scaling::new(1.0, 1.0))
        } else {
            let of = |params, inputs: &InputFacts| kind?.scaling(params, &|port| size(inputs, port));
            let (new, old) = (of(&instance.params, &planned_inputs), of(&record.recipe.params, &recorded_inputs));
            new.zip(old).and_then(|(new, old)| new.relative_to(&old))
        };
        let disk = ratio.zip(history.artifact(&record.digest).size).map(|(ratio, size)| ratio.output * size);
        let Provenance { peak_bytes, platform, .. } = &record.provenance;
        let peak = Some(*peak_bytes).filter(|bytes| *bytes > 0 && platform.device == "cpu");
        let memory = match (peak, new.memory, forecast(&record.recipe.params, &recorded_inputs).memory) {
            (Some(peak), _, _) if same => Some(peak),
            (Some(peak), Some(new), Some(old)) if old > 0.0 => Some((peak as f64 * new / old) as u64),
            _ => memory,
        };
        let seconds = ratio.map(|ratio| ratio.work * record.provenance.seconds);
        known.push(ArtifactFacts { size: disk, outline: new.outline });
        expected.push(Expected { seconds, memory, disk: disk.map(|size| size as u64) });
    }
    Ok(expected)
}

/// Earlier attempts and their artifacts.
struct History<'a> {
    store: &'a Store,
    registry: &'a Registry,
    timings: crate::store::Timings,
    artifacts: HashMap<Digest, ArtifactFacts>,
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
    /// Nothing is known of an artifact that is gone.
    fn artifact(&mut self, digest: &Digest) -> ArtifactFacts {
        if let Some(known) = self.artifacts.get(digest) {
            return known.clone();
        }
        let known = match self.store.open_artifact(digest) {
            Ok(Artifact { folder, manifest }) => ArtifactFacts {
                size: Some(manifest.files.values().map(|file| file.bytes as f64).sum()),
                outline: self.registry.get_type(&manifest.artifact_type).map_or(Value::Null, |t| t.outline(&folder)),
            },
            Err(_) => ArtifactFacts::default(),
        };
        self.artifacts.insert(*digest, known.clone());
        known
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
