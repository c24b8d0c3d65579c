//! What a batch system must be able to do, and how its commands are run.

use std::collections::BTreeMap;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitStatus, Stdio};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use crate::document::Resources;
use crate::error::{Error, Result};
use crate::run::executor::local::SPAWN_LOCK;

/// A job to submit.
pub(super) struct Submission<'a> {
    pub name: &'a str,
    pub script: &'a Path,
    pub log: &'a Path,
    pub folder: &'a Path,
    /// Names of environment variables that the job gets; their values are in this process's environment.
    pub env: &'a [String],
    pub resources: &'a Resources,
}

/// A live or finished job as its batch system describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct JobReport {
    pub state: JobState,
    /// Maximum wall time.
    pub limit: Option<Duration>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum JobState {
    /// Waits, runs, or waits to run again. `held`: why it will not run by itself.
    Live {
        held: Option<String>,
    },
    Ended(JobEnd),
}

/// How a job ended, as far as its batch system says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum JobEnd {
    Finished,
    TimeLimit,
    NodeFailed,
    Preempted,
    OutOfMemory,
    Cancelled,
}

pub(super) trait BatchSystem: Send + Sync {
    /// The programs that must be on the PATH.
    fn programs(&self) -> Vec<String>;

    /// Submits a job and returns its id.
    ///
    /// # Errors
    /// When it is rejected. Transient if the batch system could not be reached.
    fn submit(&self, submission: &Submission<'_>) -> Result<String>;

    /// The reports of jobs; those that the batch system does not know any more are missing.
    ///
    /// # Errors
    /// When the batch system cannot be asked.
    fn reports(&self, jobs: &[String]) -> Result<BTreeMap<String, JobReport>>;

    /// Ends a job; succeeds if it has ended already.
    ///
    /// # Errors
    /// When the batch system does not accept it.
    fn cancel(&self, job: &str) -> Result<()>;
}

/// What a command of a batch system printed, and how it ended.
pub(super) struct CommandOutput {
    pub status: ExitStatus,
    pub stdout: String,
    pub stderr: String,
}

impl CommandOutput {
    /// The first line of standard error, for messages.
    pub fn complaint(&self) -> String {
        let line = self.stderr.lines().chain(self.stdout.lines()).map(str::trim).find(|line| !line.is_empty());
        match (line, self.status.code(), self.status.signal()) {
            (Some(line), ..) => line.to_owned(),
            (None, Some(code), _) => format!("exit code {code}"),
            (None, None, signal) => format!("ended by signal {}", signal.unwrap_or(0)),
        }
    }
}

/// Longest time that a command of a batch system may take.
const COMMAND_LIMIT: Duration = Duration::from_secs(60);

/// Runs a command of a batch system in a process group of its own, so that Ctrl-C does not reach it.
///
/// # Errors
/// When it cannot be started, or takes more than a minute.
pub(super) fn run_command(command: &mut Command) -> Result<CommandOutput> {
    let name = command.get_program().to_string_lossy().into_owned();
    command.process_group(0).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let spawned = {
        let _spawning = SPAWN_LOCK.lock().unwrap_or_else(PoisonError::into_inner);
        command.spawn()
    };
    let mut child = spawned.map_err(|e| Error::environment(format!("cannot start `{name}`: {e}")))?;
    let read = |stream: Option<Box<dyn Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            let _ = stream.map(|mut stream| stream.read_to_end(&mut bytes));
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let stdout = read(child.stdout.take().map(|stream| Box::new(stream) as _));
    let stderr = read(child.stderr.take().map(|stream| Box::new(stream) as _));
    let clock = Instant::now();
    let mut pause = Duration::from_millis(1);
    let status = loop {
        match child.try_wait().map_err(|e| Error::environment(format!("cannot wait for `{name}`: {e}")))? {
            Some(status) => break status,
            None if clock.elapsed() > COMMAND_LIMIT => {
                let _ = child.kill();
                let _ = child.wait();
                let limit = COMMAND_LIMIT.as_secs();
                return Err(Error::environment(format!("`{name}` did not answer within {limit} seconds")).transient());
            }
            None => std::thread::sleep(pause),
        }
        pause = (pause * 2).min(Duration::from_millis(50));
    };
    // A reader that panics has read nothing.
    Ok(CommandOutput { status, stdout: stdout.join().unwrap_or_default(), stderr: stderr.join().unwrap_or_default() })
}

/// Where the shell would find a program.
pub(super) fn find_program(name: &str) -> Option<PathBuf> {
    if name.contains('/') {
        return Some(PathBuf::from(name)).filter(|path| path.is_file());
    }
    let is_program = |path: &PathBuf| path.is_file() && rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok();
    std::env::split_paths(&std::env::var_os("PATH")?).map(|folder| folder.join(name)).find(is_program)
}

/// A text as one word of a shell command.
pub(super) fn quoted(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-./:,=+@%".contains(&b);
    if !text.is_empty() && text.bytes().all(plain) {
        return text.to_owned();
    }
    format!("'{}'", text.replace('\'', r"'\''"))
}
