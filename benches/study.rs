//! Cost of the default study: wall time from an empty store, time and peak memory of each kind of stage, and a second
//! run with nothing to do. Prints figures, asserts nothing.
//!
//!     cargo bench --bench study

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use serde_json::Value;

/// Number of instances, total seconds, and the peak memory of one instance in bytes.
#[derive(Default)]
struct Cost {
    instances: u64,
    seconds: f64,
    peak: u64,
}

fn run(store: &Path, pipeline: &Path) -> (f64, Vec<Value>) {
    let started = Instant::now();
    let out = Command::new(env!("CARGO_BIN_EXE_temper"))
        .arg("run")
        .args([pipeline, Path::new("--json"), Path::new("--store"), store])
        .output()
        .expect("the binary starts");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    let seconds = started.elapsed().as_secs_f64();
    let events =
        String::from_utf8_lossy(&out.stdout).lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    (seconds, events)
}

fn main() {
    let pipeline = Path::new(env!("CARGO_MANIFEST_DIR")).join("pipeline.yaml");
    let store = tempfile::tempdir().expect("a temporary folder can be made");
    let (seconds, events) = run(store.path(), &pipeline);
    let mut costs: BTreeMap<String, Cost> = BTreeMap::new();
    for event in events.iter().filter(|event| event["event"] == "stage_finished") {
        let instance = event["stage"].as_str().unwrap_or_default();
        let cost = costs.entry(instance.split('[').next().unwrap_or_default().to_owned()).or_default();
        cost.instances += 1;
        cost.seconds += event["seconds"].as_f64().unwrap_or_default();
        cost.peak = cost.peak.max(event["peak_bytes"].as_u64().unwrap_or_default());
    }
    println!("{:12} {:>9} {:>12} {:>10}", "stage", "instances", "seconds each", "peak MiB");
    for (stage, cost) in &costs {
        let each = cost.seconds / cost.instances as f64;
        println!("{stage:12} {:>9} {each:>12.1} {:>10}", cost.instances, cost.peak >> 20);
    }
    let again: Vec<f64> = (0..9).map(|_| run(store.path(), &pipeline).0 * 1e3).collect();
    let fastest = again.iter().copied().fold(f64::INFINITY, f64::min);
    println!("empty store: {seconds:.0} s; nothing to do: {fastest:.0} ms, the fastest of {} runs", again.len());
}
