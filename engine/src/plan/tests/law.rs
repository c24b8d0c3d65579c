//! Compares a simulated run with planning again, and with a simple definition.

use std::collections::BTreeSet;

use proptest::prelude::*;
use serde_json::json;

use super::{MemoryStore, force, graph, registry};
use crate::graph::Graph;
use crate::kind::Registry;
use crate::names::{Digest, Key};
use crate::plan::{Decision, Flags, PlannedState, Reason, Recipe, RecipeState, StoreView, decide, plan_with, recipe};
use crate::store::Presence;

/// A stage's output: a function of its key with so few values that different keys often produce the same bytes.
fn outcome(stage: usize, key: &Key) -> Digest {
    Digest::of(&[stage as u8, key.as_bytes()[0] % 2])
}

/// The bytes that an attempt at an instance with this recipe makes; `forced`: because of `--force`.
type Outcome<'a> = &'a dyn Fn(usize, &Recipe, bool) -> Digest;

/// The decisions and digests of a run.
#[derive(Debug, PartialEq)]
pub(super) struct SimulatedRun {
    /// By instance.
    pub decisions: Vec<Decision>,
    pub digests: Vec<Digest>,
}

/// Simulates the runner: plans, then decides each instance once its inputs are known. An instance whose inputs turn out
/// to be missing is postponed, with everything that depends on it, and planned again.
pub(super) fn run(
    graph: &Graph,
    registry: &Registry,
    store: &mut MemoryStore,
    flags: &Flags,
    outcome: Outcome<'_>,
) -> SimulatedRun {
    let n = graph.instances.len();
    let mut flags = flags.clone();
    let mut ran: Vec<Option<Reason>> = vec![None; n];
    for _ in 0..=n {
        let digests = round(graph, registry, store, &mut flags, outcome, &mut ran);
        if digests.iter().all(Option::is_some) {
            let digests: Vec<Digest> = digests.into_iter().flatten().collect();
            let decision =
                |(reason, digest): (Option<Reason>, &Digest)| reason.map_or(Decision::Reuse(*digest), Decision::Run);
            return SimulatedRun { decisions: ran.into_iter().zip(&digests).map(decision).collect(), digests };
        }
    }
    panic!("more rounds than stages");
}

fn round(
    graph: &Graph,
    registry: &Registry,
    store: &mut MemoryStore,
    flags: &mut Flags,
    outcome: Outcome<'_>,
    ran: &mut [Option<Reason>],
) -> Vec<Option<Digest>> {
    let plan = plan_with(graph, registry, store, flags, &[]).unwrap();
    let mut known: Vec<Option<Digest>> = Vec::new();
    for (i, planned) in plan.stages.iter().enumerate() {
        let name = &graph.instances[i].name;
        let inputs: Vec<usize> =
            graph.instances[i].inputs.iter().flat_map(|port| &port.from).map(|s| s.instance).collect();
        let Some(inputs) = inputs.iter().map(|i| known[*i]).collect::<Option<Vec<Digest>>>() else {
            known.push(None);
            continue;
        };
        let RecipeState::Ready(recipe) = recipe(graph, registry, store, i, &known).unwrap() else { panic!("pending") };
        let key = recipe.key();
        let decision = decide(name, &key, planned.need, flags, store).unwrap();
        match &planned.state {
            PlannedState::Reuse { key: planned, digest } => {
                assert_eq!((planned, &decision), (&key, &Decision::Reuse(*digest)))
            }
            PlannedState::Run { key: planned, reason } => {
                assert_eq!((planned, &decision), (&key, &Decision::Run(reason.clone())))
            }
            PlannedState::Pending { waits_on } => {
                assert!(waits_on.iter().all(|on| !matches!(plan.stages[*on].state, PlannedState::Reuse { .. })));
            }
        }
        known.push(match decision {
            Decision::Reuse(digest) => Some(digest),
            Decision::Run(_) if inputs.iter().any(|d| store.presence(d).unwrap() != Presence::Intact) => None,
            Decision::Run(reason) => {
                let digest = match store.recorded_digest(&key).unwrap() {
                    // Surprising bytes stay recorded: only a forced stage produces other bytes than its record.
                    Some(digest) if reason != Reason::Forced => digest,
                    _ => outcome(i, &recipe, reason == Reason::Forced),
                };
                store.put(key, digest);
                flags.force.remove(name);
                ran[i].get_or_insert(reason);
                Some(digest)
            }
        });
    }
    known
}

/// The definition: an instance runs if it is forced, has no record, or has a record whose bytes are missing while it is
/// a target or an input of an instance that runs.
fn by_definition(graph: &Graph, store: &MemoryStore, flags: &Flags, digests: &[Digest]) -> BTreeSet<usize> {
    let known: Vec<Option<Digest>> = digests.iter().copied().map(Some).collect();
    let n = graph.instances.len();
    let recorded = |i: usize| match recipe(graph, &registry(), store, i, &known).unwrap() {
        RecipeState::Ready(recipe) => store.records.get(&recipe.key()).copied(),
        RecipeState::Pending(_) => None,
    };
    let mut runs: BTreeSet<usize> =
        (0..n).filter(|i| flags.force.contains(&graph.instances[*i].name) || recorded(*i).is_none()).collect();
    loop {
        let read: BTreeSet<usize> = runs
            .iter()
            .flat_map(|i| &graph.instances[*i].inputs)
            .flat_map(|port| &port.from)
            .map(|s| s.instance)
            .collect();
        let lacks = |i: &usize| recorded(*i).is_some_and(|d| !store.intact.contains(&d) || store.damaged.contains(&d));
        let more: Vec<usize> = (0..n)
            .filter(|i| !runs.contains(i) && (read.contains(i) || graph.targets.contains(i)) && lacks(i))
            .collect();
        if more.is_empty() {
            return runs;
        }
        runs.extend(more);
    }
}

/// A graph of `n` stages and the disturbances between runs.
#[derive(Clone, Debug)]
struct Scenario {
    inputs: Vec<Vec<usize>>,
    /// Parameters of earlier runs and of the last one.
    params: Vec<Vec<u8>>,
    lost_records: Vec<usize>,
    lost_artifacts: Vec<usize>,
    damaged_artifacts: Vec<usize>,
    forced: Vec<usize>,
    nondeterministic: bool,
}

fn scenario() -> impl Strategy<Value = Scenario> {
    (1..9_usize).prop_flat_map(|n| {
        let inputs: Vec<_> = (0..n).map(|i| prop::collection::btree_set(0..i.max(1), 0..=i.min(3))).collect();
        let some = || prop::collection::vec(0..n, 0..3);
        let params = prop::collection::vec(prop::collection::vec(0..2_u8, n), 1..4);
        (inputs, params, some(), prop::collection::vec(0..n, 0..6), some(), some(), any::<bool>()).prop_map(
            |(inputs, params, lost_records, lost_artifacts, damaged_artifacts, forced, nondeterministic)| Scenario {
                inputs: inputs
                    .into_iter()
                    .enumerate()
                    .map(|(i, set)| set.into_iter().filter(|s| *s < i).collect())
                    .collect(),
                params,
                lost_records,
                lost_artifacts,
                damaged_artifacts,
                forced,
                nondeterministic,
            },
        )
    })
}

impl Scenario {
    fn graph(&self, params: &[u8]) -> Graph {
        let names: Vec<String> = (0..self.inputs.len()).map(|i| format!("s{i}")).collect();
        let stages: Vec<_> = self
            .inputs
            .iter()
            .enumerate()
            .map(|(i, inputs)| {
                // The stage's number makes keys of different stages differ.
                (names[i].as_str(), json!({ "stage": i, "n": params[i] }), inputs.as_slice())
            })
            .collect();
        graph(&stages)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2_000, ..ProptestConfig::default() })]

    #[test]
    fn planning_again_with_the_digests_of_a_run_gives_its_decisions(scenario in scenario()) {
        let mut store = MemoryStore::default();
        let (last, earlier) = scenario.params.split_last().unwrap();
        for params in earlier {
            let outcome = |i: usize, recipe: &Recipe, _| outcome(i, &recipe.key());
            run(&scenario.graph(params), &registry(), &mut store, &Flags::default(), &outcome);
        }
        let nth = |i: usize, of: usize| (i * 7919) % of.max(1);
        for i in &scenario.lost_records {
            let key = store.records.keys().nth(nth(*i, store.records.len())).copied();
            key.map(|key| store.records.remove(&key));
        }
        for i in &scenario.lost_artifacts {
            let digest = store.intact.iter().nth(nth(*i, store.intact.len())).copied();
            digest.map(|digest| store.intact.remove(&digest));
        }
        for i in &scenario.damaged_artifacts {
            store.damaged.extend(store.intact.iter().nth(nth(*i, store.intact.len())).copied());
        }

        let g = scenario.graph(last);
        let forced: Vec<String> = scenario.forced.iter().map(|i| format!("s{i}")).collect();
        let flags = force(&forced.iter().map(String::as_str).collect::<Vec<_>>());
        let before = store.clone();
        // With `nondeterministic`, a forced stage produces other bytes than before.
        let ran = run(&g, &registry(), &mut store, &flags, &|i, recipe, forced| match forced {
            true if scenario.nondeterministic => Digest::of(&[i as u8, b's']),
            _ => outcome(i, &recipe.key()),
        });

        let found: Vec<Option<Digest>> = ran.digests.iter().copied().map(Some).collect();
        let again = plan_with(&g, &registry(), &before, &flags, &found).unwrap();
        for (planned, decision) in again.stages.iter().zip(&ran.decisions) {
            let planned = match &planned.state {
                PlannedState::Reuse { digest, .. } => Decision::Reuse(*digest),
                PlannedState::Run { reason, .. } => Decision::Run(reason.clone()),
                PlannedState::Pending { waits_on } => panic!("still waits on {waits_on:?}"),
            };
            prop_assert_eq!(&planned, decision);
        }
        let runs = |d: &Decision| matches!(d, Decision::Run(_));
        let by_run: BTreeSet<usize> = (0..g.instances.len()).filter(|i| runs(&ran.decisions[*i])).collect();
        prop_assert_eq!(by_run, by_definition(&g, &before, &flags, &ran.digests));

        // Afterwards nothing is left to do.
        let after = plan_with(&g, &registry(), &store, &Flags::default(), &[]).unwrap();
        prop_assert!(after.is_complete(), "{:?}", after);
        prop_assert_eq!(after.known(), found);
    }
}
