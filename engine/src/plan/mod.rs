//! Decides which stages are reused and which must run, as pure functions of values.
//!
//! Planner and runner use the same two functions, [`recipe()`] and [`decide()`]. Invariant: [`plan_with`] the digests
//! that a run produced returns exactly the decisions of that run.

mod decide;
mod diff;
mod duplicates;
mod environment;
mod expected;
mod expected_cost;
mod explain;
mod flags;
mod recipe;
mod recipe_draft;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

pub use decide::{ArtifactNeed, Decision, Reason, StoreView, decide};
pub use diff::Change;
pub use duplicates::DuplicateCheck;
pub use environment::missing_environment;
pub use expected_cost::expected_costs;
pub use explain::{ComparedRecord, Explanation, PendingInput, explain};
pub use flags::Flags;
pub use recipe::{Leaf, PathStep, Recipe, RecipeInput, RecipePort, RecipeVisitor};
pub use recipe_draft::{RecipeState, recipe};

use crate::error::Result;
use crate::graph::Graph;
use crate::kind::Registry;
use crate::names::{Digest, Key};
use crate::store::Store;

/// The planned work, as far as it is known before the run.
#[derive(Clone, Debug, PartialEq)]
pub struct Plan {
    /// One per instance, in the graph's order.
    pub stages: Vec<PlannedInstance>,
}

/// The plan for one instance.
#[derive(Clone, Debug, PartialEq)]
pub struct PlannedInstance {
    /// Index into the graph's instances.
    pub instance: usize,
    pub state: PlannedState,
    /// Whether the artifact's bytes are known to be needed; pass this to [`decide()`] once the inputs are known.
    pub need: ArtifactNeed,
    /// What an attempt is expected to take; nothing is known of instances that are reused.
    pub expected: Expected,
    /// Notes for the user about the files that the parameters name.
    pub notes: Vec<String>,
}

/// The expected cost of an attempt on this machine, from earlier ones; `None`: unknown.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Expected {
    /// Wall time in seconds.
    pub seconds: Option<f64>,
    /// Peak memory in bytes.
    pub memory: Option<u64>,
    /// Size of the artifact in bytes.
    pub disk: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PlannedState {
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
        let digest = |planned: &PlannedInstance| match planned.state {
            PlannedState::Reuse { digest, .. } => Some(digest),
            _ => None,
        };
        self.stages.iter().map(digest).collect()
    }

    /// Whether nothing needs to run.
    pub fn is_complete(&self) -> bool {
        self.stages.iter().all(|planned| matches!(planned.state, PlannedState::Reuse { .. }))
    }
}

/// Plans a graph against a store.
///
/// # Errors
/// Two instances of one stage with equal keys, a path parameter that names nothing, `--from` a stage whose inputs
/// cannot be reused (all user errors); a disk that fails.
pub fn plan(graph: &Graph, registry: &Registry, store: &Store, flags: &Flags) -> Result<Plan> {
    plan_with_view(graph, registry, store, store, flags)
}

/// [`plan`], with the records and artifacts that `view` shows, such as those of a remote store besides `store`'s own.
pub fn plan_with_view(
    graph: &Graph,
    registry: &Registry,
    store: &Store,
    view: &dyn StoreView,
    flags: &Flags,
) -> Result<Plan> {
    let mut plan = plan_with(graph, registry, view, flags, &[])?;
    flags.check_from(graph, &plan)?;
    let expected = expected::expected(graph, &plan, registry, store, view)?;
    plan.stages.iter_mut().zip(expected).for_each(|(planned, expected)| planned.expected = expected);
    Ok(plan)
}

/// Plans with given results of attempts: `found[i]` is the digest of instance `i` if it must run.
pub fn plan_with(
    graph: &Graph,
    registry: &Registry,
    store: &dyn StoreView,
    flags: &Flags,
    found: &[Option<Digest>],
) -> Result<Plan> {
    let targets: BTreeSet<usize> = graph.targets.iter().copied().collect();
    let mut lost = vec![None; graph.instances.len()];
    // Each round adds at least one instance that must run because its bytes are missing; there are rarely more than
    // two.
    loop {
        let (states, notes) = forward(graph, registry, store, flags, found, &lost)?;
        if !backward(graph, store, &targets, &states, &mut lost)? {
            let stages = states.into_iter().zip(notes).enumerate().map(|(instance, (state, notes))| {
                let needed = targets.contains(&instance) || lost[instance].is_some();
                let need = if needed { ArtifactNeed::Bytes } else { ArtifactNeed::DigestOnly };
                PlannedInstance { instance, state, need, expected: Expected::default(), notes }
            });
            return Ok(Plan { stages: stages.collect() });
        }
    }
}

/// From inputs to users: determines each instance's key and state, and its notes. `lost[i]` is the reason why instance
/// `i`, which has a record, must make its bytes again.
fn forward(
    graph: &Graph,
    registry: &Registry,
    store: &dyn StoreView,
    flags: &Flags,
    found: &[Option<Digest>],
    lost: &[Option<Reason>],
) -> Result<(Vec<PlannedState>, Vec<Vec<String>>)> {
    let mut known: Vec<Option<Digest>> = Vec::with_capacity(graph.instances.len());
    let mut states = Vec::with_capacity(graph.instances.len());
    let mut notes = Vec::with_capacity(graph.instances.len());
    let mut duplicates = DuplicateCheck::default();
    for (i, instance) in graph.instances.iter().enumerate() {
        let draft = recipe_draft::draft_recipe(graph, registry, store, i, &known)?;
        let key = draft.recipe.key();
        duplicates.insert(&instance.name, key)?;
        let state = if draft.unknown.is_empty() {
            match (decide(&instance.name, &key, ArtifactNeed::DigestOnly, flags, store)?, &lost[i]) {
                (Decision::Reuse(_), Some(reason)) => PlannedState::Run { key, reason: reason.clone() },
                (Decision::Reuse(digest), None) => PlannedState::Reuse { key, digest },
                (Decision::Run(reason), _) => PlannedState::Run { key, reason },
            }
        } else {
            PlannedState::Pending { waits_on: draft.waits_on() }
        };
        known.push(match state {
            PlannedState::Reuse { digest, .. } => Some(digest),
            PlannedState::Run { .. } => found.get(i).copied().flatten(),
            PlannedState::Pending { .. } => None,
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
    store: &dyn StoreView,
    targets: &BTreeSet<usize>,
    states: &[PlannedState],
    lost: &mut [Option<Reason>],
) -> Result<bool> {
    let mut needed = vec![false; states.len()];
    targets.iter().for_each(|i| needed[*i] = true);
    let mut found_new = false;
    for i in (0..states.len()).rev() {
        if let PlannedState::Reuse { digest, .. } = &states[i]
            && needed[i]
            && let Some(reason) = decide::damage_reason(store.presence(digest)?)
        {
            lost[i] = Some(reason);
            found_new = true;
        }
        if matches!(states[i], PlannedState::Run { .. }) || lost[i].is_some() {
            for source in graph.instances[i].inputs.iter().flat_map(|port| &port.from) {
                needed[source.instance] = true;
            }
        }
    }
    Ok(found_new)
}
