//! The command line arguments.

mod lm;

use std::path::PathBuf;

use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum};
use clap_complete::Shell;
use engine::text::is_terminal_control;
pub use lm::{DeviceArgs, LmTask, ModelArgs, SamplingArgs};

const NAME: &str = "temper";
const EXIT_CODES: &str = "Exit codes: 2 the pipeline file or its data, 3 the environment (disk, network, an API), 4 a \
                          bug in temper, 130 interrupted.";

/// Runs RLHF experiments as a graph of cached stages.
#[derive(Debug, Parser)]
#[command(name = NAME, version, about, after_help = EXIT_CODES, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

const INSTALL_COMPLETIONS: &str = "\
Install:
  temper completions bash > ~/.local/share/bash-completion/completions/temper
  temper completions fish > ~/.config/fish/completions/temper.fish
  temper completions zsh > FOLDER/_temper        (a folder of $fpath)";
const INSTALL_PAGES: &str = "\
Install: temper man ~/.local/share/man/man1
Read without installing: temper man | man -l -";

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Create a small pipeline to start from, with a JSON schema for editors
    Init {
        /// Folder to create the files in
        #[arg(value_name = "FOLDER", default_value = ".")]
        folder: PathBuf,
    },
    /// Run the stages that are not cached, then render the report
    Run(RunArgs),
    /// Show what a run would do with each stage (reuse, run or pending) and why
    Plan {
        #[command(flatten)]
        file: PipelineArgs,
        #[command(flatten)]
        until: UntilArgs,
        #[command(flatten)]
        remote: RemoteArgs,
        /// Plan once for each value of the lists given by `--set`
        #[arg(long, requires = "set")]
        sweep: bool,
        #[command(flatten)]
        executor: ExecutorArgs,
    },
    /// Print the pipeline with profiles and `--set` applied, as YAML
    Config {
        /// The pipeline file
        #[arg(value_name = "PIPELINE")]
        file: PathBuf,
        #[command(flatten)]
        changes: ChangeArgs,
    },
    /// Show which field of a stage's recipe changed since the nearest earlier record, here or upstream
    Explain {
        #[command(flatten)]
        file: PipelineArgs,
        /// Name of an instance, such as `sft[s]`
        stage: String,
    },
    /// Draw the graph of stages and mark those that are cached
    Graph {
        #[command(flatten)]
        file: PipelineArgs,
        #[arg(long, value_enum, default_value_t = GraphFormat::Mermaid)]
        format: GraphFormat,
    },
    /// Show a stage's artifact: manifest, provenance, schema, first rows, metrics
    Show {
        #[command(flatten)]
        file: PipelineArgs,
        stage: String,
        /// Show the artifact of this run instead of that of the current recipe
        #[arg(long, value_name = "ID")]
        run: Option<String>,
        /// Number of rows to show of each table
        #[arg(long, default_value_t = 5)]
        rows: usize,
    },
    /// Print the folder of a stage's artifact
    Path {
        #[command(flatten)]
        file: PipelineArgs,
        stage: String,
        /// Print the artifact of this run instead of that of the current recipe
        #[arg(long, value_name = "ID")]
        run: Option<String>,
    },
    /// Compare runs, profiles or stages: parameters and metrics that differ, then curves
    Compare(CompareArgs),
    /// Write the metrics and curves of a run, or its labels and posts, for other tools
    Export(ExportArgs),
    /// List the runs in the store, newest last, or remove some
    Runs {
        #[command(subcommand)]
        command: Option<RunsCommand>,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Show what the results in the store take on the disk, and what keeps each
    Du {
        #[command(flatten)]
        collection: CollectionArgs,
        /// List every artifact
        #[arg(long)]
        all: bool,
    },
    /// Delete results that no run, pin or pipeline keeps; without `--delete` only list them
    Gc {
        #[command(flatten)]
        collection: CollectionArgs,
        /// Delete what is listed
        #[arg(long)]
        delete: bool,
    },
    /// Keep a stage's results from `gc`, under a name
    Pin {
        #[command(flatten)]
        file: PipelineArgs,
        /// A stage (all its instances), or an instance such as `sft[s]`
        stage: String,
        /// Name of the pin [default: STAGE]
        #[arg(long)]
        name: Option<String>,
    },
    /// List the pins in the store
    Pins {
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Remove pins
    Unpin {
        /// Names of pins
        #[arg(value_name = "PIN", required = true)]
        pins: Vec<String>,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Render the report of a run again
    Report {
        #[command(flatten)]
        file: PipelineArgs,
        /// Id of the run, or its beginning [default: the latest run of this pipeline]
        #[arg(long, value_name = "ID")]
        run: Option<String>,
        /// Also write every figure as SVG, the summary and all keys into this folder
        #[arg(long, value_name = "FOLDER")]
        export: Option<PathBuf>,
    },
    /// List the kinds of stages with their ports, parameters and defaults, or the types of artifacts
    Kinds {
        /// Show only this kind, in full
        kind: Option<String>,
        /// List the artifact types, or show the files and columns of one
        #[arg(long = "type", value_name = "TYPE", conflicts_with = "kind")]
        artifact_type: Option<Option<String>>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Print the JSON schema of the pipeline file
    Schema,
    /// Rehash everything in the store and report damage
    Verify {
        #[command(flatten)]
        store: StoreArgs,
        /// Move damaged files into the store's quarantine
        #[arg(long)]
        repair: bool,
    },
    /// Check the machine, the store, keys and network, and say what to do about each problem
    Doctor {
        /// Also check this pipeline file, its store, and what its stages need
        #[arg(value_name = "PIPELINE")]
        file: Option<PathBuf>,
        #[command(flatten)]
        changes: ChangeArgs,
        #[command(flatten)]
        store: StoreArgs,
    },
    /// Upload results to the remote store
    Push {
        #[command(flatten)]
        file: PipelineArgs,
        #[command(flatten)]
        until: UntilArgs,
        #[command(flatten)]
        remote: RemoteArgs,
        /// Upload every result in the store, not only those of this pipeline
        #[arg(long)]
        all: bool,
    },
    /// Fetch the results of the pipeline from the remote store
    Pull {
        #[command(flatten)]
        file: PipelineArgs,
        #[command(flatten)]
        until: UntilArgs,
        #[command(flatten)]
        remote: RemoteArgs,
    },
    /// Run a model folder on JSON lines from standard input; prints one line of output per line
    Lm {
        #[command(subcommand)]
        task: LmTask,
    },
    /// Print a completion script for a shell
    #[command(after_help = INSTALL_COMPLETIONS)]
    Completions { shell: Shell },
    /// Print the manual page, or write the pages of all commands into a folder
    #[command(after_help = INSTALL_PAGES)]
    Man {
        /// Folder to write the pages into
        #[arg(value_name = "FOLDER")]
        folder: Option<PathBuf>,
    },
    /// Execute one attempt at an instance (started by `run`)
    #[command(hide = true)]
    Attempt {
        /// The job's file, or the folder of a probe
        job: PathBuf,
        /// Write events and result to files beside the job, as a job of a batch system
        #[arg(long)]
        detached: bool,
        /// Answer a probe: show that this machine sees the store
        #[arg(long, conflicts_with = "detached")]
        probe: bool,
    },
}

#[derive(Clone, Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub file: PipelineArgs,
    #[command(flatten)]
    pub until: UntilArgs,
    #[command(flatten)]
    pub remote: RemoteArgs,
    #[command(flatten)]
    pub executor: ExecutorArgs,
    /// Ignore the remote store
    #[arg(long, conflicts_with = "remote")]
    pub no_remote: bool,
    /// Fetch from the remote store, but upload nothing
    #[arg(long)]
    pub no_upload: bool,
    /// Fail unless everything upstream of this stage can be reused
    #[arg(long, value_name = "STAGE")]
    pub from: Vec<String>,
    /// Re-run this stage even if it is cached
    #[arg(long, value_name = "STAGE")]
    pub force: Vec<String>,
    /// CPU threads to share among stages [default: all]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub jobs: Option<u16>,
    #[command(flatten)]
    pub device: DeviceArgs,
    /// Steps between two checkpoints of a learning stage (for `rl.ppo`: phases and evaluations) [default: about a
    /// minute]
    #[arg(long, value_name = "N")]
    pub checkpoint_every: Option<std::num::NonZeroU64>,
    /// Memory that the stages on this machine may use together, such as 16G [default: all]
    #[arg(long, value_name = "SIZE", value_parser = memory)]
    pub memory: Option<u64>,
    /// After a failure, continue with stages that do not depend on it
    #[arg(long)]
    pub keep_going: bool,
    /// Pay again for answers that were paid for once and are lost with their artifact
    #[arg(long)]
    pub pay: bool,
    /// Show the plan and stop
    #[arg(long)]
    pub dry_run: bool,
    /// Run once for each value of the lists given by `--set`, then compare the results
    #[arg(long, requires = "set")]
    pub sweep: bool,
    /// For the journal.
    #[arg(skip = command_line())]
    pub command_line: Vec<String>,
}

/// This process's command line.
fn command_line() -> Vec<String> {
    std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect()
}

#[derive(Debug, Subcommand)]
pub enum RunsCommand {
    /// Delete the journals and reports of runs
    Rm {
        /// Ids of runs, or their beginnings
        #[arg(value_name = "ID", required = true)]
        runs: Vec<String>,
        #[command(flatten)]
        store: StoreArgs,
    },
}

/// What garbage collection keeps.
#[derive(Debug, Args)]
pub struct CollectionArgs {
    /// Pipeline files whose current results are kept, with each of their profiles
    #[arg(value_name = "PIPELINE", required = true)]
    pub files: Vec<PathBuf>,
    #[command(flatten)]
    pub changes: ChangeArgs,
    /// Keep the results of the N newest runs only [default: of all runs]
    #[arg(long, value_name = "N")]
    pub keep_runs: Option<usize>,
    /// Keep the results of runs of the last DAYS days only [default: of all runs]
    #[arg(long, value_name = "DAYS", value_parser = days)]
    pub keep_days: Option<f64>,
    #[command(flatten)]
    pub store: StoreArgs,
}

const COMPARED: &str = "\
What to compare:
  20261123-124100-123-4f2a     a run, by its id or the beginning of it; `latest` is the newest of the pipeline
  +study, +tldr+claude, +      the pipeline with profiles, or without
  'rl[mean,301]'               a stage of the pipeline as given
  latest:'rl[mean,301]'        a stage of a run or of a profile";

#[derive(Debug, Args)]
#[command(after_help = COMPARED)]
pub struct CompareArgs {
    #[command(flatten)]
    pub file: PipelineArgs,
    /// Two or more runs, profiles or stages
    #[arg(value_name = "WHAT", required = true, num_args = 2..)]
    pub sides: Vec<String>,
    /// `csv` and `json` list every value of every instance in a row of its own
    #[arg(long, value_enum, default_value_t = CompareFormat::Table)]
    pub format: CompareFormat,
    /// Show every metric and curve that differs
    #[arg(long)]
    pub all: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CompareFormat {
    Table,
    /// A table in Markdown
    Md,
    Csv,
    Json,
}

#[derive(Debug, Args)]
pub struct ExportArgs {
    #[command(flatten)]
    pub file: PipelineArgs,
    /// Export only these stages or instances [default: all]
    #[arg(value_name = "STAGE")]
    pub stages: Vec<String>,
    /// Id of the run, or its beginning [default: the latest run of this pipeline]
    #[arg(long, value_name = "ID")]
    pub run: Option<String>,
    #[arg(long, value_enum)]
    pub format: ExportFormat,
    /// Folder to write into, created if missing
    #[arg(long, value_name = "FOLDER", default_value = "metrics")]
    pub out: PathBuf,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum ExportFormat {
    /// An event file per instance
    Tensorboard,
    /// One table, `metrics.csv`
    Csv,
    /// Preferences and posts as JSON lines for TRL's trainers: {"prompt", "chosen", "rejected"}, {"prompt", "completion"}
    Trl,
    /// The same as lists of messages with role and content
    TrlMessages,
}

/// The pipeline file and the changes applied to it.
#[derive(Clone, Debug, Args)]
pub struct PipelineArgs {
    /// The pipeline file
    #[arg(value_name = "PIPELINE")]
    pub file: PathBuf,
    #[command(flatten)]
    pub changes: ChangeArgs,
    #[command(flatten)]
    pub store: StoreArgs,
}

/// Changes to the pipeline file.
#[derive(Clone, Debug, Args)]
pub struct ChangeArgs {
    /// Apply a profile of the file; may repeat, later ones win
    #[arg(long, value_name = "NAME")]
    pub profile: Vec<String>,
    /// Change one value: stages.sft.with.lr=1e-4
    #[arg(long, value_name = "PATH=YAML")]
    pub set: Vec<String>,
}

#[derive(Clone, Debug, Args)]
pub struct StoreArgs {
    /// Folder of artifacts and runs [default: `cache` next to the pipeline file]
    #[arg(long, env = "TEMPER_STORE", value_name = "FOLDER")]
    pub store: Option<PathBuf>,
    /// Print JSON
    #[arg(long)]
    pub json: bool,
}

impl StoreArgs {
    /// These arguments of a subcommand, completed by those given before its name.
    pub fn or(self, outer: Self) -> Self {
        Self { store: self.store.or(outer.store), json: self.json || outer.json }
    }
}

#[derive(Clone, Debug, Args)]
pub struct RemoteArgs {
    /// Remote store to share results with: a folder, or a URL (s3, gs, az, https) [default: `remote` in the file]
    #[arg(long, value_name = "URL")]
    pub remote: Option<String>,
}

#[derive(Clone, Debug, Args)]
pub struct ExecutorArgs {
    /// Run all stages on this executor: `local`, `slurm`, or one of the file's [default: as the file says]
    #[arg(long, value_name = "NAME")]
    pub executor: Option<String>,
}

#[derive(Clone, Debug, Args)]
pub struct UntilArgs {
    /// Run only this stage and the stages it needs; may repeat
    #[arg(long, value_name = "STAGE")]
    pub until: Vec<String>,
}

fn days(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|x: &f64| *x >= 0.0 && x.is_finite());
    number.ok_or_else(|| "expected a number of days".to_owned())
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum GraphFormat {
    Mermaid,
    Dot,
    Svg,
}

/// The definition of the command line without internal commands, for completions and manual pages.
pub fn public_command() -> clap::Command {
    // clap_complete offers hidden commands too, and a `Command` cannot lose one: build another.
    let whole = Cli::command();
    let commands = whole.get_subcommands().filter(|command| !command.is_hide_set()).cloned();
    let about = whole.get_about().cloned().unwrap_or_default();
    clap::Command::new(NAME)
        .version(env!("CARGO_PKG_VERSION"))
        .about(about)
        .after_help(EXIT_CODES)
        .subcommand_required(true)
        .subcommands(commands)
}

pub fn parse() -> Cli {
    Cli::try_parse().unwrap_or_else(|error| {
        // An argument may be a file name expanded by the shell; clap repeats it unescaped.
        if error.use_stderr() && std::env::args_os().any(|a| a.to_string_lossy().contains(is_terminal_control)) {
            errln!("{}", error.render().to_string().trim_end());
            std::process::exit(error.exit_code());
        }
        // Writing help or the version may fail, for example on a full disk.
        crate::output::note_failure(error.print());
        match crate::output::finish() {
            Err(failure) if error.exit_code() == 0 => {
                errln!("error: {failure}");
                std::process::exit(i32::from(failure.exit_code()))
            }
            _ => std::process::exit(error.exit_code()),
        }
    })
}

/// MiB.
fn memory(text: &str) -> Result<u64, String> {
    engine::document::resources::parse_memory(text).ok_or_else(|| "expected a size such as 500M or 16G".to_owned())
}
