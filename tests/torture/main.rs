//! Kills, races and damage with the real binary. `cargo test` runs a share of each; by hand:
//!
//!     cargo test --test torture -- kills --count 1000 --seed 1
//!     cargo test --test torture -- races --processes 8 --seconds 300 --seed 1
//!     cargo test --test torture -- damage --all
//!
//! Every number is drawn from the seed, which a failure prints. The moments of kills also depend on the machine.

mod damage;
mod kills;
mod races;
mod space;

use std::process::ExitCode;
use std::time::Instant;

use space::Options;

const USAGE: &str = "usage: cargo test --test torture -- [kills [--count N] | races [--processes N] [--seconds N] | damage [--all]] [--seed N]";

/// The share of `cargo test`.
const SHARE: [&[&str]; 3] =
    [&["damage"], &["kills", "--count", "25"], &["races", "--processes", "4", "--seconds", "8"]];

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    if args.contains(&"--list") {
        SHARE.iter().for_each(|test| println!("{}: test", test[0]));
        return ExitCode::SUCCESS;
    }
    match args.first() {
        Some(&("kills" | "races" | "damage")) => run(&args),
        // Flags and filters of cargo's own.
        _ => {
            let filters: Vec<&str> = args.iter().filter(|arg| !arg.starts_with('-')).copied().collect();
            let chosen = |test: &&&[&str]| filters.is_empty() || filters.iter().any(|filter| test[0].contains(filter));
            let failed = SHARE.iter().filter(chosen).any(|test| run(test) != ExitCode::SUCCESS);
            if failed { ExitCode::FAILURE } else { ExitCode::SUCCESS }
        }
    }
}

fn run(args: &[&str]) -> ExitCode {
    let Some(options) = Options::parse(&args[1..]) else {
        eprintln!("{USAGE}");
        return ExitCode::from(2);
    };
    let clock = Instant::now();
    let work = || match args[0] {
        "kills" => kills::kills(&options),
        "races" => races::races(&options),
        _ => damage::damage(&options),
    };
    let passed = std::panic::catch_unwind(work).is_ok();
    let outcome = if passed { "ok" } else { "FAILED" };
    let seed = if args.contains(&"--seed") { String::new() } else { format!(" --seed {}", options.seed) };
    println!("test {}{seed} ... {outcome} ({:.0} s)", args.join(" "), clock.elapsed().as_secs_f64());
    if passed { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
