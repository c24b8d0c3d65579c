//! Folders of attempts.

use std::fs;
use std::path::PathBuf;

use super::{Lease, Store, files};
use crate::disk;
use crate::error::{AtPath, Result};
use crate::names::Key;

const CHECKPOINTS: &str = "checkpoints";

/// A new folder for one attempt, whose path is never reused.
#[derive(Clone, Debug)]
pub struct AttemptFolder {
    /// `work/<key>/<fresh>`.
    pub root: PathBuf,
    /// The folder to fill; exists and is empty.
    pub out: PathBuf,
    /// The log file for the attempt's standard error; does not exist yet.
    pub log: PathBuf,
}

impl AttemptFolder {
    /// The name by which journal, provenance and leases know the attempt.
    pub fn name(&self) -> String {
        self.root.file_name().unwrap_or_default().to_string_lossy().into_owned()
    }

    /// The attempt's own folder for temporary files, if it needs one.
    pub fn temporary(&self) -> PathBuf {
        self.root.join("tmp")
    }

    /// Deletes the output and temporary files, and keeps the log. Committed files stay: the store has its own links.
    pub fn discard(&self) -> Result<()> {
        [self.out.clone(), self.temporary()].iter().try_for_each(|folder| match disk::remove_dir_all(folder) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).at(folder),
            _ => Ok(()),
        })
    }
}

impl Store {
    pub fn new_attempt(&self, key: &Key) -> Result<AttemptFolder> {
        let work = self.work(key)?;
        // Unique by time, process and a counter, so that an orphan of an earlier attempt that still writes by path does
        // no harm.
        let name = files::temporary_name(&work.join("attempt"));
        let name = name.to_string_lossy().replace(".new-", "attempt-");
        let root = work.join(name);
        let (out, log) = (root.join("out"), root.join("log"));
        disk::create_dir(&root).at(&root)?;
        disk::create_dir(&out).at(&out)?;
        Ok(AttemptFolder { root, out, log })
    }

    /// The folder of the attempt that a lease names.
    pub fn leased_attempt(&self, key: &Key, lease: &Lease) -> AttemptFolder {
        let root = self.root().join("work").join(key.to_string()).join(&lease.attempt);
        AttemptFolder { out: root.join("out"), log: root.join(&lease.log), root }
    }

    /// The checkpoint folder of a key, kept between attempts; created if missing. The caller must hold the key's lock.
    pub fn checkpoints(&self, key: &Key) -> Result<PathBuf> {
        self.claim_checkpoints(key, CHECKPOINTS.to_owned())
    }

    /// The same for an attempt on another machine, which may go on after it has lost its lease: the folder has a path of
    /// its own, which ends to exist when the next attempt takes the folder.
    pub fn checkpoints_of_attempt(&self, key: &Key, attempt: &str) -> Result<PathBuf> {
        self.claim_checkpoints(key, format!("{CHECKPOINTS}-{attempt}"))
    }

    /// Deletes the checkpoints of a key. The caller must hold the key's lock.
    pub fn clear_checkpoints(&self, key: &Key) -> Result<()> {
        let folders = self.checkpoint_folders(key)?;
        folders.iter().try_for_each(|folder| disk::remove_dir_all(folder).at(folder))
    }

    fn claim_checkpoints(&self, key: &Key, name: String) -> Result<PathBuf> {
        let folder = self.work(key)?.join(name);
        let mut found = self.checkpoint_folders(key)?;
        if !found.contains(&folder) {
            // The folder without a suffix comes first: what an attempt without a lease makes beside it is not read. Names
            // of attempts sort by time.
            found.sort_unstable();
            let taken = found.first().filter(|first| first.ends_with(CHECKPOINTS)).or(found.last());
            match taken {
                Some(taken) => disk::rename(taken, &folder).at(taken)?,
                None => disk::create_dir(&folder).at(&folder)?,
            }
        }
        Ok(folder)
    }

    fn checkpoint_folders(&self, key: &Key) -> Result<Vec<PathBuf>> {
        let work = self.work(key)?;
        let mut folders = Vec::new();
        for entry in fs::read_dir(&work).at(&work)? {
            let entry = entry.at(&work)?;
            if entry.file_name().as_encoded_bytes().starts_with(CHECKPOINTS.as_bytes()) {
                folders.push(entry.path());
            }
        }
        Ok(folders)
    }

    /// Deletes the work folder of a key: checkpoints, attempts and their logs. The caller must hold the key's lock.
    pub fn clear_work(&self, key: &Key) -> Result<()> {
        let folder = self.root().join("work").join(key.to_string());
        match disk::remove_dir_all(&folder) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).at(&folder),
            _ => Ok(()),
        }
    }

    fn work(&self, key: &Key) -> Result<PathBuf> {
        let folder = self.root().join("work").join(key.to_string());
        disk::create_dir_all(&folder).at(&folder)?;
        Ok(folder)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::Digest;

    #[test]
    fn checkpoints_move_to_the_next_attempt_and_the_old_path_is_gone() {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("store")).unwrap();
        let key: Key = Digest::of(b"key").to_string().parse().unwrap();
        let here = store.checkpoints(&key).unwrap();
        fs::create_dir(here.join("checkpoint-1")).unwrap();
        let first = store.checkpoints_of_attempt(&key, "attempt-1").unwrap();
        assert!(first.join("checkpoint-1").is_dir() && !here.exists());
        assert_eq!(store.checkpoints_of_attempt(&key, "attempt-1").unwrap(), first, "a second start of the same job");
        let second = store.checkpoints_of_attempt(&key, "attempt-2").unwrap();
        assert!(second.join("checkpoint-1").is_dir() && !first.exists());
        // An attempt that has lost its lease makes a folder of its own, which nobody takes.
        fs::create_dir(&first).unwrap();
        let here = store.checkpoints(&key).unwrap();
        assert!(here.join("checkpoint-1").is_dir() && !second.exists());
        let third = store.checkpoints_of_attempt(&key, "attempt-3").unwrap();
        assert!(third.join("checkpoint-1").is_dir());
        store.clear_checkpoints(&key).unwrap();
        assert!(!third.exists() && !first.exists());
    }
}
