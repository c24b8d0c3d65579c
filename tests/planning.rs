//! Output of `plan`, `run --dry-run` and errors in a pipeline file, on the shipped pipeline.

mod space;

use space::{TestSpace, names, repository, text};

fn shipped(space: &TestSpace) -> String {
    let file = space.path("pipeline.yaml");
    std::fs::copy(repository("pipeline.yaml"), &file).expect("the pipeline is part of the repository");
    file.to_string_lossy().into_owned()
}

#[test]
fn every_profile_plans() {
    let space = TestSpace::new();
    let file = shipped(&space);
    space.write("posts.jsonl", "{\"id\":\"a\",\"subreddit\":\"\",\"title\":\"\",\"post\":\"p\",\"summary\":\"s\"}\n");
    for profile in ["from-scratch", "stiennon", "agreement", "claude", "openai", "local", "tldr", "study", "paper"] {
        let plan = space.json(&["plan", &file, "--profile", profile, "--json"]);
        assert!(!plan["stages"].as_array().expect("a plan has stages").is_empty(), "{profile}");
    }
    let plan = space.json(&["plan", &file, "--profile", "agreement", "--profile", "agreement-claude", "--json"]);
    assert!(names(&plan["not_needed"]).contains(&"rouge"), "{plan}");
}

#[test]
fn the_papers_profile_has_its_four_arms_at_each_of_its_coefficients() {
    let space = TestSpace::new();
    let file = shipped(&space);
    let plan = space.json(&["plan", &file, "--profile", "paper", "--json"]);
    let stages: Vec<&str> =
        plan["stages"].as_array().expect("a plan has stages").iter().filter_map(|s| s["stage"].as_str()).collect();
    for size in ["s", "m"] {
        for lambda in ["0.005", "0.01", "0.05"] {
            for arm in ["standard", "mean", "pessimistic", "adaptive"] {
                for stage in ["rl", "evaluate"] {
                    let name = format!("{stage}[{size},{lambda},{arm},11]");
                    assert!(stages.contains(&name.as_str()), "{name} is not in {stages:?}");
                }
            }
        }
    }
}

#[test]
fn labelled_comparisons_drop_the_first_sampling_and_keep_what_lies_above() {
    let space = TestSpace::new();
    let file = shipped(&space);
    let plan = space.json(&["plan", &file, "--profile", "stiennon", "--json"]);
    let not_needed = names(&plan["not_needed"]);
    assert!(not_needed.contains(&"pairs") && !not_needed.contains(&"pairs2[301,1]"), "{not_needed:?}");
    let key = |plan: &serde_json::Value, stage: &str| {
        let stages = plan["stages"].as_array().expect("a plan has stages");
        stages.iter().find(|s| s["stage"] == stage).map(|s| s["key"].clone()).expect("the stage is planned")
    };
    let plain = space.json(&["plan", &file, "--json"]);
    assert_eq!(key(&plain, "posts"), key(&plan, "posts"));
}

#[test]
fn a_mistake_is_reported_with_its_location_and_exit_code_2() {
    let cases: &[(&str, &[&str], &str)] = &[
        ("unknown kind", &["--set", "stages.sft.uses=sfft"], "sfft"),
        ("unknown parameter", &["--set", "stages.sft.with.learning_rate=1"], "learning_rate"),
        ("wrong type", &["--set", "stages.sft.with.batch=many"], "batch"),
        ("unknown profile", &["--profile", "stienon"], "stiennon"),
        ("unknown stage in --until", &["--until", "ensembel"], "ensemble"),
        ("unknown stage in --set", &["--set", "stages.sfft.with.lr=1"], "sft"),
        ("unknown matrix value", &["--set", "stages.gold.needs.model=\"sft[xl]\""], "xl"),
        ("wrong artifact type", &["--set", "stages.gold.needs.model=filter"], "Posts"),
        (
            "cycle",
            &["--set", "stages.filter.needs.tokenizer=\"sft[s]\"", "--set", "stages.filter.needs.posts=filter"],
            "filter",
        ),
        ("out of range", &["--set", "stages.rl.with.lambda=-1"], "lambda"),
        ("unused variable", &["--set", "stages.posts.matrix={spare: [1, 2]}"], "spare"),
        (
            "an ensemble's objective and one reward model",
            &["--set", "stages.rl.needs.rewards=\"proxy[${seed},1]\""],
            "the objective `mean` needs an ensemble of reward models; port `rewards` is given a single one\n --> --set:1:25",
        ),
        (
            "an ensemble of one",
            &["--set", "stages.ensemble.needs.members=\"proxy[${seed},1]\""],
            "at least two members",
        ),
        (
            "a constant matched to no adaptive run",
            &["--profile", "study", "--set", "stages.rl.matrix.arm.matched.needs.adaptive=\"rl[mean,${seed}]\""],
            "this one has \"mean\"",
        ),
        ("pairs of one model", &["--set", "stages.pairs.needs.models=\"sft[s]\""], "same_model: true"),
        (
            "agreement of one",
            &["--profile", "agreement", "--set", "stages.agreement.needs.preferences=people"],
            "agrees with none",
        ),
        ("unknown key of the report", &["--set", "report.tunning_seeds=[1]"], "did you mean `tuning_seeds`?"),
        ("wrong type in the report", &["--set", "report.tuning_seeds=1"], "write `tuning_seeds: [1]`"),
    ];
    for (what, arguments, expected) in cases {
        let space = TestSpace::new();
        let file = shipped(&space);
        let out = space.temper(&[&["plan", &file], *arguments].concat());
        let stderr = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2), "{what}: {stderr}");
        assert!(stderr.contains(expected), "{what}: `{expected}` is not in {stderr}");
    }
}

#[test]
fn all_mistakes_are_reported_at_once() {
    let space = TestSpace::new();
    let file = shipped(&space);
    let out =
        space.temper(&["plan", &file, "--set", "stages.sft.with.batch=many", "--set", "stages.gold.uses=reward.trian"]);
    let stderr = text(&out.stderr);
    assert!(stderr.contains("batch") && stderr.contains("reward.train"), "{stderr}");
}

#[test]
fn a_model_that_cannot_be_downloaded_is_named() {
    let space = TestSpace::new();
    let file = shipped(&space);
    let out = space
        .command(&["run", &file, "--profile", "paper", "--until", "base[l]"])
        .env("HF_ENDPOINT", "http://127.0.0.1:9")
        .output()
        .expect("the binary starts");
    let stderr = text(&out.stderr);
    assert_eq!(out.status.code(), Some(3), "{stderr}");
    assert!(stderr.contains("EleutherAI/gpt-j-6b"), "{stderr}");
}

#[test]
fn a_dry_run_runs_nothing() {
    let space = TestSpace::new();
    let file = shipped(&space);
    let out = space.temper(&["run", &file, "--dry-run"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(
        !space.path("cache/runs").exists() || std::fs::read_dir(space.path("cache/runs")).is_ok_and(|d| d.count() == 0)
    );
}

#[test]
fn kinds_and_schema_come_from_the_same_types() {
    let space = TestSpace::new();
    let kinds = space.json(&["kinds", "--json"]);
    let out = space.temper(&["schema"]);
    let schema = text(&out.stdout);
    for kind in kinds.as_array().expect("a list of kinds") {
        let name = kind["kind"].as_str().expect("a kind has a name");
        assert!(schema.contains(&format!("\"{name}\"")), "{name} is not in the schema");
    }
}

/// Standard output of a successful command.
fn printed(space: &TestSpace, arguments: &[&str]) -> String {
    let out = space.temper(arguments);
    assert!(out.status.success(), "{arguments:?}: {}", text(&out.stderr));
    text(&out.stdout)
}

#[test]
fn a_kind_shows_its_ports_values_and_defaults_whatever_it_requires() {
    let space = TestSpace::new();
    let cases: &[(&str, &[&str])] = &[
        (
            "generate.pairs",
            &[
                "  models: Model, one or more\n",
                "  posts: Posts\n",
                "  split: sft | gold | proxy | rl | calibration | valid  (required)\n",
                "    - valid        Held out for evaluation.\n",
                "  temperature: number  (default 1.0)\n",
            ],
        ),
        ("annotate.reference", &["  posts: Posts; optional with `by: facts`\n", "  by: rouge | facts  (required)\n"]),
        ("annotate.claude", &["  pairs: Pairs, one or more", "  max_tokens: integer  (default 1024)\n"]),
        (
            "command",
            &[
                "  any name: any artifact",
                "output\n  <output>\n",
                "  seeded: true | false  (default false)\n",
                "  tables: parquet | jsonl  (default parquet)\n",
            ],
        ),
        (
            "rl.ppo",
            &[
                "  adaptive: PolicyRun; only with `objective: matched`\n",
                "        unit: phase | optimiser  (default phase)\n",
            ],
        ),
    ];
    for (kind, parts) in cases {
        let shown = printed(&space, &["kinds", kind]);
        for part in *parts {
            assert!(shown.contains(part), "{kind}: {part:?} is not in\n{shown}");
        }
    }
    for kind in space.json(&["kinds", "--json"]).as_array().expect("a list of kinds") {
        assert!(kind["signature"].is_object(), "{kind}");
        let undecided = kind["parameters"].as_array().expect("parameters").iter().find(|p| p["type"] == "");
        assert_eq!(undecided, None, "{}", kind["kind"]);
    }
}

#[test]
fn an_artifact_type_shows_its_files_and_columns() {
    let space = TestSpace::new();
    let shown = printed(&space, &["kinds", "--type", "Preferences"]);
    for part in [
        "preferences.parquet\n",
        "  chosen_ids      list<u32>?  ",
        "- truncated: The answer was cut off.\n",
        "`?`: may be null",
    ] {
        assert!(shown.contains(part), "{part:?} is not in\n{shown}");
    }
    assert!(printed(&space, &["kinds", "--type"]).lines().any(|line| line.starts_with("Comparisons ")));
    let types = space.json(&["kinds", "--type", "Posts", "--json"]);
    assert_eq!(types[0]["files"][0]["columns"][0]["name"], "id");
    let out = space.temper(&["kinds", "--type", "Preference"]);
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("did you mean `Preferences`?"), "{}", text(&out.stderr));
}

#[test]
fn what_is_not_needed_is_listed_by_stage() {
    let space = TestSpace::new();
    let file = shipped(&space);
    let plan = printed(&space, &["plan", &file, "--until", "sft[s]"]);
    let line = plan.lines().find(|line| line.starts_with("not needed: ")).expect("something is not needed");
    assert!(line.contains("base (6 of 7), ") && line.contains(", gold, ") && !line.contains('['), "{line}");
    assert!(
        printed(&space, &["plan", &file, "--until", "posts"]).contains("\n1 stage: 1 to run or pending, 0 reused\n")
    );
}

#[test]
fn a_stage_that_is_not_there_is_told_in_terms_of_the_argument() {
    let space = TestSpace::new();
    let file = shipped(&space);
    for command in ["path", "show", "explain"] {
        let out = space.temper(&[command, &file, "sft[x]"]);
        let stderr = text(&out.stderr);
        assert_eq!(out.status.code(), Some(2));
        assert!(stderr.contains("has no value `x`") && stderr.contains("--> STAGE:1:1"), "{stderr}");
        assert!(!stderr.contains("--until"), "{stderr}");
    }
}

#[test]
fn a_change_is_followed_to_the_parameter_or_file_where_it_began() {
    let space = TestSpace::new();
    let three = "version: 1
stages:
  a: { uses: command, with: { run: [sh, a.sh], files: [a.sh], params: { n: 1 }, output: Files } }
  b: { uses: command, needs: { a: a }, with: { run: [sh, -c, 'cp $TEMPER_INPUT_a/x $TEMPER_OUTPUT/x'], output: Files } }
  c: { uses: command, needs: { b: b }, with: { run: [sh, -c, 'cp $TEMPER_INPUT_b/x $TEMPER_OUTPUT/x'], output: Files } }
";
    space.write("a.sh", "echo $TEMPER_PARAMS > $TEMPER_OUTPUT/x");
    space.write("p.yaml", three);
    assert!(space.temper(&["run", "p.yaml"]).status.success());

    space.write("p.yaml", &three.replace("{ n: 1 }", "{ n: 2 }"));
    let explained = || printed(&space, &["explain", "p.yaml", "c"]);
    let pending = explained();
    assert!(pending.contains("input `b` (from `b`): known after `a`"), "{pending}");
    assert!(pending.contains("because of a: run: ") && pending.contains("params.params.n: 1 -> 2\n"), "{pending}");
    assert!(space.temper(&["run", "p.yaml", "--until", "b"]).status.success());
    let known = explained();
    assert!(known.contains("inputs.b (from `b`): ") && known.contains("params.params.n: 1 -> 2\n"), "{known}");

    space.write("a.sh", "echo other > $TEMPER_OUTPUT/x");
    let file = explained();
    assert!(file.contains("params.files (") && file.contains("/a.sh): ") && !file.contains("content"), "{file}");
    let told = space.json(&["explain", "p.yaml", "c", "--json"]);
    assert!(told["causes"][0]["changes"][0]["path"].as_str().is_some_and(|path| path.ends_with("/a.sh")), "{told}");
}

#[test]
fn the_graph_marks_what_is_cached() {
    let space = TestSpace::new();
    space.write("two.yaml", TWO);
    assert!(space.temper(&["run", "two.yaml", "--until", "a"]).status.success());
    let svg = printed(&space, &["graph", "two.yaml", "--format", "svg"]);
    assert!(svg.contains("command · cached") && svg.contains("command · to run"), "{svg}");
    assert_eq!(svg.matches("class=\"ran\"").count(), 1, "{svg}");
}

const TWO: &str = r"
version: 1
stages:
  a: { uses: command, with: { run: [sh, -c, 'echo a > $TEMPER_OUTPUT/x'], output: Files } }
  b: { uses: command, needs: { a: a }, with: { run: [sh, -c, 'cp $TEMPER_INPUT_a/x $TEMPER_OUTPUT/x'], output: Files } }
";

/// Asserts that the output of a command contains no terminal control characters, and returns it.
fn assert_harmless(out: &std::process::Output) -> String {
    let printed = text(&out.stdout) + &text(&out.stderr);
    assert!(!printed.contains(|c: char| c.is_control() && c != '\n' && c != '\t'), "{printed:?}");
    printed
}

#[test]
fn foreign_text_sends_no_controls_to_the_terminal() {
    let space = TestSpace::new();
    space.write(
        "made.sh",
        r#"
printf x > "$TEMPER_OUTPUT/$(printf 'file\033[2J')"
printf '{"metric\\u001b[2J": 1}' > "$TEMPER_OUTPUT/metrics.json"
"#,
    );
    space.write("fails.sh", "printf 'last\\033[2J words\\n' >&2\nexit 1\n");
    space.write("rows\u{1b}[2J.jsonl", "{\"post\": \"p\", \"summary\": \"s\"}\n\u{9b}2J\n");
    space.write(
        "p.yaml",
        r"
version: 1
stages:
  made: { uses: command, with: { run: [sh, made.sh], files: [made.sh], output: Files } }
  fails: { uses: command, with: { run: [sh, fails.sh], files: [fails.sh], output: Files } }
  rows: { uses: dataset.tldr, with: { files: '*.jsonl' } }
",
    );
    let output = assert_harmless(&space.temper(&["run", "p.yaml", "--keep-going"]));
    assert!(output.contains("last\\u{1b}[2J words"), "{output}");
    assert!(output.contains("rows\\u{1b}[2J.jsonl, line 2: "), "{output}");
    let shown = assert_harmless(&space.temper(&["show", "p.yaml", "made"]));
    assert!(shown.contains("file\\u{1b}[2J") && shown.contains("metric\\u{1b}[2J: 1"), "{shown}");
    assert_harmless(&space.temper(&["show", "p.yaml", "made", "--json"]));
    let shown = space.json(&["show", "p.yaml", "made", "--json"]);
    assert_eq!(shown["metrics"]["metric\u{1b}[2J"], 1.0);
    space.write("faulty.yaml", "version: 1\nstages:\n  a: { uses: \"comm\\e[2Jand\" }\n");
    let output = assert_harmless(&space.temper(&["plan", "faulty.yaml"]));
    assert!(output.contains("comm\\u{1b}[2Jand"), "{output}");
    let output = assert_harmless(&space.temper(&["plan", "p.yaml", "rows\u{1b}[2J.jsonl"]));
    assert!(output.contains("rows") && output.contains(".jsonl"), "{output}");
}

#[test]
fn a_byte_order_mark_is_no_part_of_a_pipeline_file_or_of_its_rows() {
    let space = TestSpace::new();
    space.write("posts.jsonl", "\u{feff}{\"post\": \"p\", \"summary\": \"s\"}\r\n");
    let file = "\u{feff}version: 1\r\nstages:\r\n  posts: { uses: dataset.tldr, with: { files: posts.jsonl } }\r\n";
    space.write("p.yaml", file);
    let out = space.temper(&["run", "p.yaml"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    space.write("p.yaml", "\u{feff}versoin: 1\n");
    let out = space.temper(&["plan", "p.yaml"]);
    assert!(text(&out.stderr).contains("p.yaml:1:1"), "{}", text(&out.stderr));
}

#[test]
fn a_warning_stays_in_the_report_when_its_stage_is_reused() {
    let space = TestSpace::new();
    space.write(
        "p.yaml",
        r"
version: 1
stages:
  posts: { uses: dataset.tinytldr, with: { posts: 60 } }
  base: { uses: model.import, with: { asset: tinytldr-s } }
  tokenizer: { uses: tokenizer.import, with: { asset: tinytldr } }
  filter: { uses: dataset.filter, needs: { posts: posts, tokenizer: tokenizer }, with: { validation: 10, calibration: 10, gold: 10, proxy: 10 } }
  sft: { uses: sft, needs: { base: base, posts: filter }, with: { steps: 1, batch: 4, max_prompt_tokens: 40 } }
",
    );
    let report = || {
        let run = space.temper(&["run", "p.yaml"]);
        assert!(run.status.success(), "{}", text(&run.stderr));
        let report = space.json(&["report", "p.yaml", "--json"]);
        let page = std::fs::read_to_string(space.path(report["report"].as_str().expect("a path"))).expect("a page");
        (text(&run.stderr), page)
    };
    let warning = "prompts lost the end of their post to fit";
    let (stderr, page) = report();
    assert!(stderr.contains("sft: warning: ") && stderr.contains(warning), "{stderr}");
    assert!(page.contains(warning), "{page}");
    let (_, page) = report();
    assert!(page.contains(warning), "{page}");
    assert!(text(&space.temper(&["show", "p.yaml", "sft"]).stdout).contains(warning));
}

#[test]
fn a_missing_environment_variable_is_reported_before_anything_runs() {
    let space = TestSpace::new();
    let text_of = |more: &str| TWO.replace("with: { run: [sh, -c, 'cp", &format!("with: {{ {more} run: [sh, -c, 'cp"));
    space.write("two.yaml", &text_of("pass_env: [NO_SUCH_TOKEN_HERE],"));
    let missing = "b: `pass_env`: NO_SUCH_TOKEN_HERE is not set";
    let runs = || std::fs::read_dir(space.path("cache/runs")).map_or(0, Iterator::count);

    let plan = space.temper(&["plan", "two.yaml"]);
    assert!(
        plan.status.success() && text(&plan.stderr).contains(&format!("warning: {missing}")),
        "{}",
        text(&plan.stderr)
    );
    assert_eq!(names(&space.json(&["plan", "two.yaml", "--json"])["warnings"]), [missing]);
    let out = space.temper(&["run", "two.yaml"]);
    assert_eq!((out.status.code(), runs()), (Some(3), 0), "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains(&format!("error: {missing}")), "{}", text(&out.stderr));
    // Stages without requests run without the variable, and so do reused stages, even if their inputs run again.
    assert!(space.temper(&["run", "two.yaml", "--until", "a"]).status.success());
    let out = space.command(&["run", "two.yaml"]).env("NO_SUCH_TOKEN_HERE", "x").output().expect("the binary starts");
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert_eq!(names(&space.json(&["run", "two.yaml", "--json"])["reused"]), ["a", "b"]);
    assert_eq!(names(&space.json(&["run", "two.yaml", "--force", "a", "--json"])["reused"]), ["b"]);
    let out = space.temper(&["run", "two.yaml", "--force", "b"]);
    assert_eq!(out.status.code(), Some(3), "{}", text(&out.stderr));
}

#[test]
fn a_closed_output_pipe_does_not_stop_a_run() {
    let space = TestSpace::new();
    space.write("two.yaml", TWO);
    let (reader, writer) = std::io::pipe().expect("a pipe can be made");
    drop(reader);
    let mut run = space.command(&["run", "two.yaml"]);
    run.stdout(writer.try_clone().expect("a pipe's end can be shared")).stderr(writer);
    let status = run.status().expect("the binary starts");
    assert_eq!(status.code(), Some(0));
    assert_eq!(names(&space.json(&["run", "two.yaml", "--json"])["reused"]), ["a", "b"]);
}

#[test]
fn a_folder_of_something_else_becomes_no_store() {
    let space = TestSpace::new();
    space.write("two.yaml", TWO);
    std::fs::create_dir(space.path("mine")).expect("a folder can be made");
    space.write("mine/thesis.tex", "");
    for (store, expected) in [("mine", "not a store"), ("two.yaml", "found a file")] {
        let out = space.temper(&["run", "two.yaml", "--store", store]);
        assert_eq!(out.status.code(), Some(2), "{}", text(&out.stderr));
        assert!(text(&out.stderr).contains(expected), "{}", text(&out.stderr));
    }
    assert_eq!(std::fs::read_dir(space.path("mine")).expect("it is there").count(), 1);
}

#[test]
fn every_flag_that_names_no_stage_is_reported() {
    let space = TestSpace::new();
    space.write("two.yaml", TWO);
    let out = space.temper(&["run", "two.yaml", "--force", "c", "--force", "dd", "--from", "eee"]);
    assert_eq!(out.status.code(), Some(2));
    assert!(
        ["--force c", "--force dd", "--from eee"].iter().all(|f| text(&out.stderr).contains(f)),
        "{}",
        text(&out.stderr)
    );
    assert_eq!(space.temper(&["run", "two.yaml", "-j", "0"]).status.code(), Some(2));
}

const ONE_STAGE: &str = "version: 1
stages:
  a: { uses: command, with: { run: [sh, -c, 'echo hi > $TEMPER_OUTPUT/x'], output: Files } }
";

#[test]
fn output_to_a_full_device_is_an_error() {
    let space = TestSpace::new();
    space.write("p.yaml", ONE_STAGE);
    for arguments in [
        &["run", "p.yaml", "--json"][..],
        &["run", "p.yaml"],
        &["plan", "p.yaml", "--json"],
        &["show", "p.yaml", "a", "--json"],
        &["show", "p.yaml", "a"],
        &["verify", "--json"],
        &["runs"],
        &["schema"],
        &["--help"],
    ] {
        let full = std::fs::File::options().write(true).open("/dev/full").unwrap();
        let out = space.command(arguments).stdout(full).output().unwrap();
        assert_eq!(out.status.code(), Some(3), "{arguments:?}");
        assert!(text(&out.stderr).contains("error: standard output: No space left on device"), "{arguments:?}");
    }
    // The run itself was executed.
    assert_eq!(space.json(&["plan", "p.yaml", "--json"])["stages"][0]["action"], "reuse");
}

#[test]
fn a_finished_store_that_can_only_be_read_is_run_shown_and_reported() {
    use std::os::unix::fs::PermissionsExt;
    let space = TestSpace::new();
    space.write("p.yaml", ONE_STAGE);
    assert!(space.temper(&["run", "p.yaml"]).status.success());
    let binary = space.path("temper");
    // Copy in another process: if another test forks during the copy, its child would keep the file open for writing,
    // and it could not be executed.
    let copied = std::process::Command::new("cp").arg(env!("CARGO_BIN_EXE_temper")).arg(&binary).status().unwrap();
    assert!(copied.success());
    // There is no index, and a read-only store cannot write a new one.
    std::fs::remove_file(space.path("cache/index")).unwrap();
    std::fs::create_dir(space.path("tmp")).unwrap();
    let mut open = vec![space.path("")];
    while let Some(folder) = open.pop() {
        let entries = std::fs::read_dir(&folder).unwrap();
        open.extend(entries.map(|e| e.unwrap().path()).filter(|path| path.is_dir() && !path.is_symlink()));
        let mode = if folder.ends_with("tmp") { 0o777 } else { 0o555 };
        std::fs::set_permissions(&folder, PermissionsExt::from_mode(mode)).unwrap();
    }
    let temper = |arguments: &[&str]| {
        let mut command = std::process::Command::new(&binary);
        command.args(arguments).current_dir(space.path("")).env_remove("TEMPER_STORE").env("TMPDIR", space.path("tmp"));
        if std::fs::metadata(space.path("p.yaml")).is_ok_and(|m| std::os::unix::fs::MetadataExt::uid(&m) == 0) {
            // Permissions do not bind root.
            std::os::unix::process::CommandExt::uid(&mut command, 65_534);
        }
        let out = command.output().unwrap();
        assert_eq!(out.status.code(), Some(0), "{arguments:?}: {}{}", text(&out.stdout), text(&out.stderr));
        text(&out.stdout) + &text(&out.stderr)
    };
    let ran = temper(&["run", "p.yaml"]);
    assert!(ran.contains("0 ran, 1 reused") && ran.contains("the store cannot be written to"), "{ran}");
    let report = ran.lines().find_map(|line| line.strip_prefix("report: ")).unwrap();
    assert!(report.starts_with(space.path("tmp").to_str().unwrap()), "{ran}");
    assert!(std::fs::read_to_string(report).unwrap().contains("reused"));
    for arguments in [&["show", "p.yaml", "a"][..], &["report", "p.yaml"], &["runs"], &["verify"]] {
        temper(arguments);
    }
    // Restore write permission, so that the folder can be deleted.
    std::fs::set_permissions(space.path(""), PermissionsExt::from_mode(0o755)).unwrap();
    let mut open = vec![space.path("cache")];
    while let Some(folder) = open.pop() {
        std::fs::set_permissions(&folder, PermissionsExt::from_mode(0o755)).unwrap();
        open.extend(std::fs::read_dir(&folder).unwrap().map(|e| e.unwrap().path()).filter(|path| path.is_dir()));
    }
}

#[test]
fn a_journal_with_a_broken_line_or_of_another_sort_does_not_stop_runs() {
    let space = TestSpace::new();
    space.write("p.yaml", ONE_STAGE);
    for _ in 0..2 {
        assert!(space.temper(&["run", "p.yaml"]).status.success());
    }
    let mut runs: Vec<_> = std::fs::read_dir(space.path("cache/runs")).unwrap().map(|e| e.unwrap().path()).collect();
    runs.sort();
    let journal = runs[1].join("journal.jsonl");
    let whole = std::fs::read_to_string(&journal).unwrap();
    std::fs::write(&journal, whole.replacen('\n', "\n{broken\n", 1)).unwrap();
    std::fs::create_dir_all(space.path("cache/runs/0/journal.jsonl")).unwrap();
    let out = space.temper(&["runs"]);
    assert_eq!((out.status.code(), text(&out.stdout).lines().count()), (Some(0), 2), "{}", text(&out.stderr));
    assert!(text(&out.stdout).lines().all(|line| line.contains("0 failed")), "{}", text(&out.stdout));
    assert!(space.temper(&["report", "p.yaml"]).status.success());
    assert!(std::fs::read_to_string(runs[1].join("report.html")).unwrap().contains("line 2 is not an event"));
}

#[test]
fn running_out_of_files_or_threads_is_an_environment_error() {
    let space = TestSpace::new();
    space.write("p.yaml", ONE_STAGE);
    for files in 4..20 {
        let script = format!("ulimit -n {files}; exec {} run p.yaml --force a", env!("CARGO_BIN_EXE_temper"));
        let out = std::process::Command::new("sh")
            .args(["-c", &script])
            .current_dir(space.path(""))
            .env("RUST_BACKTRACE", "0")
            .output()
            .unwrap();
        let stderr = text(&out.stderr);
        assert!(matches!(out.status.code(), Some(0 | 3)), "{files}: {:?}: {stderr}", out.status);
        assert!(!stderr.contains("panicked"), "{files}: {stderr}");
    }
}
