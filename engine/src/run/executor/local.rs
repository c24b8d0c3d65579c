//! The executor `local`: an attempt is a child process of the orchestrator, and does not outlive it.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read};
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions, pidfd_open, waitid};
use serde::Deserialize;

use super::{
    ALWAYS_PASSED, AttemptEnd, AttemptEvent, AttemptExit, DEVICE_VARIABLES, Execution, Executor, KillHandle,
    LaunchOptions, THREAD_LIMITS,
};
use crate::attempt::FinalMessage;
use crate::context::StageEvent;
use crate::disk;
use crate::error::{AtPath, Error, Result};
use crate::journal::unix_seconds;
use crate::run::interrupt::Interruption;
use crate::run::log::{BoundedLog, LOG_HALF, tail};
use crate::run::redact::{RedactingStream, Secrets};
use crate::store::Platform;

/// Serialises spawning: while the lock's descriptor is inheritable, no other child of this process may be spawned.
pub(super) static SPAWN_LOCK: Mutex<()> = Mutex::new(());

/// Time that the attempt's guard has to kill the processes below it; after that, the orchestrator kills the process
/// group.
pub(super) const GRACE_PERIOD: Duration = Duration::from_secs(2);

/// Runs attempts as child processes.
pub(in crate::run) struct Local;

impl Executor for Local {
    fn run(
        &self,
        launch: &LaunchOptions<'_>,
        kill_handle: &KillHandle,
        on_event: &mut dyn FnMut(AttemptEvent),
    ) -> Result<AttemptEnd> {
        let (started, clock) = (unix_seconds(SystemTime::now()), Instant::now());
        let exit = run(launch, kill_handle, &mut |event| on_event(AttemptEvent::Stage(event)))?;
        let host = rustix::system::uname().nodename().to_string_lossy().into_owned();
        let seconds = clock.elapsed().as_secs_f64();
        let execution = Execution { host, platform: Platform::with_device(launch.device), started, seconds, job: None };
        Ok(AttemptEnd { exit, execution })
    }
}

/// Runs an attempt to its end; the attempt does not outlive it.
fn run(
    launch: &LaunchOptions<'_>,
    kill_handle: &KillHandle,
    on_event: &mut dyn FnMut(StageEvent),
) -> Result<AttemptExit> {
    let log = &launch.folder.log;
    let log = disk::open(OpenOptions::new().create(true).append(true).mode(0o600), log).at(log)?;
    let watchdog = launch.timeout.map(|limit| Watchdog::start(limit, kill_handle.clone())).transpose()?;
    let Some(mut child) = spawn(launch, kill_handle)? else { return Ok(AttemptExit::Killed) };
    let on_event = &mut |event: StageEvent| {
        let checkpointed = matches!(event, StageEvent::Checkpoint { .. });
        on_event(event);
        if checkpointed {
            kill_handle.checkpointed();
        }
    };
    let log_done = child.stderr.take().map(|stderr| relay_log(stderr, log, launch.secrets.clone()));
    let stdout = child.stdout.take().map(BufReader::new);
    let message = stdout.and_then(|stdout| read_events(stdout, launch.secrets, on_event));
    if message.is_some() {
        // After its final message the attempt has nothing left to do; end it and the processes that it started.
        kill_handle.lock().liveness_pipe = None;
        if !ends_within(&child, GRACE_PERIOD) {
            kill_handle.lock().kill_group();
        }
    }
    let (pid, options) = (Pid::from_child(&child), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
    while matches!(waitid(WaitId::Pid(pid), options), Err(rustix::io::Errno::INTR)) {}
    let status = kill_handle.reap(&mut child)?;
    if let Some(log_done) = log_done {
        // A program that escaped the guard may keep the pipe open forever.
        let _ = log_done.recv_timeout(Duration::from_secs(1));
    }
    Ok(match message {
        Some(message @ FinalMessage::Done { .. }) => AttemptExit::Reported(message),
        _ if watchdog.is_some_and(|watchdog| watchdog.has_fired()) => AttemptExit::TimedOut,
        _ if kill_handle.killed().is_some() => AttemptExit::Killed,
        Some(message) => AttemptExit::Reported(message),
        None => AttemptExit::Unreported(status),
    })
}

/// Stops an attempt after its maximum time, unless this is dropped before.
struct Watchdog {
    fired: Arc<AtomicBool>,
    _keep: Sender<()>,
}

impl Watchdog {
    fn start(limit: Duration, kill_handle: KillHandle) -> Result<Self> {
        let (keep, dropped) = channel();
        let fired = Arc::new(AtomicBool::new(false));
        let watch = {
            let fired = fired.clone();
            move || {
                if matches!(dropped.recv_timeout(limit), Err(RecvTimeoutError::Timeout)) {
                    fired.store(true, Ordering::Relaxed);
                    kill_handle.stop(Interruption::Leave);
                }
            }
        };
        let thread = std::thread::Builder::new().name("timeout".into()).stack_size(64 << 10).spawn(watch);
        thread.map_err(|e| Error::environment(format!("cannot start a thread: {e}")))?;
        Ok(Self { fired, _keep: keep })
    }

    fn has_fired(&self) -> bool {
        self.fired.load(Ordering::Relaxed)
    }
}

/// Waits at most `limit` for a child's end; returns whether it ended.
fn ends_within(child: &Child, limit: Duration) -> bool {
    let Ok(end) = pidfd_open(Pid::from_child(child), PidfdFlags::empty()) else { return false };
    let limit = Timespec::try_from(limit).ok();
    matches!(poll(&mut [PollFd::new(&end, PollFlags::IN)], limit.as_ref()), Ok(1..))
}

fn spawn(launch: &LaunchOptions<'_>, kill_handle: &KillHandle) -> Result<Option<Child>> {
    let uses_device = launch.device != "cpu" || !launch.gpus.is_empty();
    let of_device = if uses_device { &DEVICE_VARIABLES[..] } else { &[] };
    let gpus = launch.gpus.iter().map(|gpu| gpu.id.as_str()).collect::<Vec<_>>().join(",");
    let mut command = Command::new(launch.command);
    command
        .arg0("temper")
        .arg("attempt")
        .arg(launch.job)
        .current_dir(&launch.folder.root)
        .env_clear()
        .envs(
            ALWAYS_PASSED.iter().chain(of_device).filter_map(|name| std::env::var_os(name).map(|value| (*name, value))),
        )
        .envs(launch.env.iter().filter_map(|name| std::env::var_os(name).map(|value| (name, value))))
        .envs(launch.set_env.iter().map(|(name, value)| (name, value)))
        // An attempt whose stage asks for no GPU must not see those of others.
        .env("CUDA_VISIBLE_DEVICES", gpus)
        .envs(THREAD_LIMITS.map(|name| (name, launch.threads.to_string())))
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    // A store among temporary files must not be open to attempts because these are.
    if is_below(launch.store.root(), &std::env::temp_dir()) {
        let temporary = launch.folder.temporary();
        disk::create_dir_all(&temporary).at(&temporary)?;
        command.env("TMPDIR", temporary);
    }
    let mut state = kill_handle.lock();
    if state.killed.is_some() {
        return Ok(None);
    }
    let spawning = SPAWN_LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    let locks = || launch.gpus.iter().map(|gpu| gpu.file.as_fd()).chain([launch.lock]);
    let set_lock_flags = |flags| {
        let failed = |e| Error::environment(format!("cannot pass a lock to the attempt: {e}"));
        locks().try_for_each(|lock| fcntl_setfd(lock, flags).map_err(failed))
    };
    set_lock_flags(FdFlags::empty())?;
    let spawned = command.spawn();
    set_lock_flags(FdFlags::CLOEXEC)?;
    drop(spawning);
    let mut child = spawned
        .map_err(|e| Error::environment(format!("cannot start an attempt ({}): {e}", launch.command.display())))?;
    state.pid = Some(Pid::from_child(&child));
    state.liveness_pipe = child.stdin.take();
    state.can_stop = launch.can_stop;
    state.pass_on_threads();
    Ok(Some(child))
}

/// Whether a path lies in a folder, with links followed.
pub(crate) fn is_below(path: &Path, folder: &Path) -> bool {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    real(path).starts_with(real(folder))
}

/// Reads an attempt's events until its final message, or until its standard output ends.
fn read_events(
    mut stdout: impl BufRead,
    secrets: &Secrets,
    on_event: &mut dyn FnMut(StageEvent),
) -> Option<FinalMessage> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum AttemptMessage {
        Final(FinalMessage),
        Event(StageEvent),
    }
    let mut line = Vec::new();
    loop {
        line.clear();
        match stdout.read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return None,
            Ok(_) => {}
        }
        match serde_json::from_slice(&line) {
            Ok(AttemptMessage::Final(message)) => return Some(secrets.redact_final(message)),
            Ok(AttemptMessage::Event(event)) => on_event(secrets.redact_event(event)),
            // Cut short by the attempt's death, or written to the descriptor by another program.
            Err(_) => {}
        }
    }
}

/// Copies an attempt's standard error to its log, with secrets redacted; the receiver is notified at the end of the
/// stream.
fn relay_log(mut stderr: ChildStderr, log: File, secrets: Secrets) -> Receiver<()> {
    let (done, wait) = channel();
    std::thread::spawn(move || {
        let mut log = BoundedLog::new(log, LOG_HALF);
        let mut stream = RedactingStream::new(&secrets);
        let mut buffer = [0; 8192];
        while let Ok(n @ 1..) = stderr.read(&mut buffer) {
            log.write(&stream.push(&buffer[..n]));
        }
        log.write(&stream.end());
        log.end();
        let _ = done.send(());
    });
    wait
}

/// The error of an attempt that ended without a final message, guessed from its exit status and log. `is_job`: it was a
/// job of a batch system.
pub(in crate::run) fn unreported_exit(status: ExitStatus, log: &Path, is_job: bool) -> Error {
    let memory_help = match is_job {
        true => "set more `memory` in the stage's `resources`, or make the stage smaller",
        false => "run fewer stages at a time (-j 1), or make the stage smaller",
    };
    if status.signal() == Some(6)
        // The message of Rust's allocator before it aborts.
        && let Some(line) = tail(log, 3).into_iter().find(|line| line.starts_with("memory allocation of "))
    {
        return Error::environment(format!("out of memory: {line}")).help(memory_help);
    }
    match (status.signal(), status.code()) {
        (Some(9), _) => Error::environment("the attempt was killed (signal 9)")
            .help(format!("if no user killed it, the machine ran out of memory: {memory_help}")),
        (Some(signal @ (1 | 2 | 15)), _) => Error::environment(format!("the attempt was ended by signal {signal}")),
        (Some(signal), _) => Error::internal(format!("the attempt crashed (signal {signal})")),
        // The attempt could not begin; its log has the reason.
        (None, Some(3)) => {
            let why = tail(log, 1).pop().unwrap_or_else(|| "its log is empty".to_owned());
            Error::environment(format!("the attempt could not start: {why}"))
        }
        (None, code) => {
            Error::internal(format!("the attempt ended without a result (exit code {})", code.unwrap_or(-1)))
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;
    use crate::error::Blame;

    #[test]
    fn running_out_of_memory_is_not_an_internal_error() {
        const ABORT: i32 = 6;
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        std::fs::write(&log, "at work\nmemory allocation of 1600 bytes failed\n").unwrap();
        let out_of_memory = unreported_exit(ExitStatus::from_raw(ABORT), &log, false);
        assert_eq!(out_of_memory.blame, Blame::Environment);
        assert!(out_of_memory.message.contains("memory allocation of 1600 bytes"), "{out_of_memory}");
        std::fs::write(&log, "at work\n").unwrap();
        assert_eq!(unreported_exit(ExitStatus::from_raw(ABORT), &log, false).blame, Blame::Internal);
    }
}
