//! Artifacts: typed, immutable folders and their manifests. Knows no store.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::names::Digest;

/// A type of artifact: what a folder of it must hold, and how to look at it.
pub trait ArtifactType: Send + Sync {
    /// `Posts`, `Model`, …
    fn name(&self) -> &'static str;

    /// Raised when the layout changes in a way that old readers cannot take.
    fn schema_version(&self) -> u32 {
        1
    }

    /// One line for people: what the folder holds.
    fn about(&self) -> &'static str;

    /// Checks that `folder` is a whole artifact of this type and gathers its facts.
    ///
    /// # Errors
    /// When a file is missing or does not have the declared shape: names the file and what was expected.
    fn check(&self, folder: &Path) -> Result<Facts>;

    /// A look at the first `rows` rows, as text for a terminal.
    fn preview(&self, folder: &Path, rows: usize) -> Result<String>;
}

/// What a manifest tells of an artifact's content besides its files.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Facts {
    /// Rows of each table, by file name.
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
}

/// The content of an artifact; its BLAKE3 is the artifact's digest. Content only: no times, hosts or versions of programs.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    #[serde(rename = "type")]
    pub artifact_type: String,
    pub schema_version: u32,
    /// By path relative to the folder, with `/` between parts, sorted.
    pub files: BTreeMap<String, FileEntry>,
    pub facts: Facts,
}

impl Manifest {
    /// The canonical bytes: what is written to `manifest.json` and hashed.
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
