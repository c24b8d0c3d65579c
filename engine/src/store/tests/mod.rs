//! Tests of the store.

mod commit;
mod crash;
mod damage;
mod external;
mod index;
mod open;
mod records;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde_json::json;
use tempfile::TempDir;

use super::{ActionRecord, Platform, Provenance, Store};
use crate::artifact::{ArtifactType, Facts, Manifest};
use crate::error::Result;
use crate::names::{Digest, InstanceName};
use crate::plan::Recipe;

/// An artifact type that accepts any folder.
pub(crate) struct Anything;

impl ArtifactType for Anything {
    fn name(&self) -> &'static str {
        "Anything"
    }

    fn about(&self) -> &'static str {
        "any files"
    }

    fn check(&self, _: &Path) -> Result<Facts> {
        Ok(Facts::default())
    }

    fn preview(&self, _: &Path, _: usize) -> Result<String> {
        Ok(String::new())
    }
}

/// A store in a temporary folder, with space for outputs.
pub(crate) struct TestSpace {
    pub folder: TempDir,
    pub store: Store,
}

impl TestSpace {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let store = Store::open(&folder.path().join("cache")).unwrap();
        Self { folder, store }
    }

    /// The same store as another process sees it.
    pub fn reopen(&self) -> Store {
        Store::open(self.store.root()).unwrap()
    }

    /// A new output folder with these files.
    pub fn out(&self, files: &[(&str, &[u8])]) -> PathBuf {
        let out = tempfile::tempdir_in(self.folder.path()).unwrap().keep();
        for (name, bytes) in files {
            let path = out.join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        out
    }

    pub fn commit(&self, files: &[(&str, &[u8])]) -> (Digest, Manifest) {
        self.store.commit(&self.out(files), &Anything).unwrap()
    }
}

pub(crate) fn instance(name: &str) -> InstanceName {
    let (stage, labels) = match name.strip_suffix(']').and_then(|name| name.split_once('[')) {
        Some((stage, labels)) => (stage, labels.split(',').map(str::to_owned).collect()),
        None => (name, Vec::new()),
    };
    InstanceName { stage: stage.to_owned().try_into().unwrap(), labels }
}

/// A record whose recipe depends only on `n`.
pub(crate) fn record(n: u64, digest: Digest) -> ActionRecord {
    let recipe = Recipe {
        kind: "test.work".into(),
        version: 1,
        numerics: None,
        params: json!({ "n": n }),
        seed: None,
        inputs: Vec::new(),
    };
    let provenance = Provenance {
        stage: instance("work"),
        started: 1.0,
        seconds: 2.5,
        peak_bytes: 1 << 20,
        host: "here".into(),
        platform: Platform::this_cpu(),
        run: "1".into(),
        attempt: "1".into(),
        job: None,
        paths: Default::default(),
        warnings: Vec::new(),
    };
    ActionRecord { key: recipe.key(), digest, recipe, provenance }
}

/// Flips one bit in place, through every link to the file, as root can.
fn flip_bit(path: &Path) {
    let file = writable(path);
    let mut byte = [0];
    file.read_exact_at(&mut byte, 0).unwrap();
    file.write_all_at(&[byte[0] ^ 1], 0).unwrap();
}

/// Flips one bit and restores the mtime: damage that leaves the stat unchanged.
fn flip_bit_keeping_mtime(path: &Path) {
    let before = fs::metadata(path).unwrap();
    flip_bit(path);
    writable(path).set_modified(before.modified().unwrap()).unwrap();
    assert_eq!(fs::metadata(path).unwrap().mtime_nsec(), before.mtime_nsec());
}

fn writable(path: &Path) -> fs::File {
    let mut permissions = fs::metadata(path).unwrap().permissions();
    std::os::unix::fs::PermissionsExt::set_mode(&mut permissions, 0o644);
    fs::set_permissions(path, permissions).unwrap();
    fs::File::options().read(true).write(true).open(path).unwrap()
}
