//! `temper compare`: resolves what the arguments name, and prints what differs.

use engine::error::{Error, Result};
use engine::graph::LoadOptions;
use engine::kind::Registry;
use engine::plan::Flags;
use engine::store::Store;

use super::{CommandResult, Failure, open_store, options, runs};
use crate::args::{CompareArgs, CompareFormat, PipelineArgs};
use crate::compare::{Format, Side, differences, print};
use crate::report::load::RunData;

pub fn compare(args: &CompareArgs, registry: &Registry) -> CommandResult {
    let store = open_store(&args.file)?;
    let sides = args.sides.iter().map(|typed| side(typed, &args.file, &store, registry));
    let sides = sides.collect::<std::result::Result<Vec<Side>, Failure>>()?;
    let format = match args.format {
        _ if args.file.store.json => Format::Json,
        CompareFormat::Table => Format::Table,
        CompareFormat::Md => Format::Markdown,
        CompareFormat::Csv => Format::Csv,
        CompareFormat::Json => Format::Json,
    };
    let average = matches!(format, Format::Table | Format::Markdown);
    let found = differences(&sides, average)?;
    out!("{}", print(&sides, &found, format, args.all));
    Ok(0)
}

fn side(
    typed: &str,
    pipeline: &PipelineArgs,
    store: &Store,
    registry: &Registry,
) -> std::result::Result<Side, Failure> {
    let (of, instance) = match typed.split_once(':') {
        Some((of, instance)) => (of, Some(instance)),
        None if is_whole(typed, store) => (typed, None),
        // A stage of the pipeline with the profiles given.
        None => ("+", Some(typed)),
    };
    let side = match of.strip_prefix('+') {
        Some(profiles) => planned(typed, profiles, pipeline, store, registry)?,
        None => run(store, of, pipeline)?,
    };
    let Some(instance) = instance.map(|instance| instance.replace(' ', "")) else { return Ok(side) };
    let names: Vec<String> = side.instances.iter().map(|found| found.name.clone()).collect();
    let name = typed.to_owned();
    side.only(&instance).map(|side| Side { name, ..side }).ok_or_else(|| {
        let of_stage: Vec<&str> =
            names.iter().map(String::as_str).filter(|name| name.split('[').next() == Some(&instance)).collect();
        let error = match typed.contains(':') {
            true => Error::user(format!("{of} has no instance `{instance}`")),
            false => Error::user(format!("`{typed}` is neither a run of this store nor an instance of the pipeline")),
        };
        Failure::from(error.help(match of_stage[..] {
            [] => "`temper runs` lists the runs, `temper plan` the instances; `+NAME` is a profile".to_owned(),
            _ => format!("choose one of {}", of_stage.join(", ")),
        }))
    })
}

/// Whether the argument names a run or a pipeline, not one of its instances.
fn is_whole(typed: &str, store: &Store) -> bool {
    typed.starts_with('+') || typed == "latest" || runs::find(store, typed).is_ok()
}

fn run(store: &Store, id: &str, pipeline: &PipelineArgs) -> Result<Side> {
    let run = RunData::read(&runs::find_of(store, id, pipeline)?, store)?;
    let profiles: String = run.profiles.iter().map(|profile| format!(" +{profile}")).collect();
    Side::of_run(format!("run {} of {}{profiles}", run.id, run.pipeline), &run, store)
}

/// The pipeline with the profiles of the command line and those in `profiles`, separated by `+`.
fn planned(
    typed: &str,
    profiles: &str,
    pipeline: &PipelineArgs,
    store: &Store,
    registry: &Registry,
) -> std::result::Result<Side, Failure> {
    let mut options: LoadOptions = options(pipeline);
    options.profiles.extend(profiles.split('+').filter(|profile| !profile.is_empty()).map(str::to_owned));
    let graph = engine::graph::load(&pipeline.file, &options, registry)?;
    let plan = engine::plan::plan(&graph, registry, store, &Flags::default())?;
    let name = format!("{} {typed}", pipeline.file.display());
    Ok(Side::of_plan(name, &graph, &plan, store)?)
}
