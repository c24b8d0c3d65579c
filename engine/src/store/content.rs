//! The digest of a file or folder outside the store. Knows no artifacts.

use std::fs;
use std::path::{Path, PathBuf};

use super::Store;
use super::files::{self, Stat};
use crate::error::{At, Error, Result};
use crate::names::Digest;
use crate::wildcard;

/// Deeper folders are taken for a loop of symlinks.
const DEEPEST: usize = 64;

impl Store {
    /// The digest of what lies at a path outside the store: a file by its bytes, a folder by the relative paths and digests
    /// of its files, sorted; a wildcard by the names and digests of the files that it matches, sorted. Symlinks are followed.
    /// Memoised by (device, inode, size, mtime).
    ///
    /// # Errors
    /// When there is nothing at `path`, or it cannot be read, or changes meanwhile (yours, the first).
    pub fn content_of(&self, path: &Path) -> Result<Digest> {
        let metadata = match fs::metadata(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound && wildcard::is_wildcard(path) => {
                return self.matches_content(path);
            }
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
                return Err(Error::yours(format!("{}: no such file or folder", path.display()))
                    .help("paths in a pipeline file are relative to the file's folder"));
            }
            other => other.at(path)?,
        };
        if metadata.is_dir() { self.folder_content(path) } else { self.file_content(path, &metadata) }
    }

    fn file_content(&self, path: &Path, metadata: &fs::Metadata) -> Result<Digest> {
        if !metadata.is_file() {
            return Err(Error::yours(format!("{}: expected a file or a folder", path.display())));
        }
        if let Some(digest) = self.index.vouched(&Stat::from(metadata))? {
            return Ok(digest);
        }
        let (digest, metadata) = files::hash_file(path)?;
        let stat = Stat::from(&metadata);
        // A file written a moment ago could change again without a change of its mtime.
        if stat.settled() {
            self.index.note(&[(stat, digest)])?;
        }
        Ok(digest)
    }

    fn folder_content(&self, root: &Path) -> Result<Digest> {
        let mut files: Vec<(Vec<u8>, Digest)> = Vec::new();
        let mut folders: Vec<(PathBuf, usize)> = vec![(root.to_owned(), 0)];
        while let Some((folder, depth)) = folders.pop() {
            if depth > DEEPEST {
                return Err(Error::yours(format!(
                    "{}: more than {DEEPEST} folders deep; a loop of symlinks?",
                    folder.display()
                )));
            }
            for entry in fs::read_dir(&folder).at(&folder)? {
                let path = entry.at(&folder)?.path();
                let metadata = fs::metadata(&path).at(&path)?;
                if metadata.is_dir() {
                    folders.push((path, depth + 1));
                } else {
                    let digest = self.file_content(&path, &metadata)?;
                    // Every path found lies below the root.
                    let relative = path.strip_prefix(root).unwrap_or(&path);
                    files.push((relative.as_os_str().as_encoded_bytes().to_vec(), digest));
                }
            }
        }
        files.sort_unstable();
        Ok(digest_of("temper folder v1", &files))
    }

    fn matches_content(&self, pattern: &Path) -> Result<Digest> {
        let paths = wildcard::files(pattern)?;
        if paths.is_empty() {
            return Err(Error::yours(format!("{}: no file matches", pattern.display()))
                .help("paths in a pipeline file are relative to the file's folder"));
        }
        let mut files = Vec::with_capacity(paths.len());
        for path in &paths {
            let name = path.file_name().unwrap_or_default().as_encoded_bytes().to_vec();
            files.push((name, self.file_content(path, &fs::metadata(path).at(path)?)?));
        }
        Ok(digest_of("temper wildcard v1", &files))
    }
}

fn digest_of(what: &str, files: &[(Vec<u8>, Digest)]) -> Digest {
    let mut hasher = blake3::Hasher::new_derive_key(what);
    for (name, digest) in files {
        hasher.update(&(name.len() as u64).to_le_bytes()).update(name).update(digest.as_bytes());
    }
    hasher.finalize().into()
}
