//! Folders of attempts.

use std::fs;
use std::path::PathBuf;

use super::{Store, files};
use crate::error::{AtPath, Result};
use crate::names::Key;

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
    /// Deletes the output folder and keeps the log. Committed files stay: the store has its own links.
    pub fn discard(&self) -> Result<()> {
        match fs::remove_dir_all(&self.out) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).at(&self.out),
            _ => Ok(()),
        }
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
        fs::create_dir(&root).at(&root)?;
        fs::create_dir(&out).at(&out)?;
        Ok(AttemptFolder { root, out, log })
    }

    /// The checkpoint folder of a key, kept between attempts; created if missing.
    pub fn checkpoints(&self, key: &Key) -> Result<PathBuf> {
        let folder = self.work(key)?.join("checkpoints");
        fs::create_dir_all(&folder).at(&folder)?;
        Ok(folder)
    }

    /// Deletes the work folder of a key: checkpoints, attempts and their logs. The caller must hold the key's lock.
    pub fn clear_work(&self, key: &Key) -> Result<()> {
        let folder = self.root().join("work").join(key.to_string());
        match fs::remove_dir_all(&folder) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).at(&folder),
            _ => Ok(()),
        }
    }

    fn work(&self, key: &Key) -> Result<PathBuf> {
        let folder = self.root().join("work").join(key.to_string());
        fs::create_dir_all(&folder).at(&folder)?;
        Ok(folder)
    }
}
