use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use dagrs::async_trait::async_trait;
use futures::stream::BoxStream;
use futures::{StreamExt, TryStreamExt, stream};
use object_store::memory::InMemory;
use object_store::path::Path as Name;
use object_store::{
    CopyOptions, Error as StoreError, GetOptions, GetResult, GetResultPayload, ListResult, MultipartUpload, ObjectMeta,
    ObjectStore, ObjectStoreExt, PutMultipartOptions, PutOptions, PutPayload, PutResult,
};

use super::client::Limits;
use super::{Address, ArtifactRequest, FetchSummary, Remote, blob_name, index, record_name};
use crate::artifact::{Facts, FileEntry, Manifest};
use crate::names::{Digest, Key};
use crate::store::tests::{TestSpace, record};
use crate::store::{ActionRecord, Presence, RecordResult};

/// What goes wrong with an operation.
#[derive(Clone, Copy, Debug, PartialEq)]
enum What {
    Busy,
    Denied,
    Slow,
    /// The connection ends after this many bytes.
    UntilArgs(usize),
    /// One bit of the bytes is wrong.
    Flip,
    /// More bytes than announced.
    More,
}

/// The next `times` operations `verb` on names that begin with `name` fail.
#[derive(Clone, Debug)]
struct Fault {
    verb: &'static str,
    name: String,
    times: u32,
    what: What,
}

/// A store in memory with faults. Remembers the names of what was put into it.
#[derive(Clone, Debug, Default)]
struct Faulty {
    inner: Arc<InMemory>,
    faults: Arc<Mutex<Vec<Fault>>>,
    puts: Arc<Mutex<Vec<String>>>,
}

impl fmt::Display for Faulty {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("faulty")
    }
}

impl Faulty {
    fn fails(&self, verb: &'static str, name: &str, times: u32, what: What) {
        self.faults.lock().unwrap().push(Fault { verb, name: name.to_owned(), times, what });
    }

    fn heals(&self) {
        self.faults.lock().unwrap().clear();
    }

    async fn fault(&self, verb: &str, name: &Name) -> object_store::Result<Option<What>> {
        let what = {
            let mut faults = self.faults.lock().unwrap();
            let fault = faults.iter_mut().find(|f| f.verb == verb && f.times > 0 && name.as_ref().starts_with(&f.name));
            fault.map(|fault| {
                fault.times -= 1;
                fault.what
            })
        };
        match what {
            Some(What::Busy) => {
                Err(StoreError::Generic { store: "test", source: "503 Service Unavailable\nhtml \u{1b}[2J".into() })
            }
            Some(What::Denied) => Err(StoreError::PermissionDenied { path: name.to_string(), source: "403".into() }),
            Some(What::Slow) => {
                tokio::time::sleep(Duration::from_secs(600)).await;
                Ok(None)
            }
            what => Ok(what),
        }
    }

    fn bytes(&self, name: &str) -> Vec<u8> {
        let get = async { self.inner.get(&Name::from(name)).await.unwrap().bytes().await.unwrap().to_vec() };
        now(get)
    }

    fn write(&self, name: &str, bytes: &[u8]) {
        now(self.inner.put(&Name::from(name), PutPayload::from(bytes.to_vec()))).unwrap();
    }

    fn names(&self) -> BTreeSet<String> {
        let list = self.inner.list(None).map_ok(|meta| meta.location.to_string()).try_collect::<BTreeSet<_>>();
        now(list).unwrap()
    }

    fn take_puts(&self) -> Vec<String> {
        std::mem::take(&mut self.puts.lock().unwrap())
    }

    fn open(&self) -> Remote {
        self.try_open().unwrap()
    }

    fn try_open(&self) -> crate::error::Result<Remote> {
        let limits = Limits {
            answer: Duration::from_millis(200),
            put: Duration::from_millis(200),
            pause: Duration::from_millis(1),
            ..Limits::default()
        };
        Remote::with_backend(Arc::new(self.clone()), "test remote".into(), false, limits)
    }
}

#[async_trait]
impl ObjectStore for Faulty {
    async fn put_opts(&self, name: &Name, payload: PutPayload, options: PutOptions) -> object_store::Result<PutResult> {
        self.fault("put", name).await?;
        self.puts.lock().unwrap().push(name.to_string());
        self.inner.put_opts(name, payload, options).await
    }

    async fn put_multipart_opts(
        &self,
        name: &Name,
        options: PutMultipartOptions,
    ) -> object_store::Result<Box<dyn MultipartUpload>> {
        self.fault("put", name).await?;
        self.puts.lock().unwrap().push(name.to_string());
        self.inner.put_multipart_opts(name, options).await
    }

    async fn get_opts(&self, name: &Name, options: GetOptions) -> object_store::Result<GetResult> {
        let fault = self.fault("get", name).await?;
        let mut result = self.inner.get_opts(name, options).await?;
        let Some(what) = fault else { return Ok(result) };
        let payload = std::mem::replace(&mut result.payload, GetResultPayload::Stream(stream::empty().boxed()));
        let GetResultPayload::Stream(payload) = payload else { panic!("a stream") };
        let mut bytes = payload.try_collect::<Vec<_>>().await?.concat();
        let mut chunks = Vec::new();
        match what {
            What::UntilArgs(at) => {
                bytes.truncate(at);
                chunks.push(Ok(bytes.into()));
                chunks.push(Err(StoreError::Generic { store: "test", source: "connection reset".into() }));
            }
            What::More => {
                bytes.extend(b"more");
                chunks.push(Ok(bytes.into()));
            }
            _ => {
                bytes[0] ^= 1;
                chunks.push(Ok(bytes.into()));
            }
        }
        result.payload = GetResultPayload::Stream(stream::iter(chunks).boxed());
        Ok(result)
    }

    fn delete_stream(
        &self,
        names: BoxStream<'static, object_store::Result<Name>>,
    ) -> BoxStream<'static, object_store::Result<Name>> {
        self.inner.delete_stream(names)
    }

    fn list(&self, prefix: Option<&Name>) -> BoxStream<'static, object_store::Result<ObjectMeta>> {
        let (own, prefix) = (self.clone(), prefix.cloned().unwrap_or_default());
        stream::once(async move {
            own.fault("list", &prefix).await?;
            Ok::<_, StoreError>(own.inner.list(Some(&prefix)))
        })
        .try_flatten()
        .boxed()
    }

    async fn list_with_delimiter(&self, prefix: Option<&Name>) -> object_store::Result<ListResult> {
        self.inner.list_with_delimiter(prefix).await
    }

    async fn copy_opts(&self, from: &Name, to: &Name, options: CopyOptions) -> object_store::Result<()> {
        self.inner.copy_opts(from, to, options).await
    }
}

/// Waits for something that a store in memory does.
fn now<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
}

const ALWAYS: u32 = u32::MAX;

/// A store with one recorded artifact.
fn made(n: u64, files: &[(&str, &[u8])]) -> (TestSpace, ActionRecord) {
    let space = TestSpace::new();
    let made = record(n, space.commit(files).0);
    space.store.record(&made).unwrap();
    (space, made)
}

fn push(remote: &Remote, space: &TestSpace, keys: &[Key]) -> super::PushSummary {
    remote.push(&space.store, keys, false, &|_, _| {}).unwrap()
}

fn fetch(remote: &Remote, space: &TestSpace, digest: Digest) -> FetchSummary {
    let request = ArtifactRequest { digest, artifact_type: "Anything".into(), needed: true };
    remote.fetch_artifacts(&space.store, &[request], &|_, _| {}).unwrap()
}

/// An empty remote with one recorded artifact in it.
fn remote_with(files: &[(&str, &[u8])]) -> (Faulty, ActionRecord) {
    let (space, made) = made(1, files);
    let faulty = Faulty::default();
    assert_eq!(push(&faulty.open(), &space, &[made.key]).records, 1);
    faulty.take_puts();
    (faulty, made)
}

/// No file but folders, the version and the locks of a store.
fn is_bare(space: &TestSpace) -> bool {
    let below = |folder: &str| fs::read_dir(space.store.root().join(folder)).unwrap().flatten();
    let blobs = below("blobs").flat_map(|shard| fs::read_dir(shard.path()).unwrap()).count();
    blobs == 0 && below("artifacts").count() == 0 && below("actions").count() == 0
}

const FILES: [(&str, &[u8]); 4] =
    [("rows", b"some bytes"), ("twice", b"some bytes"), ("deep/er/file", b"other"), ("empty", b"")];

#[test]
fn another_store_gets_the_bytes_and_the_record() {
    let (faulty, made) = remote_with(&FILES);
    let (here, remote) = (TestSpace::new(), faulty.open());
    assert_eq!(remote.lookup(&made.key), Some(made.digest));
    assert!(remote.has_artifact(&made.digest));
    assert_eq!(remote.fetch_records(&here.store, &[(made.key, made.digest)]).unwrap(), 0);
    let moved = fetch(&remote, &here, made.digest);
    assert_eq!((moved.artifacts, moved.bytes, moved.failed), (1, 15, 0));
    assert_eq!(here.store.action(&made.key).unwrap(), Some(made.clone()));
    assert_eq!(here.store.presence(&made.digest).unwrap(), Presence::Intact);
    for (name, bytes) in FILES {
        assert_eq!(fs::read(here.store.artifact_folder(&made.digest).join(name)).unwrap(), bytes, "{name}");
    }
    let found = crate::store::verify(&here.store).unwrap();
    assert!(found.is_intact() && found.unlisted_files.is_empty() && found.leftovers.is_empty(), "{found:?}");
    assert_eq!(remote.take_warnings(), [""; 0]);
    // Nothing is fetched twice.
    let before = remote.requests();
    assert_eq!(fetch(&remote, &here, made.digest).bytes, 0);
    assert_eq!(remote.requests() - before, 1, "the manifest");
}

#[test]
fn planning_costs_two_requests_for_any_number_of_stages() {
    let (space, faulty) = (TestSpace::new(), Faulty::default());
    let mut keys = Vec::new();
    for n in 0..150 {
        let made = record(n, space.commit(&[("n", n.to_string().as_bytes())]).0);
        space.store.record(&made).unwrap();
        keys.push((made.key, made.digest));
    }
    let remote = faulty.open();
    assert_eq!(push(&remote, &space, &keys.iter().map(|(key, _)| *key).collect::<Vec<_>>()).records, 150);
    let remote = faulty.open();
    for (key, digest) in &keys {
        assert_eq!(remote.lookup(key), Some(*digest));
        assert!(remote.has_artifact(digest));
    }
    assert_eq!(remote.requests(), 2);
}

#[test]
fn interrupted_or_refused_transfers_resume() {
    for (verb, what) in
        [("get", What::UntilArgs(3)), ("get", What::UntilArgs(0)), ("get", What::Busy), ("get", What::Slow)]
    {
        let (faulty, made) = remote_with(&FILES);
        let (here, remote) = (TestSpace::new(), faulty.open());
        faulty.fails(verb, &blob_name(&Digest::of(b"some bytes")), 2, what);
        let moved = fetch(&remote, &here, made.digest);
        assert_eq!((moved.artifacts, moved.failed), (1, 0), "{what:?}");
        assert_eq!(here.store.presence(&made.digest).unwrap(), Presence::Intact);
        assert_eq!(remote.take_warnings(), [""; 0]);
    }
    // The same while opening and while uploading.
    let (space, made) = made(1, &FILES);
    let faulty = Faulty::default();
    faulty.fails("list", "index", 2, What::Busy);
    faulty.fails("put", "", 2, What::Busy);
    assert_eq!(push(&faulty.open(), &space, &[made.key]).records, 1);
}

#[test]
fn an_unavailable_remote_causes_one_warning_and_no_further_requests() {
    for what in [What::Busy, What::Slow] {
        let (faulty, made) = remote_with(&FILES);
        let (here, remote) = (TestSpace::new(), faulty.open());
        faulty.fails("get", "", ALWAYS, what);
        let clock = Instant::now();
        assert_eq!(fetch(&remote, &here, made.digest).failed, 1);
        assert_eq!(remote.fetch_records(&here.store, &[(made.key, made.digest)]).unwrap(), 1);
        assert!(clock.elapsed() < Duration::from_secs(20));
        let before = remote.requests();
        assert_eq!(
            (remote.lookup(&made.key), remote.has_artifact(&made.digest), remote.can_write()),
            (None, false, false)
        );
        assert_eq!(push(&remote, &here, &[made.key]), super::PushSummary::default());
        assert_eq!(remote.requests(), before);
        let warnings = remote.take_warnings();
        assert!(warnings.len() == 1 && warnings[0].contains("continuing without the remote"), "{warnings:?}");
        assert!(!warnings[0].contains('\n'), "{warnings:?}");
        assert!(is_bare(&here));
    }
    let faulty = Faulty::default();
    faulty.fails("list", "", ALWAYS, What::Busy);
    assert_eq!(faulty.try_open().unwrap_err().exit_code(), 3);
}

#[test]
fn wrong_bytes_cause_a_warning_and_are_never_stored() {
    let rows = blob_name(&Digest::of(b"some bytes"));
    for what in [What::Flip, What::More] {
        let (faulty, made) = remote_with(&FILES);
        for name in [rows.clone(), blob_name(&made.digest)] {
            let (here, remote) = (TestSpace::new(), faulty.open());
            faulty.fails("get", &name, ALWAYS, what);
            assert_eq!(fetch(&remote, &here, made.digest).failed, 1);
            faulty.heals();
            let warnings = remote.take_warnings();
            assert!(warnings.len() == 1 && warnings[0].contains("failed a check"), "{warnings:?}");
            assert_eq!(here.store.presence(&made.digest).unwrap(), Presence::Missing);
            assert!(!here.store.has_blob(&Digest::of(b"some bytes")).unwrap());
            assert!(!remote.has_artifact(&made.digest), "it is refused from now on");
            let leftovers = crate::store::verify(&here.store).unwrap().leftovers;
            assert!(leftovers.is_empty(), "{leftovers:?}");
        }
        // One bad transfer is not the end.
        let (here, remote) = (TestSpace::new(), faulty.open());
        faulty.fails("get", &rows, 1, what);
        assert_eq!(fetch(&remote, &here, made.digest).failed, 0);
    }
}

#[test]
fn an_upload_replaces_bytes_that_failed_a_check() {
    let (faulty, made) = remote_with(&FILES);
    let (right, other) = (blob_name(&Digest::of(b"some bytes")), blob_name(&made.digest));
    faulty.write(&right, b"same bytes");
    faulty.write(&other, b"no manifest");
    let (here, remote) = (TestSpace::new(), faulty.open());
    assert_eq!(fetch(&remote, &here, made.digest).failed, 1);
    faulty.write(&other, &manifest_of(&made, &FILES).to_bytes());
    let remote_again = faulty.open();
    assert_eq!(fetch(&remote_again, &here, made.digest).failed, 1);
    // The stage is made again here, and its upload repairs the remote.
    here.commit(&FILES);
    here.store.record(&made).unwrap();
    assert_eq!(push(&remote_again, &here, &[made.key]).present, 1);
    assert_eq!(faulty.bytes(&right), b"some bytes");
    let (there, remote) = (TestSpace::new(), faulty.open());
    assert_eq!(fetch(&remote, &there, made.digest).failed, 0);
}

fn manifest_of(made: &ActionRecord, files: &[(&str, &[u8])]) -> Manifest {
    let (space, _) = self::made(1, files);
    space.store.open_artifact(&made.digest).unwrap().manifest
}

#[test]
fn records_are_accepted_only_with_their_seal_at_their_key() {
    let (faulty, made) = remote_with(&FILES);
    let name = record_name(&made.key);
    let whole = String::from_utf8(faulty.bytes(&name)).unwrap();
    let (_, twin) = self::made(2, &FILES);
    let changed = whole.replace("\"here\"", "\"hero\"");
    let other_digest = whole.replace(&made.digest.to_string(), &Digest::of(b"x").to_string());
    assert!(changed != whole && other_digest != whole);
    for bad in ["", "{}", &whole[..whole.len() / 2], &changed, &other_digest] {
        faulty.write(&name, bad.as_bytes());
        let (here, remote) = (TestSpace::new(), faulty.open());
        assert_eq!(remote.fetch_records(&here.store, &[(made.key, made.digest)]).unwrap(), 1);
        assert!(is_bare(&here));
        assert_eq!(remote.lookup(&made.key), None);
        let warnings = remote.take_warnings();
        assert!(warnings.len() == 1 && warnings[0].contains("failed a check"), "{warnings:?}");
    }
    // A whole record of another key, and an index that gives another digest.
    faulty.write(&record_name(&twin.key), whole.as_bytes());
    faulty.write(&index::name(&twin.key, &made.digest), b"");
    faulty.write(&name, whole.as_bytes());
    let (here, remote) = (TestSpace::new(), faulty.open());
    assert_eq!(remote.fetch_records(&here.store, &[(twin.key, made.digest)]).unwrap(), 1);
    assert_eq!(remote.fetch_records(&here.store, &[(made.key, Digest::of(b"y"))]).unwrap(), 1);
    assert!(is_bare(&here));
}

#[test]
fn names_in_an_index_or_a_manifest_never_leave_the_store() {
    let (faulty, made) = remote_with(&FILES);
    let shape = manifest_of(&made, &FILES);
    let entry = FileEntry { bytes: 10, digest: Digest::of(b"some bytes"), executable: false };
    let long = "x".repeat(300);
    let bad = [
        "../out",
        "/tmp/out",
        "a/../../out",
        "a/./b",
        "",
        "a//b",
        "a/",
        "..",
        ".",
        "manifest.json",
        "a\0b",
        &long,
        "rows/below",
    ];
    let mut shapes: Vec<Manifest> = Vec::new();
    for name in bad {
        let mut manifest = shape.clone();
        manifest.files.insert(name.to_owned(), entry.clone());
        shapes.push(manifest);
        let mut manifest = shape.clone();
        manifest.folders.insert(name.to_owned());
        shapes.push(manifest);
    }
    // Another type than the stage's, and a size that is not the blob's.
    shapes.push(Manifest { artifact_type: "Model".into(), ..shape.clone() });
    let mut manifest = shape.clone();
    manifest.files.insert("rows".into(), FileEntry { bytes: u64::MAX / 4, ..entry.clone() });
    for manifest in shapes {
        let digest = manifest.digest();
        faulty.write(&blob_name(&digest), &manifest.to_bytes());
        let (here, remote) = (TestSpace::new(), faulty.open());
        assert_eq!(fetch(&remote, &here, digest).failed, 1, "{manifest:?}");
        assert!(is_bare(&here) && !here.folder.path().join("out").exists(), "{manifest:?}");
    }
    // Larger than the disk: an error before anything is fetched.
    let digest = manifest.digest();
    faulty.write(&blob_name(&digest), &manifest.to_bytes());
    let (here, remote) = (TestSpace::new(), faulty.open());
    let request = ArtifactRequest { digest, artifact_type: "Anything".into(), needed: true };
    let error = remote.fetch_artifacts(&here.store, &[request], &|_, _| {}).unwrap_err();
    assert!(error.message.contains("bytes free"), "{error}");
    for name in ["index/../x", "index/zz-00", "index/-", "index/a/b/c", "index/no-dash"] {
        assert_eq!(index::parse(name), None);
    }
    assert_eq!(index::parse(&index::name(&made.key, &made.digest)), Some((made.key, made.digest)));
    // Bytes that are a manifest, but not in its one form.
    let text = String::from_utf8(shape.to_bytes()).unwrap().replace("  ", " ");
    faulty.write(&blob_name(&Digest::of(text.as_bytes())), text.as_bytes());
    assert_eq!(fetch(&faulty.open(), &TestSpace::new(), Digest::of(text.as_bytes())).failed, 1);
    assert_eq!(Facts::default(), shape.facts);
}

#[test]
fn of_two_writers_one_wins_and_the_other_is_warned() {
    let faulty = Faulty::default();
    let (first, one) = made(1, &[("a", b"1")]);
    let (second, two) = made(1, &[("a", b"2")]);
    assert_eq!(one.key, two.key);
    let (to_first, to_second) = (faulty.open(), faulty.open());
    let pushed = std::thread::scope(|scope| {
        let a = scope.spawn(|| push(&to_first, &first, &[one.key]));
        let b = scope.spawn(|| push(&to_second, &second, &[two.key]));
        [a.join().unwrap(), b.join().unwrap()]
    });
    assert_eq!(pushed.iter().map(|p| p.records).sum::<u64>(), 1);
    assert_eq!(pushed.iter().map(|p| p.conflicts).sum::<u64>(), 1);
    let warnings = [to_first.take_warnings(), to_second.take_warnings()].concat();
    assert!(warnings.len() == 1 && warnings[0].contains("another result of the same recipe"), "{warnings:?}");
    let winner = faulty.open().lookup(&one.key).unwrap();
    assert_eq!(winner, if pushed[0].records == 1 { one.digest } else { two.digest });
    let here = TestSpace::new();
    assert_eq!(faulty.open().fetch_records(&here.store, &[(one.key, winner)]).unwrap(), 0);
    // A store that has its own record keeps it.
    let loser = if winner == one.digest { &second } else { &first };
    assert_eq!(faulty.open().fetch_records(&loser.store, &[(one.key, winner)]).unwrap(), 1);
    // Two that agree are no news.
    let (third, three) = made(1, &[("a", b"1")]);
    let again = push(&faulty.open(), if winner == one.digest { &third } else { &second }, &[three.key]);
    assert_eq!((again.records, again.present), (0, 1));
}

#[test]
fn an_interrupted_upload_sends_only_the_rest() {
    let (space, made) = made(1, &[("a", b"first"), ("b", b"second")]);
    let faulty = Faulty::default();
    let remote = faulty.open();
    faulty.fails("put", &record_name(&made.key), ALWAYS, What::Busy);
    assert_eq!(push(&remote, &space, &[made.key]).failed, 1);
    assert!(faulty.names().iter().all(|name| !name.starts_with("index/")), "no record, no entry");
    faulty.heals();
    faulty.take_puts();
    let remote = faulty.open();
    let pushed = remote.push(&space.store, &[made.key], true, &|_, _| {}).unwrap();
    assert_eq!((pushed.records, pushed.files), (1, 0));
    assert!(!faulty.take_puts().contains(&blob_name(&Digest::of(b"first"))));
    // A record whose entry of the index is lost gets it back.
    let faulty_again = Faulty::default();
    for name in faulty.names().iter().filter(|name| !name.starts_with("index/")) {
        faulty_again.write(name, &faulty.bytes(name));
    }
    let remote = faulty_again.open();
    assert_eq!(remote.lookup(&made.key), None);
    assert_eq!(push(&remote, &space, &[made.key]).present, 1);
    assert_eq!(faulty_again.open().lookup(&made.key), Some(made.digest));
}

#[test]
fn large_files_are_sent_and_fetched_in_parts() {
    let bytes: Vec<u8> = (0..(9 << 20) + 5_u32).map(|n| (n % 251) as u8).collect();
    let (faulty, made) = remote_with(&[("large", &bytes)]);
    let (here, remote) = (TestSpace::new(), faulty.open());
    faulty.fails("get", &blob_name(&Digest::of(&bytes)), 5, What::UntilArgs(3 << 20));
    assert_eq!(fetch(&remote, &here, made.digest).failed, 0);
    assert_eq!(fs::read(here.store.artifact_folder(&made.digest).join("large")).unwrap(), bytes);
}

#[test]
fn a_remote_that_may_not_be_written_to_is_still_read() {
    for what in [What::Denied, What::Busy] {
        let (faulty, made) = remote_with(&FILES);
        let (space, own) = self::made(7, &[("a", b"own")]);
        faulty.fails("put", "", ALWAYS, what);
        let remote = faulty.open();
        assert_eq!(push(&remote, &space, &[own.key]).failed, 1);
        assert!(!remote.can_write());
        assert_eq!(push(&remote, &space, &[own.key]), super::PushSummary::default());
        let warnings = remote.take_warnings();
        assert!(warnings.len() == 1 && warnings[0].contains("nothing is uploaded"), "{warnings:?}");
        assert_eq!(fetch(&remote, &space, made.digest).failed, 0);
    }
}

#[test]
fn a_damaged_artifact_here_is_replaced_and_never_uploaded() {
    let (faulty, made) = remote_with(&FILES);
    let (space, _) = self::made(1, &FILES);
    let file = space.store.artifact_folder(&made.digest).join("rows");
    fs::remove_file(&file).unwrap();
    fs::write(&file, b"SOME bytes").unwrap();
    assert!(matches!(space.store.presence(&made.digest).unwrap(), Presence::Damaged { .. }));
    let empty = Faulty::default();
    assert_eq!(push(&empty.open(), &space, &[made.key]).failed, 1);
    assert_eq!(empty.names().len(), 0);
    assert_eq!(fetch(&faulty.open(), &space, made.digest).failed, 0);
    assert_eq!(space.store.presence(&made.digest).unwrap(), Presence::Intact);
    let made_again = space.store.record(&made).unwrap();
    assert_eq!(made_again, RecordResult::Same);
}

#[test]
fn a_remote_that_refuses_is_told_from_one_that_is_down() {
    for (what, transient) in [(What::Denied, false), (What::Busy, true)] {
        let (faulty, _) = remote_with(&[("own", b"one")]);
        faulty.fails("list", "index", 99, what);
        let error = faulty.try_open().unwrap_err();
        assert_eq!((error.exit_code(), error.transient), (3, transient), "{error}");
    }
}

#[test]
fn a_remote_of_a_newer_layout_is_not_touched() {
    let faulty = Faulty::default();
    faulty.write("temper-remote.json", b"{\"temper_remote\": 2}");
    assert_eq!(faulty.try_open().unwrap_err().exit_code(), 2);
    faulty.write("temper-remote.json", b"<html>");
    assert_eq!(faulty.try_open().unwrap_err().exit_code(), 3);
}

#[test]
fn addresses_hold_no_credentials() {
    let base = Path::new("/base");
    for (text, shown) in [
        ("shared", "/base/shared"),
        ("/abs", "/abs"),
        ("file:///a/b", "/a/b"),
        ("s3://bucket/a/b", "s3://bucket/a/b"),
        ("gs://bucket", "gs://bucket"),
        ("az://container/x", "az://container/x"),
        ("https://host:8080/x", "https://host:8080/x"),
    ] {
        assert_eq!(Address::parse(text, base).unwrap().to_string(), shown);
    }
    for text in [
        "",
        "s3://user:hunter2@bucket/x",
        "https://hunter2@host/x",
        "https://host/x?sig=hunter2",
        "https://host/x#hunter2",
        "ftp://host/hunter2",
        "s3:///hunter2",
        "file://host/hunter2",
        "https://hunter2:[",
    ] {
        let error = Address::parse(text, base).unwrap_err();
        assert_eq!(error.exit_code(), 2, "{text}");
        let secret = text.contains('@') || text.contains('?') || text.contains('#') || text.contains('[');
        assert!(!secret || !error.to_string().contains("hunter2"), "{error}");
    }
}

#[test]
fn a_remote_is_no_local_store_and_does_not_overlap_with_one() {
    let space = TestSpace::new();
    let open = |path: &Path| Remote::open(&Address::Folder(path.to_owned()), &space.store, false);
    let root = space.store.root();
    for path in [root, &root.join("blobs"), root.parent().unwrap()] {
        assert_eq!(open(path).unwrap_err().exit_code(), 2, "{}", path.display());
    }
    let other = tempfile::tempdir().unwrap();
    assert!(open(other.path()).unwrap().can_write());
    let error = open(&other.path().join("none")).unwrap_err();
    assert!(error.message.contains("the folder does not exist") && error.exit_code() == 3, "{error}");
}
