//! Tests of `annotate.claude` and `annotate.openai` through the real binary against a local API server: killed runs, lost
//! replies, money.

mod space;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use fake_api::{Api, Fault, KEY, Line, Rules};
use serde_json::Value;
use space::{TestSpace, text};

/// A space with 40 pairs, judged with the parameters in `with`.
fn space(with: &str) -> TestSpace {
    let space = TestSpace::new();
    space.write(
        "p.yaml",
        &format!(
            "version: 1
stages:
  posts: {{ uses: dataset.tinytldr, with: {{ posts: 100 }} }}
  tokenizer: {{ uses: tokenizer.import, with: {{ asset: tinytldr }} }}
  pairs: {{ uses: generate.contrast, needs: {{ posts: posts, tokenizer: tokenizer }}, with: {{ pairs: 40, split: null }} }}
  annotate: {{ uses: annotate.claude, needs: {{ pairs: pairs }}, with: {{ model: claude-sonnet-4-6, swap_share: 0, repeat_share: 0, {with} }} }}
"
        ),
    );
    space
}

fn command(space: &TestSpace, api: &Api, arguments: &[&str]) -> Command {
    let mut command = space.command(arguments);
    command.env("ANTHROPIC_API_KEY", KEY).env("ANTHROPIC_BASE_URL", &api.address).env("JUDGE_KEY", KEY);
    command.env("TEMPER_BATCH_POLL", "0.02").env("TEMPER_BATCH_GIVE_UP", "60");
    command
}

fn temper(space: &TestSpace, api: &Api, arguments: &[&str]) -> Output {
    command(space, api, arguments).output().expect("the binary starts")
}

/// Starts a run and kills it with all its processes when the server's count `of` reaches `n`.
fn killed_when(space: &TestSpace, api: &Api, n: usize, of: impl Fn(&Api) -> usize) {
    let mut run = command(space, api, &["run", "p.yaml"]);
    let mut run = run.stdout(Stdio::null()).stderr(Stdio::null()).spawn().expect("the binary starts");
    api.wait_until(n, of);
    // The run may have ended by itself; the caller's counts would show that.
    let _ = run.kill();
    run.wait().expect("it ends");
}

/// Files below a folder that contain the key.
fn leaks(folder: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let below = |path: PathBuf| match path.is_dir() {
        true => leaks(&path),
        false => Vec::from_iter(Some(path).filter(|path| text(&std::fs::read(path).unwrap_or_default()).contains(KEY))),
    };
    entries.flat_map(below).collect()
}

#[track_caller]
fn assert_paid_once(out: &Output, space: &TestSpace, api: &Api) {
    assert!(out.status.success(), "{}{}", text(&out.stdout), text(&out.stderr));
    assert_eq!(api.paid_twice(), [""; 0]);
    let shown = space.json(&["show", "p.yaml", "annotate", "--json"]);
    assert_eq!(shown["metrics"]["rows"], 40.0, "{shown}");
    assert_eq!(shown["metrics"]["labelled"], 40.0, "{shown}");
    assert_eq!(leaks(&space.path(".")), [""; 0].map(PathBuf::from));
}

#[test]
fn a_run_killed_while_its_batch_is_under_way_goes_on_with_that_batch() {
    let space = space("mode: batch");
    // The batch ends only after more status requests than the first run can make.
    let api = Api::new(Rules { looks: 40, ..Rules::default() });
    killed_when(&space, &api, 1, Api::creates);
    let out = temper(&space, &api, &["run", "p.yaml"]);
    assert_paid_once(&out, &space, &api);
    assert_eq!(api.creates(), 1);
    // All requests are answered by then, so no others can cost anything.
    assert!(!text(&out.stderr).contains("will cost"), "{}", text(&out.stderr));
}

#[test]
fn a_batch_whose_reply_is_lost_and_whose_client_is_killed_is_found_by_the_next_run() {
    let space = space("mode: batch");
    let lost = |_: usize, _: &Value| Some(Fault::Stalled);
    let api = Api::new(Rules { create: Box::new(lost), looks: 5, ..Rules::default() });
    api.create_foreign_batch(20);
    killed_when(&space, &api, 1, Api::creates);
    let out = temper(&space, &api, &["run", "p.yaml"]);
    assert_paid_once(&out, &space, &api);
    assert_eq!(api.creates(), 1);
}

#[test]
fn a_batch_that_was_never_created_is_sent_again_a_limited_number_of_times() {
    let failing = |times: usize| {
        let fault = move |n: usize, _: &Value| (n < times).then(|| Fault::status(500, "api_error"));
        let api = Api::new(Rules { create: Box::new(fault), ..Rules::default() });
        let space = space("mode: batch");
        let out = command(&space, &api, &["run", "p.yaml"]).env("TEMPER_BATCH_GIVE_UP", "0.1").output();
        (space, api, out.expect("the binary starts"))
    };
    let (space, api, out) = failing(2);
    assert_paid_once(&out, &space, &api);
    assert_eq!(api.creates(), 3);
    let (_, api, out) = failing(9);
    assert_eq!((out.status.code(), api.creates(), api.paid_messages()), (Some(3), 3, 0));
    let expected = "no batch was created: requests were sent 3 times and not answered";
    assert!(text(&out.stderr).contains(expected), "{}", text(&out.stderr));
}

#[test]
fn unanswered_requests_of_a_batch_are_sent_again_and_refused_ones_singly() {
    let space = space("mode: batch");
    let line = |n: usize, _: &Value| match n {
        0..5 => Line::Expired,
        5 => Line::Errored("overloaded_error", "try later"),
        6 => Line::Errored("invalid_request_error", "something in it"),
        7 => Line::Missing,
        _ => Line::Succeeded,
    };
    let api = Api::new(Rules { line: Box::new(line), ..Rules::default() });
    assert_paid_once(&temper(&space, &api, &["run", "p.yaml"]), &space, &api);
    assert_eq!(api.creates(), 2);
}

#[test]
fn a_batch_that_somebody_cancels_stops_the_run_and_the_next_one_asks_the_rest() {
    let space = space("mode: batch");
    let line = |n: usize, _: &Value| if n < 7 { Line::Canceled } else { Line::Succeeded };
    let api = Api::new(Rules { line: Box::new(line), ..Rules::default() });
    let out = temper(&space, &api, &["run", "p.yaml"]);
    let stderr = text(&out.stderr);
    assert_eq!(out.status.code(), Some(3), "{stderr}");
    assert!(stderr.contains("a batch was canceled: 7 of its requests have no answer"), "{stderr}");
    assert_paid_once(&temper(&space, &api, &["run", "p.yaml"]), &space, &api);
}

#[test]
fn a_run_killed_between_single_requests_asks_only_for_the_rest() {
    let space = space("documents_per_request: 1");
    let slow = std::time::Duration::from_millis(20);
    let api = Api::new(Rules { latency: slow, ..Rules::default() });
    killed_when(&space, &api, 20, Api::paid_messages);
    let killed_at = api.paid_messages();
    let out = temper(&space, &api, &["run", "p.yaml"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    // Requests in flight when the run was killed are lost: eight at most.
    assert!(api.paid_twice().len() <= 8, "{:?}", api.paid_twice());
    assert!(killed_at < 40, "it was not killed in the middle");
}

#[test]
fn requests_in_flight_when_a_run_was_killed_count_against_the_limit() {
    let space = space("documents_per_request: 1, max_tokens: 100, max_cost: 0.1");
    let latency = std::time::Duration::from_millis(30);
    let api = Api::new(Rules { latency, cacheable: usize::MAX, ..Rules::default() });
    assert!(temper(&space, &api, &["run", "p.yaml", "--until", "pairs"]).status.success());
    for n in [4, 8, 12] {
        killed_when(&space, &api, n, Api::paid_messages);
    }
    let out = temper(&space, &api, &["run", "p.yaml"]);
    assert_eq!(out.status.code(), Some(3), "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains("of it perhaps"), "{}", text(&out.stderr));
    let (sent, got) = api.paid_tokens();
    let dollars = (3.0 * sent as f64 + 15.0 * got as f64) / 1e6;
    assert!(dollars > 0.03 && dollars <= 0.1, "{dollars}");
}

#[test]
fn two_runs_at_once_one_in_batches_and_one_not_pay_once() {
    let space = space("documents_per_request: 2");
    let latency = std::time::Duration::from_millis(10);
    let api = Api::new(Rules { looks: 10, latency, ..Rules::default() });
    assert!(temper(&space, &api, &["run", "p.yaml", "--until", "pairs"]).status.success());
    // Two stage keys with the same requests.
    let sets = [["mode=batch", "max_unlabelled=0.1"], ["mode=single", "max_unlabelled=0.2"]];
    let runs = sets.map(|sets| {
        let [one, other] = sets.map(|set| format!("stages.annotate.with.{set}"));
        let mut run = command(&space, &api, &["run", "p.yaml", "--set", &one, "--set", &other]);
        std::thread::spawn(move || run.output().expect("the binary starts"))
    });
    for run in runs {
        let out = run.join().expect("the thread ends");
        assert!(out.status.success(), "{}", text(&out.stderr));
    }
    assert_eq!((api.paid_documents(), api.paid_twice()), (40, vec![]));
}

#[test]
fn the_plan_shows_the_cost_and_the_limit_stops_before_it_is_passed() {
    let space = space("documents_per_request: 1, max_tokens: 100, max_cost: 0.1");
    let api = Api::new(Rules { cacheable: 100_000, ..Rules::default() });
    let unknown = space.json(&["plan", "p.yaml", "--json"]);
    let cost = |plan: &Value| {
        let stages = plan["stages"].as_array().expect("stages").clone();
        stages.into_iter().find(|stage| stage["stage"] == "annotate").expect("the stage")["cost"].clone()
    };
    assert_eq!(cost(&unknown)["unknown"], "known after pairs");
    assert!(temper(&space, &api, &["run", "p.yaml", "--until", "pairs"]).status.success());
    let before = cost(&space.json(&["plan", "p.yaml", "--json"]))["known"].clone();
    assert!(before["requests"].as_u64().is_some_and(|n| n >= 40), "{before}");
    assert!(before["dollars"]["low"].as_f64() < before["dollars"]["high"].as_f64(), "{before}");
    assert!(before["notes"].to_string().contains("before a pilot of 20 requests"), "{before}");

    let out = temper(&space, &api, &["run", "p.yaml"]);
    let stderr = text(&out.stderr);
    assert_eq!(out.status.code(), Some(3), "{stderr}");
    assert!(stderr.contains("max_cost: $0.") && stderr.contains("of $0.1 are spent"), "{stderr}");
    let stopped = api.paid_messages();
    assert!(stopped > 2 && stopped < 40, "{stopped}");
    // A second run spends nothing more, since earlier spending counts.
    assert_eq!(temper(&space, &api, &["run", "p.yaml"]).status.code(), Some(3));
    assert_eq!(api.paid_messages(), stopped);

    // A higher limit does not change the stage's key: kept answers stay valid.
    let raised = ["--set", "stages.annotate.with.max_cost=5"];
    let out = temper(&space, &api, &[&["run", "p.yaml"][..], &raised].concat());
    assert_paid_once(&out, &space, &api);
    let page = std::fs::read_dir(space.path("cache/runs")).expect("runs").flatten().map(|entry| entry.path());
    let page = page.max().expect("a run").join("report.html");
    let page = std::fs::read_to_string(page).expect("a report");
    assert!(page.contains("Paid requests of this run"), "the report does not tell what was paid");
}

#[test]
fn a_lost_table_is_rebuilt_from_the_cache_and_paid_again_only_on_request() {
    let space = space("");
    let api = Api::new(Rules::default());
    assert_paid_once(&temper(&space, &api, &["run", "p.yaml"]), &space, &api);
    let paid = api.paid_messages();
    let lose = |also_answers: bool| {
        let folder = space.json(&["path", "p.yaml", "annotate", "--json"]);
        let folder = PathBuf::from(folder["folder"].as_str().expect("a folder"));
        std::fs::remove_dir_all(folder).expect("the table can be lost");
        if also_answers {
            std::fs::remove_dir_all(space.path("cache/requests")).expect("the answers can be lost");
        }
    };
    lose(false);
    assert_paid_once(&temper(&space, &api, &["run", "p.yaml"]), &space, &api);
    assert_eq!(api.paid_messages(), paid);
    assert!(temper(&space, &api, &["run", "p.yaml", "--force", "annotate"]).status.success());
    assert_eq!(api.paid_messages(), paid, "what is kept is not paid again by force either");

    lose(true);
    let out = temper(&space, &api, &["run", "p.yaml"]);
    let stderr = text(&out.stderr);
    assert_eq!((out.status.code(), api.paid_messages()), (Some(3), paid), "{stderr}");
    assert!(stderr.contains("making it again takes 20 requests, about $0.") && stderr.contains("--pay"), "{stderr}");
    assert!(temper(&space, &api, &["run", "p.yaml", "--pay"]).status.success());
    assert_eq!(api.paid_messages(), 2 * paid);
}

#[test]
fn a_damaged_answer_is_found_by_verify_and_paid_again_only_on_request() {
    let space = space("");
    let api = Api::new(Rules::default());
    assert_paid_once(&temper(&space, &api, &["run", "p.yaml"]), &space, &api);
    let paid = api.paid_messages();
    let settings = std::fs::read_dir(space.path("cache/requests/annotate.claude")).expect("answers are kept").next();
    let log = settings.expect("a folder").expect("its name").path().join("answers.jsonl");
    let mut bytes = std::fs::read(&log).expect("the log can be read");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&log, bytes).expect("the log can be written");
    let folder = space.json(&["path", "p.yaml", "annotate", "--json"]);
    std::fs::remove_dir_all(folder["folder"].as_str().expect("a folder")).expect("the table can be lost");

    let verify = || space.temper(&["verify"]);
    let out = verify();
    assert_eq!(out.status.code(), Some(3), "{}", text(&out.stdout));
    assert!(text(&out.stdout).contains(&format!("damaged: {}: the paid answer at byte ", log.display())));
    let out = temper(&space, &api, &["run", "p.yaml"]);
    let stderr = text(&out.stderr);
    assert_eq!((out.status.code(), api.paid_messages()), (Some(3), paid), "{stderr}");
    assert!(stderr.contains("1 paid answers are damaged") && stderr.contains("--pay"), "{stderr}");
    assert!(temper(&space, &api, &["run", "p.yaml", "--pay"]).status.success());
    assert_eq!((api.paid_messages(), verify().status.code()), (paid + 1, Some(0)));
}

#[test]
fn batching_and_spending_limits_are_no_part_of_the_key() {
    let space = space("mode: batch, max_cost: 3");
    let api = Api::new(Rules { cacheable: 100, ..Rules::default() });
    assert_paid_once(&temper(&space, &api, &["run", "p.yaml"]), &space, &api);
    let metrics = space.json(&["show", "p.yaml", "annotate", "--json"])["metrics"].clone();
    assert!(metrics["cache_written_hour_tokens"].as_f64().is_some_and(|tokens| tokens > 0.0), "{metrics}");
    assert_eq!(metrics["cache_written_hour_tokens"], metrics["cache_written_tokens"]);
    let single = ["plan", "p.yaml", "--json", "--set", "stages.annotate.with.mode=single"];
    let plan = space.json(&[&single[..], &["--set", "stages.annotate.with.max_cost=null"]].concat());
    let stages = plan["stages"].as_array().expect("stages");
    assert!(stages.iter().all(|stage| stage["action"] == "reuse"), "{plan}");
}

#[test]
fn a_pilot_reports_the_tokens_of_thinking() {
    let space = space("documents_per_request: 1, max_requests: 20");
    let api = Api::new(Rules::default());
    let out = temper(&space, &api, &["run", "p.yaml"]);
    let stderr = text(&out.stderr);
    assert_eq!(out.status.code(), Some(3), "{stderr}");
    assert!(stderr.contains("max_requests: 20 requests were sent"), "{stderr}");
    assert_eq!(api.paid_messages(), 20);
    let out = temper(&space, &api, &["plan", "p.yaml"]);
    let stdout = text(&out.stdout);
    assert!(stdout.contains("by 20 answers to the same question, thinking included"), "{stdout}");
    assert!(stdout.contains("answered already"), "{stdout}");
}

/// Command lines and environments of a process and its children: the first are visible to everybody on this machine,
/// the second to their user.
fn seen_of_processes(parent: u32) -> Vec<String> {
    let mut seen = Vec::new();
    for process in std::fs::read_dir("/proc").into_iter().flatten().flatten().map(|entry| entry.path()) {
        let read = |what: &str| text(&std::fs::read(process.join(what)).unwrap_or_default());
        let status = read("status");
        if [format!("\nPid:\t{parent}\n"), format!("\nPPid:\t{parent}\n")].iter().any(|line| status.contains(line)) {
            seen.push(["cmdline", "environ", "comm"].map(read).concat());
        }
    }
    seen
}

#[test]
fn a_key_in_a_file_is_used_and_is_nowhere_in_what_a_run_leaves_or_shows() {
    let space = space("documents_per_request: 1");
    let secrets = tempfile::tempdir().expect("a temporary folder can be made");
    let file = secrets.path().join("key");
    std::fs::write(&file, format!("{KEY}\n")).expect("it can be written");
    // A server that repeats the key wherever it can and finally rejects every request.
    let message = |n: usize, _: &Value| {
        let message = format!("your key is {KEY}");
        let fault = |status| Fault::Error {
            status,
            kind: "k",
            message,
            headers: vec![("request-id", KEY.into())],
            details: Value::Null,
        };
        match n {
            0 | 5 => Some(fault(529).with("retry-after-ms", 1)),
            3 => Some(fault(400)),
            30.. => Some(fault(401)),
            _ => None,
        }
    };
    let latency = std::time::Duration::from_millis(30);
    let api = Api::new(Rules { message: Box::new(message), latency, ..Rules::default() });
    let run = |arguments: &[&str], address: &str| {
        let mut run = space.command(arguments);
        run.env_remove("ANTHROPIC_API_KEY").env("ANTHROPIC_API_KEY_FILE", &file).env("ANTHROPIC_BASE_URL", address);
        run.stdout(Stdio::piped()).stderr(Stdio::piped());
        run
    };
    let mut all = String::new();
    let started = run(&["run", "p.yaml"], &api.address).spawn().expect("the binary starts");
    api.wait_until(10, Api::messages);
    let seen = seen_of_processes(started.id());
    assert!(seen.len() >= 2, "the run and its attempt were not seen: {seen:?}");
    all += &seen.concat();
    let out = started.wait_with_output().expect("it ends");
    assert_eq!(out.status.code(), Some(3), "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains("401: your key is ***"), "{}", text(&out.stderr));
    all += &(text(&out.stdout) + &text(&out.stderr));

    let kind = Api::new(Rules::default());
    for arguments in [
        &["run", "p.yaml", "--json"][..],
        &["plan", "p.yaml"],
        &["show", "p.yaml", "annotate"],
        &["explain", "p.yaml", "annotate"],
    ] {
        let out = run(arguments, &kind.address).output().expect("the binary starts");
        assert!(out.status.success(), "{arguments:?}: {}", text(&out.stderr));
        all += &(text(&out.stdout) + &text(&out.stderr));
    }
    assert!(kind.paid_messages() > 0, "the key of the file was not used");
    assert!(!all.contains(KEY), "{all}");
    // Store, journals, logs, artifacts, reports and answers.
    assert_eq!(leaks(&space.path(".")), [""; 0].map(PathBuf::from));
}

#[test]
fn a_missing_key_is_reported_before_anything_runs_and_only_where_requests_are_sent() {
    let space = space("");
    let api = Api::new(Rules::default());
    let without = |arguments: &[&str]| {
        let mut command = command(&space, &api, arguments);
        command
            .env_remove("ANTHROPIC_API_KEY")
            .env_remove("ANTHROPIC_API_KEY_FILE")
            .output()
            .expect("the binary starts")
    };
    let missing = "annotate: no API key: ANTHROPIC_API_KEY is not set";
    let plan = without(&["plan", "p.yaml"]);
    assert!(
        plan.status.success() && text(&plan.stderr).contains(&format!("warning: {missing}")),
        "{}",
        text(&plan.stderr)
    );
    let out = without(&["run", "p.yaml"]);
    assert_eq!(out.status.code(), Some(3), "{}", text(&out.stderr));
    assert!(text(&out.stderr).contains(&format!("error: {missing}")), "{}", text(&out.stderr));
    assert!(
        !space.path("cache/runs").exists() || std::fs::read_dir(space.path("cache/runs")).is_ok_and(|d| d.count() == 0)
    );

    assert!(without(&["run", "p.yaml", "--until", "pairs"]).status.success());
    assert_paid_once(&temper(&space, &api, &["run", "p.yaml"]), &space, &api);
    let asked = api.messages();
    // Three cases: reused; reused although its inputs are made again; made again from the answers in the store.
    for more in [&[][..], &["--force", "pairs"], &["--force", "annotate"]] {
        let out = without(&[&["run", "p.yaml"], more].concat());
        assert!(out.status.success(), "{more:?}: {}", text(&out.stderr));
    }
    let plan = without(&["plan", "p.yaml"]);
    assert!(!text(&plan.stderr).contains("warning"), "{}", text(&plan.stderr));
    assert_eq!(api.messages(), asked);
    // These parameters give new requests, which have no kept answers.
    let out = without(&["run", "p.yaml", "--set", "stages.annotate.with.max_tokens=77"]);
    assert_eq!(out.status.code(), Some(3), "{}", text(&out.stderr));
}

#[test]
fn a_judge_behind_any_endpoint_goes_on_after_a_kill_and_keeps_its_key_to_itself() {
    let latency = std::time::Duration::from_millis(20);
    let says_the_key = |n: usize, _: &Value| (n == 3).then(|| Fault::status(503, KEY).with("retry-after-ms", 1));
    let api = Api::new(Rules { latency, message: Box::new(says_the_key), ..Rules::default() });
    let space = space("");
    let file = std::fs::read_to_string(space.path("p.yaml")).expect("the pipeline can be read");
    let (stages, _) = file.split_once("  annotate:").expect("the stage is there");
    let annotate = format!(
        "  annotate: {{ uses: annotate.openai, needs: {{ pairs: pairs }}, with: {{ base_url: \"{}/v1\", model: m, \
         key_variable: JUDGE_KEY, verdict: logprobs, swap_share: 0, repeat_share: 0 }} }}\n",
        api.address
    );
    space.write("p.yaml", &format!("{stages}{annotate}"));

    let keyless =
        command(&space, &api, &["run", "p.yaml"]).env_remove("JUDGE_KEY").output().expect("the binary starts");
    assert_eq!(keyless.status.code(), Some(3));
    assert!(text(&keyless.stderr).contains("no API key: JUDGE_KEY is not set"), "{}", text(&keyless.stderr));

    killed_when(&space, &api, 20, Api::paid_messages);
    let killed_at = api.paid_messages();
    assert!(killed_at < 40, "it was not killed in the middle");
    let plan = temper(&space, &api, &["plan", "p.yaml"]);
    assert!(text(&plan.stdout).contains("documents are answered already"), "{}", text(&plan.stdout));
    let out = temper(&space, &api, &["run", "p.yaml"]);
    assert!(out.status.success(), "{}", text(&out.stderr));
    // Requests in flight when the run was killed are lost: eight at most.
    assert!(api.paid_twice().len() <= 8, "{:?}", api.paid_twice());
    let shown = space.json(&["show", "p.yaml", "annotate", "--json"]);
    assert_eq!((&shown["metrics"]["rows"], &shown["metrics"]["labelled"]), (&40.0.into(), &40.0.into()), "{shown}");
    assert_eq!(leaks(&space.path(".")), [""; 0].map(PathBuf::from));
    assert_eq!(space.temper(&["verify"]).status.code(), Some(0));
    // Another field for the same limit, and another key, label nothing anew.
    let same = ["--set", "stages.annotate.with.max_tokens_field=max_completion_tokens"];
    let plan = space.json(&[&["plan", "p.yaml", "--json"][..], &same].concat());
    let stages = plan["stages"].as_array().expect("stages");
    assert!(stages.iter().all(|stage| stage["action"] == "reuse"), "{plan}");
}
