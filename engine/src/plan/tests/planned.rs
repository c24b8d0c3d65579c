use serde_json::json;

use super::{MemoryStore, chain, force, graph, registry};
use crate::error::Blame;
use crate::graph::Graph;
use crate::names::Digest;
use crate::plan::{ArtifactNeed, Flags, Plan, PlannedState, Reason, RecipeState, plan_with, recipe};

/// One word per instance: `reuse`, `pending`, or why it runs.
fn actions(plan: &Plan) -> Vec<String> {
    let action = |state: &PlannedState| match state {
        PlannedState::Reuse { .. } => "reuse".to_owned(),
        PlannedState::Run { reason: Reason::NoRecord, .. } => "run".to_owned(),
        PlannedState::Run { reason, .. } => reason.to_string(),
        PlannedState::Pending { .. } => "pending".to_owned(),
    };
    plan.stages.iter().map(|planned| action(&planned.state)).collect()
}

fn planned(graph: &Graph, store: &MemoryStore, flags: &Flags) -> Plan {
    plan_with(graph, &registry(), store, flags, &[]).unwrap()
}

/// Runs everything; each instance produces the digest of its number and parameter.
fn complete(graph: &Graph, store: &mut MemoryStore) -> Vec<Digest> {
    let mut known = Vec::new();
    for (i, instance) in graph.instances.iter().enumerate() {
        let RecipeState::Ready(recipe) = recipe(graph, &registry(), store, i, &known).unwrap() else {
            panic!("pending")
        };
        let digest = Digest::of(format!("{i} {}", instance.params).as_bytes());
        store.put(recipe.key(), digest);
        known.push(Some(digest));
    }
    known.into_iter().flatten().collect()
}

#[test]
fn on_an_empty_store_what_has_no_inputs_runs_and_the_rest_is_pending() {
    let plan = planned(&chain(1, 1, 1), &MemoryStore::default(), &Flags::default());
    assert_eq!(actions(&plan), ["run", "pending", "pending"]);
    assert_eq!(plan.stages[2].state, PlannedState::Pending { waits_on: vec![1] });
}

#[test]
fn a_changed_stage_runs_and_what_lies_downstream_is_pending() {
    let mut store = MemoryStore::default();
    complete(&chain(1, 1, 1), &mut store);
    assert_eq!(actions(&planned(&chain(1, 1, 1), &store, &Flags::default())), ["reuse", "reuse", "reuse"]);
    assert_eq!(actions(&planned(&chain(1, 2, 1), &store, &Flags::default())), ["reuse", "run", "pending"]);
    assert_eq!(actions(&planned(&chain(1, 1, 2), &store, &Flags::default())), ["reuse", "reuse", "run"]);
}

#[test]
fn a_stage_with_unchanged_bytes_reuses_what_lies_downstream() {
    let (mut store, flags) = (MemoryStore::default(), Flags::default());
    let digests = complete(&chain(1, 1, 1), &mut store);
    let found: Vec<_> = digests.into_iter().map(Some).collect();
    let plan = plan_with(&chain(1, 2, 1), &registry(), &store, &flags, &found).unwrap();
    assert_eq!(actions(&plan), ["reuse", "run", "reuse"]);
}

#[test]
fn force_reruns_a_stage_whatever_is_recorded() {
    let mut store = MemoryStore::default();
    complete(&chain(1, 1, 1), &mut store);
    assert_eq!(actions(&planned(&chain(1, 1, 1), &store, &force(&["b"]))), ["reuse", "forced", "pending"]);
}

#[test]
fn a_missing_artifact_is_produced_again_only_when_its_bytes_are_needed() {
    let mut store = MemoryStore::default();
    let digests = complete(&chain(1, 1, 1), &mut store);
    let none = Flags::default();

    let mut without_middle = store.clone();
    without_middle.intact.remove(&digests[0]);
    without_middle.intact.remove(&digests[1]);
    assert_eq!(actions(&planned(&chain(1, 1, 1), &without_middle, &none)), ["reuse", "reuse", "reuse"]);
    // c must run, so b is needed, so a is needed.
    let plan = planned(&chain(1, 1, 2), &without_middle, &none);
    assert_eq!(actions(&plan), ["artifact missing", "pending", "pending"]);
    assert_eq!(plan.stages[1].need, ArtifactNeed::Bytes);

    let mut without_target = store.clone();
    without_target.intact.remove(&digests[2]);
    assert_eq!(actions(&planned(&chain(1, 1, 1), &without_target, &none)), ["reuse", "reuse", "artifact missing"]);

    let mut damaged = store.clone();
    damaged.damaged.insert(digests[1]);
    assert_eq!(actions(&planned(&chain(1, 1, 1), &damaged, &none)), ["reuse", "reuse", "reuse"]);
    assert_eq!(actions(&planned(&chain(1, 1, 2), &damaged, &none)), ["reuse", "artifact damaged: x", "pending"]);
}

#[test]
fn planning_again_finds_the_needs_of_a_formerly_pending_stage() {
    // d needs c (changed) and b; b needs a.
    let stages = |c: u64| {
        let c = json!({ "n": c });
        graph(&[("a", json!({}), &[]), ("b", json!({}), &[0]), ("c", c, &[]), ("d", json!({}), &[1, 2])])
    };
    let mut store = MemoryStore::default();
    let digests = complete(&stages(1), &mut store);
    store.intact.remove(&digests[0]);
    store.intact.remove(&digests[1]);
    let none = Flags::default();
    assert_eq!(actions(&planned(&stages(2), &store, &none)), ["reuse", "reuse", "run", "pending"]);
    let again = |c: Digest| {
        let found: Vec<_> = [digests[0], digests[1], c, digests[3]].into_iter().map(Some).collect();
        actions(&plan_with(&stages(2), &registry(), &store, &none, &found).unwrap())
    };
    assert_eq!(again(digests[2]), ["reuse", "reuse", "run", "reuse"]);
    assert_eq!(again(Digest::of(b"new")), ["artifact missing", "artifact missing", "run", "run"]);
}

#[test]
fn two_instances_of_a_stage_with_one_recipe_are_refused() {
    let refused = |g: &Graph| {
        let error = plan_with(g, &registry(), &MemoryStore::default(), &Flags::default(), &[]).unwrap_err();
        assert_eq!(error.blame, Blame::User);
        error.message
    };
    let known = refused(&graph(&[("m[1]", json!({}), &[]), ("m[2]", json!({}), &[])]));
    assert!(known.contains("`m[1]`") && known.contains("`m[2]`"), "{known}");
    let pending = refused(&graph(&[("a", json!({}), &[]), ("m[1]", json!({}), &[0]), ("m[2]", json!({}), &[0])]));
    assert!(pending.contains("`m[1]`") && pending.contains("`m[2]`"), "{pending}");
    // Two different stages may have the same recipe.
    let g = graph(&[("m", json!({}), &[]), ("n", json!({}), &[])]);
    assert_eq!(actions(&planned(&g, &MemoryStore::default(), &Flags::default())), ["run", "run"]);
}

#[test]
fn from_requires_that_everything_upstream_is_reusable() {
    let mut store = MemoryStore::default();
    complete(&chain(1, 1, 1), &mut store);
    let check = |g: &Graph, names: &[&str]| {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let flags = Flags::new(g, &[], &names).unwrap();
        flags.check_from(g, &planned(g, &store, &flags))
    };
    check(&chain(1, 2, 1), &["b"]).unwrap();
    check(&chain(1, 2, 1), &["b", "c"]).unwrap();
    let error = check(&chain(2, 1, 1), &["c"]).unwrap_err();
    assert_eq!(error.blame, Blame::User);
    assert!(error.message.contains("`a` (no record") && error.message.contains("`b` (pending)"), "{error}");
}

#[test]
fn a_plan_says_that_the_store_was_left_out_of_an_input() {
    let mut store = MemoryStore::default();
    store.contents.insert("/data/around-the-store".into(), Digest::of(b"bytes"));
    let with = |path: &str| graph(&[("a", json!({ "files": { "$files": [path] } }), &[])]);
    let plan = plan_with(&with("/data/around-the-store"), &registry(), &store, &Flags::default(), &[]).unwrap();
    assert_eq!(plan.stages[0].notes, ["the store lies within /data/around-the-store and is excluded"]);
    store.contents.insert("/data/x".into(), Digest::of(b"bytes"));
    let plan = plan_with(&with("/data/x"), &registry(), &store, &Flags::default(), &[]).unwrap();
    assert_eq!(plan.stages[0].notes, [""; 0]);
}

#[test]
fn flags_name_stages_instances_and_wildcards() {
    let g = graph(&[
        ("rl[mean,1]", json!(1), &[]),
        ("rl[mean,2]", json!(2), &[]),
        ("rl[std,1]", json!(3), &[]),
        ("sft", json!(4), &[]),
    ]);
    let forced = |name: &str| Flags::new(&g, &[name.to_owned()], &[]).map(|flags| flags.force.len());
    assert_eq!(forced("rl").unwrap(), 3);
    assert_eq!(forced("rl[mean,1]").unwrap(), 1);
    assert_eq!(forced("rl[*, 1]").unwrap(), 2);
    assert_eq!(forced("sft").unwrap(), 1);
    assert!(forced("sfd").unwrap_err().help.unwrap().contains("did you mean `sft`"));
    assert!(forced("rl[mean]").is_err());
    assert!(forced("unused").unwrap_err().message.contains("no target needs"));
}

#[test]
fn a_chain_of_ten_thousand_stages_is_planned_without_recursion() {
    let names: Vec<String> = (0..10_000).map(|i| format!("s{i}")).collect();
    let inputs: Vec<Vec<usize>> = (0..10_000_usize).map(|i| i.checked_sub(1).into_iter().collect()).collect();
    let stages: Vec<_> = names
        .iter()
        .zip(&inputs)
        .enumerate()
        .map(|(i, (name, inputs))| (name.as_str(), json!({ "n": i }), inputs.as_slice()))
        .collect();
    let g = graph(&stages);
    let mut store = MemoryStore::default();
    complete(&g, &mut store);
    std::thread::Builder::new()
        .stack_size(256 << 10)
        .spawn(move || {
            assert!(planned(&g, &store, &Flags::default()).is_complete());
            assert_eq!(actions(&planned(&g, &store, &force(&["s0"])))[9_999], "pending");
            store.intact.clear();
            let plan = planned(&g, &store, &Flags::default());
            assert_eq!(actions(&plan)[0], "artifact missing");
            assert_eq!(actions(&plan)[9_999], "pending");
        })
        .unwrap()
        .join()
        .unwrap();
}
