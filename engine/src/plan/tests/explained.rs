use serde_json::json;

use super::{chain, force, graph, registry};
use crate::external;
use crate::graph::Graph;
use crate::plan::{Explanation, Flags, RecipeState, explain, plan, recipe};
use crate::store::tests::{TestSpace, record};

/// Runs everything in a real store; each instance produces its number and parameters.
fn complete(space: &TestSpace, graph: &Graph, started: f64) {
    let mut known = Vec::new();
    for (i, instance) in graph.instances.iter().enumerate() {
        let state = recipe(graph, &registry(), &space.store, i, &known).unwrap();
        let RecipeState::Ready(recipe) = state else { panic!("pending") };
        let (digest, _) = space.commit(&[("x", format!("{i} {}", instance.params).as_bytes())]);
        let mut record = record(0, digest);
        (record.key, record.recipe) = (recipe.key(), recipe);
        record.provenance.stage = instance.name.clone();
        record.provenance.run = format!("run-{started}");
        record.provenance.started = started;
        let mut paths = std::collections::BTreeMap::new();
        external::replace(&instance.params, &mut |external| {
            paths.extend(external.split().into_iter().map(|(path, single)| {
                let digest = space.store.content_of(&single).unwrap().digest;
                (path, digest)
            }));
            Ok(external.to_value())
        })
        .unwrap();
        record.provenance.paths = paths;
        space.store.record(&record).unwrap();
        known.push(Some(digest));
    }
}

fn explained(space: &TestSpace, graph: &Graph, flags: &Flags, instance: usize) -> Explanation {
    let plan = plan(graph, &registry(), &space.store, flags).unwrap();
    explain(graph, &registry(), &space.store, &plan, instance).unwrap()
}

#[test]
fn a_changed_parameter_is_named_old_and_new() {
    let space = TestSpace::new();
    complete(&space, &chain(1, 1, 1), 1.0);
    let explanation = explained(&space, &chain(1, 5, 1), &Flags::default(), 1);
    let text = explanation.to_string();
    assert_eq!((explanation.action, explanation.changes.len()), ("run", 1));
    assert!(
        text.contains("params.n: 1 -> 5") && text.contains("compared with the nearest record, b of run run-1"),
        "{text}"
    );
}

#[test]
fn a_changed_input_is_named_with_the_stage_that_feeds_it() {
    let space = TestSpace::new();
    complete(&space, &chain(1, 1, 1), 1.0);
    let mut other = chain(1, 5, 1);
    other.instances.truncate(2);
    other.targets = vec![1];
    complete(&space, &other, 2.0);
    let explanation = explained(&space, &chain(1, 5, 1), &Flags::default(), 2);
    assert_eq!(explanation.changes.len(), 1);
    assert_eq!(explanation.changes[0].field, "inputs.in");
    assert_eq!(explanation.changes[0].from.as_ref().unwrap().to_string(), "b");
    assert_ne!(explanation.changes[0].old, explanation.changes[0].new);
    // The run with the other parameter of `b` made the input.
    let causes: Vec<_> = explanation.causes.iter().map(|cause| (cause.stage.to_string(), cause.action)).collect();
    assert_eq!(causes, [("b".to_owned(), "reuse")]);
    assert!(
        explanation.to_string().contains("because of b: reuse: ")
            && explanation.to_string().contains("params.n: 1 -> 5"),
        "{explanation}"
    );
}

#[test]
fn a_changed_file_is_named_among_those_of_its_parameter() {
    let space = TestSpace::new();
    let [x, y, z] = ["x", "y", "z"].map(|name| space.folder.path().join(name));
    [&x, &y, &z].into_iter().for_each(|path| std::fs::write(path, "old").unwrap());
    let params =
        |files: &[&std::path::PathBuf]| json!({ "deep": [{ "files": { "$files": files } }], "one": { "$path": z } });
    let before = graph(&[("a", params(&[&x, &y]), &[])]);
    complete(&space, &before, 1.0);
    let changes = |graph: &Graph| {
        let explanation = explained(&space, graph, &Flags::default(), 0);
        let changes = explanation.changes.into_iter().map(|change| (change.field, change.path));
        changes.collect::<Vec<_>>()
    };
    std::fs::write(&y, "newer").unwrap();
    assert_eq!(changes(&before), [("params.deep[0].files".to_owned(), Some(y.clone()))]);
    std::fs::write(&z, "newer").unwrap();
    let both = [("params.deep[0].files".to_owned(), Some(y.clone())), ("params.one".to_owned(), Some(z.clone()))];
    assert_eq!(changes(&before), both);
    std::fs::write(&y, "old").unwrap();
    std::fs::write(&z, "old").unwrap();
    // The same files in another order are other content.
    std::fs::write(&y, "other").unwrap();
    complete(&space, &before, 2.0);
    assert_eq!(changes(&graph(&[("a", params(&[&y, &x]), &[])])), [("params.deep[0].files".to_owned(), None)]);
}

#[test]
fn a_pending_stage_shows_what_is_known_and_what_it_waits_for() {
    let space = TestSpace::new();
    complete(&space, &chain(1, 1, 1), 1.0);
    let explanation = explained(&space, &chain(2, 1, 7), &Flags::default(), 2);
    let text = explanation.to_string();
    assert_eq!((explanation.action, explanation.key), ("pending", None));
    assert!(text.contains("params.n: 1 -> 7"), "{text}");
    assert!(text.contains("input `in` (from `b`): known after `a`"), "{text}");
    assert!(!text.contains("inputs.in:"), "{text}");
    assert!(text.contains("because of a: run: ") && text.contains("params.n: 1 -> 2"), "{text}");
}

#[test]
fn the_nearest_record_is_of_the_same_stage_with_the_fewest_differences_and_the_latest() {
    let space = TestSpace::new();
    complete(&space, &chain(1, 1, 1), 1.0);
    complete(&space, &chain(2, 1, 1), 2.0);
    // Prefers a record of the same stage, although a record of another stage differs less.
    let mut g = chain(3, 1, 1);
    g.instances[0].params = json!({ "n": 3, "m": 0 });
    let explanation = explained(&space, &g, &Flags::default(), 0);
    let against = explanation.against.unwrap();
    assert_eq!((against.stage.to_string().as_str(), against.run.as_str()), ("a", "run-2"));
    let fields: Vec<_> =
        explanation.changes.iter().map(|c| (c.field.as_str(), c.old.as_deref(), c.new.as_deref())).collect();
    assert_eq!(fields, [("params.m", None, Some("0")), ("params.n", Some("2"), Some("3"))]);
}

#[test]
fn a_stage_without_earlier_records_says_so_and_a_reused_or_forced_one_names_its_record() {
    let space = TestSpace::new();
    let first = explained(&space, &chain(1, 1, 1), &Flags::default(), 0);
    assert!(first.against.is_none() && first.to_string().contains("no earlier record"));
    complete(&space, &chain(1, 1, 1), 1.0);
    let reused = explained(&space, &chain(1, 1, 1), &Flags::default(), 0);
    assert_eq!((reused.action, reused.changes.len()), ("reuse", 0));
    assert!(reused.to_string().contains("made by a in run run-1"));
    let forced = explained(&space, &chain(1, 1, 1), &force(&["a"]), 0);
    assert_eq!((forced.action, forced.reason.as_str()), ("run", "forced"));
}

#[test]
fn a_new_version_of_a_kind_is_a_difference() {
    let space = TestSpace::new();
    complete(&space, &chain(1, 1, 1), 1.0);
    let newer = crate::kind::Registry::default().kind(super::Work::<4>);
    let plan = plan(&chain(1, 1, 1), &newer, &space.store, &Flags::default()).unwrap();
    let explanation = explain(&chain(1, 1, 1), &newer, &space.store, &plan, 0).unwrap();
    assert!(explanation.to_string().contains("version: 3 -> 4"), "{explanation}");
}
