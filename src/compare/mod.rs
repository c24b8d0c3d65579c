//! Compares runs, pipelines and stages: which parameters differ, which metrics, which curves.
//!
//! A *side* is what one argument of `temper compare` names. [`differences`] aligns the instances of all sides by name and
//! [`print`] shows the result.

mod print;

use std::collections::BTreeMap;
use std::path::PathBuf;

use engine::error::Result;
use engine::graph::{Graph, Instance};
use engine::names::{Digest, Key};
use engine::plan::{Plan, PlannedState};
use engine::store::Store;
use serde_json::Value;

pub use print::{Format, describe, print};

use crate::flatten::flatten;
use crate::metrics::{Curve, curves};
use crate::report::load::{RunData, SEED};

/// What one argument names.
#[derive(Clone, Debug)]
pub struct Side {
    pub name: String,
    pub instances: Vec<ComparedInstance>,
    /// Names of the instances that were asked for, whose results are shown first.
    pub targets: Vec<String>,
}

/// One instance of a side.
#[derive(Clone, Debug)]
pub struct ComparedInstance {
    pub name: String,
    pub matrix: Vec<(String, String)>,
    /// `uses`, `seed`, `needs.…` and `with.…`, with defaults filled in.
    pub settings: Vec<(String, String)>,
    /// What the recipe says beside the settings: versions, and the content of files; empty without a record.
    pub recorded: Vec<(String, String)>,
    pub digest: Option<Digest>,
    pub metrics: BTreeMap<String, f64>,
    /// The artifact's folder, if it exists.
    pub folder: Option<PathBuf>,
}

impl ComparedInstance {
    pub fn stage(&self) -> &str {
        self.name.split('[').next().unwrap_or(&self.name)
    }

    /// The stage with its labels except for the seed's: instances that differ in their seed alone are averaged.
    fn group(&self) -> String {
        let labels = self.matrix.iter().filter(|(dimension, _)| dimension != SEED);
        let labels: Vec<&str> = labels.map(|(_, label)| label.as_str()).collect();
        if labels.is_empty() { self.stage().to_owned() } else { format!("{}[{}]", self.stage(), labels.join(",")) }
    }
}

impl Side {
    /// A run with everything that it made or reused.
    pub fn of_run(name: String, run: &RunData, store: &Store) -> Result<Self> {
        let mut instances = Vec::new();
        for instance in &run.instances {
            let result = run.result(instance);
            let needs = instance.inputs.iter().map(|port| (port.port.as_str(), port.from.join(", ")));
            instances.push(ComparedInstance {
                name: instance.name.clone(),
                matrix: instance.matrix.clone(),
                settings: settings(&instance.kind, instance.seed, needs, &instance.params),
                recorded: recorded(result.key, store)?,
                digest: result.digest,
                metrics: run.metrics(instance),
                folder: run.folder(instance),
            });
        }
        Ok(Self { name, instances, targets: run.targets.clone() })
    }

    /// A pipeline with the results that it would reuse.
    pub fn of_plan(name: String, graph: &Graph, plan: &Plan, store: &Store) -> Result<Self> {
        let mut instances = Vec::new();
        for planned in &plan.stages {
            let instance = &graph.instances[planned.instance];
            let (key, digest) = match planned.state {
                PlannedState::Reuse { key, digest } => (Some(key), Some(digest)),
                PlannedState::Run { key, .. } => (Some(key), None),
                PlannedState::Pending { .. } => (None, None),
            };
            let artifact = digest.and_then(|digest| store.open_artifact(&digest).ok());
            let (folder, metrics) = match artifact {
                Some(artifact) => (Some(artifact.folder), artifact.manifest.facts.metrics),
                None => (None, BTreeMap::new()),
            };
            instances.push(ComparedInstance {
                name: instance.name.to_string(),
                matrix: instance.matrix.clone(),
                settings: planned_settings(graph, instance),
                recorded: recorded(key, store)?,
                digest,
                metrics,
                folder,
            });
        }
        let targets = graph.targets.iter().map(|target| graph.instances[*target].name.to_string()).collect();
        Ok(Self { name, instances, targets })
    }

    /// This side with one of its instances alone.
    pub fn only(mut self, instance: &str) -> Option<Self> {
        self.instances.retain(|found| found.name == instance);
        self.targets = vec![instance.to_owned()];
        (!self.instances.is_empty()).then_some(self)
    }
}

fn planned_settings(graph: &Graph, instance: &Instance) -> Vec<(String, String)> {
    let needs = instance.inputs.iter().map(|port| {
        let from: Vec<String> =
            port.from.iter().map(|source| graph.instances[source.instance].name.to_string()).collect();
        (port.port.as_str(), from.join(", "))
    });
    let seed = instance.signature.seeded.then_some(instance.seed);
    settings(&instance.kind, seed, needs, &instance.params)
}

fn settings<'a>(
    kind: &str,
    seed: Option<u64>,
    needs: impl Iterator<Item = (&'a str, String)>,
    params: &Value,
) -> Vec<(String, String)> {
    let mut all = vec![("uses".to_owned(), kind.to_owned())];
    all.extend(seed.map(|seed| ("seed".to_owned(), seed.to_string())));
    all.extend(needs.map(|(port, from)| (format!("needs.{port}"), from)));
    all.extend(flatten(params).into_iter().map(|(name, value)| (format!("with.{name}"), value)));
    all
}

/// The parts of a recipe that the pipeline file does not show.
fn recorded(key: Option<Key>, store: &Store) -> Result<Vec<(String, String)>> {
    let Some(recipe) = key.map(|key| store.action(&key)).transpose()?.flatten().map(|record| record.recipe) else {
        return Ok(Vec::new());
    };
    let mut all = vec![("version".to_owned(), recipe.version.to_string())];
    all.extend(recipe.numerics.map(|numerics| ("numerics".to_owned(), numerics.to_string())));
    let files = flatten(&recipe.params).into_iter().filter(|(name, _)| name.ends_with(".content"));
    all.extend(files.map(|(name, value)| (format!("with.{name}"), value)));
    Ok(all)
}

/// A setting that is not the same on all sides.
#[derive(Clone, Debug, PartialEq)]
pub struct SettingRow {
    /// A stage, an instance, or `stage (2 of 5)`.
    pub stage: String,
    pub name: String,
    /// By side; `None` where it does not exist.
    pub values: Vec<Option<String>>,
}

/// A metric that is not the same on all sides.
#[derive(Clone, Debug, PartialEq)]
pub struct MetricRow {
    pub stage: String,
    pub name: String,
    /// By side.
    pub values: Vec<Option<f64>>,
}

/// A curve that is not the same on all sides, at the steps that they share.
#[derive(Clone, Debug, PartialEq)]
pub struct CurveRow {
    pub stage: String,
    pub name: String,
    /// By side; empty where there is none.
    pub curves: Vec<Vec<(i64, f64)>>,
}

/// Everything that differs.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Differences {
    pub settings: Vec<SettingRow>,
    /// Those of the targets first.
    pub metrics: Vec<MetricRow>,
    pub curves: Vec<CurveRow>,
}

/// The instances of all sides that are compared with each other.
struct Slot<'a> {
    /// The name that they share; the stage's if only that is the same.
    name: String,
    stage: String,
    group: String,
    is_target: bool,
    sides: Vec<Option<&'a ComparedInstance>>,
}

impl Slot<'_> {
    /// Whether all sides have the same artifact.
    fn is_equal(&self) -> bool {
        let mut digests = self.sides.iter().map(|side| side.and_then(|instance| instance.digest));
        let first = digests.next().flatten();
        first.is_some() && digests.all(|digest| digest == first)
    }
}

/// Compares two or more sides. `average`: whether instances that differ only in their seed are averaged.
///
/// # Errors
/// If a table with curves cannot be read.
pub fn differences(sides: &[Side], average: bool) -> Result<Differences> {
    let slots = slots(sides);
    let mut found = Differences { settings: setting_rows(sides, &slots), ..Differences::default() };
    let mut ordered: Vec<&Slot> = slots.iter().filter(|slot| !slot.is_equal()).collect();
    // Inputs come before their users: from the targets upwards.
    ordered.reverse();
    ordered.sort_by_key(|slot| !slot.is_target);
    let mut groups: Vec<(String, Vec<&Slot>)> = Vec::new();
    for slot in ordered {
        let name = if average { &slot.group } else { &slot.name };
        match groups.iter_mut().find(|(group, _)| group == name) {
            Some((_, members)) => members.push(slot),
            None => groups.push((name.clone(), vec![slot])),
        }
    }
    for (group, members) in groups {
        metric_rows(&group, &members, sides.len(), &mut found.metrics);
        curve_rows(&group, &members, sides.len(), &mut found.curves)?;
    }
    Ok(found)
}

fn slots(sides: &[Side]) -> Vec<Slot<'_>> {
    if sides.iter().all(|side| side.instances.len() == 1) {
        // Instances given by name, which may differ.
        let instances: Vec<&ComparedInstance> = sides.iter().map(|side| &side.instances[0]).collect();
        let same = |of: &dyn Fn(&ComparedInstance) -> String| {
            let first = of(instances[0]);
            instances.iter().all(|instance| of(instance) == first).then_some(first)
        };
        let stage = same(&|instance| instance.stage().to_owned()).unwrap_or_else(|| "stage".to_owned());
        let name = same(&|instance| instance.name.clone()).unwrap_or_else(|| stage.clone());
        let sides = instances.into_iter().map(Some).collect();
        return vec![Slot { group: name.clone(), name, stage, is_target: true, sides }];
    }
    let mut slots: Vec<Slot> = Vec::new();
    let mut index: BTreeMap<&str, usize> = BTreeMap::new();
    for (at, side) in sides.iter().enumerate() {
        for instance in &side.instances {
            let slot = *index.entry(&instance.name).or_insert_with(|| {
                slots.push(Slot {
                    name: instance.name.clone(),
                    stage: instance.stage().to_owned(),
                    group: instance.group(),
                    is_target: false,
                    sides: vec![None; sides.len()],
                });
                slots.len() - 1
            });
            slots[slot].sides[at] = Some(instance);
            slots[slot].is_target |= side.targets.contains(&instance.name);
        }
    }
    slots
}

fn setting_rows(sides: &[Side], slots: &[Slot]) -> Vec<SettingRow> {
    let mut rows = Vec::new();
    let mut stages: Vec<&str> = Vec::new();
    for slot in slots {
        if !stages.contains(&slot.stage.as_str()) {
            stages.push(&slot.stage);
        }
    }
    for stage in stages {
        let members: Vec<&Slot> = slots.iter().filter(|slot| slot.stage == stage).collect();
        let counts: Vec<usize> =
            (0..sides.len()).map(|side| members.iter().filter(|slot| slot.sides[side].is_some()).count()).collect();
        let common: Vec<&&Slot> = members.iter().filter(|slot| slot.sides.iter().all(Option::is_some)).collect();
        if common.len() < members.len() {
            let values = counts.iter().map(|count| (*count > 0).then(|| count.to_string())).collect();
            rows.push(SettingRow { stage: stage.to_owned(), name: "instances".to_owned(), values });
        }
        // Each difference with the instances that have it, in order of appearance.
        let mut differing: Vec<(SettingRow, Vec<&str>)> = Vec::new();
        for slot in &common {
            for (name, values) in differing_settings(slot) {
                match differing.iter_mut().find(|(row, _)| row.name == name && row.values == values) {
                    Some((_, names)) => names.push(&slot.name),
                    None => {
                        differing.push((SettingRow { stage: stage.to_owned(), name, values }, vec![&slot.name]));
                    }
                }
            }
        }
        for (mut row, names) in differing {
            match names[..] {
                _ if names.len() == common.len() => {}
                [one] => row.stage = one.to_owned(),
                _ => row.stage = format!("{stage} ({} of {})", names.len(), common.len()),
            }
            rows.push(row);
        }
    }
    rows
}

/// The settings of a slot that differ, each with its value by side.
fn differing_settings(slot: &Slot) -> Vec<(String, Vec<Option<String>>)> {
    let sides: Vec<&ComparedInstance> = slot.sides.iter().copied().flatten().collect();
    let all_recorded = sides.iter().all(|side| !side.recorded.is_empty());
    let of = |side: &ComparedInstance| -> Vec<(String, String)> {
        let recorded = side.recorded.iter().filter(|_| all_recorded);
        side.settings.iter().chain(recorded).cloned().collect()
    };
    let sides: Vec<Vec<(String, String)>> = sides.into_iter().map(of).collect();
    let mut names: Vec<&String> = Vec::new();
    for (name, _) in sides.iter().flatten() {
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let mut differing = Vec::new();
    for name in names {
        let value = |side: &Vec<(String, String)>| side.iter().find(|(n, _)| n == name).map(|(_, value)| value.clone());
        let values: Vec<Option<String>> = sides.iter().map(value).collect();
        if values.iter().any(|value| *value != values[0]) {
            differing.push((name.clone(), values));
        }
    }
    differing
}

fn mean(values: impl Iterator<Item = f64>) -> Option<f64> {
    let (sum, count) = values.fold((0.0, 0_u32), |(sum, count), value| (sum + value, count + 1));
    (count > 0).then(|| sum / f64::from(count))
}

/// Whether numbers differ by more than rounding, on the sides that have one: at least two must.
fn differ(values: &[Option<f64>]) -> bool {
    let known: Vec<f64> = values.iter().copied().flatten().collect();
    let (low, high) =
        known.iter().fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(*v), high.max(*v)));
    known.len() > 1 && high - low > 1e-9 * high.abs().max(low.abs())
}

fn metric_rows(group: &str, members: &[&Slot], sides: usize, rows: &mut Vec<MetricRow>) {
    let instances = || members.iter().flat_map(|slot| slot.sides.iter().copied().flatten());
    let mut names: Vec<&String> = instances().flat_map(|instance| instance.metrics.keys()).collect();
    names.sort_unstable();
    names.dedup();
    for name in names {
        let of_side =
            |side: usize| mean(members.iter().filter_map(|slot| slot.sides[side]?.metrics.get(name).copied()));
        let values: Vec<Option<f64>> = (0..sides).map(of_side).collect();
        if differ(&values) {
            rows.push(MetricRow { stage: group.to_owned(), name: name.clone(), values });
        }
    }
}

fn curve_rows(group: &str, members: &[&Slot], sides: usize, rows: &mut Vec<CurveRow>) -> Result<()> {
    let mut by_side: Vec<Vec<Vec<Curve>>> = Vec::with_capacity(sides);
    for side in 0..sides {
        let folders = members.iter().filter_map(|slot| slot.sides[side]?.folder.as_ref());
        by_side.push(folders.map(|folder| curves(folder)).collect::<Result<_>>()?);
    }
    let mut names: Vec<String> = Vec::new();
    for curve in by_side.iter().flatten().flatten() {
        if !names.contains(&curve.name) {
            names.push(curve.name.clone());
        }
    }
    for name in names {
        let averaged: Vec<BTreeMap<i64, f64>> = by_side.iter().map(|members| average(members, &name)).collect();
        let present: Vec<&BTreeMap<i64, f64>> = averaged.iter().filter(|curve| !curve.is_empty()).collect();
        let common = |step: &i64| present.iter().all(|curve| curve.contains_key(step));
        let steps: Vec<i64> =
            present.first().map_or_else(Vec::new, |curve| curve.keys().copied().filter(common).collect());
        let differs = |step: &i64| differ(&averaged.iter().map(|curve| curve.get(step).copied()).collect::<Vec<_>>());
        if steps.iter().any(differs) {
            let at_common =
                |curve: &BTreeMap<i64, f64>| steps.iter().filter_map(|step| Some((*step, *curve.get(step)?))).collect();
            rows.push(CurveRow { stage: group.to_owned(), name, curves: averaged.iter().map(at_common).collect() });
        }
    }
    Ok(())
}

/// The mean of the members' curves, at the steps that all of them have.
fn average(members: &[Vec<Curve>], name: &str) -> BTreeMap<i64, f64> {
    let found: Vec<&Curve> = members.iter().flatten().filter(|curve| curve.name == name).collect();
    let mut sums: BTreeMap<i64, (f64, usize)> = BTreeMap::new();
    for (step, value) in found.iter().flat_map(|curve| &curve.points) {
        let (sum, count) = sums.entry(*step).or_default();
        (*sum, *count) = (*sum + value, *count + 1);
    }
    let whole = sums.into_iter().filter(|(_, (_, count))| *count == found.len());
    whole.map(|(step, (sum, count))| (step, sum / count as f64)).collect()
}

#[cfg(test)]
mod tests;
