//! Runs pipelines of fake stages. This binary is the test, the attempt and, in tests that kill it, the orchestrator.

mod cluster_space;
mod clusters;
mod fake;
mod faults;
mod remotes;
mod space;
mod tests;

use std::path::Path;
use std::process::ExitCode;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    match args.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["attempt", job] => engine::attempt::main(Path::new(job), &fake::registry()),
        ["attempt", job, "--detached"] => engine::attempt::main_detached(Path::new(job), &fake::registry()),
        ["attempt", folder, "--probe"] => engine::attempt::answer_probe(Path::new(folder)),
        ["orchestrate", request] => orchestrate(Path::new(request)),
        ["collect", request] => exit(faults::pin_and_collect(&read(Path::new(request)))),
        _ => tests(&args),
    }
}

fn read(request: &Path) -> space::RunRequest {
    serde_json::from_slice(&std::fs::read(request).unwrap()).unwrap()
}

fn orchestrate(request: &Path) -> ExitCode {
    let outcome = read(request).try_execute(|event| println!("{}", serde_json::to_string(event).unwrap()));
    exit(outcome.map(|(outcome, _)| outcome.exit_code()))
}

fn exit(code: engine::error::Result<u8>) -> ExitCode {
    match code {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(error.exit_code())
        }
    }
}

/// Like libtest: runs the tests whose name contains one of the arguments.
fn tests(args: &[String]) -> ExitCode {
    let filters: Vec<&String> = args.iter().filter(|arg| !arg.starts_with('-')).collect();
    let wanted = |name: &str| filters.is_empty() || filters.iter().any(|filter| name.contains(filter.as_str()));
    let mut failed = 0;
    for (name, test) in tests::TESTS
        .iter()
        .chain(faults::TESTS)
        .chain(remotes::TESTS)
        .chain(clusters::TESTS)
        .filter(|(name, _)| wanted(name))
    {
        if args.iter().any(|arg| arg == "--list") {
            println!("{name}: test");
            continue;
        }
        let start = std::time::Instant::now();
        let passed = std::panic::catch_unwind(test).is_ok();
        failed += usize::from(!passed);
        println!("test {name} ... {} ({:.1} s)", if passed { "ok" } else { "FAILED" }, start.elapsed().as_secs_f64());
    }
    if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
