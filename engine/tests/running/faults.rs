//! Kills and disk errors at every step at which a process changes a file (`engine/src/disk.rs`).
//!
//! `TEMPER_STRIDE=1` tries every step where these tests otherwise try one of several.

use std::collections::BTreeSet;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU64, Ordering};

use engine::error::Result;
use engine::gc::{KeptRuns, collect, pipeline_roots};
use engine::names::{Digest, Key};
use engine::store::{ActionRecord, Pin, PinnedResult, Presence, Store, verify};

use crate::cluster_space::Cluster;
use crate::fake::{Behaviour, registry};
use crate::space::{RunRequest, Stage, TestSpace, graph, processes_below, stage, wait_for};

pub const TESTS: &[(&str, fn())] = &[
    ("a_run_killed_at_any_step_loses_nothing", a_run_killed_at_any_step_loses_nothing),
    ("a_repair_killed_at_any_step_loses_nothing", a_repair_killed_at_any_step_loses_nothing),
    ("a_job_killed_at_any_step_loses_nothing", a_job_killed_at_any_step_loses_nothing),
    ("a_disk_that_fails_at_any_step_loses_nothing", a_disk_that_fails_at_any_step_loses_nothing),
    ("a_collection_that_fails_at_any_step_loses_nothing", a_collection_that_fails_at_any_step_loses_nothing),
];

/// Bytes of a step in the log of steps.
const STEP_BYTES: u64 = 96;

/// Runs a subcommand of this program in a process in which step `at` fails; returns whether there was such a step, its name,
/// and the output.
fn with_fault(space: &TestSpace, command: &str, at: u64, how: &str) -> (bool, String, Output) {
    let log = space.dir.path().join("steps");
    let _ = std::fs::remove_file(&log);
    let output = Command::new(std::env::current_exe().unwrap())
        .arg(command)
        .arg(space.write_request())
        .env("TEMPER_FAULT", format!("{}:{at}:{how}", log.display()))
        .output()
        .unwrap();
    let steps = std::fs::read_to_string(&log).unwrap_or_default();
    let name = steps.lines().nth(at as usize).unwrap_or("nothing").trim_end().to_owned();
    (steps.len() as u64 > at * STEP_BYTES, format!("{how} at step {at} ({name})"), output)
}

/// The keys of all records, each of which must be readable.
fn recorded(store: &Store) -> BTreeSet<Key> {
    let records = store.actions().unwrap();
    assert_eq!(
        records.len(),
        std::fs::read_dir(store.root().join("actions")).unwrap().flatten().filter(is_record).count()
    );
    records.into_iter().map(|record| record.key).collect()
}

fn is_record(entry: &std::fs::DirEntry) -> bool {
    entry.path().extension().is_some_and(|extension| extension == "json")
}

/// Fails each step, or one of `stride`, until there are no more, and returns the number of steps. `fail` fails one, and says
/// whether there was such a step.
fn walk(stride: u64, fail: impl Fn(u64) -> bool + Sync) -> u64 {
    let stride = std::env::var("TEMPER_STRIDE").map_or(stride, |stride| stride.parse().unwrap());
    let (next, end) = (AtomicU64::new(0), AtomicU64::new(u64::MAX));
    let work = || {
        loop {
            let at = next.fetch_add(stride, Ordering::Relaxed);
            if at >= end.load(Ordering::Relaxed) {
                break;
            }
            if !fail(at) {
                end.fetch_min(at, Ordering::Relaxed);
            }
        }
    };
    // Most of the time is spent waiting for the disk.
    std::thread::scope(|scope| (0..4).for_each(|_| drop(scope.spawn(work))));
    let steps = end.into_inner();
    println!("  {} of {steps} steps failed", steps / stride);
    steps
}

/// Runs in a new store that `prepare` makes, with a fault. Afterwards the store must be whole, and a run must give the digests
/// of a run without faults without doing finished work again.
fn fail_run(prepare: impl Fn() -> TestSpace, expected: &[Option<Digest>], at: u64, how: &str) -> bool {
    let space = prepare();
    // Before the first run there is no store, and asking would make one.
    let (before, damaged) = match space.request.store.exists() {
        true => (recorded(&space.store()), verify(&space.store()).unwrap().damaged),
        false => (BTreeSet::new(), Vec::new()),
    };
    let (happened, fault, output) = with_fault(&space, "orchestrate", at, how);
    let told = format!("{fault}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    // No code: it was killed. 3: the attempt was, or a disk failed.
    assert!(matches!(output.status.code(), None | Some(0 | 3)), "{told}");
    if space.request.cluster.is_none() {
        wait_for(|| processes_below(space.dir.path()).is_empty().then_some(()));
    }

    let store = space.store();
    let report = verify(&store).unwrap();
    let is_new = report.damaged.iter().any(|file| !damaged.contains(file));
    assert!(!is_new && report.damaged_blobs.is_empty() && report.broken_records.is_empty(), "{told}\n{report:?}");
    let records = store.actions().unwrap();
    let is_whole = |record: &&ActionRecord| store.presence(&record.digest).unwrap() == Presence::Intact;
    let finished: BTreeSet<String> =
        records.iter().filter(is_whole).map(|record| record.provenance.stage.to_string()).collect();
    let (keys, first) = (recorded(&store), before.is_empty());
    assert!(before.is_subset(&keys), "{told}\na record is lost");
    assert!(!first || finished.len() == keys.len(), "{told}\na record without its artifact");

    let again = space.run();
    assert_eq!((again.outcome.exit_code(), again.outcome.digests.as_slice()), (0, expected), "{told}");
    let repeated: Vec<&str> = again.ran.split(' ').filter(|stage| finished.contains(*stage)).collect();
    // With earlier records a stage may have finished with other parameters.
    assert!(!first || repeated.is_empty(), "{told}\n{repeated:?} ran again");
    assert!(verify(&space.store()).unwrap().is_intact(), "{told}");
    happened
}

/// Fails one of `stride` steps of a run.
fn walk_run(prepare: impl Fn() -> TestSpace + Sync, how: &str, stride: u64) {
    let expected = prepare().run().outcome.digests;
    let steps = walk(stride, |at| fail_run(&prepare, &expected, at, how));
    assert!(steps >= 60, "only {steps} steps");
}

fn pipeline() -> Vec<Stage> {
    vec![stage("_a", &[]), stage("b", &["_a"]).does(Behaviour::Checkpoint(2))]
}

fn new_store() -> TestSpace {
    let mut space = TestSpace::new(&pipeline());
    space.request.jobs = 1;
    space
}

/// A store in which `_a` is damaged, and a pipeline whose `b` must read it.
fn damaged_store() -> TestSpace {
    let mut space = new_store();
    let made = space.run().outcome.digests[0].unwrap();
    let text = space.store().artifact_folder(&made).join("text");
    std::fs::remove_file(&text).unwrap();
    std::fs::write(&text, "damaged").unwrap();
    space.change(stage("b", &["_a"]).with(|p| p.text = "new".into()));
    space
}

fn a_run_killed_at_any_step_loses_nothing() {
    walk_run(new_store, "kill", 1);
}

fn a_repair_killed_at_any_step_loses_nothing() {
    walk_run(damaged_store, "kill", 5);
}

fn a_job_killed_at_any_step_loses_nothing() {
    let with_jobs = || {
        let mut space = new_store();
        space.request.cluster = Some(Cluster::background());
        space
    };
    walk_run(with_jobs, "kill", 24);
}

fn a_disk_that_fails_at_any_step_loses_nothing() {
    for how in ["eio", "full"] {
        walk_run(new_store, how, 2);
        walk_run(damaged_store, how, 7);
    }
}

/// Pins the first stage, collects what neither the pipeline nor the pin keeps, and removes the pin.
pub fn pin_and_collect(request: &RunRequest) -> Result<u8> {
    let store = Store::open(&request.store)?;
    let graph = graph(&request.stages);
    let roots = pipeline_roots("p".into(), &graph, &registry(), &store)?;
    let record = store.actions()?.into_iter().min_by_key(|record| record.provenance.stage.to_string());
    let record = record.expect("the store has results");
    let result = PinnedResult { stage: "a".into(), key: record.key, digest: record.digest };
    store.pin(&Pin { name: "kept".into(), pipeline: "p".into(), at: 0.0, results: vec![result] })?;
    collect(&store, &KeptRuns { newest: Some(0), days: None }, &[roots], || {})?;
    store.unpin("kept")?;
    Ok(0)
}

/// A store with results that nothing keeps.
fn store_with_garbage() -> TestSpace {
    let mut space = new_store();
    space.run();
    space.change(stage("b", &["_a"]).with(|p| p.text = "new".into()));
    space.run();
    space
}

fn a_collection_that_fails_at_any_step_loses_nothing() {
    let undisturbed = store_with_garbage();
    pin_and_collect(&undisturbed.request).unwrap();
    let (artifacts, work) = (undisturbed.count("artifacts"), undisturbed.count("work"));
    for how in ["kill", "eio", "full"] {
        let steps = walk(2, |at| {
            let space = store_with_garbage();
            let (happened, fault, output) = with_fault(&space, "collect", at, how);
            let told = format!("{fault}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
            assert!(matches!(output.status.code(), None | Some(0 | 3)), "{told}");
            let store = space.store();
            assert!(store.pins().is_ok() && verify(&store).unwrap().is_intact(), "{told}");
            assert_eq!(space.run().ran, "", "{told}\na result that the pipeline uses is lost");
            // A program that another thread of this test starts has a copy of each lock until it executes, and what is locked
            // is kept: collect again.
            wait_for(|| {
                pin_and_collect(&space.request).unwrap_or_else(|e| panic!("{told}\n{e}"));
                ((space.count("artifacts"), space.count("work")) == (artifacts, work)).then_some(())
            });
            happened
        });
        assert!(steps >= 12, "only {steps} steps");
    }
}
