//! Takes in records, manifests and blobs that were made elsewhere. Nothing of them enters the store before all its
//! bytes were checked: a blob against its name, a manifest against its digest, a record against its seal and key.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::PathBuf;

use super::commit::MANIFEST;
use super::files::{self, Stat, Temporary};
use super::{ActionRecord, Presence, Recorded, Store, record};
use crate::artifact::Manifest;
use crate::error::{At, Error, Result};
use crate::names::{Digest, Key};
use crate::spec::matrix::is_label;

/// Maximum length of a file's name in a manifest, and of each of its parts, in bytes.
const LONGEST_PATH: usize = 2048;
const LONGEST_PART: usize = 255;

/// A record that was made elsewhere, with the bytes of its file.
#[derive(Clone, Debug)]
pub(crate) struct Foreign {
    pub record: ActionRecord,
    pub bytes: Vec<u8>,
}

/// Why a blob was not taken in.
#[derive(Debug)]
pub(crate) enum Refused {
    /// Its bytes are not those of its name.
    Wrong(String),
    /// The local disk failed.
    Disk(Error),
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self::Disk(error)
    }
}

/// Checks the bytes of a record's file: seal, key, and the names in it.
///
/// # Errors
/// Describes what is wrong.
pub(crate) fn check_record(key: &Key, bytes: &[u8]) -> Result<Foreign, String> {
    let record = record::parse(key, bytes).ok_or("its seal, its key or its format is wrong")?;
    match record.provenance.stage.labels.iter().find(|label| !is_label(label)) {
        Some(label) => Err(format!("`{label}` is no label of a stage")),
        None => Ok(Foreign { record, bytes: bytes.to_vec() }),
    }
}

/// Checks the bytes of a manifest: digest, canonical form, and that no name leaves the artifact's folder.
///
/// # Errors
/// Describes what is wrong.
pub(crate) fn check_manifest(digest: &Digest, bytes: &[u8]) -> Result<Manifest, String> {
    if Digest::of(bytes) != *digest {
        return Err("its bytes are not those of its digest".to_owned());
    }
    let manifest: Manifest = serde_json::from_slice(bytes).map_err(|e| format!("it is no manifest: {e}"))?;
    // The store writes the manifest anew, so its bytes must not depend on who wrote it.
    if manifest.to_bytes() != bytes {
        return Err("it is written in another form than this temper's".to_owned());
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
    if name.len() > LONGEST_PATH || name.split('/').any(|part| part.len() > LONGEST_PART) {
        return Some("is too long");
    }
    if name.split('/').any(|part| matches!(part, "" | "." | "..")) || name.contains('\0') {
        return Some("may leave the artifact's folder");
    }
    None
}

impl Store {
    /// The bytes of the record's file at `key`; `None` if there is no readable record.
    pub(crate) fn record_file(&self, key: &Key) -> Result<Option<Foreign>> {
        let Some(bytes) = files::read_if_there(&self.action_file(key))? else { return Ok(None) };
        Ok(record::parse(key, &bytes).map(|record| Foreign { record, bytes }))
    }

    /// Writes a checked record unless the key has one. Its artifact may be missing: a record is valid until the bytes
    /// are needed.
    pub(crate) fn adopt_record(&self, foreign: &Foreign) -> Result<Recorded> {
        self.put_record(&foreign.record, &foreign.bytes)
    }

    /// Whether there is an intact blob with this digest; a damaged one is quarantined.
    pub(crate) fn has_blob(&self, digest: &Digest) -> Result<bool> {
        let blob = self.blob(digest);
        let Some(metadata) = files::look(&blob)? else { return Ok(false) };
        if metadata.is_file() && self.has_digest(&blob, &Stat::from(&metadata), digest)? {
            return Ok(true);
        }
        self.quarantine_file(&blob, "a blob whose bytes are not those of its digest")?;
        Ok(false)
    }

    /// Begins a blob of `bytes` bytes; [`Arriving::finish`] puts it into the store.
    pub(crate) fn receive(&self, digest: &Digest, bytes: u64) -> Result<Arriving> {
        let blob = self.blob(digest);
        let shard = blob.parent().unwrap_or(&blob);
        fs::create_dir_all(shard).at(shard)?;
        let name = files::fresh_name(&blob);
        let file = File::create_new(&name).at(&name)?;
        let temporary = Temporary::new(name.clone());
        let hasher = blake3::Hasher::new();
        Ok(Arriving { blob, name, file, temporary, hasher, digest: *digest, expected: bytes, got: 0 })
    }

    /// Makes an artifact whose blobs are in the store. `notes` as in [`Store::assemble`].
    pub(crate) fn adopt_artifact(
        &self,
        digest: &Digest,
        manifest: &Manifest,
        notes: &BTreeMap<Digest, Stat>,
    ) -> Result<()> {
        if self.presence(digest)? == Presence::Whole {
            return Ok(());
        }
        let own = manifest.files.values().filter_map(|entry| Some((*notes.get(&entry.digest)?, entry.digest)));
        self.assemble(digest, manifest, own.collect())
    }

    /// Bytes that may still be written to the store's file system.
    pub(crate) fn free_bytes(&self) -> Result<u64> {
        let found = rustix::fs::statvfs(self.root()).map_err(std::io::Error::from).at(self.root())?;
        Ok(found.f_bavail.saturating_mul(found.f_frsize))
    }
}

/// A blob that is being received, under a temporary name.
pub(crate) struct Arriving {
    blob: PathBuf,
    name: PathBuf,
    file: File,
    temporary: Temporary,
    hasher: blake3::Hasher,
    digest: Digest,
    expected: u64,
    got: u64,
}

impl Arriving {
    /// Bytes received so far.
    pub fn got(&self) -> u64 {
        self.got
    }

    /// Adds a piece.
    ///
    /// # Errors
    /// When there are more bytes than expected, or the disk fails.
    pub fn write(&mut self, piece: &[u8]) -> Result<(), Refused> {
        self.got += piece.len() as u64;
        if self.got > self.expected {
            return Err(Refused::Wrong(format!("more than {} bytes", self.expected)));
        }
        self.hasher.update(piece);
        Ok(self.file.write_all(piece).at(&self.name)?)
    }

    /// Puts the blob into the store. The next commit that uses the blob syncs it.
    ///
    /// # Errors
    /// When its bytes are not those of its digest, or the disk fails.
    pub fn finish(self) -> Result<Stat, Refused> {
        if self.got != self.expected || Digest::from(self.hasher.finalize()) != self.digest {
            return Err(Refused::Wrong("its bytes are not those of its name".to_owned()));
        }
        files::make_read_only(&self.name)?;
        let stat = Stat::from(&self.file.metadata().at(&self.name)?);
        fs::rename(&self.name, &self.blob).at(&self.blob)?;
        self.temporary.keep();
        Ok(stat)
    }
}
