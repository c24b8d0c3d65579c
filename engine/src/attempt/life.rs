//! Ties an attempt, and every process below it, to the orchestrator's life, and keeps its standard streams apart from those of
//! the kind.
//!
//! ```text
//! orchestrator ──pipe──> guard ──fork──> attempt ──> programs of the kind, and theirs
//! ```
//!
//! The guard does nothing but wait: for the attempt to end, or for the pipe to close, which the kernel does however the
//! orchestrator dies. Then it kills every process below it. As their subreaper it is the parent of whatever is orphaned there, so
//! that a process that left the group and the session is found too.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitOptions, WaitStatus, getpid, getppid, kill_process, pidfd_open, set_child_subreaper,
    set_parent_process_death_signal, wait,
};

use crate::error::{At, Error, Result};

/// Signals that end a guard only after it has killed what is below it.
const IGNORED: [i32; 4] = [libc::SIGINT, libc::SIGTERM, libc::SIGHUP, libc::SIGQUIT];

/// Puts a guard between this process's orchestrator and the rest of the program, which goes on in a child; then gives the kind
/// an empty standard input, and standard error in the place of standard output. Returns the real standard output. Without an
/// orchestrator (a job run by hand, whose standard input is no pipe) there is no guard.
///
/// Call it before any thread is started.
///
/// # Errors
/// When the streams are not what an orchestrator gives, or there is no process to be had.
pub(super) fn begin() -> Result<File> {
    let failed = |what: &str, e: rustix::io::Errno| Error::surroundings(format!("{what}: {e}"));
    let stdin = std::io::stdin().lock();
    let lifeline =
        rustix::io::fcntl_dupfd_cloexec(&stdin, 3).map(File::from).map_err(|e| failed("standard input", e))?;
    let stdout = rustix::io::fcntl_dupfd_cloexec(std::io::stdout(), 3).map_err(|e| failed("standard output", e))?;
    let null = File::open("/dev/null").at("/dev/null")?;
    rustix::stdio::dup2_stdin(null).map_err(|e| failed("standard input", e))?;
    rustix::stdio::dup2_stdout(std::io::stderr()).map_err(|e| failed("standard output", e))?;
    drop(stdin);
    if !is_pipe(&lifeline) {
        return Ok(File::from(stdout));
    }
    let threads = std::fs::read_dir("/proc/self/task").at("/proc/self/task")?.count();
    if threads != 1 {
        return Err(Error::ours(format!("an attempt began with {threads} threads instead of one")));
    }
    let adopt = || set_child_subreaper(Some(getpid())).map_err(|e| failed("adopting orphans", e));
    adopt()?;
    let guard = getpid();
    // SAFETY: this process has one thread, so that its child has all of it.
    match unsafe { libc::fork() } {
        0 => {
            drop(lifeline);
            set_parent_process_death_signal(Some(Signal::KILL)).map_err(|e| failed("parent-death signal", e))?;
            // The guard may have died before the signal was set.
            if getppid() != Some(guard) {
                std::process::abort();
            }
            adopt()?;
            Ok(File::from(stdout))
        }
        // -1: there was none to be had.
        child => match (child > 0).then(|| Pid::from_raw(child)).flatten() {
            Some(child) => {
                // The attempt alone speaks to the orchestrator, which hears its end.
                drop(stdout);
                keep_guard(child, &lifeline)
            }
            None => Err(Error::surroundings(format!("cannot fork: {}", std::io::Error::last_os_error()))),
        },
    }
}

/// Someone may run a job by hand, from a terminal: then there is no orchestrator to die with.
fn is_pipe(file: &File) -> bool {
    use std::os::unix::fs::FileTypeExt;
    file.metadata().is_ok_and(|m| m.file_type().is_fifo())
}

/// Waits for the attempt or the orchestrator to end, kills what is left, and ends as the attempt did.
fn keep_guard(attempt: Pid, lifeline: &File) -> ! {
    // So that whoever kills this program by name does not kill the guard before it has done its work.
    let _ = rustix::thread::set_name(c"guard");
    for signal in IGNORED {
        // SAFETY: a disposition without a handler.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
    // Where the kernel has none, its end is looked for more often.
    let end: Option<OwnedFd> = pidfd_open(attempt, PidfdFlags::empty()).ok();
    let pause = if end.is_some() { Duration::from_secs(1) } else { Duration::from_millis(10) };
    let status = loop {
        if let Some(status) = reap(attempt) {
            break Some(status);
        }
        let mut fds = vec![PollFd::new(lifeline, PollFlags::IN)];
        fds.extend(end.as_ref().map(|end| PollFd::from_borrowed_fd(end.as_fd(), PollFlags::IN)));
        // Nothing is ever written to the lifeline: it can be read from when it has ended.
        if matches!(poll(&mut fds, Timespec::try_from(pause).ok().as_ref()), Ok(1..)) && !fds[0].revents().is_empty() {
            break None;
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

/// Lays every child that has ended to rest; gives the status of the attempt if it is among them.
fn reap(attempt: Pid) -> Option<WaitStatus> {
    while let Ok(Some((pid, status))) = wait(WaitOptions::NOHANG) {
        if pid == attempt {
            return Some(status);
        }
    }
    None
}

/// Kills every process below this one, also those that left its group or session, until none is alive.
pub(super) fn kill_descendants() {
    // A process that forks faster than this kills is nobody's program.
    for _ in 0..2_000 {
        let alive = if is_childless() { Vec::new() } else { descendants(getpid()) };
        if alive.is_empty() {
            return;
        }
        for pid in alive {
            // It may have ended by itself.
            let _ = kill_process(pid, Signal::KILL);
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// Whether the kernel says at once that there is no child: looking through all processes takes a while.
fn is_childless() -> bool {
    let Ok(mut threads) = std::fs::read_dir("/proc/self/task") else { return false };
    threads.all(|thread| {
        thread.is_ok_and(|thread| {
            std::fs::read_to_string(thread.path().join("children")).is_ok_and(|children| children.trim().is_empty())
        })
    })
}

/// The processes below `root` that are alive.
fn descendants(root: Pid) -> Vec<Pid> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    let mut children: HashMap<i32, Vec<i32>> = HashMap::new();
    for pid in entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok()) {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        // The name in parentheses may hold anything: the last one closes it. Then the state and the parent.
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

/// The most memory that this process had resident so far; 0 where the system does not tell.
pub(super) fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
