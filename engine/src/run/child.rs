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

use super::redact::{Secrets, Stream};
use crate::attempt::Last;
use crate::context::Tell;
use crate::error::{At, Error, Result};

/// Environment variables that every attempt gets, besides those that its kind declares.
const ALWAYS: [&str; 4] = ["PATH", "HOME", "LANG", "TMPDIR"];
/// Environment variables that limit the number of threads that libraries start.
const THREADS: [&str; 4] = ["RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"];

/// Serialises spawning: while the lock's descriptor is inheritable, no other child of this process may be spawned.
static SPAWNING: Mutex<()> = Mutex::new(());

/// Settings to start one attempt.
pub(super) struct Launch<'a> {
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
pub(super) enum Ending {
    Said(Last),
    /// It ended without a last line.
    Silent(ExitStatus),
    /// It was killed through its leash, or for that reason never started.
    Killed,
}

/// Lets another thread kill an attempt.
#[derive(Clone, Default)]
pub(super) struct Leash(Arc<Mutex<Held>>);

#[derive(Default)]
struct Held {
    /// Set while the process exists, even as a zombie, so that the pid cannot belong to another process.
    pid: Option<Pid>,
    /// The pipe whose closing makes the attempt's guard kill everything.
    lifeline: Option<ChildStdin>,
    killed: bool,
}

/// Time that the attempt's guard has to kill the processes below it; after that, the orchestrator kills the process
/// group.
const GRACE: Duration = Duration::from_secs(2);

impl Leash {
    /// Kills the attempt and every process below it; an attempt that has not started will not start.
    pub fn kill(&self) {
        let mut held = self.held();
        held.killed = true;
        held.lifeline = None;
        // A stopped (SIGSTOP) guard does not notice the closed pipe.
        let leash = self.clone();
        let late = move || {
            std::thread::sleep(GRACE);
            leash.held().kill_group();
        };
        if held.pid.is_some() && std::thread::Builder::new().stack_size(64 << 10).spawn(late).is_err() {
            held.kill_group();
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kills the rest of the process group and reaps the zombie. The zombie must exist until then, because it keeps the
    /// group's id from being reused.
    fn reap(&self, child: &mut Child) -> Result<ExitStatus> {
        let mut held = self.held();
        held.kill_group();
        held.pid = None;
        child.wait().map_err(|e| Error::surroundings(format!("cannot wait for an attempt: {e}")))
    }

    fn was_killed(&self) -> bool {
        self.held().killed
    }
}

impl Held {
    fn kill_group(&self) {
        if let Some(pid) = self.pid {
            // The group may be gone already; with a child of ours, nothing else can fail.
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

/// Runs an attempt to its end on this thread; the attempt does not outlive it. Passes its events on, redacted.
///
/// # Errors
/// When it cannot be started or waited for.
pub(super) fn run(launch: &Launch, leash: &Leash, mut on_tell: impl FnMut(Tell)) -> Result<Ending> {
    let log = OpenOptions::new().create(true).append(true).mode(0o600).open(launch.log).at(launch.log)?;
    let Some(mut child) = spawn(launch, leash)? else { return Ok(Ending::Killed) };
    let logged = child.stderr.take().map(|stderr| relay_log(stderr, log, launch.secrets.clone()));
    let stdout = child.stdout.take().map(BufReader::new);
    let last = stdout.and_then(|stdout| listen(stdout, launch.secrets, &mut on_tell));
    if last.is_some() {
        // After its last line the attempt has nothing left to do; end it and the processes that it started.
        leash.held().lifeline = None;
        if !ends_within(&child, GRACE) {
            leash.held().kill_group();
        }
    }
    let (pid, options) = (Pid::from_child(&child), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
    while matches!(waitid(WaitId::Pid(pid), options), Err(rustix::io::Errno::INTR)) {}
    let status = leash.reap(&mut child)?;
    if let Some(logged) = logged {
        // A program that escaped the guard may keep the pipe open forever.
        let _ = logged.recv_timeout(Duration::from_secs(1));
    }
    Ok(match last {
        Some(last @ Last::Done { .. }) => Ending::Said(last),
        _ if leash.was_killed() => Ending::Killed,
        Some(last) => Ending::Said(last),
        None => Ending::Silent(status),
    })
}

/// Waits at most `limit` for a child's end; returns whether it ended.
fn ends_within(child: &Child, limit: Duration) -> bool {
    let Ok(end) = pidfd_open(Pid::from_child(child), PidfdFlags::empty()) else { return false };
    let limit = Timespec::try_from(limit).ok();
    matches!(poll(&mut [PollFd::new(&end, PollFlags::IN)], limit.as_ref()), Ok(1..))
}

fn spawn(launch: &Launch, leash: &Leash) -> Result<Option<Child>> {
    let mut command = Command::new(launch.command);
    command
        .arg0("temper")
        .arg("attempt")
        .arg(launch.job)
        .current_dir(launch.folder)
        .env_clear()
        .envs(ALWAYS.iter().filter_map(|name| std::env::var_os(name).map(|value| (*name, value))))
        .envs(launch.env.iter().filter_map(|name| std::env::var_os(name).map(|value| (name, value))))
        .envs(launch.set_env.iter().map(|(name, value)| (name, value)))
        .envs(THREADS.map(|name| (name, launch.threads.to_string())))
        .process_group(0)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut held = leash.held();
    if held.killed {
        return Ok(None);
    }
    let turn = SPAWNING.lock().unwrap_or_else(PoisonError::into_inner);
    let lend = |flags| {
        fcntl_setfd(launch.lock, flags).map_err(|e| Error::surroundings(format!("cannot hand on the key's lock: {e}")))
    };
    lend(FdFlags::empty())?;
    let spawned = command.spawn();
    lend(FdFlags::CLOEXEC)?;
    drop(turn);
    let mut child = spawned
        .map_err(|e| Error::surroundings(format!("cannot start an attempt ({}): {e}", launch.command.display())))?;
    held.pid = Some(Pid::from_child(&child));
    held.lifeline = child.stdin.take();
    Ok(Some(child))
}

/// Reads an attempt's events until its last line, or until its standard output ends.
fn listen(mut stdout: impl BufRead, secrets: &Secrets, on_tell: &mut impl FnMut(Tell)) -> Option<Last> {
    #[derive(Deserialize)]
    #[serde(untagged)]
    enum Said {
        Last(Last),
        Tell(Tell),
    }
    let mut line = Vec::new();
    loop {
        line.clear();
        match stdout.read_until(b'\n', &mut line) {
            Ok(0) | Err(_) => return None,
            Ok(_) => {}
        }
        match serde_json::from_slice(&line) {
            Ok(Said::Last(last)) => return Some(clean_last(last, secrets)),
            Ok(Said::Tell(tell)) => on_tell(clean(tell, secrets)),
            // Cut short by the attempt's death, or written to the descriptor by another program.
            Err(_) => {}
        }
    }
}

fn clean(tell: Tell, secrets: &Secrets) -> Tell {
    match tell {
        Tell::Progress { done, total, unit, headline } => {
            let headline = headline.map(|(name, value)| (secrets.redact(&name), value));
            Tell::Progress { done, total, unit: secrets.redact(&unit), headline }
        }
        Tell::Timing { what, seconds } => {
            let seconds = seconds.into_iter().map(|(name, value)| (secrets.redact(&name), value)).collect();
            Tell::Timing { what: secrets.redact(&what), seconds }
        }
        Tell::Checkpoint { done, total, unit } => Tell::Checkpoint { done, total, unit: secrets.redact(&unit) },
        Tell::Resumed { done, total, unit } => Tell::Resumed { done, total, unit: secrets.redact(&unit) },
        Tell::Paid(paid) => Tell::Paid(paid),
        Tell::Warning { message } => Tell::Warning { message: secrets.redact(&message) },
    }
}

fn clean_last(last: Last, secrets: &Secrets) -> Last {
    match last {
        Last::Done { .. } => last,
        Last::Failed { error } => {
            let (message, help) = (secrets.redact(&error.message), error.help.map(|help| secrets.redact(&help)));
            Last::Failed { error: Error { message, help, ..error } }
        }
    }
}

/// Copies an attempt's standard error to its log, with secrets redacted; the receiver is notified at the end of the
/// stream.
fn relay_log(mut stderr: ChildStderr, log: File, secrets: Secrets) -> Receiver<()> {
    let (done, wait) = channel();
    std::thread::spawn(move || {
        let mut log = Log::new(log, LOG_HALF);
        let mut stream = Stream::new(&secrets);
        let mut buffer = [0; 8192];
        while let Ok(n @ 1..) = stderr.read(&mut buffer) {
            log.write(&stream.pass(&buffer[..n]));
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
struct Log {
    file: File,
    /// Number of bytes left to write for the first part.
    room: usize,
    half: usize,
    end: VecDeque<u8>,
    left_out: u64,
}

impl Log {
    fn new(file: File, half: usize) -> Self {
        Self { file, room: half, half, end: VecDeque::new(), left_out: 0 }
    }

    /// Ignores errors: a log that cannot be written (full disk) is no reason to fail.
    fn write(&mut self, bytes: &[u8]) {
        let (first, rest) = bytes.split_at(bytes.len().min(self.room));
        let _ = self.file.write_all(first);
        self.room -= first.len();
        self.end.extend(rest);
        let over = self.end.len().saturating_sub(self.half);
        self.end.drain(..over);
        self.left_out += over as u64;
    }

    fn end(mut self) {
        if self.left_out > 0 {
            let _ = write!(self.file, "\n[{} bytes of this log were left out]\n", self.left_out);
        }
        let (a, b) = self.end.as_slices();
        let _ = self.file.write_all(a).and_then(|()| self.file.write_all(b));
    }
}

/// The error of an attempt that ended without a last line, guessed from its exit status and log.
pub(super) fn silent_death(status: ExitStatus, log: &Path) -> Error {
    const SMALLER: &str = "run fewer at a time (-j 1) or make the stage smaller";
    if status.signal() == Some(6)
        // The message of Rust's allocator before it aborts.
        && let Some(line) = tail(log, 3).into_iter().find(|line| line.starts_with("memory allocation of "))
    {
        return Error::surroundings(format!("out of memory: {line}")).help(SMALLER);
    }
    match (status.signal(), status.code()) {
        (Some(9), _) => Error::surroundings("the attempt was killed (signal 9)")
            .help(format!("if nobody killed it, the machine ran out of memory: {SMALLER}")),
        (Some(signal @ (1 | 2 | 15)), _) => Error::surroundings(format!("the attempt was ended by signal {signal}")),
        (Some(signal), _) => Error::ours(format!("the attempt crashed (signal {signal})")),
        // The attempt could not begin; its log has the reason.
        (None, Some(3)) => {
            let why = tail(log, 1).pop().unwrap_or_else(|| "its log is empty".to_owned());
            Error::surroundings(format!("the attempt could not start: {why}"))
        }
        (None, code) => Error::ours(format!("the attempt ended without a result (exit code {})", code.unwrap_or(-1))),
    }
}

/// The last `n` lines of a log.
pub(super) fn tail(log: &Path, n: usize) -> Vec<String> {
    const ENOUGH: u64 = 16 << 10;
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        let start = file.metadata()?.len().saturating_sub(ENOUGH);
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
    fn a_log_that_grows_too_long_keeps_its_beginning_and_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let text: String = (0..1000).map(|n| format!("{n:03}\n")).collect();
        for (half, expected) in [
            (2_000, text.clone()),
            (2_001, text.clone()),
            (8, { format!("000\n001\n\n[{} bytes of this log were left out]\n998\n999\n", 4_000 - 16) }),
        ] {
            for piece in [1, 7, 5_000] {
                let mut log = Log::new(File::create(&path).unwrap(), half);
                text.as_bytes().chunks(piece).for_each(|piece| log.write(piece));
                log.end();
                assert_eq!(std::fs::read_to_string(&path).unwrap(), expected, "half {half}, pieces of {piece}");
            }
        }
    }

    #[test]
    fn an_attempt_that_ran_out_of_memory_is_no_bug_of_ours() {
        const ABORT: i32 = 6;
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        std::fs::write(&log, "at work\nmemory allocation of 1600 bytes failed\n").unwrap();
        let out_of_memory = silent_death(ExitStatus::from_raw(ABORT), &log);
        assert_eq!(out_of_memory.blame, Blame::Surroundings);
        assert!(out_of_memory.message.contains("memory allocation of 1600 bytes"), "{out_of_memory}");
        std::fs::write(&log, "at work\n").unwrap();
        assert_eq!(silent_death(ExitStatus::from_raw(ABORT), &log).blame, Blame::Ours);
    }
}
