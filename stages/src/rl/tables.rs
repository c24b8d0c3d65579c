//! The tables of a run: written into the artifact and kept for checkpoints.

use std::path::{Path, PathBuf};

use engine::context::Context;
use engine::error::{AtPath, Result};

use crate::table;
use crate::types::{Phase, PolicyRun, Sample};

/// Folder of the samples of each evaluation, inside the checkpoint folder.
const EVALUATIONS: &str = "evaluations";

/// The phases, kept in memory, and the samples, on disk.
pub(super) struct Tables {
    pub phases: Vec<Phase>,
    samples: table::Writer<Sample>,
    /// Holds one numbered file per call of [`Tables::evaluated`]: an unfinished Parquet file cannot be read, so a
    /// checkpoint cannot keep the artifact's own half-written file.
    kept: PathBuf,
    evaluations: u64,
}

impl Tables {
    /// Creates empty tables; deletes files that an earlier attempt left outside its checkpoints.
    pub fn create(ctx: &Context) -> Result<Self> {
        let kept = ctx.checkpoints().join(EVALUATIONS);
        if kept.exists() {
            std::fs::remove_dir_all(&kept).at(&kept)?;
        }
        std::fs::create_dir_all(&kept).at(&kept)?;
        let samples = table::Writer::create(&ctx.out().join(PolicyRun::SAMPLES))?;
        Ok(Self { phases: Vec::new(), samples, kept, evaluations: 0 })
    }

    /// Adds the rows of one evaluation.
    pub fn evaluated(&mut self, rows: Vec<Sample>) -> Result<()> {
        table::write(&self.kept.join(name(self.evaluations)), rows.iter().cloned())?;
        self.evaluations += 1;
        rows.into_iter().try_for_each(|row| self.samples.push(row))
    }

    /// Number of files in `kept`.
    pub fn evaluations(&self) -> u64 {
        self.evaluations
    }

    /// Puts the tables so far into a checkpoint's folder; finished files are linked, not copied.
    pub fn keep(&self, folder: &Path) -> Result<()> {
        table::write(&folder.join(PolicyRun::PHASES), self.phases.iter().cloned())?;
        (0..self.evaluations).map(name).try_for_each(|name| link(&self.kept.join(&name), &folder.join(&name)))
    }

    /// Takes over the files that [`Tables::keep`] put there.
    pub fn restore(&mut self, folder: &Path, evaluations: u64) -> Result<()> {
        self.phases = table::read(&folder.join(PolicyRun::PHASES))?;
        for name in (0..evaluations).map(name) {
            link(&folder.join(&name), &self.kept.join(&name))?;
            for row in table::Reader::open(&folder.join(&name))? {
                self.samples.push(row?)?;
            }
        }
        self.evaluations = evaluations;
        Ok(())
    }

    /// Finishes the tables of the artifact in `out`.
    pub fn finish(self, out: &Path) -> Result<()> {
        self.samples.finish()?;
        table::write(&out.join(PolicyRun::PHASES), self.phases)?;
        std::fs::remove_dir_all(&self.kept).at(&self.kept)
    }
}

fn name(evaluation: u64) -> String {
    format!("samples-{evaluation}.parquet")
}

/// Creates a hard link, or a copy if the file system does not support links.
fn link(from: &Path, to: &Path) -> Result<()> {
    if std::fs::hard_link(from, to).is_err() {
        std::fs::copy(from, to).at(from)?;
    }
    Ok(())
}
