//! Invariants of runs.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use engine::error::Blame;
use engine::journal::{self, Event};
use rustix::process::{Pid, Signal, kill_process};

use crate::cluster_space::Cluster;
use crate::fake::Behaviour;
use crate::space::{RunResult, Stage, TestSpace, events, is_alive, processes_below, stage, wait_for};

macro_rules! tests {
    ($($name:ident)*) => {
        pub const TESTS: &[(&str, fn())] = &[$((stringify!($name), $name)),*];
    };
}

tests! {
    a_chain_runs_once_and_then_never_again
    early_cutoff_reuses_what_lies_downstream
    with_keep_going_a_failure_cancels_what_depends_on_it_only
    without_keep_going_nothing_new_starts_after_a_failure
    a_failure_names_its_stage_its_last_lines_and_its_log
    a_panic_in_a_kind_is_an_internal_error_and_does_not_hang
    an_output_without_its_files_fails
    a_killed_attempt_leaves_no_artifact
    a_killed_orchestrator_kills_its_attempts_and_a_rerun_gives_the_same_digests
    ctrl_c_kills_the_attempts_and_exits_130
    two_runs_at_once_run_each_stage_once
    equal_recipes_under_two_names_run_once
    a_stage_that_writes_to_its_input_fails
    a_stage_that_adds_a_file_to_its_input_fails_and_later_ones_are_unaffected
    a_confined_stage_can_change_nothing_but_its_own_folders
    a_damaged_input_is_quarantined_and_produced_again_in_the_same_run
    a_lost_artifact_is_produced_again_when_its_bytes_are_needed
    a_lost_paid_artifact_is_paid_again_only_on_request
    another_digest_for_the_same_key_is_an_internal_error
    a_kind_declared_nondeterministic_may_give_another_digest
    a_forced_stage_that_produces_the_same_bytes_reruns_nothing_else
    transient_failures_are_tried_three_times
    output_that_looks_like_the_protocol_is_ignored
    secrets_appear_in_no_output_and_no_file
    an_attempt_sees_only_what_it_declares
    one_stage_alone_gets_all_threads_and_several_share_them
    threads_that_become_free_go_to_the_attempts_that_still_run
    processes_started_by_an_attempt_end_with_it
    every_process_ends_with_its_orchestrator_however_that_ends
    no_process_is_left_whenever_an_orchestrator_is_killed
    a_closed_terminal_ends_a_run_unless_it_runs_under_nohup
    duplicates_found_while_running_are_an_error
    a_fan_out_of_300_finishes
    a_chain_of_200_finishes
}

fn kill(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

fn warnings(result: &RunResult) -> Vec<String> {
    let warning = |event: &Event| match event {
        Event::Warning { message, .. } => Some(message.clone()),
        _ => None,
    };
    result.events.iter().filter_map(warning).collect()
}

fn chain() -> Vec<Stage> {
    vec![stage("a", &[]), stage("b", &["a"]), stage("c", &["b"])]
}

fn a_chain_runs_once_and_then_never_again() {
    let space = TestSpace::new(&chain());
    let first = space.run();
    assert_eq!((first.ran.as_str(), first.outcome.exit_code()), ("a b c", 0));
    assert_eq!(space.text(&first.outcome.digests[2].unwrap()), "cba");
    let second = space.run();
    assert_eq!((second.ran.as_str(), second.reused.as_str()), ("", "a b c"));
    assert_eq!(second.outcome.digests, first.outcome.digests);
    assert_eq!(space.attempt_log().len(), 3);

    let written: Vec<Event> =
        journal::read(&second.outcome.folder).unwrap().into_iter().map(|line| line.event).collect();
    assert_eq!(written, second.events);
    assert!(second.outcome.folder.join("graph.json").exists());
    assert!(matches!(written.last(), Some(Event::Finished { ran, reused, .. }) if ran.is_empty() && reused.len() == 3));
}

fn early_cutoff_reuses_what_lies_downstream() {
    let mut space = TestSpace::new(&chain());
    space.change(stage("b", &["a"]).with(|p| p.take = Some(1)));
    let first = space.run();
    // `a` produces other bytes, `b` takes only the first of them and produces the same as before.
    space.change(stage("a", &[]).with(|p| p.text = "another".into()));
    let second = space.run();
    assert_eq!((second.ran.as_str(), second.reused.as_str()), ("a b", "c"));
    assert_eq!(first.outcome.digests[1..], second.outcome.digests[1..]);
    let cutoff = |e: &Event| matches!(e, Event::StageReused { stage, cutoff: true, .. } if stage == "c");
    assert!(second.events.iter().any(cutoff));
}

/// `bad` fails; `after` needs it, `late` needs `slow`, which is independent of `bad`.
fn one_bad_branch() -> Vec<Stage> {
    vec![
        // Late enough that `slow` has started.
        stage("bad", &[]).does(Behaviour::Fail).with(|p| p.sleep_ms = 300),
        stage("slow", &[]).with(|p| p.sleep_ms = 900),
        stage("after", &["bad", "slow"]),
        stage("last", &["after"]),
        stage("late", &["slow"]),
    ]
}

fn with_keep_going_a_failure_cancels_what_depends_on_it_only() {
    let mut space = TestSpace::new(&one_bad_branch());
    space.request.keep_going = true;
    let result = space.run();
    assert_eq!(
        (result.ran.as_str(), result.failed.as_str(), result.skipped.as_str()),
        ("slow late", "bad", "after last")
    );
    assert_eq!(result.outcome.exit_code(), 2);
    let because = |event: &Event| match event {
        Event::StageSkipped { stage, because } => Some((stage.clone(), because.clone())),
        _ => None,
    };
    let skipped: BTreeMap<_, _> = result.events.iter().filter_map(because).collect();
    assert_eq!(skipped, [("after", "bad"), ("last", "bad")].map(|(s, b)| (s.into(), Some(b.into()))).into());
}

fn without_keep_going_nothing_new_starts_after_a_failure() {
    let result = TestSpace::new(&one_bad_branch()).run();
    assert_eq!(
        (result.ran.as_str(), result.failed.as_str(), result.skipped.as_str()),
        ("slow", "bad", "after last late")
    );
}

fn a_failure_names_its_stage_its_last_lines_and_its_log() {
    let space = TestSpace::new(&[stage("bad", &[]).does(Behaviour::Fail)]);
    let result = space.run();
    let shown = result.outcome.failed[0].to_string();
    let log = result.outcome.failed[0].log.clone().unwrap();
    assert!(shown.starts_with("bad: fails as requested\n"), "{shown}");
    assert!(shown.contains("bad at work") && shown.ends_with(&format!("log: {}", log.display())), "{shown}");
    assert!(log.exists());
}

fn a_panic_in_a_kind_is_an_internal_error_and_does_not_hang() {
    let result = TestSpace::new(&[stage("bad", &[]).does(Behaviour::Panic), stage("after", &["bad"])]).run();
    assert_eq!((result.failed.as_str(), result.skipped.as_str(), result.outcome.exit_code()), ("bad", "after", 4));
    assert!(result.outcome.failed[0].error.message.contains("panics as requested"));
}

fn an_output_without_its_files_fails() {
    let space = TestSpace::new(&[stage("bad", &[]).does(Behaviour::WriteNothing)]);
    assert_eq!(space.run().failed, "bad");
    assert_eq!((space.count("artifacts"), space.count("actions")), (0, 0));
}

fn a_killed_attempt_leaves_no_artifact() {
    let space = TestSpace::new(&[stage("a", &[]).with(|p| p.sleep_ms = 60_000)]);
    let result = std::thread::scope(|scope| {
        let run = scope.spawn(|| space.run());
        kill(space.pid_of("a"), Signal::KILL);
        run.join().unwrap()
    });
    assert_eq!((result.failed.as_str(), result.outcome.failed[0].error.blame), ("a", Blame::Environment));
    assert_eq!((space.count("artifacts"), space.count("actions"), space.count("blobs")), (0, 0, 0));
}

fn a_killed_orchestrator_kills_its_attempts_and_a_rerun_gives_the_same_digests() {
    let stages = [stage("a", &[]), stage("b", &["a"]).with(|p| p.sleep_ms = 300), stage("c", &["b"])];
    let undisturbed = TestSpace::new(&stages);
    // Keys depend on the attempt log's path, digests do not.
    let expected = undisturbed.run().outcome.digests;
    for wait in ["a", "b", "c"] {
        let space = TestSpace::new(&stages);
        let (mut orchestrator, _events) = space.start();
        let attempt = space.pid_of(wait);
        orchestrator.kill().unwrap();
        orchestrator.wait().unwrap();
        wait_for(|| (!is_alive(attempt)).then_some(()));
        let again = space.run();
        assert_eq!(again.outcome.digests, expected, "killed at {wait}");
        assert_eq!(again.outcome.exit_code(), 0);
        assert!(engine::store::verify(&space.store()).unwrap().is_intact());
    }
}

fn ctrl_c_kills_the_attempts_and_exits_130() {
    let stages = [stage("a", &[]).with(|p| p.sleep_ms = 60_000), stage("b", &["a"])];
    let space = TestSpace::new(&stages);
    let (mut orchestrator, lines) = space.start();
    let attempt = space.pid_of("a");
    kill(orchestrator.id() as i32, Signal::INT);
    assert_eq!(orchestrator.wait().unwrap().code(), Some(130));
    assert!(!is_alive(attempt));
    let events = events(lines);
    assert!(matches!(events.last(), Some(Event::Finished { interrupted: true, skipped, .. }) if skipped.len() == 2));
}

fn two_runs_at_once_run_each_stage_once() {
    let mut stages = vec![stage("root", &[]).with(|p| p.sleep_ms = 200)];
    stages.extend((0..6).map(|i| stage(&format!("leaf{i}"), &["root"]).with(|p| p.sleep_ms = 100)));
    let space = TestSpace::new(&stages);
    let runs = [space.start(), space.start()].map(|(mut orchestrator, lines)| {
        let events = std::thread::spawn(move || events(lines));
        (orchestrator.wait().unwrap().code(), events)
    });
    let mut waited = false;
    for (code, listener) in runs {
        assert_eq!(code, Some(0));
        let events = listener.join().unwrap();
        waited |= events.iter().any(|e| matches!(e, Event::Waiting { holder, .. } if holder.contains("of run")));
        let Some(Event::Finished { ran, reused, .. }) = events.last() else { panic!("no end") };
        assert_eq!(ran.len() + reused.len(), 7);
    }
    assert!(waited);
    let mut ran: Vec<String> = space.attempt_log().into_iter().map(|(stage, _)| stage).collect();
    ran.sort();
    assert_eq!(ran, ["leaf0", "leaf1", "leaf2", "leaf3", "leaf4", "leaf5", "root"]);
}

fn equal_recipes_under_two_names_run_once() {
    let same = |name: &str| {
        stage(name, &[]).with(|p| {
            p.text = "same".into();
            p.sleep_ms = 200;
        })
    };
    let space = TestSpace::new(&[same("a"), same("b"), stage("c", &["a", "b"])]);
    let result = space.run();
    assert_eq!((result.outcome.ran.len(), result.outcome.reused.len(), result.outcome.exit_code()), (2, 1, 0));
    assert_eq!(space.attempt_log().iter().filter(|(text, _)| text == "same").count(), 1);
    let held = |e: &Event| matches!(e, Event::Waiting { holder, .. } if holder.contains("of this run"));
    assert!(result.events.iter().any(held));
}

fn a_stage_that_writes_to_its_input_fails() {
    let mut space = TestSpace::new(&[stage("a", &[]), stage("bad", &["a"]).does(Behaviour::ChangeInput)]);
    let result = space.run();
    assert_eq!((result.ran.as_str(), result.failed.as_str(), result.outcome.exit_code()), ("a", "bad", 2));
    assert!(result.outcome.failed[0].error.message.contains("wrote to its input a"), "{}", result.outcome.failed[0]);
    // The damaged input is never read again.
    space.change(stage("bad", &["a"]));
    let again = space.run();
    assert_eq!((again.ran.as_str(), again.outcome.exit_code()), ("a bad", 0));
    assert_eq!(space.text(&again.outcome.digests[1].unwrap()), "bada");
}

fn a_stage_that_adds_a_file_to_its_input_fails_and_later_ones_are_unaffected() {
    let mut space = TestSpace::new(&[stage("a", &[]), stage("bad", &["a"]).does(Behaviour::AddToInput)]);
    assert_eq!(space.run().failed, "bad");
    space.change(stage("bad", &["a"]));
    assert_eq!(space.run().ran, "bad");
}

/// Here as a child process and as a job of a batch system.
fn a_confined_stage_can_change_nothing_but_its_own_folders() {
    if !engine::attempt::can_confine() {
        println!("  not tested: this kernel has no Landlock");
        return;
    }
    for cluster in [None, Some(Cluster::background())] {
        for does in [Behaviour::ChangeInput, Behaviour::AddToInput] {
            let mut space = TestSpace::new(&[stage("a", &[]), stage("bad", &["a"]).does(does)]);
            (space.request.confine, space.request.cluster) = (true, cluster.clone());
            std::fs::write(space.dir.path().join("attempts"), "").unwrap();
            let result = space.run();
            assert_eq!((result.ran.as_str(), result.failed.as_str()), ("a", "bad"));
            let error = &result.outcome.failed[0].error;
            assert!(error.message.contains("Permission denied"), "{error}");
            assert!(error.help.as_ref().is_some_and(|help| help.contains("its own folders")), "{error}");
            assert!(engine::store::verify(&space.store()).unwrap().is_intact());
            assert_eq!(space.text(&result.outcome.digests[0].unwrap()), "a");
        }
    }
}

/// A store in which the artifact of `_b` has been damaged by `damage_artifact`, and a run in which `c` has to read it.
fn run_after_damage(damage_artifact: impl Fn(&std::path::Path)) -> (TestSpace, RunResult) {
    let mut space = TestSpace::new(&[stage("_a", &[]), stage("_b", &["_a"]), stage("c", &["_b"])]);
    let first = space.run();
    damage_artifact(&space.store().artifact_folder(&first.outcome.digests[1].unwrap()));
    // The key of `c` is unknown until the key of `_b` is; only the attempt of `c` needs the bytes.
    space.change(stage("c", &["_b"]).with(|p| p.text = "new".into()));
    let result = space.run();
    (space, result)
}

fn a_damaged_input_is_quarantined_and_produced_again_in_the_same_run() {
    // Found at planning, since the bytes are known to be needed.
    let damage = |folder: &std::path::Path| {
        let text = folder.join("text");
        std::fs::remove_file(&text).unwrap();
        std::fs::write(&text, "damaged").unwrap();
    };
    let (space, result) = run_after_damage(damage);
    assert_eq!((result.ran.as_str(), result.outcome.exit_code()), ("_b c", 0));
    assert_eq!(space.text(&result.outcome.digests[2].unwrap()), "new_b_a");
    assert_ne!(space.count("quarantine"), 0);

    // Found while running: `c` is pending until `a` has run, `side` is reused by its record alone.
    let stages = [stage("_a", &[]), stage("_side", &[]), stage("_b", &["_a"]), stage("c", &["_b", "_side"])];
    let mut space = TestSpace::new(&stages);
    let first = space.run();
    damage(&space.store().artifact_folder(&first.outcome.digests[1].unwrap()));
    space.change(stage("_a", &[]).with(|p| p.text = "other".into()));
    let result = space.run();
    assert_eq!((result.ran.as_str(), result.outcome.exit_code()), ("_a _side _b c", 0));
    assert_eq!(space.text(&result.outcome.digests[3].unwrap()), "c_bother_side");
    assert!(warnings(&result).iter().any(|w| w.contains("_side was damaged") && w.contains("quarantine")));
    assert_eq!(
        space.attempt_log().iter().filter(|(stage, _)| stage == "c").count(),
        2,
        "it never read the damaged input"
    );
}

fn a_lost_artifact_is_produced_again_when_its_bytes_are_needed() {
    let (space, result) = run_after_damage(|folder| std::fs::remove_dir_all(folder).unwrap());
    assert_eq!((result.ran.as_str(), result.outcome.exit_code()), ("_b c", 0));
    assert_eq!(space.text(&result.outcome.digests[2].unwrap()), "new_b_a");
}

fn a_lost_paid_artifact_is_paid_again_only_on_request() {
    let mut space = TestSpace::new(&[stage("a", &[]).does(Behaviour::Pay), stage("b", &["a"])]);
    let first = space.run();
    assert_eq!(first.outcome.exit_code(), 0, "the first time no permission is needed");
    space.request.force = vec!["a".into()];
    assert_eq!(space.run().outcome.exit_code(), 0, "nor for a forced stage");
    space.request.force = vec![];
    std::fs::remove_dir_all(space.store().artifact_folder(&first.outcome.digests[0].unwrap())).unwrap();
    let result = space.run();
    assert_eq!((result.failed.as_str(), result.outcome.exit_code()), ("a", 3));
    space.request.pay = true;
    let result = space.run();
    assert_eq!((result.ran.as_str(), result.outcome.exit_code()), ("a", 0));
}

fn another_digest_for_the_same_key_is_an_internal_error() {
    let mut space = TestSpace::new(&[stage("a", &[]).does(Behaviour::Vary), stage("b", &["a"])]);
    let first = space.run();
    space.request.force = vec!["a".into()];
    let result = space.run();
    assert_eq!((result.failed.as_str(), result.skipped.as_str(), result.outcome.exit_code()), ("a", "b", 4));
    space.request.force = vec![];
    assert_eq!(space.run().outcome.digests, first.outcome.digests, "the first stays");
}

fn a_kind_declared_nondeterministic_may_give_another_digest() {
    let mut space = TestSpace::new(&[stage("a", &[]).does(Behaviour::VaryDeclared), stage("b", &["a"])]);
    let first = space.run();
    space.request.force = vec!["a".into()];
    let result = space.run();
    assert_eq!((result.ran.as_str(), result.outcome.exit_code()), ("a b", 0));
    assert_ne!(first.outcome.digests, result.outcome.digests);
}

fn a_forced_stage_that_produces_the_same_bytes_reruns_nothing_else() {
    let mut space = TestSpace::new(&chain());
    space.run();
    space.request.force = vec!["b".into()];
    let result = space.run();
    assert_eq!((result.ran.as_str(), result.reused.as_str()), ("b", "a c"));
}

fn transient_failures_are_tried_three_times() {
    let result = TestSpace::new(&[stage("a", &[]).does(Behaviour::FailTransiently(2))]).run();
    assert_eq!((result.ran.as_str(), result.outcome.exit_code()), ("a", 0));
    let retries = result.events.iter().filter(|e| matches!(e, Event::Retrying { .. })).count();
    assert_eq!(retries, 2);
    let result = TestSpace::new(&[stage("a", &[]).does(Behaviour::FailTransiently(3))]).run();
    assert_eq!((result.failed.as_str(), result.outcome.exit_code()), ("a", 3));
}

fn output_that_looks_like_the_protocol_is_ignored() {
    let result = TestSpace::new(&[stage("a", &[]).does(Behaviour::PrintProtocol)]).run();
    assert_eq!((result.ran.as_str(), result.outcome.exit_code()), ("a", 0));
}

fn secrets_appear_in_no_output_and_no_file() {
    let mut space = TestSpace::new(&[stage("a", &[]).does(Behaviour::LeakSecrets)]);
    space.request.jobs = 1;
    let result = run_with_secrets(&space);
    let shown = result.concat();
    assert!(shown.contains("the secret is [redacted] and [redacted]") && !shown.contains("hush"), "{shown}");
    assert!(shown.contains(r#""command":["text=[redacted]"]"#), "{shown}");
    let mut folders = vec![space.request.store.clone()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.is_dir() {
                true => folders.push(path),
                false => assert!(!String::from_utf8_lossy(&std::fs::read(&path).unwrap()).contains("hush")),
            }
        }
    }
}

fn an_attempt_sees_only_what_it_declares() {
    let space = TestSpace::new(&[stage("a", &[]).does(Behaviour::ShowEnvironment)]);
    run_with_secrets(&space);
    let text = space.text(&space.run().outcome.digests[0].unwrap());
    let names: Vec<&str> = text.lines().collect();
    assert!(names.contains(&"FAKE_OPEN") && names.contains(&"RAYON_NUM_THREADS"), "{names:?}");
    assert!(!names.contains(&"UNDECLARED"), "{names:?}");
    // The choice of a GPU is passed to attempts on a GPU.
    assert!(names.contains(&"CUDA_VISIBLE_DEVICES"), "{names:?}");
}

/// Runs in a process whose environment contains a secret; returns its output lines.
fn run_with_secrets(space: &TestSpace) -> Vec<String> {
    let file = space.dir.path().join("request");
    std::fs::write(&file, serde_json::to_vec(&space.request).unwrap()).unwrap();
    // Outside the store.
    let secret = space.dir.path().join("secret");
    std::fs::write(&secret, "hush again\n").unwrap();
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.env("FAKE_SECRET_FILE", secret);
    command.arg("orchestrate").arg(file).envs([
        ("FAKE_SECRET", "hush-hush"),
        ("FAKE_OPEN", "1"),
        ("UNDECLARED", "1"),
        ("FAKE_DEVICE", "cuda"),
        ("CUDA_VISIBLE_DEVICES", "1"),
    ]);
    String::from_utf8(command.output().unwrap().stdout).unwrap().lines().map(str::to_owned).collect()
}

fn one_stage_alone_gets_all_threads_and_several_share_them() {
    let wide = |name: &str, needs: &[&str]| stage(name, needs).does(Behaviour::Parallel);
    let mut space = TestSpace::new(&[wide("a", &[]), wide("b", &["a"]), wide("c", &["a"]), stage("d", &["b", "c"])]);
    space.request.jobs = 4;
    let started = |event: Event| match event {
        Event::StageStarted { threads, .. } => Some(threads),
        _ => None,
    };
    assert_eq!(space.run().events.into_iter().filter_map(started).collect::<Vec<_>>(), [4, 2, 2, 1]);
}

/// It would wait forever for threads that it does not get.
fn threads_that_become_free_go_to_the_attempts_that_still_run() {
    let wide = |name: &str, threads| stage(name, &[]).does(Behaviour::AwaitThreads(threads));
    let mut space = TestSpace::new(&[stage("short", &[]), wide("long", 2), wide("longer", 4)]);
    space.request.jobs = 4;
    assert_eq!(space.run().outcome.exit_code(), 0);
}

fn processes_started_by_an_attempt_end_with_it() {
    let result = TestSpace::new(&[stage("a", &[]).does(Behaviour::LeaveOrphan)]).run();
    let orphan: i32 = warnings(&result)[0].strip_prefix("orphan ").unwrap().parse().unwrap();
    wait_for(|| (!is_alive(orphan)).then_some(()));
}

/// The processes that a stage started, once it has started them.
fn started_processes(space: &TestSpace) -> Vec<i32> {
    let file = space.dir.path().join("pids.all");
    let text = wait_for(|| std::fs::read_to_string(&file).ok());
    std::fs::remove_file(file).unwrap();
    text.lines().map(|line| line.parse().unwrap()).collect()
}

fn every_process_ends_with_its_orchestrator_however_that_ends() {
    for signal in [Signal::KILL, Signal::HUP, Signal::QUIT, Signal::TERM, Signal::INT, Signal::ABORT] {
        let space = TestSpace::new(&[stage("a", &[]).does(Behaviour::StartProcesses { forever: true })]);
        let (mut orchestrator, _events) = space.start();
        let pids = started_processes(&space);
        assert_eq!(pids.len(), 4);
        kill(orchestrator.id() as i32, signal);
        orchestrator.wait().unwrap();
        let attempt = space.pid_of("a");
        wait_for(|| (!pids.iter().any(|pid| is_alive(*pid)) && !is_alive(attempt)).then_some(()));
    }
    // Kill only the attempt; then let an attempt end that leaves daemons behind.
    let space = TestSpace::new(&[stage("a", &[]).does(Behaviour::StartProcesses { forever: true })]);
    let (mut orchestrator, _events) = space.start();
    let pids = started_processes(&space);
    kill(space.pid_of("a"), Signal::KILL);
    assert_eq!(orchestrator.wait().unwrap().code(), Some(3));
    assert!(!pids.iter().any(|pid| is_alive(*pid)));
    let space = TestSpace::new(&[stage("a", &[]).does(Behaviour::StartProcesses { forever: false })]);
    assert_eq!(space.run().outcome.exit_code(), 0);
    assert!(!started_processes(&space).iter().any(|pid| is_alive(*pid)));
}

/// Kills an orchestrator while it starts processes that it must not leave behind; `TEMPER_KILLS` sets the number of
/// kills.
fn no_process_is_left_whenever_an_orchestrator_is_killed() {
    let kills = std::env::var("TEMPER_KILLS").map_or(10, |count| count.parse().unwrap());
    let signals = [Signal::KILL, Signal::HUP, Signal::QUIT, Signal::TERM, Signal::INT];
    let mut slowest = Duration::ZERO;
    for n in 0..kills {
        let space = TestSpace::new(&[stage("a", &[]).does(Behaviour::StartProcesses { forever: true })]);
        let (mut orchestrator, _events) = space.start();
        std::thread::sleep(Duration::from_millis(n * 37 % 200));
        kill(orchestrator.id() as i32, signals[n as usize % signals.len()]);
        orchestrator.wait().unwrap();
        let killed = Instant::now();
        wait_for(|| processes_below(space.dir.path()).is_empty().then_some(()));
        slowest = slowest.max(killed.elapsed());
    }
    println!("  {kills} kills; nothing left after {:.0} ms at most", slowest.as_secs_f64() * 1e3);
}

fn a_closed_terminal_ends_a_run_unless_it_runs_under_nohup() {
    let stages = [stage("a", &[]).with(|p| p.sleep_ms = 400)];
    let space = TestSpace::new(&stages);
    let (mut orchestrator, _events) = space.start();
    space.pid_of("a");
    kill(orchestrator.id() as i32, Signal::HUP);
    assert_eq!(orchestrator.wait().unwrap().code(), Some(130));
    let space = TestSpace::new(&stages);
    let (mut orchestrator, _events) = space.start_through(&["sh", "-c", "trap '' HUP; exec \"$0\" \"$@\""]);
    space.pid_of("a");
    kill(orchestrator.id() as i32, Signal::HUP);
    assert_eq!(orchestrator.wait().unwrap().code(), Some(0));
}

fn duplicates_found_while_running_are_an_error() {
    // Two members that differ only in their inputs, which turn out to be equal.
    let pick = |name: &str, text: &str| stage(name, &[]).with(|p| p.text = text.into());
    let cut = |name: &str, from: &str| {
        stage(name, &[from]).with(|p| {
            p.text = "cut".into();
            p.take = Some(1);
        })
    };
    let member = |name: &str, from: &str| stage(name, &[from]).with(|p| p.text = "member".into());
    let stages = [
        pick("x", "1a"),
        pick("y", "1b"),
        cut("cutx", "x"),
        cut("cuty", "y"),
        member("m/1", "cutx"),
        member("m/2", "cuty"),
    ];
    let refused = |result: RunResult| {
        assert_eq!((result.outcome.failed.len(), result.outcome.exit_code()), (1, 2));
        assert!(result.outcome.failed[0].error.message.contains("same recipe"));
    };
    refused(TestSpace::new(&stages).run());
    // The same if an earlier run made the first one.
    let [x, _, cut_x, _, member_x, _] = stages.clone();
    let mut space = TestSpace::new(&[x, cut_x, member_x]);
    space.run();
    space.request.stages = stages.to_vec();
    space.set_attempt_log();
    refused(space.run());
}

fn a_fan_out_of_300_finishes() {
    let mut stages = vec![stage("root", &[])];
    stages.extend((0..300).map(|i| stage(&format!("leaf{i}"), &["root"])));
    let names: Vec<String> = stages.iter().map(|s| s.name.clone()).collect();
    stages.push(stage("end", &names.iter().map(String::as_str).collect::<Vec<_>>()));
    let result = TestSpace::new(&stages).run();
    assert_eq!(result.outcome.ran.len(), 302);
    println!("  {:.1} ms a stage", result.outcome.seconds * 1000.0 / 302.0);
}

fn a_chain_of_200_finishes() {
    let names: Vec<String> = (0..200).map(|i| format!("s{i}")).collect();
    let stages = names.iter().enumerate().map(|(i, name)| match i {
        0 => stage(name, &[]),
        _ => stage(name, &[&names[i - 1]]).with(|p| p.take = Some(3)),
    });
    let stages: Vec<Stage> = stages.collect();
    let space = TestSpace::new(&stages);
    let result = space.run();
    assert_eq!(result.outcome.ran.len(), 200);
    println!("  {:.1} ms a stage", result.outcome.seconds * 1000.0 / 200.0);
    let again = space.run();
    assert_eq!(again.outcome.reused.len(), 200);
    println!("  {:.1} ms to do nothing", again.outcome.seconds * 1000.0);
    assert_eq!(again.plan.stages.len(), 200);
}
