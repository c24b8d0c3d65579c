//! The commands: each one reads the pipeline, calls the engine and prints.

mod explain;
mod graph;
mod kinds;
mod lm;
mod plan;
mod remote;
mod report;
mod run;
mod show;
mod verify;

use std::io::{IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use engine::error::{Error, Result};
use engine::graph::{Graph, LoadOptions};
use engine::kind::Registry;
use engine::store::Store;

use crate::args::{Cli, Command, PipelineArgs, StoreArgs};
use crate::output;

/// Runs a command and turns its errors into messages and exit codes.
pub fn main(cli: Cli) -> ExitCode {
    let registry = stages::registry();
    let result = match cli.command {
        Command::Attempt { job } => return engine::attempt::main(&job, &registry),
        Command::Run(args) => run::run(&args, &registry),
        Command::Plan { file, until, remote } => plan::plan(&file, &until, &remote, &registry),
        Command::Explain { file, stage } => explain::explain(&file, &stage, &registry),
        Command::Graph { file, format } => graph::graph(&file, format, &registry),
        Command::Show { file, stage, rows } => show::show(&file, &stage, rows, &registry),
        Command::Path { file, stage } => show::path(&file, &stage, &registry),
        Command::Runs { store } => report::runs(&store),
        Command::Report { file, run, export } => report::report(&file, run.as_deref(), export.as_deref(), &registry),
        Command::Kinds { kind, json } => kinds::kinds(kind.as_deref(), json, &registry),
        Command::Schema => kinds::schema(&registry),
        Command::Verify { store, repair } => verify::verify(&store, repair),
        Command::Push { file, until, remote, all } => remote::push(&file, &until, &remote, all, &registry),
        Command::Pull { file, until, remote } => remote::pull(&file, &until, &remote, &registry),
        Command::Lm { task } => lm::lm(&task),
    };
    let code = result.unwrap_or_else(|failure| {
        match &failure {
            // The diagnostics are already escaped and may use colours. Writing fails if standard error is closed.
            Failure::File(faults) => {
                let mut stderr = std::io::stderr();
                let _ = writeln!(stderr, "{}", faults.render(stderr.is_terminal()).trim_end());
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
    let options = LoadOptions { profiles: pipeline.profile.clone(), set: pipeline.set.clone(), until: until.to_vec() };
    Ok(engine::graph::load(&pipeline.file, &options, registry)?)
}

/// The store given by `--store`, or `cache` next to the pipeline file.
fn open_store(pipeline: &PipelineArgs) -> Result<Store> {
    let default_root = pipeline.file.parent().unwrap_or(Path::new("")).join("cache");
    Store::open(&pipeline.store.store.clone().unwrap_or(default_root))
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
    let graph = load(pipeline, &[stage.to_owned()], registry)?;
    match graph.targets[..] {
        [target] => Ok((graph, target)),
        _ => {
            let names: Vec<String> = graph.targets.iter().map(|t| graph.instances[*t].name.to_string()).collect();
            Err(Error::user(format!("`{stage}` has {} instances", names.len()))
                .help(format!("choose one of {}", names.join(", ")))
                .into())
        }
    }
}

/// Prints a value as JSON.
fn print_json(value: &serde_json::Value) {
    outln!("{}", output::json(value).expect("a JSON value is plain data"));
}
