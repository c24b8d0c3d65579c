//! Uploads records and artifacts of the local store.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::PathBuf;

use futures::{StreamExt, stream};

use super::client::RemoteError;
use super::{
    MARKER, MAX_LISTED, MAX_MANIFEST, MAX_RECORD, Marker, OnProgress, Remote, VERSION, blob_name, index, record_name,
};
use crate::artifact::Manifest;
use crate::error::{Error, Result};
use crate::names::{Digest, Key};
use crate::store::{Presence, RecordFile, Store};

/// From this number of blobs on, one listing replaces a request for each blob.
const MIN_BLOBS_TO_LIST: usize = 64;
/// Smaller files are sent without first checking whether the remote has them.
const MIN_BYTES_TO_CHECK: u64 = 64 << 10;

/// The result of an upload.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct PushSummary {
    /// Records that are new in the remote.
    pub records: u64,
    /// Records that the remote already had.
    pub present: u64,
    /// Files sent, not counting manifests.
    pub files: u64,
    pub bytes: u64,
    /// Records whose key has another digest in the remote, which keeps it; each has a warning.
    pub conflicts: u64,
    /// Records that could not be uploaded; each has a warning.
    pub failed: u64,
}

/// A record to upload, with its artifact.
struct UploadItem {
    file: RecordFile,
    manifest: Manifest,
    /// Whether the remote's copy could not be fetched or failed a check, so that its files are replaced.
    suspect: bool,
}

/// A file to upload.
struct UploadFile {
    path: PathBuf,
    bytes: u64,
    replace: bool,
}

/// The objects of a remote, each with its size.
type Listing = HashMap<String, u64>;

impl Remote {
    /// Uploads the records at these keys with their artifacts: files, then the manifest, then the record, so that a
    /// record names only files that exist. Existing files are skipped, so an interrupted upload can be repeated.
    /// `thorough`: also checks, by a listing, the files of records that the index names.
    ///
    /// # Errors
    /// When the local disk fails.
    pub fn push(&self, store: &Store, keys: &[Key], thorough: bool, on_progress: OnProgress) -> Result<PushSummary> {
        let mut pushed = PushSummary::default();
        if !self.can_write() {
            return Ok(pushed);
        }
        let mut items = Vec::new();
        for key in keys {
            let Some(file) = store.record_file(key)? else { continue };
            let digest = file.record.digest;
            let suspect = self.is_suspect(key, &digest);
            match self.listed(key) {
                Some(existing) if existing != digest => {
                    self.warn_about_conflict(&file, &existing);
                    pushed.conflicts += 1;
                    continue;
                }
                Some(_) if !thorough && !suspect => {
                    pushed.present += 1;
                    continue;
                }
                _ => {}
            }
            if store.presence(&digest)? != Presence::Intact {
                self.warn(format!("{}: not uploaded: its artifact is not in this store", file.record.provenance.stage));
                pushed.failed += 1;
                continue;
            }
            let manifest = store.open_artifact(&digest)?.manifest;
            // Other stores would refuse to read them.
            if file.bytes.len() as u64 > MAX_RECORD || manifest.to_bytes().len() as u64 > MAX_MANIFEST {
                self.warn(format!("{}: not uploaded: too many files", file.record.provenance.stage));
                pushed.failed += 1;
                continue;
            }
            items.push(UploadItem { file, manifest, suspect });
        }
        if items.is_empty() {
            return Ok(pushed);
        }
        match self.block_on(self.push_items(store, items, thorough, on_progress, &mut pushed)) {
            Ok(()) => Ok(pushed),
            Err(RemoteError::Local(error)) => Err(error),
            Err(error) => {
                self.report_upload_error(&error);
                pushed.failed = keys.len() as u64 - pushed.records - pushed.present - pushed.conflicts;
                Ok(pushed)
            }
        }
    }

    async fn push_items(
        &self,
        store: &Store,
        mut items: Vec<UploadItem>,
        thorough: bool,
        on_progress: OnProgress<'_>,
        pushed: &mut PushSummary,
    ) -> Result<(), RemoteError> {
        self.write_marker().await?;
        let mut files = self.files(store, &items);
        let existing = match thorough || files.len() >= MIN_BLOBS_TO_LIST {
            true => Some(self.listing("blobs").await?),
            false => None,
        };
        if let Some(existing) = &existing {
            files.retain(|digest, file| file.replace || existing.get(&blob_name(digest)) != Some(&file.bytes));
        }
        if let (true, Some(existing)) = (thorough, &existing) {
            let records = self.listing("records").await?;
            let before = items.len();
            items.retain(|item| item.suspect || !self.is_listed(item, existing, &records));
            pushed.present += (before - items.len()) as u64;
        }
        let missing: HashSet<Digest> = self.send_files(&files, existing.as_ref(), on_progress, pushed).await?;
        let parallel = self.client.limits().parallel;
        let complete = |item: &&UploadItem| !item.manifest.files.values().any(|entry| missing.contains(&entry.digest));
        let mut sent =
            stream::iter(items.iter().filter(complete)).map(|item| self.send_record(item)).buffer_unordered(parallel);
        pushed.failed += items.iter().filter(|item| !complete(item)).count() as u64;
        while let Some(outcome) = sent.next().await {
            match outcome? {
                RecordUpload::New => pushed.records += 1,
                RecordUpload::Present => pushed.present += 1,
                RecordUpload::Conflict => pushed.conflicts += 1,
                RecordUpload::Failed => pushed.failed += 1,
            }
        }
        Ok(())
    }

    async fn listing(&self, folder: &str) -> Result<Listing, RemoteError> {
        Ok(self.client.list(folder, MAX_LISTED).await?.into_iter().collect())
    }

    /// Whether the remote has the item's record, its index entry and its manifest.
    fn is_listed(&self, item: &UploadItem, blobs: &Listing, records: &Listing) -> bool {
        let record = &item.file.record;
        self.listed(&record.key) == Some(record.digest)
            && records.contains_key(&record_name(&record.key))
            && blobs.get(&blob_name(&record.digest)) == Some(&(item.manifest.to_bytes().len() as u64))
    }

    /// Whether the remote's record or artifact could not be fetched or failed a check.
    fn is_suspect(&self, key: &Key, digest: &Digest) -> bool {
        let state = self.state();
        state.refused_keys.contains(key) || state.refused.contains(digest)
    }

    /// Writes the marker of a new remote.
    async fn write_marker(&self) -> Result<(), RemoteError> {
        if !self.state().has_marker {
            let marker = serde_json::to_vec(&Marker { temper_remote: VERSION }).expect("a marker is plain data");
            self.client.put(MARKER, marker, false).await?;
            self.state().has_marker = true;
        }
        Ok(())
    }

    fn files(&self, store: &Store, items: &[UploadItem]) -> BTreeMap<Digest, UploadFile> {
        let mut files: BTreeMap<Digest, UploadFile> = BTreeMap::new();
        let state = self.state();
        for item in items {
            let folder = store.artifact_folder(&item.file.record.digest);
            for (name, entry) in &item.manifest.files {
                let replace = item.suspect || state.refused.contains(&entry.digest);
                let new = UploadFile { path: folder.join(name), bytes: entry.bytes, replace };
                files.entry(entry.digest).or_insert(new).replace |= replace;
            }
        }
        files
    }

    /// Sends files. Returns those that the remote still lacks.
    async fn send_files(
        &self,
        files: &BTreeMap<Digest, UploadFile>,
        existing: Option<&Listing>,
        on_progress: OnProgress<'_>,
        pushed: &mut PushSummary,
    ) -> Result<HashSet<Digest>, RemoteError> {
        let total: u64 = files.values().map(|file| file.bytes).sum();
        let done = Cell::new(0);
        let send = |(digest, file): (&Digest, &UploadFile)| {
            let (digest, path, bytes, done) = (*digest, file.path.clone(), file.bytes, &done);
            // A listed file of another size is replaced, too.
            let replace = file.replace || existing.is_some_and(|existing| existing.contains_key(&blob_name(&digest)));
            async move {
                let name = blob_name(&digest);
                let check = !replace && existing.is_none() && bytes >= MIN_BYTES_TO_CHECK;
                let present = check && self.client.size(&name).await? == Some(bytes);
                if !present {
                    self.client.put_blob(&digest, &path, bytes, replace).await?;
                }
                done.set(done.get() + bytes);
                on_progress(done.get(), total);
                Ok::<_, RemoteError>((digest, bytes, !present))
            }
        };
        let mut sent = stream::iter(files).map(send).buffer_unordered(self.client.limits().parallel);
        let mut missing: HashSet<Digest> = files.keys().copied().collect();
        while let Some(outcome) = sent.next().await {
            match outcome {
                Ok((digest, bytes, sent)) => {
                    missing.remove(&digest);
                    self.state().refused.remove(&digest);
                    pushed.files += u64::from(sent);
                    pushed.bytes += if sent { bytes } else { 0 };
                }
                // A file of this store changed: only its artifact is not uploaded.
                Err(RemoteError::Local(error)) => self.warn(format!("not uploaded: {}", error.message)),
                Err(error) => return Err(error),
            }
        }
        Ok(missing)
    }

    async fn send_record(&self, item: &UploadItem) -> Result<RecordUpload, RemoteError> {
        let RecordFile { record, bytes } = &item.file;
        let (key, digest) = (record.key, record.digest);
        self.client.put(&blob_name(&digest), item.manifest.to_bytes(), item.suspect).await?;
        self.state().refused.remove(&digest);
        let name = record_name(&key);
        let created = self.client.put(&name, bytes.clone(), false).await?;
        if !created {
            match self.record(&key).await {
                Ok(first) if first.record.digest == digest => {}
                Ok(first) => {
                    self.warn_about_conflict(&item.file, &first.record.digest);
                    return Ok(RecordUpload::Conflict);
                }
                Err(error @ RemoteError::Invalid(_)) => {
                    self.refuse_key(&key, &error);
                    self.warn(format!("{name}: delete it from the remote, then `temper push` uploads it again"));
                    return Ok(RecordUpload::Failed);
                }
                Err(error) => return Err(error),
            }
        }
        // A crash before this leaves a record that no listing shows; the next upload adds the entry.
        self.client.put(&index::name(&key, &digest), Vec::new(), false).await?;
        let mut state = self.state();
        state.refused_keys.remove(&key);
        state.artifacts.insert(digest);
        state.index.iter_mut().for_each(|index| {
            index.insert(key, digest);
        });
        Ok(if created { RecordUpload::New } else { RecordUpload::Present })
    }

    /// The digest that the index gives for a key, even if the key is refused.
    fn listed(&self, key: &Key) -> Option<Digest> {
        self.state().index.as_ref()?.get(key).copied()
    }

    fn warn_about_conflict(&self, own: &RecordFile, existing: &Digest) {
        self.warn(format!(
            "{}: the remote has another result of the same recipe ({} instead of {}); each store keeps its own",
            own.record.provenance.stage,
            existing.short(),
            own.record.digest.short()
        ));
    }

    /// Warns why nothing more is uploaded.
    fn report_upload_error(&self, error: &RemoteError) {
        match error {
            RemoteError::Denied(why) => {
                self.may_write.store(false, std::sync::atomic::Ordering::Relaxed);
                self.warn(format!("{}: it cannot be written to, so nothing is uploaded: {why}", self.client));
            }
            error => self.warn_about("an upload", error),
        }
    }

    /// Checks that the remote may be written to, for a command that only uploads.
    ///
    /// # Errors
    /// When it is read-only.
    pub fn check_writable(&self) -> Result<()> {
        match self.can_write() {
            true => Ok(()),
            false => Err(Error::user(format!("{}: this remote is read-only", self.client)).help(
                "remove `read_only` from the pipeline file, or choose another remote; remotes over HTTP are always read-only",
            )),
        }
    }
}

/// The result of uploading one record.
enum RecordUpload {
    New,
    Present,
    /// The remote has another digest for the key.
    Conflict,
    /// The remote has a damaged record there.
    Failed,
}
