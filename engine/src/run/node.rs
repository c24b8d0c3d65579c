//! Executes one instance on a thread of its own: decides, checks inputs, runs the attempt, records the result.

use std::collections::BTreeMap;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::Sender;
use std::time::{Instant, SystemTime};

use super::child::{self, Ending, Launch, Leash};
use super::inputs::known;
use super::redact::Secrets;
use super::{Failure, RunOptions};
use crate::attempt::{Job, Last};
use crate::context::{Input, Tell};
use crate::error::{At, Error, Result};
use crate::graph::{Graph, Instance};
use crate::journal::unix_seconds;
use crate::kind::Registry;
use crate::names::{Digest, Key};
use crate::plan::{Bytes, Decision, Flags, Reason, Recipe, RecipeState};
use crate::store::{ActionRecord, AttemptFolder, Holder, KeyLock, Store};

/// Number of lines of a failed attempt's log to show.
const TAIL: usize = 10;

/// Digests by instance, as far as they are known.
pub(super) type Digests = Arc<Vec<Option<Digest>>>;

/// The data that the work on every instance shares.
pub(super) struct Work<'a> {
    pub graph: &'a Graph,
    pub store: &'a Store,
    pub registry: &'a Registry,
    pub options: &'a RunOptions,
    /// The flags without the stages that this run has already forced.
    pub flags: Flags,
    /// By instance: whether the bytes of its artifact are known to be needed.
    pub bytes: Vec<Bytes>,
    pub run: &'a str,
    /// Takes what this run makes, if there is a remote store that can be written to.
    pub uploads: Option<Sender<Key>>,
}

/// The decision for an instance whose inputs are known.
pub(super) enum Decided {
    Reuse { key: Key, digest: Digest },
    Run(Box<Ready>),
}

/// An instance that must run.
#[derive(Clone)]
pub(super) struct Ready {
    pub recipe: Recipe,
    pub key: Key,
    pub reason: Reason,
}

/// Request to run one instance, with slots assigned.
pub(super) struct Go {
    pub node: usize,
    pub ready: Box<Ready>,
    /// The key's lock, if it is already held.
    pub lock: Option<KeyLock>,
    pub leash: Leash,
    pub threads: usize,
    /// Number of earlier failed tries.
    pub tries: u32,
    pub digests: Digests,
}

/// The outcome of one try.
pub(super) enum Ended {
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
    Damaged {
        input: Digest,
        error: Error,
    },
    /// The lock is kept for the next try.
    Failed {
        ready: Box<Ready>,
        lock: Option<KeyLock>,
        failure: Failure,
    },
    Killed,
}

/// Why a try failed, and the attempt's log if one was started.
struct Fault {
    error: Error,
    log: Option<PathBuf>,
}

impl From<Error> for Fault {
    fn from(error: Error) -> Self {
        Self { error, log: None }
    }
}

/// Events while an instance is executed.
pub(super) enum News {
    Started { key: Key, threads: usize, folder: AttemptFolder },
    Told(Tell),
    Warning(String),
}

impl Work<'_> {
    pub fn instance(&self, node: usize) -> &Instance {
        &self.graph.instances[node]
    }

    /// Applies the planner's two functions, now that the inputs are known.
    pub fn decide(&self, node: usize, digests: &[Option<Digest>]) -> Result<Decided> {
        let recipe = self.recipe(node, digests)?;
        let key = recipe.key();
        loop {
            let (name, bytes) = (&self.instance(node).name, self.bytes[node]);
            return Ok(match crate::plan::decide(name, &key, bytes, &self.flags, &self.shared())? {
                // What the remote store cannot give after all, it refuses from then on.
                Decision::Reuse(digest) if !self.obtain(node, &key, &digest)? => continue,
                Decision::Reuse(digest) => Decided::Reuse { key, digest },
                Decision::Run(reason) => Decided::Run(Box::new(Ready { recipe, key, reason })),
            });
        }
    }

    fn recipe(&self, node: usize, digests: &[Option<Digest>]) -> Result<Recipe> {
        match crate::plan::recipe(self.graph, self.registry, self.store, node, digests)? {
            RecipeState::Ready(recipe) => Ok(recipe),
            RecipeState::Pending(on) => {
                let on: Vec<String> = on.iter().map(|i| self.instance(*i).name.to_string()).collect();
                Err(Error::ours(format!("asked to run before its inputs were known: {}", on.join(", "))))
            }
        }
    }

    /// Locks the key, decides again, checks the inputs, runs an attempt, checks the inputs again, records. Blocks only
    /// on the attempt.
    pub fn go(&self, mut go: Go, tell: &mut dyn FnMut(News)) -> Ended {
        match self.try_go(&mut go, tell) {
            Ok(ended) => ended,
            Err(Fault { error, log }) => {
                // Redact again: secrets were removed when the log was written, but other programs may have written to
                // it since.
                let secrets = Secrets::of([&self.instance(go.node).signature]);
                let tail = log.as_deref().map(|log| child::tail(log, TAIL)).unwrap_or_default();
                let tail = tail.iter().map(|line| secrets.redact(line)).collect();
                let failure = Failure { stage: self.instance(go.node).name.clone(), error, log, tail };
                Ended::Failed { ready: go.ready, lock: go.lock, failure }
            }
        }
    }

    fn try_go(&self, go: &mut Go, tell: &mut dyn FnMut(News)) -> Result<Ended, Fault> {
        let (instance, key) = (self.instance(go.node), go.ready.key);
        if go.lock.is_none() {
            go.lock = self.store.try_lock(&key)?;
        }
        let Some(lock) = &go.lock else {
            return Ok(Ended::Busy { key });
        };
        let holder = Holder { pid: std::process::id(), run: self.run.to_owned(), stage: instance.name.to_string() };
        lock.announce(&holder)?;
        // Another process may have made the artifact between the decision and the lock.
        match self.decide(go.node, &go.digests)? {
            Decided::Reuse { key, digest } => return Ok(Ended::Reused { key, digest }),
            Decided::Run(ready) if ready.key == key => go.ready = ready,
            Decided::Run(_) => return Err(changed_outside().into()),
        }
        match &go.ready.reason {
            // Clears its checkpoints too.
            Reason::Forced if go.tries == 0 => self.store.clear_work(&key)?,
            Reason::ArtifactRotten { file } => {
                if let Some(digest) = self.store.recorded(&key)? {
                    let aside = self.store.quarantine(&digest)?;
                    let message =
                        format!("its artifact was damaged ({file}); it lies in {} and is made again", aside.display());
                    tell(News::Warning(message));
                }
            }
            _ => (),
        }
        if let Some(damaged) = self.check_inputs(instance, &go.digests)? {
            return Ok(damaged);
        }

        let folder = self.store.new_attempt(&key)?;
        let ended = self.attempt(go, &folder, tell).map_err(|error| Fault { error, log: Some(folder.log.clone()) });
        // Keep only the log and the job file; the committed artifact has its own links to the files.
        if let Err(error) = folder.discard() {
            tell(News::Warning(format!("cannot clear {}: {error}", folder.out.display())));
        }
        ended
    }

    fn attempt(&self, go: &Go, folder: &AttemptFolder, tell: &mut dyn FnMut(News)) -> Result<Ended> {
        let (instance, key) = (self.instance(go.node), go.ready.key);
        let signature = &instance.signature;
        let secrets = Secrets::of([signature]);
        let job = self.job(go, folder)?;
        let job_file = folder.root.join("job.json");
        job.write(&job_file)?;
        tell(News::Started { key, threads: go.threads, folder: folder.clone() });

        let Some(lock) = &go.lock else { return Err(Error::ours("an attempt without its key's lock")) };
        let launch = Launch {
            command: &self.options.command,
            job: &job_file,
            folder: &folder.root,
            log: &folder.log,
            threads: go.threads,
            env: &signature.env,
            set_env: &self.options.env,
            secrets: &secrets,
            lock: lock.as_fd(),
        };
        let strangers = self.strangers(instance, &go.digests)?;
        let stats = self.store.input_stats(&instance.params)?;
        let (started, clock) = (unix_seconds(SystemTime::now()), Instant::now());
        let mut warnings = Vec::new();
        let ending = child::run(&launch, &go.leash, |told| {
            if let Tell::Warning { message } = &told {
                warnings.push(message.clone());
            }
            tell(News::Told(told));
        })?;
        let seconds = clock.elapsed().as_secs_f64();
        let changed = self.changed_input(instance, &go.digests, &strangers)?;
        match (ending, changed) {
            (Ending::Killed, _) => Ok(Ended::Killed),
            (_, Some(error)) => Err(error),
            (Ending::Said(Last::Done { digest, peak_bytes }), None) => {
                // Files outside the store may have changed during the attempt; an artifact made from them must not be
                // recorded under this key.
                let now = self.store.input_stats(&instance.params)?;
                if let Some(((path, _), _)) = stats.iter().zip(&now).find(|(before, now)| before != now) {
                    return Err(changed_outside().within(path.display()));
                }
                if self.recipe(go.node, &go.digests)?.key() != key {
                    return Err(changed_outside());
                }
                let provenance = self.provenance(instance, folder, started, seconds, peak_bytes, warnings)?;
                let record = ActionRecord { key, digest, recipe: go.ready.recipe.clone(), provenance };
                let forced = go.ready.reason == Reason::Forced;
                let digest = self.record(instance, &record, forced, tell)?;
                self.offer(key);
                self.clear_checkpoints(&key, tell);
                Ok(Ended::Made { key, digest, seconds, peak_bytes })
            }
            (Ending::Said(Last::Failed { error }), None) => Err(error),
            (Ending::Silent(status), None) => Err(child::silent_death(status, &folder.log)),
        }
    }

    /// The key has a record now, so no attempt will resume from its checkpoints.
    fn clear_checkpoints(&self, key: &Key, tell: &mut dyn FnMut(News)) {
        let cleared = self.store.checkpoints(key).and_then(|folder| std::fs::remove_dir_all(&folder).at(&folder));
        if let Err(error) = cleared {
            tell(News::Warning(format!("cannot clear its checkpoints: {error}")));
        }
    }

    fn job(&self, go: &Go, folder: &AttemptFolder) -> Result<Job> {
        let instance = self.instance(go.node);
        let mut inputs = BTreeMap::new();
        for port in &instance.inputs {
            let mut at_port = Vec::with_capacity(port.from.len());
            for source in &port.from {
                let digest = known(&go.digests, source.instance)?;
                let artifact = self.store.open_artifact(&digest)?;
                let artifact_type = artifact.manifest.artifact_type;
                at_port.push(Input { label: source.label.clone(), artifact_type, digest, folder: artifact.folder });
            }
            inputs.insert(port.port.clone(), at_port);
        }
        Ok(Job {
            stage: instance.name.to_string(),
            kind: instance.kind.clone(),
            version: go.ready.recipe.version,
            params: self.store.list_files(&instance.params)?,
            seed: instance.seed,
            inputs,
            output: instance.signature.output.clone(),
            store: self.store.root().to_owned(),
            out: folder.out.clone(),
            checkpoints: self.store.checkpoints(&go.ready.key)?,
            requests: self.store.requests(),
            may_pay: self.options.pay || !go.ready.reason.is_repair(),
            may_pay_again: self.options.pay,
            cadence: self.options.cadence,
            threads: go.threads,
        })
    }

    /// Describes the holder of `key`'s lock, if it has announced itself.
    pub fn holder(&self, key: &Key) -> Option<String> {
        let holder = self.store.holder(key)?;
        Some(if holder.run == self.run {
            format!("{} of this run", holder.stage)
        } else {
            let who = match self.store.heir(key, &holder) {
                Some(heir) => format!("{heir}, which outlived process {}", holder.pid),
                None => format!("process {}", holder.pid),
            };
            format!("{} of run {} ({who})", holder.stage, holder.run)
        })
    }
}

fn changed_outside() -> Error {
    Error::yours("a file or folder that its parameters name changed meanwhile")
        .help("run again when nobody writes to it")
}
