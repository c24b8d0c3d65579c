//! The digest of files outside the store.

use std::fs;
use std::path::{Path, PathBuf};

use super::Store;
use super::files::{self, Stat};
use crate::error::{AtPath, Error, Result};
use crate::external::walk::{self, Listing};
use crate::external::{self, ExternalInput};
use crate::names::Digest;

/// The content of files outside the store.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExternalContent {
    pub digest: Digest,
    /// Whether the store was among them and was left out.
    pub store_excluded: bool,
}

impl Store {
    /// The content of the files that a parameter names, independent of their location: for a single file its bytes,
    /// otherwise the files' relative paths and digests, in order, including duplicate names. Follows symlinks. The
    /// digest of a file is cached by (device, inode, size, mtime, ctime).
    ///
    /// # Errors
    /// Those of [`walk::list`]; when a file cannot be read, or changes during the read.
    pub fn content_of(&self, external: &ExternalInput) -> Result<ExternalContent> {
        let Listing { entries, store_excluded } = walk::list(external, Some(self.root()))?;
        if let [file] = entries.as_slice()
            && file.name.as_os_str().is_empty()
        {
            return Ok(ExternalContent { digest: self.file_content(&file.path)?, store_excluded });
        }
        let mut hasher = blake3::Hasher::new_derive_key("temper files v2");
        for entry in &entries {
            let name = entry.name.as_os_str().as_encoded_bytes();
            hasher.update(&(name.len() as u64).to_le_bytes()).update(name);
            match entry.is_repeat {
                true => hasher.update(&[1]),
                false => hasher.update(&[0]).update(self.file_content(&entry.path)?.as_bytes()),
            };
        }
        Ok(ExternalContent { digest: hasher.finalize().into(), store_excluded })
    }

    /// Parameters for an attempt, with the files that they name listed, without the store.
    ///
    /// # Errors
    /// Those of [`walk::list`].
    pub fn list_files(&self, params: &serde_json::Value) -> Result<serde_json::Value> {
        external::with_listed_files(params, Some(self.root()))
    }

    /// The stats of the files that parameters name; a file that was changed and changed back has a different stat.
    ///
    /// # Errors
    /// Those of [`walk::list`]; when a file is missing.
    pub(crate) fn input_stats(&self, params: &serde_json::Value) -> Result<Vec<(PathBuf, Stat)>> {
        let mut stats = Vec::new();
        external::replace(params, &mut |external| {
            if !external.is_empty() {
                for path in walk::list(&external, Some(self.root()))?.files() {
                    let stat = self.input_stat(&path, &fs::metadata(&path).at(&path)?);
                    stats.push((path, stat));
                }
            }
            Ok(serde_json::Value::Null)
        })?;
        Ok(stats)
    }

    /// A parameter may name an artifact of this store. The ctime of its files is ignored, because it changes with every
    /// new hard link.
    fn input_stat(&self, path: &Path, metadata: &fs::Metadata) -> Stat {
        if path.starts_with(self.root()) { Stat::from(metadata) } else { Stat::of_input(metadata) }
    }

    fn file_content(&self, path: &Path) -> Result<Digest> {
        let before = self.input_stat(path, &fs::metadata(path).at(path)?);
        if let Some(digest) = self.index.lookup(&before)? {
            return Ok(digest);
        }
        let (digest, metadata) = files::hash_file(path)?;
        let after = self.input_stat(path, &metadata);
        if before != after {
            return Err(Error::environment(format!("{}: the file changed while it was read", path.display()))
                .help("wait until no program writes to it, then run again"));
        }
        // A file written just now could change again without a change of its times.
        if after.is_settled() {
            self.index.insert(&[(after, digest)])?;
        }
        Ok(digest)
    }
}
