//! The command line. Knows what may be asked, not how it is done.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use engine::text::steers_terminal;

/// Runs RLHF experiments as a graph of cached stages.
#[derive(Debug, Parser)]
#[command(name = "temper", version, about, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub command: Command,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Plan, then run what is missing
    Run(Run),
    /// What a run would do: reuse, run or pending, and why
    Plan {
        #[command(flatten)]
        file: Pipeline,
        #[command(flatten)]
        cut: Cut,
    },
    /// Which field of a stage's recipe changed, against the nearest earlier record
    Explain {
        #[command(flatten)]
        file: Pipeline,
        /// An instance, such as `sft[s]`
        stage: String,
    },
    /// The graph with what is cached
    Graph {
        #[command(flatten)]
        file: Pipeline,
        #[arg(long, value_enum, default_value_t = GraphFormat::Mermaid)]
        format: GraphFormat,
    },
    /// A stage's artifact: manifest, provenance, schema, first rows, metrics
    Show {
        #[command(flatten)]
        file: Pipeline,
        stage: String,
        /// Rows of each table
        #[arg(long, default_value_t = 5)]
        rows: usize,
    },
    /// The folder of a stage's artifact
    Path {
        #[command(flatten)]
        file: Pipeline,
        stage: String,
    },
    /// The runs in the store, newest last
    Runs {
        #[command(flatten)]
        store: StoreAt,
    },
    /// Render a run's report again
    Report {
        #[command(flatten)]
        file: Pipeline,
        /// A run's id; the latest of this pipeline if absent
        #[arg(long)]
        run: Option<String>,
        /// Also write every figure as SVG, the summary and all keys into this folder
        #[arg(long, value_name = "FOLDER")]
        export: Option<PathBuf>,
    },
    /// The kinds of stages with ports, parameters and defaults
    Kinds {
        /// One kind, in full
        kind: Option<String>,
        #[arg(long)]
        json: bool,
    },
    /// The JSON schema of the pipeline file
    Schema,
    /// Rehash everything in the store
    Verify {
        #[command(flatten)]
        store: StoreAt,
        /// Move what is damaged into the store's quarantine
        #[arg(long)]
        repair: bool,
    },
    /// A model folder at work: JSON lines on standard input, one line of output for each
    Lm {
        #[command(subcommand)]
        task: Lm,
    },
    /// One execution of one instance (started by `run`)
    #[command(hide = true)]
    Attempt { job: PathBuf },
}

#[derive(Debug, Args)]
pub struct Run {
    #[command(flatten)]
    pub file: Pipeline,
    #[command(flatten)]
    pub cut: Cut,
    /// Everything upstream of this stage must be reusable
    #[arg(long, value_name = "STAGE")]
    pub from: Vec<String>,
    /// Run this stage although its record would do
    #[arg(long, value_name = "STAGE")]
    pub force: Vec<String>,
    /// CPU threads to share out among stages [default: all]
    #[arg(short, long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub jobs: Option<u16>,
    /// Steps between two checkpoints of a stage that learns (of `rl.ppo`: phases and evaluations) [default: about a minute]
    #[arg(long, value_name = "N")]
    pub checkpoint_every: Option<std::num::NonZeroU64>,
    /// After a failure, go on with what does not depend on it
    #[arg(long)]
    pub keep_going: bool,
    /// Pay again for answers that were paid for once and are lost with their artifact
    #[arg(long)]
    pub pay: bool,
    /// Tell the plan and stop
    #[arg(long)]
    pub dry_run: bool,
}

/// The pipeline file and what is laid over it.
#[derive(Debug, Args)]
pub struct Pipeline {
    /// The pipeline file
    #[arg(value_name = "PIPELINE")]
    pub file: PathBuf,
    /// A profile of the file; may repeat, later ones win
    #[arg(long, value_name = "NAME")]
    pub profile: Vec<String>,
    /// Change one place: stages.sft.with.lr=1e-4
    #[arg(long, value_name = "PATH=YAML")]
    pub set: Vec<String>,
    #[command(flatten)]
    pub store: StoreAt,
}

#[derive(Debug, Args)]
pub struct StoreAt {
    /// Where artifacts and runs lie [default: `cache` beside the pipeline file]
    #[arg(long, env = "TEMPER_STORE", value_name = "FOLDER")]
    pub store: Option<PathBuf>,
    /// For machines
    #[arg(long)]
    pub json: bool,
}

#[derive(Debug, Args)]
pub struct Cut {
    /// Run no further than this stage; may repeat
    #[arg(long, value_name = "STAGE")]
    pub until: Vec<String>,
}

/// What a model is asked for each line.
#[derive(Debug, Subcommand)]
pub enum Lm {
    /// {"text": …} or {"ids": […]} gives {"ids": […], "logprobs": [null, …]}: log p(ids[t] | ids[<t]), in nats
    Logprobs {
        #[command(flatten)]
        model: ModelAt,
        /// A LoRA adapter to lay over the model: a PEFT folder
        #[arg(long, value_name = "FOLDER")]
        adapter: Option<PathBuf>,
    },
    /// {"prompt": …} gives {"prompt", "response", "ids"}: the text and the ids of what the model writes after it
    Generate {
        #[command(flatten)]
        model: ModelAt,
        /// A LoRA adapter to lay over the model: a PEFT folder
        #[arg(long, value_name = "FOLDER")]
        adapter: Option<PathBuf>,
        #[command(flatten)]
        how: Sampling,
    },
    /// {"prompt": …, "response": …} gives {"score"} of a RewardModel, {"scores", "mean", "variance"} of an Ensemble
    Score {
        #[command(flatten)]
        model: ModelAt,
    },
}

#[derive(Debug, Args)]
pub struct ModelAt {
    /// The model's folder (config.json, weights, tokenizer.json) or a .gguf file; for `score` an artifact's folder
    #[arg(long, value_name = "PATH")]
    pub model: PathBuf,
    /// Lines that are read, computed and answered together
    #[arg(long, value_name = "LINES", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub batch: u16,
    /// CPU threads; no result depends on their number [default: all]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

/// How a response is drawn.
#[derive(Debug, Args)]
pub struct Sampling {
    #[arg(long, value_name = "N", default_value_t = 48)]
    pub max_new_tokens: usize,
    /// The first that many tokens cannot be the end of the text
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub min_new_tokens: usize,
    #[arg(long, value_name = "T", default_value_t = 1.0, value_parser = positive)]
    pub temperature: f64,
    /// Draw from the most probable tokens that together reach this probability
    #[arg(long, value_name = "P", default_value_t = 1.0, value_parser = share)]
    pub top_p: f64,
    /// Take the most probable token each time
    #[arg(long, conflicts_with_all = ["temperature", "top_p", "seed"])]
    pub greedy: bool,
    /// A response depends on this, on its line's number and on its prompt
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub seed: u64,
}

fn positive(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|x: &f64| *x > 0.0 && x.is_finite());
    number.ok_or_else(|| "expected a number above 0 (for the most probable token: --greedy)".to_owned())
}

fn share(text: &str) -> Result<f64, String> {
    let number = text.parse().ok().filter(|x| *x > 0.0 && *x <= 1.0);
    number.ok_or_else(|| "expected a number above 0 and at most 1".to_owned())
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum GraphFormat {
    Mermaid,
    Dot,
    Svg,
}

pub fn parse() -> Cli {
    Cli::try_parse().unwrap_or_else(|error| {
        // An argument may be a file's name that a shell found; clap repeats it as it is.
        if error.use_stderr() && std::env::args_os().any(|a| a.to_string_lossy().contains(steers_terminal)) {
            note!("{}", error.render().to_string().trim_end());
            std::process::exit(error.exit_code());
        }
        // Help or the version may be written to a full disk.
        crate::output::note_failure(error.print());
        match crate::output::finish() {
            Err(failure) if error.exit_code() == 0 => {
                note!("error: {failure}");
                std::process::exit(i32::from(failure.exit_code()))
            }
            _ => std::process::exit(error.exit_code()),
        }
    })
}
