//! Attempts that outlive their orchestrator: the lease of a new one, and following one that an earlier run started.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::SystemTime;

use super::executor::{AttemptEvent, job_name};
use super::node_runner::{AttemptOutcome, AttemptRequest, Digests, NodeRunner, TryError};
use super::redact::Secrets;
use super::runner_event::RunnerEvent;
use crate::context::StageEvent;
use crate::error::{Error, Result};
use crate::graph::Instance;
use crate::journal::unix_seconds;
use crate::names::Key;
use crate::store::{AttemptFolder, Lease};

/// What an attempt reads besides its recipe, as it was when the attempt started.
pub(super) struct InputState {
    /// Stat entries of files outside the store.
    pub stats: BTreeMap<PathBuf, String>,
    /// Foreign files in the folders of its inputs.
    pub unlisted_files: Vec<String>,
}

impl NodeRunner<'_> {
    pub fn input_state(&self, instance: &Instance, digests: &Digests) -> Result<InputState> {
        let unlisted_files = self.unlisted_files(instance, digests)?;
        let stats = self.store.input_stats(&instance.params)?;
        let stats = stats.into_iter().map(|(path, stat)| (path, stat.without_device())).collect();
        Ok(InputState { stats, unlisted_files })
    }

    /// The lease of a new attempt.
    pub fn lease(&self, instance: &Instance, folder: &AttemptFolder, before: &InputState) -> Lease {
        let mut lease = Lease {
            attempt: folder.name(),
            stage: instance.name.to_string(),
            run: self.run.to_owned(),
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            executor: instance.placement.executor.clone().unwrap_or_default(),
            job: None,
            submitted: unix_seconds(SystemTime::now()) as u64,
            log: String::new(),
            input_stats: before.stats.clone(),
            unlisted_files: before.unlisted_files.clone(),
        };
        lease.log = format!("{}.log", job_name(&lease));
        lease
    }

    /// Follows the attempt that holds the key's lease, if it is alive or left a result. The key's lock is held, so no other
    /// orchestrator follows it. `None`: a new attempt is due, and the old one has lost its lease.
    pub fn follow_leased_attempt(
        &self,
        request: &AttemptRequest,
        emit: &mut dyn FnMut(RunnerEvent),
    ) -> Result<Option<AttemptOutcome>, TryError> {
        let (instance, key) = (self.instance(request.node), request.ready.key);
        let Some(lease) = self.store.lease(&key)? else { return Ok(None) };
        let folder = self.store.leased_attempt(&key, &lease);
        let Some(batch) = self.executors.batch(&lease.executor) else {
            // Without the executor's settings nobody can follow the job, but it may be alive.
            let job = lease.job.as_deref().unwrap_or("of unknown id");
            let message = format!(
                "job {job} of executor `{}`, started by run {} on {}, holds the lease of this stage, and the pipeline has no such executor",
                lease.executor, lease.run, lease.host
            );
            let help = format!(
                "define the executor again, or cancel the job and delete {}",
                self.store.lease_file(&key).display()
            );
            return Err(Error::user(message).help(help).into());
        };
        if !batch.is_alive(&lease, &folder)? {
            self.store.remove_lease(&key)?;
            return Ok(None);
        }
        emit(RunnerEvent::Started { key, threads: request.threads, folder: folder.clone() });
        let secrets = Secrets::of([&instance.signature]);
        let mut warnings = Vec::new();
        let end = batch.attach(&lease, &folder, &secrets, &request.kill_handle, &mut |event| {
            if let AttemptEvent::Stage(StageEvent::Warning { message }) = &event {
                warnings.push(message.clone());
            }
            emit(RunnerEvent::Attempt(event));
        });
        let Lease { input_stats: stats, unlisted_files, .. } = lease;
        let before = InputState { stats, unlisted_files };
        let outcome = end.and_then(|end| self.conclude(request, &folder, &before, end, warnings, emit));
        self.tidy_up(&key, &folder, &outcome, emit);
        outcome.map(Some).map_err(|error| TryError { error, log: Some(folder.log) })
    }

    /// Takes the key from the attempt that holds its lease, for a stage that is started again from nothing.
    pub fn revoke_lease(&self, key: &Key, emit: &mut dyn FnMut(RunnerEvent)) -> Result<()> {
        let Some(lease) = self.store.lease(key)? else { return Ok(()) };
        self.store.remove_lease(key)?;
        if let Some(Err(error)) = self.executors.batch(&lease.executor).map(|batch| batch.cancel_leased(&lease)) {
            emit(RunnerEvent::Warning(format!("cannot cancel the job of an earlier run: {}", error.message)));
        }
        Ok(())
    }
}
