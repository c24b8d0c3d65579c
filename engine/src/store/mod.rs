//! The artifact store: blobs, artifacts, action records, locks.

mod adopt;
mod commit;
mod content;
pub(crate) mod files;
mod index;
mod lease;
mod lock;
mod pins;
mod probe;
mod read;
mod record;
mod timings;
mod verify;
mod work;

#[cfg(test)]
pub(crate) mod tests;

use std::fs;
use std::path::{Path, PathBuf};

pub(crate) use adopt::{BlobError, BlobWriter, RecordFile, check_manifest, check_record};
pub use content::ExternalContent;
pub use lease::Lease;
pub use lock::{CollectionGuard, KeyLock, LockHolder};
pub use pins::{Pin, PinnedResult};
pub use probe::{FileSystemSupport, probe_file_system};
pub use read::{Artifact, Presence};
pub use record::{ActionRecord, JobName, Platform, Provenance, RecordResult, Resolution, resolve_conflict};
pub use timings::{Timing, Timings};
pub use verify::{DamagedFile, VerifyReport, repair, verify};
pub use work::AttemptFolder;

use crate::disk;
use crate::error::{AtPath, Error, Result};
use crate::names::{Digest, Key};
pub(crate) use files::Stat;
use index::StatIndex;

/// The version of the store layout that this program reads and writes.
pub const VERSION: u32 = 1;

/// The folder that contains all artifacts. Any number of processes may have one store open.
///
/// ```text
/// version               the layout's version
/// blobs/ab/cdef…        files by digest, read-only
/// artifacts/<digest>/   manifest.json and the files, hard links to blobs or copies
/// actions/<key>.json    action records
/// work/<key>/           checkpoints/ and one new folder per attempt
/// requests/             answers to paid requests
/// runs/<id>/            journal, plan, logs, report
/// locks/                one file per key, empty unless the lock is held; leases of attempts on other machines; `gc`: held
///                       while results are deleted
/// pins/<name>.json      results that garbage collection keeps; absent without pins
/// quarantine/           damaged files and artifacts, each with a note
/// index                 (device, inode, size, mtime, ctime of inputs) -> digest; may be deleted
/// timings               seconds that stages took; may be deleted
/// ```
#[derive(Debug)]
pub struct Store {
    root: PathBuf,
    index: StatIndex,
}

impl Store {
    /// Opens the store at `root`, creating it if there is none.
    ///
    /// # Errors
    /// When a newer temper made the store (user error), or the disk fails.
    pub fn open(root: &Path) -> Result<Self> {
        let root = validated_root(root)?;
        disk::create_dir_all(&root).at(&root)?;
        check_empty(&root)?;
        check_version(&root)?;
        for folder in FOLDERS {
            let folder = root.join(folder);
            // A link to a folder elsewhere was made by the user; keep it.
            if files::metadata_if_exists(&folder)?.is_some_and(|found| !found.is_dir()) && !folder.is_dir() {
                files::move_to_quarantine(&root, &folder, "this path is reserved for a folder of the store")?;
            }
            if !folder.is_dir()
                && let Err(e) = disk::create_dir(&folder)
                && e.kind() != std::io::ErrorKind::AlreadyExists
            {
                return Err(e).at(&folder);
            }
        }
        for file in ["index", "timings"] {
            quarantine_if_not_file(&root, &root.join(file))?;
        }
        let index = StatIndex::new(root.join("index"), root.join("locks/index"));
        Ok(Self { root, index })
    }

    /// Opens the store at `root`; `None` if there is none and one can be created there. Creates nothing.
    ///
    /// # Errors
    /// As [`Store::open`].
    pub fn open_existing(root: &Path) -> Result<Option<Self>> {
        let root = validated_root(root)?;
        if is_store(&root) {
            return Self::open(&root).map(Some);
        }
        if root.exists() {
            check_empty(&root)?;
        }
        Ok(None)
    }

    /// Always absolute.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// Whether runs can be added to the store; false on a disk that is mounted read-only.
    pub fn is_writable(&self) -> bool {
        files::is_writable(&self.runs())
    }

    /// One folder per run.
    pub fn runs(&self) -> PathBuf {
        self.root.join("runs")
    }

    /// Answers to paid requests; no part of the store deletes them.
    pub fn requests(&self) -> PathBuf {
        self.root.join("requests")
    }

    /// The folder of an artifact, if the store has it.
    pub fn artifact_folder(&self, digest: &Digest) -> PathBuf {
        self.root.join("artifacts").join(digest.to_string())
    }

    pub(crate) fn blobs(&self) -> PathBuf {
        self.root.join("blobs")
    }

    /// Removes files that were deleted from the stat index.
    pub(crate) fn forget(&self, stats: &[Stat]) -> Result<()> {
        self.index.forget(stats)
    }

    pub(crate) fn work_root(&self) -> PathBuf {
        self.root.join("work")
    }

    pub(crate) fn artifacts(&self) -> PathBuf {
        self.root.join("artifacts")
    }

    pub(crate) fn blob(&self, digest: &Digest) -> PathBuf {
        let name = digest.to_string();
        let (shard, rest) = name.split_at(2);
        self.blobs().join(shard).join(rest)
    }

    pub(crate) fn action_file(&self, key: &Key) -> PathBuf {
        self.root.join("actions").join(format!("{key}.json"))
    }
}

const FOLDERS: [&str; 8] = ["quarantine", "blobs", "artifacts", "actions", "work", "requests", "runs", "locks"];

/// The absolute path of a store; an error if no store can be there.
fn validated_root(root: &Path) -> Result<PathBuf> {
    let root = std::path::absolute(root).at(root)?;
    if root.to_str().is_none() {
        return Err(Error::environment(format!("{}: the path of a store must be UTF-8", root.display()))
            .help("choose another folder with `--store FOLDER`"));
    }
    if root.exists() && !root.is_dir() {
        return Err(Error::user(format!("{}: expected the folder of a store, found a file", root.display()))
            .help("choose another folder with `--store FOLDER`"));
    }
    Ok(root)
}

/// Moves a path that is not a readable file into the quarantine; on a read-only disk it stays, and is treated as
/// missing.
fn quarantine_if_not_file(root: &Path, path: &Path) -> Result<()> {
    if files::open_if_file(path)?.is_none() && files::metadata_if_exists(path)?.is_some() && files::is_writable(root) {
        files::move_to_quarantine(root, path, "this path is reserved for a file of the store")?;
    }
    Ok(())
}

/// Refuses a non-empty folder that is not a store; hidden files and a README (`README.md`, `.gitignore`) are allowed.
fn check_empty(root: &Path) -> Result<()> {
    let mut foreign = None;
    for entry in fs::read_dir(root).at(root)? {
        let name = entry.at(root)?.file_name().to_string_lossy().into_owned();
        // A crash during the creation of a store leaves only temporary files, whose names are hidden.
        if !name.starts_with('.') && !name.starts_with("README") {
            foreign = Some(name);
            break;
        }
    }
    match foreign {
        // Check for a store last: another process may be creating it, and writes the version before anything else.
        Some(name) if !is_store(root) => {
            Err(Error::user(format!("{}: not a store, and not empty (it contains `{name}`)", root.display()))
                .help("choose a store or a new folder with `--store FOLDER`"))
        }
        _ => Ok(()),
    }
}

/// Whether the folder has a version or the folders of a store; a store whose version file is lost or damaged is still a
/// store.
fn is_store(root: &Path) -> bool {
    root.join("version").is_file() || ["artifacts", "actions", "blobs"].iter().all(|folder| root.join(folder).is_dir())
}

/// Writes the version of a new store, or checks the version of an existing one. An unreadable version file is replaced,
/// because only one version has existed so far.
fn check_version(root: &Path) -> Result<()> {
    let path = &root.join("version");
    quarantine_if_not_file(root, path)?;
    let found = files::read_if_file(path)?.unwrap_or_default();
    if found.is_empty() {
        return match files::metadata_if_exists(path)? {
            Some(_) if !files::is_writable(root) => Ok(()),
            _ => files::write_atomically(path, format!("{VERSION}\n").as_bytes()),
        };
    }
    let found = String::from_utf8_lossy(&found);
    match found.trim().parse::<u32>() {
        Ok(VERSION) => Ok(()),
        Ok(version) if version > VERSION => Err(Error::user(format!(
            "{}: the store has version {version}, but this temper reads version {VERSION}",
            path.display()
        ))
        .help("use the newer temper that created it, or another store (`--store FOLDER`)")),
        _ => Err(Error::user(format!(
            "{}: expected the version of a store (this temper reads version {VERSION}), found `{}`",
            path.display(),
            found.trim()
        ))
        .help("check that this is a store, or choose another folder with `--store FOLDER`")),
    }
}
