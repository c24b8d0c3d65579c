//! Single operations on an object store, bounded in size and time and retried; received bytes are checked.

use std::fmt;
use std::io::Read;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use object_store::path::Path as Name;
use object_store::{GetOptions, GetRange, GetResult, ObjectStore, ObjectStoreExt, PutMode, PutPayload, WriteMultipart};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

use super::blob_name;
use crate::error::{AtPath, Error};
use crate::names::Digest;
use crate::run::redact::Secrets;
use crate::store::{BlobError, BlobWriter, Store};

/// Bytes per request. Smaller files are requested whole, so that a server without range requests will do.
const RANGE_BYTES: u64 = 64 << 20;
/// Size of an upload's parts in bytes; smaller files are uploaded in one request.
const PART_BYTES: usize = 8 << 20;
/// Maximum number of parts of an upload: S3 takes 10,000.
const MAX_PARTS: u64 = 5_000;
/// A transfer interrupted after at least this many bytes does not count as a failed try.
const MIN_PROGRESS_BYTES: u64 = 1 << 20;

/// Time limits, and numbers of tries and requests.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Maximum wait for an answer, and for the next bytes of one.
    pub answer: Duration,
    /// Maximum duration of an upload of at most [`PART_BYTES`] bytes.
    pub put: Duration,
    pub tries: u32,
    /// Pause before the second try; four times as long before the third.
    pub pause: Duration,
    /// Maximum number of requests at a time.
    pub parallel: usize,
}

impl Default for Limits {
    fn default() -> Self {
        let seconds = Duration::from_secs;
        Self { answer: seconds(60), put: seconds(300), tries: 3, pause: Duration::from_millis(250), parallel: 16 }
    }
}

/// Why an operation failed.
#[derive(Clone, Debug)]
pub(super) enum RemoteError {
    /// The remote cannot be reached, or failed in every try.
    Unavailable(String),
    /// The remote refuses the operation.
    Denied(String),
    Missing(String),
    /// The remote's bytes failed a check.
    Invalid(String),
    /// The local disk failed.
    Local(Error),
}

impl fmt::Display for RemoteError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Unavailable(why) | Self::Denied(why) | Self::Invalid(why) => f.write_str(why),
            Self::Missing(what) => write!(f, "{what} does not exist"),
            Self::Local(error) => write!(f, "{error}"),
        }
    }
}

impl From<Error> for RemoteError {
    fn from(error: Error) -> Self {
        Self::Local(error)
    }
}

impl From<BlobError> for RemoteError {
    fn from(error: BlobError) -> Self {
        match error {
            BlobError::Mismatch(what) => Self::Invalid(what),
            BlobError::Disk(error) => Self::Local(error),
        }
    }
}

type ClientResult<T> = Result<T, RemoteError>;

#[derive(Clone, Copy, Debug)]
enum Access {
    Read,
    Write,
}

/// A connection. Displays as the remote's address.
pub(super) struct Client {
    backend: Arc<dyn ObjectStore>,
    address: String,
    limits: Limits,
    permits: Semaphore,
    requests: AtomicU64,
    /// Why the remote is no longer used.
    unavailable: Mutex<Option<String>>,
    secrets: Secrets,
}

impl fmt::Display for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.address)
    }
}

impl Client {
    pub fn new(backend: Arc<dyn ObjectStore>, address: String, limits: Limits) -> Self {
        let permits = Semaphore::new(limits.parallel);
        let secrets = super::address::secrets();
        Self { backend, address, limits, permits, requests: AtomicU64::new(0), unavailable: Mutex::default(), secrets }
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    pub fn is_http(&self) -> bool {
        self.address.starts_with("http://") || self.address.starts_with("https://")
    }

    pub fn is_unavailable(&self) -> bool {
        self.unavailable_reason().is_some()
    }

    fn unavailable_reason(&self) -> Option<String> {
        self.unavailable.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Uses the remote again.
    pub fn clear_unavailable(&self) {
        *self.unavailable.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Stops using the remote. All callers get the first reason.
    fn mark_unavailable(&self, why: String) -> RemoteError {
        let mut reason = self.unavailable.lock().unwrap_or_else(PoisonError::into_inner);
        RemoteError::Unavailable(reason.get_or_insert(why).clone())
    }

    /// [`Client::get`] of the first object: waits only half as long, so that an unreachable remote is noticed soon.
    pub async fn get_first(&self, name: &str, limit: u64) -> ClientResult<Vec<u8>> {
        let wait = self.limits.answer / 2;
        timeout(wait, self.get(name, limit))
            .await
            .unwrap_or_else(|_| Err(self.mark_unavailable(format!("no answer within {} s", wait.as_secs_f64()))))
    }

    /// An object's bytes, at most `limit`.
    pub async fn get(&self, name: &str, limit: u64) -> ClientResult<Vec<u8>> {
        self.with_retries(self.limits.answer, Access::Read, || async {
            let result = self.backend.get(&Name::from(name)).await?;
            if result.meta.size > limit {
                return Ok(Err(RemoteError::Invalid(format!(
                    "{name} has {} bytes, more than {limit}",
                    result.meta.size
                ))));
            }
            let mut bytes = Vec::with_capacity(usize::try_from(result.meta.size).unwrap_or(0));
            let mut stream = result.into_stream();
            while let Some(chunk) = stream.next().await {
                bytes.extend_from_slice(&chunk?);
                if bytes.len() as u64 > limit {
                    return Ok(Err(RemoteError::Invalid(format!("{name} has more than {limit} bytes"))));
                }
            }
            Ok(Ok(bytes))
        })
        .await?
    }

    /// Fetches a blob of `bytes` bytes into the local store. An interrupted transfer resumes where it stopped; one
    /// with wrong bytes is restarted once.
    pub async fn fetch_blob(
        &self,
        store: &Store,
        digest: &Digest,
        bytes: u64,
        on_bytes: &dyn Fn(u64),
    ) -> ClientResult<crate::store::Stat> {
        let mut wrong = RemoteError::Invalid(String::new());
        for _ in 0..2 {
            let mut writer = store.create_blob(digest, bytes)?;
            let filled = self.receive(&mut writer, &blob_name(digest), bytes, on_bytes).await;
            match filled.and_then(|()| Ok(writer.finish()?)) {
                Err(error @ RemoteError::Invalid(_)) => wrong = error,
                other => return other,
            }
        }
        Err(wrong)
    }

    async fn receive(
        &self,
        writer: &mut BlobWriter,
        name: &str,
        bytes: u64,
        on_bytes: &dyn Fn(u64),
    ) -> ClientResult<()> {
        let (mut tries, mut pause) = (0, self.limits.pause);
        while writer.received() < bytes {
            let before = writer.received();
            let Err(error) = self.receive_range(writer, name, bytes, on_bytes).await else { continue };
            let RemoteError::Unavailable(why) = error else { return Err(error) };
            if writer.received() - before >= MIN_PROGRESS_BYTES {
                (tries, pause) = (0, self.limits.pause);
            }
            tries += 1;
            if tries >= self.limits.tries {
                return Err(self.mark_unavailable(why));
            }
            sleep(pause).await;
            pause *= 4;
        }
        Ok(())
    }

    /// Requests the next range of a blob, once.
    async fn receive_range(
        &self,
        writer: &mut BlobWriter,
        name: &str,
        bytes: u64,
        on_bytes: &dyn Fn(u64),
    ) -> ClientResult<()> {
        let _permit = self.permit().await?;
        let start = writer.received();
        let end = bytes.min(start + RANGE_BYTES);
        let range = (start > 0 || end < bytes).then_some(GetRange::Bounded(start..end));
        let options = GetOptions { range, ..GetOptions::default() };
        let path = Name::from(name);
        let answer = timeout(self.limits.answer, self.backend.get_opts(&path, options)).await;
        let result: GetResult = answer.map_err(|_| self.timed_out())?.map_err(|e| self.classify(&e))?;
        if result.meta.size != bytes {
            return Err(RemoteError::Invalid(format!("{name} has {} bytes instead of {bytes}", result.meta.size)));
        }
        let mut stream = result.into_stream();
        loop {
            let next = timeout(self.limits.answer, stream.next()).await.map_err(|_| self.timed_out())?;
            match next {
                Some(Ok(chunk)) => {
                    writer.write(&chunk)?;
                    on_bytes(chunk.len() as u64);
                }
                Some(Err(e)) => return Err(self.classify(&e)),
                None if writer.received() < end => {
                    return Err(RemoteError::Unavailable(format!("{name}: the transfer was interrupted")));
                }
                None => return Ok(()),
            }
        }
    }

    /// The size of an object in bytes; `None` if it does not exist.
    pub async fn size(&self, name: &str) -> ClientResult<Option<u64>> {
        let head = self.with_retries(self.limits.answer, Access::Read, || async {
            Ok(self.backend.head(&Name::from(name)).await?.size)
        });
        match head.await {
            Ok(size) => Ok(Some(size)),
            Err(RemoteError::Missing(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Creates an object. Returns whether it was created: an existing one stays, unless `replace`.
    pub async fn put(&self, name: &str, bytes: Vec<u8>, replace: bool) -> ClientResult<bool> {
        let payload = PutPayload::from(bytes);
        let mode = if replace { PutMode::Overwrite } else { PutMode::Create };
        self.with_retries(self.limits.put, Access::Write, || async {
            use object_store::Error::{AlreadyExists, Precondition};
            match self.backend.put_opts(&Name::from(name), payload.clone(), mode.clone().into()).await {
                Ok(_) => Ok(true),
                Err(AlreadyExists { .. } | Precondition { .. }) => Ok(false),
                Err(e) => Err(e),
            }
        })
        .await
    }

    /// Uploads a file under the name of its digest.
    pub async fn put_blob(&self, digest: &Digest, file: &Path, bytes: u64, replace: bool) -> ClientResult<()> {
        let name = blob_name(digest);
        let changed = || RemoteError::Local(Error::environment(format!("{}: its bytes changed", file.display())));
        if bytes <= PART_BYTES as u64 {
            let content = std::fs::read(file).at(file)?;
            if Digest::of(&content) != *digest {
                return Err(changed());
            }
            return self.put(&name, content, replace).await.map(drop);
        }
        // Each part has its own limit, by the backend's client.
        let sent = self.with_retries(Duration::MAX, Access::Write, || self.send_parts(&name, file, bytes));
        match sent.await?? {
            found if found == *digest => Ok(()),
            _ => Err(changed()),
        }
    }

    /// Uploads a large file in parts; aborts if its bytes do not match the digest in its name.
    async fn send_parts(&self, name: &str, file: &Path, bytes: u64) -> object_store::Result<ClientResult<Digest>> {
        let size = usize::try_from(bytes / MAX_PARTS).unwrap_or(usize::MAX).max(PART_BYTES);
        let upload = self.backend.put_multipart(&Name::from(name)).await?;
        let mut upload = WriteMultipart::new_with_chunk_size(upload, size);
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; 1 << 20];
        let mut read = match std::fs::File::open(file).at(file) {
            Ok(file) => file,
            Err(error) => return Ok(Err(error.into())),
        };
        loop {
            match read.read(&mut buffer).at(file) {
                Ok(0) => break,
                Ok(n) => {
                    hasher.update(&buffer[..n]);
                    upload.wait_for_capacity(4).await?;
                    upload.write(&buffer[..n]);
                }
                Err(error) => {
                    upload.abort().await?;
                    return Ok(Err(error.into()));
                }
            }
        }
        let found = Digest::from(hasher.finalize());
        if name == blob_name(&found) {
            upload.finish().await?;
        } else {
            upload.abort().await?;
        }
        Ok(Ok(found))
    }

    /// The names below a folder, and their sizes.
    pub async fn list(&self, folder: &str, max_entries: usize) -> ClientResult<Vec<(String, u64)>> {
        let listed = self.with_retries(self.limits.answer * 10, Access::Read, || async {
            let mut listed = Vec::new();
            let mut stream = self.backend.list(Some(&Name::from(folder)));
            while let Some(meta) = stream.next().await {
                let meta = meta?;
                listed.push((meta.location.to_string(), meta.size));
                if listed.len() > max_entries {
                    return Ok(Err(RemoteError::Invalid(format!("{folder}/ has more than {max_entries} entries"))));
                }
            }
            Ok(Ok(listed))
        });
        let listed = listed.await??;
        // A backend asks for a thousand names at a time.
        self.requests.fetch_add(listed.len() as u64 / 1000, Ordering::Relaxed);
        Ok(listed)
    }

    /// Retries an operation until it succeeds or the tries are used up. A failed read makes the remote unavailable; a
    /// failed write does not, because a full or read-only remote can still be read.
    async fn with_retries<T, F: Future<Output = object_store::Result<T>>>(
        &self,
        limit: Duration,
        access: Access,
        operation: impl Fn() -> F,
    ) -> ClientResult<T> {
        let (mut tries, mut pause) = (0, self.limits.pause);
        loop {
            let permit = self.permit().await?;
            let error = match timeout(limit, operation()).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(e)) => self.classify(&e),
                Err(_) => self.timed_out(),
            };
            drop(permit);
            let RemoteError::Unavailable(why) = error else { return Err(error) };
            tries += 1;
            if tries >= self.limits.tries {
                return Err(match access {
                    Access::Read => self.mark_unavailable(why),
                    Access::Write => RemoteError::Denied(why),
                });
            }
            sleep(pause).await;
            pause *= 4;
        }
    }

    /// Waits until another request may be sent, and counts the request.
    async fn permit(&self) -> ClientResult<tokio::sync::SemaphorePermit<'_>> {
        // The semaphore is never closed.
        let permit = self.permits.acquire().await.map_err(|e| RemoteError::Unavailable(e.to_string()))?;
        if let Some(why) = self.unavailable_reason() {
            return Err(RemoteError::Unavailable(why));
        }
        self.requests.fetch_add(1, Ordering::Relaxed);
        Ok(permit)
    }

    fn timed_out(&self) -> RemoteError {
        RemoteError::Unavailable(format!("no answer within {} s", self.limits.answer.as_secs_f64()))
    }

    fn classify(&self, e: &object_store::Error) -> RemoteError {
        use object_store::Error as E;
        match e {
            E::NotFound { path, .. } => RemoteError::Missing(path.clone()),
            E::PermissionDenied { .. }
            | E::Unauthenticated { .. }
            | E::NotImplemented { .. }
            | E::NotSupported { .. } => RemoteError::Denied(self.one_line(e)),
            // The crate has no variant for S3's answer that the bucket does not exist.
            _ if e.to_string().contains("NoSuchBucket") => RemoteError::Denied(self.one_line(e)),
            _ => RemoteError::Unavailable(self.one_line(e)),
        }
    }

    /// An error as one line, without secrets.
    fn one_line(&self, e: &object_store::Error) -> String {
        const MAX_CHARS: usize = 300;
        let text = self.secrets.redact(&e.to_string());
        let text: Vec<&str> = text.split_whitespace().collect();
        let text = text.join(" ");
        match text.char_indices().nth(MAX_CHARS) {
            Some((at, _)) => format!("{}…", &text[..at]),
            None => text,
        }
    }
}
