//! Ends an attempt from another thread, or changes its number of threads.

use std::io::Write;
use std::process::{Child, ChildStdin, ExitStatus};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::process::{Pid, Signal, kill_process_group};

use super::local::GRACE_PERIOD;
use crate::attempt::ThreadCount;
use crate::error::{Error, Result};
use crate::run::interrupt::Interruption;

/// Lets another thread kill an attempt, or change its number of threads.
#[derive(Clone, Default)]
pub(in crate::run) struct KillHandle(Arc<Mutex<KillState>>);

#[derive(Default)]
pub(super) struct KillState {
    /// The child process of a local attempt. Set while it exists, even as a zombie, so that the pid cannot belong to another
    /// process.
    pub pid: Option<Pid>,
    /// The pipe whose closing makes the guard of a local attempt kill everything.
    pub liveness_pipe: Option<ChildStdin>,
    pub killed: Option<Interruption>,
    /// The last number of threads that was not yet passed on because the process did not exist.
    threads: Option<u16>,
}

impl KillHandle {
    /// Kills a local attempt and every process below it; an attempt that has not started will not start. The thread that
    /// follows a job of a batch system cancels or leaves it.
    pub fn kill(&self, interruption: Interruption) {
        let mut state = self.lock();
        state.killed = Some(interruption);
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

    /// Tells a local attempt to use `threads` threads from its next step on.
    pub fn set_threads(&self, threads: usize) {
        let mut state = self.lock();
        state.threads = Some(u16::try_from(threads).unwrap_or(u16::MAX));
        state.pass_on_threads();
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, KillState> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kills the rest of the process group and reaps the zombie. The zombie must exist until then, because it keeps the
    /// group's id from being reused.
    pub(super) fn reap(&self, child: &mut Child) -> Result<ExitStatus> {
        let mut state = self.lock();
        state.kill_group();
        state.pid = None;
        child.wait().map_err(|e| Error::environment(format!("cannot wait for an attempt: {e}")))
    }

    pub(super) fn killed(&self) -> Option<Interruption> {
        self.lock().killed
    }
}

impl KillState {
    pub fn pass_on_threads(&mut self) {
        let Some(pipe) = &mut self.liveness_pipe else { return };
        let Some(threads) = self.threads.take() else { return };
        let count: ThreadCount = threads.to_le_bytes();
        // Fails only if the attempt has ended.
        let _ = pipe.write_all(&count);
    }

    pub fn kill_group(&self) {
        if let Some(pid) = self.pid {
            // The group may be gone already; with a child of this process, nothing else can fail.
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}
