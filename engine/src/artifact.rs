//! Artifacts: typed, immutable folders and their manifests.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use rustix::fs::{Mode, OFlags, SeekFrom, seek};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::error::{AtPath, Error, Result};
use crate::names::Digest;

/// A type of artifact: what its folder must contain, and how to preview it.
pub trait ArtifactType: Send + Sync {
    /// `Posts`, `Model`, …
    fn name(&self) -> &'static str;

    /// Must be increased when the layout changes in a way that old readers cannot read.
    fn schema_version(&self) -> u32 {
        1
    }

    /// One-line description for users of what the folder contains.
    fn about(&self) -> &'static str;

    /// Whether executable bits and empty folders are part of an artifact of this type.
    fn keeps_tree(&self) -> bool {
        false
    }

    /// The files of the folder, apart from `metrics.json`, which any artifact may have. Empty if the type does not
    /// prescribe them.
    fn files(&self) -> Vec<FileSpec> {
        Vec::new()
    }

    /// Checks that `folder` is a complete artifact of this type and collects its facts.
    ///
    /// # Errors
    /// When a file is missing or does not have the declared format: names the file and what was expected.
    fn check(&self, folder: &Path) -> Result<Facts>;

    /// What forecasts of later stages need to know of the artifact ([`Kind::forecast`](crate::kind::Kind::forecast)); null:
    /// nothing, or it cannot be read.
    fn outline(&self, folder: &Path) -> serde_json::Value {
        let _ = folder;
        serde_json::Value::Null
    }

    /// The first `rows` rows, as text for a terminal.
    fn preview(&self, folder: &Path, rows: usize) -> Result<String>;
}

/// A file or folder that artifacts of a type hold.
#[derive(Clone, Debug, Serialize)]
pub struct FileSpec {
    /// Path relative to the artifact's folder; a folder's ends with `/`.
    pub name: &'static str,
    pub about: String,
    /// Whether an artifact may lack it.
    pub optional: bool,
    /// Empty if the file is not a table.
    pub columns: Vec<ColumnSpec>,
    /// Converts JSON lines to this table; `None` if the file is not a table.
    #[serde(skip)]
    pub from_json_lines: Option<FromJsonLines>,
}

/// Reads rows from a file of JSON lines, writes them as a table to a new file, and returns their number.
pub type FromJsonLines = fn(lines: &Path, table: &Path) -> Result<u64>;

impl FileSpec {
    /// A required file that is not a table.
    pub fn new(name: &'static str, about: impl Into<String>) -> Self {
        Self { name, about: about.into(), optional: false, columns: Vec::new(), from_json_lines: None }
    }

    #[must_use]
    pub fn optional(mut self) -> Self {
        self.optional = true;
        self
    }
}

/// A column of a table.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ColumnSpec {
    pub name: &'static str,
    /// Such as `utf8`, `f64` or `list<u32>`.
    #[serde(rename = "type")]
    pub data_type: String,
    /// Whether it may hold nulls. The table may then also lack the column.
    pub nullable: bool,
    pub about: String,
    /// If the column is limited to a set of words: each word, with its meaning where the name does not say it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub words: Vec<(&'static str, String)>,
}

/// Facts about an artifact's content that the manifest records besides its files.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// Number of rows of each table, by file name.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub rows: BTreeMap<String, u64>,
    /// Columns of each table, by file name: (name, type) in order.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub schema: BTreeMap<String, Vec<(String, String)>>,
    /// The numbers of `metrics.json`, if the folder has one.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub metrics: BTreeMap<String, f64>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileEntry {
    pub bytes: u64,
    pub digest: Digest,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub executable: bool,
}

/// The content of an artifact; its BLAKE3 is the artifact's digest. Holds content only: no times, hosts or program
/// versions.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    #[serde(rename = "type")]
    pub artifact_type: String,
    pub schema_version: u32,
    /// Keyed by path relative to the folder, with `/` between parts; sorted.
    pub files: BTreeMap<String, FileEntry>,
    /// Empty folders; paths as in `files`.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub folders: BTreeSet<String>,
    pub facts: Facts,
}

/// Maximum bytes of holes in a (sparse) file of an artifact, because copies fill them.
const MAX_HOLES: u64 = 1 << 30;

/// Checks that the output folder of an attempt is still a folder: files behind a link do not belong to the attempt.
///
/// # Errors
/// When it is a link or a file, or is gone.
pub fn check_root(out: &Path) -> Result<()> {
    let metadata = std::fs::symlink_metadata(out);
    if metadata.as_ref().is_ok_and(Metadata::is_dir) {
        return Ok(());
    }
    let what = match metadata {
        Ok(metadata) if metadata.is_symlink() => "was replaced by a link",
        Ok(_) => "was replaced by a file",
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => "was removed",
        Err(e) => return Err(e).at(out),
    };
    Err(Error::user(format!("{}: the output folder {what}", out.display()))
        .help("keep the output folder, and write or copy files into it"))
}

/// Checks that a file of an artifact has at most a GiB of holes.
///
/// # Errors
/// When it has more, or cannot be read.
pub fn check_holes(path: &Path, metadata: &Metadata) -> Result<()> {
    // A file that occupies its full size on disk has no holes; one that occupies less may only be compressed by the
    // file system.
    if metadata.len().saturating_sub(metadata.blocks() * 512) <= MAX_HOLES {
        return Ok(());
    }
    let holes = holes(path, metadata.len()).map_err(std::io::Error::from).at(path)?;
    if holes <= MAX_HOLES {
        return Ok(());
    }
    Err(Error::user(format!("{}: the file is sparse, with {} GiB of holes", path.display(), holes >> 30))
        .help("write the file without holes, or compress it"))
}

/// Number of bytes of a file that lie in holes.
fn holes(path: &Path, length: u64) -> rustix::io::Result<u64> {
    let file = rustix::fs::open(path, OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC, Mode::empty())?;
    let (mut at, mut holes) = (0, 0);
    while at < length {
        let data = match seek(&file, SeekFrom::Data(at)) {
            // No data from here to the end.
            Err(Errno::NXIO) => length,
            other => other?,
        };
        holes += data - at;
        at = if data < length { seek(&file, SeekFrom::Hole(data))? } else { length };
    }
    Ok(holes)
}

impl Manifest {
    /// The canonical bytes, which are written to `manifest.json` and hashed.
    pub fn to_bytes(&self) -> Vec<u8> {
        // Maps with string keys and finite numbers always serialise; non-finite metrics become null.
        let mut bytes = serde_json::to_vec_pretty(self).expect("a manifest is plain data");
        bytes.push(b'\n');
        bytes
    }

    pub fn digest(&self) -> Digest {
        Digest::of(&self.to_bytes())
    }
}
