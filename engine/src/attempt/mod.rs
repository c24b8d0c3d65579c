//! One attempt: the child process that runs a kind once and commits its output.

mod guard;
mod job;

use std::any::Any;
use std::fs::File;
use std::io::{PipeReader, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

pub(crate) use guard::ThreadCount;
pub use job::{FinalMessage, Job};

use crate::context::Context;
use crate::error::{Error, Result};
use crate::kind::Registry;
use crate::names::Digest;
use crate::store::Store;

/// Stack of the thread that runs the kind, in bytes of virtual memory: candle's backward pass is recursive. Pages are
/// allocated only when touched.
const STACK_BYTES: usize = 256 << 20;

/// Runs the job in the file `job`. Writes its events as JSON lines to standard output; everything that the kind itself
/// prints goes to standard error. Does not return before the kind has ended; dies with the orchestrator.
pub fn main(job: &Path, registry: &Registry) -> ExitCode {
    let (events, thread_counts) = match guard::install() {
        Ok(streams) => (EventWriter(Arc::new(Mutex::new(streams.stdout))), streams.thread_counts),
        Err(e) => {
            eprintln!("{e}");
            return ExitCode::from(e.exit_code());
        }
    };
    let message = match run_job(job, registry, &events, thread_counts) {
        Ok(digest) => FinalMessage::Done { digest, peak_bytes: guard::peak_bytes() },
        Err(error) => FinalMessage::Failed { error },
    };
    events.write(&message);
    match message {
        FinalMessage::Done { .. } => ExitCode::SUCCESS,
        FinalMessage::Failed { error } => ExitCode::from(error.exit_code()),
    }
}

/// Runs the kind of `job` on a large stack and commits its output; panics become internal errors.
fn run_job(job: &Path, registry: &Registry, events: &EventWriter, thread_counts: Option<PipeReader>) -> Result<Digest> {
    let job = Job::read(job)?;
    let threads = Arc::new(AtomicUsize::new(job.threads.max(1)));
    if let Some(thread_counts) = thread_counts {
        let threads = threads.clone();
        std::thread::Builder::new()
            .name("threads".into())
            .spawn(move || follow(thread_counts, &threads))
            .map_err(|e| Error::environment(format!("cannot start a thread: {e}")))?;
    }
    let run = || {
        let caught =
            std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| run_kind(&job, registry, events, threads)));
        caught.unwrap_or_else(|panic| Err(Error::internal(format!("panicked: {}", panic_message(&*panic)))))
    };
    std::thread::scope(|scope| {
        let thread =
            std::thread::Builder::new().name(job.kind.clone()).stack_size(STACK_BYTES).spawn_scoped(scope, run);
        let thread = thread.map_err(|e| Error::environment(format!("cannot start a thread: {e}")))?;
        thread.join().unwrap_or_else(|panic| Err(Error::internal(format!("panicked: {}", panic_message(&*panic)))))
    })
}

/// Keeps `threads` at the last number of threads that the orchestrator has written, until it is gone.
fn follow(mut thread_counts: PipeReader, threads: &AtomicUsize) {
    let mut count = ThreadCount::default();
    while thread_counts.read_exact(&mut count).is_ok() {
        threads.store(u16::from_le_bytes(count).max(1).into(), Ordering::Relaxed);
    }
}

fn run_kind(job: &Job, registry: &Registry, events: &EventWriter, threads: Arc<AtomicUsize>) -> Result<Digest> {
    let unknown = |what: &str, name: &str| Error::internal(format!("this binary has no {what} `{name}`"));
    let kind = registry.get_kind(&job.kind).ok_or_else(|| unknown("kind", &job.kind))?;
    let output = registry.get_type(&job.output).ok_or_else(|| unknown("artifact type", &job.output))?;
    if kind.version() != job.version {
        let message = format!(
            "this binary has version {1} of {0}, but version {2} was planned",
            job.kind,
            kind.version(),
            job.version
        );
        return Err(Error::internal(message).help("the binary was replaced during the run: run again"));
    }
    let mut ctx = Context::new(kind.name(), job.seed, job.inputs.clone(), job.out.clone(), job.checkpoints.clone())
        .with_threads(threads)
        .with_requests(job.requests.clone())
        .with_pay(job.may_pay)
        .with_pay_again(job.may_pay_again)
        .with_cadence(job.cadence)
        .with_device(&job.device)
        .with_sink({
            let events = events.clone();
            move |event| events.write(&event)
        });
    let ran = kind.run(&job.params, &mut ctx);
    // No process that the kind started may write to the committed files.
    guard::kill_descendants();
    ran?;
    ctx.write_metrics()?;
    drop(ctx);
    let (digest, _) = Store::open(&job.store)?.commit(&job.out, output)?;
    Ok(digest)
}

/// Writes events to the orchestrator, one JSON line each.
#[derive(Clone)]
struct EventWriter(Arc<Mutex<File>>);

impl EventWriter {
    fn write(&self, what: &impl Serialize) {
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
