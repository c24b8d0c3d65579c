//! Executes one instance on a thread of its own: decides, checks inputs, runs the attempt, records the result.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Instant, SystemTime};

use super::child::{self, AttemptExit, KillHandle, LaunchOptions};
use super::redact::Secrets;
use super::{Failure, RunOptions};
use crate::attempt::{FinalMessage, Job};
use crate::context::{Input, StageEvent};
use crate::error::{AtPath, Error, Result};
use crate::graph::{Graph, Instance};
use crate::journal::unix_seconds;
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
    /// The flags without the stages that this run has already forced.
    pub flags: Flags,
    /// By instance: whether the bytes of its artifact are known to be needed.
    pub needs: Vec<ArtifactNeed>,
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
}

/// Why a try failed, and the attempt's log if one was started.
struct TryError {
    error: Error,
    log: Option<PathBuf>,
}

impl From<Error> for TryError {
    fn from(error: Error) -> Self {
        Self { error, log: None }
    }
}

/// Events while an instance is executed.
pub(super) enum RunnerEvent {
    Started { key: Key, threads: usize, folder: AttemptFolder },
    Stage(StageEvent),
    Warning(String),
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
                let tail = log.as_deref().map(|log| child::tail(log, TAIL_LINES)).unwrap_or_default();
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
            Reason::Forced if request.tries == 0 => self.store.clear_work(&key)?,
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

        let folder = self.store.new_attempt(&key)?;
        let outcome =
            self.attempt(request, &folder, emit).map_err(|error| TryError { error, log: Some(folder.log.clone()) });
        // Keep only the log and the job file; the committed artifact has its own links to the files.
        if let Err(error) = folder.discard() {
            emit(RunnerEvent::Warning(format!("cannot delete {}: {error}", folder.out.display())));
        }
        outcome
    }

    fn attempt(
        &self,
        request: &AttemptRequest,
        folder: &AttemptFolder,
        emit: &mut dyn FnMut(RunnerEvent),
    ) -> Result<AttemptOutcome> {
        let (instance, key) = (self.instance(request.node), request.ready.key);
        let signature = &instance.signature;
        let secrets = Secrets::of([signature]);
        let job = self.job(request, folder)?;
        let job_file = folder.root.join("job.json");
        job.write(&job_file)?;
        emit(RunnerEvent::Started { key, threads: request.threads, folder: folder.clone() });

        let Some(lock) = &request.lock else { return Err(Error::internal("an attempt does not hold its key's lock")) };
        let launch = LaunchOptions {
            command: &self.options.command,
            job: &job_file,
            folder: &folder.root,
            log: &folder.log,
            threads: request.threads,
            env: &signature.env,
            set_env: &self.options.env,
            secrets: &secrets,
            lock: lock.as_fd(),
        };
        let unlisted_files = self.unlisted_files(instance, &request.digests)?;
        let stats = self.store.input_stats(&instance.params)?;
        let (started, clock) = (unix_seconds(SystemTime::now()), Instant::now());
        let mut warnings = Vec::new();
        let exit = child::run(&launch, &request.kill_handle, |event| {
            if let StageEvent::Warning { message } = &event {
                warnings.push(message.clone());
            }
            emit(RunnerEvent::Stage(event));
        })?;
        let seconds = clock.elapsed().as_secs_f64();
        let changed = self.changed_input(instance, &request.digests, &unlisted_files)?;
        match (exit, changed) {
            (AttemptExit::Killed, _) => Ok(AttemptOutcome::Killed),
            (_, Some(error)) => Err(error),
            (AttemptExit::Reported(FinalMessage::Done { digest, peak_bytes }), None) => {
                // Files outside the store may have changed during the attempt; an artifact made from them must not be
                // recorded under this key.
                let now = self.store.input_stats(&instance.params)?;
                if let Some(((path, _), _)) = stats.iter().zip(&now).find(|(before, now)| before != now) {
                    return Err(changed_outside().context(path.display()));
                }
                if self.recipe(request.node, &request.digests)?.key() != key {
                    return Err(changed_outside());
                }
                let provenance = self.provenance(instance, folder, started, seconds, peak_bytes, warnings)?;
                let record = ActionRecord { key, digest, recipe: request.ready.recipe.clone(), provenance };
                let forced = request.ready.reason == Reason::Forced;
                let digest = self.record(instance, &record, forced, emit)?;
                self.queue_upload(key);
                self.clear_checkpoints(&key, emit);
                Ok(AttemptOutcome::Made { key, digest, seconds, peak_bytes })
            }
            (AttemptExit::Reported(FinalMessage::Failed { error }), None) => Err(error),
            (AttemptExit::Unreported(status), None) => Err(child::unreported_exit(status, &folder.log)),
        }
    }

    /// The key has a record now, so no attempt will resume from its checkpoints.
    fn clear_checkpoints(&self, key: &Key, emit: &mut dyn FnMut(RunnerEvent)) {
        let cleared = self.store.checkpoints(key).and_then(|folder| std::fs::remove_dir_all(&folder).at(&folder));
        if let Err(error) = cleared {
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
            checkpoints: self.store.checkpoints(&request.ready.key)?,
            requests: self.store.requests(),
            may_pay: self.options.pay || !request.ready.reason.is_repair(),
            may_pay_again: self.options.pay,
            cadence: self.options.cadence,
            device: self.options.device.clone(),
            threads: request.threads,
        })
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

fn changed_outside() -> Error {
    Error::user("a file or folder named by the parameters changed during the attempt")
        .help("run again when no program writes to it")
}
