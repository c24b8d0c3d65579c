//! Executors that submit attempts to a batch system. An attempt is a job, and talks through files in its folder on the
//! shared store (`attempt/detached.rs`). It outlives the orchestrator; its lease lets the next run follow it.

mod ended;
mod jobs;
pub mod probe;
mod slurm;
mod submit;
mod system;
mod tail;

use std::fs::OpenOptions;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::ExitStatus;
use std::time::{Duration, Instant, SystemTime};

use self::jobs::{JobStatus, Jobs};
use self::system::{BatchSystem, JobReport, JobState, Submission, quoted};
use self::tail::EventTail;
use super::{AttemptEnd, AttemptEvent, AttemptExit, Execution, Executor, KillHandle, LaunchOptions, THREAD_LIMITS};
use crate::attempt::detached::{DetachedResult, HEARTBEAT, Stopped};
use crate::disk;
use crate::document::{ExecutorSettings, SystemSettings};
use crate::error::{AtPath, Error, Result};
use crate::run::interrupt::Interruption;
use crate::run::redact::Secrets;
use crate::store::{AttemptFolder, JobName, Lease, Platform, files};

/// Environment variables that every job gets, besides those that its kind declares. TMPDIR may not exist on the node.
const ALWAYS_PASSED: [&str; 3] = ["PATH", "HOME", "LANG"];
/// Longest time between two looks at an attempt's files, which are cheaper than a query of the batch system.
const LOOK: Duration = Duration::from_millis(500);
/// Number of heartbeats that may be missing while an attempt counts as alive.
const MISSING_BEATS: u32 = 6;
/// How long Ctrl-C waits for the end of a cancelled job.
const CANCEL_LIMIT: Duration = Duration::from_secs(10);

/// A batch system with its settings.
pub(in crate::run) struct Batch {
    name: String,
    settings: ExecutorSettings,
    system: Box<dyn BatchSystem>,
    jobs: Jobs,
}

/// An attempt whose job was submitted.
struct RunningJob<'a> {
    folder: &'a AttemptFolder,
    /// `None` if the id was lost with the orchestrator that submitted it.
    id: Option<&'a str>,
    secrets: &'a Secrets,
}

impl Batch {
    pub fn new(name: &str, settings: &ExecutorSettings) -> Self {
        let system: Box<dyn BatchSystem> = match &settings.system {
            SystemSettings::Slurm(settings) => Box::new(slurm::Slurm(settings.clone())),
            SystemSettings::Submit(settings) => Box::new(submit::Submit(settings.clone())),
        };
        Self { name: name.to_owned(), settings: settings.clone(), system, jobs: Jobs::default() }
    }

    pub fn settings(&self) -> &ExecutorSettings {
        &self.settings
    }

    /// One error for each program that is not on the PATH.
    pub fn missing_programs(&self) -> Vec<Error> {
        let mut programs = self.system.programs();
        programs.sort_unstable();
        programs.dedup();
        let missing = programs.into_iter().filter(|name| system::find_program(name).is_none());
        let error = |name: String| {
            Error::environment(format!("executor `{}` needs the program `{name}`, which is not on the PATH", self.name))
                .help("run temper on a machine that can submit jobs, or use `--executor local`")
        };
        missing.map(error).collect()
    }

    /// Whether the attempt of a lease left a result or may still do so.
    ///
    /// # Errors
    /// When nobody can say whether it lives.
    pub fn is_alive(&self, lease: &Lease, folder: &AttemptFolder) -> Result<bool> {
        if DetachedResult::read(&folder.root)?.is_some() || self.beats(&folder.root) {
            return Ok(true);
        }
        // Without an id the job was hardly submitted; if it was, it finds that it has lost its lease.
        let Some(id) = &lease.job else { return Ok(false) };
        match self.first_status(id) {
            JobStatus::Known(JobReport { state: JobState::Live { .. }, .. }) => Ok(true),
            JobStatus::Unreachable(error) => {
                Err(error.context(format!("cannot tell whether job {id} of `{}` still runs", self.name)).transient())
            }
            _ => Ok(false),
        }
    }

    /// Follows an attempt that an earlier orchestrator submitted, from its first event.
    ///
    /// # Errors
    /// As [`Executor::run`].
    pub fn attach(
        &self,
        lease: &Lease,
        folder: &AttemptFolder,
        secrets: &Secrets,
        kill_handle: &KillHandle,
        on_event: &mut dyn FnMut(AttemptEvent),
    ) -> Result<AttemptEnd> {
        let job = RunningJob { folder, id: lease.job.as_deref(), secrets };
        if let Some(id) = job.id {
            on_event(AttemptEvent::Job { executor: self.name.clone(), id: id.to_owned(), attached: true });
        }
        self.follow(&job, kill_handle, on_event)
    }

    /// Cancels the job of a lease, and waits a while for its end.
    pub fn cancel_leased(&self, lease: &Lease) -> Result<()> {
        let Some(id) = &lease.job else { return Ok(()) };
        self.system.cancel(id)?;
        let clock = Instant::now();
        while clock.elapsed() < CANCEL_LIMIT && !self.is_over(id) {
            std::thread::sleep(self.settings.interval.min(LOOK));
        }
        self.jobs.forget(id);
        Ok(())
    }

    /// Whether a job that was cancelled has ended; asks more often than at other times.
    fn is_over(&self, id: &str) -> bool {
        let max_age = self.settings.interval.min(Duration::from_secs(1));
        let status = self.jobs.status(self.system.as_ref(), id, max_age);
        matches!(status, JobStatus::Known(JobReport { state: JobState::Ended(_), .. }) | JobStatus::Gone)
    }

    /// Whether the attempt in a folder has shown a sign of life lately.
    pub fn beats(&self, folder: &Path) -> bool {
        beats(folder, self.settings.interval * MISSING_BEATS)
    }

    fn first_status(&self, id: &str) -> JobStatus {
        loop {
            match self.jobs.status(self.system.as_ref(), id, self.settings.interval) {
                JobStatus::NotAskedYet => std::thread::sleep(self.settings.interval.min(LOOK)),
                status => return status,
            }
        }
    }

    /// Follows a job to its end.
    fn follow(
        &self,
        job: &RunningJob<'_>,
        kill_handle: &KillHandle,
        on_event: &mut dyn FnMut(AttemptEvent),
    ) -> Result<AttemptEnd> {
        let end = self.wait(job, kill_handle, on_event);
        if let Some(id) = job.id {
            self.jobs.forget(id);
        }
        end
    }

    fn wait(
        &self,
        job: &RunningJob<'_>,
        kill_handle: &KillHandle,
        on_event: &mut dyn FnMut(AttemptEvent),
    ) -> Result<AttemptEnd> {
        let mut events = EventTail::new(&job.folder.root);
        let (mut over_since, mut warned_unreachable, mut warned_held) = (None, false, None);
        let mut last_report = None;
        loop {
            events.pass_on(job.secrets, on_event);
            if let Some(end) = self.result(job, &mut events, on_event) {
                return Ok(end);
            }
            match kill_handle.killed() {
                Some(Interruption::Cancel) => return self.cancel(job, &mut events, on_event),
                Some(Interruption::Leave) => return Ok(self.leave(job, on_event)),
                None => {}
            }
            let is_over = match self.status(job) {
                JobStatus::Known(report) => {
                    if let JobState::Live { held: Some(reason) } = &report.state
                        && warned_held.as_ref() != Some(reason)
                    {
                        on_event(AttemptEvent::Warning(format!("{} is held: {reason}", self.describe(job))));
                        warned_held = Some(reason.clone());
                    }
                    let ended = matches!(report.state, JobState::Ended(_));
                    last_report = Some(report);
                    ended
                }
                // A list of jobs may be incomplete; a job that shows signs of life is not over.
                JobStatus::Gone => !self.beats(&job.folder.root),
                JobStatus::Unreachable(error) if !warned_unreachable => {
                    let message =
                        format!("cannot ask for the state of jobs, and goes on by their files: {}", error.message);
                    on_event(AttemptEvent::Warning(message));
                    warned_unreachable = true;
                    false
                }
                JobStatus::NotAskedYet | JobStatus::Unreachable(_) => false,
            };
            // Its last files may become visible later than its end.
            let over_for = is_over.then(|| over_since.get_or_insert_with(Instant::now).elapsed());
            match over_for {
                // An attempt that a signal ended says so, and will have no result.
                Some(time) if time >= self.settings.grace || is_stopped(&job.folder.root) => {
                    // A last look: nothing may have been read for long.
                    events.pass_on(job.secrets, on_event);
                    return match self.result(job, &mut events, on_event) {
                        Some(end) => Ok(end),
                        None => Err(self.ended_without_result(job, last_report.as_ref())?),
                    };
                }
                Some(_) => {}
                None => over_since = None,
            }
            std::thread::sleep(self.settings.interval.min(LOOK));
        }
    }

    fn status(&self, job: &RunningJob<'_>) -> JobStatus {
        match job.id {
            Some(id) => self.jobs.status(self.system.as_ref(), id, self.settings.interval),
            None if self.beats(&job.folder.root) => JobStatus::NotAskedYet,
            None => JobStatus::Gone,
        }
    }

    /// The end of an attempt that has left its result. A network file system may fail for a while: a file that cannot be
    /// read is not there yet.
    fn result(
        &self,
        job: &RunningJob<'_>,
        events: &mut EventTail,
        on_event: &mut dyn FnMut(AttemptEvent),
    ) -> Option<AttemptEnd> {
        let result = DetachedResult::read(&job.folder.root).ok()??;
        // Every event was written before the result.
        events.pass_on(job.secrets, on_event);
        let DetachedResult { message, status, host, platform, started, seconds } = result;
        let exit = match message {
            Some(message) => AttemptExit::Reported(job.secrets.redact_final(message)),
            None => AttemptExit::Unreported(ExitStatus::from_raw(status.unwrap_or(0))),
        };
        let execution = Execution { host, platform, started, seconds, job: self.job_name(job) };
        Some(AttemptEnd { exit, execution })
    }

    /// Ctrl-C.
    fn cancel(
        &self,
        job: &RunningJob<'_>,
        events: &mut EventTail,
        on_event: &mut dyn FnMut(AttemptEvent),
    ) -> Result<AttemptEnd> {
        // Without an id there is nothing to cancel: the attempt ends when it finds that its lease is gone.
        let Some(id) = job.id else { return Ok(self.without_result(job, AttemptExit::Killed)) };
        if let Err(error) = self.system.cancel(id) {
            let message = format!("cannot cancel {}: {}", self.describe(job), error.message);
            on_event(AttemptEvent::Warning(message));
            return Ok(self.leave(job, on_event));
        }
        let clock = Instant::now();
        while clock.elapsed() < CANCEL_LIMIT {
            if let Some(end) = self.result(job, events, on_event) {
                return Ok(end);
            }
            if self.is_over(id) {
                break;
            }
            std::thread::sleep(self.settings.interval.min(LOOK));
        }
        Ok(self.without_result(job, AttemptExit::Killed))
    }

    fn leave(&self, job: &RunningJob<'_>, on_event: &mut dyn FnMut(AttemptEvent)) -> AttemptEnd {
        let message = format!("{} goes on; the next run continues with it", self.describe(job));
        on_event(AttemptEvent::Warning(message));
        self.without_result(job, AttemptExit::Left)
    }

    fn without_result(&self, job: &RunningJob<'_>, exit: AttemptExit) -> AttemptEnd {
        let (host, platform) = (String::new(), Platform::this_cpu());
        AttemptEnd {
            exit,
            execution: Execution { host, platform, started: 0.0, seconds: 0.0, job: self.job_name(job) },
        }
    }

    fn job_name(&self, job: &RunningJob<'_>) -> Option<JobName> {
        job.id.map(|id| JobName { executor: self.name.clone(), id: id.to_owned() })
    }

    /// `job 12 of `gpu``
    fn describe(&self, job: &RunningJob<'_>) -> String {
        match job.id {
            Some(id) => format!("job {id} of `{}`", self.name),
            None => format!("a job of `{}` whose id is not known", self.name),
        }
    }
}

impl Executor for Batch {
    fn run(
        &self,
        launch: &LaunchOptions<'_>,
        kill_handle: &KillHandle,
        on_event: &mut dyn FnMut(AttemptEvent),
    ) -> Result<AttemptEnd> {
        let folder = launch.folder;
        let job = RunningJob { folder, id: None, secrets: launch.secrets };
        if kill_handle.killed().is_some() {
            return Ok(self.without_result(&job, AttemptExit::Killed));
        }
        let script = folder.root.join("job.sh");
        let settings = launch.set_env.iter().cloned();
        let threads = THREAD_LIMITS.map(|name| (name.to_owned(), launch.threads.to_string()));
        let command =
            [&program(launch.command)?, "attempt", &launch.job.display().to_string(), "--detached"].map(quoted);
        write_script(&script, &folder.root, settings.chain(threads), &command)?;
        // Readable by this user only, as the log of a child process is.
        disk::open(OpenOptions::new().create(true).append(true).mode(0o600), &folder.log).at(&folder.log)?;
        // Before the job, so that it finds its lease; and after it, with the job's id.
        launch.store.write_lease(&launch.key, launch.lease)?;
        let env = exported(launch.env);
        let resources = launch.resources.or(&self.settings.resources).within(launch.timeout);
        let name = job_name(launch.lease);
        let submission = Submission {
            name: &name,
            script: &script,
            log: &folder.log,
            folder: &folder.root,
            env: &env,
            resources: &resources,
        };
        let id = self.system.submit(&submission)?;
        launch.store.write_lease(&launch.key, &Lease { job: Some(id.clone()), ..launch.lease.clone() })?;
        on_event(AttemptEvent::Job { executor: self.name.clone(), id: id.clone(), attached: false });
        self.follow(&RunningJob { id: Some(&id), ..job }, kill_handle, on_event)
    }
}

/// The name of a job and of its log: stage and attempt, in characters that every batch system accepts.
pub(in crate::run) fn job_name(lease: &Lease) -> String {
    let is_safe = |c: char| c.is_ascii_alphanumeric() || "_-.".contains(c);
    let stage: String = lease.stage.chars().map(|c| if is_safe(c) { c } else { '-' }).collect();
    let attempt = lease.attempt.strip_prefix("attempt-").unwrap_or(&lease.attempt);
    format!("{}.{attempt}", stage.trim_end_matches('-'))
}

/// The names of the variables to pass on that are set here.
fn exported(declared: &[String]) -> Vec<String> {
    let names = ALWAYS_PASSED.into_iter().chain(declared.iter().map(String::as_str));
    names.filter(|name| std::env::var_os(name).is_some()).map(str::to_owned).collect()
}

/// The path of this program on other machines: the default is a link that means something else there.
fn program(command: &Path) -> Result<String> {
    let path = std::fs::canonicalize(command).at(command)?;
    match path.to_str() {
        Some(text) => Ok(text.to_owned()),
        None => Err(Error::environment(format!("{}: the path of this program must be UTF-8", path.display()))),
    }
}

/// Writes the script of a job. Its variables are no secrets: those reach the job through the batch system.
fn write_script(
    path: &Path,
    folder: &Path,
    env: impl Iterator<Item = (String, String)>,
    command: &[String],
) -> Result<()> {
    let mut text = format!("#!/bin/sh\ncd {} || exit 3\n", quoted(&folder.display().to_string()));
    for (name, value) in env {
        text += &format!("export {name}={}\n", quoted(&value));
    }
    text += &format!("exec {}\n", command.join(" "));
    disk::write(path, text).at(path)?;
    files::make_executable(path)
}

/// Whether a signal ended the attempt in a folder.
fn is_stopped(folder: &Path) -> bool {
    matches!(Stopped::read(folder), Ok(Some(_)))
}

/// Whether a heartbeat is at most `max_age` old by the clock of its file system, which may not be this machine's.
fn beats(folder: &Path, max_age: Duration) -> bool {
    let Ok(beaten) = std::fs::metadata(folder.join(HEARTBEAT)).and_then(|m| m.modified()) else { return false };
    let now = folder.join(format!(".now-{}", std::process::id()));
    let written = std::fs::write(&now, "").and_then(|()| std::fs::metadata(&now)?.modified());
    let _ = std::fs::remove_file(&now);
    let now = written.unwrap_or_else(|_| SystemTime::now());
    now.duration_since(beaten).unwrap_or_default() <= max_age
}
