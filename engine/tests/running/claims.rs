//! Invariants of runs.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use engine::error::Blame;
use engine::journal::{self, Event};
use rustix::process::{Pid, Signal, kill_process};

use crate::fake::Deed;
use crate::space::{Seen, Space, Stage, at_work_below, events, lives, stage, until};

macro_rules! claims {
    ($($name:ident)*) => {
        pub const ALL: &[(&str, fn())] = &[$((stringify!($name), $name)),*];
    };
}

claims! {
    a_chain_runs_once_and_then_never_again
    early_cutoff_stops_the_wave
    with_keep_going_a_failure_cancels_what_depends_on_it_only
    without_keep_going_nothing_new_starts_after_a_failure
    a_failure_names_its_stage_its_last_lines_and_its_log
    a_panic_in_a_kind_is_our_fault_and_does_not_hang
    an_output_of_the_wrong_shape_fails
    a_killed_attempt_leaves_no_artifact
    a_killed_orchestrator_takes_its_attempts_along_and_a_rerun_gives_the_same
    ctrl_c_kills_the_attempts_and_exits_130
    two_runs_at_once_run_each_stage_once
    equal_recipes_under_two_names_run_once
    a_stage_that_writes_to_its_input_fails
    a_stage_that_litters_its_input_fails_and_others_may_go_on
    a_damaged_input_is_quarantined_and_made_again_in_the_same_run
    a_lost_artifact_is_made_again_when_its_bytes_are_needed
    what_was_paid_for_and_is_lost_is_paid_again_only_on_request
    another_digest_for_the_same_key_is_our_bug
    a_kind_that_owns_up_to_varying_may_be_forced
    a_forced_stage_that_gives_the_same_bytes_reruns_nothing_else
    transient_failures_are_tried_three_times
    stray_prints_do_not_disturb
    secrets_are_kept_nowhere
    an_attempt_sees_only_what_it_declares
    one_stage_alone_gets_all_threads_and_several_share_them
    what_an_attempt_started_ends_with_it
    every_process_ends_with_its_orchestrator_however_that_ends
    no_process_is_left_whenever_an_orchestrator_is_killed
    a_closed_terminal_ends_a_run_unless_it_runs_under_nohup
    twins_found_while_running_are_an_error
    a_fan_out_of_300_finishes
    a_chain_of_200_finishes
}

fn kill(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

fn warnings(seen: &Seen) -> Vec<String> {
    let warning = |event: &Event| match event {
        Event::Warning { message, .. } => Some(message.clone()),
        _ => None,
    };
    seen.events.iter().filter_map(warning).collect()
}

fn chain() -> Vec<Stage> {
    vec![stage("a", &[]), stage("b", &["a"]), stage("c", &["b"])]
}

fn a_chain_runs_once_and_then_never_again() {
    let space = Space::new(&chain());
    let first = space.run();
    assert_eq!((first.ran.as_str(), first.outcome.exit_code()), ("a b c", 0));
    assert_eq!(space.text(&first.outcome.digests[2].unwrap()), "cba");
    let second = space.run();
    assert_eq!((second.ran.as_str(), second.reused.as_str()), ("", "a b c"));
    assert_eq!(second.outcome.digests, first.outcome.digests);
    assert_eq!(space.diary().len(), 3);

    let written: Vec<Event> =
        journal::read(&second.outcome.folder).unwrap().into_iter().map(|line| line.event).collect();
    assert_eq!(written, second.events);
    assert!(second.outcome.folder.join("graph.json").exists());
    assert!(matches!(written.last(), Some(Event::Finished { ran, reused, .. }) if ran.is_empty() && reused.len() == 3));
}

fn early_cutoff_stops_the_wave() {
    let mut space = Space::new(&chain());
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
        stage("bad", &[]).does(Deed::Fail).with(|p| p.sleep_ms = 300),
        stage("slow", &[]).with(|p| p.sleep_ms = 900),
        stage("after", &["bad", "slow"]),
        stage("last", &["after"]),
        stage("late", &["slow"]),
    ]
}

fn with_keep_going_a_failure_cancels_what_depends_on_it_only() {
    let mut space = Space::new(&one_bad_branch());
    space.orders.keep_going = true;
    let seen = space.run();
    assert_eq!((seen.ran.as_str(), seen.failed.as_str(), seen.skipped.as_str()), ("slow late", "bad", "after last"));
    assert_eq!(seen.outcome.exit_code(), 2);
    let because = |event: &Event| match event {
        Event::StageSkipped { stage, because } => Some((stage.clone(), because.clone())),
        _ => None,
    };
    let skipped: BTreeMap<_, _> = seen.events.iter().filter_map(because).collect();
    assert_eq!(skipped, [("after", "bad"), ("last", "bad")].map(|(s, b)| (s.into(), Some(b.into()))).into());
}

fn without_keep_going_nothing_new_starts_after_a_failure() {
    let seen = Space::new(&one_bad_branch()).run();
    assert_eq!((seen.ran.as_str(), seen.failed.as_str(), seen.skipped.as_str()), ("slow", "bad", "after last late"));
}

fn a_failure_names_its_stage_its_last_lines_and_its_log() {
    let space = Space::new(&[stage("bad", &[]).does(Deed::Fail)]);
    let seen = space.run();
    let shown = seen.outcome.failed[0].to_string();
    let log = seen.outcome.failed[0].log.clone().unwrap();
    assert!(shown.starts_with("bad: told to fail\n"), "{shown}");
    assert!(shown.contains("bad at work") && shown.ends_with(&format!("log: {}", log.display())), "{shown}");
    assert!(log.exists());
}

fn a_panic_in_a_kind_is_our_fault_and_does_not_hang() {
    let seen = Space::new(&[stage("bad", &[]).does(Deed::Panic), stage("after", &["bad"])]).run();
    assert_eq!((seen.failed.as_str(), seen.skipped.as_str(), seen.outcome.exit_code()), ("bad", "after", 4));
    assert!(seen.outcome.failed[0].error.message.contains("told to panic"));
}

fn an_output_of_the_wrong_shape_fails() {
    let space = Space::new(&[stage("bad", &[]).does(Deed::GiveNothing)]);
    assert_eq!(space.run().failed, "bad");
    assert_eq!((space.count("artifacts"), space.count("actions")), (0, 0));
}

fn a_killed_attempt_leaves_no_artifact() {
    let space = Space::new(&[stage("a", &[]).with(|p| p.sleep_ms = 60_000)]);
    let seen = std::thread::scope(|scope| {
        let run = scope.spawn(|| space.run());
        kill(space.pid_of("a"), Signal::KILL);
        run.join().unwrap()
    });
    assert_eq!((seen.failed.as_str(), seen.outcome.failed[0].error.blame), ("a", Blame::Surroundings));
    assert_eq!((space.count("artifacts"), space.count("actions"), space.count("blobs")), (0, 0, 0));
}

fn a_killed_orchestrator_takes_its_attempts_along_and_a_rerun_gives_the_same() {
    let stages = [stage("a", &[]), stage("b", &["a"]).with(|p| p.sleep_ms = 300), stage("c", &["b"])];
    let undisturbed = Space::new(&stages);
    // Keys depend on the diary's path, digests do not.
    let expected = undisturbed.run().outcome.digests;
    for wait in ["a", "b", "c"] {
        let space = Space::new(&stages);
        let (mut orchestrator, _events) = space.start();
        let attempt = space.pid_of(wait);
        orchestrator.kill().unwrap();
        orchestrator.wait().unwrap();
        until(|| (!lives(attempt)).then_some(()));
        let again = space.run();
        assert_eq!(again.outcome.digests, expected, "killed at {wait}");
        assert_eq!(again.outcome.exit_code(), 0);
        assert!(engine::store::verify(&space.store()).unwrap().is_sound());
    }
}

fn ctrl_c_kills_the_attempts_and_exits_130() {
    let stages = [stage("a", &[]).with(|p| p.sleep_ms = 60_000), stage("b", &["a"])];
    let space = Space::new(&stages);
    let (mut orchestrator, lines) = space.start();
    let attempt = space.pid_of("a");
    kill(orchestrator.id() as i32, Signal::INT);
    assert_eq!(orchestrator.wait().unwrap().code(), Some(130));
    assert!(!lives(attempt));
    let events = events(lines);
    assert!(matches!(events.last(), Some(Event::Finished { interrupted: true, skipped, .. }) if skipped.len() == 2));
}

fn two_runs_at_once_run_each_stage_once() {
    let mut stages = vec![stage("root", &[]).with(|p| p.sleep_ms = 200)];
    stages.extend((0..6).map(|i| stage(&format!("leaf{i}"), &["root"]).with(|p| p.sleep_ms = 100)));
    let space = Space::new(&stages);
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
    let mut ran: Vec<String> = space.diary().into_iter().map(|(stage, _)| stage).collect();
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
    let space = Space::new(&[same("a"), same("b"), stage("c", &["a", "b"])]);
    let seen = space.run();
    assert_eq!((seen.outcome.ran.len(), seen.outcome.reused.len(), seen.outcome.exit_code()), (2, 1, 0));
    assert_eq!(space.diary().iter().filter(|(text, _)| text == "same").count(), 1);
    let held = |e: &Event| matches!(e, Event::Waiting { holder, .. } if holder.contains("of this run"));
    assert!(seen.events.iter().any(held));
}

fn a_stage_that_writes_to_its_input_fails() {
    let mut space = Space::new(&[stage("a", &[]), stage("bad", &["a"]).does(Deed::SpoilInput)]);
    let seen = space.run();
    assert_eq!((seen.ran.as_str(), seen.failed.as_str(), seen.outcome.exit_code()), ("a", "bad", 2));
    assert!(seen.outcome.failed[0].error.message.contains("wrote to its input a"), "{}", seen.outcome.failed[0]);
    // The damaged input is never read again.
    space.change(stage("bad", &["a"]));
    let again = space.run();
    assert_eq!((again.ran.as_str(), again.outcome.exit_code()), ("a bad", 0));
    assert_eq!(space.text(&again.outcome.digests[1].unwrap()), "bada");
}

fn a_stage_that_litters_its_input_fails_and_others_may_go_on() {
    let mut space = Space::new(&[stage("a", &[]), stage("bad", &["a"]).does(Deed::LitterInput)]);
    assert_eq!(space.run().failed, "bad");
    space.change(stage("bad", &["a"]));
    assert_eq!(space.run().ran, "bad");
}

/// A store in which the artifact of `_b` has been damaged by `spoil`, and a run in which `c` has to read it.
fn spoilt(spoil: impl Fn(&std::path::Path)) -> (Space, Seen) {
    let mut space = Space::new(&[stage("_a", &[]), stage("_b", &["_a"]), stage("c", &["_b"])]);
    let first = space.run();
    spoil(&space.store().artifact_folder(&first.outcome.digests[1].unwrap()));
    // The key of `c` is unknown until the key of `_b` is; only the attempt of `c` needs the bytes.
    space.change(stage("c", &["_b"]).with(|p| p.text = "new".into()));
    let seen = space.run();
    (space, seen)
}

fn a_damaged_input_is_quarantined_and_made_again_in_the_same_run() {
    // Found at planning, since the bytes are known to be needed.
    let damage = |folder: &std::path::Path| {
        let text = folder.join("text");
        std::fs::remove_file(&text).unwrap();
        std::fs::write(&text, "rot").unwrap();
    };
    let (space, seen) = spoilt(damage);
    assert_eq!((seen.ran.as_str(), seen.outcome.exit_code()), ("_b c", 0));
    assert_eq!(space.text(&seen.outcome.digests[2].unwrap()), "new_b_a");
    assert_ne!(space.count("quarantine"), 0);

    // Found while running: `c` is pending until `a` has run, `side` is reused by its record alone.
    let stages = [stage("_a", &[]), stage("_side", &[]), stage("_b", &["_a"]), stage("c", &["_b", "_side"])];
    let mut space = Space::new(&stages);
    let first = space.run();
    damage(&space.store().artifact_folder(&first.outcome.digests[1].unwrap()));
    space.change(stage("_a", &[]).with(|p| p.text = "other".into()));
    let seen = space.run();
    assert_eq!((seen.ran.as_str(), seen.outcome.exit_code()), ("_a _side _b c", 0));
    assert_eq!(space.text(&seen.outcome.digests[3].unwrap()), "c_bother_side");
    assert!(warnings(&seen).iter().any(|w| w.contains("_side was damaged") && w.contains("quarantine")));
    assert_eq!(space.diary().iter().filter(|(stage, _)| stage == "c").count(), 2, "it never read the damaged input");
}

fn a_lost_artifact_is_made_again_when_its_bytes_are_needed() {
    let (space, seen) = spoilt(|folder| std::fs::remove_dir_all(folder).unwrap());
    assert_eq!((seen.ran.as_str(), seen.outcome.exit_code()), ("_b c", 0));
    assert_eq!(space.text(&seen.outcome.digests[2].unwrap()), "new_b_a");
}

fn what_was_paid_for_and_is_lost_is_paid_again_only_on_request() {
    let mut space = Space::new(&[stage("a", &[]).does(Deed::Pay), stage("b", &["a"])]);
    let first = space.run();
    assert_eq!(first.outcome.exit_code(), 0, "the first time nobody need ask");
    space.orders.force = vec!["a".into()];
    assert_eq!(space.run().outcome.exit_code(), 0, "nor if told to run it");
    space.orders.force = vec![];
    std::fs::remove_dir_all(space.store().artifact_folder(&first.outcome.digests[0].unwrap())).unwrap();
    let seen = space.run();
    assert_eq!((seen.failed.as_str(), seen.outcome.exit_code()), ("a", 3));
    space.orders.pay = true;
    let seen = space.run();
    assert_eq!((seen.ran.as_str(), seen.outcome.exit_code()), ("a", 0));
}

fn another_digest_for_the_same_key_is_our_bug() {
    let mut space = Space::new(&[stage("a", &[]).does(Deed::Vary), stage("b", &["a"])]);
    let first = space.run();
    space.orders.force = vec!["a".into()];
    let seen = space.run();
    assert_eq!((seen.failed.as_str(), seen.skipped.as_str(), seen.outcome.exit_code()), ("a", "b", 4));
    space.orders.force = vec![];
    assert_eq!(space.run().outcome.digests, first.outcome.digests, "the first stays");
}

fn a_kind_that_owns_up_to_varying_may_be_forced() {
    let mut space = Space::new(&[stage("a", &[]).does(Deed::VaryOpenly), stage("b", &["a"])]);
    let first = space.run();
    space.orders.force = vec!["a".into()];
    let seen = space.run();
    assert_eq!((seen.ran.as_str(), seen.outcome.exit_code()), ("a b", 0));
    assert_ne!(first.outcome.digests, seen.outcome.digests);
}

fn a_forced_stage_that_gives_the_same_bytes_reruns_nothing_else() {
    let mut space = Space::new(&chain());
    space.run();
    space.orders.force = vec!["b".into()];
    let seen = space.run();
    assert_eq!((seen.ran.as_str(), seen.reused.as_str()), ("b", "a c"));
}

fn transient_failures_are_tried_three_times() {
    let seen = Space::new(&[stage("a", &[]).does(Deed::FailOften(2))]).run();
    assert_eq!((seen.ran.as_str(), seen.outcome.exit_code()), ("a", 0));
    let retries = seen.events.iter().filter(|e| matches!(e, Event::Retrying { .. })).count();
    assert_eq!(retries, 2);
    let seen = Space::new(&[stage("a", &[]).does(Deed::FailOften(3))]).run();
    assert_eq!((seen.failed.as_str(), seen.outcome.exit_code()), ("a", 3));
}

fn stray_prints_do_not_disturb() {
    let seen = Space::new(&[stage("a", &[]).does(Deed::Babble)]).run();
    assert_eq!((seen.ran.as_str(), seen.outcome.exit_code()), ("a", 0));
}

fn secrets_are_kept_nowhere() {
    let mut space = Space::new(&[stage("a", &[]).does(Deed::Blab)]);
    space.orders.jobs = 1;
    let seen = with_environment(&space);
    let shown = seen.concat();
    assert!(shown.contains("the secret is [redacted] and [redacted]") && !shown.contains("hush"), "{shown}");
    assert!(shown.contains(r#""command":["text=[redacted]"]"#), "{shown}");
    let mut folders = vec![space.orders.store.clone()];
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
    let space = Space::new(&[stage("a", &[]).does(Deed::ShowEnvironment)]);
    with_environment(&space);
    let text = space.text(&space.run().outcome.digests[0].unwrap());
    let names: Vec<&str> = text.lines().collect();
    assert!(names.contains(&"FAKE_OPEN") && names.contains(&"RAYON_NUM_THREADS"), "{names:?}");
    assert!(!names.contains(&"UNDECLARED"), "{names:?}");
}

/// Runs in a process whose environment contains a secret; returns its output lines.
fn with_environment(space: &Space) -> Vec<String> {
    let file = space.dir.path().join("orders");
    std::fs::write(&file, serde_json::to_vec(&space.orders).unwrap()).unwrap();
    // Outside the store.
    let secret = space.dir.path().join("secret");
    std::fs::write(&secret, "hush again\n").unwrap();
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    command.env("FAKE_SECRET_FILE", secret);
    command.arg("orchestrate").arg(file).envs([("FAKE_SECRET", "hush-hush"), ("FAKE_OPEN", "1"), ("UNDECLARED", "1")]);
    String::from_utf8(command.output().unwrap().stdout).unwrap().lines().map(str::to_owned).collect()
}

fn one_stage_alone_gets_all_threads_and_several_share_them() {
    let wide = |name: &str, needs: &[&str]| stage(name, needs).does(Deed::TellThreads);
    let mut space = Space::new(&[wide("a", &[]), wide("b", &["a"]), wide("c", &["a"]), stage("d", &["b", "c"])]);
    space.orders.jobs = 4;
    assert_eq!(warnings(&space.run()), ["threads 4", "threads 2", "threads 2"]);
}

fn what_an_attempt_started_ends_with_it() {
    let seen = Space::new(&[stage("a", &[]).does(Deed::LeaveOrphan)]).run();
    let orphan: i32 = warnings(&seen)[0].strip_prefix("orphan ").unwrap().parse().unwrap();
    until(|| (!lives(orphan)).then_some(()));
}

/// The processes that a stage started, once it has started them.
fn spread(space: &Space) -> Vec<i32> {
    let file = space.dir.path().join("pids.all");
    let text = until(|| std::fs::read_to_string(&file).ok());
    std::fs::remove_file(file).unwrap();
    text.lines().map(|line| line.parse().unwrap()).collect()
}

fn every_process_ends_with_its_orchestrator_however_that_ends() {
    for signal in [Signal::KILL, Signal::HUP, Signal::QUIT, Signal::TERM, Signal::INT, Signal::ABORT] {
        let space = Space::new(&[stage("a", &[]).does(Deed::Spread { for_ever: true })]);
        let (mut orchestrator, _events) = space.start();
        let pids = spread(&space);
        assert_eq!(pids.len(), 4);
        kill(orchestrator.id() as i32, signal);
        orchestrator.wait().unwrap();
        let attempt = space.pid_of("a");
        until(|| (!pids.iter().any(|pid| lives(*pid)) && !lives(attempt)).then_some(()));
    }
    // Kill only the attempt; then let an attempt end that leaves daemons behind.
    let space = Space::new(&[stage("a", &[]).does(Deed::Spread { for_ever: true })]);
    let (mut orchestrator, _events) = space.start();
    let pids = spread(&space);
    kill(space.pid_of("a"), Signal::KILL);
    assert_eq!(orchestrator.wait().unwrap().code(), Some(3));
    assert!(!pids.iter().any(|pid| lives(*pid)));
    let space = Space::new(&[stage("a", &[]).does(Deed::Spread { for_ever: false })]);
    assert_eq!(space.run().outcome.exit_code(), 0);
    assert!(!spread(&space).iter().any(|pid| lives(*pid)));
}

/// Kills an orchestrator while it starts processes that it must not leave behind; `TEMPER_KILLS` sets the number of
/// kills.
fn no_process_is_left_whenever_an_orchestrator_is_killed() {
    let kills = std::env::var("TEMPER_KILLS").map_or(10, |count| count.parse().unwrap());
    let signals = [Signal::KILL, Signal::HUP, Signal::QUIT, Signal::TERM, Signal::INT];
    let mut slowest = Duration::ZERO;
    for n in 0..kills {
        let space = Space::new(&[stage("a", &[]).does(Deed::Spread { for_ever: true })]);
        let (mut orchestrator, _events) = space.start();
        std::thread::sleep(Duration::from_millis(n * 37 % 200));
        kill(orchestrator.id() as i32, signals[n as usize % signals.len()]);
        orchestrator.wait().unwrap();
        let killed = Instant::now();
        until(|| at_work_below(space.dir.path()).is_empty().then_some(()));
        slowest = slowest.max(killed.elapsed());
    }
    println!("  {kills} kills; nothing left after {:.0} ms at most", slowest.as_secs_f64() * 1e3);
}

fn a_closed_terminal_ends_a_run_unless_it_runs_under_nohup() {
    let stages = [stage("a", &[]).with(|p| p.sleep_ms = 400)];
    let space = Space::new(&stages);
    let (mut orchestrator, _events) = space.start();
    space.pid_of("a");
    kill(orchestrator.id() as i32, Signal::HUP);
    assert_eq!(orchestrator.wait().unwrap().code(), Some(130));
    let space = Space::new(&stages);
    let (mut orchestrator, _events) = space.start_by(&["sh", "-c", "trap '' HUP; exec \"$0\" \"$@\""]);
    space.pid_of("a");
    kill(orchestrator.id() as i32, Signal::HUP);
    assert_eq!(orchestrator.wait().unwrap().code(), Some(0));
}

fn twins_found_while_running_are_an_error() {
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
    let refused = |seen: Seen| {
        assert_eq!((seen.outcome.failed.len(), seen.outcome.exit_code()), (1, 2));
        assert!(seen.outcome.failed[0].error.message.contains("same recipe"));
    };
    refused(Space::new(&stages).run());
    // The same if an earlier run made the first one.
    let [x, _, cut_x, _, member_x, _] = stages.clone();
    let mut space = Space::new(&[x, cut_x, member_x]);
    space.run();
    space.orders.stages = stages.to_vec();
    space.keep_diaries();
    refused(space.run());
}

fn a_fan_out_of_300_finishes() {
    let mut stages = vec![stage("root", &[])];
    stages.extend((0..300).map(|i| stage(&format!("leaf{i}"), &["root"])));
    let names: Vec<String> = stages.iter().map(|s| s.name.clone()).collect();
    stages.push(stage("end", &names.iter().map(String::as_str).collect::<Vec<_>>()));
    let seen = Space::new(&stages).run();
    assert_eq!(seen.outcome.ran.len(), 302);
    println!("  {:.1} ms a stage", seen.outcome.seconds * 1000.0 / 302.0);
}

fn a_chain_of_200_finishes() {
    let names: Vec<String> = (0..200).map(|i| format!("s{i}")).collect();
    let stages = names.iter().enumerate().map(|(i, name)| match i {
        0 => stage(name, &[]),
        _ => stage(name, &[&names[i - 1]]).with(|p| p.take = Some(3)),
    });
    let stages: Vec<Stage> = stages.collect();
    let space = Space::new(&stages);
    let seen = space.run();
    assert_eq!(seen.outcome.ran.len(), 200);
    println!("  {:.1} ms a stage", seen.outcome.seconds * 1000.0 / 200.0);
    let again = space.run();
    assert_eq!(again.outcome.reused.len(), 200);
    println!("  {:.1} ms to do nothing", again.outcome.seconds * 1000.0);
    assert_eq!(again.plan.stages.len(), 200);
}
