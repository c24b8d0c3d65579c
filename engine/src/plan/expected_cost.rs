//! The expected cost of the stages that pay for requests, as estimated by their kinds.

use std::collections::BTreeMap;

use super::{Plan, PlannedState};
use crate::context::{Context, Input};
use crate::error::{Blame, Error, Result};
use crate::estimate::ExpectedCost;
use crate::graph::{Graph, Instance};
use crate::kind::Registry;
use crate::names::{Digest, Key};
use crate::store::Store;

/// One per instance, in the graph's order; `None` for instances that pay for nothing or are reused.
///
/// # Errors
/// When the store cannot be read. If a kind cannot estimate its stage's cost, the result is [`ExpectedCost::Unknown`].
pub fn expected_costs(
    graph: &Graph,
    plan: &Plan,
    registry: &Registry,
    store: &Store,
) -> Result<Vec<Option<ExpectedCost>>> {
    let known = plan.known();
    let expected_cost = |instance: &Instance, state: &PlannedState| match state {
        _ if !instance.signature.pays => Ok(None),
        PlannedState::Reuse { .. } => Ok(None),
        PlannedState::Pending { waits_on } => {
            let names: Vec<String> = waits_on.iter().map(|i| graph.instances[*i].name.to_string()).collect();
            Ok(Some(ExpectedCost::Unknown(format!("known after {}", names.join(", ")))))
        }
        PlannedState::Run { key, .. } => {
            let ctx = match planning_context(instance, key, &known, registry, store) {
                // Only the remote store has the bytes of an input so far.
                Err(error) if error.blame == Blame::Environment => {
                    return Ok(Some(ExpectedCost::Unknown("its inputs are not in this store yet".to_owned())));
                }
                other => other?,
            };
            let kind = registry.get_kind(&instance.kind).ok_or_else(|| unregistered(instance))?;
            Ok(match kind.estimate(&instance.params, &ctx) {
                Ok(estimate) => estimate.map(ExpectedCost::Known),
                Err(error) => Some(ExpectedCost::Unknown(error.message)),
            })
        }
    };
    plan.stages.iter().map(|planned| expected_cost(&graph.instances[planned.instance], &planned.state)).collect()
}

/// The context that the attempt will have, except for an output folder.
pub(super) fn planning_context(
    instance: &Instance,
    key: &Key,
    known: &[Option<Digest>],
    registry: &Registry,
    store: &Store,
) -> Result<Context> {
    let mut inputs: BTreeMap<String, Vec<Input>> = BTreeMap::new();
    for port in &instance.inputs {
        for source in &port.from {
            let digest = known[source.instance]
                .ok_or_else(|| Error::internal(format!("{}: the digest of an input is not known", instance.name)))?;
            let artifact = store.open_artifact(&digest)?;
            inputs.entry(port.port.clone()).or_default().push(Input {
                label: source.label.clone(),
                artifact_type: artifact.manifest.artifact_type,
                digest,
                folder: artifact.folder,
            });
        }
    }
    let kind = registry.get_kind(&instance.kind).ok_or_else(|| unregistered(instance))?;
    let work = store.root().join("work").join(key.to_string());
    let ctx = Context::new(kind.name(), instance.seed, inputs, work.join("none"), work.join("checkpoints"));
    Ok(ctx.with_requests(store.requests()))
}

fn unregistered(instance: &Instance) -> Error {
    Error::internal(format!("{}: the graph has a kind `{}` that is not registered", instance.name, instance.kind))
}
