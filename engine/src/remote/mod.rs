//! The remote store: records and artifacts that several machines share through an object store.
//!
//! ```text
//! temper-remote.json     the layout's version
//! blobs/ab/cdef…         files and manifests by digest
//! records/<key>.json     sealed action records; created, never replaced: the first one wins
//! index/<key>-<digest>   empty; one listing shows which keys have records, with the artifacts' digests
//! ```
//!
//! A remote is not trusted. Its index is used for planning, but nothing enters the local store before its bytes are
//! checked, and whatever fails a check is refused for the rest of the process. Whether an artifact is the result of its
//! recipe cannot be checked: everyone who may write to a remote decides that.
//!
//! A remote that fails is not used for the rest of the process. This, and everything refused, causes a warning
//! ([`Remote::take_warnings`]).

mod address;
mod client;
mod combined;
mod fetch;
mod index;
mod pull;
mod push;
#[cfg(test)]
mod tests;

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use object_store::ObjectStore;
use serde::{Deserialize, Serialize};
use tokio::runtime::Runtime;

pub use address::Address;
use client::{Client, Limits, RemoteError};
pub use combined::CombinedStore;
pub use fetch::{ArtifactRequest, FetchSummary};
pub use pull::{PullSummary, pull};
pub use push::PushSummary;

use crate::error::{Error, Result};
use crate::names::{Digest, Key};
use crate::store::{RecordFile, Store, check_record};

/// The version of the layout that this program reads and writes.
const VERSION: u32 = 1;
const MARKER: &str = "temper-remote.json";
/// Maximum number of entries of a listing.
const MAX_LISTED: usize = 2_000_000;
/// Maximum size of a record, and of a manifest, in bytes.
const MAX_RECORD: u64 = 16 << 20;
const MAX_MANIFEST: u64 = 32 << 20;

/// Called with the bytes transferred so far and the total.
pub type OnProgress<'a> = &'a dyn Fn(u64, u64);

/// Content of [`MARKER`].
#[derive(Serialize, Deserialize)]
struct Marker {
    temper_remote: u32,
}

/// An open remote store. Its methods block; several threads may call them.
pub struct Remote {
    client: Client,
    runtime: Option<Runtime>,
    may_write: AtomicBool,
    state: Mutex<RemoteState>,
}

#[derive(Default)]
struct RemoteState {
    /// The digest of each record; `None` if the server cannot list, so that each key must be looked up by itself.
    index: Option<HashMap<Key, Digest>>,
    /// The artifacts that the index or a record names.
    artifacts: HashSet<Digest>,
    /// Records looked up one by one.
    looked_up: HashMap<Key, Option<Arc<RecordFile>>>,
    /// Keys whose record, and artifacts and blobs whose bytes, could not be fetched or failed a check.
    refused_keys: HashSet<Key>,
    refused: HashSet<Digest>,
    /// Whether the remote has a marker.
    has_marker: bool,
    warnings: Vec<String>,
    warned: HashSet<String>,
}

impl Remote {
    /// Connects and reads the index: one request for the marker, and one per thousand records for the listing.
    ///
    /// # Errors
    /// When the remote cannot be reached or read (environment error), or has a newer layout or is a local store (user
    /// error).
    pub fn open(address: &Address, store: &Store, read_only: bool) -> Result<Self> {
        address.check_against(store)?;
        let backend = address.connect()?;
        let remote =
            Self::with_backend(backend, address.to_string(), read_only || !address.can_write(), Limits::default())?;
        if let Address::Folder(path) = address
            && !read_only
            && !remote.can_write()
        {
            remote.warn(format!("{}: the folder cannot be written to, so nothing is uploaded", path.display()));
        }
        Ok(remote)
    }

    fn with_backend(backend: Arc<dyn ObjectStore>, address: String, read_only: bool, limits: Limits) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .thread_name("remote")
            .enable_all()
            .build()
            .map_err(|e| Error::environment(format!("cannot start a tokio runtime: {e}")))?;
        let remote = Self {
            client: Client::new(backend, address, limits),
            runtime: Some(runtime),
            may_write: AtomicBool::new(!read_only),
            state: Mutex::default(),
        };
        remote.read_index()?;
        Ok(remote)
    }

    fn read_index(&self) -> Result<()> {
        let marker = self.block_on(self.client.get_first(MARKER, 4096));
        let mut state = self.state();
        state.has_marker = marker.is_ok();
        match &marker {
            Ok(bytes) => match serde_json::from_slice::<Marker>(bytes) {
                Ok(Marker { temper_remote: VERSION }) => {}
                Ok(Marker { temper_remote: version }) => {
                    return Err(Error::user(format!(
                        "{}: the remote has layout {version}, but this temper reads layout {VERSION}",
                        self.client
                    ))
                    .help("use the newer temper that created it, or another remote"));
                }
                Err(_) => {
                    return Err(Error::environment(format!(
                        "{}: {MARKER} is not the marker of a remote store",
                        self.client
                    )));
                }
            },
            Err(RemoteError::Missing(_)) => {}
            Err(error) => return Err(self.unusable(error)),
        }
        match self.block_on(self.client.list("index", MAX_LISTED)) {
            Ok(listed) => {
                let entries = listed.iter().filter_map(|(name, _)| index::parse(name));
                let index: HashMap<Key, Digest> = entries.collect();
                state.artifacts = index.values().copied().collect();
                state.index = Some(index);
            }
            // A plain web server has the marker, but cannot list.
            Err(_) if self.client.is_http() && state.has_marker => self.client.clear_unavailable(),
            Err(error) => return Err(self.unusable(&error)),
        }
        Ok(())
    }

    /// Transient if the remote is down. It is not if the remote refuses, or has no such bucket.
    fn unusable(&self, error: &RemoteError) -> Error {
        let unusable = Error::environment(format!("{}: {error}", self.client))
            .help("check the address, the network and the credentials in the environment; see docs/remote.md");
        if matches!(error, RemoteError::Unavailable(_)) { unusable.transient() } else { unusable }
    }

    /// Whether results are uploaded.
    pub fn can_write(&self) -> bool {
        self.may_write.load(Ordering::Relaxed) && !self.client.is_unavailable()
    }

    /// The digest of the record at a key, by the remote's index.
    pub fn lookup(&self, key: &Key) -> Option<Digest> {
        let state = self.state();
        if state.refused_keys.contains(key) || self.client.is_unavailable() {
            return None;
        }
        if let Some(index) = &state.index {
            return index.get(key).copied();
        }
        if let Some(looked_up) = state.looked_up.get(key) {
            return looked_up.as_ref().map(|file| file.record.digest);
        }
        drop(state);
        let looked_up = match self.block_on(self.record(key)) {
            Ok(file) => Some(Arc::new(file)),
            Err(RemoteError::Missing(_)) => None,
            Err(error) => {
                self.refuse_key(key, &error);
                None
            }
        };
        let digest = looked_up.as_ref().map(|file| file.record.digest);
        let mut state = self.state();
        state.artifacts.extend(digest);
        state.looked_up.insert(*key, looked_up);
        digest
    }

    /// Whether the index or a record names the artifact, and it is not refused.
    pub fn has_artifact(&self, digest: &Digest) -> bool {
        let state = self.state();
        !self.client.is_unavailable() && state.artifacts.contains(digest) && !state.refused.contains(digest)
    }

    /// The warnings since the last call, each once per process.
    pub fn take_warnings(&self) -> Vec<String> {
        std::mem::take(&mut self.state().warnings)
    }

    /// Number of requests sent so far, not counting retries inside the backend.
    pub fn requests(&self) -> u64 {
        self.client.requests()
    }

    async fn record(&self, key: &Key) -> Result<RecordFile, RemoteError> {
        let bytes = self.client.get(&record_name(key), MAX_RECORD).await?;
        check_record(key, &bytes).map_err(RemoteError::Invalid)
    }

    fn warn(&self, message: String) {
        let mut state = self.state();
        if state.warned.insert(message.clone()) {
            state.warnings.push(message);
        }
    }

    fn warn_about(&self, what: &str, error: &RemoteError) {
        self.warn(match error {
            RemoteError::Unavailable(why) => format!("{}: {why}; continuing without the remote", self.client),
            RemoteError::Invalid(_) => format!("{}: {what} failed a check and is not used: {error}", self.client),
            _ => format!("{}: {what}: {error}", self.client),
        });
    }

    fn refuse_key(&self, key: &Key, error: &RemoteError) {
        self.warn_about(&format!("the record {}", record_name(key)), error);
        self.state().refused_keys.insert(*key);
    }

    fn refuse(&self, digest: &Digest, error: &RemoteError) {
        self.warn_about(&format!("the file {}", blob_name(digest)), error);
        self.state().refused.insert(*digest);
    }

    fn state(&self) -> MutexGuard<'_, RemoteState> {
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
        write!(f, "Remote({})", self.client)
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
