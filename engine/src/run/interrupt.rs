//! Ctrl-C, SIGTERM and SIGHUP (a closed terminal): the first signal stops the runs of this process in an orderly way,
//! the second ends it at once. Only Ctrl-C also cancels the jobs of batch systems: whoever closes a terminal, or ends the
//! job that this process is part of, did not ask for that.

use std::os::unix::net::UnixStream;
use std::sync::{Mutex, Once, PoisonError};

use tokio::signal::unix::{SignalKind, signal};

/// How a run is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interruption {
    /// Ctrl-C: everything that the run started ends.
    Cancel,
    /// The orchestrator ends, and with it its child processes. Jobs of batch systems go on.
    Leave,
}

struct Hook {
    id: u64,
    call: Box<dyn Fn(Interruption) + Send>,
    called: bool,
}

static HOOKS: Mutex<Vec<Hook>> = Mutex::new(Vec::new());
static LISTENER: Once = Once::new();

/// The exit code of an interrupted command.
pub const EXIT_CODE: u8 = 130;

/// The first signal calls the guard's hook while the guard lives.
pub struct HookGuard(u64);

impl Drop for HookGuard {
    fn drop(&mut self) {
        HOOKS.lock().unwrap_or_else(PoisonError::into_inner).retain(|hook| hook.id != self.0);
    }
}

/// Calls `hook` at the first signal. Handlers cannot be removed, so a process that once listened keeps listening:
/// without a living guard, a signal ends it at once, like the default action.
pub fn on_signal(hook: impl Fn(Interruption) + Send + 'static) -> HookGuard {
    static NEXT_ID: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    LISTENER.call_once(|| {
        let (ready, started) = std::sync::mpsc::channel();
        // Without the thread, signals keep their default action: the process ends, and its attempts with it.
        let _ = std::thread::Builder::new().name("signals".into()).spawn(move || listen(&ready));
        let _ = started.recv();
    });
    let id = NEXT_ID.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    HOOKS.lock().unwrap_or_else(PoisonError::into_inner).push(Hook { id, call: Box::new(hook), called: false });
    HookGuard(id)
}

fn listen(ready: &std::sync::mpsc::Sender<()>) {
    // tokio panics if it cannot get the four descriptors that listening needs, so check that they are available.
    if [UnixStream::pair(), UnixStream::pair()].iter().any(Result::is_err) {
        return;
    }
    let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_io().build() else { return };
    runtime.block_on(async {
        let (Ok(mut interrupt), Ok(mut terminate)) = (signal(SignalKind::interrupt()), signal(SignalKind::terminate()))
        else {
            return;
        };
        // Under `nohup` a run continues when its terminal is closed.
        let mut hangup = if ignores_hangup() { None } else { signal(SignalKind::hangup()).ok() };
        let _ = ready.send(());
        loop {
            let interruption = tokio::select! {
                _ = interrupt.recv() => Interruption::Cancel,
                _ = terminate.recv() => Interruption::Leave,
                Some(_) = async { hangup.as_mut()?.recv().await } => Interruption::Leave,
            };
            let mut hooks = HOOKS.lock().unwrap_or_else(PoisonError::into_inner);
            if hooks.iter().all(|hook| hook.called) {
                std::process::exit(i32::from(EXIT_CODE));
            }
            for hook in hooks.iter_mut() {
                (hook.call)(interruption);
                hook.called = true;
            }
        }
    });
}

/// Whether the parent process started this one with SIGHUP ignored.
fn ignores_hangup() -> bool {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| u64::from_str_radix(line.strip_prefix("SigIgn:")?.trim(), 16).ok());
    ignored.is_some_and(|mask| mask & 1 << (libc::SIGHUP - 1) != 0)
}
