//! The remote store: records and artifacts that several machines share through an object store.
//!
//! ```text
//! temper-remote.json     the layout's version
//! blobs/ab/cdef…         files and manifests by digest
//! records/<key>.json     sealed action records; created, never replaced: the first one wins
//! index/<key>-<digest>   empty; tells by one listing which keys have records, and the artifacts' digests
//! ```
//!
//! A remote is not trusted. What it says about keys is used for planning, but nothing enters the local store before its
//! bytes were checked, and what fails a check is refused for the rest of the process. Whether an artifact really is the
//! result of its recipe cannot be checked: whoever may write to a remote decides that.
//!
//! A remote that fails is given up for the rest of the process. That, and everything refused, is a warning
//! ([`Remote::take_warnings`]).

mod address;
mod fetch;
mod index;
mod pull;
mod push;
#[cfg(test)]
mod tests;
mod wire;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use object_store::ObjectStore;
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;

pub use address::Address;
pub use fetch::{Moved, Wanted};
pub use index::Shared;
pub use pull::{Pulled, pull};
pub use push::Pushed;
use wire::{Limits, Trouble, Wire};

use crate::error::{Error, Result};
use crate::names::{Digest, Key};
use crate::store::{Foreign, Store, check_record};

/// The version of the layout that this program reads and writes.
const VERSION: u32 = 1;
const MARKER: &str = "temper-remote.json";
/// Maximum number of entries of a listing.
const MAX_LISTED: usize = 2_000_000;
/// Maximum size of a record, and of a manifest, in bytes.
const MAX_RECORD: u64 = 16 << 20;
const MAX_MANIFEST: u64 = 32 << 20;

/// Called with the bytes moved so far and the bytes to move in all.
pub type OnProgress<'a> = &'a dyn Fn(u64, u64);

/// Content of [`MARKER`].
#[derive(Serialize, Deserialize)]
struct Marker {
    temper_remote: u32,
}

/// An open remote store. Its methods block; several threads may call them.
pub struct Remote {
    wire: Wire,
    runtime: Option<Runtime>,
    may_write: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The digest of each record; `None` if the server cannot list, so that each key must be asked for.
    index: Option<HashMap<Key, Digest>>,
    /// The artifacts that the index or a record names.
    artifacts: HashSet<Digest>,
    /// Records asked for one by one.
    asked: HashMap<Key, Option<Arc<Foreign>>>,
    /// Keys whose record, and artifacts and blobs whose bytes, could not be had or failed a check.
    refused_keys: HashSet<Key>,
    refused: HashSet<Digest>,
    /// Whether the marker is there.
    marked: bool,
    warnings: Vec<String>,
    warned: HashSet<String>,
}

impl Remote {
    /// Connects and reads the index: one request for the marker, and one per thousand records for the listing.
    ///
    /// # Errors
    /// When the remote cannot be reached or read (`Surroundings`), or has a newer layout or is a local store (user
    /// error).
    pub fn open(address: &Address, store: &Store, read_only: bool) -> Result<Self> {
        address.check_against(store)?;
        let backend = address.connect()?;
        let remote = Self::over(backend, address.to_string(), read_only || !address.can_write(), Limits::default())?;
        if let Address::Folder(path) = address
            && !read_only
            && !remote.can_write()
        {
            remote.warn(format!("{}: the folder cannot be written to, so nothing is uploaded", path.display()));
        }
        Ok(remote)
    }

    fn over(backend: Arc<dyn ObjectStore>, shown: String, read_only: bool, limits: Limits) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("remote")
            .enable_all()
            .build()
            .map_err(|e| Error::surroundings(format!("cannot start a tokio runtime: {e}")))?;
        let remote = Self {
            wire: Wire::new(backend, shown, limits),
            runtime: Some(runtime),
            may_write: AtomicBool::new(!read_only),
            state: Mutex::default(),
        };
        remote.read_index()?;
        Ok(remote)
    }

    fn read_index(&self) -> Result<()> {
        let marker = self.block_on(self.wire.first(MARKER, 4096));
        let mut state = self.state();
        state.marked = marker.is_ok();
        match &marker {
            Ok(bytes) => match serde_json::from_slice::<Marker>(bytes) {
                Ok(Marker { temper_remote: VERSION }) => {}
                Ok(Marker { temper_remote: version }) => {
                    return Err(Error::yours(format!(
                        "{}: the remote has layout {version}, this temper reads layout {VERSION}",
                        self.wire
                    ))
                    .help("use the temper that made it, or another remote"));
                }
                Err(_) => {
                    return Err(Error::surroundings(format!("{}: {MARKER} is not that of a remote store", self.wire)));
                }
            },
            Err(Trouble::Missing(_)) => {}
            Err(trouble) => return Err(self.unusable(trouble)),
        }
        match self.block_on(self.wire.list("index", MAX_LISTED)) {
            Ok(listed) => {
                let entries = listed.iter().filter_map(|(name, _)| index::parse(name));
                let index: HashMap<Key, Digest> = entries.collect();
                state.artifacts = index.values().copied().collect();
                state.index = Some(index);
            }
            // A plain web server: it has the marker, but lists nothing.
            Err(_) if self.wire.is_http() && state.marked => self.wire.forgive(),
            Err(trouble) => return Err(self.unusable(&trouble)),
        }
        Ok(())
    }

    fn unusable(&self, trouble: &Trouble) -> Error {
        Error::surroundings(format!("{}: {trouble}", self.wire))
            .help("the address, the network and the credentials in the environment must be right; see docs/remote.md")
    }

    /// Whether results are uploaded.
    pub fn can_write(&self) -> bool {
        self.may_write.load(Ordering::Relaxed) && !self.wire.is_down()
    }

    /// The digest of the record at a key, as far as the remote tells.
    pub fn lookup(&self, key: &Key) -> Option<Digest> {
        let state = self.state();
        if state.refused_keys.contains(key) || self.wire.is_down() {
            return None;
        }
        if let Some(index) = &state.index {
            return index.get(key).copied();
        }
        if let Some(asked) = state.asked.get(key) {
            return asked.as_ref().map(|foreign| foreign.record.digest);
        }
        drop(state);
        let asked = match self.block_on(self.record(key)) {
            Ok(foreign) => Some(Arc::new(foreign)),
            Err(Trouble::Missing(_)) => None,
            Err(trouble) => {
                self.refuse_key(key, &trouble);
                None
            }
        };
        let digest = asked.as_ref().map(|foreign| foreign.record.digest);
        let mut state = self.state();
        state.artifacts.extend(digest);
        state.asked.insert(*key, asked);
        digest
    }

    /// Whether the remote says that it has an artifact.
    pub fn holds(&self, digest: &Digest) -> bool {
        let state = self.state();
        !self.wire.is_down() && state.artifacts.contains(digest) && !state.refused.contains(digest)
    }

    /// The warnings since the last call, each once per process.
    pub fn take_warnings(&self) -> Vec<String> {
        std::mem::take(&mut self.state().warnings)
    }

    /// Number of requests sent so far, those of a backend's own retries not counted.
    pub fn requests(&self) -> u64 {
        self.wire.requests()
    }

    async fn record(&self, key: &Key) -> Result<Foreign, Trouble> {
        let bytes = self.wire.get(&record_name(key), MAX_RECORD).await?;
        check_record(key, &bytes).map_err(Trouble::Lies)
    }

    fn warn(&self, message: String) {
        let mut state = self.state();
        if state.warned.insert(message.clone()) {
            state.warnings.push(message);
        }
    }

    fn warn_of(&self, what: &str, trouble: &Trouble) {
        self.warn(match trouble {
            Trouble::Down(why) => format!("{}: {why}; going on without the remote", self.wire),
            Trouble::Lies(_) => format!("{}: {what} is not what it should be and is not used: {trouble}", self.wire),
            _ => format!("{}: {what}: {trouble}", self.wire),
        });
    }

    fn refuse_key(&self, key: &Key, trouble: &Trouble) {
        self.warn_of(&format!("the record {}", record_name(key)), trouble);
        self.state().refused_keys.insert(*key);
    }

    fn refuse(&self, digest: &Digest, trouble: &Trouble) {
        self.warn_of(&format!("the file {}", blob_name(digest)), trouble);
        self.state().refused.insert(*digest);
    }

    fn state(&self) -> MutexGuard<'_, State> {
        // Sets and maps stay consistent even after a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        // Taken only by `drop`.
        self.runtime.as_ref().expect("the runtime lives as long as the remote").block_on(future)
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        // A read of a folder that hangs must not hang the end of the process.
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

impl fmt::Debug for Remote {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Remote({})", self.wire)
    }
}

fn record_name(key: &Key) -> String {
    format!("records/{key}.json")
}

fn blob_name(digest: &Digest) -> String {
    let name = digest.to_string();
    let (shard, rest) = name.split_at(2);
    format!("blobs/{shard}/{rest}")
}
