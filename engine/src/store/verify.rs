//! `verify` hashes every file of the store, regardless of the stat index. `repair` quarantines what it found damaged.
//! Other programs may use the store meanwhile.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::Store;
use super::files::{self, Stat};
use crate::error::{AtPath, Result};
use crate::names::{Digest, Key};

/// The result of [`verify`]. The serialised names are those of `temper verify --json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct VerifyReport {
    pub artifacts: u64,
    /// Files hashed; hard links to the same file count once.
    pub files: u64,
    /// Bytes hashed.
    pub bytes: u64,
    pub records: u64,
    /// Artifacts that must be made again.
    #[serde(rename = "rotten")]
    pub damaged: Vec<DamagedFile>,
    /// Blobs whose bytes do not match their name.
    #[serde(rename = "rotten_blobs")]
    pub damaged_blobs: Vec<PathBuf>,
    /// Files in artifacts' folders that no manifest names; they are harmless.
    #[serde(rename = "strangers")]
    pub unlisted_files: Vec<PathBuf>,
    /// Action records that are unreadable or belong to another key.
    pub broken_records: Vec<PathBuf>,
    /// Records whose artifact is not in the store; they are valid until the bytes are needed.
    pub without_artifact: Vec<Key>,
    /// Temporary files and folders left by crashes.
    pub leftovers: Vec<PathBuf>,
}

/// An artifact that differs from its manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DamagedFile {
    pub artifact: Digest,
    /// Relative to the artifact's folder.
    pub file: String,
}

impl VerifyReport {
    /// Whether nothing is damaged.
    pub fn is_intact(&self) -> bool {
        self.damaged.is_empty() && self.damaged_blobs.is_empty() && self.broken_records.is_empty()
    }
}

/// Quarantines what [`verify`] found damaged, so that a run that needs it makes it again. Returns the number of damaged
/// items.
pub fn repair(store: &Store, found: &VerifyReport) -> Result<usize> {
    let mut artifacts: Vec<Digest> = found.damaged.iter().map(|file| file.artifact).collect();
    artifacts.dedup();
    for artifact in &artifacts {
        store.quarantine(artifact)?;
    }
    for path in found.damaged_blobs.iter().filter(|path| fs::symlink_metadata(path).is_ok()) {
        store.quarantine_file(path, "the bytes of this blob do not match its name")?;
    }
    for path in &found.broken_records {
        store.quarantine_file(path, "this action record cannot be read or belongs to another key")?;
    }
    Ok(artifacts.len() + found.damaged_blobs.len() + found.broken_records.len())
}

/// Hashes everything. Removes damaged files from the stat index, so that the next reader notices the damage too.
pub fn verify(store: &Store) -> Result<VerifyReport> {
    let mut verifier = Verifier { store, hashed: HashMap::new(), report: VerifyReport::default() };
    for path in verifier.entries(&store.artifacts())? {
        match digest_of_name(&path) {
            Some(digest) => verifier.artifact(digest, &path)?,
            None => verifier.report.unlisted_files.push(path),
        }
    }
    for shard in verifier.entries(&store.root().join("blobs"))? {
        if !shard.is_dir() {
            verifier.report.damaged_blobs.push(shard);
            continue;
        }
        for path in verifier.entries(&shard)? {
            verifier.blob(path)?;
        }
    }
    for path in verifier.entries(&store.root().join("actions"))? {
        verifier.record(path)?;
    }
    Ok(verifier.report)
}

struct Verifier<'a> {
    store: &'a Store,
    /// By file. The inode alone would not do: that of a deleted file is used again.
    hashed: HashMap<Stat, Digest>,
    report: VerifyReport,
}

impl Verifier<'_> {
    /// The entries of a folder, sorted; temporary ones go to `leftovers` instead.
    fn entries(&mut self, folder: &Path) -> Result<Vec<PathBuf>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(folder).at(folder)? {
            let entry = entry.at(folder)?;
            if files::is_temporary_name(&entry.file_name()) {
                self.report.leftovers.push(entry.path());
            } else {
                entries.push(entry.path());
            }
        }
        entries.sort_unstable();
        Ok(entries)
    }

    fn artifact(&mut self, digest: Digest, folder: &Path) -> Result<()> {
        let Some((damaged, unlisted)) = undisturbed(folder, || self.damaged_and_unlisted(digest, folder))? else {
            return Ok(());
        };
        self.report.artifacts += 1;
        self.report.damaged.extend(damaged.into_iter().map(|file| DamagedFile { artifact: digest, file }));
        self.report.unlisted_files.extend(unlisted.into_iter().map(|name| folder.join(name)));
        Ok(())
    }

    /// The names of an artifact's files that are damaged, and of those that its manifest does not name.
    fn damaged_and_unlisted(&mut self, digest: Digest, folder: &Path) -> Result<(Vec<String>, Vec<String>)> {
        let Ok(artifact) = self.store.open_artifact(&digest) else {
            return Ok((vec![super::commit::MANIFEST.to_owned()], Vec::new()));
        };
        let mut damaged = Vec::new();
        for (name, entry) in artifact.manifest.files {
            if !self.has_digest(&folder.join(&name), &entry.digest)? {
                damaged.push(name);
            }
        }
        Ok((damaged, self.store.unlisted_files(&digest)?))
    }

    fn blob(&mut self, path: PathBuf) -> Result<()> {
        let shard = path.parent().and_then(Path::file_name).unwrap_or_default().to_string_lossy();
        let rest = path.file_name().unwrap_or_default().to_string_lossy();
        let Ok(digest) = format!("{shard}{rest}").parse() else {
            self.report.unlisted_files.push(path);
            return Ok(());
        };
        if undisturbed(&path, || self.has_digest(&path, &digest))? == Some(false) {
            self.report.damaged_blobs.push(path);
        }
        Ok(())
    }

    fn record(&mut self, path: PathBuf) -> Result<()> {
        let key: Option<Key> = path.file_stem().and_then(|name| name.to_str()).and_then(|name| name.parse().ok());
        match undisturbed(&path, || key.map_or(Ok(None), |key| self.store.action(&key)))? {
            Some(Some(record)) => {
                self.report.records += 1;
                if files::metadata_if_exists(&self.store.artifact_folder(&record.digest))?.is_none() {
                    self.report.without_artifact.push(record.key);
                }
            }
            Some(None) => self.report.broken_records.push(path),
            None => (),
        }
        Ok(())
    }

    /// Whether the file at `path` exists and its bytes have this digest.
    fn has_digest(&mut self, path: &Path, digest: &Digest) -> Result<bool> {
        let Some(metadata) = files::metadata_if_exists(path)?.filter(fs::Metadata::is_file) else { return Ok(false) };
        let stat = Stat::from(&metadata);
        let found = match self.hashed.get(&stat) {
            Some(found) => *found,
            None if files::open_if_file(path)?.is_none() => return Ok(false),
            None => {
                let (found, _) = files::hash_file(path)?;
                self.report.files += 1;
                self.report.bytes += stat.size;
                self.hashed.insert(stat, found);
                found
            }
        };
        if found != *digest {
            self.store.index.forget(&[stat])?;
        }
        Ok(found == *digest)
    }
}

/// What `check` finds at `path` while nobody replaces it. `None` if it was removed, for example by a garbage collection:
/// what was found then says nothing about the store.
fn undisturbed<T>(path: &Path, mut check: impl FnMut() -> Result<T>) -> Result<Option<T>> {
    let stat = || files::metadata_if_exists(path).map(|found| found.as_ref().map(Stat::from));
    let mut before = stat()?;
    while before.is_some() {
        let found = check();
        let after = stat()?;
        if after == before {
            return found.map(Some);
        }
        before = after;
    }
    Ok(None)
}

fn digest_of_name(path: &Path) -> Option<Digest> {
    path.file_name()?.to_str()?.parse().ok()
}
