//! Overhead of orchestration: nothing to do, a chain of 1,000 trivial stages, planning a chain of 10,000. Prints
//! figures, asserts nothing.
//!
//!     cargo bench --bench orchestrator
//!
//! For comparison, measured elsewhere on a similar machine: with nothing to do, ninja takes 15-20 ms over 1,000 stages,
//! DVC 4.9-11 s over 300. A trivial stage costs about 1 s in DVC and 77 ms in Snakemake.

use std::fmt::Write;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

/// A chain of `n` stages, each of which copies the previous stage's file.
fn chain(n: usize) -> String {
    let mut text = String::from(
        "version: 1\nstages:\n  s0: { uses: command, with: { run: [sh, -c, 'echo 0 > $TEMPER_OUTPUT/x'], output: Files } }\n",
    );
    for i in 1..n {
        let copy = "cp $TEMPER_INPUT_x/x $TEMPER_OUTPUT/x";
        writeln!(text, "  s{i}: {{ uses: command, needs: {{ x: s{} }}, with: {{ run: [sh, -c, '{copy} # {i}'], output: Files }} }}", i - 1)
            .expect("writing to a string cannot fail");
    }
    text
}

fn time(folder: &Path, arguments: &[&str]) -> Duration {
    let started = Instant::now();
    let out = Command::new(env!("CARGO_BIN_EXE_temper"))
        .args(arguments)
        .current_dir(folder)
        .output()
        .expect("the binary starts");
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    started.elapsed()
}

fn median(folder: &Path, arguments: &[&str]) -> f64 {
    let mut times: Vec<f64> = (0..9).map(|_| time(folder, arguments).as_secs_f64() * 1e3).collect();
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn main() {
    let folder = tempfile::tempdir().expect("a temporary folder can be made");
    for n in [1, 100, 1000] {
        let file = format!("chain{n}.yaml");
        std::fs::write(folder.path().join(&file), chain(n)).expect("the temporary folder can be written to");
        let cold = time(folder.path(), &["run", &file]).as_secs_f64() * 1e3;
        let warm = median(folder.path(), &["run", &file]);
        let plan = median(folder.path(), &["plan", &file]);
        println!(
            "chain of {n:>5}: run {cold:9.1} ms ({:6.2} ms per stage), nothing to do {warm:7.1} ms, plan {plan:7.1} ms",
            cold / n as f64
        );
    }
    std::fs::write(folder.path().join("deep.yaml"), chain(10_000)).expect("the temporary folder can be written to");
    println!("chain of 10000: plan {:7.1} ms", median(folder.path(), &["plan", "deep.yaml"]));
}
