//! The graph: instances, what each is made from, and the cut to the targets. Knows no store and runs nothing.

use std::path::Path;

use serde::Serialize;
use serde_json::Value;

use crate::diagnostics::Diagnostics;
use crate::kind::{Arity, Registry, Signature};
use crate::names::InstanceName;
use crate::spec::Report;

mod expand;
mod load;
mod order;
mod params;
mod select;
mod shape;
mod wire;
mod wording;

#[cfg(test)]
pub(crate) mod tests;

/// What a pipeline file asks for: frozen when a run starts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Graph {
    /// Inputs before their users; only what the targets need.
    pub instances: Vec<Instance>,
    /// Indices into `instances`, in the order of the pipeline file.
    pub targets: Vec<usize>,
    /// Instances of the file that no target needs.
    pub not_needed: Vec<InstanceName>,
    /// The stem of the pipeline file's name.
    pub name: String,
    /// The pipeline's own seed, from which a stage may depart.
    pub seed: u64,
    /// The file's `report:` section.
    pub report: Report,
}

/// One instance of a stage, checked and with every default filled in.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Instance {
    pub name: InstanceName,
    /// (dimension, label), in declared order.
    pub matrix: Vec<(String, String)>,
    pub kind: String,
    /// As normalised by the kind; paths (`{"$path": …}`) are absolute.
    pub params: Value,
    pub seed: u64,
    pub signature: Signature,
    /// The ports that are given something, sorted by name.
    pub inputs: Vec<PortInputs>,
}

/// What a port is given; never empty.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PortInputs {
    pub port: String,
    pub arity: Arity,
    /// In the order of the pipeline file.
    pub from: Vec<Source>,
}

/// One instance at a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Source {
    /// Index into [`Graph::instances`], less than the user's own.
    pub instance: usize,
    /// The matrix labels of that instance, joined by commas; the stage's name if it has none.
    pub label: String,
}

/// What the command line adds to the pipeline file.
#[derive(Clone, Debug, Default)]
pub struct Options {
    /// Names of profiles, merged in this order.
    pub profiles: Vec<String>,
    /// `path=YAML`, such as `stages.sft.with.lr=1e-4`; applied in this order, after the profiles.
    pub set: Vec<String>,
    /// Selectors that replace the file's targets; empty: the file's own.
    pub until: Vec<String>,
}

/// Reads a pipeline file and checks all of it that can be checked before anything runs.
///
/// # Errors
/// Every fault of the file in one go, each with its place.
pub fn load(file: &Path, options: &Options, registry: &Registry) -> Result<Graph, Diagnostics> {
    let mut faults = Diagnostics::default();
    let graph = load::file(file, options, registry, &mut faults);
    faults.finish(graph)
}
