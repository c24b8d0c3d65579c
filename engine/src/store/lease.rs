//! Leases: which attempt on another machine executes a key.
//!
//! A lease lies beside the key's lock and is written only by the process that holds the lock. It outlives that process: the
//! attempt goes on, and the next process that gets the lock follows it. An attempt that is not named by the lease of its key
//! commits nothing.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::{Store, files};
use crate::disk;
use crate::error::{AtPath, Result};
use crate::names::Key;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The name of the attempt's folder.
    pub attempt: String,
    /// The instance's name.
    pub stage: String,
    /// Id of the run that started the attempt.
    pub run: String,
    /// Machine that submitted it.
    pub host: String,
    pub executor: String,
    /// The job's id in the batch system, once it is known.
    #[serde(default)]
    pub job: Option<String>,
    /// Seconds since 1970.
    pub submitted: u64,
    /// Name of the log in the attempt's folder.
    pub log: String,
    /// Stat entries of the files outside the store that the attempt reads.
    #[serde(default)]
    pub input_stats: BTreeMap<PathBuf, String>,
    /// Foreign files in the folders of its inputs at its start.
    #[serde(default)]
    pub unlisted_files: Vec<String>,
}

impl Lease {
    /// The lease in a file; `None` if there is none or it cannot be read as one.
    ///
    /// # Errors
    /// When the disk fails.
    pub fn read(path: &Path) -> Result<Option<Self>> {
        Ok(files::read_if_file(path)?.and_then(|bytes| serde_json::from_slice(&bytes).ok()))
    }
}

impl Store {
    /// The lease of a key.
    pub fn lease(&self, key: &Key) -> Result<Option<Lease>> {
        // The name of a folder comes from a file: it must not lead out of the key's folder.
        let is_name = |name: &str| !name.is_empty() && name != ".." && !name.contains('/');
        Ok(Lease::read(&self.lease_file(key))?.filter(|lease| is_name(&lease.attempt) && is_name(&lease.log)))
    }

    /// All leases of the store.
    pub fn leases(&self) -> Result<Vec<Lease>> {
        let folder = self.root().join("locks");
        let mut leases = Vec::new();
        for entry in fs::read_dir(&folder).at(&folder)? {
            let path = entry.at(&folder)?.path();
            if path.extension().is_some_and(|extension| extension == "lease") {
                leases.extend(Lease::read(&path)?);
            }
        }
        Ok(leases)
    }

    /// Gives the key to another attempt. The caller must hold the key's lock.
    pub fn write_lease(&self, key: &Key, lease: &Lease) -> Result<()> {
        let path = self.lease_file(key);
        if files::metadata_if_exists(&path)?.is_some_and(|metadata| !metadata.is_file()) {
            self.quarantine_file(&path, "this path is reserved for a lease")?;
        }
        let text = serde_json::to_vec_pretty(lease).expect("a lease is plain data");
        files::write_atomically(&path, &text)
    }

    /// Takes the key from its attempt. The caller must hold the key's lock.
    pub fn remove_lease(&self, key: &Key) -> Result<()> {
        let path = self.lease_file(key);
        match disk::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).at(&path),
            _ => Ok(()),
        }
    }

    pub fn lease_file(&self, key: &Key) -> PathBuf {
        self.root().join("locks").join(format!("{key}.lease"))
    }
}
