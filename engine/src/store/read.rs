//! Reading artifacts: checks presence and integrity, and quarantines damaged ones.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use super::Store;
use super::commit::MANIFEST;
use super::files::{self, Stat};
use crate::artifact::Manifest;
use crate::error::{AtPath, Error, Result};
use crate::names::Digest;

/// Whether an artifact's bytes can be read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Presence {
    Intact,
    Missing,
    /// A file is missing, or its bytes differ from the manifest.
    Damaged {
        /// Relative to the artifact's folder.
        file: String,
    },
}

/// An artifact on disk.
#[derive(Clone, Debug)]
pub struct Artifact {
    pub folder: PathBuf,
    pub manifest: Manifest,
}

impl Store {
    /// Checks whether an artifact is present and intact. Needs only a few stats if nothing changed since it was last
    /// hashed; hashes files with a changed stat again, and remembers them if their bytes are still right.
    pub fn presence(&self, digest: &Digest) -> Result<Presence> {
        Ok(self.examine(digest)?.err().unwrap_or(Presence::Intact))
    }

    /// An artifact that is present and intact, checked as by [`Store::presence`].
    pub fn intact_artifact(&self, digest: &Digest) -> Result<Option<Artifact>> {
        Ok(self.examine(digest)?.ok())
    }

    /// The artifact if it is intact, else what it is instead.
    fn examine(&self, digest: &Digest) -> Result<std::result::Result<Artifact, Presence>> {
        let folder = self.artifact_folder(digest);
        let damaged = |file: &str| Ok(Err(Presence::Damaged { file: file.to_owned() }));
        let Some(bytes) = files::read_if_file(&folder.join(MANIFEST))? else {
            let exists = files::metadata_if_exists(&folder)?.is_some();
            return if exists { damaged(MANIFEST) } else { Ok(Err(Presence::Missing)) };
        };
        let Some(manifest) = parse(&bytes, digest) else { return damaged(MANIFEST) };
        for (name, entry) in &manifest.files {
            let path = folder.join(name);
            let is_intact = match files::metadata_if_exists(&path)? {
                Some(metadata) if metadata.is_file() && metadata.len() == entry.bytes => {
                    self.has_digest(&path, &Stat::from(&metadata), &entry.digest)?
                }
                _ => false,
            };
            if !is_intact {
                return damaged(name);
            }
        }
        match manifest.folders.iter().find(|name| !folder.join(name).is_dir()) {
            Some(name) => damaged(name),
            None => Ok(Ok(Artifact { folder, manifest })),
        }
    }

    /// [`Store::presence`], for an attempt before it reads an artifact. The caller passes damaged artifacts to
    /// [`Store::quarantine`] and makes them again.
    pub fn check_before_reading(&self, digest: &Digest) -> Result<Presence> {
        self.presence(digest)
    }

    /// Files in an artifact's folder that its manifest does not name. Together with [`Store::presence`] this shows the
    /// runner whether a stage wrote to its input, since root can write to read-only files.
    pub(crate) fn unlisted_files(&self, digest: &Digest) -> Result<Vec<String>> {
        let Artifact { folder, manifest } = self.open_artifact(digest)?;
        let known: BTreeSet<PathBuf> = manifest.files.keys().map(|name| folder.join(name)).collect();
        let mut unlisted_files = Vec::new();
        let mut folders = vec![folder.clone()];
        while let Some(inner) = folders.pop() {
            for entry in fs::read_dir(&inner).at(&inner)? {
                let entry = entry.at(&inner)?;
                let path = entry.path();
                if entry.file_type().at(&path)?.is_dir() {
                    folders.push(path);
                } else if !known.contains(&path) && path != folder.join(MANIFEST) {
                    // Every path found lies below the folder.
                    unlisted_files.push(path.strip_prefix(&folder).unwrap_or(&path).display().to_string());
                }
            }
        }
        unlisted_files.sort_unstable();
        Ok(unlisted_files)
    }

    /// The folder and manifest of an artifact. Checks the manifest but not the files; for those see
    /// [`Store::presence`].
    ///
    /// # Errors
    /// When the artifact is missing or its manifest is damaged (`Environment`).
    pub fn open_artifact(&self, digest: &Digest) -> Result<Artifact> {
        let folder = self.artifact_folder(digest);
        let path = folder.join(MANIFEST);
        let bytes = files::read_if_file(&path)?;
        match bytes.as_deref().and_then(|bytes| parse(bytes, digest)) {
            Some(manifest) => Ok(Artifact { folder, manifest }),
            None if files::metadata_if_exists(&folder)?.is_none() => {
                Err(Error::environment(format!("{}: the artifact does not exist", folder.display()))
                    .help("run the pipeline again to recompute the artifact"))
            }
            None => Err(Error::environment(format!("{}: the manifest is damaged", path.display()))
                .help("run the pipeline again to recompute the artifact")),
        }
    }

    /// Moves a damaged artifact and its damaged blobs into the quarantine, with a note, so that making the artifact
    /// again repairs the store. Leaves an intact artifact in place (another process has repaired it). Returns the
    /// folder under `quarantine/`.
    pub fn quarantine(&self, digest: &Digest) -> Result<PathBuf> {
        let folder = self.artifact_folder(digest);
        let Presence::Damaged { file } = self.presence(digest)? else { return Ok(folder) };
        if let Ok(Artifact { manifest, .. }) = self.open_artifact(digest) {
            for entry in manifest.files.values() {
                let blob = self.blob(&entry.digest);
                if let Some(metadata) = files::metadata_if_exists(&blob)?
                    && !self.has_digest(&blob, &Stat::from(&metadata), &entry.digest)?
                {
                    self.quarantine_file(&blob, "the bytes of this blob do not match its digest")?;
                }
            }
        }
        files::move_to_quarantine(
            self.root(),
            &folder,
            &format!("file `{file}` of this artifact does not match the manifest"),
        )
    }

    pub(crate) fn quarantine_file(&self, path: &Path, why: &str) -> Result<()> {
        files::move_to_quarantine(self.root(), path, why).map(drop)
    }

    /// Whether a file has this digest, according to the index or else to its bytes. False if it is not a readable file.
    pub(crate) fn has_digest(&self, path: &Path, stat: &Stat, digest: &Digest) -> Result<bool> {
        if let Some(known) = self.index.lookup(stat)? {
            return Ok(known == *digest);
        }
        if files::open_if_file(path)?.is_none() {
            return Ok(false);
        }
        let (found, metadata) = files::hash_file(path)?;
        if found == *digest {
            self.index.insert(&[(Stat::from(&metadata), found)])?;
        }
        Ok(found == *digest)
    }
}

fn parse(bytes: &[u8], digest: &Digest) -> Option<Manifest> {
    if Digest::of(bytes) != *digest {
        return None;
    }
    serde_json::from_slice(bytes).ok()
}
