//! Checks the needs of a pipeline's stages that are not cached.

use engine::error::{Error, Result};
use engine::estimate::ExpectedCost;
use engine::graph::{Graph, Instance};
use engine::kind::Registry;
use engine::plan::{self, Flags, PlannedState};
use engine::store::Store;

use super::Check;
use crate::commands::counted;

/// The checks, and the instances to run that may send requests; `None` if the plan cannot be made.
pub fn checks<'g>(graph: &'g Graph, store: &Store, registry: &Registry) -> (Vec<Check>, Option<Vec<&'g Instance>>) {
    match check_plan(graph, store, registry) {
        Ok((checks, to_run)) => (checks, Some(to_run)),
        Err(error) => (vec![Check::error("pipeline", error)], None),
    }
}

fn check_plan<'g>(graph: &'g Graph, store: &Store, registry: &Registry) -> Result<(Vec<Check>, Vec<&'g Instance>)> {
    let flags = Flags::default();
    let plan = plan::plan(graph, registry, store, &flags)?;
    let costs = plan::expected_costs(graph, &plan, registry, store)?;
    let to_run: Vec<_> = plan
        .stages
        .iter()
        .zip(&costs)
        .filter(|(planned, _)| !matches!(planned.state, PlannedState::Reuse { .. }))
        .map(|(planned, cost)| (&graph.instances[planned.instance], cost))
        .collect();
    let message = format!("{}, {} to run", counted(plan.stages.len(), "stage"), to_run.len());
    let mut checks = vec![Check::ok("pipeline", message)];
    if !store.is_writable() && !to_run.is_empty() {
        let error = Error::environment("stages must run, and the store cannot be written to");
        checks.push(Check::error("pipeline", error.help("choose another store with `--store FOLDER`")));
    }
    let mut missing = plan::missing_environment(graph, &plan, registry, store, store, &flags)?;
    missing.extend(engine::run::missing_programs(graph, &plan));
    checks.extend(missing.into_iter().map(|error| Check::error("pipeline", error)));
    let sends = |cost: &Option<ExpectedCost>| !matches!(cost, Some(ExpectedCost::Known(known)) if known.requests == 0);
    Ok((checks, to_run.into_iter().filter(|(_, cost)| sends(cost)).map(|(instance, _)| instance).collect()))
}
