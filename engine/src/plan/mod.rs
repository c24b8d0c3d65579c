//! Which stages are reused and which must run, as functions of values. Runs nothing and writes nothing.
//!
//! The planner and the runner use the same two functions, [`recipe()`] and [`decide()`]. Law: [`plan_with`] the digests
//! that a run found gives exactly that run's decisions.

mod decide;
mod diff;
mod draft;
mod environment;
mod explain;
mod flags;
mod prospects;
mod recipe;
#[cfg(test)]
mod tests;
mod twins;

use std::collections::BTreeSet;

pub use decide::{Bytes, Decision, Index, Reason, decide};
pub use diff::Change;
pub use draft::{RecipeState, recipe};
pub use environment::missing;
pub use explain::{Against, Explanation, Unknown, explain};
pub use flags::Flags;
pub use prospects::prospects;
pub use recipe::{Leaf, Recipe, RecipeInput, RecipePort, Step, Visitor};
pub use twins::Twins;

use crate::error::Result;
use crate::graph::Graph;
use crate::kind::Registry;
use crate::names::{Digest, Key};
use crate::store::Store;

/// What will be done, as far as it is known before anything runs.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// One per instance, in the graph's order.
    pub stages: Vec<Planned>,
}

/// The plan for one instance.
#[derive(Clone, Debug, PartialEq)]
pub struct Planned {
    /// Index into the graph's instances.
    pub instance: usize,
    pub state: State,
    /// Whether somebody is known to need the artifact's bytes: hand this to [`decide()`] once the inputs are known.
    pub bytes: Bytes,
    /// Wall time of the last attempt at this instance, else at another of its stage.
    pub expected_seconds: Option<f64>,
    /// What the user should know of the files that its parameters name.
    pub notes: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// There is a record, and the bytes are there if anybody is known to need them.
    Reuse { key: Key, digest: Digest },
    /// The key is known and an attempt is needed.
    Run { key: Key, reason: Reason },
    /// The key is not known before these inputs of the instance are, each of which runs or is pending itself.
    Pending { waits_on: Vec<usize> },
}

impl Plan {
    /// What is known of every instance's digest before anything runs.
    pub fn known(&self) -> Vec<Option<Digest>> {
        let digest = |planned: &Planned| match planned.state {
            State::Reuse { digest, .. } => Some(digest),
            _ => None,
        };
        self.stages.iter().map(digest).collect()
    }

    /// Whether nothing has to run.
    pub fn is_complete(&self) -> bool {
        self.stages.iter().all(|planned| matches!(planned.state, State::Reuse { .. }))
    }
}

/// Plans a graph against a store.
///
/// # Errors
/// Two instances of one stage with equal keys, a path parameter where there is nothing, `--from` of a stage whose
/// inputs cannot be reused (all yours); a disk that fails.
pub fn plan(graph: &Graph, registry: &Registry, store: &Store, flags: &Flags) -> Result<Plan> {
    let mut plan = plan_with(graph, registry, store, flags, &[])?;
    flags.check_from(graph, &plan)?;
    let timings = store.timings()?;
    for planned in &mut plan.stages {
        let instance = &graph.instances[planned.instance];
        planned.expected_seconds = timings.expected(&instance.kind, &instance.name);
    }
    Ok(plan)
}

/// Plans with the digests that attempts are known to give: `found[i]` for instance `i` if it must run.
pub fn plan_with(
    graph: &Graph,
    registry: &Registry,
    index: &dyn Index,
    flags: &Flags,
    found: &[Option<Digest>],
) -> Result<Plan> {
    let targets: BTreeSet<usize> = graph.targets.iter().copied().collect();
    let mut gone = vec![None; graph.instances.len()];
    // Each round makes at least one more instance run, for want of bytes; almost always one or two rounds.
    loop {
        let (states, notes) = forward(graph, registry, index, flags, found, &gone)?;
        if !backward(graph, index, &targets, &states, &mut gone)? {
            let stages = states.into_iter().zip(notes).enumerate().map(|(instance, (state, notes))| {
                let needed = targets.contains(&instance) || gone[instance].is_some();
                let bytes = if needed { Bytes::Needed } else { Bytes::NotNeeded };
                Planned { instance, state, bytes, expected_seconds: None, notes }
            });
            return Ok(Plan { stages: stages.collect() });
        }
    }
}

/// From inputs to users: what each instance's recipe is, and what its record says. `gone[i]` tells why the bytes of
/// instance `i`, whose record is there, must be made again. With each instance's notes.
fn forward(
    graph: &Graph,
    registry: &Registry,
    index: &dyn Index,
    flags: &Flags,
    found: &[Option<Digest>],
    gone: &[Option<Reason>],
) -> Result<(Vec<State>, Vec<Vec<String>>)> {
    let mut known: Vec<Option<Digest>> = Vec::with_capacity(graph.instances.len());
    let mut states = Vec::with_capacity(graph.instances.len());
    let mut notes = Vec::with_capacity(graph.instances.len());
    let mut twins = Twins::default();
    for (i, instance) in graph.instances.iter().enumerate() {
        let draft = draft::draft(graph, registry, index, i, &known)?;
        let key = draft.recipe.key();
        twins.insert(&instance.name, key)?;
        let state = if draft.unknown.is_empty() {
            match (decide(&instance.name, &key, Bytes::NotNeeded, flags, index)?, &gone[i]) {
                (Decision::Reuse(_), Some(reason)) => State::Run { key, reason: reason.clone() },
                (Decision::Reuse(digest), None) => State::Reuse { key, digest },
                (Decision::Run(reason), _) => State::Run { key, reason },
            }
        } else {
            State::Pending { waits_on: draft.waits_on() }
        };
        known.push(match state {
            State::Reuse { digest, .. } => Some(digest),
            State::Run { .. } => found.get(i).copied().flatten(),
            State::Pending { .. } => None,
        });
        states.push(state);
        notes.push(draft.notes);
    }
    Ok((states, notes))
}

/// From users to inputs: a record whose artifact is gone is valid until its bytes are needed, by a target or by an
/// instance that must run. Gives whether there was a new one. What a pending instance comes to need is seen when the
/// runner plans again with its inputs known.
fn backward(
    graph: &Graph,
    index: &dyn Index,
    targets: &BTreeSet<usize>,
    states: &[State],
    gone: &mut [Option<Reason>],
) -> Result<bool> {
    let mut needed = vec![false; states.len()];
    targets.iter().for_each(|i| needed[*i] = true);
    let mut grew = false;
    for i in (0..states.len()).rev() {
        if let State::Reuse { digest, .. } = &states[i]
            && needed[i]
            && let Some(reason) = decide::lacking(index.presence(digest)?)
        {
            gone[i] = Some(reason);
            grew = true;
        }
        if matches!(states[i], State::Run { .. }) || gone[i].is_some() {
            for source in graph.instances[i].inputs.iter().flat_map(|port| &port.from) {
                needed[source.instance] = true;
            }
        }
    }
    Ok(grew)
}
