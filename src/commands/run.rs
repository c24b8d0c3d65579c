//! `temper run`: plans, runs and reports. Renders the report after every run, including failed ones.

use std::path::PathBuf;
use std::sync::Arc;

use engine::context::Cadence;
use engine::error::Result;
use engine::graph::Graph;
use engine::journal::Event;
use engine::kind::Registry;
use engine::machine::Machine;
use engine::plan::{Flags, Plan};
use engine::remote::CombinedStore;
use engine::run::{DeviceShare, RunOptions};

use super::{CommandResult, Failure, load_placed, on_finish, open_store, plan, remote, sweep};
use crate::args::RunArgs;
use crate::progress::Progress;
use crate::report;

/// How a run ended.
pub struct Finished {
    pub code: u8,
    /// The folder of the run; `None` for `--dry-run`.
    pub folder: Option<PathBuf>,
}

pub fn run(args: &RunArgs, registry: &Registry) -> CommandResult {
    match args.sweep {
        true => sweep::run(args, registry),
        false => Ok(run_once(args, registry)?.code),
    }
}

/// What attempts share on this machine, and what those that compute on `device` take of it.
fn share(graph: &Graph, plan: &Plan, device: &str, memory: Option<u64>) -> Result<(Machine, DeviceShare)> {
    let share = match device {
        "metal" => DeviceShare::Device,
        _ if is_cuda(device) => DeviceShare::Gpu,
        _ => DeviceShare::Nothing,
    };
    let mut machine = Machine::detect(engine::run::needs_gpus(graph, plan, share))?;
    if let Some(number) = device.strip_prefix("cuda:").and_then(|number| number.parse::<usize>().ok()) {
        machine.gpus = machine.gpus.into_iter().skip(number).take(1).collect();
    }
    // Some containers have a driver that lists no GPUs; CUDA says so if there is none.
    if machine.gpus.is_empty() && is_cuda(device) && std::env::var_os("CUDA_VISIBLE_DEVICES").is_none() {
        machine.gpus.push(device.strip_prefix("cuda:").unwrap_or("0").to_owned());
    }
    machine.memory = memory.or(machine.memory);
    Ok((machine, share))
}

fn is_cuda(device: &str) -> bool {
    device.starts_with("cuda")
}

pub fn run_once(args: &RunArgs, registry: &Registry) -> std::result::Result<Finished, Failure> {
    let graph = load_placed(&args.file, &args.until.until, &args.executor, registry)?;
    let store = open_store(&args.file)?;
    let flags = Flags::new(&graph, &args.force, &args.from)?;
    let address = if args.no_remote { None } else { remote::address(&args.file, &args.remote, &graph)? };
    let address = address.map(|(address, read_only)| (address, read_only || args.no_upload));
    // Until the journal names what the run uses.
    let mut guard = Some(store.hold_off_collection()?);
    let (plan, opened) = remote::plan_with_remote(&graph, registry, &store, &flags, address)?;
    let combined = CombinedStore { store: &store, remote: opened.as_ref() };
    let mut missing = engine::plan::missing_environment(&graph, &plan, registry, &store, &combined, &flags)?;
    missing.extend(engine::run::missing_programs(&graph, &plan));
    let device = args.device.name()?;
    let (machine, device_share) = share(&graph, &plan, &device, args.memory)?;
    missing.extend(engine::run::unfit(&graph, &plan, &machine, device_share));
    if args.dry_run {
        let expected_costs = engine::plan::expected_costs(&graph, &plan, registry, &store)?;
        let from_remote = combined.reused_from_remote(&plan)?;
        plan::print_plan(&graph, &plan, &from_remote, &expected_costs, &missing, args.file.store.json);
        return Ok(Finished { code: 0, folder: None });
    }
    if let [first, rest @ ..] = &missing[..] {
        rest.iter().for_each(|error| errln!("error: {error}"));
        return Err(first.clone().into());
    }
    let options = RunOptions {
        jobs: args.jobs.map_or_else(|| RunOptions::default().jobs, usize::from),
        keep_going: args.keep_going,
        pay: args.pay,
        cadence: args.checkpoint_every.map_or_else(Cadence::default, Cadence::Steps),
        flags,
        profiles: args.file.changes.profile.clone(),
        command_line: args.command_line.clone(),
        file: Some(args.file.file.display().to_string()),
        remote: opened.map(Arc::new),
        // Attempts allocate and free large buffers all the time; pages returned to the system would have to be faulted
        // in again.
        env: vec![
            ("MIMALLOC_PURGE_DELAY".to_owned(), "-1".to_owned()),
            // An attempt sees only the GPU that it may use.
            (lm::DEVICE_VARIABLE.to_owned(), if is_cuda(&device) { "cuda".to_owned() } else { device.clone() }),
        ],
        machine,
        device_share,
        device: lm::device_name(&device),
        ..RunOptions::default()
    };
    let as_json = args.file.store.json;
    let progress = Arc::new(Progress::new(as_json));
    let outcome = engine::run::run(&graph, &plan, &store, registry, &options, {
        let progress = Arc::clone(&progress);
        move |event: &Event| {
            if matches!(event, Event::Planned { .. }) {
                drop(guard.take());
            }
            progress.handle(event);
        }
    })?;
    progress.end();

    // The run's results are kept even if rendering the report fails.
    let written = report::render(&outcome.folder, &store);
    if !as_json {
        match &written {
            Ok(report) => {
                if !report.summary.is_empty() {
                    outln!("\n{}", report.summary.trim_end());
                }
                outln!("\nreport: {}", report.path.display());
            }
            Err(error) => errln!("warning: no report: {error}"),
        }
        outln!(
            "{} ran, {} reused, {} failed, {} skipped in {:.1} s",
            outcome.ran.len(),
            outcome.reused.len(),
            outcome.failed.len(),
            outcome.skipped.len(),
            outcome.seconds
        );
    }
    if outcome.interrupted {
        errln!("interrupted: finished stages are kept; run again to continue");
    }
    // Print in reverse, so that the first cause is the last thing the user sees.
    for failure in outcome.failed.iter().rev() {
        errln!("error: {failure}");
    }
    let report = written.as_ref().ok().map(|report| report.path.as_path());
    let description = on_finish::describe(&graph, &args.file.changes.profile, &outcome, report, &store);
    if let Err(error) = on_finish::start(&graph, &args.file.file, &description) {
        errln!("warning: on_finish: {error}");
    }
    Ok(Finished { code: outcome.exit_code(), folder: Some(outcome.folder) })
}
