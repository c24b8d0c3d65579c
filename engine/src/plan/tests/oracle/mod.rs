//! Compares loading, planning and deciding with an oracle: the definitions written down as plain recursion, without
//! keys, caches, sets of changes or an order of work. Each case is drawn from its own seed.
//!
//!     TEMPER_CASES=1000000 cargo test -p temper-engine plans_and_runs_agree_with_a_slow_oracle
//!     TEMPER_SEED=4711 TEMPER_CASES=1 cargo test -p temper-engine plans_and_runs_agree_with_a_slow_oracle

mod case;
mod definitions;

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use self::case::Case;
use self::definitions::{Oracle, State, nodes, outcome, text_of};
use super::MemoryStore;
use super::law::run;
use crate::graph::tests::kinds::registry;
use crate::kind::Registry;
use crate::names::Digest;
use crate::plan::{ArtifactNeed, Decision, Flags, PlannedState, Reason, RecipeState, plan_with, recipe};

/// What the cases met, so that a drawing that misses something is noticed.
type Tally = BTreeMap<&'static str, u64>;

fn count(tally: &mut Tally, what: &'static str) {
    *tally.entry(what).or_default() += 1;
}

fn check(case: &Case, folder: &Path, registry: &Registry, tally: &mut Tally) {
    let mut store = MemoryStore::default();
    let (mut records, mut keys) = (BTreeMap::new(), BTreeMap::new());
    let last = case.versions.len() - 1;
    for version in 0..last {
        let graph = case.load(version, folder, registry);
        let mut known = Vec::new();
        for i in 0..graph.instances.len() {
            let RecipeState::Ready(recipe) = recipe(&graph, registry, &store, i, &known).unwrap() else {
                panic!("the inputs of an instance come first")
            };
            let text = text_of(&recipe);
            let digest = outcome(&text, false);
            store.put(recipe.key(), digest);
            records.insert(text.clone(), digest);
            assert_eq!(*keys.entry(text).or_insert(recipe.key()), recipe.key(), "the same recipe has two keys");
            known.push(Some(digest));
        }
    }
    assert_eq!(keys.len(), store.records.len(), "two recipes have the same key");
    // By digest and by text, whose order has nothing to do with the pipeline.
    let texts: Vec<String> = records.keys().cloned().collect();
    for text in case.lost_records.iter().filter_map(|n| texts.get(*n)) {
        records.remove(text);
        store.records.remove(&keys[text]);
    }
    let digests: Vec<Digest> = store.intact.iter().copied().collect();
    store.intact.retain(|digest| !case.lost_artifacts.iter().any(|n| digests.get(*n) == Some(digest)));
    store.damaged.extend(case.damaged_artifacts.iter().filter_map(|n| digests.get(*n)));

    let graph = case.load(last, folder, registry);
    let nodes = nodes(case);
    let select = |selectors: &[String]| -> BTreeSet<usize> {
        (0..nodes.len()).filter(|i| selectors.iter().any(|selector| nodes[*i].matches(selector))).collect()
    };
    let targets = select(if case.until.is_empty() { &case.targets } else { &case.until });
    let (force, from) = (select(&case.force), select(&case.from));
    let (before, surprising) = (store.clone(), case.surprising);
    let mut oracle = Oracle { nodes, records, store: &before, targets, forced: BTreeSet::new(), surprising };

    let kept: BTreeSet<usize> = (0..oracle.nodes.len()).filter(|i| oracle.kept(*i)).collect();
    let names = |some: &mut dyn Iterator<Item = String>| some.collect::<BTreeSet<String>>();
    let in_graph = names(&mut graph.instances.iter().map(|instance| instance.name.to_string()));
    assert_eq!(in_graph, names(&mut kept.iter().map(|i| oracle.nodes[*i].name.clone())), "the instances");
    let in_graph = names(&mut graph.targets.iter().map(|target| graph.instances[*target].name.to_string()));
    assert_eq!(in_graph, names(&mut oracle.targets.iter().map(|i| oracle.nodes[*i].name.clone())), "the targets");

    let some_match = |selector: &String| kept.iter().any(|i| oracle.nodes[*i].matches(selector));
    let valid = case.force.iter().chain(&case.from).all(some_match);
    let flags = Flags::new(&graph, &case.force, &case.from);
    assert_eq!(flags.is_ok(), valid, "{flags:?}");
    let Ok(flags) = flags else { return count(tally, "flags that name no stage of the graph") };
    oracle.forced = force.intersection(&kept).copied().collect();

    // By position in the graph.
    let node_of = |name: String| oracle.nodes.iter().position(|node| node.name == name).unwrap();
    let order: Vec<usize> = graph.instances.iter().map(|instance| node_of(instance.name.to_string())).collect();
    let plan = plan_with(&graph, registry, &store, &flags, &[]);
    assert_eq!(plan.is_err(), oracle.has_duplicates(&|i| oracle.planned_recipe(i)), "duplicates at planning: {plan:?}");
    let Ok(plan) = plan else { return count(tally, "duplicates at planning") };
    for (planned, &i) in plan.stages.iter().zip(&order) {
        let name = &oracle.nodes[i].name;
        let state = match &planned.state {
            PlannedState::Reuse { digest, .. } => State::Reuse(*digest),
            PlannedState::Run { reason, .. } => State::Run(reason.clone()),
            PlannedState::Pending { waits_on } => {
                State::Pending(names(&mut waits_on.iter().map(|on| graph.instances[*on].name.to_string())))
            }
        };
        assert_eq!(state, oracle.state(i), "the plan of {name}");
        let needed = oracle.targets.contains(&i) || oracle.lost(i).is_some();
        assert_eq!(planned.need == ArtifactNeed::Bytes, needed, "whether the bytes of {name} are needed");
        count(
            tally,
            match state {
                State::Reuse(_) => "planned to be reused",
                State::Run(Reason::Forced) => "forced",
                State::Run(Reason::NoRecord) => "without a record",
                State::Run(Reason::ArtifactMissing) => "missing",
                State::Run(Reason::ArtifactDamaged { .. }) => "damaged",
                State::Pending(_) => "pending",
            },
        );
    }
    let possible = flags.check_from(&graph, &plan).is_ok();
    let from = from.intersection(&kept).copied().collect();
    assert_eq!(possible, oracle.allows_from(&from), "--from");
    count(tally, if possible { "--from is possible" } else { "--from is not possible" });

    let found: Vec<Option<Digest>> = order.iter().map(|i| Some(oracle.result(*i))).collect();
    let again = plan_with(&graph, registry, &before, &flags, &found);
    assert_eq!(again.is_err(), oracle.has_duplicates(&|i| oracle.recipe_of_run(i)), "duplicates of the run: {again:?}");
    let Ok(again) = again else { return count(tally, "duplicates while running") };
    if oracle.shares_lost_artifact() {
        return count(tally, "one lost artifact of two instances");
    }
    let ran = run(&graph, registry, &mut store, &flags, &|_, recipe, forced| {
        outcome(&text_of(recipe), case.surprising && forced)
    });
    for (at, &i) in order.iter().enumerate() {
        let expected = oracle.runs(i).map_or(Decision::Reuse(oracle.result(i)), Decision::Run);
        let name = &oracle.nodes[i].name;
        assert_eq!((&ran.decisions[at], ran.digests[at]), (&expected, oracle.result(i)), "the run of {name}");
        let planned = match &again.stages[at].state {
            PlannedState::Reuse { digest, .. } => Decision::Reuse(*digest),
            PlannedState::Run { reason, .. } => Decision::Run(reason.clone()),
            PlannedState::Pending { waits_on } => panic!("{name} still waits on {waits_on:?}"),
        };
        assert_eq!(planned, expected, "the plan of {name} with the digests of the run");
        if matches!((&plan.stages[at].state, &expected), (PlannedState::Pending { .. }, Decision::Reuse(_))) {
            count(tally, "cut off early");
        }
    }
}

fn from_environment(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |value| value.parse().unwrap_or_else(|e| panic!("{name}={value}: {e}")))
}

#[test]
fn plans_and_runs_agree_with_a_slow_oracle() {
    let (first, cases) = (from_environment("TEMPER_SEED", 0), from_environment("TEMPER_CASES", 10_000));
    let (next, total, failure) = (AtomicU64::new(0), Mutex::new(Tally::new()), Mutex::new(None));
    let work = || {
        let (folder, registry, mut tally) = (tempfile::tempdir().unwrap(), registry(), Tally::new());
        loop {
            let n = next.fetch_add(1, Ordering::Relaxed);
            if n >= cases || failure.lock().unwrap().is_some() {
                break;
            }
            let case = Case::draw(first + n);
            let checked = catch_unwind(AssertUnwindSafe(|| check(&case, folder.path(), &registry, &mut tally)));
            if let Err(panic) = checked {
                let why = crate::attempt::panic_message(&*panic);
                *failure.lock().unwrap() = Some((first + n, why, case));
            }
        }
        for (what, count) in tally {
            *total.lock().unwrap().entry(what).or_default() += count;
        }
    };
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| (0..threads).for_each(|_| drop(scope.spawn(work))));
    if let Some((seed, why, case)) = failure.into_inner().unwrap() {
        let text = case.text(case.versions.len() - 1);
        panic!("{why}\nreplay with TEMPER_SEED={seed} TEMPER_CASES=1\n{case:?}\n{text}");
    }
    let total = total.into_inner().unwrap();
    println!("{cases} cases from seed {first}: {total:?}");
    assert!(cases < 1_000 || total.len() == 13, "the cases no longer meet everything: {total:?}");
}
