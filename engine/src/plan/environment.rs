//! Finds missing environment variables, such as an API key, at planning rather than after an hour of running.

use std::collections::BTreeMap;

use super::{Flags, Index, Plan, State, plan_with, prospects};
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
pub fn missing(
    graph: &Graph,
    plan: &Plan,
    registry: &Registry,
    store: &Store,
    index: &dyn Index,
    flags: &Flags,
) -> Result<Vec<Error>> {
    let open = plan.stages.iter().filter(|planned| !matches!(planned.state, State::Reuse { .. }));
    let lacking = open.filter_map(|planned| {
        let instance = &graph.instances[planned.instance];
        let kind = registry.get_kind(&instance.kind)?;
        kind.check_environment(&instance.params).err().map(|error| (planned.instance, kind, error))
    });
    let lacking: Vec<(usize, &dyn AnyKind, Error)> = lacking.collect();
    if lacking.is_empty() {
        return Ok(Vec::new());
    }
    let (expected, known) = as_before(graph, registry, index, flags)?;
    let needs_it = |at: usize, kind: &dyn AnyKind| match &expected.stages[at].state {
        State::Reuse { .. } => false,
        State::Run { key, .. } if graph.instances[at].signature.pays => {
            let ctx = prospects::context(&graph.instances[at], key, &known, registry, store);
            let estimate = ctx.and_then(|ctx| kind.estimate(&graph.instances[at].params, &ctx));
            !matches!(estimate, Ok(Some(estimate)) if estimate.requests == 0)
        }
        State::Run { .. } | State::Pending { .. } => true,
    };
    let mut stages: BTreeMap<String, (Error, Vec<String>)> = BTreeMap::new();
    for (at, kind, error) in lacking {
        if needs_it(at, kind) {
            let (_, names) = stages.entry(error.message.clone()).or_insert((error, Vec::new()));
            names.push(graph.instances[at].name.to_string());
        }
    }
    Ok(stages.into_values().map(|(error, names)| error.within(names.join(", "))).collect())
}

/// The plan under the assumption that every stage that runs again produces its previous artifact, with the digests
/// known then.
fn as_before(
    graph: &Graph,
    registry: &Registry,
    index: &dyn Index,
    flags: &Flags,
) -> Result<(Plan, Vec<Option<Digest>>)> {
    let mut found = vec![None; graph.instances.len()];
    loop {
        let plan = plan_with(graph, registry, index, flags, &found)?;
        let before = found.iter().flatten().count();
        for planned in &plan.stages {
            match &planned.state {
                State::Run { key, .. } => found[planned.instance] = index.recorded(key)?,
                State::Reuse { digest, .. } => found[planned.instance] = Some(*digest),
                State::Pending { .. } => {}
            }
        }
        if found.iter().flatten().count() == before {
            return Ok((plan, found));
        }
    }
}
