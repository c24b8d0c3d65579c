//! Locks on keys; the kernel releases them when their holders die.

use std::fs::File;
use std::io::Seek;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Store, files};
use crate::disk;
use crate::error::{AtPath, Result};
use crate::names::Key;

/// The holder of a lock, for the messages of waiting processes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct LockHolder {
    /// Process id of the orchestrator.
    pub pid: u32,
    /// The run's id.
    pub run: String,
    /// The instance's name.
    pub stage: String,
}

/// The lock of one key. Held as long as this value exists, or any process that inherited its descriptor.
///
/// The descriptor is closed on exec unless the code that spawns a child clears that flag.
#[derive(Debug)]
pub struct KeyLock {
    file: File,
    path: PathBuf,
}

impl AsFd for KeyLock {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

impl KeyLock {
    /// Writes the holder into the lock file.
    pub fn announce(&self, holder: &LockHolder) -> Result<()> {
        let text = serde_json::to_vec(holder).expect("a holder is plain data");
        let mut file = &self.file;
        disk::set_len(file, &self.path, 0)
            .and_then(|()| file.rewind())
            .and_then(|()| disk::write_all(file, &self.path, &text))
            .at(&self.path)
    }
}

/// Holds off garbage collection, or is the collection itself. Released on drop.
#[derive(Debug)]
pub struct CollectionGuard {
    /// `None` in a store that cannot be written to, where nothing can be deleted either.
    _file: Option<File>,
}

impl Store {
    /// Holds off garbage collection until the guard is dropped; any number of processes may do so at once. Held from
    /// planning until the journal names what the run will use, while files enter the store, and while a pin is set.
    pub fn hold_off_collection(&self) -> Result<CollectionGuard> {
        if !files::is_writable(&self.root().join("locks")) {
            return Ok(CollectionGuard { _file: None });
        }
        let (path, file) = self.open_lock_file(self.collection_lock())?;
        file.lock_shared().at(&path)?;
        Ok(CollectionGuard { _file: Some(file) })
    }

    /// Waits until nobody holds off collection, and keeps others from planning and committing until the guard is
    /// dropped. `on_wait` is called before a wait.
    pub(crate) fn start_collection(&self, on_wait: impl FnOnce()) -> Result<CollectionGuard> {
        let (path, file) = self.open_lock_file(self.collection_lock())?;
        match file.try_lock() {
            Ok(()) => {}
            Err(std::fs::TryLockError::WouldBlock) => {
                on_wait();
                file.lock().at(&path)?;
            }
            Err(std::fs::TryLockError::Error(e)) => return Err(e).at(&path),
        }
        Ok(CollectionGuard { _file: Some(file) })
    }

    /// Locks the key; `None` if another process or thread holds it.
    pub fn try_lock(&self, key: &Key) -> Result<Option<KeyLock>> {
        let (path, file) = self.open_lock_file(self.lock_file(key))?;
        match file.try_lock() {
            Ok(()) => Ok(Some(without_holder(file, path)?)),
            Err(std::fs::TryLockError::WouldBlock) => Ok(None),
            Err(std::fs::TryLockError::Error(e)) => Err(e).at(path),
        }
    }

    /// Locks the key, blocking the thread until it is free.
    pub fn lock(&self, key: &Key) -> Result<KeyLock> {
        let (path, file) = self.open_lock_file(self.lock_file(key))?;
        file.lock().at(&path)?;
        without_holder(file, path)
    }

    fn collection_lock(&self) -> PathBuf {
        self.root().join("locks/gc")
    }

    fn open_lock_file(&self, path: PathBuf) -> Result<(PathBuf, File)> {
        if files::metadata_if_exists(&path)?.is_some_and(|metadata| !metadata.is_file()) {
            self.quarantine_file(&path, "this path is reserved for a lock file")?;
        }
        let file = open(&path)?;
        Ok((path, file))
    }

    /// The holder of the key's lock, if it has announced itself.
    pub fn holder(&self, key: &Key) -> Option<LockHolder> {
        serde_json::from_slice(&files::read_if_file(&self.lock_file(key)).ok()??).ok()
    }

    /// A process that inherited the key's lock and outlived the orchestrator that took it.
    pub fn inheriting_process(&self, key: &Key, holder: &LockHolder) -> Option<String> {
        if Path::new("/proc").join(holder.pid.to_string()).exists() {
            return None;
        }
        let lock = std::fs::canonicalize(self.lock_file(key)).ok()?;
        std::fs::read_dir("/proc").ok()?.flatten().find_map(|process| {
            process.file_name().to_str()?.parse::<u32>().ok()?;
            let mut open = std::fs::read_dir(process.path().join("fd")).ok()?.flatten();
            open.find(|fd| std::fs::read_link(fd.path()).is_ok_and(|to| to == lock))?;
            let name = std::fs::read_to_string(process.path().join("comm")).ok()?;
            Some(format!("process {} `{}`", process.file_name().display(), name.trim_end()))
        })
    }

    // Lock files are never deleted: while a child still holds the descriptor of a deleted one, a second process could
    // lock the key.
    fn lock_file(&self, key: &Key) -> PathBuf {
        self.root().join("locks").join(key.to_string())
    }
}

fn open(path: &Path) -> Result<File> {
    disk::open(File::options().create(true).truncate(false).read(true).write(true), path).at(path)
}

/// Erases the previous holder, which may have been killed.
fn without_holder(file: File, path: PathBuf) -> Result<KeyLock> {
    disk::set_len(&file, &path, 0).at(&path)?;
    Ok(KeyLock { file, path })
}
