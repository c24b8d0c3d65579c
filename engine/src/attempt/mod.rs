//! One attempt: the child process that runs a kind once and commits its output.

mod job;
mod life;

use std::any::Any;
use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

pub use job::{Job, Last};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::kind::Registry;
use crate::names::Digest;
use crate::store::Store;

/// Stack of the thread that runs the kind, in bytes of virtual memory: candle's backward pass is recursive. Pages are
/// allocated only when touched.
const STACK: usize = 256 << 20;

/// Runs the job in the file `job`. Writes its events as JSON lines to standard output; everything that the kind itself
/// prints goes to standard error. Does not return before the kind has ended; dies with the orchestrator.
pub fn main(job: &Path, registry: &Registry) -> ExitCode {
    let voice = match life::begin() {
        Ok(stdout) => Voice(Arc::new(Mutex::new(stdout))),
        Err(e) => {
            eprintln!("{e}");
            return ExitCode::from(e.exit_code());
        }
    };
    let last = match perform(job, registry, &voice) {
        Ok(digest) => Last::Done { digest, peak_bytes: life::peak_bytes() },
        Err(error) => Last::Failed { error },
    };
    voice.say(&last);
    match last {
        Last::Done { .. } => ExitCode::SUCCESS,
        Last::Failed { error } => ExitCode::from(error.exit_code()),
    }
}

/// Runs the kind of `job` on a large stack and commits its output; panics become internal errors.
fn perform(job: &Path, registry: &Registry, voice: &Voice) -> Result<Digest> {
    let job = Job::read(job)?;
    let run = || {
        let caught = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run_kind(&job, registry, voice)));
        caught.unwrap_or_else(|panic| Err(Error::ours(format!("panicked: {}", panic_message(&*panic)))))
    };
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(job.kind.clone()).stack_size(STACK).spawn_scoped(scope, run);
        let thread = thread.map_err(|e| Error::surroundings(format!("cannot start a thread: {e}")))?;
        thread.join().unwrap_or_else(|panic| Err(Error::ours(format!("panicked: {}", panic_message(&*panic)))))
    })
}

fn run_kind(job: &Job, registry: &Registry, voice: &Voice) -> Result<Digest> {
    let unknown = |what: &str, name: &str| Error::ours(format!("this binary knows no {what} `{name}`"));
    let kind = registry.get_kind(&job.kind).ok_or_else(|| unknown("kind", &job.kind))?;
    let output = registry.get_type(&job.output).ok_or_else(|| unknown("artifact type", &job.output))?;
    if kind.version() != job.version {
        let message = format!("{} has version {} here, but {} was planned", job.kind, kind.version(), job.version);
        return Err(Error::ours(message).help("the binary was replaced while it ran: run again"));
    }
    let mut ctx = Context::new(kind.name(), job.seed, job.inputs.clone(), job.out.clone(), job.checkpoints.clone())
        .with_threads(job.threads)
        .with_requests(job.requests.clone())
        .with_pay(job.may_pay)
        .with_pay_again(job.may_pay_again)
        .with_cadence(job.cadence)
        .with_sink({
            let voice = voice.clone();
            move |tell| voice.say(&tell)
        });
    let ran = kind.run(&job.params, &mut ctx);
    // No process that the kind started may write to the committed files.
    life::kill_descendants();
    ran?;
    ctx.write_metrics()?;
    drop(ctx);
    let (digest, _) = Store::open(&job.store)?.commit(&job.out, output)?;
    Ok(digest)
}

/// Writes events to the orchestrator, one JSON line each.
#[derive(Clone)]
struct Voice(Arc<Mutex<File>>);

impl Voice {
    fn say(&self, what: &impl Serialize) {
        let Ok(mut line) = serde_json::to_vec(what) else { return };
        line.push(b'\n');
        // A failed write means that the orchestrator is gone and this process is about to end.
        let _ = self.0.lock().unwrap_or_else(PoisonError::into_inner).write_all(&line);
    }
}

/// The message of a panic.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}
