//! Runs of the real binary that are killed in the middle of a learning stage and started again.

mod space;

use std::io::{BufRead, BufReader};
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};

use serde_json::Value;
use space::{TestSpace, names, text};

const PIPELINE: &str = r"
version: 1
seed: 3
stages:
  posts: { uses: dataset.tinytldr, with: { posts: 300 } }
  tokenizer: { uses: tokenizer.train, needs: { posts: posts }, with: { vocab_size: 400 } }
  filter:
    uses: dataset.filter
    needs: { posts: posts, tokenizer: tokenizer }
    with: { summary_tokens: [4, 80], validation: 8, calibration: 8, gold: 40, proxy: 40, rl: 40 }
  base:
    uses: model.pretrain
    needs: { posts: posts, tokenizer: tokenizer }
    with: { n_embd: 16, n_layer: 1, n_head: 2, n_positions: 320, steps: 60, batch: 4, warmup: 1, lr: 1.0e-3 }
  sft: { uses: sft, needs: { base: base, posts: filter }, with: { steps: 60, batch: 4, warmup: 1, lr: 1.0e-3 } }
  contrast: { uses: generate.contrast, needs: { posts: filter, tokenizer: tokenizer }, with: { split: proxy, pairs: 24 } }
  annotate: { uses: annotate.reference, needs: { pairs: contrast }, with: { by: facts } }
  proxy:
    uses: reward.train
    matrix: { member: [1, 2] }
    seed: '${member}'
    needs: { model: sft, preferences: annotate, posts: filter }
    with: { batch: 4, warmup: 1, steps: 40 }
  more: { uses: generate.contrast, needs: { posts: filter, tokenizer: tokenizer }, with: { split: proxy, pairs: 300 } }
  labels: { uses: annotate.gold, needs: { pairs: more, reward: 'proxy[1]' }, with: { labels: sampled, label_noise: 0.25 } }
  ensemble: { uses: reward.ensemble, needs: { members: 'proxy[*]' } }
  rl:
    uses: rl.ppo
    needs: { policy: sft, rewards: ensemble, posts: filter }
    with: { objective: adaptive, steps: { n: 6 }, rollouts: 6, minibatch: 4, epochs: 2, lr: 1.0e-3, max_new_tokens: 10, eval_every: 2, eval_prompts: 8 }
";

/// Runs until `stage` reports a checkpoint after `done` steps, then kills the run with its processes. Returns the
/// events up to then.
fn killed_at(space: &TestSpace, arguments: &[&str], stage: &str, done: u64) -> Vec<Value> {
    let mut command = space.command(&[&["run", "study.yaml", "--json"], arguments].concat());
    let mut orchestrator = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("the binary starts");
    let lines = BufReader::new(orchestrator.stdout.take().expect("a pipe"));
    let mut events = Vec::new();
    for line in lines.lines() {
        let event: Value = serde_json::from_str(&line.expect("a line")).expect("an event");
        let there = event["event"] == "checkpoint" && event["stage"] == stage && event["done"] == done;
        events.push(event);
        if there {
            break;
        }
    }
    // The process may already be a zombie.
    let _ = orchestrator.kill();
    let ended = orchestrator.wait().expect("it ends");
    assert!(ended.signal() == Some(9), "no checkpoint of {stage} after {done} steps: {:?}", events.last());
    events
}

/// The points at which stages resumed: (stage, steps done).
fn resumed(events: &[Value]) -> Vec<(String, u64)> {
    let resumed = events.iter().filter(|event| event["event"] == "resumed");
    resumed.map(|e| (e["stage"].as_str().unwrap_or_default().to_owned(), e["done"].as_u64().unwrap_or(0))).collect()
}

fn events(out: &std::process::Output) -> Vec<Value> {
    assert!(out.status.success(), "{}{}", text(&out.stdout), text(&out.stderr));
    text(&out.stdout).lines().map(|line| serde_json::from_str(line).expect("an event")).collect()
}

#[test]
fn a_study_killed_in_every_stage_that_learns_or_scores_gives_the_digests_of_an_undisturbed_one() {
    // By fused kernels, and by the operations that GPUs use.
    ["cpu", "portable"].into_iter().for_each(kill_in_every_stage);
}

fn kill_in_every_stage(device: &str) {
    let space = TestSpace::new();
    space.write("study.yaml", PIPELINE);
    let on_device = |arguments: &[&'static str]| [arguments, &["--device", device]].concat();
    let whole = space.json(&on_device(&["run", "study.yaml", "--store", "undisturbed", "--json", "-j", "1"]));
    assert_eq!(names(&whole["failed"]), [""; 0]);

    // A different number of threads each time.
    let one = on_device(&["--checkpoint-every", "1", "-j", "1"]);
    let two = on_device(&["--checkpoint-every", "1", "-j", "2"]);
    let labels = on_device(&["--until", "labels", "--checkpoint-every", "1", "-j", "2"]);
    let kills: [(&[&str], &str, u64); 5] =
        [(&two, "base", 5), (&one, "sft", 7), (&two, "proxy[2]", 3), (&labels, "labels", 128), (&one, "rl", 2)];
    let mut all_events: Vec<Value> =
        kills.iter().flat_map(|(arguments, stage, done)| killed_at(&space, arguments, stage, *done)).collect();
    all_events.extend(events(&space.temper(&on_device(&["run", "study.yaml", "--json", "-j", "2"]))));
    // A stage may have finished before the kill arrived, but hardly all of them; a stage that ran next to the watched
    // one may have just begun.
    let went_on = resumed(&all_events);
    let least = |stage: &str| kills.iter().find(|kill| kill.1 == stage).map_or(1, |kill| kill.2);
    assert!(!went_on.is_empty() && went_on.iter().all(|(stage, done)| *done >= least(stage)), "{device}: {went_on:?}");

    for stage in ["base", "sft", "proxy[1]", "proxy[2]", "rl", "labels"] {
        let digest = |store| space.json(&["show", "study.yaml", stage, "--store", store, "--json"])["digest"].clone();
        assert_eq!(digest("cache"), digest("undisturbed"), "{stage} on {device}");
    }
    let checkpoints = std::fs::read_dir(space.path("cache/work")).expect("folders of keys");
    let left = checkpoints.filter(|key| key.as_ref().is_ok_and(|key| key.path().join("checkpoints").exists()));
    assert_eq!(left.count(), 0, "checkpoints of finished stages are deleted");
}

/// Starts a run, sends SIGINT when `stage` has made progress, and returns its events.
fn interrupted_at(space: &TestSpace, arguments: &[&str], stage: &str) -> Vec<Value> {
    let mut command = space.command(&[&["run", "study.yaml", "--json"], arguments].concat());
    let mut run = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("the binary starts");
    let mut asked = false;
    let mut events = Vec::new();
    for line in BufReader::new(run.stdout.take().expect("a pipe")).lines() {
        let event: Value = serde_json::from_str(&line.expect("a line")).expect("an event");
        if !asked && event["event"] == "progress" && event["stage"] == stage {
            asked = true;
            let sent = Command::new("kill").args(["-INT", &run.id().to_string()]).status().expect("`kill` runs");
            assert!(sent.success());
        }
        events.push(event);
    }
    assert_eq!(run.wait().expect("it ends").code(), Some(130), "{:?}", events.last());
    events
}

#[test]
fn an_interrupted_stage_writes_a_checkpoint_first_and_resumes_from_it() {
    let space = TestSpace::new();
    space.write("study.yaml", PIPELINE);
    let long = ["--until", "base", "--set", "stages.base.with.steps=400"];
    let interrupted = interrupted_at(&space, &long, "base");
    // By the clock, none is due within the first minute.
    let written: Vec<&Value> = interrupted.iter().filter(|event| event["event"] == "checkpoint").collect();
    assert_eq!(written.len(), 1, "{interrupted:?}");
    let went_on = events(&space.temper(&[&["run", "study.yaml", "--json"], &long[..]].concat()));
    assert_eq!(resumed(&went_on), [("base".to_owned(), written[0]["done"].as_u64().expect("a number"))]);
}

#[test]
fn a_stage_that_times_out_resumes_in_its_next_try() {
    let space = TestSpace::new();
    space.write("study.yaml", PIPELINE);
    let limits = ["stages.base.with.steps=1000000", "stages.base.timeout=2s", "stages.base.retries=1"];
    let set = limits.iter().flat_map(|change| ["--set", change]);
    let arguments: Vec<&str> = ["run", "study.yaml", "--until", "base", "--json"].into_iter().chain(set).collect();
    let out = space.temper(&arguments);
    assert_eq!(out.status.code(), Some(3), "{}", text(&out.stderr));
    let lines: Vec<Value> =
        text(&out.stdout).lines().map(|line| serde_json::from_str(line).expect("an event")).collect();
    assert!(resumed(&lines).iter().any(|(stage, done)| stage == "base" && *done > 0), "{lines:?}");
}

#[test]
fn a_forced_stage_starts_from_nothing() {
    let space = TestSpace::new();
    space.write("study.yaml", PIPELINE);
    killed_at(&space, &["--until", "base", "--checkpoint-every", "1"], "base", 3);
    let forced = events(&space.temper(&["run", "study.yaml", "--until", "base", "--force", "base", "--json"]));
    assert_eq!(resumed(&forced), []);
    assert!(forced.iter().all(|event| event["event"] != "warning"));
}
