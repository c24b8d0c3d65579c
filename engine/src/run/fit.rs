//! What instances need of this machine, what it has, and which instances can never run here.

use std::collections::BTreeMap;

use super::queue::{Amounts, Demand, Resource, Threads};
use super::{DeviceShare, RunOptions};
use crate::document::resources::{MIB, size};
use crate::error::Error;
use crate::graph::{Graph, Instance};
use crate::machine::Machine;
use crate::plan::{Plan, PlannedState};

/// What attempts on this machine share.
pub(super) fn limits(options: &RunOptions, pools: &BTreeMap<String, u64>) -> Amounts {
    let Machine { memory, gpus } = &options.machine;
    let pools = pools.iter().map(|(pool, size)| (Resource::Pool(pool.clone()), *size));
    let devices = [(Resource::Gpus, gpus.len() as u64), (Resource::Device, 1)];
    pools.chain(devices).chain(memory.map(|memory| (Resource::Memory, memory))).collect()
}

/// What an attempt of an instance takes; a job of a batch system is a slot of its own kind. A stage that does not say how
/// much memory it needs is expected to need `expected_memory` bytes.
pub(super) fn demand(instance: &Instance, options: &RunOptions, expected_memory: Option<u64>) -> Demand {
    if instance.placement.executor.is_some() {
        return Demand { threads: Threads::Fixed(1), amounts: Amounts::new() };
    }
    let resources = &instance.placement.resources;
    let threads = match resources.threads {
        Some(n) => Threads::Fixed(n as usize),
        None if instance.signature.parallel => Threads::Elastic,
        None => Threads::Fixed(1),
    };
    // What is expected is the memory of a run on the CPU. An estimate must not keep a stage from running.
    let expected_memory = expected_memory.filter(|_| options.device == "cpu");
    let most = options.machine.memory.unwrap_or(u64::MAX);
    let memory = resources.memory.unwrap_or_else(|| expected_memory.map_or(0, |bytes| bytes.div_ceil(MIB)).min(most));
    let pools = resources.pools.iter().map(|(pool, units)| (Resource::Pool(pool.clone()), *units));
    let mut amounts: Amounts = pools.chain([(Resource::Memory, memory)]).collect();
    amounts.insert(Resource::Gpus, gpus(instance, options.device_share));
    let whole_device = options.device_share == DeviceShare::Device && computes_on_device(instance);
    amounts.insert(Resource::Device, u64::from(whole_device));
    Demand { threads, amounts }
}

fn computes_on_device(instance: &Instance) -> bool {
    instance.signature.numerics.is_some()
}

fn gpus(instance: &Instance, share: DeviceShare) -> u64 {
    let default = u64::from(share == DeviceShare::Gpu && computes_on_device(instance));
    instance.placement.resources.gpus.unwrap_or(default)
}

/// The instances that may run here, those that are pending among them.
fn to_run<'a>(graph: &'a Graph, plan: &'a Plan) -> impl Iterator<Item = &'a Instance> {
    let open = plan.stages.iter().filter(|planned| !matches!(planned.state, PlannedState::Reuse { .. }));
    open.map(|planned| &graph.instances[planned.instance]).filter(|instance| instance.placement.executor.is_none())
}

/// Whether a stage that may run here takes a GPU.
pub fn needs_gpus(graph: &Graph, plan: &Plan, share: DeviceShare) -> bool {
    to_run(graph, plan).any(|instance| gpus(instance, share) > 0)
}

/// One error for each stage that can never run here: it needs more than this machine has. Stages that need more threads
/// than there are run with all of them.
pub fn unfit(graph: &Graph, plan: &Plan, machine: &Machine, share: DeviceShare) -> Vec<Error> {
    let mut stages: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for instance in to_run(graph, plan) {
        let (needed, free) = (gpus(instance, share), machine.gpus.len() as u64);
        if needed > free {
            let has = if free == 0 { "none is visible".to_owned() } else { format!("only {free} are visible") };
            let message = format!("needs {needed} GPU{} and {has} here", if needed == 1 { "" } else { "s" });
            stages.entry(message).or_default().push(instance.name.to_string());
        }
        if let (Some(needed), Some(total)) = (instance.placement.resources.memory, machine.memory)
            && needed > total
        {
            let message = format!("needs {} of memory and this machine has {}", size(needed), size(total));
            stages.entry(message).or_default().push(instance.name.to_string());
        }
    }
    let help = "lower the stage's `resources`, give it an `executor`, or run on a larger machine; `nvidia-smi` and \
                CUDA_VISIBLE_DEVICES say which GPUs are visible";
    let errors = stages.into_iter().map(|(message, names)| Error::environment(message).context(names.join(", ")));
    errors.map(|error| error.help(help)).collect()
}
