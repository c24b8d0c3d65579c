//! Runs a plan: rounds of attempts until everything that can be made is made.
//!
//! Each round gives dagrs the instances that must run or are pending; for reused ones the digest is enough. If nothing
//! must run, no thread and no runtime is started. If a round found damaged inputs, the run plans again and continues
//! with another round.

mod executor;
mod fit;
mod flow;
mod gpu_locks;
mod inputs;
mod interrupt;
pub(crate) mod log;
mod node_runner;
mod node_state;
mod prefetch;
mod queue;
mod reattach;
mod record;
pub(crate) mod redact;
mod run_state;
mod runner_event;
mod scheduler;
mod uploader;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::Duration;

use crate::context::Cadence;
use crate::error::Result;
use crate::graph::Graph;
use crate::journal::{Event, Journal};
use crate::kind::Registry;
use crate::machine::Machine;
use crate::names::{Digest, InstanceName};
use crate::plan::{Flags, Plan, PlannedState};
use crate::remote::{CombinedStore, Remote};
use crate::store::Store;
pub(crate) use executor::is_below;
use executor::{Executors, KillHandle};
pub use executor::{missing_programs, passed_variables};
pub use fit::{needs_gpus, unfit};
pub use interrupt::EXIT_CODE as INTERRUPTED;
use node_runner::NodeRunner;
use node_state::SchedulerEvent;
use run_state::{InstanceResult, RunState};
use scheduler::{RoundResult, Scheduler};
use uploader::Uploader;

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
    /// The memory and the GPUs that attempts share.
    pub machine: Machine,
    /// What attempts that train or sample take by default.
    pub device_share: DeviceShare,
    /// The device that attempts compute on, which is provenance.
    pub device: String,
    /// Whether to confine attempts to their inputs and their own folders, where the kernel can.
    pub confine: bool,
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

/// What an attempt that trains or samples takes of this machine's devices, unless its stage says something else.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DeviceShare {
    /// It computes on the CPU.
    #[default]
    Nothing,
    /// One of the GPUs.
    Gpu,
    /// The only device.
    Device,
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
            machine: Machine::default(),
            device_share: DeviceShare::Nothing,
            device: "cpu".to_owned(),
            confine: true,
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
pub struct RunOutcome {
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

impl RunOutcome {
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
const MAX_ROUNDS: usize = 8;

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
) -> Result<RunOutcome> {
    // A finished store on a read-only disk can still be reported on.
    let read_only =
        !store.is_writable() && plan.stages.iter().all(|stage| matches!(stage.state, PlannedState::Reuse { .. }));
    let journal = if read_only { Journal::create_in_temp_folder()? } else { Journal::create(&store.runs())? };
    let run = journal.id().to_owned();
    let folder = journal.folder().to_owned();
    let mut run_state = RunState::start(graph, journal, options, &mut events)?;
    if read_only {
        let message = format!(
            "{}: the store cannot be written to; this run's journal and report are in {}",
            store.root().display(),
            folder.display()
        );
        run_state.emit(Event::Warning { stage: None, message });
    }
    run_state.planned(plan);
    let executors = Executors::new(&graph.executors);
    match probe(&executors, graph, plan, store, options, &mut run_state) {
        Ok(interrupted) => run_state.interrupted = interrupted,
        Err(error) => {
            run_state.finish()?;
            return Err(error);
        }
    }
    let mut replanned = None;
    let mut remade: Vec<Digest> = Vec::new();
    let combined = CombinedStore { store, remote: options.remote.as_deref() };
    let uploader = options.remote.as_ref().and_then(|remote| Uploader::start(remote, store));
    for number in 1.. {
        let flags = run_state.remaining_flags(&options.flags);
        let current = replanned.as_ref().unwrap_or(plan);
        if let Some(plan) = prefetch::prefetch(current, graph, registry, combined, &flags, &mut run_state)? {
            replanned = Some(plan);
        }
        let plan = replanned.as_ref().unwrap_or(plan);
        let needs = plan.stages.iter().map(|stage| stage.need).collect();
        let expected_memory = plan.stages.iter().map(|stage| stage.expected.memory).collect();
        let uploads = uploader.as_ref().map(Uploader::sender);
        let runner = NodeRunner {
            graph,
            store,
            registry,
            options,
            executors: &executors,
            flags,
            needs,
            expected_memory,
            run: &run,
            uploads,
        };
        let round = run_round(&runner, plan, &mut run_state)?;
        let again = round.damaged.iter().any(|(_, input, _)| !remade.contains(input));
        if round.damaged.is_empty() || !again || number == MAX_ROUNDS || run_state.stopping() {
            run_state.fail_damaged(round.damaged);
            break;
        }
        for (node, input, error) in round.damaged {
            run_state.warn(node, format!("{}; it will be made again", error.message));
            remade.push(input);
        }
        let flags = run_state.remaining_flags(&options.flags);
        match crate::plan::plan_with_view(graph, registry, store, &combined, &flags) {
            Ok(plan) => {
                run_state.planned(&plan);
                replanned = Some(plan);
            }
            Err(error) => {
                run_state.finish()?;
                return Err(error);
            }
        }
    }
    if let Some(uploader) = uploader {
        uploader.finish(&mut run_state);
    }
    prefetch::emit_warnings(combined, &mut run_state);
    run_state.finish()
}

/// Checks that the batch systems of the plan see the store. Returns whether the run was interrupted meanwhile.
fn probe(
    executors: &Executors,
    graph: &Graph,
    plan: &Plan,
    store: &Store,
    options: &RunOptions,
    run_state: &mut RunState<'_>,
) -> Result<bool> {
    let kill_handle = KillHandle::default();
    let needs_signals = !executors.is_empty();
    let _guard = needs_signals.then(|| {
        let kill_handle = kill_handle.clone();
        interrupt::on_signal(move |interruption| kill_handle.kill(interruption))
    });
    executor::probe::probe(executors, graph, plan, store, options, &kill_handle, |event| run_state.emit(event))
}

/// Records the instances that the plan reuses and runs the rest.
fn run_round<'a>(runner: &'a NodeRunner<'a>, plan: &Plan, run_state: &mut RunState) -> Result<RoundResult> {
    let graph = runner.graph;
    let mut unfinished = vec![false; graph.instances.len()];
    let mut costs = vec![0; graph.instances.len()];
    for stage in &plan.stages {
        let node = stage.instance;
        if let PlannedState::Reuse { key, digest } = &stage.state {
            run_state.digests[node] = Some(*digest);
            // A pending instance may turn out to have the same key.
            run_state.duplicates.insert(&graph.instances[node].name, *key)?;
            run_state.reuse(node, *key, *digest, false);
        } else {
            unfinished[node] = run_state.results[node] != Some(InstanceResult::Failed);
            // Count an unknown duration as a second, so that longer chains still start first.
            costs[node] = (stage.expected.seconds.unwrap_or(1.0) * 1000.0) as u64;
        }
    }
    if !unfinished.contains(&true) {
        return Ok(RoundResult::default());
    }
    let inputs_of = |node: usize| {
        let sources = graph.instances[node].inputs.iter().flat_map(|port| &port.from);
        sources.map(|source| source.instance).collect::<BTreeSet<usize>>()
    };
    let mut parents = BTreeMap::new();
    for node in 0..unfinished.len() {
        if !unfinished[node] {
            continue;
        }
        let inputs = inputs_of(node);
        // Instances that depend on a failure of an earlier round stay skipped.
        let root = inputs.iter().find_map(|input| match run_state.results[*input] {
            Some(InstanceResult::Failed) => Some(*input),
            Some(InstanceResult::Skipped { root }) => Some(root),
            _ => None,
        });
        match root {
            Some(root) => {
                run_state.skip(node, root);
                unfinished[node] = false;
            }
            None => {
                drop(parents.insert(node, inputs.into_iter().filter(|input| unfinished[*input]).collect::<Vec<_>>()))
            }
        }
    }
    let ranks = queue::ranks(&costs, |node| inputs_of(node).into_iter().collect());
    let digests = run_state.digests.clone();
    let (events, inbox) = channel();
    let _guard = interrupt::on_signal({
        let events = events.clone();
        move |interruption| drop(events.send(SchedulerEvent::Interrupt(interruption)))
    });
    std::thread::scope(|scope| {
        Scheduler::new(scope, runner, run_state, &ranks, events, &parents, digests).run(inbox, parents)
    })
}
