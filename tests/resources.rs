//! What stages share on one machine: threads, memory, GPUs and pools; how long they may take and how often they are tried.

mod space;

use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::process::{Command, Output, Stdio};

use space::{TestSpace, text};

/// Runs `script` in `n` stages that need `resources`.
fn pipeline(space: &TestSpace, file: &str, n: usize, resources: &str, script: &str) {
    let members: Vec<String> = (0..n).map(|n| n.to_string()).collect();
    let (members, folder) = (members.join(", "), space.path("").display().to_string());
    let text = format!(
        r#"
version: 1
pools: {{ license: 2 }}
stages:
  s:
    uses: command
    matrix: {{ n: [{members}] }}
    resources: {resources}
    with:
      run: [sh, -c, 'cd {folder}; {script}; echo $0 > "$TEMPER_OUTPUT/x"', "${{n}}"]
      access: {{ write: [{folder}] }}
      output: Files
"#
    );
    space.write(file, &text);
}

/// Puts an `nvidia-smi` on the PATH that lists `n` GPUs whose ids belong to this test alone.
fn with_gpus(space: &TestSpace, arguments: &[&str], n: usize) -> Command {
    let listed: String = (0..n).map(|n| format!("{n}, {}\\n", gpu(space, n))).collect();
    let program = space.write("nvidia-smi", &format!("#!/bin/sh\nprintf '{listed}'\n"));
    std::fs::set_permissions(&program, PermissionsExt::from_mode(0o755)).expect("it is ours");
    let path = std::env::var("PATH").unwrap_or_default();
    let mut command = space.command(arguments);
    command.env("PATH", format!("{}:{path}", space.path("").display())).env_remove("CUDA_VISIBLE_DEVICES");
    command
}

fn gpu(space: &TestSpace, n: usize) -> String {
    let own = space.path("");
    let own = own.file_name().expect("a name").to_string_lossy().replace(|c: char| !c.is_ascii_alphanumeric(), "");
    format!("GPU-{own}{n}")
}

/// The lock file of a GPU.
fn lock(space: &TestSpace, n: usize) -> String {
    let folder = if std::fs::exists("/dev/shm").is_ok_and(|is| is) { "/dev/shm" } else { "/tmp" };
    format!("{folder}/temper-gpu-{}.lock", gpu(space, n))
}

fn remove_locks(space: &TestSpace, gpus: impl IntoIterator<Item = usize>) {
    gpus.into_iter().map(|n| lock(space, n)).for_each(|lock| std::fs::remove_file(&lock).expect(&lock));
}

fn succeeded(out: &Output) {
    assert!(out.status.success(), "{}{}", text(&out.stdout), text(&out.stderr));
}

fn fails(out: &Output, code: i32, parts: &[&str]) {
    let said = text(&out.stderr);
    assert_eq!(out.status.code(), Some(code), "{}{said}", text(&out.stdout));
    parts.iter().for_each(|part| assert!(said.contains(part), "no {part:?} in: {said}"));
}

#[test]
fn a_gpu_is_never_given_twice_also_across_two_runs() {
    let space = TestSpace::new();
    let script = format!(
        r#"mkdir "in-$CUDA_VISIBLE_DEVICES" || touch twice; echo "$CUDA_VISIBLE_DEVICES" >> used; {}; sleep 0.03; rmdir "in-$CUDA_VISIBLE_DEVICES""#,
        until_full("in", 4)
    );
    pipeline(&space, "p.yaml", 12, "{ gpus: 1 }", &script);
    let runs = ["one", "two"].map(|store| {
        let mut command = with_gpus(&space, &["run", "p.yaml", "-j", "8", "--store", store], 4);
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts")
    });
    runs.into_iter().for_each(|run| succeeded(&run.wait_with_output().expect("it ends")));
    assert!(!space.path("twice").exists(), "two attempts had the same GPU");
    assert!(space.path("full").exists(), "the four GPUs were never in use together");
    let used = std::fs::read_to_string(space.path("used")).expect("every attempt wrote its GPU");
    let all: Vec<String> = (0..4).map(|n| gpu(&space, n)).collect();
    assert_eq!(used.lines().count(), 24);
    assert!(used.lines().all(|id| all.iter().any(|gpu| gpu == id)), "{used}");
    remove_locks(&space, 0..4);
}

#[test]
fn an_attempt_sees_as_many_gpus_as_its_stage_asks_for() {
    let space = TestSpace::new();
    pipeline(&space, "two.yaml", 1, "{ gpus: 2 }", r#"echo "$CUDA_VISIBLE_DEVICES" > visible"#);
    succeeded(&with_gpus(&space, &["run", "two.yaml"], 3).output().expect("it starts"));
    let visible = || std::fs::read_to_string(space.path("visible")).expect("the attempt wrote it");
    assert_eq!(visible().trim(), format!("{},{}", gpu(&space, 0), gpu(&space, 1)));
    remove_locks(&space, 0..2);
    for resources in ["{ gpus: 0 }", "{}"] {
        pipeline(&space, "none.yaml", 1, resources, r#"echo "none:$CUDA_VISIBLE_DEVICES" > visible"#);
        let mut command = space.command(&["run", "none.yaml", "--force", "s"]);
        succeeded(&command.env("CUDA_VISIBLE_DEVICES", "0,1").output().expect("it starts"));
        assert_eq!(visible().trim(), "none:", "{resources}");
    }
}

#[test]
fn a_stage_waits_for_a_gpu_that_another_process_holds() {
    let space = TestSpace::new();
    pipeline(&space, "p.yaml", 1, "{ gpus: 1 }", r#"echo "$CUDA_VISIBLE_DEVICES" > visible"#);
    let held = std::fs::File::create(lock(&space, 2)).expect("a lock file");
    held.lock().expect("a lock");
    let run = |visible| {
        let mut command = with_gpus(&space, &["run", "p.yaml", "--force", "s", "--json"], 3);
        command.env("CUDA_VISIBLE_DEVICES", visible).stdout(Stdio::piped());
        command.spawn().expect("it starts")
    };
    let visible = || std::fs::read_to_string(space.path("visible")).expect("the attempt wrote it");
    succeeded(&run("2,1").wait_with_output().expect("it ends"));
    assert_eq!(visible().trim(), gpu(&space, 1));
    let mut waiting = run("2");
    let lines = BufReader::new(waiting.stdout.take().expect("a pipe")).lines();
    let mut held = Some(held);
    for line in lines {
        if line.expect("a line").contains("other runs on this machine hold") {
            drop(held.take());
        }
    }
    assert!(held.is_none(), "it did not wait");
    assert!(waiting.wait().expect("it ends").success());
    assert_eq!(visible().trim(), gpu(&space, 2));
    remove_locks(&space, [1, 2]);
}

/// Waits, the first time, until `n` folders with this prefix are there: so many attempts run at once. Gives up after a while.
fn until_full(prefix: &str, n: usize) -> String {
    let full = format!("[ $(ls -d {prefix}-* | wc -l) -ge {n} ] && touch full");
    format!("for i in $(seq 100); do [ -e full ] && break; {full}; sleep 0.05; done")
}

/// At most `n` of these scripts may run at a time, and so many must once.
fn at_most(n: usize) -> String {
    let tries: Vec<String> = (0..n).map(|n| format!("{{ mkdir at-{n} 2>/dev/null && d=at-{n}; }}")).collect();
    format!("{} || touch too-many; {}; sleep 0.05; rmdir $d", tries.join(" || "), until_full("at", n))
}

#[test]
fn pools_and_memory_limit_how_many_attempts_run_at_a_time() {
    for (resources, most) in
        [("{ pools: { license: 1 } }", 2), ("{ pools: { license: 2 } }", 1), ("{ memory: 400M }", 2)]
    {
        let space = TestSpace::new();
        pipeline(&space, "p.yaml", 6, resources, &at_most(most));
        succeeded(&space.temper(&["run", "p.yaml", "-j", "6", "--memory", "1G"]));
        assert!(!space.path("too-many").exists(), "{resources}");
        assert!(space.path("full").exists(), "{resources}: fewer ran at a time than may");
    }
}

#[test]
fn a_stage_with_more_threads_than_there_are_gets_all_of_them() {
    let space = TestSpace::new();
    pipeline(&space, "p.yaml", 2, "{ threads: 64 }", &format!("{}; echo $OMP_NUM_THREADS > threads", at_most(1)));
    succeeded(&space.temper(&["run", "p.yaml", "-j", "2"]));
    assert_eq!(std::fs::read_to_string(space.path("threads")).expect("written").trim(), "2");
    assert!(!space.path("too-many").exists());
}

#[test]
fn a_stage_that_can_never_fit_is_an_error_before_anything_runs() {
    for (resources, parts) in [
        ("{ gpus: 5 }", ["s[0], s[1]: needs 5 GPUs and only 4 are visible here", "help:"]),
        ("{ memory: 900T }", ["s[0], s[1]: needs 921600G of memory and this machine has", "help:"]),
    ] {
        let space = TestSpace::new();
        pipeline(&space, "p.yaml", 2, resources, "touch ran");
        fails(&with_gpus(&space, &["run", "p.yaml"], 4).output().expect("it starts"), 3, &parts);
        assert!(!space.path("ran").exists());
        let plan = with_gpus(&space, &["plan", "p.yaml"], 4).output().expect("it starts");
        succeeded(&plan);
        assert!(text(&plan.stderr).contains(parts[0]), "{}", text(&plan.stderr));
    }
    let space = TestSpace::new();
    for (resources, part) in [
        ("{ pools: { license: 3 } }", "3 of pool `license`, which has 2: the stage can never run"),
        ("{ pools: { licence: 1 } }", "did you mean `license`?"),
        ("{ pools: [license] }", "expected a map of pools to numbers, found a list"),
        ("{ pools: { license: 0 } }", "expected a whole number from 1"),
    ] {
        pipeline(&space, "p.yaml", 1, resources, "touch ran");
        fails(&space.temper(&["run", "p.yaml"]), 2, &[part]);
    }
}

#[test]
fn a_failing_nvidia_smi_is_an_error_of_the_environment() {
    let space = TestSpace::new();
    pipeline(&space, "p.yaml", 1, "{ gpus: 1 }", "touch ran");
    let mut command = with_gpus(&space, &["run", "p.yaml"], 1);
    space.write("nvidia-smi", "#!/bin/sh\necho 'Driver/library version mismatch'; exit 18\n");
    fails(&command.output().expect("it starts"), 3, &["`nvidia-smi` failed", "Driver/library version mismatch"]);
}

#[test]
fn a_stage_is_tried_again_as_often_as_it_says() {
    let space = TestSpace::new();
    let fails_once = "echo x >> tries; test $(wc -l < tries) -gt 1 || exit 1";
    pipeline(&space, "p.yaml", 1, "{}\n    retries: 1", fails_once);
    succeeded(&space.temper(&["run", "p.yaml"]));
    let space = TestSpace::new();
    pipeline(&space, "p.yaml", 1, "{}", fails_once);
    assert!(!space.temper(&["run", "p.yaml"]).status.success(), "without `retries` a program's failure is final");
}

#[test]
fn an_attempt_that_takes_longer_than_its_timeout_is_ended() {
    let space = TestSpace::new();
    pipeline(&space, "p.yaml", 1, "{}\n    timeout: 0.2", "sleep 60");
    fails(&space.temper(&["run", "p.yaml"]), 3, &["s[0]: the attempt exceeded the stage's `timeout`", "run again"]);
    pipeline(&space, "p.yaml", 1, "{}\n    timeout: 0", "sleep 60");
    fails(&space.temper(&["run", "p.yaml"]), 2, &["`timeout`: expected a duration"]);
    pipeline(&space, "p.yaml", 1, "{}\n    timeout: 1h\n    retries: few", "true");
    fails(&space.temper(&["run", "p.yaml"]), 2, &["`retries`: expected a whole number"]);
}

#[test]
fn memory_is_expected_before_anything_has_run_and_follows_the_models_sizes() {
    let space = TestSpace::new();
    std::fs::copy(space::repository("pipeline.yaml"), space.path("pipeline.yaml")).unwrap();
    let memory = |set: &str| -> Vec<(String, String, Option<f64>)> {
        let plan = space.json(&["plan", "pipeline.yaml", "--json", "--set", set]);
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        let stages = plan["stages"].as_array().unwrap().iter();
        stages.map(|s| (text(&s["stage"]), text(&s["kind"]), s["expected_memory_bytes"].as_f64())).collect()
    };
    let base = memory("seed=1");
    let of = |plan: &[(String, String, Option<f64>)], name: &str| {
        plan.iter().find(|(stage, ..)| stage == name).and_then(|(.., memory)| *memory).unwrap()
    };
    let uses_model = ["model.", "sft", "reward.", "rl.", "evaluate", "generate.best_of_n", "annotate.gold"];
    let mut known = 0;
    for (stage, kind, memory) in &base {
        if !uses_model.iter().any(|with| kind.starts_with(with)) {
            continue;
        }
        let memory = memory.unwrap_or_else(|| panic!("{stage}: the memory is unknown"));
        assert!((5e7..2e10).contains(&memory), "{stage}: {memory}");
        known += 1;
    }
    assert!(known > 40, "{known}");
    assert!(of(&base, "sft[s]") < of(&base, "sft[m]") && of(&base, "sft[m]") < of(&base, "sft[l]"));
    assert!(of(&memory("stages.sft.with.batch=1"), "sft[s]") < of(&base, "sft[s]"));
}
