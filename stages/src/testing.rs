//! Test helper that runs a kind on small inputs in fresh folders.

pub mod attempts;
/// Numeric comparisons shared with the tests of `lm`.
#[path = "../../lm/tests/parity/numbers.rs"]
pub mod numbers;
pub mod toys;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use engine::context::{Context, Input, StageEvent};
use engine::error::{Error, Result};
use engine::kind::{AnyKind, Kind};
use engine::names::Digest;
use serde_json::Value;
use tempfile::TempDir;

/// A folder of files and input artifacts for a kind.
pub struct Bench {
    folder: TempDir,
    inputs: BTreeMap<String, Vec<Input>>,
}

impl Bench {
    pub fn new() -> Self {
        Self { folder: tempfile::tempdir().expect("a temporary folder"), inputs: BTreeMap::new() }
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn write(&self, name: &str, text: &str) -> PathBuf {
        let path = self.path(name);
        std::fs::write(&path, text).expect("a file in a temporary folder");
        path
    }

    /// Adds an artifact at `port`, written by `fill`.
    pub fn input(&mut self, port: &str, artifact_type: &str, fill: impl FnOnce(&Path) -> Result<()>) {
        let n: usize = self.inputs.values().map(Vec::len).sum();
        let folder = self.path(&format!("input-{n}"));
        std::fs::create_dir(&folder).expect("a folder in a temporary folder");
        fill(&folder).expect("a filled input");
        self.inputs.entry(port.to_owned()).or_default().push(Input {
            label: format!("input-{n}"),
            artifact_type: artifact_type.to_owned(),
            digest: Digest::of(format!("input {n}").as_bytes()),
            folder,
        });
    }

    pub fn inputs(&self) -> BTreeMap<String, Vec<Input>> {
        self.inputs.clone()
    }
}

/// The output and warnings of a kind.
pub struct Out {
    folder: TempDir,
    /// In order of emission.
    pub warnings: Vec<String>,
}

impl Out {
    pub fn path(&self) -> PathBuf {
        self.folder.path().join("out")
    }

    pub fn metric(&self, name: &str) -> f64 {
        let text = std::fs::read(self.path().join("metrics.json")).expect("metrics were written");
        let metrics: BTreeMap<String, f64> = serde_json::from_slice(&text).expect("metrics are numbers");
        *metrics.get(name).unwrap_or_else(|| panic!("no metric {name} in {metrics:?}"))
    }

    pub fn metrics<'a>(&self, names: &[&'a str]) -> Vec<(&'a str, f64)> {
        names.iter().map(|name| (*name, self.metric(name))).collect()
    }
}

/// Asserts that the numbers of a kind's small run equal those recorded for its version: a change without a new version
/// is a bug. The tolerance is far larger than rounding differences between CPUs.
#[track_caller]
pub fn assert_pinned(found: &[(&str, f64)], pinned: &[f64]) {
    let near = found.len() == pinned.len() && found.iter().zip(pinned).all(|((_, x), pin)| (x - pin).abs() <= 1e-4);
    assert!(
        near,
        "pinned {pinned:?}, found {found:?}: what changes a kind's numbers raises its VERSION or lm::NUMERICS"
    );
}

/// Runs a kind as an attempt does: parameters are normalised, and the output is checked against its type.
pub fn run<K: Kind>(kind: &K, with: Value, inputs: BTreeMap<String, Vec<Input>>) -> Result<Out> {
    run_seeded(kind, with, inputs, 7)
}

pub fn run_seeded<K: Kind>(kind: &K, with: Value, inputs: BTreeMap<String, Vec<Input>>, seed: u64) -> Result<Out> {
    let kind: &dyn AnyKind = kind;
    let params = kind.normalise(&with).map_err(|faults| Error::user(format!("{faults:?}")))?;
    let params = engine::external::with_listed_files(&params, None)?;
    let folder = tempfile::tempdir().expect("a temporary folder");
    let (out, checkpoints) = (folder.path().join("out"), folder.path().join("checkpoints"));
    for path in [&out, &checkpoints] {
        std::fs::create_dir(path).expect("a folder in a temporary folder");
    }
    let warnings = run_in(kind, &params, inputs, seed, &out, &checkpoints)?;
    Ok(Out { folder, warnings })
}

/// As [`run_seeded`], in the given folders, so that a second attempt finds the first one's checkpoints. Returns the
/// warnings.
pub fn run_in(
    kind: &dyn AnyKind,
    params: &Value,
    inputs: BTreeMap<String, Vec<Input>>,
    seed: u64,
    out: &Path,
    checkpoints: &Path,
) -> Result<Vec<String>> {
    let warnings: Arc<Mutex<Vec<String>>> = Arc::default();
    let sink = warnings.clone();
    let mut ctx =
        Context::new(kind.name(), seed, inputs, out.to_owned(), checkpoints.to_owned()).with_sink(move |tell| {
            if let StageEvent::Warning { message } = tell {
                sink.lock().expect("no test panics while it warns").push(message);
            }
        });
    kind.run(params, &mut ctx)?;
    ctx.write_metrics()?;
    let output = kind.signature(params)?.output;
    let registry = crate::registry();
    let artifact_type = registry.get_type(&output).unwrap_or_else(|| panic!("{output} is a registered type"));
    let facts = artifact_type.check(out)?;
    for (table, columns) in &facts.schema {
        let files = artifact_type.files();
        let described = files.iter().find(|file| file.name == table);
        let described = described.unwrap_or_else(|| panic!("{output} describes its table {table}"));
        assert!(columns.iter().map(|(name, _)| name).eq(described.columns.iter().map(|column| column.name)), "{table}");
    }
    let warnings = warnings.lock().expect("no test panics while it warns").clone();
    Ok(warnings)
}
