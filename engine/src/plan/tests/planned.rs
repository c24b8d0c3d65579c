use serde_json::json;

use super::{Shelf, chain, force, graph, registry};
use crate::error::Blame;
use crate::graph::Graph;
use crate::names::Digest;
use crate::plan::{Bytes, Flags, Plan, Reason, RecipeState, State, plan_with, recipe};

/// One word per instance: `reuse`, `pending`, or why it runs.
fn words(plan: &Plan) -> Vec<String> {
    let word = |state: &State| match state {
        State::Reuse { .. } => "reuse".to_owned(),
        State::Run { reason: Reason::NoRecord, .. } => "run".to_owned(),
        State::Run { reason, .. } => reason.to_string(),
        State::Pending { .. } => "pending".to_owned(),
    };
    plan.stages.iter().map(|planned| word(&planned.state)).collect()
}

fn planned(graph: &Graph, shelf: &Shelf, flags: &Flags) -> Plan {
    plan_with(graph, &registry(), shelf, flags, &[]).unwrap()
}

/// Runs everything; each instance produces the digest of its number and parameter.
fn complete(graph: &Graph, shelf: &mut Shelf) -> Vec<Digest> {
    let mut known = Vec::new();
    for (i, instance) in graph.instances.iter().enumerate() {
        let RecipeState::Ready(recipe) = recipe(graph, &registry(), shelf, i, &known).unwrap() else {
            panic!("pending")
        };
        let digest = Digest::of(format!("{i} {}", instance.params).as_bytes());
        shelf.put(recipe.key(), digest);
        known.push(Some(digest));
    }
    known.into_iter().flatten().collect()
}

#[test]
fn on_an_empty_store_what_has_no_inputs_runs_and_the_rest_is_pending() {
    let plan = planned(&chain(1, 1, 1), &Shelf::default(), &Flags::default());
    assert_eq!(words(&plan), ["run", "pending", "pending"]);
    assert_eq!(plan.stages[2].state, State::Pending { waits_on: vec![1] });
}

#[test]
fn a_changed_stage_runs_and_what_lies_downstream_is_pending() {
    let mut shelf = Shelf::default();
    complete(&chain(1, 1, 1), &mut shelf);
    assert_eq!(words(&planned(&chain(1, 1, 1), &shelf, &Flags::default())), ["reuse", "reuse", "reuse"]);
    assert_eq!(words(&planned(&chain(1, 2, 1), &shelf, &Flags::default())), ["reuse", "run", "pending"]);
    assert_eq!(words(&planned(&chain(1, 1, 2), &shelf, &Flags::default())), ["reuse", "reuse", "run"]);
}

#[test]
fn a_stage_that_gave_the_same_bytes_stops_the_wave() {
    let (mut shelf, flags) = (Shelf::default(), Flags::default());
    let digests = complete(&chain(1, 1, 1), &mut shelf);
    let found: Vec<_> = digests.into_iter().map(Some).collect();
    let plan = plan_with(&chain(1, 2, 1), &registry(), &shelf, &flags, &found).unwrap();
    assert_eq!(words(&plan), ["reuse", "run", "reuse"]);
}

#[test]
fn force_reruns_a_stage_whatever_is_recorded() {
    let mut shelf = Shelf::default();
    complete(&chain(1, 1, 1), &mut shelf);
    assert_eq!(words(&planned(&chain(1, 1, 1), &shelf, &force(&["b"]))), ["reuse", "forced", "pending"]);
}

#[test]
fn a_missing_artifact_is_made_again_only_when_its_bytes_are_needed() {
    let mut shelf = Shelf::default();
    let digests = complete(&chain(1, 1, 1), &mut shelf);
    let none = Flags::default();

    let mut without_middle = shelf.clone();
    without_middle.whole.remove(&digests[0]);
    without_middle.whole.remove(&digests[1]);
    assert_eq!(words(&planned(&chain(1, 1, 1), &without_middle, &none)), ["reuse", "reuse", "reuse"]);
    // c must run, so b is needed, so a is needed.
    let plan = planned(&chain(1, 1, 2), &without_middle, &none);
    assert_eq!(words(&plan), ["artifact missing", "pending", "pending"]);
    assert_eq!(plan.stages[1].bytes, Bytes::Needed);

    let mut without_target = shelf.clone();
    without_target.whole.remove(&digests[2]);
    assert_eq!(words(&planned(&chain(1, 1, 1), &without_target, &none)), ["reuse", "reuse", "artifact missing"]);

    let mut rotten = shelf.clone();
    rotten.rotten.insert(digests[1]);
    assert_eq!(words(&planned(&chain(1, 1, 1), &rotten, &none)), ["reuse", "reuse", "reuse"]);
    assert_eq!(words(&planned(&chain(1, 1, 2), &rotten, &none)), ["reuse", "artifact damaged: x", "pending"]);
}

#[test]
fn what_a_pending_stage_turns_out_to_need_is_seen_by_planning_again() {
    // d needs c (changed) and b; b needs a.
    let stages = |c: u64| {
        let c = json!({ "n": c });
        graph(&[("a", json!({}), &[]), ("b", json!({}), &[0]), ("c", c, &[]), ("d", json!({}), &[1, 2])])
    };
    let mut shelf = Shelf::default();
    let digests = complete(&stages(1), &mut shelf);
    shelf.whole.remove(&digests[0]);
    shelf.whole.remove(&digests[1]);
    let none = Flags::default();
    assert_eq!(words(&planned(&stages(2), &shelf, &none)), ["reuse", "reuse", "run", "pending"]);
    let again = |c: Digest| {
        let found: Vec<_> = [digests[0], digests[1], c, digests[3]].into_iter().map(Some).collect();
        words(&plan_with(&stages(2), &registry(), &shelf, &none, &found).unwrap())
    };
    assert_eq!(again(digests[2]), ["reuse", "reuse", "run", "reuse"]);
    assert_eq!(again(Digest::of(b"new")), ["artifact missing", "artifact missing", "run", "run"]);
}

#[test]
fn two_instances_of_a_stage_with_one_recipe_are_refused() {
    let refused = |g: &Graph| {
        let error = plan_with(g, &registry(), &Shelf::default(), &Flags::default(), &[]).unwrap_err();
        assert_eq!(error.blame, Blame::Yours);
        error.message
    };
    let known = refused(&graph(&[("m[1]", json!({}), &[]), ("m[2]", json!({}), &[])]));
    assert!(known.contains("`m[1]`") && known.contains("`m[2]`"), "{known}");
    let pending = refused(&graph(&[("a", json!({}), &[]), ("m[1]", json!({}), &[0]), ("m[2]", json!({}), &[0])]));
    assert!(pending.contains("`m[1]`") && pending.contains("`m[2]`"), "{pending}");
    // Two different stages may have the same recipe.
    let g = graph(&[("m", json!({}), &[]), ("n", json!({}), &[])]);
    assert_eq!(words(&planned(&g, &Shelf::default(), &Flags::default())), ["run", "run"]);
}

#[test]
fn from_demands_that_everything_upstream_is_reusable() {
    let mut shelf = Shelf::default();
    complete(&chain(1, 1, 1), &mut shelf);
    let check = |g: &Graph, names: &[&str]| {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let flags = Flags::new(g, &[], &names).unwrap();
        flags.check_from(g, &planned(g, &shelf, &flags))
    };
    check(&chain(1, 2, 1), &["b"]).unwrap();
    check(&chain(1, 2, 1), &["b", "c"]).unwrap();
    let error = check(&chain(2, 1, 1), &["c"]).unwrap_err();
    assert_eq!(error.blame, Blame::Yours);
    assert!(error.message.contains("`a` (no record") && error.message.contains("`b` (pending)"), "{error}");
}

#[test]
fn a_plan_says_that_the_store_was_left_out_of_an_input() {
    let mut shelf = Shelf::default();
    shelf.contents.insert("/data/around-the-store".into(), Digest::of(b"bytes"));
    let with = |path: &str| graph(&[("a", json!({ "files": { "$files": [path] } }), &[])]);
    let plan = plan_with(&with("/data/around-the-store"), &registry(), &shelf, &Flags::default(), &[]).unwrap();
    assert_eq!(plan.stages[0].notes, ["the store lies within /data/around-the-store and is left out"]);
    shelf.contents.insert("/data/x".into(), Digest::of(b"bytes"));
    let plan = plan_with(&with("/data/x"), &registry(), &shelf, &Flags::default(), &[]).unwrap();
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
    let mut shelf = Shelf::default();
    complete(&g, &mut shelf);
    std::thread::Builder::new()
        .stack_size(256 << 10)
        .spawn(move || {
            assert!(planned(&g, &shelf, &Flags::default()).is_complete());
            assert_eq!(words(&planned(&g, &shelf, &force(&["s0"])))[9_999], "pending");
            shelf.whole.clear();
            let plan = planned(&g, &shelf, &Flags::default());
            assert_eq!(words(&plan)[0], "artifact missing");
            assert_eq!(words(&plan)[9_999], "pending");
        })
        .unwrap()
        .join()
        .unwrap();
}
