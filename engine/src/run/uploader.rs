//! Uploads results to the remote store during the run.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::run_state::RunState;
use crate::error::{Error, Result};
use crate::journal::Event;
use crate::names::Key;
use crate::remote::{PushSummary, Remote};
use crate::store::Store;

/// Minimum time between two events of progress.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// A thread that uploads records and their artifacts.
pub(super) struct Uploader {
    keys: Sender<Key>,
    events: Receiver<UploadEvent>,
    thread: JoinHandle<()>,
    /// Whether to report progress: set when the run only waits for uploads.
    show_progress: Arc<AtomicBool>,
}

/// A message of the thread.
enum UploadEvent {
    Progress { bytes: u64, total_bytes: u64 },
    Finished(Box<Result<(PushSummary, f64)>>),
}

impl Uploader {
    /// `None` if the remote cannot be written to.
    pub fn start(remote: &Arc<Remote>, store: &Store) -> Option<Self> {
        if !remote.can_write() {
            return None;
        }
        let (keys, queue) = channel();
        let (sender, events) = channel();
        let show_progress = Arc::new(AtomicBool::new(false));
        let reports_progress = Arc::clone(&show_progress);
        let (remote, root) = (Arc::clone(remote), store.root().to_owned());
        let upload = move || {
            let result =
                Store::open(&root).and_then(|store| upload_all(&remote, &store, &queue, &reports_progress, &sender));
            // Fails if the run was interrupted and no longer listens.
            let _ = sender.send(UploadEvent::Finished(Box::new(result)));
        };
        let thread = std::thread::Builder::new().name("uploads".into()).spawn(upload).ok()?;
        Some(Self { keys, events, thread, show_progress })
    }

    /// A sender of keys to upload. All its copies must be dropped before [`Uploader::finish`].
    pub fn sender(&self) -> Sender<Key> {
        self.keys.clone()
    }

    /// Waits until everything is uploaded. After an interruption it does not wait: `temper push` uploads the rest.
    pub fn finish(self, run_state: &mut RunState<'_>) {
        let Self { keys, events, thread, show_progress } = self;
        show_progress.store(true, Ordering::Relaxed);
        drop(keys);
        if run_state.interrupted {
            return;
        }
        for event in events {
            match event {
                UploadEvent::Progress { bytes, total_bytes } => {
                    run_state.emit(Event::Transfer { upload: true, bytes, total_bytes });
                }
                UploadEvent::Finished(result) => match *result {
                    Ok((PushSummary { records: 0, files: 0, .. }, _)) => {}
                    Ok((PushSummary { records, files, bytes, .. }, seconds)) => {
                        run_state.emit(Event::Transferred { upload: true, records, files, bytes, seconds });
                    }
                    Err(Error { message, .. }) => {
                        let message = format!("some results were not uploaded: {message}");
                        run_state.emit(Event::Warning { stage: None, message });
                    }
                },
            }
        }
        // A panic is reported by the hook; the results are in the local store.
        let _ = thread.join();
    }
}

/// Uploads until all senders of keys are dropped. Returns the totals and the seconds spent.
fn upload_all(
    remote: &Remote,
    store: &Store,
    keys: &Receiver<Key>,
    show_progress: &AtomicBool,
    events: &Sender<UploadEvent>,
) -> Result<(PushSummary, f64)> {
    let (mut all, mut seconds) = (PushSummary::default(), 0.0);
    while let Ok(first) = keys.recv() {
        let batch: Vec<Key> = std::iter::once(first).chain(keys.try_iter()).collect();
        let (clock, last) = (Instant::now(), std::cell::Cell::new(Instant::now()));
        let pushed = remote.push(store, &batch, false, &|bytes, total_bytes| {
            if show_progress.load(Ordering::Relaxed) && last.get().elapsed() >= PROGRESS_EVERY {
                last.set(Instant::now());
                let _ = events.send(UploadEvent::Progress { bytes, total_bytes });
            }
        })?;
        all.records += pushed.records;
        all.files += pushed.files;
        all.bytes += pushed.bytes;
        seconds += clock.elapsed().as_secs_f64();
    }
    Ok((all, seconds))
}
