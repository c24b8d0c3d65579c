//! The artifact store: blobs, artifacts, action records, locks. Knows no graph and decides nothing.

mod commit;
mod content;
mod crash;
pub(crate) mod files;
mod index;
mod lock;
mod read;
mod record;
mod timings;
mod verify;
mod work;

#[cfg(test)]
pub(crate) mod tests;

use std::fs;
use std::path::{Path, PathBuf};

pub use content::Content;
pub use lock::{Holder, KeyLock};
pub use read::{Artifact, Presence};
pub use record::{ActionRecord, Platform, Provenance, Recorded, Settled, settle};
pub use timings::Timings;
pub use verify::{Broken, Report, verify};
pub use work::AttemptFolder;

use crate::error::{At, Error, Result};
use crate::names::{Digest, Key};
use index::StatIndex;

/// The layout that this program reads and writes.
pub const VERSION: u32 = 1;

/// The folder where artifacts land. Any number of processes may hold one store open.
///
/// ```text
/// version               the layout's version
/// blobs/ab/cdef…        files by digest, read-only
/// artifacts/<digest>/   manifest.json and the files, hard links to blobs or copies
/// actions/<key>.json    action records
/// work/<key>/           checkpoints/ and one fresh folder per attempt
/// requests/             paid answers
/// runs/<id>/            journal, plan, logs, report
/// locks/                one file per key; empty unless somebody holds it
/// quarantine/           what was found rotten, each with a note
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
    /// When a newer temper made the store (yours), or the disk fails.
    pub fn open(root: &Path) -> Result<Self> {
        let root = std::path::absolute(root).at(root)?;
        if root.exists() && !root.is_dir() {
            return Err(Error::yours(format!("{}: a store is a folder, this is a file", root.display()))
                .help("name another with `--store FOLDER`"));
        }
        fs::create_dir_all(&root).at(&root)?;
        check_empty(&root)?;
        check_version(&root.join("version"))?;
        for folder in ["blobs", "artifacts", "actions", "work", "requests", "runs", "locks", "quarantine"] {
            let folder = root.join(folder);
            match fs::create_dir(&folder) {
                Err(e) if e.kind() != std::io::ErrorKind::AlreadyExists => return Err(e).at(&folder),
                _ => (),
            }
        }
        let index = StatIndex::new(root.join("index"), root.join("locks/index"));
        Ok(Self { root, index })
    }

    /// Absolute.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// One folder per run.
    pub fn runs(&self) -> PathBuf {
        self.root.join("runs")
    }

    /// Paid answers; nothing in the store deletes them.
    pub fn requests(&self) -> PathBuf {
        self.root.join("requests")
    }

    /// Where an artifact lies if the store has it.
    pub fn artifact_folder(&self, digest: &Digest) -> PathBuf {
        self.root.join("artifacts").join(digest.to_string())
    }

    pub(crate) fn artifacts(&self) -> PathBuf {
        self.root.join("artifacts")
    }

    pub(crate) fn blob(&self, digest: &Digest) -> PathBuf {
        let name = digest.to_string();
        let (shard, rest) = name.split_at(2);
        self.root.join("blobs").join(shard).join(rest)
    }

    pub(crate) fn action_file(&self, key: &Key) -> PathBuf {
        self.root.join("actions").join(format!("{key}.json"))
    }
}

/// A folder without a version becomes a store only if it holds nothing of anybody's; notes (`README.md`, `.gitignore`) may lie
/// there.
fn check_empty(root: &Path) -> Result<()> {
    let mut strange = None;
    for entry in fs::read_dir(root).at(root)? {
        let name = entry.at(root)?.file_name().to_string_lossy().into_owned();
        // What a crash in the making of a store may leave is temporary, and hidden.
        if !name.starts_with('.') && !name.starts_with("README") {
            strange = Some(name);
            break;
        }
    }
    match strange {
        // The version is looked for last: another process may be making the store, which writes it before anything else.
        Some(name) if !root.join("version").exists() => {
            Err(Error::yours(format!("{}: not a store, and not empty (it holds `{name}`)", root.display()))
                .help("name the folder of a store, or a new one, with `--store FOLDER`"))
        }
        _ => Ok(()),
    }
}

/// Writes the version of a new store, checks that of an old one.
fn check_version(path: &Path) -> Result<()> {
    let found = match fs::read_to_string(path) {
        Ok(text) if !text.is_empty() => text,
        Ok(_) => return files::write_atomically(path, format!("{VERSION}\n").as_bytes()),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return files::write_atomically(path, format!("{VERSION}\n").as_bytes());
        }
        Err(e) => return Err(e).at(path),
    };
    match found.trim().parse::<u32>() {
        Ok(VERSION) => Ok(()),
        Ok(version) if version > VERSION => Err(Error::yours(format!(
            "{}: the store has version {version}, this temper reads version {VERSION}",
            path.display()
        ))
        .help("use the newer temper that made it, or another store (`--store DIR`)")),
        _ => Err(Error::yours(format!(
            "{}: expected the version of a store (this temper reads version {VERSION}), found `{}`",
            path.display(),
            found.trim()
        ))
        .help("is this the folder of a store? name another with `--store DIR`")),
    }
}
