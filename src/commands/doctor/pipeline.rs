//! What the stages of a pipeline need that would run now.

use engine::error::{Error, Result};
use engine::estimate::Prospect;
use engine::graph::{Graph, Instance};
use engine::kind::Registry;
use engine::plan::{self, Flags, State};
use engine::store::Store;

use super::Check;
use crate::commands::counted;

/// The checks, and the instances that would run and may send requests; `None` if the plan cannot be made.
pub fn checks<'g>(graph: &'g Graph, store: &Store, registry: &Registry) -> (Vec<Check>, Option<Vec<&'g Instance>>) {
    match planned(graph, store, registry) {
        Ok((checks, open)) => (checks, Some(open)),
        Err(error) => (vec![Check::fault("pipeline", error)], None),
    }
}

fn planned<'g>(graph: &'g Graph, store: &Store, registry: &Registry) -> Result<(Vec<Check>, Vec<&'g Instance>)> {
    let flags = Flags::default();
    let plan = plan::plan(graph, registry, store, &flags)?;
    let prospects = plan::prospects(graph, &plan, registry, store)?;
    let open: Vec<_> = plan
        .stages
        .iter()
        .zip(&prospects)
        .filter(|(planned, _)| !matches!(planned.state, State::Reuse { .. }))
        .map(|(planned, prospect)| (&graph.instances[planned.instance], prospect))
        .collect();
    let message = format!("{}, {} to run", counted(plan.stages.len(), "stage"), open.len());
    let mut checks = vec![Check::ok("pipeline", message)];
    if !store.is_writable() && !open.is_empty() {
        let error = Error::surroundings("stages must run, and the store cannot be written to");
        checks.push(Check::fault("pipeline", error.help("name another store with `--store FOLDER`")));
    }
    let missing = plan::missing(graph, &plan, registry, store, &flags)?;
    checks.extend(missing.into_iter().map(|error| Check::fault("pipeline", error)));
    let sends = |prospect: &Option<Prospect>| !matches!(prospect, Some(Prospect::Known(known)) if known.requests == 0);
    Ok((checks, open.into_iter().filter(|(_, prospect)| sends(prospect)).map(|(instance, _)| instance).collect()))
}
