//! The attempt's process as seen from the orchestrator: starts it, reads its events, ends it.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::BorrowedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::Path;
use std::process::{Child, ChildStderr, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::process::{Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, kill_process_group, pidfd_open, waitid};
use serde::Deserialize;

use super::redact::{RedactingStream, Secrets};
use crate::attempt::{FinalMessage, ThreadCount};
use crate::context::StageEvent;
use crate::error::{AtPath, Error, Result};

/// Environment variables that every attempt gets, besides those that its kind declares.
const ALWAYS_PASSED: [&str; 4] = ["PATH", "HOME", "LANG", "TMPDIR"];
/// Environment variables that limit the number of threads that libraries start.
const THREAD_LIMITS: [&str; 4] = ["RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"];

/// Serialises spawning: while the lock's descriptor is inheritable, no other child of this process may be spawned.
static SPAWN_LOCK: Mutex<()> = Mutex::new(());

/// Settings to start one attempt.
pub(super) struct LaunchOptions<'a> {
    pub command: &'a Path,
    pub job: &'a Path,
    pub folder: &'a Path,
    pub log: &'a Path,
    pub threads: usize,
    /// Names of further environment variables to pass on.
    pub env: &'a [String],
    /// Variables that this program sets for its own attempts.
    pub set_env: &'a [(String, String)],
    pub secrets: &'a Secrets,
    /// The key's lock; inherited, so that the key stays locked as long as the attempt or any program that it started
    /// lives.
    pub lock: BorrowedFd<'a>,
}

/// How an attempt ended.
#[derive(Debug)]
pub(super) enum AttemptExit {
    Reported(FinalMessage),
    /// It ended without a final message.
    Unreported(ExitStatus),
    /// It was killed through its [`KillHandle`], or for that reason never started.
    Killed,
}

/// Lets another thread kill an attempt, or change its number of threads.
#[derive(Clone, Default)]
pub(super) struct KillHandle(Arc<Mutex<KillState>>);

#[derive(Default)]
struct KillState {
    /// Set while the process exists, even as a zombie, so that the pid cannot belong to another process.
    pid: Option<Pid>,
    /// The pipe whose closing makes the attempt's guard kill everything.
    liveness_pipe: Option<ChildStdin>,
    killed: bool,
    /// The last number of threads that was not yet passed on because the process did not exist.
    threads: Option<u16>,
}

/// Time that the attempt's guard has to kill the processes below it; after that, the orchestrator kills the process
/// group.
const GRACE_PERIOD: Duration = Duration::from_secs(2);

impl KillHandle {
    /// Kills the attempt and every process below it; an attempt that has not started will not start.
    pub fn kill(&self) {
        let mut state = self.lock();
        state.killed = true;
        state.liveness_pipe = None;
        // A stopped (SIGSTOP) guard does not notice the closed pipe.
        let kill_handle = self.clone();
        let kill_later = move || {
            std::thread::sleep(GRACE_PERIOD);
            kill_handle.lock().kill_group();
        };
        if state.pid.is_some() && std::thread::Builder::new().stack_size(64 << 10).spawn(kill_later).is_err() {
            state.kill_group();
        }
    }

    /// Tells the attempt to use `threads` threads from its next step on.
    pub fn set_threads(&self, threads: usize) {
        let mut state = self.lock();
        state.threads = Some(u16::try_from(threads).unwrap_or(u16::MAX));
        state.pass_on_threads();
    }

    fn lock(&self) -> MutexGuard<'_, KillState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kills the rest of the process group and reaps the zombie. The zombie must exist until then, because it keeps the
    /// group's id from being reused.
    fn reap(&self, child: &mut Child) -> Result<ExitStatus> {
        let mut state = self.lock();
        state.kill_group();
        state.pid = None;
        child.wait().map_err(|e| Error::environment(format!("cannot wait for an attempt: {e}")))
    }

    fn was_killed(&self) -> bool {
        self.lock().killed
    }
}

impl KillState {
    fn pass_on_threads(&mut self) {
        let Some(pipe) = &mut self.liveness_pipe else { return };
        let Some(threads) = self.threads.take() else { return };
        let count: ThreadCount = threads.to_le_bytes();
        // Fails only if the attempt has ended.
        let _ = pipe.write_all(&count);
    }

    fn kill_group(&self) {
        if let Some(pid) = self.pid {
            // The group may be gone already; with a child of this process, nothing else can fail.
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

/// Runs an attempt to its end on this thread; the attempt does not outlive it. Passes its events on, redacted.
///
/// # Errors
/// When it cannot be started or waited for.
pub(super) fn run(
    launch: &LaunchOptions,
    kill_handle: &KillHandle,
    mut on_event: impl FnMut(StageEvent),
) -> Result<AttemptExit> {
    let log = OpenOptions::new().create(true).append(true).mode(0o600).open(launch.log).at(launch.log)?;
    let Some(mut child) = spawn(launch, kill_handle)? else { return Ok(AttemptExit::Killed) };
    let log_done = child.stderr.take().map(|stderr| relay_log(stderr, log, launch.secrets.clone()));
    let stdout = child.stdout.take().map(BufReader::new);
    let message = stdout.and_then(|stdout| read_events(stdout, launch.secrets, &mut on_event));
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
        _ if kill_handle.was_killed() => AttemptExit::Killed,
        Some(message) => AttemptExit::Reported(message),
        None => AttemptExit::Unreported(status),
    })
}

/// Waits at most `limit` for a child's end; returns whether it ended.
fn ends_within(child: &Child, limit: Duration) -> bool {
    let Ok(end) = pidfd_open(Pid::from_child(child), PidfdFlags::empty()) else { return false };
    let limit = Timespec::try_from(limit).ok();
    matches!(poll(&mut [PollFd::new(&end, PollFlags::IN)], limit.as_ref()), Ok(1..))
}

fn spawn(launch: &LaunchOptions, kill_handle: &KillHandle) -> Result<Option<Child>> {
    let mut command = Command::new(launch.command);
    command
        .arg0("temper")
        .arg("attempt")
        .arg(launch.job)
        .current_dir(launch.folder)
        .env_clear()
        .envs(ALWAYS_PASSED.iter().filter_map(|name| std::env::var_os(name).map(|value| (*name, value))))
        .envs(launch.env.iter().filter_map(|name| std::env::var_os(name).map(|value| (name, value))))
        .envs(launch.set_env.iter().map(|(name, value)| (name, value)))
        .envs(THREAD_LIMITS.map(|name| (name, launch.threads.to_string())))
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut state = kill_handle.lock();
    if state.killed {
        return Ok(None);
    }
    let spawning = SPAWN_LOCK.lock().unwrap_or_else(PoisonError::into_inner);
    let set_lock_flags = |flags| {
        fcntl_setfd(launch.lock, flags)
            .map_err(|e| Error::environment(format!("cannot pass the key's lock to the attempt: {e}")))
    };
    set_lock_flags(FdFlags::empty())?;
    let spawned = command.spawn();
    set_lock_flags(FdFlags::CLOEXEC)?;
    drop(spawning);
    let mut child = spawned
        .map_err(|e| Error::environment(format!("cannot start an attempt ({}): {e}", launch.command.display())))?;
    state.pid = Some(Pid::from_child(&child));
    state.liveness_pipe = child.stdin.take();
    state.pass_on_threads();
    Ok(Some(child))
}

/// Reads an attempt's events until its final message, or until its standard output ends.
fn read_events(
    mut stdout: impl BufRead,
    secrets: &Secrets,
    on_event: &mut impl FnMut(StageEvent),
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
            Ok(AttemptMessage::Final(message)) => return Some(redact_final(message, secrets)),
            Ok(AttemptMessage::Event(event)) => on_event(redact_event(event, secrets)),
            // Cut short by the attempt's death, or written to the descriptor by another program.
            Err(_) => {}
        }
    }
}

fn redact_event(event: StageEvent, secrets: &Secrets) -> StageEvent {
    match event {
        StageEvent::Progress { done, total, unit, headline } => {
            let headline = headline.map(|(name, value)| (secrets.redact(&name), value));
            StageEvent::Progress { done, total, unit: secrets.redact(&unit), headline }
        }
        StageEvent::Timing { what, seconds } => {
            let seconds = seconds.into_iter().map(|(name, value)| (secrets.redact(&name), value)).collect();
            StageEvent::Timing { what: secrets.redact(&what), seconds }
        }
        StageEvent::Checkpoint { done, total, unit } => {
            StageEvent::Checkpoint { done, total, unit: secrets.redact(&unit) }
        }
        StageEvent::Resumed { done, total, unit } => StageEvent::Resumed { done, total, unit: secrets.redact(&unit) },
        StageEvent::Paid(paid) => StageEvent::Paid(paid),
        StageEvent::Warning { message } => StageEvent::Warning { message: secrets.redact(&message) },
    }
}

fn redact_final(message: FinalMessage, secrets: &Secrets) -> FinalMessage {
    match message {
        FinalMessage::Done { .. } => message,
        FinalMessage::Failed { error } => {
            let (message, help) = (secrets.redact(&error.message), error.help.map(|help| secrets.redact(&help)));
            FinalMessage::Failed { error: Error { message, help, ..error } }
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

/// Maximum number of bytes kept from the beginning of a log, and from its end.
const LOG_HALF: usize = 8 << 20;

/// A log that omits its middle when it grows too long. The last part of such a log is written when the stream ends.
struct BoundedLog {
    file: File,
    /// Number of bytes left to write for the first part.
    head_left: usize,
    half: usize,
    end: VecDeque<u8>,
    omitted: u64,
}

impl BoundedLog {
    fn new(file: File, half: usize) -> Self {
        Self { file, head_left: half, half, end: VecDeque::new(), omitted: 0 }
    }

    /// Ignores errors: a log that cannot be written (full disk) is no reason to fail.
    fn write(&mut self, bytes: &[u8]) {
        let (first, rest) = bytes.split_at(bytes.len().min(self.head_left));
        let _ = self.file.write_all(first);
        self.head_left -= first.len();
        self.end.extend(rest);
        let over = self.end.len().saturating_sub(self.half);
        self.end.drain(..over);
        self.omitted += over as u64;
    }

    fn end(mut self) {
        if self.omitted > 0 {
            let _ = write!(self.file, "\n[{} bytes of this log were omitted]\n", self.omitted);
        }
        let (a, b) = self.end.as_slices();
        let _ = self.file.write_all(a).and_then(|()| self.file.write_all(b));
    }
}

/// The error of an attempt that ended without a final message, guessed from its exit status and log.
pub(super) fn unreported_exit(status: ExitStatus, log: &Path) -> Error {
    const MEMORY_HELP: &str = "run fewer stages at a time (-j 1), or make the stage smaller";
    if status.signal() == Some(6)
        // The message of Rust's allocator before it aborts.
        && let Some(line) = tail(log, 3).into_iter().find(|line| line.starts_with("memory allocation of "))
    {
        return Error::environment(format!("out of memory: {line}")).help(MEMORY_HELP);
    }
    match (status.signal(), status.code()) {
        (Some(9), _) => Error::environment("the attempt was killed (signal 9)")
            .help(format!("if no user killed it, the machine ran out of memory: {MEMORY_HELP}")),
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

/// The last `n` lines of a log.
pub(super) fn tail(log: &Path, n: usize) -> Vec<String> {
    const TAIL_BYTES: u64 = 16 << 10;
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        let start = file.metadata()?.len().saturating_sub(TAIL_BYTES);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let text = String::from_utf8_lossy(&read().unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(n)..].iter().map(|line| (*line).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;

    use super::*;
    use crate::error::Blame;

    #[test]
    fn a_long_log_keeps_its_beginning_and_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let text: String = (0..1000).map(|n| format!("{n:03}\n")).collect();
        for (half, expected) in [
            (2_000, text.clone()),
            (2_001, text.clone()),
            (8, { format!("000\n001\n\n[{} bytes of this log were omitted]\n998\n999\n", 4_000 - 16) }),
        ] {
            for piece in [1, 7, 5_000] {
                let mut log = BoundedLog::new(File::create(&path).unwrap(), half);
                text.as_bytes().chunks(piece).for_each(|piece| log.write(piece));
                log.end();
                assert_eq!(std::fs::read_to_string(&path).unwrap(), expected, "half {half}, pieces of {piece}");
            }
        }
    }

    #[test]
    fn running_out_of_memory_is_not_an_internal_error() {
        const ABORT: i32 = 6;
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        std::fs::write(&log, "at work\nmemory allocation of 1600 bytes failed\n").unwrap();
        let out_of_memory = unreported_exit(ExitStatus::from_raw(ABORT), &log);
        assert_eq!(out_of_memory.blame, Blame::Environment);
        assert!(out_of_memory.message.contains("memory allocation of 1600 bytes"), "{out_of_memory}");
        std::fs::write(&log, "at work\n").unwrap();
        assert_eq!(unreported_exit(ExitStatus::from_raw(ABORT), &log).blame, Blame::Internal);
    }
}
