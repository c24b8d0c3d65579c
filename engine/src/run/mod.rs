//! Runs a plan: rounds of attempts until everything that can be made is made.
//!
//! Each round gives dagrs the instances that must run or are pending; for reused ones the digest is enough. If nothing
//! must run, no thread and no runtime is started. If a round found damaged inputs, the run plans again and continues
//! with another round.

mod child;
mod conductor;
mod flow;
mod inputs;
mod interrupt;
mod ledger;
mod node;
mod queue;
mod record;
pub(crate) mod redact;
mod state;
mod supply;
mod uploads;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use crate::checkpoint::Cadence;
use crate::error::Result;
use crate::graph::Graph;
use crate::journal::{Event, Journal};
use crate::kind::Registry;
use crate::names::{Digest, InstanceName};
use crate::plan::{Flags, Plan, State};
use crate::remote::{Remote, Shared};
use crate::store::Store;
use conductor::{Conductor, Round};
use ledger::{Fate, Ledger};
use node::Work;
use state::Word;
use uploads::Uploads;

/// Options of a run.
#[derive(Clone, Debug)]
pub struct RunOptions {
    /// Total number of CPU threads for attempts. At least one.
    pub jobs: usize,
    /// Whether to continue with stages that do not depend on a failed one; otherwise nothing new starts after a
    /// failure.
    pub keep_going: bool,
    /// Whether answers that were paid for and lost may be paid for again.
    pub pay: bool,
    /// The flags of the plan, needed again to decide pending instances.
    pub flags: Flags,
    /// The binary to start as `COMMAND attempt JOB.json`.
    pub command: PathBuf,
    /// Environment variables that the program sets for its own attempts, for example for its allocator.
    pub env: Vec<(String, String)>,
    /// Pause before the second try of a stage with a transient failure; before the third it is four times as long.
    pub retry_delay: Duration,
    /// When stages write checkpoints.
    pub cadence: Cadence,
    /// Recorded in the journal.
    pub profiles: Vec<String>,
    /// Command line for the journal, where its secrets are redacted.
    pub command_line: Vec<String>,
    /// Pipeline file as given on the command line, for the journal.
    pub file: Option<String>,
    /// The remote store to fetch from and to upload to.
    pub remote: Option<Arc<Remote>>,
}

impl Default for RunOptions {
    fn default() -> Self {
        Self {
            jobs: std::thread::available_parallelism().map_or(1, usize::from),
            keep_going: false,
            pay: false,
            flags: Flags::default(),
            command: PathBuf::from("/proc/self/exe"),
            env: Vec::new(),
            retry_delay: Duration::from_secs(1),
            cadence: Cadence::default(),
            profiles: Vec::new(),
            command_line: Vec::new(),
            file: None,
            remote: None,
        }
    }
}

/// The result of a run.
#[derive(Debug)]
pub struct Outcome {
    pub run_id: String,
    /// Folder with journal, graph.json and report.
    pub folder: PathBuf,
    pub ran: Vec<InstanceName>,
    pub reused: Vec<InstanceName>,
    /// In the order in which they failed: the first is the cause, to be shown last.
    pub failed: Vec<Failure>,
    /// Neither run nor reused, because something failed or the run was interrupted.
    pub skipped: Vec<InstanceName>,
    /// By index of the graph's instances.
    pub digests: Vec<Option<Digest>>,
    pub interrupted: bool,
    pub seconds: f64,
}

impl Outcome {
    /// 0, the code of the first failure, or 130 after an interruption.
    pub fn exit_code(&self) -> u8 {
        match self.failed.first() {
            _ if self.interrupted => interrupt::EXIT_CODE,
            Some(failure) => failure.error.exit_code(),
            None => 0,
        }
    }
}

/// A stage's failure as shown to the user.
#[derive(Clone, Debug, PartialEq)]
pub struct Failure {
    pub stage: InstanceName,
    pub error: crate::error::Error,
    /// `None` if no attempt was started.
    pub log: Option<PathBuf>,
    /// The last lines of the log.
    pub tail: Vec<String>,
}

impl Failure {
    fn without_log(stage: &InstanceName, error: crate::error::Error) -> Self {
        Self { stage: stage.clone(), error, log: None, tail: Vec::new() }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.stage, self.error)?;
        if !self.tail.is_empty() {
            write!(f, "\n  the last lines of its log:")?;
            self.tail.iter().try_for_each(|line| write!(f, "\n    {line}"))?;
        }
        match &self.log {
            Some(log) => write!(f, "\n  log: {}", log.display()),
            None => Ok(()),
        }
    }
}

/// Maximum number of rounds, which repeat when artifacts turn out to be damaged.
const ROUNDS: usize = 8;

/// Runs a plan. Events go to the journal and to `events`, which is called on this thread.
///
/// A stage's failure is part of the outcome, not an error.
///
/// # Errors
/// When the journal or the store cannot be written, or on an internal error.
pub fn run(
    graph: &Graph,
    plan: &Plan,
    store: &Store,
    registry: &Registry,
    options: &RunOptions,
    mut events: impl FnMut(&Event),
) -> Result<Outcome> {
    // A finished store on a read-only disk can still be reported on.
    let elsewhere = !store.is_writable() && plan.stages.iter().all(|stage| matches!(stage.state, State::Reuse { .. }));
    let journal = if elsewhere { Journal::create_elsewhere()? } else { Journal::create(&store.runs())? };
    let run = journal.id().to_owned();
    let folder = journal.folder().to_owned();
    let mut ledger = Ledger::begin(graph, journal, options, &mut events)?;
    if elsewhere {
        let message = format!(
            "{}: the store cannot be written to; this run's journal and report are in {}",
            store.root().display(),
            folder.display()
        );
        ledger.tell(Event::Warning { stage: None, message });
    }
    ledger.planned(plan);
    let mut replanned = None;
    let mut set_aside: Vec<Digest> = Vec::new();
    let shared = Shared { store, remote: options.remote.as_deref() };
    let uploads = options.remote.as_ref().and_then(|remote| Uploads::start(remote, store));
    for number in 1.. {
        let flags = ledger.flags_left(&options.flags);
        if let Some(plan) =
            supply::supply(replanned.as_ref().unwrap_or(plan), graph, registry, shared, &flags, &mut ledger)?
        {
            replanned = Some(plan);
        }
        let plan = replanned.as_ref().unwrap_or(plan);
        let bytes = plan.stages.iter().map(|stage| stage.bytes).collect();
        let keys = uploads.as_ref().map(Uploads::sender);
        let work = Work { graph, store, registry, options, flags, bytes, run: &run, uploads: keys };
        let round = one_round(&work, plan, &mut ledger)?;
        let again = round.damaged.iter().any(|(_, input, _)| !set_aside.contains(input));
        if round.damaged.is_empty() || !again || number == ROUNDS || ledger.stopping() {
            ledger.give_up(round.damaged);
            break;
        }
        for (node, input, error) in round.damaged {
            ledger.warn(node, format!("{}; it is made again", error.message));
            set_aside.push(input);
        }
        let flags = ledger.flags_left(&options.flags);
        match crate::plan::plan_through(graph, registry, store, &shared, &flags) {
            Ok(plan) => {
                ledger.planned(&plan);
                replanned = Some(plan);
            }
            Err(error) => {
                ledger.finish()?;
                return Err(error);
            }
        }
    }
    if let Some(uploads) = uploads {
        uploads.finish(&mut ledger);
    }
    supply::warn(shared, &mut ledger);
    ledger.finish()
}

/// Records the instances that the plan reuses and runs the rest.
fn one_round<'a>(work: &'a Work<'a>, plan: &Plan, ledger: &mut Ledger) -> Result<Round> {
    let graph = work.graph;
    let mut open = vec![false; graph.instances.len()];
    let mut costs = vec![0; graph.instances.len()];
    for stage in &plan.stages {
        let node = stage.instance;
        if let State::Reuse { key, digest } = &stage.state {
            ledger.digests[node] = Some(*digest);
            // A pending instance may turn out to have the same key.
            ledger.twins.insert(&graph.instances[node].name, *key)?;
            ledger.reuse(node, *key, *digest, false);
        } else {
            open[node] = ledger.fates[node] != Some(Fate::Failed);
            // Count an unknown duration as a second, so that longer chains still start first.
            costs[node] = (stage.expected_seconds.unwrap_or(1.0) * 1000.0) as u64;
        }
    }
    if !open.contains(&true) {
        return Ok(Round::default());
    }
    let inputs_of = |node: usize| {
        let sources = graph.instances[node].inputs.iter().flat_map(|port| &port.from);
        sources.map(|source| source.instance).collect::<BTreeSet<usize>>()
    };
    let mut parents = BTreeMap::new();
    for node in 0..open.len() {
        if !open[node] {
            continue;
        }
        let inputs = inputs_of(node);
        // Instances that depend on a failure of an earlier round stay skipped.
        let root = inputs.iter().find_map(|input| match ledger.fates[*input] {
            Some(Fate::Failed) => Some(*input),
            Some(Fate::Skipped { root }) => Some(root),
            _ => None,
        });
        match root {
            Some(root) => {
                ledger.skip(node, root);
                open[node] = false;
            }
            None => drop(parents.insert(node, inputs.into_iter().filter(|input| open[*input]).collect::<Vec<_>>())),
        }
    }
    let ranks = queue::ranks(&costs, |node| inputs_of(node).into_iter().collect());
    let digests = ledger.digests.clone();
    let (words, heard) = channel();
    let _guard = interrupt::on_signal({
        let words = words.clone();
        move || drop(words.send(Word::Interrupt))
    });
    std::thread::scope(|scope| {
        Conductor::new(scope, work, ledger, &ranks, words, &parents, digests).conduct(heard, parents)
    })
}
