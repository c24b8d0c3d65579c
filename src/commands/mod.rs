//! The commands: each one reads the pipeline, calls the engine and prints.

mod compare;
mod completions;
mod config;
mod doctor;
mod explain;
mod export;
mod gc;
mod graph;
mod init;
mod kinds;
mod lm;
mod on_finish;
mod pins;
mod plan;
mod remote;
mod report;
mod run;
mod runs;
mod show;
mod sweep;
mod verify;

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use engine::error::{Error, Result};
use engine::graph::{Graph, LoadOptions};
use engine::kind::Registry;
use engine::store::Store;

use crate::args::{Cli, Command, ExecutorArgs, PipelineArgs, RunsCommand, StoreArgs};
use crate::output;

/// Runs a command and turns its errors into messages and exit codes.
pub fn main(cli: Cli, registry: &Registry) -> ExitCode {
    let result = match cli.command {
        Command::Attempt { job, probe: true, .. } => return engine::attempt::answer_probe(&job),
        Command::Attempt { job, detached: true, .. } => return engine::attempt::main_detached(&job, registry),
        Command::Attempt { job, .. } => return engine::attempt::main(&job, registry),
        Command::Init { folder } => init::init(&folder, registry),
        Command::Run(args) => run::run(&args, registry),
        Command::Plan { file, until, remote, sweep, executor } => {
            plan::plan(&file, &until, &remote, &executor, sweep, registry)
        }
        Command::Config { file, changes } => config::config(&file, &changes, registry),
        Command::Explain { file, stage } => explain::explain(&file, &stage, registry),
        Command::Graph { file, format } => graph::graph(&file, format, registry),
        Command::Show { file, stage, run, rows } => show::show(&file, &stage, run.as_deref(), rows, registry),
        Command::Path { file, stage, run } => show::path(&file, &stage, run.as_deref(), registry),
        Command::Compare(args) => compare::compare(&args, registry),
        Command::Export(args) => export::export(&args, registry),
        Command::Runs { command: None, store } => runs::list(&store),
        Command::Runs { command: Some(RunsCommand::Rm { runs, store: own }), store } => {
            runs::remove(&runs, &own.or(store))
        }
        Command::Du { collection, all } => gc::du(&collection, all, registry),
        Command::Gc { collection, delete } => gc::gc(&collection, delete, registry),
        Command::Pin { file, stage, name } => pins::pin(&file, &stage, name.as_deref(), registry),
        Command::Pins { store } => pins::pins(&store),
        Command::Unpin { pins, store } => pins::unpin(&pins, &store),
        Command::Report { file, run, export } => report::report(&file, run.as_deref(), export.as_deref(), registry),
        Command::Kinds { artifact_type: Some(name), json, .. } => kinds::types(name.as_deref(), json, registry),
        Command::Kinds { kind, json, .. } => kinds::kinds(kind.as_deref(), json, registry),
        Command::Schema => kinds::schema(registry),
        Command::Verify { store, repair } => verify::verify(&store, repair),
        Command::Doctor { file, changes, store } => doctor::doctor(file, changes, store, registry),
        Command::Completions { shell } => completions::completions(shell),
        Command::Man { folder } => completions::man(folder.as_deref()),
        Command::Push { file, until, remote, all } => remote::push(&file, &until, &remote, all, registry),
        Command::Pull { file, until, remote } => remote::pull(&file, &until, &remote, registry),
        Command::Lm { task } => lm::lm(&task),
    };
    let code = result.unwrap_or_else(|failure| {
        match &failure {
            // The diagnostics are already escaped and may use colours. Writing fails if standard error is closed.
            Failure::File(faults) => {
                let mut stderr = std::io::stderr();
                let colours = output::colours(&stderr);
                let _ = writeln!(stderr, "{}", faults.render(colours).trim_end());
            }
            Failure::Error(error) => errln!("error: {error}"),
        }
        failure.exit_code()
    });
    match output::finish() {
        Err(error) if code == 0 => {
            errln!("error: {error}");
            ExitCode::from(error.exit_code())
        }
        _ => ExitCode::from(code),
    }
}

/// The reason why a command failed.
enum Failure {
    /// The pipeline file is invalid; lists every fault with its position.
    File(engine::diagnostics::Diagnostics),
    Error(Error),
}

impl Failure {
    fn exit_code(&self) -> u8 {
        match self {
            Self::File(faults) => faults.exit_code(),
            Self::Error(error) => error.exit_code(),
        }
    }
}

impl From<Error> for Failure {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

impl From<engine::diagnostics::Diagnostics> for Failure {
    fn from(faults: engine::diagnostics::Diagnostics) -> Self {
        Self::File(faults)
    }
}

/// A command's exit code.
type CommandResult = std::result::Result<u8, Failure>;

/// The graph of the file with its profiles and `--set` applied, cut to `until`.
fn load(pipeline: &PipelineArgs, until: &[String], registry: &Registry) -> std::result::Result<Graph, Failure> {
    let options = LoadOptions { until: until.to_vec(), ..options(pipeline) };
    Ok(engine::graph::load(&pipeline.file, &options, registry)?)
}

fn options(pipeline: &PipelineArgs) -> LoadOptions {
    LoadOptions {
        profiles: pipeline.changes.profile.clone(),
        set: pipeline.changes.set.clone(),
        ..LoadOptions::default()
    }
}

/// The same, with every instance on the executor given by `--executor`.
fn load_placed(
    pipeline: &PipelineArgs,
    until: &[String],
    executor: &ExecutorArgs,
    registry: &Registry,
) -> std::result::Result<Graph, Failure> {
    let mut graph = load(pipeline, until, registry)?;
    if let Some(name) = &executor.executor {
        graph.place_on(name)?;
    }
    Ok(graph)
}

/// The store given by `--store`, or `cache` next to the pipeline file.
fn open_store(pipeline: &PipelineArgs) -> Result<Store> {
    Store::open(&store_root(pipeline))
}

/// The folder of [`open_store`].
fn store_root(pipeline: &PipelineArgs) -> PathBuf {
    store_root_of(&pipeline.file, &pipeline.store)
}

/// The store given by `--store`, or `cache` next to `file`.
fn store_root_of(file: &Path, store: &StoreArgs) -> PathBuf {
    let default_root = || file.parent().unwrap_or(Path::new("")).join("cache");
    store.store.clone().unwrap_or_else(default_root)
}

/// The store given by `--store`, or `cache` in the working directory; it must exist.
fn existing_store(at: &StoreArgs) -> Result<Store> {
    let root = at.store.clone().unwrap_or_else(|| PathBuf::from("cache"));
    if !root.is_dir() {
        return Err(
            Error::user(format!("{}: there is no store", root.display())).help("choose a store with `--store FOLDER`")
        );
    }
    Store::open(&root)
}

/// The graph cut to one instance, and that instance's index.
fn load_instance(
    pipeline: &PipelineArgs,
    stage: &str,
    registry: &Registry,
) -> std::result::Result<(Graph, usize), Failure> {
    let options = LoadOptions { stage: Some(stage.to_owned()), ..options(pipeline) };
    let graph = engine::graph::load(&pipeline.file, &options, registry)?;
    match graph.targets[..] {
        [target] => Ok((graph, target)),
        _ => {
            let names: Vec<String> = graph.targets.iter().map(|t| graph.instances[*t].name.to_string()).collect();
            Err(Error::user(format!("`{stage}` has {}", output::counted(names.len(), "instance")))
                .help(format!("choose one of {}", names.join(", ")))
                .into())
        }
    }
}

/// `1 stage`, `2 stages`.
fn counted(n: usize, noun: &str) -> String {
    format!("{n} {noun}{}", if n == 1 { "" } else { "s" })
}

/// Prints a value as JSON.
fn print_json(value: &serde_json::Value) {
    outln!("{}", output::json(value).expect("a JSON value is plain data"));
}
