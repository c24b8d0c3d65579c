//! Ties the life of an attempt, and of every process below it, to the orchestrator's life, passes on the orchestrator's
//! instructions (another number of threads, or to stop), and separates the attempt's standard streams from the kind's.
//!
//! ```text
//! orchestrator ──pipe──> guard ──fork──> attempt ──> programs of the kind, and theirs
//! ```
//!
//! The guard only waits: for the attempt to end, for an instruction, which it passes on, or for the pipe to close, which
//! the kernel does however the orchestrator dies. Then it kills every process below it. As their subreaper it
//! becomes the parent of orphans, so it also finds processes that left the group and the session.

use std::collections::HashMap;
use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, WaitStatus, getpid, getppid, kill_process, pidfd_open, set_child_subreaper,
    set_parent_process_death_signal, wait,
};

use crate::error::{AtPath, Error, Result};

/// Signals that the guard ignores, so that it ends only after it has killed every process below it.
const IGNORED_SIGNALS: [i32; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

/// A number of threads as the orchestrator writes it: an unsigned little-endian integer.
pub(crate) type ThreadCount = [u8; 2];

/// In place of a number of threads: the attempt is to write a checkpoint and end.
pub(crate) const STOP: ThreadCount = [0; 2];

/// An attempt's connections to the orchestrator.
pub(super) struct Streams {
    /// The real standard output.
    pub stdout: File,
    /// A [`ThreadCount`] each time the number of threads changes, or [`STOP`]. `None` without an orchestrator.
    pub thread_counts: Option<PipeReader>,
}

/// Puts a guard between the orchestrator and the rest of this program, which continues in a child process. Then gives
/// the kind an empty standard input, and redirects its standard output to standard error. A job run by hand (standard
/// input is not a pipe) has no orchestrator and gets no guard.
///
/// Call it before any thread is started.
///
/// # Errors
/// When the streams cannot be duplicated, the process has more than one thread, or a system call such as fork fails.
pub(super) fn install() -> Result<Streams> {
    let failed = |what: &str, e: rustix::io::Errno| Error::environment(format!("{what}: {e}"));
    let stdin = std::io::stdin().lock();
    let liveness_pipe =
        rustix::io::fcntl_dupfd_cloexec(&stdin, 3).map(File::from).map_err(|e| failed("standard input", e))?;
    let stdout = rustix::io::fcntl_dupfd_cloexec(std::io::stdout(), 3).map_err(|e| failed("standard output", e))?;
    let null = File::open("/dev/null").at("/dev/null")?;
    rustix::stdio::dup2_stdin(null).map_err(|e| failed("standard input", e))?;
    rustix::stdio::dup2_stdout(std::io::stderr()).map_err(|e| failed("standard output", e))?;
    drop(stdin);
    if !is_pipe(&liveness_pipe) {
        return Ok(Streams { stdout: File::from(stdout), thread_counts: None });
    }
    check_single_threaded()?;
    let become_subreaper = || set_child_subreaper(Some(getpid())).map_err(|e| failed("adopting orphans", e));
    become_subreaper()?;
    let (thread_counts, relay) = std::io::pipe().at("a pipe")?;
    // The guard must not wait for an attempt that does not read.
    rustix::io::ioctl_fionbio(&relay, true).map_err(|e| failed("a pipe", e))?;
    let guard = getpid();
    // SAFETY: this process has a single thread, so the child is a complete copy of it.
    match unsafe { libc::fork() } {
        0 => {
            drop((liveness_pipe, relay));
            set_parent_process_death_signal(Some(Signal::KILL)).map_err(|e| failed("parent-death signal", e))?;
            // The guard may have died before the signal was set.
            if getppid() != Some(guard) {
                std::process::abort();
            }
            become_subreaper()?;
            Ok(Streams { stdout: File::from(stdout), thread_counts: Some(thread_counts) })
        }
        // -1: fork failed.
        child => match (child > 0).then(|| Pid::from_raw(child)).flatten() {
            Some(child) => {
                // Only the attempt may hold the stream, so that the orchestrator sees it close when the attempt ends.
                drop((stdout, thread_counts));
                run_guard(child, liveness_pipe, relay)
            }
            None => Err(Error::environment(format!("cannot fork: {}", std::io::Error::last_os_error()))),
        },
    }
}

/// Forking copies only one thread.
pub(super) fn check_single_threaded() -> Result<()> {
    match std::fs::read_dir("/proc/self/task").at("/proc/self/task")?.count() {
        1 => Ok(()),
        threads => Err(Error::internal(format!("an attempt started with {threads} threads instead of one"))),
    }
}

/// Whether `file` is a pipe. It is not when a user runs a job by hand from a terminal, without an orchestrator.
fn is_pipe(file: &File) -> bool {
    use std::os::unix::fs::FileTypeExt;
    file.metadata().is_ok_and(|m| m.file_type().is_fifo())
}

/// Waits for the attempt or the orchestrator to end, kills the remaining processes, and exits with the attempt's
/// status.
fn run_guard(attempt: Pid, mut liveness_pipe: File, mut relay: PipeWriter) -> ! {
    // A rename, so that killing this program by name does not kill the guard before it has done its work.
    let _ = rustix::thread::set_name(c"guard");
    for signal in IGNORED_SIGNALS {
        // SAFETY: sets a disposition without a handler.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    // On a kernel without pidfds, poll for the attempt's end more often.
    let end: Option<OwnedFd> = pidfd_open(attempt, PidfdFlags::empty()).ok();
    let pause = if end.is_some() { Duration::from_secs(1) } else { Duration::from_millis(10) };
    let status = loop {
        if let Some(status) = reap(attempt) {
            break Some(status);
        }
        let mut fds = vec![PollFd::new(&liveness_pipe, PollFlags::IN)];
        fds.extend(end.as_ref().map(|end| PollFd::from_borrowed_fd(end.as_fd(), PollFlags::IN)));
        if matches!(poll(&mut fds, Timespec::try_from(pause).ok().as_ref()), Ok(1..)) && !fds[0].revents().is_empty() {
            let mut count = ThreadCount::default();
            // Fails once the orchestrator has closed the pipe.
            if liveness_pipe.read_exact(&mut count).is_err() {
                break None;
            }
            // Fails if the attempt has ended, or does not read: it then keeps its number of threads.
            let _ = relay.write_all(&count);
        }
    };
    kill_descendants();
    match status.map(|status| (status.exit_status(), status.terminating_signal())) {
        Some((Some(code), _)) => std::process::exit(code),
        Some((_, Some(signal))) => {
            // SAFETY: as above.
            unsafe {
                libc::signal(signal, libc::SIG_DFL);
                libc::raise(signal);
            }
            std::process::abort()
        }
        _ => std::process::exit(1),
    }
}

/// Reaps every child that has ended; returns the attempt's status if it is among them.
pub(super) fn reap(attempt: Pid) -> Option<WaitStatus> {
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        if pid == attempt {
            return Some(status);
        }
    }
    None
}

/// Kills every process below this one until none is alive, including those that left its group or session.
pub(super) fn kill_descendants() {
    // Bounded: no sensible program forks faster than this kills.
    for _ in 0..2_000 {
        let alive = if is_childless() { Vec::new() } else { descendants(getpid()) };
        if alive.is_empty() {
            return;
        }
        for pid in alive {
            // The process may have ended by itself.
            let _ = kill_process(pid, Signal::KILL);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whether the kernel reports no children; much cheaper than scanning all processes.
fn is_childless() -> bool {
    let Ok(mut threads) = std::fs::read_dir("/proc/self/task") else { return false };
    threads.all(|thread| {
        thread.is_ok_and(|thread| {
            std::fs::read_to_string(thread.path().join("children")).is_ok_and(|children| children.trim().is_empty())
        })
    })
}

/// All live processes below `root`.
fn descendants(root: Pid) -> Vec<Pid> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    for pid in entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()) {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The process name in parentheses may contain anything, so split at the last `)`; state and parent follow.
        let mut fields = stat.rsplit(')').next().unwrap_or_default().split_whitespace();
        if let (Some(state), Some(Ok(parent))) = (fields.next(), fields.next().map(str::parse))
            && !matches!(state, "Z" | "X")
        {
            children.entry(parent).or_default().push(pid);
        }
    }
    let mut found = Vec::new();
    let mut open = vec![root.as_raw_nonzero().get()];
    while let Some(parent) = open.pop() {
        for child in children.remove(&parent).unwrap_or_default() {
            open.push(child);
            found.extend(Pid::from_raw(child));
        }
    }
    found
}

/// Peak resident memory in bytes, of this process or of the largest program that it has started; 0 where the system does not
/// report it.
pub(super) fn peak_bytes() -> u64 {
    // SAFETY: a struct of integers, for which zeros are valid; the call writes to it and keeps no reference.
    let of_programs = unsafe {
        let mut usage: libc::rusage = std::mem::zeroed();
        if libc::getrusage(libc::RUSAGE_CHILDREN, &raw mut usage) == 0 { usage.ru_maxrss } else { 0 }
    };
    let of_programs = u64::try_from(of_programs).unwrap_or(0) * 1024;
    own_peak_bytes().max(of_programs)
}

fn own_peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
