//! Single operations on an object store: bounded in size and time, tried again, checked on arrival.

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
use crate::error::{At, Error};
use crate::names::Digest;
use crate::run::redact::Secrets;
use crate::store::{Arriving, Refused, Store};

/// Bytes asked for in one request. Smaller files are asked for whole, so that a server without ranges will do.
const PIECE: u64 = 64 << 20;
/// Larger files are uploaded in parts.
const PART: usize = 8 << 20;
/// Maximum number of parts of an upload: S3 takes 10,000.
const PARTS: u64 = 5_000;
/// A transfer that was cut after at least this many bytes does not count as a failed try.
const HEADWAY: u64 = 1 << 20;

/// Bounds on time and number.
#[derive(Clone, Copy, Debug)]
pub(super) struct Limits {
    /// Maximum wait for an answer, and for the next bytes of one.
    pub answer: Duration,
    /// Maximum duration of an upload of at most [`PART`] bytes.
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
pub(super) enum Trouble {
    /// The remote cannot be reached, or failed in every try.
    Down(String),
    /// It refuses the operation.
    Denied(String),
    Missing(String),
    /// What it sent is not what it should be.
    Lies(String),
    /// The local disk failed.
    Here(Error),
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Down(why) | Self::Denied(why) | Self::Lies(why) => f.write_str(why),
            Self::Missing(what) => write!(f, "{what} is not there"),
            Self::Here(error) => write!(f, "{error}"),
        }
    }
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Here(error)
    }
}

impl From<Refused> for Trouble {
    fn from(refused: Refused) -> Self {
        match refused {
            Refused::Wrong(what) => Self::Lies(what),
            Refused::Disk(error) => Self::Here(error),
        }
    }
}

type Outcome<T> = Result<T, Trouble>;

#[derive(Clone, Copy, Debug)]
enum Use {
    Read,
    Write,
}

/// A connection. Displays as the remote's address.
pub(super) struct Wire {
    backend: Arc<dyn ObjectStore>,
    shown: String,
    limits: Limits,
    turns: Semaphore,
    requests: AtomicU64,
    /// Why the remote was given up.
    down: Mutex<Option<String>>,
    secrets: Secrets,
}

impl fmt::Display for Wire {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.shown)
    }
}

impl Wire {
    pub fn new(backend: Arc<dyn ObjectStore>, shown: String, limits: Limits) -> Self {
        let turns = Semaphore::new(limits.parallel);
        let secrets = super::address::secrets();
        Self { backend, shown, limits, turns, requests: AtomicU64::new(0), down: Mutex::default(), secrets }
    }

    pub fn limits(&self) -> Limits {
        self.limits
    }

    pub fn requests(&self) -> u64 {
        self.requests.load(Ordering::Relaxed)
    }

    pub fn is_http(&self) -> bool {
        self.shown.starts_with("http://") || self.shown.starts_with("https://")
    }

    pub fn is_down(&self) -> bool {
        self.why_down().is_some()
    }

    fn why_down(&self) -> Option<String> {
        self.down.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Takes back that the remote was given up.
    pub fn forgive(&self) {
        *self.down.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Gives the remote up. All callers get the first reason.
    fn give_up(&self, why: String) -> Trouble {
        let mut down = self.down.lock().unwrap_or_else(PoisonError::into_inner);
        Trouble::Down(down.get_or_insert(why).clone())
    }

    /// [`Wire::get`] of the first object: a remote that cannot be reached is noticed soon.
    pub async fn first(&self, name: &str, limit: u64) -> Outcome<Vec<u8>> {
        let wait = self.limits.answer / 2;
        timeout(wait, self.get(name, limit))
            .await
            .unwrap_or_else(|_| Err(self.give_up(format!("no answer within {} s", wait.as_secs_f64()))))
    }

    /// An object's bytes, at most `limit`.
    pub async fn get(&self, name: &str, limit: u64) -> Outcome<Vec<u8>> {
        self.often(self.limits.answer, Use::Read, || async {
            let result = self.backend.get(&Name::from(name)).await?;
            if result.meta.size > limit {
                return Ok(Err(Trouble::Lies(format!("{name} has {} bytes, more than {limit}", result.meta.size))));
            }
            let mut bytes = Vec::with_capacity(usize::try_from(result.meta.size).unwrap_or(0));
            let mut stream = result.into_stream();
            while let Some(chunk) = stream.next().await {
                bytes.extend_from_slice(&chunk?);
                if bytes.len() as u64 > limit {
                    return Ok(Err(Trouble::Lies(format!("{name} has more than {limit} bytes"))));
                }
            }
            Ok(Ok(bytes))
        })
        .await?
    }

    /// Fetches a blob of `bytes` bytes into the local store. A transfer that is cut goes on where it was cut; one that
    /// gave wrong bytes is begun again once.
    pub async fn fetch_blob(
        &self,
        store: &Store,
        digest: &Digest,
        bytes: u64,
        on_bytes: &dyn Fn(u64),
    ) -> Outcome<crate::store::Stat> {
        let mut wrong = Trouble::Lies(String::new());
        for _ in 0..2 {
            let mut arriving = store.receive(digest, bytes)?;
            let filled = self.fill(&mut arriving, &blob_name(digest), bytes, on_bytes).await;
            match filled.and_then(|()| Ok(arriving.finish()?)) {
                Err(lies @ Trouble::Lies(_)) => wrong = lies,
                other => return other,
            }
        }
        Err(wrong)
    }

    async fn fill(&self, arriving: &mut Arriving, name: &str, bytes: u64, on_bytes: &dyn Fn(u64)) -> Outcome<()> {
        let (mut tries, mut pause) = (0, self.limits.pause);
        while arriving.got() < bytes {
            let before = arriving.got();
            let Err(trouble) = self.piece(arriving, name, bytes, on_bytes).await else { continue };
            let Trouble::Down(why) = trouble else { return Err(trouble) };
            if arriving.got() - before >= HEADWAY {
                (tries, pause) = (0, self.limits.pause);
            }
            tries += 1;
            if tries >= self.limits.tries {
                return Err(self.give_up(why));
            }
            sleep(pause).await;
            pause *= 4;
        }
        Ok(())
    }

    /// Asks for the next piece of a blob, once.
    async fn piece(&self, arriving: &mut Arriving, name: &str, bytes: u64, on_bytes: &dyn Fn(u64)) -> Outcome<()> {
        let _turn = self.turn().await?;
        let start = arriving.got();
        let end = bytes.min(start + PIECE);
        let range = (start > 0 || end < bytes).then_some(GetRange::Bounded(start..end));
        let options = GetOptions { range, ..GetOptions::default() };
        let path = Name::from(name);
        let answer = timeout(self.limits.answer, self.backend.get_opts(&path, options)).await;
        let result: GetResult = answer.map_err(|_| self.late())?.map_err(|e| self.judge(&e))?;
        if result.meta.size != bytes {
            return Err(Trouble::Lies(format!("{name} has {} bytes in place of {bytes}", result.meta.size)));
        }
        let mut stream = result.into_stream();
        loop {
            let next = timeout(self.limits.answer, stream.next()).await.map_err(|_| self.late())?;
            match next {
                Some(Ok(chunk)) => {
                    arriving.write(&chunk)?;
                    on_bytes(chunk.len() as u64);
                }
                Some(Err(e)) => return Err(self.judge(&e)),
                None if arriving.got() < end => return Err(Trouble::Down(format!("{name}: the transfer was cut"))),
                None => return Ok(()),
            }
        }
    }

    /// The size of an object; `None` if it is not there.
    pub async fn size(&self, name: &str) -> Outcome<Option<u64>> {
        let head = self
            .often(self.limits.answer, Use::Read, || async { Ok(self.backend.head(&Name::from(name)).await?.size) });
        match head.await {
            Ok(size) => Ok(Some(size)),
            Err(Trouble::Missing(_)) => Ok(None),
            Err(trouble) => Err(trouble),
        }
    }

    /// Creates an object. Returns whether it was created: one that is there stays, unless `replace`.
    pub async fn put(&self, name: &str, bytes: Vec<u8>, replace: bool) -> Outcome<bool> {
        let payload = PutPayload::from(bytes);
        let mode = if replace { PutMode::Overwrite } else { PutMode::Create };
        self.often(self.limits.put, Use::Write, || async {
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
    pub async fn put_blob(&self, digest: &Digest, file: &Path, bytes: u64, replace: bool) -> Outcome<()> {
        let name = blob_name(digest);
        let rotten = || Trouble::Here(Error::surroundings(format!("{}: its bytes changed", file.display())));
        if bytes <= PART as u64 {
            let content = std::fs::read(file).at(file)?;
            if Digest::of(&content) != *digest {
                return Err(rotten());
            }
            return self.put(&name, content, replace).await.map(drop);
        }
        // Each part has its own limit, by the backend's client.
        let sent = self.often(Duration::MAX, Use::Write, || self.send_parts(&name, file, bytes));
        match sent.await?? {
            found if found == *digest => Ok(()),
            _ => Err(rotten()),
        }
    }

    /// Uploads a large file; gives it up if its bytes are not those of its name.
    async fn send_parts(&self, name: &str, file: &Path, bytes: u64) -> object_store::Result<Outcome<Digest>> {
        let size = usize::try_from(bytes / PARTS).unwrap_or(usize::MAX).max(PART);
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
    pub async fn list(&self, folder: &str, most: usize) -> Outcome<Vec<(String, u64)>> {
        let listed = self.often(self.limits.answer * 10, Use::Read, || async {
            let mut listed = Vec::new();
            let mut stream = self.backend.list(Some(&Name::from(folder)));
            while let Some(meta) = stream.next().await {
                let meta = meta?;
                listed.push((meta.location.to_string(), meta.size));
                if listed.len() > most {
                    return Ok(Err(Trouble::Lies(format!("{folder}/ has more than {most} entries"))));
                }
            }
            Ok(Ok(listed))
        });
        let listed = listed.await??;
        // A backend asks for a thousand names at a time.
        self.requests.fetch_add(listed.len() as u64 / 1000, Ordering::Relaxed);
        Ok(listed)
    }

    /// Tries an operation until it succeeds or fails for good. A read that fails for good gives the remote up; a write
    /// does not, because a full or read-only remote can still be read.
    async fn often<T, F: Future<Output = object_store::Result<T>>>(
        &self,
        limit: Duration,
        purpose: Use,
        operation: impl Fn() -> F,
    ) -> Outcome<T> {
        let (mut tries, mut pause) = (0, self.limits.pause);
        loop {
            let turn = self.turn().await?;
            let trouble = match timeout(limit, operation()).await {
                Ok(Ok(value)) => return Ok(value),
                Ok(Err(e)) => self.judge(&e),
                Err(_) => self.late(),
            };
            drop(turn);
            let Trouble::Down(why) = trouble else { return Err(trouble) };
            tries += 1;
            if tries >= self.limits.tries {
                return Err(match purpose {
                    Use::Read => self.give_up(why),
                    Use::Write => Trouble::Denied(why),
                });
            }
            sleep(pause).await;
            pause *= 4;
        }
    }

    /// Waits until another request may be sent, and counts it.
    async fn turn(&self) -> Outcome<tokio::sync::SemaphorePermit<'_>> {
        // The semaphore is never closed.
        let turn = self.turns.acquire().await.map_err(|e| Trouble::Down(e.to_string()))?;
        if let Some(why) = self.why_down() {
            return Err(Trouble::Down(why));
        }
        self.requests.fetch_add(1, Ordering::Relaxed);
        Ok(turn)
    }

    fn late(&self) -> Trouble {
        Trouble::Down(format!("no answer within {} s", self.limits.answer.as_secs_f64()))
    }

    fn judge(&self, e: &object_store::Error) -> Trouble {
        use object_store::Error as E;
        match e {
            E::NotFound { path, .. } => Trouble::Missing(path.clone()),
            E::PermissionDenied { .. }
            | E::Unauthenticated { .. }
            | E::NotImplemented { .. }
            | E::NotSupported { .. } => Trouble::Denied(self.one_line(e)),
            _ => Trouble::Down(self.one_line(e)),
        }
    }

    /// An error as one line, without secrets.
    fn one_line(&self, e: &object_store::Error) -> String {
        const LONGEST: usize = 300;
        let text = self.secrets.redact(&e.to_string());
        let text: Vec<&str> = text.split_whitespace().collect();
        let text = text.join(" ");
        match text.char_indices().nth(LONGEST) {
            Some((at, _)) => format!("{}…", &text[..at]),
            None => text,
        }
    }
}
