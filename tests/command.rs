//! A program of the user's own in a stage's place: the README's example.

mod space;

use space::{TestSpace, names, repository, text};

/// The profile in the README, as lines to append to the shipped pipeline, which ends with its profiles.
fn profile_of_the_readme() -> String {
    let readme = std::fs::read_to_string(repository("README.md")).expect("the README is part of the repository");
    let block = readme.split("```yaml\nprofiles:\n").nth(1).and_then(|rest| rest.split("```").next());
    block.expect("the README has a profile").to_owned()
}

#[test]
fn the_readmes_annotator_judges_with_python_alone() {
    if !std::process::Command::new("python3").arg("--version").output().is_ok_and(|out| out.status.success()) {
        eprintln!("not tested: there is no python3");
        return;
    }
    let space = TestSpace::new();
    let pipeline =
        std::fs::read_to_string(repository("pipeline.yaml")).expect("the pipeline is part of the repository");
    let file = space.write("pipeline.yaml", &(pipeline + "\n" + &profile_of_the_readme()));
    std::fs::create_dir(space.path("examples")).expect("a folder can be made");
    std::fs::copy(repository("examples/judge.py"), space.path("examples/judge.py")).expect("a file can be copied");
    let small = [
        "stages.posts.with.posts=400",
        "stages.filter.with={validation: 8, calibration: 8, gold: 30, proxy: 30, rl: 30}",
        "stages.sft.with={steps: 1, batch: 2, warmup: 1}",
        "stages.pairs.with={split: gold, pairs: 12, max_new_tokens: 8}",
    ];
    let mut arguments = vec![file.to_str().expect("a path"), "--profile", "mine"];
    arguments.extend(small.iter().flat_map(|change| ["--set", change]));
    let run = space.json(&[&["run"], &arguments[..], &["--until", "annotate", "--json"]].concat());
    assert_eq!(names(&run["failed"]), [""; 0]);
    let mut show = vec!["show", arguments[0], "annotate"];
    show.extend(&arguments[1..]);
    let shown = space.json(&[&show[..], &["--json"]].concat());
    assert_eq!((&shown["type"], shown["rows"]["preferences.parquet"].as_u64()), (&"Preferences".into(), Some(12)));
    assert_eq!(shown["files"].as_object().expect("files").keys().collect::<Vec<_>>(), ["preferences.parquet"]);
    let rows = text(&space.temper(&show).stdout);
    assert!(rows.contains("judge.py") && rows.contains("labelled"), "{rows}");
}

#[test]
fn a_table_that_does_not_fit_is_told_with_every_column_and_where_to_look() {
    let space = TestSpace::new();
    space.write(
        "p.yaml",
        r#"
version: 1
stages:
  judged: { uses: command, with: { run: [sh, -c, 'echo "{\"id\": 1, \"text\": \"x\"}" > $TEMPER_OUTPUT/preferences.jsonl'], output: Preferences } }
"#,
    );
    let out = space.temper(&["run", "p.yaml"]);
    let stderr = text(&out.stderr);
    assert_eq!(out.status.code(), Some(2), "{stderr}");
    for part in [
        "line 1: columns `post_id` (utf8), `prompt` (utf8), ",
        "column `id`: expected utf8, found 1",
        "unexpected column `text`",
    ] {
        assert!(stderr.contains(part), "{stderr}");
    }
    assert!(stderr.contains("`temper kinds --type TYPE`"), "{stderr}");
}

#[test]
fn a_program_changes_what_it_may_and_access_is_no_part_of_the_key() {
    if !engine::attempt::can_confine() {
        eprintln!("not tested: this kernel has no Landlock");
        return;
    }
    let space = TestSpace::new();
    let outside = space.write("outside", "");
    let run = |access: &str| {
        let command = format!("echo a > $TEMPER_OUTPUT/x && echo a >> {}", outside.display());
        let stage = format!("a: {{ uses: command, with: {{ run: [sh, -c, '{command}'], output: Files{access} }} }}");
        space.write("p.yaml", &format!("version: 1\nstages:\n  {stage}\n"));
        space.temper(&["run", "p.yaml"])
    };
    let written = || std::fs::read_to_string(&outside).expect("the file is there");
    let denied = run("");
    assert_eq!((denied.status.code(), written().as_str()), (Some(2), ""), "{}", text(&denied.stderr));
    assert!(text(&denied.stderr).to_lowercase().contains("permission denied"), "{}", text(&denied.stderr));
    let allowed = run(&format!(", access: {{ write: ['{}'] }}", outside.display()));
    assert_eq!((allowed.status.code(), written().as_str()), (Some(0), "a\n"), "{}", text(&allowed.stderr));
    let reused = run("");
    assert_eq!((reused.status.code(), written().as_str()), (Some(0), "a\n"), "{}", text(&reused.stderr));
}
