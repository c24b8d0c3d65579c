//! Two stores that share a remote one, through the real binary.

mod space;

use space::{TestSpace, names, text};

const PIPELINE: &str = r"
version: 1
seed: 3
stages:
  posts: { uses: dataset.tinytldr, with: { posts: 200 } }
  tokenizer: { uses: tokenizer.train, needs: { posts: posts }, with: { vocab_size: 300 } }
  filter:
    uses: dataset.filter
    needs: { posts: posts, tokenizer: tokenizer }
    with: { summary_tokens: [4, 200], validation: 4, calibration: 4, gold: 10, proxy: 10, rl: 10 }
";

fn actions(plan: &serde_json::Value) -> Vec<(String, bool)> {
    let stages = plan["stages"].as_array().expect("a list");
    let action = |stage: &serde_json::Value| stage["action"].as_str().expect("an action").to_owned();
    stages.iter().map(|stage| (action(stage), stage["remote"] == true)).collect()
}

#[test]
fn a_second_store_reuses_everything_without_running_a_stage() {
    let space = TestSpace::new();
    space.write("p.yaml", &format!("{PIPELINE}remote: shared\n"));

    // The folder is not there: a warning, and the run goes on.
    let first = space.temper(&["run", "p.yaml", "--until", "posts"]);
    let stderr = text(&first.stderr);
    assert!(first.status.success() && stderr.contains("the remote store is not used"), "{stderr}");

    let pushed = space.json(&["push", "p.yaml", "--json"]);
    assert_eq!((&pushed["records"], &pushed["failed"]), (&1.into(), &0.into()), "{pushed}");
    let ran = space.json(&["run", "p.yaml", "--json"]);
    assert_eq!(names(&ran["ran"]), ["tokenizer", "filter"]);

    // Another store sees what it can reuse, and reuses all of it.
    let other = ["--store", "other", "--json"];
    let plan = space.json(&[&["plan", "p.yaml"], &other[..]].concat());
    assert_eq!(actions(&plan), vec![("reuse".to_owned(), true); 3], "{plan}");
    let shown = space.temper(&["plan", "p.yaml", "--store", "other"]);
    assert!(text(&shown.stdout).contains("reuse (remote)"), "{}", text(&shown.stdout));
    let alone = space.json(&["plan", "p.yaml", "--store", "other", "--json", "--set", "remote=null"]);
    assert_eq!(actions(&alone)[0], ("run".to_owned(), false), "without the remote it is all to be made: {alone}");
    let reused = space.json(&[&["run", "p.yaml"], &other[..]].concat());
    assert_eq!((names(&reused["ran"]), names(&reused["reused"]).len()), (vec![], 3), "{reused}");
    let digest = |store: &str| space.json(&["show", "p.yaml", "filter", "--store", store, "--json"])["digest"].clone();
    assert_eq!(digest("cache"), digest("other"));
    assert!(space.temper(&["verify", "--store", "other"]).status.success());
    let log = std::fs::read_to_string(space.path("other/timings")).unwrap_or_default();
    assert_eq!(log, "", "no attempt was made");

    // `pull` and `--remote` do the same from a pipeline that names no remote.
    space.write("q.yaml", PIPELINE);
    let third = ["--remote", "shared", "--store", "third", "--json"];
    let pulled = space.json(&[&["pull", "q.yaml"], &third[..]].concat());
    assert_eq!((&pulled["records"], &pulled["artifacts"], &pulled["missing"]), (&3.into(), &3.into(), &0.into()));
    let reused = space.json(&["run", "q.yaml", "--store", "third", "--json"]);
    assert_eq!(names(&reused["ran"]), [""; 0]);

    // The remote enters no key.
    let keys = |file: &str| {
        let plan = space.json(&["plan", file, "--store", "third", "--json"]);
        plan["stages"].as_array().expect("a list").iter().map(|stage| stage["key"].clone()).collect::<Vec<_>>()
    };
    assert_eq!(keys("p.yaml"), keys("q.yaml"));
}

#[test]
fn an_address_with_a_password_is_refused_and_not_repeated() {
    let space = TestSpace::new();
    space.write("p.yaml", PIPELINE);
    for command in ["plan", "run", "push", "pull"] {
        let out = space.temper(&[command, "p.yaml", "--remote", "s3://me:hunter2@bucket/x"]);
        let output = text(&out.stderr) + &text(&out.stdout);
        assert_eq!(out.status.code(), Some(2), "{output}");
        assert!(output.contains("must not contain a user, password") && !output.contains("hunter2"), "{output}");
    }
    assert!(!space.path("cache/runs").exists() || std::fs::read_dir(space.path("cache/runs")).unwrap().count() == 0);

    for (remote, message) in [
        ("5", "expected a URL or a folder"),
        ("ftp://host/x", "the scheme `ftp` is not supported"),
        ("{ read_only: true }", "`remote` has no `url`"),
        ("{ url: x, read_only: 3 }", "`read_only`: expected true or false"),
        ("{ url: x, readonly: true }", "`remote` has no key `readonly`"),
        ("https://u:hunter2@host", "must not contain a user, password"),
    ] {
        space.write("bad.yaml", &format!("{PIPELINE}remote: {remote}\n"));
        let out = space.temper(&["plan", "bad.yaml"]);
        assert_eq!(out.status.code(), Some(2));
        assert!(text(&out.stderr).contains(message), "{remote}: {}", text(&out.stderr));
        assert!(!text(&out.stderr).contains("hunter2"), "{}", text(&out.stderr));
    }

    let none = space.temper(&["push", "p.yaml"]);
    assert_eq!(none.status.code(), Some(2));
    assert!(text(&none.stderr).contains("--remote URL"), "{}", text(&none.stderr));
    let down = space.temper(&["pull", "p.yaml", "--remote", "nowhere"]);
    assert_eq!(down.status.code(), Some(3));
}

#[test]
fn a_read_only_remote_is_read_and_not_written_to() {
    let space = TestSpace::new();
    space.write("p.yaml", PIPELINE);
    std::fs::create_dir(space.path("shared")).expect("a folder");
    space.json(&["run", "p.yaml", "--until", "posts", "--remote", "shared", "--json"]);
    let records = || std::fs::read_dir(space.path("shared/records")).expect("records").count();
    assert_eq!(records(), 1);
    space.write("ro.yaml", &format!("{PIPELINE}remote: {{ url: shared, read_only: true }}\n"));
    let ran = space.json(&["run", "ro.yaml", "--store", "other", "--json"]);
    assert_eq!((names(&ran["ran"]), names(&ran["reused"])), (vec!["tokenizer", "filter"], vec!["posts"]));
    assert_eq!(records(), 1);
    space.json(&["run", "p.yaml", "--remote", "shared", "--no-upload", "--store", "third", "--json"]);
    assert_eq!(records(), 1);
    assert_eq!(space.temper(&["push", "ro.yaml", "--store", "other"]).status.code(), Some(2));
    let pushed = space.json(&["push", "ro.yaml", "--store", "other", "--remote", "shared", "--json"]);
    assert_eq!((&pushed["records"], &pushed["present"]), (&2.into(), &1.into()), "{pushed}");
}
