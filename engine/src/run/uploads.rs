//! Uploads results to the remote store while the run goes on.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::ledger::Ledger;
use crate::error::{Error, Result};
use crate::journal::Event;
use crate::names::Key;
use crate::remote::{Pushed, Remote};
use crate::store::Store;

/// Minimum time between two events of progress.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// The thread that uploads.
pub(super) struct Uploads {
    keys: Sender<Key>,
    news: Receiver<News>,
    thread: JoinHandle<()>,
    /// Set when the run waits for the rest; until then nobody hears of progress.
    awaited: Arc<AtomicBool>,
}

/// A message of the thread.
enum News {
    Progress { bytes: u64, total_bytes: u64 },
    Ended(Box<Result<(Pushed, f64)>>),
}

impl Uploads {
    /// `None` if the remote cannot be written to.
    pub fn start(remote: &Arc<Remote>, store: &Store) -> Option<Self> {
        if !remote.can_write() {
            return None;
        }
        let (keys, offered) = channel();
        let (tell, news) = channel();
        let awaited = Arc::new(AtomicBool::new(false));
        let is_awaited = Arc::clone(&awaited);
        let (remote, root) = (Arc::clone(remote), store.root().to_owned());
        let upload = move || {
            let done = Store::open(&root).and_then(|store| upload_all(&remote, &store, &offered, &is_awaited, &tell));
            // Nobody listens any more if the run was interrupted.
            let _ = tell.send(News::Ended(Box::new(done)));
        };
        let thread = std::thread::Builder::new().name("uploads".into()).spawn(upload).ok()?;
        Some(Self { keys, news, thread, awaited })
    }

    /// Takes the keys to upload. All its copies must be dropped before [`Uploads::finish`].
    pub fn sender(&self) -> Sender<Key> {
        self.keys.clone()
    }

    /// Waits until everything is uploaded. After an interruption it does not wait: `temper push` uploads the rest.
    pub fn finish(self, ledger: &mut Ledger<'_>) {
        let Self { keys, news, thread, awaited } = self;
        awaited.store(true, Ordering::Relaxed);
        drop(keys);
        if ledger.interrupted {
            return;
        }
        for told in news {
            match told {
                News::Progress { bytes, total_bytes } => {
                    ledger.tell(Event::Transfer { upload: true, bytes, total_bytes });
                }
                News::Ended(ended) => match *ended {
                    Ok((Pushed { records: 0, files: 0, .. }, _)) => {}
                    Ok((Pushed { records, files, bytes, .. }, seconds)) => {
                        ledger.tell(Event::Transferred { upload: true, records, files, bytes, seconds });
                    }
                    Err(Error { message, .. }) => {
                        let message = format!("not everything was uploaded: {message}");
                        ledger.tell(Event::Warning { stage: None, message });
                    }
                },
            }
        }
        // A panic is reported by the hook; the results are in the local store.
        let _ = thread.join();
    }
}

/// Uploads until no more keys come. Returns what was uploaded, and the seconds that it took.
fn upload_all(
    remote: &Remote,
    store: &Store,
    keys: &Receiver<Key>,
    awaited: &AtomicBool,
    tell: &Sender<News>,
) -> Result<(Pushed, f64)> {
    let (mut all, mut seconds) = (Pushed::default(), 0.0);
    while let Ok(first) = keys.recv() {
        let batch: Vec<Key> = std::iter::once(first).chain(keys.try_iter()).collect();
        let (clock, last) = (Instant::now(), std::cell::Cell::new(Instant::now()));
        let pushed = remote.push(store, &batch, false, &|bytes, total_bytes| {
            if awaited.load(Ordering::Relaxed) && last.get().elapsed() >= PROGRESS_EVERY {
                last.set(Instant::now());
                let _ = tell.send(News::Progress { bytes, total_bytes });
            }
        })?;
        all.records += pushed.records;
        all.files += pushed.files;
        all.bytes += pushed.bytes;
        seconds += clock.elapsed().as_secs_f64();
    }
    Ok((all, seconds))
}
