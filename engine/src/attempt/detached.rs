//! An attempt that runs as a job of a batch system, without a connection to its orchestrator. It talks through files in
//! its folder on the shared store:
//!
//! ```text
//! job.json       what to do
//! events.jsonl   one event a line; a job that the batch system starts again appends
//! heartbeat      changed by the guard every few seconds
//! result.json    how it ended; written last, under a temporary name first
//! stopped.json   that a signal ended it before it had a result
//! ```
//!
//! ```text
//! batch system ──signals──> guard ──fork──> attempt ──> programs of the kind, and theirs
//! ```
//!
//! The guard passes the log on with secrets redacted, and ends every process below it when the attempt ends, when a signal
//! arrives, or when the lease names another attempt.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::fd::{AsFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitStatus, getpid, getppid, pidfd_open, set_child_subreaper,
    set_parent_process_death_signal,
};
use serde::{Deserialize, Serialize};

use super::job::Detached;
use super::{EventWriter, FinalMessage, Job, guard, run_job};
use crate::disk;
use crate::error::{AtPath, Error, Result};
use crate::journal::unix_seconds;
use crate::kind::Registry;
use crate::run::log::{BoundedLog, LOG_HALF};
use crate::run::redact::{RedactingStream, Secrets};
use crate::store::{Lease, Platform, files};

pub(crate) const EVENTS: &str = "events.jsonl";
pub(crate) const HEARTBEAT: &str = "heartbeat";
const RESULT: &str = "result.json";
const STOPPED: &str = "stopped.json";

/// The exit code of an attempt whose lease names another attempt: the environment.
const LOST_LEASE: i32 = 3;

/// How a detached attempt ended.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct DetachedResult {
    /// The message of the attempt, unless its process died.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<FinalMessage>,
    /// The wait status of a process that died without a message.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub status: Option<i32>,
    pub host: String,
    pub platform: Platform,
    /// Seconds since 1970.
    pub started: f64,
    pub seconds: f64,
}

impl DetachedResult {
    /// The result in the folder of an attempt, if it has ended with one.
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        Ok(files::read_if_file(&folder.join(RESULT))?.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }
}

/// That a signal ended a detached attempt: preemption, a time limit, or a user.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Stopped {
    pub signal: i32,
    /// Seconds from its start.
    pub seconds: f64,
}

impl Stopped {
    pub fn read(folder: &Path) -> Result<Option<Self>> {
        Ok(files::read_if_file(&folder.join(STOPPED))?.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }
}

/// Runs a job file without an orchestrator. Call it before any thread is started.
pub(super) fn main(job: &Path, registry: &Registry) -> ExitCode {
    start(job, registry).unwrap_or_else(|error| {
        eprintln!("{error}");
        ExitCode::from(error.exit_code())
    })
}

fn start(job_file: &Path, registry: &Registry) -> Result<ExitCode> {
    let job = Job::read(job_file)?;
    let place = AttemptPlace::new(job_file, &job)?;
    if !place.holds_lease()? {
        return Err(Error::environment(format!("another attempt has taken over {}; nothing was done", job.stage)));
    }
    if place.folder.join(RESULT).exists() {
        // The batch system started the job again after its end.
        return Ok(ExitCode::SUCCESS);
    }
    place.prepare(&job)?;
    let signature = registry.get_kind(&job.kind).and_then(|kind| kind.signature(&job.params).ok());
    let secrets = Secrets::of(&signature);
    guard::check_single_threaded()?;
    let failed = |what: &str, e: rustix::io::Errno| Error::environment(format!("{what}: {e}"));
    let become_subreaper = || set_child_subreaper(Some(getpid())).map_err(|e| failed("adopting orphans", e));
    become_subreaper()?;
    let (stderr, stderr_of_attempt) = std::io::pipe().at("a pipe for the log")?;
    let guard = getpid();
    // SAFETY: this process has a single thread, so the child is a complete copy of it.
    match unsafe { libc::fork() } {
        0 => {
            drop(stderr);
            set_parent_process_death_signal(Some(Signal::KILL)).map_err(|e| failed("parent-death signal", e))?;
            // The guard may have died before the signal was set.
            if getppid() != Some(guard) {
                std::process::abort();
            }
            become_subreaper()?;
            rustix::stdio::dup2_stdin(File::open("/dev/null").at("/dev/null")?)
                .and_then(|()| rustix::stdio::dup2_stdout(&stderr_of_attempt))
                .and_then(|()| rustix::stdio::dup2_stderr(&stderr_of_attempt))
                .map_err(|e| failed("standard streams", e))?;
            drop(stderr_of_attempt);
            Ok(run(&job, registry, &place, secrets))
        }
        // -1: fork failed.
        child => match (child > 0).then(|| Pid::from_raw(child)).flatten() {
            Some(child) => {
                drop(stderr_of_attempt);
                run_guard(child, &place, File::from(OwnedFd::from(stderr)), &secrets)
            }
            None => Err(Error::environment(format!("cannot fork: {}", std::io::Error::last_os_error()))),
        },
    }
}

/// Runs the kind and writes its result.
fn run(job: &Job, registry: &Registry, place: &AttemptPlace, secrets: Secrets) -> ExitCode {
    let message =
        OpenOptions::new().append(true).create(true).open(place.folder.join(EVENTS)).at(EVENTS).and_then(|file| {
            let events = EventWriter::new(file, secrets.clone());
            let digest = run_job(job, registry, &events, None, &|| place.check_lease())?;
            events.sync();
            Ok(digest)
        });
    let message = match message {
        Ok(digest) => FinalMessage::Done { digest, peak_bytes: guard::peak_bytes() },
        Err(error) => FinalMessage::Failed { error },
    };
    let code = match &message {
        FinalMessage::Done { .. } => ExitCode::SUCCESS,
        FinalMessage::Failed { error } => ExitCode::from(error.exit_code()),
    };
    if let Err(error) = place.write_result(Some(secrets.redact_final(message)), None) {
        eprintln!("{error}");
        return ExitCode::from(error.exit_code());
    }
    code
}

/// The files of a detached attempt.
struct AttemptPlace {
    folder: PathBuf,
    /// The name of the folder, by which the lease names the attempt.
    name: String,
    detached: Detached,
    device: String,
    started: f64,
    clock: Instant,
}

impl AttemptPlace {
    fn new(job_file: &Path, job: &Job) -> Result<Self> {
        let not_detached = || {
            Error::user(format!("{}: this job was not written for a batch system", job_file.display()))
                .help("run it without `--detached`")
        };
        let folder = job_file.parent().unwrap_or(Path::new("")).to_owned();
        let name = folder.file_name().and_then(|name| name.to_str()).ok_or_else(not_detached)?.to_owned();
        let detached = job.detached.clone().ok_or_else(not_detached)?;
        let device = job.device.clone();
        Ok(Self { folder, name, detached, device, started: unix_seconds(SystemTime::now()), clock: Instant::now() })
    }

    fn holds_lease(&self) -> Result<bool> {
        Ok(Lease::read(&self.detached.lease)?.is_some_and(|lease| lease.attempt == self.name))
    }

    fn check_lease(&self) -> Result<()> {
        match self.holds_lease()? {
            true => Ok(()),
            false => Err(Error::environment("another attempt has taken over this stage; nothing was committed")),
        }
    }

    /// Removes what an earlier start of the same job left.
    fn prepare(&self, job: &Job) -> Result<()> {
        for path in [job.out.clone(), self.folder.join(STOPPED)] {
            let removed = if path.is_dir() { disk::remove_dir_all(&path) } else { disk::remove_file(&path) };
            match removed {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e).at(&path),
                _ => {}
            }
        }
        disk::create_dir(&job.out).at(&job.out)?;
        let events = self.folder.join(EVENTS);
        if files::read_if_file(&events)?.is_some_and(|text| !text.is_empty() && !text.ends_with(b"\n")) {
            let mut file = OpenOptions::new().append(true).open(&events).at(&events)?;
            file.write_all(b"\n").at(&events)?;
        }
        self.beat();
        Ok(())
    }

    /// Shows that the attempt lives, and lets other machines see its events. Failures are not told: the lease is what
    /// counts.
    fn beat(&self) {
        let _ = fs::write(self.folder.join(HEARTBEAT), format!("{}\n", unix_seconds(SystemTime::now())));
        let _ = File::open(self.folder.join(EVENTS)).and_then(|events| events.sync_data());
    }

    fn write_result(&self, message: Option<FinalMessage>, status: Option<i32>) -> Result<()> {
        let result = DetachedResult {
            message,
            status,
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            platform: Platform::with_device(&self.device),
            started: self.started,
            seconds: self.clock.elapsed().as_secs_f64(),
        };
        self.write(RESULT, &result)
    }

    fn write(&self, name: &str, what: &impl Serialize) -> Result<()> {
        let text = serde_json::to_vec_pretty(what).map_err(|e| Error::internal(format!("cannot serialise: {e}")))?;
        files::write_atomically(&self.folder.join(name), &text)
    }
}

/// Why the guard stops waiting.
enum GuardEvent {
    Ended(WaitStatus),
    Signal(i32),
    LostLease,
}

/// Waits for the end of the attempt, a signal, or the loss of the lease; then kills what is left and exits.
fn run_guard(attempt: Pid, place: &AttemptPlace, mut stderr: File, secrets: &Secrets) -> ! {
    // A rename, so that killing this program by name does not kill the guard before it has done its work.
    let _ = rustix::thread::set_name(c"guard");
    let signals = block_signals();
    let mut log = BoundedLog::new(std::io::stderr(), LOG_HALF);
    let mut stream = RedactingStream::new(secrets);
    let end = wait(attempt, place, &mut stderr, signals.as_ref(), |bytes| log.write(&stream.push(bytes)));
    guard::kill_descendants();
    // A process that cannot be killed may keep the pipe open forever.
    let mut buffer = [0; 8192];
    while is_readable(&stderr)
        && let Ok(n @ 1..) = stderr.read(&mut buffer)
    {
        log.write(&stream.push(&buffer[..n]));
    }
    log.write(&stream.end());
    log.end();
    let code = match end {
        GuardEvent::LostLease => {
            eprintln!("another attempt has taken over this stage; nothing was committed");
            LOST_LEASE
        }
        GuardEvent::Signal(signal) => note_signal(place, signal),
        // A signal to all processes of the job may reach the attempt first.
        GuardEvent::Ended(status) => match status.terminating_signal() {
            Some(signal) if STOPPING.contains(&signal) => note_signal(place, signal),
            signal => {
                if !place.folder.join(RESULT).exists() {
                    report(place.write_result(None, Some(status.as_raw())));
                }
                status.exit_status().unwrap_or(128 + signal.unwrap_or(0))
            }
        },
    };
    std::process::exit(code)
}

/// Waits as [`run_guard`] does, and passes the attempt's standard error to `on_log`.
fn wait(
    attempt: Pid,
    place: &AttemptPlace,
    stderr: &mut File,
    signals: Option<&OwnedFd>,
    mut on_log: impl FnMut(&[u8]),
) -> GuardEvent {
    let interval = Duration::from_secs_f64(place.detached.heartbeat_seconds.max(0.01));
    // On a kernel without pidfds, poll for the attempt's end more often.
    let end: Option<OwnedFd> = pidfd_open(attempt, PidfdFlags::empty()).ok();
    let pause = if end.is_some() { interval } else { Duration::from_millis(50) };
    let mut beaten = Instant::now();
    let mut buffer = [0; 8192];
    let mut is_open = true;
    loop {
        if let Some(status) = guard::reap(attempt) {
            return GuardEvent::Ended(status);
        }
        let fds = [signals.map(AsFd::as_fd), end.as_ref().map(AsFd::as_fd), is_open.then(|| stderr.as_fd())];
        let mut fds: Vec<PollFd<'_>> =
            fds.into_iter().flatten().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)).collect();
        let _ = poll(&mut fds, Timespec::try_from(pause).ok().as_ref());
        let has_log = is_open && fds.last().is_some_and(|fd| !fd.revents().is_empty());
        if let Some(signal) = signals.and_then(pending_signal) {
            return GuardEvent::Signal(signal);
        }
        if has_log {
            match stderr.read(&mut buffer) {
                Ok(n @ 1..) => on_log(&buffer[..n]),
                _ => is_open = false,
            }
        }
        if beaten.elapsed() >= interval {
            beaten = Instant::now();
            place.beat();
            // A lease that cannot be read is not lost.
            if !place.holds_lease().unwrap_or(true) {
                return GuardEvent::LostLease;
            }
        }
    }
}

/// Whether a pipe has bytes, or is closed, within a second.
fn is_readable(pipe: &File) -> bool {
    let second = Timespec { tv_sec: 1, tv_nsec: 0 };
    matches!(poll(&mut [PollFd::new(pipe, PollFlags::IN)], Some(&second)), Ok(1..))
}

/// The signals that end the attempt so that it can be resumed.
const STOPPING: [i32; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGQUIT];

/// Blocks the stopping signals for this process; the descriptor gives them instead.
fn block_signals() -> Option<OwnedFd> {
    // SAFETY: the set is initialised by sigemptyset, and the process has a single thread.
    let descriptor = unsafe {
        let mut set = std::mem::zeroed::<libc::sigset_t>();
        libc::sigemptyset(&mut set);
        for signal in STOPPING {
            libc::sigaddset(&mut set, signal);
        }
        libc::sigprocmask(libc::SIG_BLOCK, &set, std::ptr::null_mut());
        libc::signalfd(-1, &set, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK)
    };
    // SAFETY: a new descriptor that nothing else owns.
    (descriptor >= 0).then(|| unsafe { OwnedFd::from_raw_fd(descriptor) })
}

fn pending_signal(signals: &OwnedFd) -> Option<i32> {
    let mut info = [0; size_of::<libc::signalfd_siginfo>()];
    let read = rustix::io::read(signals, &mut info).ok()?;
    // The number of the signal is the first field.
    (read == info.len()).then(|| i32::from_ne_bytes([info[0], info[1], info[2], info[3]]))
}

/// Notes that a signal ended the attempt; returns the exit code.
fn note_signal(place: &AttemptPlace, signal: i32) -> i32 {
    if !place.folder.join(RESULT).exists() {
        report(place.write(STOPPED, &Stopped { signal, seconds: place.clock.elapsed().as_secs_f64() }));
    }
    eprintln!("ended by signal {signal}; the next start of this stage continues from its last checkpoint");
    128 + signal
}

fn report(result: Result<()>) {
    if let Err(error) = result {
        eprintln!("{error}");
    }
}
