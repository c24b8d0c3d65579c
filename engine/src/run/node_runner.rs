//! Executes one instance on a thread of its own: decides, checks inputs, runs the attempt, records the result.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::Duration;

use super::executor::{AttemptEnd, AttemptEvent, AttemptExit, Executors, KillHandle, LaunchOptions, unreported_exit};
use super::gpu_locks::GpuLock;
use super::log;
use super::queue::Demand;
use super::reattach::InputState;
use super::redact::Secrets;
use super::runner_event::RunnerEvent;
use super::{Failure, RunOptions, fit};
use crate::attempt::{Detached, FinalMessage, Job};
use crate::context::{Input, StageEvent};
use crate::document::resources::clock;
use crate::error::{Error, Result};
use crate::graph::{Graph, Instance};
use crate::kind::Registry;
use crate::names::{Digest, Key};
use crate::plan::{ArtifactNeed, Decision, Flags, Reason, Recipe, RecipeState};
use crate::store::{ActionRecord, AttemptFolder, KeyLock, LockHolder, Store};

/// Number of lines of a failed attempt's log to show.
const TAIL_LINES: usize = 10;

/// Digests by instance, as far as they are known.
pub(super) type Digests = Arc<Vec<Option<Digest>>>;

/// The data that the work on every instance shares.
pub(super) struct NodeRunner<'a> {
    pub graph: &'a Graph,
    pub store: &'a Store,
    pub registry: &'a Registry,
    pub options: &'a RunOptions,
    pub executors: &'a Executors,
    /// The flags without the stages that this run has already forced.
    pub flags: Flags,
    /// By instance: whether the bytes of its artifact are known to be needed.
    pub needs: Vec<ArtifactNeed>,
    /// By instance: the expected peak memory of an attempt, in bytes.
    pub expected_memory: Vec<Option<u64>>,
    pub run: &'a str,
    /// Takes the keys of new records, if there is a remote store that can be written to.
    pub uploads: Option<Sender<Key>>,
}

/// The decision for an instance whose inputs are known.
pub(super) enum NodeDecision {
    Reuse { key: Key, digest: Digest },
    Run(Box<ReadyNode>),
}

/// An instance that must run.
#[derive(Clone)]
pub(super) struct ReadyNode {
    pub recipe: Recipe,
    pub key: Key,
    pub reason: Reason,
}

/// Request to run one instance, with slots assigned.
pub(super) struct AttemptRequest {
    pub node: usize,
    pub ready: Box<ReadyNode>,
    /// The key's lock, if it is already held.
    pub lock: Option<KeyLock>,
    pub kill_handle: KillHandle,
    pub threads: usize,
    pub gpus: Vec<GpuLock>,
    /// Number of earlier failed tries.
    pub tries: u32,
    pub digests: Digests,
}

/// The outcome of one try.
pub(super) enum AttemptOutcome {
    Made {
        key: Key,
        digest: Digest,
        seconds: f64,
        peak_bytes: u64,
    },
    /// Another process made it while this one waited for the lock.
    Reused {
        key: Key,
        digest: Digest,
    },
    /// Another process holds the key; nothing was done.
    Busy {
        key: Key,
    },
    /// An input is missing or damaged (and quarantined): it must be made again before this instance.
    InputDamaged {
        input: Digest,
        error: Error,
    },
    /// The lock is kept for the next try.
    Failed {
        ready: Box<ReadyNode>,
        lock: Option<KeyLock>,
        failure: Failure,
    },
    Killed,
    /// Its job goes on after the end of this run.
    Left,
}

/// Why a try failed, and the attempt's log if one was started.
pub(super) struct TryError {
    pub error: Error,
    pub log: Option<PathBuf>,
}

impl From<Error> for TryError {
    fn from(error: Error) -> Self {
        Self { error, log: None }
    }
}

impl NodeRunner<'_> {
    pub fn instance(&self, node: usize) -> &Instance {
        &self.graph.instances[node]
    }

    /// Applies the planner's two functions, now that the inputs are known.
    pub fn decide(&self, node: usize, digests: &[Option<Digest>]) -> Result<NodeDecision> {
        let recipe = self.recipe(node, digests)?;
        let key = recipe.key();
        loop {
            let (name, need) = (&self.instance(node).name, self.needs[node]);
            return Ok(match crate::plan::decide(name, &key, need, &self.flags, &self.combined_store())? {
                // The remote store no longer offers what could not be fetched, so the next decision differs.
                Decision::Reuse(digest) if !self.fetch_reused(node, &key, &digest)? => continue,
                Decision::Reuse(digest) => NodeDecision::Reuse { key, digest },
                Decision::Run(reason) => NodeDecision::Run(Box::new(ReadyNode { recipe, key, reason })),
            });
        }
    }

    fn recipe(&self, node: usize, digests: &[Option<Digest>]) -> Result<Recipe> {
        match crate::plan::recipe(self.graph, self.registry, self.store, node, digests)? {
            RecipeState::Ready(recipe) => Ok(recipe),
            RecipeState::Pending(on) => {
                let on: Vec<String> = on.iter().map(|i| self.instance(*i).name.to_string()).collect();
                Err(Error::internal(format!("started before its inputs were known: {}", on.join(", "))))
            }
        }
    }

    /// Locks the key, decides again, checks the inputs, runs an attempt, checks the inputs again, records. Blocks only
    /// on the attempt.
    pub fn execute(&self, mut request: AttemptRequest, emit: &mut dyn FnMut(RunnerEvent)) -> AttemptOutcome {
        match self.try_execute(&mut request, emit) {
            Ok(outcome) => outcome,
            Err(TryError { error, log }) => {
                // Redact again: secrets were removed when the log was written, but other programs may have written to
                // it since.
                let secrets = Secrets::of([&self.instance(request.node).signature]);
                let tail = log.as_deref().map(|path| log::tail(path, TAIL_LINES)).unwrap_or_default();
                let tail = tail.iter().map(|line| secrets.redact(line)).collect();
                let failure = Failure { stage: self.instance(request.node).name.clone(), error, log, tail };
                AttemptOutcome::Failed { ready: request.ready, lock: request.lock, failure }
            }
        }
    }

    fn try_execute(
        &self,
        request: &mut AttemptRequest,
        emit: &mut dyn FnMut(RunnerEvent),
    ) -> Result<AttemptOutcome, TryError> {
        let (instance, key) = (self.instance(request.node), request.ready.key);
        if request.lock.is_none() {
            request.lock = self.store.try_lock(&key)?;
        }
        let Some(lock) = &request.lock else {
            return Ok(AttemptOutcome::Busy { key });
        };
        let holder = LockHolder { pid: std::process::id(), run: self.run.to_owned(), stage: instance.name.to_string() };
        lock.announce(&holder)?;
        // Another process may have made the artifact between the decision and the lock.
        match self.decide(request.node, &request.digests)? {
            NodeDecision::Reuse { key, digest } => return Ok(AttemptOutcome::Reused { key, digest }),
            NodeDecision::Run(ready) if ready.key == key => request.ready = ready,
            NodeDecision::Run(_) => return Err(changed_outside().into()),
        }
        match &request.ready.reason {
            // Clears its checkpoints too.
            Reason::Forced if request.tries == 0 => {
                self.revoke_lease(&key, emit)?;
                self.store.clear_work(&key)?;
            }
            Reason::ArtifactDamaged { file } => {
                if let Some(digest) = self.store.recorded_digest(&key)? {
                    let quarantined = self.store.quarantine(&digest)?;
                    let message = format!(
                        "the artifact was damaged ({file}) and moved to {}; it will be made again",
                        quarantined.display()
                    );
                    emit(RunnerEvent::Warning(message));
                }
            }
            _ => (),
        }
        if let Some(damaged) = self.check_inputs(instance, &request.digests)? {
            return Ok(damaged);
        }
        if let Some(outcome) = self.follow_leased_attempt(request, emit)? {
            return Ok(outcome);
        }

        let mut folder = self.store.new_attempt(&key)?;
        let outcome = self.attempt(request, &mut folder, emit);
        self.tidy_up(&key, &folder, &outcome, emit);
        outcome.map_err(|error| TryError { error, log: Some(folder.log) })
    }

    /// Keeps only the log and the job file of an attempt that is over: the committed artifact has its own links to the
    /// files.
    pub(super) fn tidy_up(
        &self,
        key: &Key,
        folder: &AttemptFolder,
        outcome: &Result<AttemptOutcome>,
        emit: &mut dyn FnMut(RunnerEvent),
    ) {
        if matches!(outcome, Ok(AttemptOutcome::Left)) {
            return;
        }
        if let Err(error) = self.store.remove_lease(key) {
            emit(RunnerEvent::Warning(format!("cannot delete the lease of an attempt: {error}")));
        }
        if let Err(error) = folder.discard() {
            emit(RunnerEvent::Warning(format!("cannot delete {}: {error}", folder.out.display())));
        }
    }

    fn attempt(
        &self,
        request: &AttemptRequest,
        folder: &mut AttemptFolder,
        emit: &mut dyn FnMut(RunnerEvent),
    ) -> Result<AttemptOutcome> {
        let (instance, key) = (self.instance(request.node), request.ready.key);
        let signature = &instance.signature;
        let secrets = Secrets::of([signature]);
        let before = self.input_state(instance, &request.digests)?;
        let lease = self.lease(instance, folder, &before);
        if instance.placement.executor.is_some() {
            folder.log = folder.root.join(&lease.log);
        }
        let job = self.job(request, folder)?;
        let job_file = folder.root.join("job.json");
        job.write(&job_file)?;
        emit(RunnerEvent::Started { key, threads: request.threads, folder: folder.clone() });

        let Some(lock) = &request.lock else { return Err(Error::internal("an attempt does not hold its key's lock")) };
        let launch = LaunchOptions {
            store: self.store,
            key,
            command: &self.options.command,
            job: &job_file,
            folder,
            threads: request.threads,
            resources: &instance.placement.resources,
            timeout: instance.placement.timeout,
            can_stop: signature.parallel,
            gpus: &request.gpus,
            env: &signature.env,
            set_env: &self.options.env,
            device: &self.options.device,
            secrets: &secrets,
            lock: lock.as_fd(),
            lease: &lease,
        };
        let executor = self.executors.get(instance.placement.executor.as_deref())?;
        let mut warnings = Vec::new();
        let end = executor.run(&launch, &request.kill_handle, &mut |event| {
            if let AttemptEvent::Stage(StageEvent::Warning { message }) = &event {
                warnings.push(message.clone());
            }
            emit(RunnerEvent::Attempt(event));
        })?;
        self.conclude(request, folder, &before, end, warnings, emit)
    }

    /// The outcome of an attempt that has ended: checks its inputs again and records its artifact.
    pub(super) fn conclude(
        &self,
        request: &AttemptRequest,
        folder: &AttemptFolder,
        before: &InputState,
        end: AttemptEnd,
        warnings: Vec<String>,
        emit: &mut dyn FnMut(RunnerEvent),
    ) -> Result<AttemptOutcome> {
        let (instance, key) = (self.instance(request.node), request.ready.key);
        let is_job = end.execution.job.is_some();
        if matches!(end.exit, AttemptExit::Left) {
            return Ok(AttemptOutcome::Left);
        }
        let changed = self.changed_input(instance, &request.digests, &before.unlisted_files)?;
        match (end.exit, changed) {
            (AttemptExit::Killed, _) => Ok(AttemptOutcome::Killed),
            (AttemptExit::TimedOut, _) => Err(timed_out(instance.placement.timeout)),
            (AttemptExit::Left, _) => Ok(AttemptOutcome::Left),
            (_, Some(error)) => Err(error),
            (AttemptExit::Reported(FinalMessage::Done { digest, peak_bytes }), None) => {
                // Files outside the store may have changed during the attempt; an artifact made from them must not be
                // recorded under this key.
                let now = self.input_state(instance, &request.digests)?.stats;
                if let Some(((path, _), _)) = before.stats.iter().zip(&now).find(|(before, now)| before != now) {
                    return Err(changed_outside().context(path.display()));
                }
                if self.recipe(request.node, &request.digests)?.key() != key {
                    return Err(changed_outside());
                }
                let provenance = self.provenance(instance, folder, end.execution, peak_bytes, warnings)?;
                let seconds = provenance.seconds;
                let record = ActionRecord { key, digest, recipe: request.ready.recipe.clone(), provenance };
                let forced = request.ready.reason == Reason::Forced;
                let digest = self.record(instance, &record, forced, emit)?;
                self.queue_upload(key);
                self.clear_checkpoints(&key, emit);
                Ok(AttemptOutcome::Made { key, digest, seconds, peak_bytes })
            }
            (AttemptExit::Reported(FinalMessage::Failed { error }), None) => Err(error),
            (AttemptExit::Unreported(status), None) => Err(unreported_exit(status, &folder.log, is_job)),
        }
    }

    /// The key has a record now, so no attempt will resume from its checkpoints.
    fn clear_checkpoints(&self, key: &Key, emit: &mut dyn FnMut(RunnerEvent)) {
        if let Err(error) = self.store.clear_checkpoints(key) {
            emit(RunnerEvent::Warning(format!("cannot delete the checkpoints: {error}")));
        }
    }

    fn job(&self, request: &AttemptRequest, folder: &AttemptFolder) -> Result<Job> {
        let instance = self.instance(request.node);
        let mut inputs = BTreeMap::new();
        for port in &instance.inputs {
            let mut at_port = Vec::with_capacity(port.from.len());
            for source in &port.from {
                let digest = known_digest(&request.digests, source.instance)?;
                let artifact = self.store.open_artifact(&digest)?;
                let artifact_type = artifact.manifest.artifact_type;
                at_port.push(Input { label: source.label.clone(), artifact_type, digest, folder: artifact.folder });
            }
            inputs.insert(port.port.clone(), at_port);
        }
        let key = &request.ready.key;
        let batch = instance.placement.executor.as_deref().and_then(|name| self.executors.batch(name));
        let checkpoints = match batch {
            None => self.store.checkpoints(key)?,
            Some(_) => self.store.checkpoints_of_attempt(key, &folder.name())?,
        };
        let detached = batch.map(|batch| Detached {
            lease: self.store.lease_file(key),
            heartbeat_seconds: batch.settings().interval.as_secs_f64(),
        });
        Ok(Job {
            stage: instance.name.to_string(),
            kind: instance.kind.clone(),
            version: request.ready.recipe.version,
            params: self.store.list_files(&instance.params)?,
            seed: instance.seed,
            inputs,
            output: instance.signature.output.clone(),
            store: self.store.root().to_owned(),
            out: folder.out.clone(),
            checkpoints,
            requests: self.store.requests(),
            may_pay: self.options.pay || !request.ready.reason.is_repair(),
            may_pay_again: self.options.pay,
            cadence: self.options.cadence,
            device: self.options.device.clone(),
            threads: request.threads,
            confine: self.options.confine,
            detached,
        })
    }

    /// The threads that a stage asks its batch system for, and the name of that executor; `None`: it runs here.
    pub fn placement(&self, node: usize) -> Option<(&str, usize)> {
        let placement = &self.instance(node).placement;
        let name = placement.executor.as_deref()?;
        let defaults = self.executors.batch(name).map(|batch| &batch.settings().resources);
        let threads = placement.resources.threads.or(defaults.and_then(|defaults| defaults.threads));
        Some((name, threads.map_or(1, |threads| threads as usize)))
    }

    /// What an attempt takes of its queue.
    pub fn demand(&self, node: usize) -> Demand {
        fit::demand(self.instance(node), self.options, self.expected_memory[node])
    }

    /// The pause before the next try of a stage that failed with `error`, if there is to be one. `tries` counts those so far.
    pub fn retry_pause(&self, node: usize, error: &Error, tries: u32) -> Option<Duration> {
        const LOCAL_RETRIES: u32 = 2;
        const LONGEST_PAUSE: Duration = Duration::from_secs(600);
        let (retries, pause) = match self.placement(node).and_then(|(name, _)| self.executors.batch(name)) {
            None => (LOCAL_RETRIES, self.options.retry_delay),
            Some(batch) => (batch.settings().retries, batch.settings().backoff),
        };
        let of_stage = self.instance(node).placement.retries;
        let again = of_stage.is_some() || error.transient;
        (again && tries <= of_stage.unwrap_or(retries))
            .then(|| pause.saturating_mul(4u32.saturating_pow(tries - 1)).min(LONGEST_PAUSE.max(pause)))
    }

    /// Describes the holder of `key`'s lock, if it has announced itself.
    pub fn holder(&self, key: &Key) -> Option<String> {
        let holder = self.store.holder(key)?;
        Some(if holder.run == self.run {
            format!("{} of this run", holder.stage)
        } else {
            let who = match self.store.inheriting_process(key, &holder) {
                Some(process) => format!("{process}, which outlived process {}", holder.pid),
                None => format!("process {}", holder.pid),
            };
            format!("{} of run {} ({who})", holder.stage, holder.run)
        })
    }
}

/// The digest of an input, which is known before an attempt starts.
pub(super) fn known_digest(digests: &Digests, instance: usize) -> Result<Digest> {
    digests[instance].ok_or_else(|| Error::internal("the digest of an attempt's input is not known"))
}

fn timed_out(limit: Option<Duration>) -> Error {
    let limit = limit.map_or_else(String::new, |limit| format!(" of {}", clock(limit)));
    Error::environment(format!("the attempt exceeded the stage's `timeout`{limit}"))
        .help("the next one resumes from the last checkpoint, if the kind writes any: run again, or raise `timeout`")
}

fn changed_outside() -> Error {
    Error::user("a file or folder named by the parameters changed during the attempt")
        .help("run again when no program writes to it")
}
