//! `init`, `config`, `doctor`, `completions` and `man`, as a user runs them.

mod space;

use engine::graph::{Graph, LoadOptions};
use space::hub::FakeServer;
use space::{TestSpace, names, repository, text};

#[test]
fn completions_offer_every_public_command_in_every_shell() {
    let space = TestSpace::new();
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let out = space.temper(&["completions", shell]);
        let script = text(&out.stdout);
        assert!(out.status.success(), "{shell}: {}", text(&out.stderr));
        let offered = ["doctor", "init", "logprobs", "checkpoint-every"];
        assert!(offered.iter().all(|word| script.contains(word)), "{shell}: {script}");
        assert!(!script.contains("attempt at an instance") && !script.contains("temper,attempt"), "{shell}: {script}");
    }
    let out = space.temper(&["completions", "tcsh"]);
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("bash, elvish, fish, powershell, zsh"), "{}", text(&out.stderr));
}

#[test]
fn manual_pages_exist_for_every_public_command() {
    let space = TestSpace::new();
    let page = text(&space.temper(&["man"]).stdout);
    assert!(
        page.contains(".TH temper 1") && page.contains("temper\\-doctor(1)") && page.contains("130 interrupted"),
        "{page}"
    );
    let out = space.temper(&["man", "share/man1"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    for name in ["temper", "temper-run", "temper-init", "temper-lm-score"] {
        assert!(space.path(&format!("share/man1/{name}.1")).is_file(), "{name}");
    }
    assert!(!space.path("share/man1/temper-attempt.1").exists());
    space.write("file", "");
    let out = space.temper(&["man", "file"]);
    assert_eq!((out.status.code(), text(&out.stderr).trim_end()), (Some(2), "error: file: not a folder"));
}

#[test]
fn a_new_pipeline_plans_with_each_profile_and_names_its_schema() {
    let space = TestSpace::new();
    let out = space.temper(&["init", "a/study"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    assert!(text(&out.stdout).ends_with("run it: temper run a/study/pipeline.yaml\n"), "{}", text(&out.stdout));
    let read = |name: &str| std::fs::read_to_string(space.path("a/study").join(name)).expect("init has written it");
    let file = read("pipeline.yaml");
    let schema = file.lines().next().and_then(|line| line.strip_prefix("# yaml-language-server: $schema="));
    assert_eq!(read(schema.expect("the first line names a schema")), text(&space.temper(&["schema"]).stdout));
    assert!(read(".gitignore").contains("/cache/\n"));
    for profile in [&[][..], &["--profile", "longer"]] {
        let plan = space.json(&[&["plan", "a/study/pipeline.yaml", "--json"], profile].concat());
        assert_eq!(names(&plan["not_needed"]), [""; 0], "a stage that nothing needs");
        assert!(plan["stages"].as_array().is_some_and(|stages| stages.len() > 15), "{plan}");
    }
}

#[test]
fn init_overwrites_nothing_and_leaves_nothing_half_done() {
    let space = TestSpace::new();
    assert!(space.temper(&["init"]).status.success());
    let mine = "version: 1\nstages: { mine: { uses: dataset.tinytldr } }\n";
    space.write("pipeline.yaml", mine);
    let out = space.temper(&["init", "."]);
    assert_eq!(out.status.code(), Some(2));
    let told = "pipeline.yaml, pipeline.schema.json, .gitignore already exist: nothing was created";
    assert!(text(&out.stderr).contains(told), "{}", text(&out.stderr));
    assert_eq!(std::fs::read_to_string(space.path("pipeline.yaml")).expect("it is there"), mine);

    std::fs::create_dir(space.path("repository")).expect("a folder can be made");
    space.write("repository/.gitignore", "/target\n");
    let out = space.temper(&["init", "repository"]);
    assert_eq!(out.status.code(), Some(2));
    assert!(text(&out.stderr).contains("repository/.gitignore already exists"), "{}", text(&out.stderr));
    assert_eq!(std::fs::read_dir(space.path("repository")).expect("it is there").count(), 1);

    // A folder that cannot be made, and a path that is a file.
    for (folder, code) in [("pipeline.yaml/study", 3), ("pipeline.yaml", 2)] {
        let out = space.temper(&["init", folder]);
        assert_eq!(out.status.code(), Some(code), "{}", text(&out.stderr));
        assert!(text(&out.stderr).contains("pipeline.yaml"), "{}", text(&out.stderr));
    }
}

/// The graph of a file in `space`, under a name that does not depend on the file's.
fn graph(space: &TestSpace, file: &str, profiles: &[&str], set: &[&str]) -> Graph {
    let owned = |texts: &[&str]| texts.iter().map(|text| (*text).to_owned()).collect();
    let options = LoadOptions { profiles: owned(profiles), set: owned(set), ..LoadOptions::default() };
    let graph = engine::graph::load(&space.path(file), &options, &stages::registry());
    Graph { name: String::new(), ..graph.unwrap_or_else(|faults| panic!("{file}: {faults}")) }
}

#[test]
fn the_effective_pipeline_reads_back_to_the_same_graph_and_keys() {
    let space = TestSpace::new();
    std::fs::copy(repository("pipeline.yaml"), space.path("pipeline.yaml")).expect("it is part of the repository");
    space.write("posts.jsonl", "{\"id\":\"a\",\"subreddit\":\"\",\"title\":\"\",\"post\":\"p\",\"summary\":\"s\"}\n");
    space.write(
        "odd.yaml",
        r#"
version: 1
stages:
  a:
    uses: command
    matrix: { x: [0x10, 1.0e-3, 007, "5", True], y: { '1': {}, 2: { with: { params: { more: null } } }, 3.0e1: } }
    with: { run: [echo, "${x}", "$${y} ${y}", "two\nlines", "\e[2J\u202e"], params: { x: "${x}", y: "${y}" }, output: Files }
  b: { uses: command, needs: { '1': "a[1.0e-3,3.0e1]" }, with: { run: [cat], output: Files } }
  c: { uses: command, needs: { b: b }, with: { run: [cat], output: Files } }
  e: { uses: command, with: { run: [echo], output: Files } }
profiles:
  fewer: { stages: { c: null } }
  more: { stages: { d: { uses: command, with: { run: [date], output: Files } } } }
"#,
    );
    let lr = "stages.sft.with.lr=2e-4";
    let cases: &[(&str, &[&str], &[&str])] = &[
        ("pipeline.yaml", &[], &[]),
        ("pipeline.yaml", &[], &[lr, "seed=0x1d", "stages.posts.with.posts=0x2ee0", "targets=[gold, 'sft[m]']"]),
        ("pipeline.yaml", &["from-scratch"], &[]),
        ("pipeline.yaml", &["stiennon"], &[lr]),
        ("pipeline.yaml", &["agreement"], &[]),
        ("pipeline.yaml", &["agreement", "agreement-claude"], &[]),
        ("pipeline.yaml", &["claude"], &[]),
        ("pipeline.yaml", &["tldr"], &[]),
        ("pipeline.yaml", &["study"], &[]),
        ("pipeline.yaml", &["paper"], &[]),
        ("odd.yaml", &[], &[]),
        ("odd.yaml", &["more"], &["stages.a.matrix.x=[1.50, 2_0, '0x1']"]),
        ("odd.yaml", &["fewer"], &[]),
    ];
    for (file, profiles, set) in cases {
        let told = || format!("{file} {profiles:?} {set:?}");
        let mut changes = Vec::new();
        profiles.iter().for_each(|profile| changes.extend(["--profile", *profile]));
        set.iter().for_each(|set| changes.extend(["--set", *set]));
        // `b` of the odd pipeline names labels that the other matrix has not.
        if set.iter().any(|set| set.starts_with("stages.a.matrix")) {
            changes.extend(["--set", "stages.b.needs.1=a"]);
        }
        let sets: Vec<&str> = changes.chunks(2).filter(|pair| pair[0] == "--set").map(|pair| pair[1]).collect();
        let out = space.temper(&[&["config", file], &changes[..]].concat());
        assert!(out.status.success(), "{}: {}", told(), text(&out.stderr));
        assert!(!text(&out.stdout).contains("profiles:"), "{}", told());
        space.write("effective.yaml", &text(&out.stdout));
        assert_eq!(graph(&space, "effective.yaml", &[], &[]), graph(&space, file, profiles, &sets), "{}", told());
        let before = space.json(&[&["plan", file, "--json"], &changes[..]].concat());
        assert_eq!(space.json(&["plan", "effective.yaml", "--json"]), before, "{}", told());
        // What is effective is all there is to it.
        let again = space.temper(&["config", "effective.yaml"]);
        assert_eq!(text(&again.stdout), text(&out.stdout), "{}", told());
    }
    let out = space.temper(&["config", "pipeline.yaml", "--profile", "stdy"]);
    assert_eq!((out.status.code(), text(&out.stdout).as_str()), (Some(2), ""));
    assert!(text(&out.stderr).contains("did you mean `study`?"), "{}", text(&out.stderr));
}

/// `temper doctor` with services that cannot be reached and secrets in the environment.
fn doctor(space: &TestSpace, arguments: &[&str], hub: &str) -> (Option<i32>, String) {
    let mut command = space.command(&[&["doctor"], arguments].concat());
    command.env("HF_ENDPOINT", hub).env("ANTHROPIC_BASE_URL", "http://user:pass-word@127.0.0.1:9");
    command.env("HF_TOKEN", "hf_hidden").env("ANTHROPIC_API_KEY", "sk-hidden").env("NO_PROXY", "127.0.0.1");
    command.env_remove("ANTHROPIC_API_KEY_FILE");
    let out = command.output().expect("the binary starts");
    let printed = text(&out.stdout) + &text(&out.stderr);
    assert!(!printed.contains("hidden") && !printed.contains("pass-word"), "a secret is printed: {printed}");
    (out.status.code(), printed)
}

const OFFLINE: &str = "http://127.0.0.1:9";
const LOCAL: &str =
    "version: 1\nstages: { a: { uses: command, with: { run: [sh, -c, ': > $TEMPER_OUTPUT/x'], output: Files } } }\n";

#[test]
fn offline_and_without_a_store_the_doctor_warns_and_changes_nothing() {
    let space = TestSpace::new();
    let (code, told) = doctor(&space, &[], OFFLINE);
    assert_eq!(code, Some(0), "{told}");
    for line in [
        "ok       threads",
        "ok       store",
        "warning  hub",
        "warning  Claude",
        "ANTHROPIC_API_KEY is set",
        "0 errors, ",
    ] {
        assert!(told.contains(line), "`{line}` is not in {told}");
    }
    assert_eq!(std::fs::read_dir(space.path("")).expect("it is there").count(), 0);
    let (code, told) = doctor(&space, &["--json"], OFFLINE);
    let told: serde_json::Value = serde_json::from_str(&told).expect("JSON");
    let hub = told["checks"].as_array().and_then(|all| all.iter().find(|check| check["subject"] == "hub"));
    assert_eq!(
        (code, &told["errors"], &hub.expect("the hub is checked")["status"]),
        (Some(0), &0.into(), &"warning".into())
    );
}

#[test]
fn the_hub_is_asked_without_a_token() {
    let (space, hub) = (TestSpace::new(), FakeServer::new());
    let (code, told) = doctor(&space, &[], &hub.address);
    assert!(code == Some(0) && told.contains(&format!("{}/ answers (status 404)", hub.address)), "{told}");
    assert!(
        hub.requests().iter().all(|request| request.token.is_none()) && hub.requests().len() == 1,
        "{:?}",
        hub.requests()
    );
}

#[test]
fn the_doctor_of_a_pipeline_finds_what_would_stop_its_run() {
    let space = TestSpace::new();
    space.write("local.yaml", LOCAL);
    space.write("faulty.yaml", "version: 1\nstages: { a: { uses: comand } }\n");
    space.write("needy.yaml", &LOCAL.replace("output: Files", "pass_env: [NO_SUCH_TOKEN_HERE], output: Files"));
    let imported = "version: 1\nstages: { base: { uses: model.import, with: { hub: { id: a/b } } } }\n";
    space.write("online.yaml", imported);
    std::fs::create_dir(space.path("mine")).expect("a folder can be made");
    space.write("mine/thesis.tex", "");
    std::fs::create_dir(space.path("newer")).expect("a folder can be made");
    space.write("newer/version", "99\n");
    let cases: &[(&[&str], i32, &str)] = &[
        (&["local.yaml"], 0, "1 stage, 1 to run"),
        (&["local.yaml", "--profile", "none"], 2, "unknown profile `none`"),
        (&["--profile", "none"], 2, "need a pipeline file"),
        (&["faulty.yaml"], 2, "did you mean `command`?"),
        (&["gone.yaml"], 2, "gone.yaml"),
        (&["needy.yaml"], 3, "NO_SUCH_TOKEN_HERE is not set"),
        (&["online.yaml"], 3, "needed by base"),
        (&["local.yaml", "--store", "mine"], 2, "not a store"),
        (&["--store", "mine"], 2, "not a store"),
        (&["--store", "newer"], 2, "version 99"),
        (&["--store", "local.yaml"], 2, "found a file"),
    ];
    for (arguments, code, told) in cases {
        let (found, printed) = doctor(&space, arguments, OFFLINE);
        assert_eq!(found, Some(*code), "{arguments:?}: {printed}");
        assert!(printed.contains(told), "{arguments:?}: `{told}` is not in {printed}");
    }
    assert!(space.temper(&["run", "local.yaml"]).status.success());
    let (code, told) = doctor(&space, &["local.yaml"], OFFLINE);
    let lines = [
        "1 stage, 0 to run",
        "version 1, 1 record",
        "locks and hard links work",
        "not used by any stage that would run",
    ];
    assert!(code == Some(0) && lines.iter().all(|line| told.contains(line)), "{told}");
    assert_eq!(std::fs::read_dir(space.path("mine")).expect("it is there").count(), 1);
}

#[test]
fn a_device_that_does_not_exist_is_refused_before_anything_runs() {
    let space = TestSpace::new();
    let file = repository("pipeline.yaml");
    for (device, told) in [("gpu", "is no device; expected cpu, portable, cuda"), ("cuda:x", "no device number")] {
        let out = space.temper(&["run", &file.to_string_lossy(), "--store", "store", "--device", device]);
        assert_eq!(out.status.code(), Some(2), "{}", text(&out.stderr));
        assert!(text(&out.stderr).contains(told), "{}", text(&out.stderr));
        assert!(!text(&out.stdout).contains("started"), "{}", text(&out.stdout));
    }
}
