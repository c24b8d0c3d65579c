//! Speed and memory of receiving and storing paid answers: requests, 64 at once or in batches, to a server on this
//! machine that takes 5 ms per request. Prints figures, asserts nothing. For the cost of the tables alone compare
//! `annotate.reference`, which reads and writes the same tables without requests. Tables of up to 16,384 rows are kept
//! in memory as a whole, larger ones are not.
//!
//!     cargo bench --bench annotate

#[allow(dead_code, unused_imports, reason = "the tests use more of it")]
#[path = "../stages/src/testing/api/mod.rs"]
mod api;

use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use api::{Api, KEY, Rules};
use serde_json::Value;

/// A pipeline with `n` pairs, one per request.
fn pipeline(n: u64, mode: &str) -> String {
    format!(
        "version: 1
stages:
  posts: {{ uses: dataset.tinytldr, with: {{ posts: {posts} }} }}
  tokenizer: {{ uses: tokenizer.import, with: {{ asset: tinytldr }} }}
  pairs: {{ uses: generate.contrast, needs: {{ posts: posts, tokenizer: tokenizer }}, with: {{ pairs: {n}, split: null }} }}
  annotate:
    uses: annotate.claude
    needs: {{ pairs: pairs }}
    with: {{ model: claude-haiku-4-5, documents_per_request: 1, swap_share: 0, repeat_share: 0, mode: {mode} }}
  tables: {{ uses: annotate.reference, needs: {{ pairs: pairs, posts: posts }}, with: {{ by: facts }} }}
",
        posts = n + n / 10,
    )
}

fn temper(folder: &Path, api: &Api, arguments: &[&str]) -> (f64, Vec<Value>) {
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
    let events = String::from_utf8_lossy(&out.stdout).lines().filter_map(|l| serde_json::from_str(l).ok()).collect();
    (seconds, events)
}

/// Duration of a stage in seconds, and its peak resident memory in MiB.
fn stage(events: &[Value], name: &str) -> (f64, u64) {
    let finished = |event: &&Value| event["event"] == "stage_finished" && event["stage"] == name;
    let stage = events.iter().find(finished).expect("the stage has run");
    (stage["seconds"].as_f64().unwrap_or_default(), stage["peak_bytes"].as_u64().unwrap_or_default() >> 20)
}

fn main() {
    for mode in ["single", "batch"] {
        for n in [1_000, 10_000, 40_000] {
            let folder = tempfile::tempdir().expect("a temporary folder can be made");
            let api = Api::new(Rules { latency: Duration::from_millis(5), ..Rules::default() });
            std::fs::write(folder.path().join("p.yaml"), pipeline(n, mode)).expect("the folder can be written to");
            let (_, events) = temper(folder.path(), &api, &["run", "p.yaml", "--until", "tables"]);
            let (_, tables) = stage(&events, "tables");
            let (total, events) = temper(folder.path(), &api, &["run", "p.yaml"]);
            let (seconds, peak) = stage(&events, "annotate");
            let paid = api.paid_messages();
            println!(
                "{mode:>6}: {paid:>6} answers in {seconds:6.2} s ({:.0} a second), peak {peak} MiB ({tables} MiB for the tables alone), \
                 full run {total:.2} s",
                paid as f64 / seconds,
            );
        }
    }
}
