//! Speed and memory of judges. Prints figures, asserts nothing.
//!
//! - Receiving and storing answers: `annotate.claude` and `annotate.openai`, 64 requests at once or in batches, to a server
//!   on this machine that takes 5 ms per request. For the cost of the tables alone compare `annotate.reference`, which
//!   reads and writes the same tables without requests. Tables of up to 16,384 rows are kept in memory as a whole, larger
//!   ones are not.
//! - Judging in the process: `annotate.local` with the GGUF model of `TEMPER_BENCH_GGUF`, beside llama.cpp with the same
//!   file and prompts (`llama_cpp_judge.py`, by the Python of `TEMPER_BENCH_PYTHON`). `run.sh` sets both; what is not set
//!   is left out.
//!
//! All of it: `benches/annotate/run.sh`. Without the local judge: `cargo bench --bench annotate`.

use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use fake_api::{Api, KEY, Rules};
use serde_json::{Value, json};

/// Pairs for the local judge: each is read twice, once in each order.
const LOCAL_PAIRS: u64 = 40;

/// A pipeline with `n` pairs, one per request, and the stage `annotate`.
fn pipeline(n: u64, annotate: &str) -> String {
    format!(
        "version: 1
stages:
  posts: {{ uses: dataset.tinytldr, with: {{ posts: {posts} }} }}
  tokenizer: {{ uses: tokenizer.import, with: {{ asset: tinytldr }} }}
  pairs: {{ uses: generate.contrast, needs: {{ posts: posts, tokenizer: tokenizer }}, with: {{ pairs: {n}, split: null }} }}
  annotate: {annotate}
  tables: {{ uses: annotate.reference, needs: {{ pairs: pairs, posts: posts }}, with: {{ by: facts, error_rate: 0 }} }}
",
        posts = n + n / 10,
    )
}

/// The seconds that a command took, and what it printed.
fn temper(folder: &Path, api: &Api, arguments: &[&str]) -> (f64, String) {
    let started = Instant::now();
    let out = Command::new(env!("CARGO_BIN_EXE_temper"))
        .args(arguments)
        .args(["--json", "--store", "store"])
        .current_dir(folder)
        .env("ANTHROPIC_API_KEY", KEY)
        .env("ANTHROPIC_BASE_URL", &api.address)
        .env("TEMPER_REQUESTS", "64")
        .env("TEMPER_BATCH_POLL", "0.1")
        .output()
        .expect("the binary starts");
    let seconds = started.elapsed().as_secs_f64();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    (seconds, String::from_utf8_lossy(&out.stdout).into_owned())
}

/// Duration of a stage in seconds, and its peak resident memory in MiB, from the events of a run.
fn stage(events: &str, name: &str) -> (f64, u64) {
    let finished = |event: &Value| event["event"] == "stage_finished" && event["stage"] == name;
    let events = events.lines().filter_map(|line| serde_json::from_str(line).ok());
    let stage = events.into_iter().find(finished).expect("the stage has run");
    (stage["seconds"].as_f64().unwrap_or_default(), stage["peak_bytes"].as_u64().unwrap_or_default() >> 20)
}

fn judge_behind_an_api(name: &str, n: u64, annotate: impl Fn(&Api) -> String) {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let api = Api::new(Rules { latency: Duration::from_millis(5), ..Rules::default() });
    let pipeline = pipeline(n, &annotate(&api));
    std::fs::write(folder.path().join("p.yaml"), pipeline).expect("the folder can be written to");
    let (_, events) = temper(folder.path(), &api, &["run", "p.yaml", "--until", "tables"]);
    let (_, tables) = stage(&events, "tables");
    let (total, events) = temper(folder.path(), &api, &["run", "p.yaml"]);
    let (seconds, peak) = stage(&events, "annotate");
    let paid = api.paid_messages();
    println!(
        "{name:>13}: {paid:>6} answers in {seconds:6.2} s ({:.0} a second), peak {peak} MiB ({tables} MiB for the tables alone), \
         full run {total:.2} s",
        paid as f64 / seconds,
    );
}

fn openai(api: &Api, swap_share: u8) -> String {
    format!(
        "{{ uses: annotate.openai, needs: {{ pairs: pairs }}, with: {{ base_url: \"{}/v1\", model: m, swap_share: {swap_share}, \
         repeat_share: 0 }} }}",
        api.address
    )
}

fn local(gguf: &Path, python: Option<&Path>) {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    let api = Api::new(Rules::default());
    let write = |annotate: &str| {
        let mut text = pipeline(LOCAL_PAIRS, annotate);
        let _ = writeln!(
            text,
            "  model: {{ uses: model.import, with: {{ file: {}, chat_template: true }} }}",
            gguf.display()
        );
        text += "  agreement: { uses: annotate.agreement, needs: { preferences: [annotate, tables] } }\n";
        std::fs::write(folder.path().join("p.yaml"), text).expect("the folder can be written to");
    };
    // The same questions to a server, which hands over its prompts.
    write(&openai(&api, 1));
    temper(folder.path(), &api, &["run", "p.yaml", "--until", "annotate"]);
    let prompts: String =
        api.requests().iter().map(|(_, body)| format!("{}\n", json!({ "messages": body["messages"] }))).collect();
    let file = folder.path().join("prompts.jsonl");
    std::fs::write(&file, prompts).expect("the folder can be written to");

    write("{ uses: annotate.local, needs: { pairs: pairs, model: model } }");
    temper(folder.path(), &api, &["run", "p.yaml", "--until", "model"]);
    let (_, events) = temper(folder.path(), &api, &["run", "p.yaml", "--until", "annotate"]);
    let (seconds, peak) = stage(&events, "annotate");
    let rate = |seconds: f64| LOCAL_PAIRS as f64 / seconds;
    println!(
        "        local: {LOCAL_PAIRS:>6} pairs in {seconds:6.2} s ({:.2} a second), peak {peak} MiB",
        rate(seconds)
    );
    temper(folder.path(), &api, &["run", "p.yaml", "--until", "agreement"]);
    let (_, shown) = temper(folder.path(), &api, &["show", "p.yaml", "agreement"]);
    let shown: Value = serde_json::from_str(&shown).unwrap_or_default();
    println!("               agrees with the facts in a share of {} of the pairs", shown["metrics"]["agreement"]);

    let Some(python) = python else { return println!("    llama.cpp: left out, since TEMPER_BENCH_PYTHON is not set") };
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("benches/annotate/llama_cpp_judge.py");
    let threads = std::thread::available_parallelism().map_or(1, usize::from).to_string();
    // The number of the document behind the two worked examples.
    let answer = "{\"doc.3.chosen.summary\":";
    let out = Command::new(python).arg(script).arg(gguf).arg(&file).args([answer, &threads]).output();
    let out = match out {
        Ok(out) if out.status.success() => out,
        Ok(out) => {
            let errors = String::from_utf8_lossy(&out.stderr);
            return println!("    llama.cpp: left out: {}", errors.lines().last().unwrap_or("no message"));
        }
        Err(error) => return println!("    llama.cpp: left out: {}: {error}", python.display()),
    };
    for line in String::from_utf8_lossy(&out.stdout).lines().filter_map(|line| serde_json::from_str::<Value>(line).ok())
    {
        let seconds = line["seconds"].as_f64().unwrap_or(f64::NAN);
        let how = if line["cached"] == true { "what prompts share is read once" } else { "each prompt is read whole" };
        println!("    llama.cpp: {LOCAL_PAIRS:>6} pairs in {seconds:6.2} s ({:.2} a second), {how}", rate(seconds));
    }
}

fn main() {
    for mode in ["single", "batch"] {
        for n in [1_000, 10_000, 40_000] {
            judge_behind_an_api(&format!("claude {mode}"), n, |_| {
                format!(
                    "{{ uses: annotate.claude, needs: {{ pairs: pairs }}, with: {{ model: claude-haiku-4-5, \
                     documents_per_request: 1, swap_share: 0, repeat_share: 0, mode: {mode} }} }}"
                )
            });
        }
    }
    for n in [1_000, 10_000, 40_000] {
        judge_behind_an_api("openai", n, |api| openai(api, 0));
    }
    let path = |variable: &str| std::env::var_os(variable).filter(|path| !path.is_empty()).map(PathBuf::from);
    match path("TEMPER_BENCH_GGUF") {
        Some(gguf) => local(&gguf, path("TEMPER_BENCH_PYTHON").as_deref()),
        None => println!("        local: left out, since TEMPER_BENCH_GGUF is not set"),
    }
}
