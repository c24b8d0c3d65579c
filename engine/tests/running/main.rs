//! Runs pipelines of fake stages. This binary is the test, the attempt and, in tests that kill it, the orchestrator.

mod claims;
mod fake;
mod remotes;
mod space;

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["attempt", job] => engine::attempt::main(Path::new(job), &fake::registry()),
        ["orchestrate", orders] => orchestrate(Path::new(orders)),
        _ => claims(&args),
    }
}

fn orchestrate(orders: &Path) -> ExitCode {
    let orders: space::Orders = serde_json::from_slice(&std::fs::read(orders).unwrap()).unwrap();
    let (outcome, _) = orders.obey(|event| println!("{}", serde_json::to_string(event).unwrap()));
    ExitCode::from(outcome.exit_code())
}

/// Like libtest: runs the tests whose name contains one of the arguments.
fn claims(args: &[String]) -> ExitCode {
    let filters: Vec<&String> = args.iter().filter(|arg| !arg.starts_with('-')).collect();
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()));
    let mut failed = 0;
    for (name, claim) in claims::ALL.iter().chain(remotes::ALL).filter(|(name, _)| wanted(name)) {
        if args.iter().any(|arg| arg == "--list") {
            println!("{name}: test");
            continue;
        }
        let start = std::time::Instant::now();
        let holds = std::panic::catch_unwind(claim).is_ok();
        failed += usize::from(!holds);
        println!("test {name} ... {} ({:.1} s)", if holds { "ok" } else { "FAILED" }, start.elapsed().as_secs_f64());
    }
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
