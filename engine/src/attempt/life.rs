//! Ties an attempt's life to its orchestrator and keeps its standard streams apart from those of the kind. Knows no job.

use std::fs::File;
use std::io::Read;

use rustix::process::{Signal, getppid, kill_current_process_group, set_parent_process_death_signal};

use crate::error::{At, Error, Result};

/// Makes this process die with its orchestrator, by two ways, since each has a hole: the parent-death signal, which the
/// kernel sends when the thread that spawned us ends, and the end of the pipe that is our standard input, which also takes our
/// children with us. Then gives the kind an empty standard input, and standard error in the place of standard output.
/// Returns the real standard output.
///
/// # Errors
/// When the streams are not what an orchestrator gives.
pub(super) fn begin() -> Result<File> {
    let parent = getppid();
    let failed = |what: &str, e: rustix::io::Errno| Error::surroundings(format!("{what}: {e}"));
    let stdin = std::io::stdin().lock();
    let mut pipe =
        rustix::io::fcntl_dupfd_cloexec(&stdin, 3).map(File::from).map_err(|e| failed("standard input", e))?;
    let stdout = rustix::io::fcntl_dupfd_cloexec(std::io::stdout(), 3).map_err(|e| failed("standard output", e))?;
    let null = File::open("/dev/null").at("/dev/null")?;
    rustix::stdio::dup2_stdin(null).map_err(|e| failed("standard input", e))?;
    rustix::stdio::dup2_stdout(std::io::stderr()).map_err(|e| failed("standard output", e))?;
    drop(stdin);

    if is_pipe(&pipe) {
        set_parent_process_death_signal(Some(Signal::KILL)).map_err(|e| failed("parent-death signal", e))?;
        // The orchestrator may have died before the signal was set.
        if getppid() != parent {
            die();
        }
        let watcher = move || {
            let mut buffer = [0; 64];
            while !matches!(pipe.read(&mut buffer), Ok(0) | Err(_)) {}
            die();
        };
        std::thread::Builder::new()
            .name("watcher".into())
            .stack_size(64 << 10)
            .spawn(watcher)
            .map_err(|e| Error::surroundings(format!("cannot start a thread: {e}")))?;
    }
    Ok(File::from(stdout))
}

/// Someone may run a job by hand, from a terminal: then there is no orchestrator to die with.
fn is_pipe(file: &File) -> bool {
    use std::os::unix::fs::FileTypeExt;
    file.metadata().is_ok_and(|m| m.file_type().is_fifo())
}

fn die() -> ! {
    // The whole group, so that programs which the kind started end too.
    let _ = kill_current_process_group(Signal::KILL);
    std::process::abort()
}

/// The most memory that this process had resident so far; 0 where the system does not tell.
pub(super) fn peak_bytes() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}
