//! One attempt: the process that runs a kind once and commits its output. A child of the orchestrator, or a job of a batch
//! system.

mod confine;
pub(crate) mod detached;
mod guard;
mod job;
mod probe;

use std::any::Any;
use std::fs::File;
use std::io::{PipeReader, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use serde::Serialize;

pub use confine::can_confine;
pub(crate) use guard::{STOP, ThreadCount};
pub use job::{Detached, FinalMessage, Job};
pub use probe::answer_probe;
pub(crate) use probe::{ProbeAnswer, Question};

use self::confine::Surroundings;
use crate::context::{Context, StageEvent, StopRequest};
use crate::error::{Error, Result};
use crate::kind::Registry;
use crate::names::Digest;
use crate::run::redact::Secrets;
use crate::store::Store;

/// Stack of the thread that runs the kind, in bytes of virtual memory: candle's backward pass is recursive. Pages are
/// allocated only when touched.
const STACK_BYTES: usize = 256 << 20;

/// Runs the job in the file `job`. Writes its events as JSON lines to standard output; everything that the kind itself
/// prints goes to standard error. Does not return before the kind has ended; dies with the orchestrator.
pub fn main(job: &Path, registry: &Registry) -> ExitCode {
    let (events, thread_counts) = match guard::install() {
        Ok(streams) => (EventWriter::new(streams.stdout, Secrets::default()), streams.thread_counts),
        Err(e) => {
            eprintln!("{e}");
            return ExitCode::from(e.exit_code());
        }
    };
    let run = |job: Job| run_job(&job, registry, &events, thread_counts, &|| Ok(()));
    let message = match Job::read(job).and_then(run) {
        Ok(digest) => FinalMessage::Done { digest, peak_bytes: guard::peak_bytes() },
        Err(error) => FinalMessage::Failed { error },
    };
    events.write(&message);
    match message {
        FinalMessage::Done { .. } => ExitCode::SUCCESS,
        FinalMessage::Failed { error } => ExitCode::from(error.exit_code()),
    }
}

/// Runs the job in the file `job` as a job of a batch system: writes its events and its result to files beside it, and does
/// not depend on an orchestrator.
pub fn main_detached(job: &Path, registry: &Registry) -> ExitCode {
    detached::main(job, registry)
}

/// Runs the kind of `job` on a large stack and commits its output; panics become internal errors.
/// `thread_counts` are those that an orchestrator sends; `may_commit` is asked before the commit.
fn run_job(
    job: &Job,
    registry: &Registry,
    events: &EventWriter,
    thread_counts: Option<PipeReader>,
    may_commit: &(dyn Fn() -> Result<()> + Sync),
) -> Result<Digest> {
    let threads = Arc::new(AtomicUsize::new(job.threads.max(1)));
    let kind = registry.get_kind(&job.kind);
    let is_parallel = kind.is_some_and(|kind| kind.signature(&job.params).is_ok_and(|signature| signature.parallel));
    let stop = StopRequest::default();
    if let Some(thread_counts) = thread_counts.filter(|_| is_parallel) {
        let (threads, stop) = (threads.clone(), stop.clone());
        std::thread::Builder::new()
            .name("threads".into())
            .spawn(move || follow(thread_counts, &threads, &stop))
            .map_err(|e| Error::environment(format!("cannot start a thread: {e}")))?;
    }
    let output = registry.get_type(&job.output).ok_or_else(|| unknown("artifact type", &job.output))?;
    on_large_stack(&job.kind, || run_kind(job, registry, events, threads, stop))?;
    // On a thread that is not confined: it writes to the store.
    on_large_stack("commit", || {
        may_commit()?;
        let (digest, _) = Store::open(&job.store)?.commit(&job.out, output)?;
        Ok(digest)
    })
}

/// Runs `work` on a thread of its own; a panic becomes an internal error.
fn on_large_stack<T: Send>(name: &str, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let panicked = |panic: Box<dyn Any + Send>| Error::internal(format!("panicked: {}", panic_message(&*panic)));
    let caught =
        || std::panic::catch_unwind(std::panic::AssertUnwindSafe(work)).unwrap_or_else(|panic| Err(panicked(panic)));
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name(name.to_owned()).stack_size(STACK_BYTES);
        let thread = thread.spawn_scoped(scope, caught);
        let thread = thread.map_err(|e| Error::environment(format!("cannot start a thread: {e}")))?;
        thread.join().unwrap_or_else(|panic| Err(panicked(panic)))
    })
}

/// Keeps `threads` at the last number of threads that the orchestrator has written, until it is gone. When it asks the
/// attempt to end, an attempt that writes checkpoints ends after the next one, any other at once.
fn follow(mut thread_counts: PipeReader, threads: &AtomicUsize, stop: &StopRequest) {
    let mut count = ThreadCount::default();
    while thread_counts.read_exact(&mut count).is_ok() {
        if count == STOP {
            if !stop.request() {
                std::process::exit(i32::from(crate::run::INTERRUPTED));
            }
            continue;
        }
        threads.store(u16::from_le_bytes(count).max(1).into(), Ordering::Relaxed);
    }
}

fn unknown(what: &str, name: &str) -> Error {
    Error::internal(format!("this binary has no {what} `{name}`"))
}

/// Runs the kind on this thread, which is confined for good.
fn run_kind(
    job: &Job,
    registry: &Registry,
    events: &EventWriter,
    threads: Arc<AtomicUsize>,
    stop: StopRequest,
) -> Result<()> {
    let kind = registry.get_kind(&job.kind).ok_or_else(|| unknown("kind", &job.kind))?;
    if kind.version() != job.version {
        let message = format!(
            "this binary has version {1} of {0}, but version {2} was planned",
            job.kind,
            kind.version(),
            job.version
        );
        return Err(Error::internal(message).help("the binary was replaced during the run: run again"));
    }
    let mut is_confined = false;
    if job.confine {
        let surroundings = Surroundings::here(&kind.signature(&job.params)?.env);
        let access = confine::access(job, kind.access(&job.params)?, &surroundings)?;
        is_confined = confine::confine_thread(&access);
    }
    let mut ctx = Context::new(kind.name(), job.seed, job.inputs.clone(), job.out.clone(), job.checkpoints.clone())
        .with_threads(threads)
        .with_stop(stop)
        .with_requests(job.requests.clone())
        .with_pay(job.may_pay)
        .with_pay_again(job.may_pay_again)
        .with_cadence(job.cadence)
        .with_device(&job.device)
        .with_sink({
            let events = events.clone();
            move |event| events.write_event(event)
        });
    let ran = kind.run(&job.params, &mut ctx);
    // No process that the kind started may write to the committed files.
    guard::kill_descendants();
    ran.map_err(|error| if is_confined { explain_denial(error) } else { error })?;
    ctx.write_metrics()
}

/// Says why a file could not be opened that this user may open.
fn explain_denial(error: Error) -> Error {
    match error.help.is_none() && error.message.contains("Permission denied") {
        true => error.help("an attempt reads its inputs and changes its own folders only: see docs/pipeline.md"),
        false => error,
    }
}

/// Writes events for the orchestrator, one JSON line each.
#[derive(Clone)]
struct EventWriter {
    file: Arc<Mutex<File>>,
    /// Removed from events; none if the orchestrator reads a pipe, since it removes them itself.
    secrets: Secrets,
}

impl EventWriter {
    fn new(file: File, secrets: Secrets) -> Self {
        Self { file: Arc::new(Mutex::new(file)), secrets }
    }

    fn write_event(&self, event: StageEvent) {
        self.write(&self.secrets.redact_event(event));
    }

    fn write(&self, what: &impl Serialize) {
        let Ok(mut line) = serde_json::to_vec(what) else { return };
        line.push(b'\n');
        // A failed write means that the orchestrator is gone and this process is about to end.
        let _ = self.file.lock().unwrap_or_else(PoisonError::into_inner).write_all(&line);
    }

    /// Lets other machines see the events.
    fn sync(&self) {
        let _ = self.file.lock().unwrap_or_else(PoisonError::into_inner).sync_data();
    }
}

/// The message of a panic.
pub(crate) fn panic_message(panic: &(dyn Any + Send)) -> String {
    let text = panic.downcast_ref::<&str>().map(|s| (*s).to_owned());
    text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_else(|| "no message".to_owned())
}
