//! Attempts as jobs of a batch system: a trivial one behind `submit`, and a fake Slurm.

use std::fs;
use std::time::Duration;

use engine::journal::Event;
use engine::names::{Digest, Key};
use rustix::process::{Pid, Signal, kill_process, kill_process_group};

use crate::cluster_space::{Cluster, ClusterRun, ClusterSpace};
use crate::fake::Behaviour;
use crate::space::{Stage, TestSpace, is_alive, stage, wait_for};

macro_rules! tests {
    ($($name:ident)*) => {
        pub const TESTS: &[(&str, fn())] = &[$((stringify!($name), $name)),*];
    };
}

tests! {
    jobs_give_the_digests_of_child_processes
    a_killed_orchestrator_leaves_its_job_and_the_next_run_follows_it
    a_job_that_ends_without_an_orchestrator_is_recorded_by_the_next_run
    a_job_whose_id_was_lost_is_followed_by_its_heartbeat
    a_job_is_followed_by_a_run_that_would_run_its_stage_here
    an_attempt_that_lost_its_lease_commits_nothing
    a_forced_stage_cancels_the_job_of_an_earlier_run
    a_signal_to_the_orchestrator_cancels_or_leaves_its_jobs
    a_vanished_job_is_tried_again
    a_rejected_job_is_not_tried_again
    a_time_limit_is_named_and_tried_again_from_the_checkpoint
    a_requeued_job_continues_in_the_same_attempt
    a_controller_that_does_not_answer_does_not_end_a_run
    slurm_gets_resources_and_names_of_variables_only
    secrets_of_jobs_appear_in_no_file
    at_most_the_given_number_of_jobs_is_submitted
    one_query_asks_for_all_jobs
    a_store_that_jobs_do_not_see_is_found_before_the_run
}

fn chain() -> Vec<Stage> {
    vec![stage("a", &[]), stage("b", &["a"]), stage("c", &["b"])]
}

/// One stage that takes a while.
fn slow(milliseconds: u64) -> Vec<Stage> {
    vec![stage("a", &[]).with(|params| params.sleep_ms = milliseconds)]
}

fn kill(pid: i32, signal: Signal) {
    kill_process(Pid::from_raw(pid).unwrap(), signal).unwrap();
}

/// Kills a job with its guard.
fn kill_job(attempt: i32) {
    let group = rustix::process::getpgid(Pid::from_raw(attempt)).unwrap();
    kill_process_group(group, Signal::KILL).unwrap();
}

fn jobs_give_the_digests_of_child_processes() {
    let local = TestSpace::new(&chain()).run();
    let expected: Vec<Digest> = local.outcome.digests.into_iter().flatten().collect();
    for cluster in [Cluster::background(), Cluster::slurm()] {
        let cluster = ClusterSpace::new(&chain(), Cluster { probe: true, ..cluster });
        let run = cluster.run();
        run.assert_ok();
        assert_eq!(run.digests(), expected);
        assert_eq!(run.jobs(), [("a", false), ("b", false), ("c", false)]);
        assert!(run.events.iter().any(|event| matches!(event, Event::Probing { .. })));
        assert!(run.events.iter().any(|event| matches!(event, Event::Progress { done: 1, .. })));
        assert_eq!(cluster.leases(), [""; 0]);
        for record in cluster.store().actions().unwrap() {
            assert_eq!(record.provenance.job.expect("a job").executor, "cluster");
        }
        let again = cluster.run();
        assert_eq!((again.code, again.jobs()), (Some(0), vec![]));
        // A probe holds for a day.
        cluster.store().clear_work(&key_of(&run, "c")).unwrap();
        fs::remove_dir_all(cluster.space.request.store.join("actions")).unwrap();
        assert!(!cluster.run().events.iter().any(|event| matches!(event, Event::Probing { .. })));
    }
}

fn key_of(run: &ClusterRun, name: &str) -> Key {
    let key = run.events.iter().find_map(|event| match event {
        Event::StageStarted { stage, key, .. } if stage == name => Some(*key),
        _ => None,
    });
    key.expect("it started")
}

fn a_killed_orchestrator_leaves_its_job_and_the_next_run_follows_it() {
    for cluster in [Cluster::background(), Cluster::slurm()] {
        let cluster = ClusterSpace::new(&slow(1500), cluster);
        cluster.killed_during("a");
        let run = cluster.run();
        run.assert_ok();
        assert_eq!(run.jobs(), [("a", true)]);
        assert_eq!(cluster.space.attempt_log().len(), 1, "it was not started again");
        // Nothing that happened without an orchestrator is lost.
        assert!(run.events.iter().any(|event| matches!(event, Event::Progress { done: 1, .. })));
        assert_eq!(cluster.space.text(&run.digests()[0]), "a");
        assert_eq!(cluster.leases(), [""; 0]);
    }
}

fn a_job_that_ends_without_an_orchestrator_is_recorded_by_the_next_run() {
    let cluster = ClusterSpace::new(&slow(500), Cluster::slurm());
    let attempt = cluster.killed_during("a");
    wait_for(|| (!is_alive(attempt)).then_some(()));
    // Nobody needs the batch system for that.
    fs::write(cluster.slurm.join("unreachable"), "").unwrap();
    let run = cluster.run();
    run.assert_ok();
    assert_eq!((run.jobs(), cluster.space.attempt_log().len()), (vec![("a", true)], 1));
}

fn a_job_whose_id_was_lost_is_followed_by_its_heartbeat() {
    let cluster = ClusterSpace::new(&slow(1500), Cluster::background());
    cluster.killed_during("a");
    // As if the orchestrator had died between the submission and the note of the id.
    let (path, text) = (cluster.lease_file(), cluster.leases().remove(0));
    let mut lease: serde_json::Value = serde_json::from_str(&text).unwrap();
    lease["job"] = serde_json::Value::Null;
    fs::write(path, lease.to_string()).unwrap();
    let run = cluster.run();
    run.assert_ok();
    assert_eq!(cluster.space.attempt_log().len(), 1);
}

fn a_job_is_followed_by_a_run_that_would_run_its_stage_here() {
    let mut cluster = ClusterSpace::new(&slow(2_500), Cluster::background());
    cluster.killed_during("a");
    let settings = cluster.space.request.cluster.take();
    let without_settings = cluster.run();
    let error = without_settings.failure();
    assert!(error.message.contains("the pipeline has no such executor"), "{error}");
    assert_eq!((without_settings.code, cluster.leases().len()), (Some(2), 1));
    cluster.space.request.cluster = settings.map(|settings| Cluster { is_used: false, ..settings });
    let run = cluster.run();
    run.assert_ok();
    assert_eq!((run.jobs(), cluster.space.attempt_log().len()), (vec![("a", true)], 1));
}

fn an_attempt_that_lost_its_lease_commits_nothing() {
    // The guard notices it while the kind runs; the attempt itself before it commits.
    for milliseconds in [60_000, 300] {
        let cluster = ClusterSpace::new(&slow(milliseconds), Cluster::background());
        let attempt = cluster.killed_during("a");
        fs::remove_file(cluster.lease_file()).unwrap();
        wait_for(|| (!is_alive(attempt)).then_some(()));
        assert_eq!(cluster.space.count("artifacts"), 0);
    }
}

fn a_forced_stage_cancels_the_job_of_an_earlier_run() {
    let mut cluster = ClusterSpace::new(&slow(2_000), Cluster::slurm());
    let attempt = cluster.killed_during("a");
    cluster.space.request.force = vec!["a".into()];
    let run = cluster.run();
    run.assert_ok();
    assert!(!is_alive(attempt));
    assert_eq!(cluster.recorded("scancel.args"), "1\n");
    assert_eq!(cluster.space.attempt_log().len(), 2);
}

fn a_signal_to_the_orchestrator_cancels_or_leaves_its_jobs() {
    let cases = [(Signal::INT, false), (Signal::TERM, true), (Signal::HUP, true)];
    for (signal, goes_on) in cases {
        let cluster = ClusterSpace::new(&slow(if goes_on { 1500 } else { 60_000 }), Cluster::slurm());
        let orchestrator = cluster.start();
        let attempt = cluster.space.pid_of("a");
        kill(orchestrator.id() as i32, signal);
        let run = cluster.end(orchestrator);
        assert_eq!(run.code, Some(130), "{}", run.stderr);
        match goes_on {
            true => assert!(is_alive(attempt)),
            false => wait_for(|| (!is_alive(attempt)).then_some(())),
        }
        assert_eq!(
            (cluster.leases().len(), cluster.recorded("scancel.args").len()),
            if goes_on { (1, 0) } else { (0, 2) }
        );
        if goes_on {
            let next = cluster.run();
            next.assert_ok();
            assert_eq!((next.jobs(), cluster.space.attempt_log().len()), (vec![("a", true)], 1));
        }
    }
}

fn a_vanished_job_is_tried_again() {
    for cluster in [Cluster::background(), Cluster::slurm()] {
        let cluster = ClusterSpace::new(&slow(1000), cluster);
        let orchestrator = cluster.start();
        let attempt = cluster.space.pid_of("a");
        fs::write(cluster.slurm.join("1.gone"), "").unwrap();
        kill_job(attempt);
        let run = cluster.end(orchestrator);
        run.assert_ok();
        assert!(matches!(run.retries()[..], [message] if message.contains("vanished")), "{:?}", run.retries());
        assert_eq!((run.jobs(), cluster.space.attempt_log().len()), (vec![("a", false); 2], 2));
    }
}

fn a_rejected_job_is_not_tried_again() {
    let cluster = ClusterSpace::new(&chain(), Cluster::slurm());
    fs::write(cluster.slurm.join("reject"), "Invalid account").unwrap();
    let run = cluster.run();
    let error = run.failure();
    assert!(error.message.contains("Slurm rejected the job") && error.message.contains("Invalid account"), "{error}");
    assert_eq!((run.code, run.retries().len()), (Some(3), 0));
    assert_eq!(cluster.recorded("sbatch.args").lines().count(), 1);
    assert_eq!(cluster.leases(), [""; 0]);
}

fn a_time_limit_is_named_and_tried_again_from_the_checkpoint() {
    // Fails once, after which its checkpoints have one file more.
    let stages = [stage("a", &[]).does(Behaviour::FailTransiently(1)).with(|params| params.sleep_ms = 800)];
    let cluster = ClusterSpace::new(&stages, Cluster::slurm());
    let orchestrator = cluster.start();
    wait_for(|| cluster.recorded("last").starts_with('2').then_some(()));
    let attempt = wait_for(|| cluster.space.attempt_log().get(1).map(|(_, pid)| *pid));
    cluster.slurm("scancel", &["2", "KILL", "TIMEOUT"]);
    let run = cluster.end(orchestrator);
    run.assert_ok();
    assert!(!is_alive(attempt));
    let retries = run.retries();
    assert_eq!(retries.len(), 2, "{retries:?}");
    assert!(retries[1].contains("reached its time limit (01:00:00)"), "{retries:?}");
    // The third attempt found what the first had left.
    assert_eq!(cluster.space.attempt_log().len(), 3);
}

fn a_requeued_job_continues_in_the_same_attempt() {
    let cluster = ClusterSpace::new(&slow(800), Cluster::slurm());
    let orchestrator = cluster.start();
    let first = cluster.space.pid_of("a");
    // Preemption: SIGTERM to the batch script alone, and the job waits again.
    let guard = fs::read_to_string(format!("/proc/{first}/stat")).unwrap();
    let guard: i32 = guard.rsplit(')').next().unwrap().split_whitespace().nth(1).unwrap().parse().unwrap();
    fs::write(cluster.slurm.join("1.state"), "PENDING").unwrap();
    kill(guard, Signal::TERM);
    wait_for(|| (!is_alive(first)).then_some(()));
    std::thread::sleep(Duration::from_millis(600));
    cluster.slurm("start", &["1"]);
    let run = cluster.end(orchestrator);
    run.assert_ok();
    assert_eq!((run.jobs(), run.retries().len()), (vec![("a", false)], 0));
    assert_eq!(cluster.space.attempt_log().len(), 2);
    assert_eq!(cluster.space.text(&run.digests()[0]), "a");
}

fn a_controller_that_does_not_answer_does_not_end_a_run() {
    let cluster = ClusterSpace::new(&slow(900), Cluster::slurm());
    let orchestrator = cluster.start();
    cluster.space.pid_of("a");
    fs::write(cluster.slurm.join("unreachable"), "").unwrap();
    let run = cluster.end(orchestrator);
    run.assert_ok();
    let warned = |event: &Event| matches!(event, Event::Warning { message, .. } if message.contains("Unable to contact slurm controller"));
    assert_eq!(run.events.iter().filter(|event| warned(event)).count(), 1);
}

fn slurm_gets_resources_and_names_of_variables_only() {
    let resources = Some([3, 2048, 2, 5400]);
    let cluster = ClusterSpace::new(
        &[stage("a", &[]).does(Behaviour::ShowEnvironment)],
        Cluster { resources, ..Cluster::slurm() },
    );
    let run = cluster.run();
    run.assert_ok();
    let arguments = cluster.recorded("sbatch.args");
    let words: Vec<&str> = arguments.split_whitespace().collect();
    for word in [
        "--cpus-per-task=3",
        "--mem=2048M",
        "--gres=gpu:2",
        "--time=01:30:00",
        "--partition=p1",
        "--qos=low",
        "--requeue",
        "--signal=B:TERM@60",
        "--nodes=1",
    ] {
        assert!(words.contains(&word), "{word}: {arguments}");
    }
    let attempt = run.events.iter().find_map(|event| match event {
        Event::StageStarted { attempt, threads: 3, log, .. } => Some((attempt.strip_prefix("attempt-")?, log.clone())),
        _ => None,
    });
    let (attempt, log) = attempt.expect("it started with three threads");
    assert!(words.contains(&&*format!("--job-name=a.{attempt}")), "{arguments}");
    assert!(log.ends_with(format!("a.{attempt}.log")) && fs::read_to_string(log).unwrap().contains("a at work"));
    let export = words.iter().find_map(|word| word.strip_prefix("--export=")).expect("names of variables");
    assert!(export.split(',').any(|name| name == "FAKE_SECRET") && !arguments.contains("hush"), "{arguments}");
    let environment = cluster.space.text(&run.digests()[0]);
    assert!(environment.contains("FAKE_SECRET\n") && environment.contains("RAYON_NUM_THREADS\n"), "{environment}");
    assert!(!environment.contains("FAKE_SLURM"), "only names that are declared are passed: {environment}");
}

fn secrets_of_jobs_appear_in_no_file() {
    let cluster = ClusterSpace::new(&[stage("a", &[]).does(Behaviour::LeakSecrets)], Cluster::background());
    let run = cluster.run();
    assert_eq!(run.code, Some(2));
    assert!(run.failure().message.contains("the secret is [redacted]"), "{}", run.failure());
    let mut folders = vec![cluster.space.request.store.clone()];
    let mut redacted = 0;
    while let Some(folder) = folders.pop() {
        for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let text = String::from_utf8_lossy(&fs::read(&path).unwrap()).into_owned();
            assert!(!text.contains("hush"), "{}", path.display());
            redacted += usize::from(text.contains("[redacted]"));
        }
    }
    // Events, result, log and journal.
    assert!(redacted >= 4, "{redacted}");
}

fn at_most_the_given_number_of_jobs_is_submitted() {
    let stages = ["a", "b", "c"].map(|name| stage(name, &[]).with(|params| params.sleep_ms = 100));
    let cluster = ClusterSpace::new(&stages, Cluster { max_jobs: 1, ..Cluster::background() });
    let run = cluster.run();
    run.assert_ok();
    let mut live = 0;
    for event in &run.events {
        match event {
            Event::Job { .. } => live += 1,
            Event::StageFinished { .. } => live -= 1,
            _ => {}
        }
        assert!(live <= 1, "{:?}", run.events);
    }
}

fn one_query_asks_for_all_jobs() {
    let stages = ["a", "b", "c"].map(|name| stage(name, &[]).with(|params| params.sleep_ms = 1500));
    let cluster = ClusterSpace::new(&stages, Cluster::slurm());
    cluster.run().assert_ok();
    let queries = cluster.recorded("squeue.args");
    assert!(queries.lines().any(|query| query.ends_with("--jobs=1,2,3")), "{queries}");
}

fn a_store_that_jobs_do_not_see_is_found_before_the_run() {
    // A job that does nothing, as on a machine without the store.
    let blind = Cluster { submit: "true {script}; echo 999999999".into(), probe: true, ..Cluster::background() };
    let cluster = ClusterSpace::new(&chain(), blind);
    let run = cluster.run();
    assert_eq!(run.code, Some(3), "{}", run.stderr);
    assert!(run.stderr.contains("its machine does not see the store"), "{}", run.stderr);
    assert_eq!(cluster.space.attempt_log().len(), 0);
}
