use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use super::*;
use crate::artifact::Manifest;
use crate::journal::{Event, Journal};
use crate::names::{Digest, Key};
use crate::store::tests::{Anything, TestSpace, instance, record};
use crate::store::{Lease, Pin, PinnedResult, Presence};

/// Large enough that every file takes whole blocks.
fn bytes(n: u8) -> Vec<u8> {
    vec![n; 40_000]
}

/// Commits an artifact with these files, and discards the output, as the runner does.
fn commit(space: &TestSpace, files: &[(&str, &[u8])]) -> (Digest, Manifest) {
    let out = space.out(files);
    let committed = space.store.commit(&out, &Anything).unwrap();
    fs::remove_dir_all(out).unwrap();
    committed
}

/// An artifact with these files, and a record that names it as the result of `stage`, made by `run`.
fn result(space: &TestSpace, n: u64, stage: &str, run: &str, files: &[(&str, &[u8])]) -> (Key, Digest) {
    let (digest, _) = commit(space, files);
    let mut record = record(n, digest);
    record.provenance.stage = instance(stage);
    record.provenance.run = run.into();
    space.store.record(&record).unwrap();
    (record.key, digest)
}

fn reused(stage: &str, (key, digest): (Key, Digest)) -> Event {
    Event::StageReused { stage: stage.into(), key, digest, cutoff: false }
}

/// A run that has these events.
fn run(space: &TestSpace, events: &[Event]) -> Journal {
    let mut journal = Journal::create(&space.store.runs()).unwrap();
    events.iter().for_each(|event| journal.write(event).unwrap());
    journal
}

fn names(survey: &Survey) -> Vec<String> {
    let deleted = survey.artifacts.iter().filter(|artifact| artifact.kept_by.is_empty());
    let mut names: Vec<String> =
        deleted.map(|artifact| artifact.stages.iter().cloned().collect::<Vec<_>>().join("+")).collect();
    names.sort();
    names
}

fn is_there(space: &TestSpace, digest: &Digest) -> bool {
    space.store.presence(digest).unwrap() == Presence::Intact
}

/// Bytes on disk of blobs and artifacts, each file once, as `du` counts them.
fn disk(space: &TestSpace) -> u64 {
    let mut seen = BTreeMap::new();
    for folder in ["artifacts", "blobs", "work"] {
        survey::walk(&space.store.root().join(folder), &mut |_, file| {
            seen.insert((file.device, file.inode), file.allocated);
        })
        .unwrap();
    }
    seen.values().sum()
}

#[test]
fn what_a_run_a_pin_or_a_pipeline_uses_is_kept_and_the_rest_is_deleted() {
    let space = TestSpace::new();
    let shared = bytes(0);
    let old = result(&space, 1, "a", "r", &[("shared", &shared), ("own", &bytes(1))]);
    let new = result(&space, 2, "a", "r", &[("shared", &shared), ("own", &bytes(2))]);
    let pinned = result(&space, 3, "b[x]", "r", &[("own", &bytes(3))]);
    let current = result(&space, 4, "c", "r", &[("own", &bytes(4))]);
    let twins = [5, 6].map(|n| result(&space, n, "d", "r", &[("same", &bytes(5)), ("n", &[n as u8])]));
    let (unrecorded, _) = commit(&space, &[("own", &bytes(7))]);
    drop(run(&space, &[reused("a", old)]));
    drop(run(&space, &[reused("a", new)]));
    let result = PinnedResult { stage: "b[x]".into(), key: pinned.0, digest: pinned.1 };
    space.store.pin(&Pin { name: "best".into(), pipeline: "p".into(), at: 0.0, results: vec![result] }).unwrap();
    let mut pipeline = PipelineRoots { name: "p.yaml".into(), ..PipelineRoots::default() };
    pipeline.digests.insert(current.1);

    let all = survey(&space.store, &KeptRuns::default(), &[]).unwrap();
    assert_eq!(names(&all), ["", "c", "d", "d"]);
    let newest = KeptRuns { newest: Some(1), days: None };
    let found = survey(&space.store, &newest, &[pipeline.clone()]).unwrap();
    assert_eq!(names(&found), ["", "a", "d", "d"]);
    let of = |digest: &Digest| found.artifacts.iter().find(|artifact| artifact.digest == *digest).unwrap();
    assert_eq!(of(&pinned.1).kept_by, [Keeper::Pin("best".into())].into());
    assert_eq!(of(&current.1).kept_by, [Keeper::Pipeline("p.yaml".into())].into());
    // The shared file stays; that of the twins is freed once.
    assert!(of(&old.1).freed < of(&old.1).bytes && of(&old.1).freed >= 40_000);
    assert_eq!(twins.iter().filter(|(_, digest)| of(digest).freed >= 40_000).count(), 1);

    let before = disk(&space);
    let deleted = collect(&space.store, &newest, &[pipeline.clone()], || ()).unwrap();
    assert_eq!(deleted, found);
    assert_eq!(before - disk(&space), found.freed());
    assert!([new, pinned, current].iter().all(|(_, digest)| is_there(&space, digest)));
    assert!([old, twins[0], twins[1]].iter().all(|(_, digest)| !is_there(&space, digest)));
    assert!(!is_there(&space, &unrecorded));
    // The records say how to make the results again.
    assert_eq!(space.store.recorded_digest(&old.0).unwrap(), Some(old.1));
    let again = collect(&space.store, &newest, &[pipeline], || ()).unwrap();
    assert_eq!((names(&again), again.freed()), (Vec::new(), 0));
    assert!(crate::store::verify(&space.store).unwrap().is_intact());
    assert_eq!(result_again(&space), old.1);
}

/// Makes the first artifact of the test above again, from blobs of which one was deleted.
fn result_again(space: &TestSpace) -> Digest {
    let (digest, _) = commit(space, &[("shared", &bytes(0)), ("own", &bytes(1))]);
    assert!(is_there(space, &digest));
    digest
}

#[test]
fn what_a_running_pipeline_uses_or_may_use_is_kept() {
    let space = TestSpace::new();
    let planned = result(&space, 1, "a", "old", &[("own", &bytes(1))]);
    let perhaps = result(&space, 2, "c", "old", &[("own", &bytes(2))]);
    let other = result(&space, 3, "d", "old", &[("own", &bytes(3))]);
    let again = result(&space, 6, "f", "old", &[("own", &bytes(6))]);
    // The clock of the file system ticks every few milliseconds.
    std::thread::sleep(std::time::Duration::from_millis(20));
    let stage = |stage: &str, action: &str, key: Option<Key>| {
        serde_json::from_value(serde_json::json!({
            "stage": stage, "kind": "k", "action": action, "reason": "", "key": key
        }))
        .unwrap()
    };
    let stages = vec![stage("a", "reuse", Some(planned.0)), stage("c", "pending", None)];
    let mut running = run(&space, &[Event::Planned { stages }]);
    fs::write(running.folder().join("graph.json"), "{}").unwrap();
    // Just recorded, and just committed but not recorded yet.
    let recorded = result(&space, 4, "e", running.id(), &[("own", &bytes(4))]);
    let (committed, _) = commit(&space, &[("own", &bytes(5))]);
    // Made again with the same bytes, from another recipe that has no record yet.
    assert_eq!(commit(&space, &[("own", &bytes(6))]).0, again.1);

    let none = KeptRuns { newest: Some(0), days: None };
    let found = collect(&space.store, &none, &[], || ()).unwrap();
    assert_eq!(names(&found), ["d"]);
    assert!([planned.1, perhaps.1, recorded.1, committed, again.1].iter().all(|digest| is_there(&space, digest)));
    assert!(!is_there(&space, &other.1));

    // Once it has ended, only what it names counts, and only if the run is kept.
    running.write(&reused("c", perhaps)).unwrap();
    drop(running);
    assert_eq!(names(&survey(&space.store, &KeptRuns::default(), &[]).unwrap()), ["", "a", "e", "f"]);
    assert_eq!(names(&survey(&space.store, &none, &[]).unwrap()), ["", "a", "c", "e", "f"]);
}

#[test]
fn a_collection_waits_for_those_that_plan_and_commit() {
    let space = TestSpace::new();
    commit(&space, &[("own", &bytes(1))]);
    let guard = space.store.hold_off_collection().unwrap();
    std::thread::scope(|scope| {
        let (told, waits) = std::sync::mpsc::channel();
        let other = space.reopen();
        let collection = scope.spawn(move || collect(&other, &KeptRuns::default(), &[], || told.send(()).unwrap()));
        waits.recv().unwrap();
        // Others may still plan meanwhile.
        let (late, _) = commit(&space, &[("own", &bytes(2))]);
        assert!(is_there(&space, &late) && !collection.is_finished());
        drop(guard);
        assert_eq!(collection.join().unwrap().unwrap().artifacts.len(), 2);
    });
}

#[test]
fn attempts_of_finished_keys_go_and_checkpoints_of_unfinished_ones_stay_while_a_run_names_them() {
    let space = TestSpace::new();
    let (finished, _) = result(&space, 1, "a", "r", &[("own", b"x")]);
    let [open, busy] = ["open", "busy"].map(|name| Key::of(name.as_bytes()));
    let file = |key: &Key| -> PathBuf {
        let path = space.store.checkpoints(key).unwrap().join("weights");
        fs::write(&path, bytes(1)).unwrap();
        path
    };
    let files = [finished, open, busy].map(|key| file(&key));
    let started =
        |key| Event::StageStarted { stage: "b".into(), key, threads: 1, attempt: "1".into(), log: PathBuf::new() };
    drop(run(&space, &[started(open)]));
    let lock = space.store.try_lock(&busy).unwrap();
    let found = collect(&space.store, &KeptRuns::default(), &[], || ()).unwrap();
    let deleted: Vec<_> = found.work.iter().filter(|work| !work.kept).map(|work| work.stage.as_deref()).collect();
    assert_eq!(deleted, [Some("a")]);
    assert_eq!(files.each_ref().map(|path| path.exists()), [false, true, true]);
    drop(lock);
    let none = KeptRuns { newest: Some(0), days: None };
    let found = collect(&space.store, &none, &[], || ()).unwrap();
    assert!(found.work.iter().any(|work| work.stage.as_deref() == Some("b") && !work.finished));
    assert_eq!(files.map(|path| path.exists()), [false; 3]);
}

#[test]
fn leftovers_of_crashes_are_deleted_and_paid_answers_never() {
    let space = TestSpace::new();
    let root = space.store.root();
    fs::create_dir_all(root.join("artifacts/.new-1/x")).unwrap();
    fs::create_dir_all(root.join("blobs/ab")).unwrap();
    fs::write(root.join("blobs/ab/.new-2"), bytes(1)).unwrap();
    fs::create_dir_all(root.join("requests/x")).unwrap();
    fs::write(root.join("requests/x/answers"), bytes(2)).unwrap();
    let found = collect(&space.store, &KeptRuns { newest: Some(0), days: Some(0.0) }, &[], || ()).unwrap();
    assert_eq!(found.leftovers.len(), 2);
    assert!(found.leftovers.iter().all(|path| !path.exists()));
    assert!(found.requests_bytes >= 40_000 && root.join("requests/x/answers").exists());
}

#[test]
fn an_unreadable_pin_stops_a_collection_before_anything_is_deleted() {
    let space = TestSpace::new();
    let (digest, _) = commit(&space, &[("own", b"x")]);
    fs::create_dir(space.store.root().join("pins")).unwrap();
    fs::write(space.store.root().join("pins/x.json"), "{").unwrap();
    assert!(collect(&space.store, &KeptRuns::default(), &[], || ()).unwrap_err().message.contains("pins/x.json"));
    assert!(is_there(&space, &digest));
}

#[test]
fn what_a_job_without_an_orchestrator_uses_is_kept() {
    let space = TestSpace::new();
    let input = result(&space, 1, "a", "r", &[("own", &bytes(1))]);
    let journal = run(&space, &[reused("a", input)]);
    let id = journal.folder().file_name().unwrap().to_str().unwrap().to_owned();
    drop(journal);
    let key = result(&space, 2, "b", "r", &[("own", &bytes(2))]).0;
    let checkpoints = space.store.checkpoints(&key).unwrap();
    fs::write(checkpoints.join("one"), bytes(3)).unwrap();
    let nothing = KeptRuns { newest: Some(0), days: None };
    let lease = Lease {
        attempt: "1".into(),
        stage: "b".into(),
        run: id,
        host: "login".into(),
        executor: "slurm".into(),
        job: Some("7".into()),
        submitted: 0,
        log: "log".into(),
        input_stats: BTreeMap::new(),
        unlisted_files: Vec::new(),
    };
    space.store.write_lease(&key, &lease).unwrap();
    collect(&space.store, &nothing, &[], || ()).unwrap();
    assert!(is_there(&space, &input.1) && checkpoints.join("one").exists());
    space.store.remove_lease(&key).unwrap();
    collect(&space.store, &nothing, &[], || ()).unwrap();
    assert!(!is_there(&space, &input.1) && !checkpoints.exists());
}

#[test]
fn verify_finds_no_damage_in_what_collections_delete_and_commits_bring_back() {
    let space = TestSpace::new();
    let files: Vec<_> = (0..20).map(|n| (format!("{n}"), bytes(n))).collect();
    let files: Vec<_> = files.iter().map(|(name, bytes)| (name.as_str(), bytes.as_slice())).collect();
    let done = std::sync::atomic::AtomicBool::new(false);
    let order = std::sync::atomic::Ordering::Relaxed;
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let other = TestSpace { folder: tempfile::tempdir().unwrap(), store: space.reopen() };
            for n in 0..60 {
                commit(&other, &files[n % 7..]);
                collect(&other.store, &KeptRuns::default(), &[], || ()).unwrap();
            }
            done.store(true, order);
        });
        while !done.load(order) {
            let found = crate::store::verify(&space.store).unwrap();
            assert!(found.is_intact(), "{found:?}");
        }
    });
}
