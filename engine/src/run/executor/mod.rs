//! Executors: the places where attempts run.
//!
//! [`Executor::run`] blocks the instance's thread until its attempt ends, wherever that runs. Events reach the runner on the
//! same thread, and another thread ends the attempt through its [`KillHandle`].

mod batch;
mod kill;
mod local;

use std::collections::BTreeMap;
use std::os::fd::BorrowedFd;
use std::path::Path;
use std::process::ExitStatus;
use std::time::Duration;

pub(super) use batch::{Batch, job_name, probe};
pub(super) use kill::{CHECKPOINT_PERIOD, KillHandle};
pub(crate) use local::is_below;
pub(super) use local::{Local, unreported_exit};

use super::gpu_locks::GpuLock;
use super::redact::Secrets;
use crate::attempt::FinalMessage;
use crate::context::StageEvent;
use crate::document::{self, Resources};
use crate::error::{Error, Result};
use crate::graph::Graph;
use crate::names::Key;
use crate::plan::{Plan, PlannedState};
use crate::store::{AttemptFolder, JobName, Lease, Platform, Store};

/// Environment variables that every attempt gets, besides those that its kind declares.
const ALWAYS_PASSED: [&str; 4] = ["PATH", "HOME", "LANG", "TMPDIR"];
/// Variables through which a user tells a GPU's driver which devices and libraries to use; for attempts that use a GPU. A job
/// of a batch system gets those of its node instead.
const DEVICE_VARIABLES: [&str; 3] = ["CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "LD_LIBRARY_PATH"];
/// Environment variables that limit the number of threads that libraries start.
const THREAD_LIMITS: [&str; 4] = ["RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"];

/// The environment variables of an attempt that a program which it starts may need too.
pub fn passed_variables() -> impl Iterator<Item = &'static str> {
    ALWAYS_PASSED.into_iter().chain(DEVICE_VARIABLES).chain(THREAD_LIMITS)
}

pub(super) trait Executor: Send + Sync {
    /// Runs an attempt to its end on this thread. Passes its events on, redacted.
    ///
    /// # Errors
    /// When it cannot be started or followed to its end.
    fn run(
        &self,
        launch: &LaunchOptions<'_>,
        kill_handle: &KillHandle,
        on_event: &mut dyn FnMut(AttemptEvent),
    ) -> Result<AttemptEnd>;
}

/// The executors of a pipeline.
pub(super) struct Executors {
    local: Local,
    batch: BTreeMap<String, Batch>,
}

impl Executors {
    pub fn new(settings: &document::Executors) -> Self {
        let batch = settings.iter().map(|(name, settings)| (name.clone(), Batch::new(name, settings)));
        Self { local: Local, batch: batch.collect() }
    }

    /// Whether there is only the local one.
    pub fn is_empty(&self) -> bool {
        self.batch.is_empty()
    }

    /// `None` is the local one.
    pub fn get(&self, name: Option<&str>) -> Result<&dyn Executor> {
        match name {
            None => Ok(&self.local),
            Some(name) => match self.batch.get(name) {
                Some(batch) => Ok(batch),
                None => Err(Error::internal(format!("the executor `{name}` of a stage does not exist"))),
            },
        }
    }

    pub fn batch(&self, name: &str) -> Option<&Batch> {
        self.batch.get(name)
    }
}

/// The executors other than the local one that the stages to run use; pending stages count.
fn used<'a>(graph: &'a Graph, plan: &Plan) -> Vec<&'a str> {
    let open = plan.stages.iter().filter(|planned| !matches!(planned.state, PlannedState::Reuse { .. }));
    let mut names: Vec<&str> =
        open.filter_map(|planned| graph.instances[planned.instance].placement.executor.as_deref()).collect();
    names.sort_unstable();
    names.dedup();
    names
}

/// Programs of batch systems that the stages to run need and that are not on the PATH.
pub fn missing_programs(graph: &Graph, plan: &Plan) -> Vec<Error> {
    let executors = Executors::new(&graph.executors);
    let used = used(graph, plan).into_iter().filter_map(|name| executors.batch(name));
    used.flat_map(Batch::missing_programs).collect()
}

/// Settings to start one attempt.
pub(super) struct LaunchOptions<'a> {
    pub store: &'a Store,
    pub key: Key,
    pub command: &'a Path,
    pub job: &'a Path,
    pub folder: &'a AttemptFolder,
    pub threads: usize,
    pub resources: &'a Resources,
    /// Maximum wall time.
    pub timeout: Option<Duration>,
    /// Whether the attempt listens for requests to write a checkpoint and end.
    pub can_stop: bool,
    /// The GPUs of this machine that the attempt may use.
    pub gpus: &'a [GpuLock],
    /// Names of further environment variables to pass on.
    pub env: &'a [String],
    /// Variables that this program sets for its own attempts.
    pub set_env: &'a [(String, String)],
    /// The device that the attempt computes on.
    pub device: &'a str,
    pub secrets: &'a Secrets,
    /// The key's lock. A child process inherits it, so that the key stays locked as long as the attempt or any program
    /// that it started lives.
    pub lock: BorrowedFd<'a>,
    /// The lease of an attempt that outlives the orchestrator, without the job's id.
    pub lease: &'a Lease,
}

/// What happens while an attempt runs.
pub(super) enum AttemptEvent {
    Stage(StageEvent),
    /// It is a job of a batch system; `attached`: submitted by an earlier run.
    Job {
        executor: String,
        id: String,
        attached: bool,
    },
    /// About the executor, not about the attempt.
    Warning(String),
}

/// How an attempt ended.
#[derive(Debug)]
pub(super) enum AttemptExit {
    Reported(FinalMessage),
    /// It was ended after its maximum time.
    TimedOut,
    /// It ended without a final message.
    Unreported(ExitStatus),
    /// It was killed through its [`KillHandle`], or for that reason never started.
    Killed,
    /// It goes on without this orchestrator.
    Left,
}

/// How, where and when an attempt ran.
#[derive(Debug)]
pub(super) struct AttemptEnd {
    pub exit: AttemptExit,
    pub execution: Execution,
}

/// Where and when an attempt ran, for the provenance of its artifact.
#[derive(Clone, Debug)]
pub(super) struct Execution {
    pub host: String,
    pub platform: Platform,
    /// Seconds since 1970.
    pub started: f64,
    /// Wall time.
    pub seconds: f64,
    /// Executor and id of a job.
    pub job: Option<JobName>,
}
