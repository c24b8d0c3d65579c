//! The probe job of an executor: proves before a run that jobs see the store and this program.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant, SystemTime};

use super::jobs::JobStatus;
use super::system::{JobReport, JobState, Submission};
use super::{Batch, LOOK, exported, program, quoted, write_script};
use crate::attempt::{ProbeAnswer, Question};
use crate::document::{Resources, SystemSettings};
use crate::error::{AtPath, Error, Result};
use crate::graph::Graph;
use crate::journal::Event;
use crate::names::Digest;
use crate::plan::Plan;
use crate::run::RunOptions;
use crate::run::executor::{Executors, KillHandle, used};
use crate::run::log::tail;
use crate::store::{Store, files};

/// How long a successful probe holds for the same settings, program and machine.
const VALID: Duration = Duration::from_secs(24 * 3600);

/// Probes the executors that the plan uses. Returns whether the run was interrupted meanwhile.
///
/// # Errors
/// When a job does not see the store, or cannot run this program.
pub(in crate::run) fn probe(
    executors: &Executors,
    graph: &Graph,
    plan: &Plan,
    store: &Store,
    options: &RunOptions,
    kill_handle: &KillHandle,
    mut on_event: impl FnMut(Event),
) -> Result<bool> {
    for batch in used(graph, plan).into_iter().filter_map(|name| executors.batch(name)) {
        if batch.settings.probe && batch.probe(store, &options.command, kill_handle, &mut on_event)? {
            return Ok(true);
        }
    }
    Ok(false)
}

impl Batch {
    fn probe(
        &self,
        store: &Store,
        command: &Path,
        kill_handle: &KillHandle,
        on_event: &mut impl FnMut(Event),
    ) -> Result<bool> {
        let program = program(command)?;
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let settings = format!("{:?} {program} {host} {}", self.settings, env!("CARGO_PKG_VERSION"));
        let probes = store.root().join("work").join("probes");
        std::fs::create_dir_all(&probes).at(&probes)?;
        let passed = probes.join(format!("{}-{}", self.name, Digest::of(settings.as_bytes()).short()));
        let age = std::fs::metadata(&passed).and_then(|m| m.modified()).map(|at| SystemTime::now().duration_since(at));
        if age.is_ok_and(|age| age.unwrap_or_default() < VALID) {
            return Ok(false);
        }
        on_event(Event::Probing { executor: self.name.clone() });
        let folder = files::temporary_name(&probes.join("new"));
        std::fs::create_dir(&folder).at(&folder)?;
        let temporary = files::TemporaryPath::new(folder.clone());
        let interrupted = self.ask(&folder, &program, kill_handle)?;
        drop(temporary);
        if !interrupted {
            std::fs::write(&passed, "").at(&passed)?;
        }
        Ok(interrupted)
    }

    /// Submits the probe and waits for its answer; whether the run was interrupted meanwhile.
    fn ask(&self, folder: &Path, program: &str, kill_handle: &KillHandle) -> Result<bool> {
        let question = Question { text: format!("{} {:?}", folder.display(), SystemTime::now()) };
        question.write(folder)?;
        let (script, log) = (folder.join("job.sh"), folder.join("log"));
        let command = [program, "attempt", &folder.display().to_string(), "--probe"].map(quoted);
        write_script(&script, Path::new("/"), std::iter::empty(), &command)?;
        // Small, so that it starts soon. A template may need an amount of memory; Slurm may refuse one.
        let default_memory = matches!(self.settings.system, SystemSettings::Submit(_)).then_some(1024);
        let (memory, time) = (self.settings.resources.memory.or(default_memory), Some(Duration::from_secs(600)));
        let resources = Resources { threads: Some(1), memory, gpus: Some(0), time, ..Resources::default() };
        let (name, env) = ("temper-probe", exported(&[]));
        let submission = Submission { name, script: &script, log: &log, folder, env: &env, resources: &resources };
        let context = |error: Error| error.context(format!("the probe job of executor `{}`", self.name));
        let id = self.system.submit(&submission).map_err(context)?;
        let answer = self.wait_for_answer(folder, &id, kill_handle);
        self.jobs.forget(&id);
        let read_back = match answer.map_err(context)? {
            Some(answer) => answer,
            None => {
                // The run is interrupted; a probe that goes on does no harm.
                let _ = self.system.cancel(&id);
                return Ok(true);
            }
        };
        let version = env!("CARGO_PKG_VERSION");
        if read_back.text != question.text {
            let message = format!(
                "{}: host `{}` read another content than was written here: the store is not shared with it",
                folder.display(),
                read_back.host
            );
            return Err(context(Error::environment(message).help(SHARED_HELP)));
        }
        if read_back.version != version {
            let message = format!("host `{}` has temper {}, this is {version}", read_back.host, read_back.version);
            return Err(context(Error::environment(message).help("use one program from a shared file system")));
        }
        Ok(false)
    }

    fn wait_for_answer(&self, folder: &Path, id: &str, kill_handle: &KillHandle) -> Result<Option<ProbeAnswer>> {
        let mut over_since: Option<Instant> = None;
        loop {
            if let Some(answer) = ProbeAnswer::read(folder)? {
                return Ok(Some(answer));
            }
            if kill_handle.killed().is_some() {
                return Ok(None);
            }
            match self.jobs.status(self.system.as_ref(), id, self.settings.interval) {
                JobStatus::Known(JobReport { state: JobState::Live { held: Some(reason) }, .. }) => {
                    let _ = self.system.cancel(id);
                    return Err(Error::environment(format!("job {id} is held: {reason}")));
                }
                JobStatus::Known(JobReport { state: JobState::Ended(_), .. }) | JobStatus::Gone => {
                    if over_since.get_or_insert_with(Instant::now).elapsed() >= self.settings.grace {
                        return Err(no_answer(folder, id));
                    }
                }
                JobStatus::Known(_) | JobStatus::NotAskedYet | JobStatus::Unreachable(_) => over_since = None,
            }
            std::thread::sleep(self.settings.interval.min(LOOK));
        }
    }
}

const SHARED_HELP: &str =
    "put the store on a file system that all machines share, under the same path (`--store FOLDER`)";

fn no_answer(folder: &Path, id: &str) -> Error {
    let log: PathBuf = folder.join("log");
    let said = tail(&log, 1).pop().map_or_else(
        || "it wrote no log either: its machine does not see the store".to_owned(),
        |line| format!("its log ends with `{line}`"),
    );
    Error::environment(format!("job {id} ended and left no answer in {}; {said}", folder.display())).help(format!(
        "the store and this program must be visible on the machines of the jobs under the same path: {SHARED_HELP}"
    ))
}
