//! The attempt's process seen from the orchestrator: start it, hear it, end it. Knows no graph and no record.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::fd::BorrowedFd;
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

/// What every attempt sees of the environment, besides what its kind declares.
const ALWAYS: [&str; 4] = ["PATH", "HOME", "LANG", "TMPDIR"];
/// How many threads libraries start of their own accord.
const THREADS: [&str; 4] = ["RAYON_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"];

/// Spawning lends the child a descriptor that others must not inherit, so it takes turns within this process.
static SPAWNING: Mutex<()> = Mutex::new(());

/// How to start one attempt.
pub(super) struct Launch<'a> {
    pub command: &'a Path,
    pub job: &'a Path,
    pub folder: &'a Path,
    pub log: &'a Path,
    pub threads: usize,
    /// Names of further environment variables that the attempt may see.
    pub env: &'a [String],
    /// Variables that this program sets for its own attempts.
    pub set_env: &'a [(String, String)],
    pub secrets: &'a Secrets,
    /// The key's lock: inherited, so that the key stays locked while the attempt or a program that it started lives.
    pub lock: BorrowedFd<'a>,
}

/// How an attempt ended.
#[derive(Debug)]
pub(super) enum Ending {
    Said(Last),
    /// It ended without a last line.
    Silent(ExitStatus),
    /// It was killed through its leash, or never started because of it.
    Killed,
}

/// What another thread holds to end an attempt.
#[derive(Clone, Default)]
pub(super) struct Leash(Arc<Mutex<Held>>);

#[derive(Default)]
struct Held {
    /// While the process exists, be it as a zombie, so that the number cannot mean another one.
    pid: Option<Pid>,
    /// The pipe whose end tells the attempt's guard to kill everything.
    lifeline: Option<ChildStdin>,
    killed: bool,
}

/// What the guard of an attempt has to kill what is below it; then its group is killed from here.
const GRACE: Duration = Duration::from_secs(2);

impl Leash {
    /// Kills the attempt and every process below it; one that has not started never will.
    pub fn kill(&self) {
        let mut held = self.held();
        held.killed = true;
        held.lifeline = None;
        // A guard that was stopped does not hear it.
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

    /// Lays a zombie to rest, and what is left of its group, whose number nobody else can have while the zombie is there.
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
            // The group may be gone already; nothing else can go wrong with a child of ours.
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

/// Runs an attempt to its end on this thread, which the attempt does not outlive. What it tells is passed on, redacted.
///
/// # Errors
/// When it cannot be started or waited for.
pub(super) fn run(launch: &Launch, leash: &Leash, mut on_tell: impl FnMut(Tell)) -> Result<Ending> {
    let log = OpenOptions::new().create(true).append(true).open(launch.log).at(launch.log)?;
    let Some(mut child) = spawn(launch, leash, &log)? else { return Ok(Ending::Killed) };
    let logged = child.stderr.take().map(|stderr| relay_log(stderr, log, launch.secrets.clone()));
    let stdout = child.stdout.take().map(BufReader::new);
    let last = stdout.and_then(|stdout| listen(stdout, launch.secrets, &mut on_tell));
    if last.is_some() {
        // It has said its last word and has nothing left to do, and what it started has no one to work for.
        leash.held().lifeline = None;
        if !ends_within(&child, GRACE) {
            leash.held().kill_group();
        }
    }
    let (pid, options) = (Pid::from_child(&child), WaitIdOptions::EXITED | WaitIdOptions::NOWAIT);
    while matches!(waitid(WaitId::Pid(pid), options), Err(rustix::io::Errno::INTR)) {}
    let status = leash.reap(&mut child)?;
    if let Some(logged) = logged {
        // A program that left the group may hold the pipe open for ever.
        let _ = logged.recv_timeout(Duration::from_secs(1));
    }
    Ok(match last {
        Some(last @ Last::Done { .. }) => Ending::Said(last),
        _ if leash.was_killed() => Ending::Killed,
        Some(last) => Ending::Said(last),
        None => Ending::Silent(status),
    })
}

/// Waits for a child's end, but not for ever.
fn ends_within(child: &Child, limit: Duration) -> bool {
    let Ok(end) = pidfd_open(Pid::from_child(child), PidfdFlags::empty()) else { return false };
    let limit = Timespec::try_from(limit).ok();
    matches!(poll(&mut [PollFd::new(&end, PollFlags::IN)], limit.as_ref()), Ok(1..))
}

fn spawn(launch: &Launch, leash: &Leash, log: &File) -> Result<Option<Child>> {
    let stderr = if launch.secrets.is_empty() { log.try_clone().at(launch.log)?.into() } else { Stdio::piped() };
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
        .stderr(stderr);
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

/// Hears an attempt until its last word, or until its standard output ends.
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
            // Cut short by its death; or a descriptor that someone wrote to behind our back.
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

/// Copies an attempt's standard error to its log without its secrets; the receiver wakes when it ends.
fn relay_log(mut stderr: ChildStderr, mut log: File, secrets: Secrets) -> Receiver<()> {
    let (done, wait) = channel();
    std::thread::spawn(move || {
        let mut stream = Stream::new(&secrets);
        let mut buffer = [0; 8192];
        while let Ok(n @ 1..) = stderr.read(&mut buffer) {
            let _ = log.write_all(&stream.pass(&buffer[..n]));
        }
        let _ = log.write_all(&stream.end());
        let _ = done.send(());
    });
    wait
}

/// The error of an attempt that ended without a word but what its log holds.
pub(super) fn silent_death(status: ExitStatus, log: &Path) -> Error {
    const SMALLER: &str = "run fewer at a time (-j 1) or make the stage smaller";
    if status.signal() == Some(6)
        // What Rust's allocator says before it gives up.
        && let Some(line) = tail(log, 3).into_iter().find(|line| line.starts_with("memory allocation of "))
    {
        return Error::surroundings(format!("out of memory: {line}")).help(SMALLER);
    }
    match (status.signal(), status.code()) {
        (Some(9), _) => Error::surroundings("the attempt was killed (signal 9)")
            .help(format!("if nobody killed it, the machine ran out of memory: {SMALLER}")),
        (Some(signal @ (1 | 2 | 15)), _) => Error::surroundings(format!("the attempt was ended by signal {signal}")),
        (Some(signal), _) => Error::ours(format!("the attempt crashed (signal {signal})")),
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
