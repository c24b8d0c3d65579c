//! Decides which stages are reused and which must run, as pure functions of values.
//!
//! Planner and runner use the same two functions, [`recipe()`] and [`decide()`]. Invariant: [`plan_with`] the digests
//! that a run produced returns exactly the decisions of that run.

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

/// The planned work, as far as it is known before the run.
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
    /// Whether the artifact's bytes are known to be needed; pass this to [`decide()`] once the inputs are known.
    pub bytes: Bytes,
    /// Wall time of the last attempt at this instance, or else at another instance of its stage.
    pub expected_seconds: Option<f64>,
    /// Notes for the user about the files that the parameters name.
    pub notes: Vec<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum State {
    /// There is a record, and the artifact's bytes are present if they are known to be needed.
    Reuse { key: Key, digest: Digest },
    /// The key is known and an attempt is needed.
    Run { key: Key, reason: Reason },
    /// The key depends on digests of these inputs, each of which runs or is pending itself.
    Pending { waits_on: Vec<usize> },
}

impl Plan {
    /// The digest of every instance, as far as known before the run.
    pub fn known(&self) -> Vec<Option<Digest>> {
        let digest = |planned: &Planned| match planned.state {
            State::Reuse { digest, .. } => Some(digest),
            _ => None,
        };
        self.stages.iter().map(digest).collect()
    }

    /// Whether nothing needs to run.
    pub fn is_complete(&self) -> bool {
        self.stages.iter().all(|planned| matches!(planned.state, State::Reuse { .. }))
    }
}

/// Plans a graph against a store.
///
/// # Errors
/// Two instances of one stage with equal keys, a path parameter that names nothing, `--from` a stage whose inputs
/// cannot be reused (all user errors); a disk that fails.
pub fn plan(graph: &Graph, registry: &Registry, store: &Store, flags: &Flags) -> Result<Plan> {
    plan_through(graph, registry, store, store, flags)
}

/// [`plan`], with the records and artifacts of `index`, such as those of a remote store besides `store`'s own.
pub fn plan_through(
    graph: &Graph,
    registry: &Registry,
    store: &Store,
    index: &dyn Index,
    flags: &Flags,
) -> Result<Plan> {
    let mut plan = plan_with(graph, registry, index, flags, &[])?;
    flags.check_from(graph, &plan)?;
    let timings = store.timings()?;
    for planned in &mut plan.stages {
        let instance = &graph.instances[planned.instance];
        planned.expected_seconds = timings.expected(&instance.kind, &instance.name);
    }
    Ok(plan)
}

/// Plans with given results of attempts: `found[i]` is the digest of instance `i` if it must run.
pub fn plan_with(
    graph: &Graph,
    registry: &Registry,
    index: &dyn Index,
    flags: &Flags,
    found: &[Option<Digest>],
) -> Result<Plan> {
    let targets: BTreeSet<usize> = graph.targets.iter().copied().collect();
    let mut gone = vec![None; graph.instances.len()];
    // Each round adds at least one instance that must run because its bytes are missing; there are rarely more than
    // two.
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

/// From inputs to users: determines each instance's key and state, and its notes. `gone[i]` is the reason why instance
/// `i`, which has a record, must make its bytes again.
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

/// From users to inputs: a record whose artifact is missing remains valid until a target, or an instance that must run,
/// needs the bytes. Returns whether it found such a record. The needs of pending instances are found when the runner
/// plans again with their inputs known.
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
