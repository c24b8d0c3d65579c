//! Reports of runs without a study, through the real binary.

mod space;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use serde_json::Value;
use space::{TestSpace, names};

const PIPELINE: &str = r"
version: 1
seed: 3
stages:
  posts: { uses: dataset.tinytldr, with: { posts: 200 } }
  tokenizer: { uses: tokenizer.train, needs: { posts: posts }, with: { vocab_size: 400 } }
  base:
    uses: model.pretrain
    needs: { posts: posts, tokenizer: tokenizer }
    with: { n_embd: 16, n_layer: 1, n_head: 2, n_positions: 320, steps: 20, batch: 4, warmup: 1, lr: 1.0e-3 }
profiles:
  long:
    stages: { base: { with: { steps: 100000 } } }
";

/// The page of the latest run.
fn report(space: &TestSpace) -> String {
    let report = space.json(&["report", "small.yaml", "--json"]);
    std::fs::read_to_string(report["report"].as_str().expect("a path")).expect("the report is there")
}

#[test]
fn a_run_without_an_evaluation_shows_what_was_learned_and_its_artifacts() {
    let space = TestSpace::new();
    space.write("small.yaml", PIPELINE);
    let ran = space.json(&["run", "small.yaml", "--set", "stages.base.with.lr=2.0e-3", "--json"]);
    assert_eq!(names(&ran["failed"]), [""; 0]);
    let html = report(&space);
    assert!(
        html.contains("command <code>temper run small.yaml --set stages.base.with.lr=2.0e-3 --json</code>"),
        "{html}"
    );
    assert!(html.contains("file <code>small.yaml</code>"));
    assert!(html.contains("<th class=\"n\"><button type=\"button\">train_loss</button></th>"));
    assert!(html.contains("download=\"loss-of-base-by-step.csv\"") && html.contains("<h2>Timeline</h2>"));
    for absent in ["Deviations from the paper", "Figure 4", "Samples by step", "Parameters by arm", "NaN"] {
        assert!(!html.contains(absent), "{absent}");
    }
    let folder = space.json(&["path", "small.yaml", "base", "--set", "stages.base.with.lr=2.0e-3", "--json"]);
    let folder = folder["folder"].as_str().expect("a path");
    let place = folder.split_once("cache/").expect("it lies in the store").1;
    assert!(html.contains(&format!(">{place}</code>")), "{place}");
}

#[test]
fn an_interrupted_stage_is_shown_as_interrupted() {
    let space = TestSpace::new();
    space.write("small.yaml", PIPELINE);
    let mut command = space.command(&["run", "small.yaml", "--profile", "long", "--json"]);
    let mut run = command.stdout(Stdio::piped()).stderr(Stdio::null()).spawn().expect("the binary starts");
    for line in BufReader::new(run.stdout.take().expect("a pipe")).lines() {
        let event: Value = serde_json::from_str(&line.expect("a line")).expect("an event");
        if event["event"] == "progress" && event["stage"] == "base" {
            let asked = Command::new("kill").args(["-INT", &run.id().to_string()]).status().expect("`kill` runs");
            assert!(asked.success());
        }
    }
    assert_eq!(run.wait().expect("it ends").code(), Some(130));
    let html = report(&space);
    assert!(html.contains("base was interrupted after ") && html.contains(" of 100000 steps"), "{html}");
    assert!(html.contains("<td>interrupted</td>") && !html.contains("not reached"), "{html}");
}
