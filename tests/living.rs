//! What people do around runs: compare, sweep, clean up, look at earlier results, hand numbers on.

mod space;

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

use serde_json::Value;
use space::{TestSpace, names, text};

/// Two stages without learning: `b` writes a metric that depends on its parameter and on its seed.
const PIPELINE: &str = r#"
version: 1
stages:
  a: { uses: command, with: { run: [sh, -c, 'echo a > "$TEMPER_OUTPUT/x"'], output: Files } }
  b:
    uses: command
    matrix: { seed: [1, 2] }
    needs: { a: a }
    with:
      run: [sh, -c, 'cp "$TEMPER_PARAMS_FILE" "$TEMPER_OUTPUT/metrics.json"; head -c 50000 /dev/zero > "$TEMPER_OUTPUT/zeros"']
      params: { n: 1, seed: "${seed}" }
      output: Files
  c:
    uses: command
    matrix: { from: b }
    needs: { b: "b[${seed}]" }
    with: { run: [sh, -c, 'cat "$TEMPER_INPUT_b/metrics.json" > "$TEMPER_OUTPUT/y"'], output: Files }
profiles:
  more: { stages: { b: { with: { params: { n: 7 } } } } }
  other: { stages: { d: { uses: command, needs: { missing: nowhere }, with: { run: [cat], output: Files } } } }
"#;

/// A small model, for curves.
const LEARNING: &str = r"
version: 1
seed: 3
stages:
  posts: { uses: dataset.tinytldr, with: { posts: 200 } }
  tokenizer: { uses: tokenizer.train, needs: { posts: posts }, with: { vocab_size: 400 } }
  base:
    uses: model.pretrain
    needs: { posts: posts, tokenizer: tokenizer }
    with: { n_embd: 16, n_layer: 1, n_head: 2, n_positions: 320, steps: 20, batch: 4, warmup: 1, lr: 1.0e-3 }
";

fn space() -> TestSpace {
    let space = TestSpace::new();
    space.write("p.yaml", PIPELINE);
    space
}

/// Standard output of a successful command.
fn printed(space: &TestSpace, arguments: &[&str]) -> String {
    let out = space.temper(arguments);
    assert!(out.status.success(), "{arguments:?}: {}{}", text(&out.stdout), text(&out.stderr));
    text(&out.stdout)
}

/// Standard error and exit code of a failing command.
fn refused(space: &TestSpace, arguments: &[&str]) -> (String, Option<i32>) {
    let out = space.temper(arguments);
    assert!(!out.status.success(), "{arguments:?}: {}", text(&out.stdout));
    (text(&out.stderr), out.status.code())
}

/// The ids of the runs in the store, oldest first.
fn runs(space: &TestSpace) -> Vec<String> {
    let listed = printed(space, &["runs", "--json"]);
    let run = |line: &str| serde_json::from_str::<Value>(line).unwrap()["run"].as_str().unwrap().to_owned();
    listed.lines().map(run).collect()
}

const N: &str = "stages.b.with.params.n";

#[test]
fn two_runs_with_one_changed_value_are_compared_on_one_screen() {
    let space = TestSpace::new();
    space.write("p.yaml", LEARNING);
    let lr = "stages.base.with.lr=2.0e-3";
    printed(&space, &["run", "p.yaml"]);
    printed(&space, &["run", "p.yaml", "--set", lr]);
    let runs = runs(&space);
    let shown = printed(&space, &["compare", "p.yaml", &runs[0], &runs[1]]);
    let lines: Vec<&str> = shown.lines().collect();
    assert!(lines.len() < 30 && lines.iter().all(|line| line.chars().count() <= 100), "{shown}");
    assert!(lines[0].starts_with("A = run ") && lines[1].starts_with("B = run "), "{shown}");
    let row = lines.iter().find(|line| line.starts_with("base.with.lr")).unwrap_or_else(|| panic!("{shown}"));
    assert_eq!(row.split_whitespace().collect::<Vec<_>>(), ["base.with.lr", "0.001", "0.002"]);
    assert_eq!(lines.iter().filter(|line| line.contains(".with.")).count(), 1, "{shown}");
    assert!(shown.contains("train_loss") && shown.contains("learning.loss  A  "), "{shown}");

    let csv = printed(&space, &["compare", "p.yaml", &runs[0], "latest", "--format", "csv", "--set", lr]);
    assert!(csv.starts_with("what,stage,name,step,side,value\nparameter,base,with.lr,,run "), "{csv}");
    assert!(csv.contains("\ncurve,base,learning.loss,1,"), "{csv}");
    let markdown = printed(&space, &["compare", "p.yaml", &runs[0], &runs[1], "--format", "md"]);
    assert!(markdown.contains("| parameter | A | B |\n| --- | ---: | ---: |\n| base.with.lr |"), "{markdown}");

    // The pipeline as it is now, with and without the change, and single instances.
    let same = printed(&space, &["compare", "p.yaml", "+", &runs[0]]);
    assert!(same.contains("no parameter differs") && same.contains("no common metric differs"), "{same}");
    let one = space.json(&["compare", "p.yaml", &format!("{}:base", runs[0]), "base", "--set", lr, "--json"]);
    assert_eq!(one["parameters"][0]["values"], serde_json::json!(["0.001", "0.002"]));
    let (told, code) = refused(&space, &["compare", "p.yaml", &runs[0], "bsae"]);
    assert!(code == Some(2) && told.contains("neither a run of this store nor an instance"), "{told}");
}

#[test]
fn a_sweep_runs_each_value_once_and_compares_them() {
    let space = space();
    let sweep = ["--set", "stages.b.with.params.n=[3, 5, 9]", "--sweep"];
    let planned = space.json(&[&["plan", "p.yaml", "--json"], &sweep[..]].concat());
    let of_last = &planned["sweep"][2];
    assert_eq!(of_last["set"][0], "stages.b.with.params.n=9");
    assert_eq!(of_last["plan"]["stages"].as_array().map(Vec::len), Some(5));
    let shown = printed(&space, &[&["run", "p.yaml"], &sweep[..]].concat());
    assert!(shown.contains("--- b.with.params.n=5 (2 of 3)"), "{shown}");
    let comparison = shown.split("--- comparison\n").nth(1).unwrap_or_else(|| panic!("{shown}"));
    let row = |start: &str| -> Vec<String> {
        let line = comparison.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("{shown}"));
        line.split_whitespace().map(str::to_owned).collect()
    };
    assert_eq!(row("b.with.params.n"), ["b.with.params.n", "3", "5", "9"]);
    assert_eq!(row("b  "), ["b", "n", "3", "5", "9"]);
    // The stage that they share ran once.
    let ran = printed(&space, &["runs"]);
    assert_eq!(ran.lines().filter(|line| line.contains("5 ran, 0 reused")).count(), 1, "{ran}");
    assert_eq!(ran.lines().filter(|line| line.contains("4 ran, 1 reused")).count(), 2, "{ran}");
    // The journal has the command line of its value.
    let run = &runs(&space)[1];
    let journal = std::fs::read_to_string(space.path(&format!("cache/runs/{run}/journal.jsonl"))).unwrap();
    assert!(journal.contains("stages.b.with.params.n=5\"") && !journal.contains("--sweep"), "{journal}");
    let last = space.json(&[&["run", "p.yaml", "--json"], &sweep[..]].concat());
    assert_eq!(last["comparison"]["parameters"][0]["values"], serde_json::json!(["3", "5", "9"]));

    let (told, code) = refused(&space, &["run", "p.yaml", "--set", "seed=3", "--sweep"]);
    assert!(code == Some(2) && told.contains("no `--set` has a list of values"), "{told}");
}

/// The stages that `gc` lists.
fn listed(space: &TestSpace, arguments: &[&str]) -> Vec<String> {
    let found = space.json(&[&["gc", "p.yaml", "--json"], arguments].concat());
    let artifacts = found["artifacts"].as_array().unwrap().iter();
    let mut stages: Vec<String> = artifacts.map(|a| a["stages"][0].as_str().unwrap_or("").to_owned()).collect();
    stages.sort();
    stages
}

#[test]
fn results_of_forgotten_runs_are_listed_then_deleted_and_pins_keep_them() {
    let space = space();
    printed(&space, &["run", "p.yaml", "--set", &format!("{N}=2")]);
    printed(&space, &["run", "p.yaml"]);
    let (old, new) = {
        let runs = runs(&space);
        (runs[0].clone(), runs[1].clone())
    };
    assert_eq!(listed(&space, &[]), [""; 0]);
    let all = ["b[1]", "b[2]", "c[1]", "c[2]"];
    assert_eq!(listed(&space, &["--keep-runs", "1"]), all);
    assert_eq!(listed(&space, &["--keep-runs", "0", "--keep-days", "1"]), [""; 0]);
    let out = space.temper(&["gc", "p.yaml", "--keep-runs", "0"]);
    assert!(
        text(&out.stderr).contains("p.yaml +other cannot be planned, so it keeps nothing"),
        "{}",
        text(&out.stderr)
    );
    assert!(text(&out.stdout).contains("would delete 4 artifacts and free"), "{}", text(&out.stdout));

    let set = format!("{N}=2");
    printed(&space, &["pin", "p.yaml", "b", "--name", "best", "--set", &set]);
    assert!(printed(&space, &["pins"]).contains("b[1], b[2]"));
    assert_eq!(listed(&space, &["--keep-runs", "1"]), ["c[1]", "c[2]"]);
    let (told, _) = refused(&space, &["pin", "p.yaml", "b", "--name", "best"]);
    assert!(told.contains("the pin `best` exists and has other results"), "{told}");
    let (told, _) = refused(&space, &["pin", "p.yaml", "b", "--set", &format!("{N}=77")]);
    assert!(told.contains("b[1] has no result with its current recipe"), "{told}");
    printed(&space, &["unpin", "best"]);

    let shown = printed(&space, &["du", "p.yaml"]);
    assert!(shown.contains("p.yaml (+") && shown.contains(&format!("run {old}")), "{shown}");
    let shown = printed(&space, &["gc", "p.yaml", "--keep-runs", "1", "--delete"]);
    assert!(shown.contains("deleted 4 artifacts: ") && shown.contains(&format!("by run {old}")), "{shown}");
    assert_eq!(listed(&space, &["--keep-runs", "1"]), [""; 0]);
    assert!(printed(&space, &["verify"]).contains("no damage found"));
    let (told, code) = refused(&space, &["path", "p.yaml", "b[1]", "--run", &old]);
    assert!(code == Some(3) && told.contains("b[1]"), "{told}");
    // What was deleted is made again when it is needed.
    let again = space.json(&["run", "p.yaml", "--set", &set, "--json"]);
    assert_eq!(names(&again["failed"]), [""; 0]);

    let removed = printed(&space, &["runs", "rm", &old, "--store", "cache"]);
    assert!(removed.contains("removed 1 run"), "{removed}");
    assert!(!runs(&space).contains(&old) && runs(&space).contains(&new));
    let (told, code) = refused(&space, &["runs", "rm", "2099"]);
    assert!(code == Some(2) && told.contains("there is no run `2099`"), "{told}");
}

/// `root` is reused; `slow` runs while results are collected; `pending` will be reused once `slow` has run; `last` needs
/// them all.
const LONG: &str = r#"
version: 1
targets: [last]
stages:
  root: { uses: command, with: { run: [sh, -c, 'echo root > "$TEMPER_OUTPUT/x"'], output: Files } }
  slow:
    uses: command
    needs: { root: root }
    with: { run: [sh, -c, 'sleep 2; echo slow > "$TEMPER_OUTPUT/x"'], output: Files, params: { n: 1 } }
  pending: { uses: command, needs: { slow: slow }, with: { run: [sh, -c, 'date +%N > "$TEMPER_OUTPUT/x"'], output: Files, deterministic: false } }
  last:
    uses: command
    needs: { root: root, slow: slow, pending: pending }
    with: { run: [sh, -c, 'sleep 1; cat "$TEMPER_INPUT_root/x" "$TEMPER_INPUT_pending/x" > "$TEMPER_OUTPUT/x"'], output: Files, params: { n: 1 } }
"#;

#[test]
fn a_collection_beside_a_running_pipeline_takes_nothing_from_it() {
    let space = TestSpace::new();
    space.write("p.yaml", LONG);
    space.write("q.yaml", "version: 1\nstages: { q: { uses: command, with: { run: ['true'], output: Files } } }\n");
    printed(&space, &["run", "p.yaml", "--until", "pending"]);
    // `slow` runs again and gives the same bytes, so that `pending` is reused.
    let change = ["--set", "stages.slow.with.params.n=2"];
    let mut command = space.command(&[&["run", "p.yaml", "--json"], &change[..]].concat());
    let mut run = command.stdout(Stdio::piped()).spawn().expect("the binary starts");
    let mut output = BufReader::new(run.stdout.take().expect("it is piped"));
    let mut stdout = String::new();
    // Before its plan the run has nothing to lose.
    while !stdout.contains("\"planned\"") {
        assert!(output.read_line(&mut stdout).expect("it can be read") > 0, "{stdout}");
    }
    let mut collections = 0;
    while run.try_wait().expect("it can be asked").is_none() {
        // Another pipeline, which keeps nothing of this one; and no ended run counts.
        printed(&space, &["gc", "q.yaml", "--keep-runs", "0", "--delete"]);
        collections += 1;
    }
    output.read_to_string(&mut stdout).expect("it can be read");
    assert!(run.wait().expect("it has ended").success() && collections > 1, "{collections}");
    let end: Value = serde_json::from_str(stdout.lines().last().unwrap()).unwrap();
    assert_eq!(names(&end["ran"]), ["slow", "last"], "{stdout}");
    assert_eq!(names(&end["reused"]), ["root", "pending"], "{stdout}");
    assert!(!stdout.contains("\"warning\""), "{stdout}");
    // Nothing protects it any more.
    printed(&space, &["gc", "q.yaml", "--keep-runs", "0", "--delete"]);
    let left = space.json(&["du", "q.yaml", "--json"]);
    assert_eq!(left["artifacts"].as_array().map(Vec::len), Some(0), "{left}");
}

#[test]
fn show_prints_the_recipe_and_results_of_earlier_runs() {
    let space = space();
    let set = format!("{N}=2");
    printed(&space, &["run", "p.yaml", "--set", &set]);
    let old = runs(&space)[0].clone();
    printed(&space, &["run", "p.yaml"]);
    let now = printed(&space, &["show", "p.yaml", "b[1]"]);
    assert!(now.contains("recipe\n  uses: command (version "), "{now}");
    assert!(now.contains("  with.params.n: 1\n") && now.contains("  needs.a: a "), "{now}");
    let then = printed(&space, &["show", "p.yaml", "b[1]", "--run", &old]);
    assert!(then.contains("  with.params.n: 2\n") && then.contains("  needs.a: a "), "{then}");
    // The beginning of an id is enough.
    let json = space.json(&["show", "p.yaml", "b[1]", "--run", &old[..old.len() - 2], "--json"]);
    assert_eq!(json["recipe"]["params"]["params"]["n"], 2);
    let folder = |arguments: &[&str]| printed(&space, &[&["path", "p.yaml", "b[2]"], arguments].concat());
    assert_ne!(folder(&[]), folder(&["--run", &old]));
    assert_eq!(folder(&[]), folder(&["--run", "latest"]));
    let (told, code) = refused(&space, &["show", "p.yaml", "b", "--run", &old]);
    assert!(code == Some(2) && told.contains("choose one of b[1], b[2]"), "{told}");
    printed(&space, &["report", "p.yaml", "--run", &old]);
}

#[test]
fn a_matrix_can_be_taken_from_another_stage() {
    let space = space();
    let stages = |arguments: &[&str]| -> Vec<String> {
        let plan = space.json(&[&["plan", "p.yaml", "--json"], arguments].concat());
        plan["stages"].as_array().unwrap().iter().map(|s| s["stage"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(stages(&[]), ["a", "b[1]", "b[2]", "c[1]", "c[2]"]);
    assert_eq!(stages(&["--set", "stages.b.matrix.seed=[1, 2, 3]"]).len(), 7);
    // A map of labels gives its labels alone; own variables are added, or replace inherited ones.
    let map = ["--set", "stages.b.matrix.seed={1: {with: {params: {n: 5}}}, 4: }"];
    assert_eq!(stages(&map), ["a", "b[1]", "b[4]", "c[1]", "c[4]"]);
    assert_eq!(stages(&["--set", "stages.c.matrix.seed=[2]"]), ["a", "b[2]", "c[2]"]);
    let faults = [
        ("stages.c.matrix.from=bb", "matrix of stage `c`: unknown stage `bb`"),
        ("stages.c.matrix.from=a", "matrix of stage `c`: stage `a` has no matrix"),
        ("stages.c.matrix.from=c", "`from: c` leads back to the stage itself"),
    ];
    for (set, expected) in faults {
        let (told, code) = refused(&space, &["plan", "p.yaml", "--set", set]);
        assert!(code == Some(2) && told.contains(expected), "{told}");
    }
}

#[test]
fn the_command_of_on_finish_gets_the_run_and_its_failure_is_a_warning() {
    let space = space();
    space.write("p.yaml", &format!("{PIPELINE}\non_finish: [sh, -c, 'cat > told.json; echo heard']\n"));
    let out = space.temper(&["run", "p.yaml", "--json"]);
    assert!(out.status.success() && text(&out.stderr).contains("heard"), "{}", text(&out.stderr));
    assert!(!text(&out.stdout).contains("heard"));
    let told: Value = serde_json::from_slice(&std::fs::read(space.path("told.json")).unwrap()).unwrap();
    assert_eq!((told["pipeline"].as_str(), told["exit_code"].as_u64()), (Some("p"), Some(0)));
    assert_eq!(names(&told["ran"]).len(), 5);
    assert_eq!(told["run"].as_str(), Some(runs(&space)[0].as_str()));
    assert!(told["metrics"]["c[1]"].is_object() && std::path::Path::new(told["report"].as_str().unwrap()).is_file());
    let cases =
        [("[sh, -c, 'exit 3']", "on_finish: `sh` failed"), ("[no-such-program]", "on_finish: no-such-program: ")];
    for (command, expected) in cases {
        let out = space.temper(&["run", "p.yaml", "--set", &format!("on_finish={command}")]);
        assert!(out.status.success() && text(&out.stderr).contains(expected), "{}", text(&out.stderr));
    }
    let (told, _) = refused(&space, &["plan", "p.yaml", "--set", "on_finish=notify"]);
    assert!(told.contains("`on_finish`: expected a list, found text"), "{told}");
}

#[test]
fn metrics_and_curves_are_exported_and_times_are_scaled() {
    let space = TestSpace::new();
    space.write("p.yaml", LEARNING);
    printed(&space, &["run", "p.yaml"]);
    printed(&space, &["export", "p.yaml", "--format", "csv", "--out", "out"]);
    let csv = std::fs::read_to_string(space.path("out/metrics.csv")).unwrap();
    let run = &runs(&space)[0];
    assert!(csv.starts_with("run,stage,name,step,value\r\n"), "{csv}");
    assert!(csv.contains(&format!("\r\n{run},base,learning.loss,20,")), "{csv}");
    assert!(csv.contains(&format!("\r\n{run},base,train_loss,,")), "{csv}");
    for _ in 0..2 {
        let written = space.json(&["export", "p.yaml", "base", "--format", "tensorboard", "--out", "tb", "--json"]);
        let file = written["files"][0].as_str().unwrap();
        assert!(file.starts_with("tb/base/events.out.tfevents."), "{file}");
        let bytes = std::fs::read(space.path(file)).unwrap();
        let found = |text: &[u8]| bytes.windows(text.len()).any(|window| window == text);
        assert!(found(b"brain.Event:2") && found(b"learning/loss") && found(b"metrics/train_loss"));
        assert_eq!(std::fs::read_dir(space.path("tb/base")).unwrap().count(), 1);
    }
    let written = space.json(&["export", "p.yaml", "--format", "trl", "--out", "trl", "--json"]);
    let (file, rows) = (written["files"][0]["file"].as_str().unwrap(), written["files"][0]["rows"].as_u64().unwrap());
    let lines = std::fs::read_to_string(space.path(file)).unwrap();
    assert_eq!(lines.lines().count() as u64, rows);
    let first: Value = serde_json::from_str(lines.lines().next().unwrap()).unwrap();
    assert!(first["prompt"].is_string() && first["completion"].is_string(), "{first}");
    let (told, code) = refused(&space, &["export", "p.yaml", "base", "--format", "trl"]);
    assert!(code == Some(2) && told.contains("has no preferences and no posts"), "{told}");
    let (told, code) = refused(&space, &["export", "p.yaml", "bsae", "--format", "csv"]);
    assert!(code == Some(2) && told.contains("has no stage `bsae`"), "{told}");

    let provenance = space.json(&["show", "p.yaml", "base", "--json"])["provenance"].clone();
    let seconds = provenance["seconds"].as_f64().unwrap();
    let plan = |set: &str| space.json(&["plan", "p.yaml", "--json", "--set", set])["stages"].clone();
    let expected = |set: &str| -> Vec<Option<f64>> {
        plan(set).as_array().unwrap().iter().map(|stage| stage["expected_seconds"].as_f64()).collect()
    };
    let base = |set: &str| plan(set)[2].clone();
    let longer = base("stages.base.with.steps=200");
    assert_eq!(longer["expected_memory_bytes"], provenance["peak_bytes"], "more steps need no more memory");
    assert!(longer["expected_disk_bytes"].as_u64().unwrap() > 10_000, "{longer}");
    let wider = base("stages.base.with.n_embd=64")["expected_memory_bytes"].as_f64().unwrap();
    assert!(wider > provenance["peak_bytes"].as_f64().unwrap(), "{wider}");
    let times = expected("stages.base.with.steps=200");
    assert_eq!(times[..2], [None, None], "reused");
    assert!((times[2].unwrap() / seconds - 10.0).abs() < 1e-6, "{times:?} {seconds}");
    // The tokenizer's time does not follow from the number of posts, but its size does not matter to the model.
    let times = expected("stages.posts.with.posts=400");
    assert!(times[0].is_some() && times[1].is_none(), "{times:?}");
    let shown = printed(&space, &["plan", "p.yaml", "--set", "stages.posts.with.posts=400"]);
    assert!(shown.contains("unknown"), "{shown}");
}
