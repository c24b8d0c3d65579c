//! Adds records, manifests and blobs from other stores. Nothing enters the store before all its bytes are checked: blobs
//! and manifests against their digests, a record against its seal and key.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::PathBuf;

use super::commit::MANIFEST;
use super::files::{self, Stat, TemporaryPath};
use super::{ActionRecord, Presence, RecordResult, Store, record};
use crate::artifact::Manifest;
use crate::disk;
use crate::document::matrix::is_label;
use crate::error::{AtPath, Error, Result};
use crate::names::{Digest, Key};

/// Maximum length of a file's name in a manifest, and of each of its parts, in bytes.
const MAX_PATH_BYTES: usize = 2048;
const MAX_PART_BYTES: usize = 255;

/// A record with the bytes of its file.
#[derive(Clone, Debug)]
pub(crate) struct RecordFile {
    pub record: ActionRecord,
    pub bytes: Vec<u8>,
}

/// Why a blob was not added.
#[derive(Debug)]
pub(crate) enum BlobError {
    /// Its bytes do not match its digest.
    Mismatch(String),
    /// The local disk failed.
    Disk(Error),
}

impl From<Error> for BlobError {
    fn from(error: Error) -> Self {
        Self::Disk(error)
    }
}

/// Checks the bytes of a record's file: seal, key, and the names in it.
///
/// # Errors
/// Describes what is wrong.
pub(crate) fn check_record(key: &Key, bytes: &[u8]) -> Result<RecordFile, String> {
    let record = record::parse(key, bytes).ok_or("its seal, its key or its format is wrong")?;
    match record.provenance.stage.labels.iter().find(|label| !is_label(label)) {
        Some(label) => Err(format!("`{label}` cannot be the label of a stage")),
        None => Ok(RecordFile { record, bytes: bytes.to_vec() }),
    }
}

/// Checks the bytes of a manifest: digest, canonical form, and that no name leaves the artifact's folder.
///
/// # Errors
/// Describes what is wrong.
pub(crate) fn check_manifest(digest: &Digest, bytes: &[u8]) -> Result<Manifest, String> {
    if Digest::of(bytes) != *digest {
        return Err("its bytes do not match its digest".to_owned());
    }
    let manifest: Manifest = serde_json::from_slice(bytes).map_err(|e| format!("not a manifest: {e}"))?;
    // The store serialises the manifest again, which must give the same bytes.
    if manifest.to_bytes() != bytes {
        return Err("not in the canonical form of a manifest".to_owned());
    }
    let names = manifest.files.keys().chain(&manifest.folders);
    if let Some((name, fault)) = names.clone().find_map(|name| Some((name, name_fault(name)?))) {
        return Err(format!("a name that {fault}: {name:?}"));
    }
    for name in names {
        let above = name.match_indices('/').map(|(at, _)| &name[..at]);
        let file = above.chain(manifest.folders.contains(name).then_some(name.as_str()));
        if let Some(file) = file.into_iter().find(|above| manifest.files.contains_key(*above)) {
            return Err(format!("{file:?} is both a file and a folder"));
        }
    }
    Ok(manifest)
}

fn name_fault(name: &str) -> Option<&'static str> {
    if name == MANIFEST {
        return Some("is the manifest's own");
    }
    if name.len() > MAX_PATH_BYTES || name.split('/').any(|part| part.len() > MAX_PART_BYTES) {
        return Some("is too long");
    }
    if name.split('/').any(|part| matches!(part, "" | "." | "..")) || name.contains('\0') {
        return Some("may leave the artifact's folder");
    }
    None
}

impl Store {
    /// The bytes of the record's file at `key`; `None` if there is no readable record.
    pub(crate) fn record_file(&self, key: &Key) -> Result<Option<RecordFile>> {
        let Some(bytes) = files::read_if_file(&self.action_file(key))? else { return Ok(None) };
        Ok(record::parse(key, &bytes).map(|record| RecordFile { record, bytes }))
    }

    /// Writes a checked record unless the key has one. Its artifact may be missing: a record is valid until the bytes
    /// are needed.
    pub(crate) fn adopt_record(&self, file: &RecordFile) -> Result<RecordResult> {
        self.put_record(&file.record, &file.bytes)
    }

    /// Whether there is an intact blob with this digest; a damaged one is quarantined.
    pub(crate) fn has_blob(&self, digest: &Digest) -> Result<bool> {
        let blob = self.blob(digest);
        let Some(metadata) = files::metadata_if_exists(&blob)? else { return Ok(false) };
        if metadata.is_file() && self.has_digest(&blob, &Stat::from(&metadata), digest)? {
            return Ok(true);
        }
        self.quarantine_file(&blob, "the bytes of this blob do not match its digest")?;
        Ok(false)
    }

    /// Starts a blob of `bytes` bytes; [`BlobWriter::finish`] adds it to the store.
    pub(crate) fn create_blob(&self, digest: &Digest, bytes: u64) -> Result<BlobWriter> {
        let blob = self.blob(digest);
        let shard = blob.parent().unwrap_or(&blob);
        disk::create_dir_all(shard).at(shard)?;
        let name = files::temporary_name(&blob);
        let file = disk::create_new(&name).at(&name)?;
        let temporary = TemporaryPath::new(name.clone());
        let hasher = blake3::Hasher::new();
        Ok(BlobWriter { blob, name, file, temporary, hasher, digest: *digest, expected: bytes, received: 0 })
    }

    /// Adds an artifact whose blobs are in the store. `stats`: those of blobs that were just received.
    pub(crate) fn adopt_artifact(
        &self,
        digest: &Digest,
        manifest: &Manifest,
        stats: &BTreeMap<Digest, Stat>,
    ) -> Result<()> {
        if self.presence(digest)? == Presence::Intact {
            return Ok(());
        }
        let own = manifest.files.values().filter_map(|entry| Some((*stats.get(&entry.digest)?, entry.digest)));
        self.assemble(digest, manifest, own.collect())
    }

    /// Bytes that may still be written to the store's file system.
    pub(crate) fn free_bytes(&self) -> Result<u64> {
        let found = rustix::fs::statvfs(self.root()).map_err(std::io::Error::from).at(self.root())?;
        Ok(found.f_bavail.saturating_mul(found.f_frsize))
    }
}

/// Writes a blob under a temporary name while it is received.
pub(crate) struct BlobWriter {
    blob: PathBuf,
    name: PathBuf,
    file: File,
    temporary: TemporaryPath,
    hasher: blake3::Hasher,
    digest: Digest,
    expected: u64,
    received: u64,
}

impl BlobWriter {
    /// Bytes received so far.
    pub fn received(&self) -> u64 {
        self.received
    }

    /// Appends bytes.
    ///
    /// # Errors
    /// When there are more bytes than expected, or the disk fails.
    pub fn write(&mut self, bytes: &[u8]) -> Result<(), BlobError> {
        self.received += bytes.len() as u64;
        if self.received > self.expected {
            return Err(BlobError::Mismatch(format!("more than {} bytes", self.expected)));
        }
        self.hasher.update(bytes);
        Ok(disk::write_all(&self.file, &self.name, bytes).at(&self.name)?)
    }

    /// Adds the blob to the store. The next commit that uses the blob syncs it.
    ///
    /// # Errors
    /// When its bytes do not match its digest, or the disk fails.
    pub fn finish(self) -> Result<Stat, BlobError> {
        if self.received != self.expected || Digest::from(self.hasher.finalize()) != self.digest {
            return Err(BlobError::Mismatch("its bytes do not match its digest".to_owned()));
        }
        files::make_read_only(&self.name)?;
        let stat = Stat::from(&self.file.metadata().at(&self.name)?);
        disk::rename(&self.name, &self.blob).at(&self.blob)?;
        self.temporary.keep();
        Ok(stat)
    }
}
