//! Commit: turns the output folder of an attempt into an artifact on disk. Does not write the action record.
//!
//! The process may be killed after each of these steps: check the output, hash it, put its files into `blobs/`, build
//! the artifact under a temporary name, sync everything, rename the artifact to its digest, sync the rename, update the
//! stat index. Blobs left by an interrupted commit are hashed before they are used, and temporary names are never read.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File, Metadata};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use super::files::{self, Stat, TemporaryPath};
use super::{Presence, Store};
use crate::artifact::{self, ArtifactType, FileEntry, Manifest};
use crate::disk;
use crate::error::{AtPath, Error, Result};
use crate::names::Digest;
use crate::text::strip_bom;

/// Up to this many files are synced individually; more with a single `syncfs`.
const MAX_SINGLE_SYNCS: usize = 16;
/// Maximum size of `metrics.json` in bytes; manifests and reports copy its content.
const MAX_METRICS: u64 = 4 << 20;
pub(crate) const MANIFEST: &str = "manifest.json";

/// A hashed file of the output.
struct HashedFile {
    /// Relative path with `/` between parts.
    name: String,
    path: PathBuf,
    stat: Stat,
    /// Whether the output has the only link to the file, so that the store may take the file itself.
    is_only_link: bool,
    executable: bool,
    digest: Digest,
}

impl Store {
    /// Makes an artifact from the output folder `out` of an attempt. The artifact is on disk when this returns.
    ///
    /// The caller should discard `out` afterwards: its files may now be links to the store's files.
    ///
    /// # Errors
    /// When the output is not a complete artifact of type `t`, or has anything but files and folders; when the disk
    /// fails.
    pub fn commit(&self, out: &Path, t: &dyn ArtifactType) -> Result<(Digest, Manifest)> {
        artifact::check_root(out)?;
        let (found, mut folders) = list_output(out)?;
        check_metrics(out)?;
        let mut facts = t.check(out)?;
        if facts.metrics.is_empty() {
            facts.metrics = metrics(out)?;
        }
        // JSON cannot represent other values.
        facts.metrics.retain(|_, value| value.is_finite());
        let hashed = self.hash(found)?;
        let keeps_tree = t.keeps_tree();
        let entry =
            |f: &HashedFile| FileEntry { bytes: f.stat.size, digest: f.digest, executable: keeps_tree && f.executable };
        let files = hashed.iter().map(|f| (f.name.clone(), entry(f))).collect();
        folders.retain(|_| keeps_tree);
        let (artifact_type, schema_version) = (t.name().to_owned(), t.schema_version());
        let manifest = Manifest { artifact_type, schema_version, files, folders, facts };
        let digest = manifest.digest();
        // Otherwise a blob could be deleted between the check that it exists and the link to it.
        let _guard = self.hold_off_collection()?;
        self.publish(&digest, &manifest, &hashed)?;
        Ok((digest, manifest))
    }

    fn hash(&self, found: OutputFiles) -> Result<Vec<HashedFile>> {
        let mut hashed = Vec::with_capacity(found.len());
        for (name, path, metadata) in found {
            // A link to a file that the store already knows, for example one taken from an input.
            let known = if metadata.nlink() > 1 { self.index.lookup(&Stat::from(&metadata))? } else { None };
            let (digest, metadata) = match known {
                Some(digest) => (digest, metadata),
                None => files::hash_file(&path)?,
            };
            let (is_only_link, executable) = (metadata.nlink() == 1, metadata.mode() & 0o111 != 0);
            hashed.push(HashedFile { name, path, stat: Stat::from(&metadata), is_only_link, executable, digest });
        }
        Ok(hashed)
    }

    fn publish(&self, digest: &Digest, manifest: &Manifest, hashed: &[HashedFile]) -> Result<()> {
        if self.presence(digest)? == Presence::Intact {
            // Garbage collection keeps what was committed since a living run began, and this may be an old artifact.
            files::touch(&self.artifact_folder(digest));
            // Another process may have renamed it just now without syncing yet.
            return files::sync(&self.artifacts());
        }
        let mut stats = Vec::with_capacity(hashed.len() + 1);
        for file in hashed {
            self.put_blob(file, &mut stats)?;
        }
        self.assemble(digest, manifest, stats)
    }

    /// Makes the artifact's folder from blobs that are in the store. `stats`: those of the blobs that were just
    /// hashed, for the stat index.
    pub(super) fn assemble(&self, digest: &Digest, manifest: &Manifest, mut stats: Vec<(Stat, Digest)>) -> Result<()> {
        let folder = self.artifact_folder(digest);
        let name = files::temporary_name(&folder);
        disk::create_dir(&name).at(&name)?;
        let temporary = TemporaryPath::new(name.clone());
        self.populate(&name, manifest, &mut stats)?;
        sync(&name, manifest, &self.artifacts())?;
        for _ in 0..3 {
            match disk::rename(&name, &folder) {
                Ok(()) => {
                    temporary.keep();
                    files::sync(&self.artifacts())?;
                    // On file systems with whole-second times, another write in the same second would not change the
                    // stat.
                    stats.retain(|(stat, _)| !stat.is_coarse() || stat.is_settled());
                    return self.index.insert(&stats);
                }
                // Another process committed the same bytes, or the existing artifact is damaged.
                Err(e) if is_occupied(&e) => match self.presence(digest)? {
                    Presence::Intact => return files::sync(&self.artifacts()),
                    Presence::Missing => (),
                    Presence::Damaged { .. } => drop(self.quarantine(digest)?),
                },
                Err(e) => return Err(e).at(&folder),
            }
        }
        Err(Error::environment(format!(
            "{}: this folder is in the place of an artifact and keeps changing",
            folder.display()
        )))
    }

    /// Makes sure that there is an intact blob with the file's bytes.
    fn put_blob(&self, file: &HashedFile, stats: &mut Vec<(Stat, Digest)>) -> Result<()> {
        let blob = self.blob(&file.digest);
        loop {
            if let Some(metadata) = files::metadata_if_exists(&blob)? {
                let stat = Stat::from(&metadata);
                if self.has_digest(&blob, &stat, &file.digest)? {
                    return Ok(());
                }
                self.quarantine_file(&blob, "the bytes of this blob do not match its digest")?;
            }
            let shard = blob.parent().unwrap_or(&blob);
            disk::create_dir_all(shard).at(shard)?;
            // If the file has other links (an input's, a user's file), their owners could write to the blob.
            if file.is_only_link {
                files::make_read_only(&file.path)?;
                match disk::hard_link(&file.path, &blob) {
                    Ok(()) => {
                        stats.push((file.stat, file.digest));
                        return Ok(());
                    }
                    Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => continue,
                    Err(e) if e.kind() == std::io::ErrorKind::StorageFull => return Err(e).at(&blob),
                    // Another file system, or one without hard links.
                    Err(_) => (),
                }
            }
            let stat = copy(&file.path, &blob)?;
            let now = fs::symlink_metadata(&file.path).at(&file.path)?;
            if Stat::from(&now) != file.stat {
                return Err(Error::environment(format!(
                    "{}: the file changed while it was committed",
                    file.path.display()
                )));
            }
            stats.push((stat, file.digest));
            return Ok(());
        }
    }

    /// Links or copies the blobs of `manifest` into `folder`, and writes the manifest there.
    fn populate(&self, folder: &Path, manifest: &Manifest, stats: &mut Vec<(Stat, Digest)>) -> Result<()> {
        let mut made = BTreeSet::new();
        for (name, entry) in &manifest.files {
            let (path, blob) = (folder.join(name), self.blob(&entry.digest));
            if let Some(parent) = path.parent()
                && made.insert(parent.to_owned())
            {
                disk::create_dir_all(parent).at(parent)?;
            }
            if entry.executable {
                // The executable bit belongs to the inode, which links share, and blobs do not have it; so copy.
                stats.push((copy(&blob, &path)?, entry.digest));
                files::make_executable(&path)?;
                continue;
            }
            match disk::hard_link(&blob, &path) {
                Ok(()) => (),
                Err(e) if e.kind() == std::io::ErrorKind::StorageFull => return Err(e).at(&path),
                // EMLINK at 65,000 links on ext4, or a file system without hard links.
                Err(_) => stats.push((copy(&blob, &path)?, entry.digest)),
            }
        }
        for name in &manifest.folders {
            let path = folder.join(name);
            disk::create_dir_all(&path).at(&path)?;
        }
        let path = folder.join(MANIFEST);
        let file = disk::create_new(&path).at(&path)?;
        disk::write_all(file, &path, &manifest.to_bytes()).at(&path)?;
        files::make_read_only(&path)
    }
}

/// Name, path and metadata of the files of an output.
type OutputFiles = Vec<(String, PathBuf, Metadata)>;

/// The files below `out`, sorted by name, and the empty folders.
fn list_output(out: &Path) -> Result<(OutputFiles, BTreeSet<String>)> {
    let (mut found, mut empty) = (Vec::new(), BTreeSet::new());
    let mut folders = vec![(String::new(), out.to_owned())];
    while let Some((prefix, folder)) = folders.pop() {
        let mut is_empty = !prefix.is_empty();
        for entry in fs::read_dir(&folder).at(&folder)? {
            is_empty = false;
            let path = entry.at(&folder)?.path();
            let invalid = |what: &str| Error::user(format!("{}: {what}", path.display()));
            let metadata = fs::symlink_metadata(&path).at(&path)?;
            let Some(name) = path.file_name().and_then(|n| n.to_str()) else {
                return Err(invalid("a file name of an artifact must be UTF-8"));
            };
            let name = if prefix.is_empty() { name.to_owned() } else { format!("{prefix}/{name}") };
            if metadata.is_dir() {
                folders.push((name, path));
            } else if metadata.is_symlink() {
                return Err(invalid("an artifact may not contain symbolic links")
                    .help("write or copy the file itself into the output folder"));
            } else if !metadata.is_file() {
                return Err(invalid("an artifact may contain only regular files"));
            } else if name == MANIFEST {
                return Err(
                    invalid("this name is reserved for the artifact's manifest").help("give the file another name")
                );
            } else {
                artifact::check_holes(&path, &metadata)?;
                found.push((name, path, metadata));
            }
        }
        if is_empty {
            empty.insert(prefix);
        }
    }
    found.sort_unstable_by(|a, b| a.0.cmp(&b.0));
    Ok((found, empty))
}

/// Refuses a `metrics.json` that is too large to read.
fn check_metrics(out: &Path) -> Result<()> {
    let path = out.join("metrics.json");
    match files::metadata_if_exists(&path)? {
        Some(metadata) if metadata.len() > MAX_METRICS => {
            let size = MAX_METRICS >> 20;
            Err(Error::user(format!("{}: the file is larger than {size} MiB", path.display()))
                .help("metrics.json contains named numbers; give other data another file name"))
        }
        _ => Ok(()),
    }
}

/// The numbers of `metrics.json`, if there is one.
fn metrics(out: &Path) -> Result<BTreeMap<String, f64>> {
    let Some(bytes) = files::read_if_file(&out.join("metrics.json"))? else { return Ok(BTreeMap::new()) };
    let values: BTreeMap<String, serde_json::Value> = serde_json::from_slice(strip_bom(&bytes)).unwrap_or_default();
    Ok(values.into_iter().filter_map(|(name, value)| Some((name, value.as_f64()?))).collect())
}

/// Copies a file atomically and makes the copy read-only.
fn copy(from: &Path, to: &Path) -> Result<Stat> {
    let name = files::temporary_name(to);
    let temporary = TemporaryPath::new(name.clone());
    disk::copy(from, &name).at(to)?;
    files::make_read_only(&name)?;
    let stat = Stat::from(&fs::symlink_metadata(&name).at(&name)?);
    disk::rename(&name, to).at(to)?;
    temporary.keep();
    Ok(stat)
}

/// Syncs everything below `folder` to disk.
fn sync(folder: &Path, manifest: &Manifest, file_system: &Path) -> Result<()> {
    if manifest.files.len() > MAX_SINGLE_SYNCS {
        let handle = File::open(file_system).at(file_system)?;
        return disk::sync_file_system(&handle, file_system).at(file_system);
    }
    let mut paths = BTreeSet::from([folder.to_owned()]);
    for name in manifest.files.keys().map(String::as_str).chain([MANIFEST]) {
        paths.extend(folder.join(name).ancestors().take_while(|p| p.starts_with(folder)).map(Path::to_owned));
    }
    paths.into_iter().collect::<Vec<_>>().chunks(MAX_SINGLE_SYNCS).try_for_each(files::sync_all)
}

fn is_occupied(e: &std::io::Error) -> bool {
    use std::io::ErrorKind::{AlreadyExists, DirectoryNotEmpty, NotADirectory};
    matches!(e.kind(), DirectoryNotEmpty | AlreadyExists | NotADirectory)
}
