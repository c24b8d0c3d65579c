//! Runs that share a remote store, a folder.

use std::fs;
use std::path::PathBuf;

use engine::journal::Event;
use engine::store::Presence;

use crate::fake::Behaviour;
use crate::space::{RunResult, Stage, TestSpace, stage};

pub const TESTS: &[(&str, fn())] = &[
    ("what_one_store_made_another_reuses", what_one_store_made_another_reuses),
    ("only_what_changed_runs_and_its_inputs_are_fetched", only_what_changed_runs_and_its_inputs_are_fetched),
    (
        "a_stage_whose_inputs_are_made_again_still_finds_the_remote",
        a_stage_whose_inputs_are_made_again_still_finds_the_remote,
    ),
    (
        "what_the_remote_cannot_give_is_made_here_and_repairs_it",
        what_the_remote_cannot_give_is_made_here_and_repairs_it,
    ),
    ("a_result_that_differs_stays_on_both_sides", a_result_that_differs_stays_on_both_sides),
    (
        "an_artifact_that_is_lost_here_comes_back_from_the_remote",
        an_artifact_that_is_lost_here_comes_back_from_the_remote,
    ),
    ("a_failed_run_has_uploaded_what_it_made", a_failed_run_has_uploaded_what_it_made),
];

/// Only `c` is a target.
fn chain() -> Vec<Stage> {
    vec![stage("_a", &[]), stage("_b", &["_a"]), stage("c", &["_b"])]
}

/// A space with a remote store.
fn space(stages: &[Stage]) -> TestSpace {
    let mut space = TestSpace::new(stages);
    let remote = space.dir.path().join("remote");
    fs::create_dir(&remote).unwrap();
    space.request.remote = Some(remote);
    space
}

/// Goes on with a new, empty store.
fn elsewhere(space: &mut TestSpace, store: &str) {
    space.request.store = space.dir.path().join(store);
}

fn warnings(result: &RunResult) -> Vec<String> {
    let warning = |event: &Event| match event {
        Event::Warning { message, .. } => Some(message.clone()),
        _ => None,
    };
    result.events.iter().filter_map(warning).collect()
}

fn moved(result: &RunResult, uploads: bool) -> Option<(u64, u64)> {
    result.events.iter().find_map(|event| match event {
        Event::Transferred { upload, records, files, .. } if *upload == uploads => Some((*records, *files)),
        _ => None,
    })
}

/// The files below a folder of the remote.
fn remote_files(space: &TestSpace, folder: &str) -> Vec<PathBuf> {
    let root = space.request.remote.clone().unwrap().join(folder);
    let (mut files, mut folders) = (Vec::new(), vec![root]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap().flatten() {
            if entry.path().is_dir() { folders.push(entry.path()) } else { files.push(entry.path()) }
        }
    }
    files
}

fn what_one_store_made_another_reuses() {
    let mut space = space(&chain());
    let first = space.run();
    // Each artifact has two files: `text` and `metrics.json`. The remote also has a manifest for each.
    assert_eq!((first.ran.as_str(), moved(&first, true)), ("_a _b c", Some((3, 6))));
    assert_eq!(remote_files(&space, "blobs").len(), 9);
    elsewhere(&mut space, "second");
    let second = space.run();
    assert_eq!((second.ran.as_str(), second.reused.as_str()), ("", "_a _b c"));
    assert_eq!(moved(&second, false), Some((3, 3)));
    assert_eq!(second.outcome.digests, first.outcome.digests);
    assert_eq!((space.text(&second.outcome.digests[2].unwrap()), space.attempt_log().len()), ("c_b_a".into(), 3));
    assert_eq!(warnings(&second), [""; 0]);
    assert!(engine::store::verify(&space.store()).unwrap().is_intact());
    // From now on it needs no remote.
    space.request.remote = None;
    assert_eq!(space.run().ran, "");
}

fn only_what_changed_runs_and_its_inputs_are_fetched() {
    let mut space = space(&chain());
    space.run();
    elsewhere(&mut space, "second");
    space.change(stage("c", &["_b"]).with(|p| p.text = "other".into()));
    let second = space.run();
    assert_eq!((second.ran.as_str(), second.reused.as_str()), ("c", "_a _b"));
    assert_eq!(space.text(&second.outcome.digests[2].unwrap()), "other_b_a");
    assert_eq!(moved(&second, true), Some((1, 2)));
}

fn a_stage_whose_inputs_are_made_again_still_finds_the_remote() {
    let mut space = space(&[stage("_a", &[]), stage("_b", &["_a"]).with(|p| p.take = Some(1)), stage("c", &["_b"])]);
    space.run();
    elsewhere(&mut space, "second");
    // `_a` gives other bytes, `_b` the same as before; so `c` is known to the remote once `_b` has run.
    space.change(stage("_a", &[]).with(|p| p.text = "_another".into()));
    let second = space.run();
    assert_eq!((second.ran.as_str(), second.reused.as_str()), ("_a _b", "c"));
    let c = second.outcome.digests[2].unwrap();
    assert_eq!((space.text(&c), warnings(&second)), ("c_b_".into(), vec![]));
}

fn what_the_remote_cannot_give_is_made_here_and_repairs_it() {
    type Damage = fn(&TestSpace);
    let cases: [(&str, Damage); 4] = [
        ("wrong bytes", |space| {
            remote_files(space, "blobs").iter().for_each(|path| fs::write(path, "spoilt").unwrap())
        }),
        ("no bytes", |space| remote_files(space, "blobs").iter().for_each(|path| fs::remove_file(path).unwrap())),
        ("no records", |space| remote_files(space, "records").iter().for_each(|path| fs::remove_file(path).unwrap())),
        ("wrong records", |space| remote_files(space, "records").iter().for_each(|path| fs::write(path, "x").unwrap())),
    ];
    for (what, damage) in cases {
        let mut space = space(&chain());
        let first = space.run();
        damage(&space);
        elsewhere(&mut space, "second");
        let second = space.run();
        assert_eq!((second.failed.as_str(), second.outcome.exit_code()), ("", 0), "{what}");
        assert_eq!(second.outcome.digests, first.outcome.digests, "{what}");
        assert!(space.attempt_log().len() > 3 && !warnings(&second).is_empty(), "{what}");
        assert_eq!(space.store().presence(&second.outcome.digests[2].unwrap()).unwrap(), Presence::Intact, "{what}");
        assert!(engine::store::verify(&space.store()).unwrap().is_intact(), "{what}");
        elsewhere(&mut space, "third");
        let third = space.run();
        if what == "wrong records" {
            assert!(
                warnings(&second).iter().any(|w| w.contains("delete it from the remote")),
                "{:?}",
                warnings(&second)
            );
        } else {
            assert_eq!((third.ran.as_str(), warnings(&third)), ("", vec![]), "{what}");
        }
    }
}

fn a_result_that_differs_stays_on_both_sides() {
    let mut space = space(&[stage("a", &[]).does(Behaviour::VaryDeclared)]);
    let first = space.run();
    let remote = space.request.remote.take();
    elsewhere(&mut space, "second");
    let second = space.run();
    assert_ne!(first.outcome.digests, second.outcome.digests);
    space.request.remote = remote;
    space.request.force = vec!["a".into()];
    let third = space.run();
    assert_eq!(third.ran, "a");
    assert!(warnings(&third).iter().any(|w| w.contains("another result of the same recipe")), "{:?}", warnings(&third));
    space.request.force.clear();
    elsewhere(&mut space, "third");
    assert_eq!(space.run().outcome.digests, first.outcome.digests);
}

fn an_artifact_that_is_lost_here_comes_back_from_the_remote() {
    let space = space(&chain());
    let first = space.run();
    let c = first.outcome.digests[2].unwrap();
    for damage in ["lost", "damaged"] {
        let folder = space.store().artifact_folder(&c);
        if damage == "lost" {
            fs::remove_dir_all(&folder).unwrap();
        } else {
            fs::remove_file(folder.join("text")).unwrap();
            fs::write(folder.join("text"), "damaged").unwrap();
        }
        let again = space.run();
        assert_eq!((again.ran.as_str(), again.reused.as_str()), ("", "_a _b c"), "{damage}");
        assert_eq!(space.text(&c), "c_b_a", "{damage}");
    }
}

fn a_failed_run_has_uploaded_what_it_made() {
    let mut space = space(&[stage("a", &[]), stage("b", &["a"]).does(Behaviour::Fail)]);
    let first = space.run();
    assert_eq!((first.ran.as_str(), first.failed.as_str(), moved(&first, true)), ("a", "b", Some((1, 2))));
    elsewhere(&mut space, "second");
    assert_eq!(space.run().reused, "a");
}
