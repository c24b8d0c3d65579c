//! Folders of attempts. Knows not what is written into them.

use std::fs;
use std::path::PathBuf;

use super::{Store, files};
use crate::error::{At, Result};
use crate::names::Key;

/// A fresh folder for one attempt, whose path was never used before and never will be.
#[derive(Clone, Debug)]
pub struct AttemptFolder {
    /// `work/<key>/<fresh>`.
    pub root: PathBuf,
    /// The folder to fill; exists and is empty.
    pub out: PathBuf,
    /// The file for the attempt's standard error; not there yet.
    pub log: PathBuf,
}

impl AttemptFolder {
    /// Deletes what the attempt wrote but for its log. What was committed stays: the store has its own links.
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
        // Time, process and a counter: an orphan of an earlier attempt that still writes by path reaches nobody.
        let name = files::fresh_name(&work.join("attempt"));
        let name = name.to_string_lossy().replace(".new-", "attempt-");
        let root = work.join(name);
        let (out, log) = (root.join("out"), root.join("log"));
        fs::create_dir(&root).at(&root)?;
        fs::create_dir(&out).at(&out)?;
        Ok(AttemptFolder { root, out, log })
    }

    /// The checkpoints of a key, kept between attempts; exists.
    pub fn checkpoints(&self, key: &Key) -> Result<PathBuf> {
        let folder = self.work(key)?.join("checkpoints");
        fs::create_dir_all(&folder).at(&folder)?;
        Ok(folder)
    }

    /// Deletes the work folder of a key: checkpoints, attempts and their logs. For the holder of its lock.
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
