//! Executors in the pipeline file; and a study through a real Slurm, where there is one (`tests/slurm/setup.sh`).

mod space;

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use serde_json::Value;
use space::{TestSpace, names, text};

const STAGES: &str = r"
stages:
  posts: { uses: dataset.tinytldr, with: { posts: 300 } }
  tokenizer: { uses: tokenizer.train, needs: { posts: posts }, with: { vocab_size: 400 } }
  base:
    uses: model.pretrain
    needs: { posts: posts, tokenizer: tokenizer }
    with: { n_embd: 16, n_layer: 1, n_head: 2, n_positions: 320, steps: 1500, batch: 4, warmup: 1, lr: 1.0e-3 }
";

/// The pipeline with `more` at its top level.
fn pipeline(space: &TestSpace, more: &str) {
    space.write("p.yaml", &format!("version: 1\nseed: 3\n{more}{STAGES}"));
}

#[test]
fn every_mistake_in_executors_is_reported_at_once() {
    let space = TestSpace::new();
    space.write(
        "p.yaml",
        r"
version: 1
executors:
  local: { type: slurm }
  a: { type: slrum }
  b: { type: slurm, partitoin: gpu, max_jobs: 0, interval: soon, flags: [qos] }
  c: { type: submit, submit: 'qsub -N {nam} {script}', status: qstat, cancel: qdel }
  pbs: { type: submit, submit: 'qsub -l mem={memory_mb} {script}', status: qstat, cancel: 'qdel {job}' }
stages:
  posts: { uses: dataset.tinytldr, executor: pbs, resources: { memory: 16, gpu: 1 } }
  more: { uses: dataset.tinytldr, executor: gpuu, with: { posts: 10 } }
  third: { uses: dataset.tinytldr, executor: pbs, with: { posts: 20 } }
  fourth: { uses: dataset.tinytldr, executor: pbs, resources: { memory: 1G }, timeout: 1h, with: { posts: 30 } }
",
    );
    let out = space.temper(&["plan", "p.yaml"]);
    let shown = text(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{shown}");
    for message in [
        "the executor `local` is built in and has no settings",
        "executor `a`: `type`: expected `slurm` or `submit`, found `slrum`",
        "executor `b` has no key `partitoin`",
        "executor `b`: `max_jobs`: expected a whole number from 1 to 1000000, found `0`",
        "executor `b`: `interval`: expected a duration such as `30s`",
        "executor `b`: `flags`: expected a list of flags",
        "executor `c`: `submit`: unknown placeholder `{nam}`",
        "executor `c`: `cancel` does not use `{job}`",
        "resources: `memory`: expected a size such as `500M` or `16G`, found `16`",
        "`resources` has no key `gpu`",
        "stage `more`: unknown executor `gpuu`",
        "stage `third`: the `submit` command of executor `pbs` needs `memory`, which is not set",
        "stage `fourth`: `timeout` has no effect: the `submit` command of executor `pbs` sets no time limit",
    ] {
        assert!(shown.contains(message), "{message}\n\n{shown}");
    }
}

#[test]
fn executors_and_resources_are_in_no_key_and_plan_shows_them() {
    let space = TestSpace::new();
    pipeline(&space, "");
    let keys = |plan: &Value| -> Vec<Value> {
        plan["stages"].as_array().expect("stages").iter().map(|stage| stage["key"].clone()).collect()
    };
    let plain = space.json(&["plan", "p.yaml", "--json"]);
    pipeline(&space, "executors: { gpu: { type: slurm, partition: gpu } }\n");
    let set = ["--set", "stages.posts.executor=gpu", "--set", "stages.posts.resources={gpus: 2, time: 2h}"];
    let placed = space.temper(&[&["plan", "p.yaml", "--json"], &set[..]].concat());
    let placed: Value = serde_json::from_slice(&placed.stdout).expect("JSON");
    assert_eq!(keys(&plain), keys(&placed));
    assert_eq!((&placed["stages"][0]["executor"], &placed["stages"][1]["executor"]), (&"gpu".into(), &Value::Null));
    let shown = text(&space.temper(&[&["plan", "p.yaml"], &set[..]].concat()).stdout);
    assert!(shown.lines().any(|line| line.contains("executor")) && shown.contains(" gpu "), "{shown}");
    assert!(!text(&space.temper(&["plan", "p.yaml", "--executor", "local"]).stdout).contains("executor"));
}

#[test]
fn a_cluster_without_its_commands_or_an_unknown_executor_stops_a_run_before_it_starts() {
    let space = TestSpace::new();
    pipeline(&space, "");
    let out =
        space.command(&["run", "p.yaml", "--executor", "slurm"]).env("PATH", "/nowhere").output().expect("it starts");
    let shown = text(&out.stderr);
    assert_eq!(out.status.code(), Some(3), "{shown}");
    for program in ["sbatch", "squeue", "scancel"] {
        assert!(shown.contains(&format!("executor `slurm` needs the program `{program}`")), "{shown}");
    }
    let out = space.temper(&["run", "p.yaml", "--executor", "slrum"]);
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("unknown executor `slrum`\n  help: did you mean `slurm`?"));
    assert!(!space.path("cache/work").join("probes").exists());
}

#[test]
fn the_executors_of_the_guide_are_valid() {
    let guide =
        std::fs::read_to_string(space::repository("docs/clusters.md")).expect("the guide is part of the repository");
    let blocks: Vec<&str> = guide.split("```yaml\n").skip(1).filter_map(|rest| rest.split("```").next()).collect();
    assert_eq!(blocks.len(), 2);
    let space = TestSpace::new();
    for block in blocks {
        pipeline(&space, block.split("stages:\n").next().expect("the executors"));
        let out = space.temper(&["plan", "p.yaml"]);
        assert!(out.status.success(), "{block}{}", text(&out.stderr));
    }
}

/// Whether there is a Slurm to test with.
fn has_slurm() -> bool {
    let is_there = std::env::var_os("TEMPER_SLURM").is_some();
    if !is_there {
        eprintln!("not tested: TEMPER_SLURM is not set (tests/slurm/setup.sh)");
    }
    is_there
}

const SLURM: [&str; 3] = ["run", "p.yaml", "--json"];

/// Starts a run and returns it at its first event of a kind, for the stage `base`.
fn until(space: &TestSpace, event: &str) -> (Child, Value) {
    let mut command = space.command(&[&SLURM[..], &["--checkpoint-every", "10"]].concat());
    let mut orchestrator = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("the binary starts");
    let lines = BufReader::new(orchestrator.stdout.take().expect("a pipe")).lines();
    let mut events = lines.map(|line| serde_json::from_str::<Value>(&line.expect("a line")).expect("an event"));
    let found = events.find(|found| found["event"] == event && found["stage"] == "base");
    let found = found.unwrap_or_else(|| panic!("the run ended without `{event}`: {:?}", orchestrator.wait()));
    (orchestrator, found)
}

fn events(out: &std::process::Output) -> Vec<Value> {
    assert!(out.status.success(), "{}{}", text(&out.stdout), text(&out.stderr));
    text(&out.stdout).lines().map(|line| serde_json::from_str(line).expect("an event")).collect()
}

fn slurm(program: &str, arguments: &[&str]) {
    assert!(Command::new(program).args(arguments).status().expect("a command of Slurm").success());
}

#[test]
fn a_study_through_slurm_gives_the_digests_of_child_processes_whatever_happens_to_it() {
    if !has_slurm() {
        return;
    }
    let space = TestSpace::new();
    pipeline(
        &space,
        "executors: { s: { type: slurm, interval: 1s, grace: 5s, backoff: 1s, resources: { time: 10m } } }\n",
    );
    let local = space.json(&["run", "p.yaml", "--json", "--store", "here"]);
    assert_eq!(names(&local["failed"]), [""; 0]);
    let file = std::fs::read_to_string(space.path("p.yaml")).expect("the pipeline");
    space.write(
        "p.yaml",
        &file.replace("{ uses: ", "{ executor: s, uses: ").replace("    uses: ", "    executor: s\n    uses: "),
    );

    // The orchestrator dies; its job goes on.
    let (mut orchestrator, _) = until(&space, "checkpoint");
    orchestrator.kill().expect("it is killed");
    orchestrator.wait().expect("it ends");
    let (mut orchestrator, job) = until(&space, "job");
    assert_eq!(job["attached"], true, "{job}");
    // Somebody cancels the job, which is no reason to start it again.
    let id = job["job"].as_str().expect("an id");
    slurm("scancel", &[id]);
    assert_eq!(orchestrator.wait().expect("it ends").code(), Some(3));

    let last = events(&space.temper(&[&SLURM[..], &["--checkpoint-every", "10"]].concat()));
    assert!(last.iter().any(|event| event["event"] == "resumed" && event["stage"] == "base"), "{last:?}");
    for stage in ["posts", "tokenizer", "base"] {
        let show = |store| space.json(&["show", "p.yaml", stage, "--store", store, "--json"]);
        assert_eq!(show("cache")["digest"], show("here")["digest"], "{stage}");
    }
}
