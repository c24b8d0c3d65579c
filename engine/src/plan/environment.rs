//! Finds missing environment variables, such as an API key, at planning rather than after an hour of running.

use std::collections::BTreeMap;

use super::{Flags, Plan, PlannedState, StoreView, expected_cost, plan_with};
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::kind::{AnyKind, Registry};
use crate::names::Digest;
use crate::store::Store;

/// Returns one error per missing thing, prefixed with the stages that miss it.
///
/// A pending stage counts as one that will run, unless it is reused when its inputs turn out as before. A paying stage
/// with no requests left to send misses nothing.
///
/// # Errors
/// When the store cannot be read.
pub fn missing_environment(
    graph: &Graph,
    plan: &Plan,
    registry: &Registry,
    store: &Store,
    view: &dyn StoreView,
    flags: &Flags,
) -> Result<Vec<Error>> {
    let open = plan.stages.iter().filter(|planned| !matches!(planned.state, PlannedState::Reuse { .. }));
    let failing = open.filter_map(|planned| {
        let instance = &graph.instances[planned.instance];
        let kind = registry.get_kind(&instance.kind)?;
        kind.check_environment(&instance.params).err().map(|error| (planned.instance, kind, error))
    });
    let failing: Vec<(usize, &dyn AnyKind, Error)> = failing.collect();
    if failing.is_empty() {
        return Ok(Vec::new());
    }
    let (expected, known) = plan_as_before(graph, registry, view, flags)?;
    let needs_it = |at: usize, kind: &dyn AnyKind| match &expected.stages[at].state {
        PlannedState::Reuse { .. } => false,
        PlannedState::Run { key, .. } if graph.instances[at].signature.pays => {
            let ctx = expected_cost::planning_context(&graph.instances[at], key, &known, registry, store);
            let estimate = ctx.and_then(|ctx| kind.estimate(&graph.instances[at].params, &ctx));
            !matches!(estimate, Ok(Some(estimate)) if estimate.requests == 0)
        }
        PlannedState::Run { .. } | PlannedState::Pending { .. } => true,
    };
    let mut stages: BTreeMap<String, (Error, Vec<String>)> = BTreeMap::new();
    for (at, kind, error) in failing {
        if needs_it(at, kind) {
            let (_, names) = stages.entry(error.message.clone()).or_insert((error, Vec::new()));
            names.push(graph.instances[at].name.to_string());
        }
    }
    Ok(stages.into_values().map(|(error, names)| error.context(names.join(", "))).collect())
}

/// The plan under the assumption that every stage that runs again produces its previous artifact, with the digests
/// known then.
fn plan_as_before(
    graph: &Graph,
    registry: &Registry,
    view: &dyn StoreView,
    flags: &Flags,
) -> Result<(Plan, Vec<Option<Digest>>)> {
    let mut found = vec![None; graph.instances.len()];
    loop {
        let plan = plan_with(graph, registry, view, flags, &found)?;
        let before = found.iter().flatten().count();
        for planned in &plan.stages {
            match &planned.state {
                PlannedState::Run { key, .. } => found[planned.instance] = view.recorded_digest(key)?,
                PlannedState::Reuse { digest, .. } => found[planned.instance] = Some(*digest),
                PlannedState::Pending { .. } => {}
            }
        }
        if found.iter().flatten().count() == before {
            return Ok((plan, found));
        }
    }
}
