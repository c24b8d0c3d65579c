//! The graph: stage instances and their inputs, restricted to what the targets need.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use serde_json::Value;

use crate::diagnostics::{Diagnostic, Diagnostics};
use crate::document::{EffectivePipeline, Executors, RemoteSettings, ReportSettings, Resources, executors, set};
use crate::error::{Error, Result};
use crate::kind::{Arity, Registry, Signature};
use crate::names::InstanceName;

mod draft_index;
mod expand;
mod load;
mod order;
mod params;
mod schema_view;
mod select;
mod serde_messages;
mod wiring;

#[cfg(test)]
pub(crate) mod tests;

/// The instances that a pipeline file asks for; does not change during a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Graph {
    /// In topological order, inputs first; only instances that the targets need.
    pub instances: Vec<Instance>,
    /// Indices into `instances`, in the order of the pipeline file.
    pub targets: Vec<usize>,
    /// Instances of the file that no target needs.
    pub not_needed: Vec<InstanceName>,
    /// The stem of the pipeline file's name.
    pub name: String,
    /// The pipeline's default seed; a stage may override it.
    pub seed: u64,
    /// The file's `report:` section.
    pub report: ReportSettings,
    /// The file's `remote`.
    pub remote: Option<RemoteSettings>,
    /// The file's `on_finish`: a program and its arguments, started after a run; empty: none.
    pub on_finish: Vec<String>,
    /// The file's `executors`.
    pub executors: Executors,
    /// The file's `pools`: the size of each named pool of this machine.
    pub pools: BTreeMap<String, u64>,
}

/// One instance of a stage, checked and with every default filled in.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Instance {
    pub name: InstanceName,
    /// (dimension, label) pairs in declared order.
    pub matrix: Vec<(String, String)>,
    pub kind: String,
    /// As normalised by the kind; paths (`{"$path": …}`) are absolute.
    pub params: Value,
    pub seed: u64,
    pub signature: Signature,
    /// The connected ports, sorted by name.
    pub inputs: Vec<PortInputs>,
    pub placement: Placement,
}

/// Where the attempts of an instance run, and with what. Never part of a key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Placement {
    /// Name of an executor; `None`: a child process.
    pub executor: Option<String>,
    pub resources: Resources,
    /// Maximum wall time of an attempt.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub timeout: Option<Duration>,
    /// Further tries after any failure; `None`: only after failures that may pass.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub retries: Option<u32>,
}

impl Graph {
    /// Places all instances on one executor.
    ///
    /// # Errors
    /// When the pipeline has no such executor, or it needs resources that a stage does not set.
    pub fn place_on(&mut self, executor: &str) -> Result<()> {
        let settings = executors::find(&mut self.executors, executor)
            .map_err(|help| Error::user(format!("unknown executor `{executor}`")).help(help))?
            .cloned();
        for instance in &mut self.instances {
            let Placement { resources, timeout, .. } = &instance.placement;
            let mismatch = settings.as_ref().and_then(|to| executors::mismatch(executor, to, resources, *timeout));
            if let Some((message, help)) = mismatch {
                return Err(Error::user(format!("{}: {message}", instance.name)).help(help));
            }
            instance.placement.executor = settings.is_some().then(|| executor.to_owned());
        }
        Ok(())
    }
}

/// The inputs of one port; never empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PortInputs {
    pub port: String,
    pub arity: Arity,
    /// In the order of the pipeline file.
    pub from: Vec<InputSource>,
}

/// One instance connected to a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct InputSource {
    /// Index into [`Graph::instances`], less than the index of the instance that uses it.
    pub instance: usize,
    /// The matrix labels of that instance, joined by commas; the stage's name if it has no matrix.
    pub label: String,
}

/// Command-line options that change the pipeline file.
#[derive(Clone, Debug, Default)]
pub struct LoadOptions {
    /// Names of profiles, merged in this order.
    pub profiles: Vec<String>,
    /// `path=YAML`, such as `stages.sft.with.lr=1e-4`; applied in this order, after the profiles.
    pub set: Vec<String>,
    /// Selectors that replace the file's targets; empty: keep the file's targets.
    pub until: Vec<String>,
    /// A selector that replaces the targets in place of `until`: the argument STAGE of a command on one stage.
    pub stage: Option<String>,
}

/// Reads a pipeline file and checks everything that can be checked before a run.
///
/// # Errors
/// All faults of the file at once, with their source positions.
pub fn load(file: &Path, options: &LoadOptions, registry: &Registry) -> Result<Graph, Diagnostics> {
    let mut faults = Diagnostics::default();
    let graph = load::load_file(file, options, registry, &mut faults);
    faults.finish(graph)
}

/// Maximum number of combinations of a sweep.
const MAX_COMBINATIONS: usize = 1000;

/// The `--set` arguments of a sweep: one list of arguments for each combination of the values in their lists, the last
/// varying fastest. A list as one of the values is written in a list: `[[a, b]]`.
///
/// # Errors
/// When an argument is not valid YAML, none has a list, or there are too many combinations.
pub fn sweep(set: &[String]) -> Result<Vec<Vec<String>>, Diagnostics> {
    let mut faults = Diagnostics::default();
    let values: Vec<Vec<String>> = set.iter().map(|argument| set::sweep(argument, &mut faults)).collect();
    let count = values.iter().try_fold(1, |count: usize, values| count.checked_mul(values.len()));
    let fault = |message: String| Diagnostic::without_span(message);
    if faults.faults().is_empty() {
        if set.iter().zip(&values).all(|(argument, values)| *values == [argument.as_str()]) {
            let help = "give the values as a list: `--set 'stages.rl.with.lr=[1e-4, 3e-4]' --sweep`";
            faults.push(fault("`--sweep`: no `--set` has a list of values".to_owned()).help(help));
        } else if count.is_none_or(|count| count > MAX_COMBINATIONS) {
            faults.push(fault(format!("`--sweep`: more than {MAX_COMBINATIONS} combinations of values")));
        }
    }
    let mut combinations = vec![Vec::new()];
    if faults.faults().is_empty() {
        for values in &values {
            let extended = combinations.iter().flat_map(|before: &Vec<String>| {
                values.iter().map(|value| [before.as_slice(), std::slice::from_ref(value)].concat())
            });
            combinations = extended.collect();
        }
    }
    faults.finish(Some(combinations))
}

/// The names of the profiles in a pipeline file.
///
/// # Errors
/// When the file cannot be read or parsed.
pub fn profile_names(file: &Path) -> Result<Vec<String>, Diagnostics> {
    let mut faults = Diagnostics::default();
    let names = load::read_profile_names(file, &mut faults);
    faults.finish(names)
}

/// The tree of a pipeline file with the changes of `options` applied, after all checks of [`load`].
///
/// # Errors
/// As [`load`].
pub fn effective(file: &Path, options: &LoadOptions, registry: &Registry) -> Result<EffectivePipeline, Diagnostics> {
    let mut faults = Diagnostics::default();
    let graph = load::load_file(file, options, registry, &mut faults);
    // The pipeline file is the first source.
    let effective = graph.and_then(|_| EffectivePipeline::new(0, &options.profiles, &options.set, faults.clone()));
    faults.finish(effective)
}
