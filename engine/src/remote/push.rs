//! Uploads records and artifacts of the local store.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;

use futures::{StreamExt, stream};

use super::wire::Trouble;
use super::{
    MARKER, MAX_LISTED, MAX_MANIFEST, MAX_RECORD, Marker, OnProgress, Remote, VERSION, blob_name, index, record_name,
};
use crate::artifact::Manifest;
use crate::error::{Error, Result};
use crate::names::{Digest, Key};
use crate::store::{Foreign, Presence, Store};

/// From this number of blobs on, one listing tells which are there, in place of a request for each.
const LIST_FROM: usize = 64;
/// Smaller files are sent without asking whether they are there.
const ASK_FROM: u64 = 64 << 10;

/// The result of an upload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Pushed {
    /// Records that are new in the remote.
    pub records: u64,
    /// Records that it had.
    pub present: u64,
    /// Files sent, without manifests.
    pub files: u64,
    pub bytes: u64,
    /// Records whose key has another digest in the remote, which stays there; each has a warning.
    pub other: u64,
    /// Records that could not be uploaded; each has a warning.
    pub failed: u64,
}

/// A record to upload, with its artifact.
struct Item {
    foreign: Foreign,
    manifest: Manifest,
    /// Whether the remote's copy could not be had, or failed a check: its files are replaced.
    doubtful: bool,
}

/// A file to upload.
struct File {
    path: PathBuf,
    bytes: u64,
    replace: bool,
}

/// The objects of a remote, each with its size.
type Listing = HashMap<String, u64>;

impl Remote {
    /// Uploads the records at these keys with their artifacts: files, then the manifest, then the record, so that a
    /// record names only what is there. Files that are there are skipped, so an upload that was cut off can be repeated.
    /// `thorough`: checks by a listing that all files are there, also those of records that the index names.
    ///
    /// # Errors
    /// When the local disk fails.
    pub fn push(&self, store: &Store, keys: &[Key], thorough: bool, on_progress: OnProgress) -> Result<Pushed> {
        let mut pushed = Pushed::default();
        if !self.can_write() {
            return Ok(pushed);
        }
        let mut items = Vec::new();
        for key in keys {
            let Some(foreign) = store.record_file(key)? else { continue };
            let digest = foreign.record.digest;
            let doubtful = self.is_doubtful(key, &digest);
            match self.listed(key) {
                Some(there) if there != digest => {
                    self.warn_of_other(&foreign, &there);
                    pushed.other += 1;
                    continue;
                }
                Some(_) if !thorough && !doubtful => {
                    pushed.present += 1;
                    continue;
                }
                _ => {}
            }
            if store.presence(&digest)? != Presence::Whole {
                self.warn(format!(
                    "{}: not uploaded: its artifact is not in this store",
                    foreign.record.provenance.stage
                ));
                pushed.failed += 1;
                continue;
            }
            let manifest = store.open_artifact(&digest)?.manifest;
            // Nobody would read them.
            if foreign.bytes.len() as u64 > MAX_RECORD || manifest.to_bytes().len() as u64 > MAX_MANIFEST {
                self.warn(format!("{}: not uploaded: too many files", foreign.record.provenance.stage));
                pushed.failed += 1;
                continue;
            }
            items.push(Item { foreign, manifest, doubtful });
        }
        if items.is_empty() {
            return Ok(pushed);
        }
        match self.block_on(self.push_items(store, items, thorough, on_progress, &mut pushed)) {
            Ok(()) => Ok(pushed),
            Err(Trouble::Here(error)) => Err(error),
            Err(trouble) => {
                self.note_trouble(&trouble);
                pushed.failed = keys.len() as u64 - pushed.records - pushed.present - pushed.other;
                Ok(pushed)
            }
        }
    }

    async fn push_items(
        &self,
        store: &Store,
        mut items: Vec<Item>,
        thorough: bool,
        on_progress: OnProgress<'_>,
        pushed: &mut Pushed,
    ) -> Result<(), Trouble> {
        self.mark().await?;
        let mut files = self.files(store, &items);
        let there = match thorough || files.len() >= LIST_FROM {
            true => Some(self.listing("blobs").await?),
            false => None,
        };
        if let Some(there) = &there {
            files.retain(|digest, file| file.replace || there.get(&blob_name(digest)) != Some(&file.bytes));
        }
        if let (true, Some(there)) = (thorough, &there) {
            let records = self.listing("records").await?;
            let before = items.len();
            items.retain(|item| item.doubtful || !self.is_listed(item, there, &records));
            pushed.present += (before - items.len()) as u64;
        }
        let lacking: HashSet<Digest> = self.send_files(&files, there.as_ref(), on_progress, pushed).await?;
        let parallel = self.wire.limits().parallel;
        let whole = |item: &&Item| !item.manifest.files.values().any(|entry| lacking.contains(&entry.digest));
        let mut sent =
            stream::iter(items.iter().filter(whole)).map(|item| self.send_record(item)).buffer_unordered(parallel);
        pushed.failed += items.iter().filter(|item| !whole(item)).count() as u64;
        while let Some(outcome) = sent.next().await {
            match outcome? {
                Sent::New => pushed.records += 1,
                Sent::Present => pushed.present += 1,
                Sent::Other => pushed.other += 1,
                Sent::Failed => pushed.failed += 1,
            }
        }
        Ok(())
    }

    async fn listing(&self, folder: &str) -> Result<Listing, Trouble> {
        Ok(self.wire.list(folder, MAX_LISTED).await?.into_iter().collect())
    }

    /// Whether the record of an item, its entry in the index and its manifest are there.
    fn is_listed(&self, item: &Item, blobs: &Listing, records: &Listing) -> bool {
        let record = &item.foreign.record;
        self.listed(&record.key) == Some(record.digest)
            && records.contains_key(&record_name(&record.key))
            && blobs.get(&blob_name(&record.digest)) == Some(&(item.manifest.to_bytes().len() as u64))
    }

    /// Whether the remote's record or artifact could not be had, or failed a check.
    fn is_doubtful(&self, key: &Key, digest: &Digest) -> bool {
        let state = self.state();
        state.refused_keys.contains(key) || state.refused.contains(digest)
    }

    /// Writes the marker of a new remote.
    async fn mark(&self) -> Result<(), Trouble> {
        if !self.state().marked {
            let marker = serde_json::to_vec(&Marker { temper_remote: VERSION }).expect("a marker is plain data");
            self.wire.put(MARKER, marker, false).await?;
            self.state().marked = true;
        }
        Ok(())
    }

    fn files(&self, store: &Store, items: &[Item]) -> BTreeMap<Digest, File> {
        let mut files: BTreeMap<Digest, File> = BTreeMap::new();
        let state = self.state();
        for item in items {
            let folder = store.artifact_folder(&item.foreign.record.digest);
            for (name, entry) in &item.manifest.files {
                let replace = item.doubtful || state.refused.contains(&entry.digest);
                let new = File { path: folder.join(name), bytes: entry.bytes, replace };
                files.entry(entry.digest).or_insert(new).replace |= replace;
            }
        }
        files
    }

    /// Sends files. Returns those that the remote still lacks.
    async fn send_files(
        &self,
        files: &BTreeMap<Digest, File>,
        there: Option<&Listing>,
        on_progress: OnProgress<'_>,
        pushed: &mut Pushed,
    ) -> Result<HashSet<Digest>, Trouble> {
        let total: u64 = files.values().map(|file| file.bytes).sum();
        let done = Cell::new(0);
        let send = |(digest, file): (&Digest, &File)| {
            let (digest, path, bytes, done) = (*digest, file.path.clone(), file.bytes, &done);
            // One of another size is replaced, too.
            let replace = file.replace || there.is_some_and(|there| there.contains_key(&blob_name(&digest)));
            async move {
                let name = blob_name(&digest);
                let ask = !replace && there.is_none() && bytes >= ASK_FROM;
                let present = ask && self.wire.size(&name).await? == Some(bytes);
                if !present {
                    self.wire.put_blob(&digest, &path, bytes, replace).await?;
                }
                done.set(done.get() + bytes);
                on_progress(done.get(), total);
                Ok::<_, Trouble>((digest, bytes, !present))
            }
        };
        let mut sent = stream::iter(files).map(send).buffer_unordered(self.wire.limits().parallel);
        let mut lacking: HashSet<Digest> = files.keys().copied().collect();
        while let Some(outcome) = sent.next().await {
            match outcome {
                Ok((digest, bytes, sent)) => {
                    lacking.remove(&digest);
                    self.state().refused.remove(&digest);
                    pushed.files += u64::from(sent);
                    pushed.bytes += if sent { bytes } else { 0 };
                }
                // A file of this store that changed: only its artifact is left out.
                Err(Trouble::Here(error)) => self.warn(format!("not uploaded: {}", error.message)),
                Err(trouble) => return Err(trouble),
            }
        }
        Ok(lacking)
    }

    async fn send_record(&self, item: &Item) -> Result<Sent, Trouble> {
        let Foreign { record, bytes } = &item.foreign;
        let (key, digest) = (record.key, record.digest);
        self.wire.put(&blob_name(&digest), item.manifest.to_bytes(), item.doubtful).await?;
        self.state().refused.remove(&digest);
        let name = record_name(&key);
        let created = self.wire.put(&name, bytes.clone(), false).await?;
        if !created {
            match self.record(&key).await {
                Ok(first) if first.record.digest == digest => {}
                Ok(first) => {
                    self.warn_of_other(&item.foreign, &first.record.digest);
                    return Ok(Sent::Other);
                }
                Err(trouble @ Trouble::Lies(_)) => {
                    self.refuse_key(&key, &trouble);
                    self.warn(format!("{name}: delete it from the remote, then `temper push` uploads it again"));
                    return Ok(Sent::Failed);
                }
                Err(trouble) => return Err(trouble),
            }
        }
        // A crash before this leaves a record that no listing shows; the next upload adds the entry.
        self.wire.put(&index::name(&key, &digest), Vec::new(), false).await?;
        let mut state = self.state();
        state.refused_keys.remove(&key);
        state.artifacts.insert(digest);
        state.index.iter_mut().for_each(|index| {
            index.insert(key, digest);
        });
        Ok(if created { Sent::New } else { Sent::Present })
    }

    /// The digest that the index gives for a key; unlike [`Remote::lookup`] also if it is refused.
    fn listed(&self, key: &Key) -> Option<Digest> {
        self.state().index.as_ref()?.get(key).copied()
    }

    fn warn_of_other(&self, own: &Foreign, there: &Digest) {
        self.warn(format!(
            "{}: the remote has another result of the same recipe ({} in place of {}); both stay where they are",
            own.record.provenance.stage,
            there.short(),
            own.record.digest.short()
        ));
    }

    /// Reports why nothing more is uploaded.
    fn note_trouble(&self, trouble: &Trouble) {
        match trouble {
            Trouble::Denied(why) => {
                self.may_write.store(false, std::sync::atomic::Ordering::Relaxed);
                self.warn(format!("{}: it cannot be written to, so nothing is uploaded: {why}", self.wire));
            }
            trouble => self.warn_of("an upload", trouble),
        }
    }

    /// Checks that the remote may be written to, for a command that only uploads.
    ///
    /// # Errors
    /// When it is read-only.
    pub fn check_writable(&self) -> Result<()> {
        match self.can_write() {
            true => Ok(()),
            false => Err(Error::yours(format!("{}: this remote is read-only", self.wire)).help(
                "remove `read_only` from the pipeline file, or name another remote; over HTTP all are read-only",
            )),
        }
    }
}

/// The fate of one record.
enum Sent {
    New,
    Present,
    /// The remote has another digest for the key.
    Other,
    /// The remote has a damaged record there.
    Failed,
}
