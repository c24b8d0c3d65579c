//! Ends an attempt from another thread, at once or at its next checkpoint, or changes its number of threads.

use std::io::Write;
use std::process::{Child, ChildStdin, ExitStatus};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};

use super::local::GRACE_PERIOD;
use crate::attempt::{STOP, ThreadCount};
use crate::error::{Error, Result};
use crate::run::interrupt::Interruption;

/// Time that an attempt has to write a checkpoint before it is killed.
pub(in crate::run) const CHECKPOINT_PERIOD: Duration = Duration::from_secs(20);

/// Lets another thread kill an attempt, stop it at its next checkpoint, or change its number of threads.
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
    /// Whether the attempt can be asked for a checkpoint.
    pub can_stop: bool,
    /// To be killed at its next checkpoint.
    stopping: Option<Interruption>,
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
        if state.pid.is_some() && !self.later(GRACE_PERIOD, |handle| handle.lock().kill_group()) {
            state.kill_group();
        }
    }

    /// Lets a local attempt write a checkpoint, then kills it; kills one that writes none, or takes too long. Returns whether
    /// the attempt has that time.
    pub fn stop(&self, interruption: Interruption) -> bool {
        let mut state = self.lock();
        if state.stopping.is_some() && state.killed.is_none() {
            return true;
        }
        if state.can_stop && state.killed.is_none() {
            state.stopping = Some(interruption);
            if let Some(pipe) = &mut state.liveness_pipe {
                // Fails only if the attempt has ended.
                let _ = pipe.write_all(&STOP);
            }
            if self.later(CHECKPOINT_PERIOD, move |handle| handle.kill(interruption)) {
                return true;
            }
        }
        drop(state);
        self.kill(interruption);
        false
    }

    /// Kills an attempt that was to be stopped: it has written a checkpoint.
    pub(super) fn checkpointed(&self) {
        let stopping = self.lock().stopping;
        if let Some(interruption) = stopping {
            self.kill(interruption);
        }
    }

    /// Calls `call` after a pause on another thread; returns whether that thread was started.
    fn later(&self, pause: Duration, call: impl FnOnce(&Self) + Send + 'static) -> bool {
        let kill_handle = self.clone();
        let later = move || {
            std::thread::sleep(pause);
            call(&kill_handle);
        };
        std::thread::Builder::new().stack_size(64 << 10).spawn(later).is_ok()
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

    /// Why it was killed, or stopped and ended on its own.
    pub(super) fn killed(&self) -> Option<Interruption> {
        let state = self.lock();
        state.killed.or(state.stopping)
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
