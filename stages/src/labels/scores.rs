//! Scores of an unfinished labelling, and their checkpoints.

use std::path::Path;

use engine::checkpoint::Checkpoints;
use engine::context::{Context, StepProgress};
use engine::error::{AtPath, Error, Result};

/// The scores of all pairs so far, a fixed number for each. A checkpoint holds nothing else: labels and rows are
/// recomputed from them.
pub struct Scores {
    /// Scores of one pair.
    per_pair: usize,
    found: Vec<f32>,
    /// Number of scores already requested.
    used: usize,
    checkpoints: Checkpoints,
}

/// Version of the format of [`Scores::FILE`].
const FORMAT: u32 = 1;

impl Scores {
    const FILE: &'static str = "scores.f32";

    /// Loads the scores of an earlier attempt, if it left any. `total` is the number of pairs in all tables.
    ///
    /// # Errors
    /// If the folder of checkpoints cannot be listed.
    pub fn of(ctx: &mut Context, total: u64, per_pair: usize) -> Result<Self> {
        let mut checkpoints = Checkpoints::new(ctx, FORMAT);
        let found = checkpoints.latest(ctx, |folder| Self::read(folder, total, per_pair))?.map(|(found, _)| found);
        if let Some(found) = &found {
            ctx.resumed(StepProgress { done: (found.len() / per_pair) as u64, total, unit: "pairs" });
        }
        Ok(Self { per_pair, found: found.unwrap_or_default(), used: 0, checkpoints })
    }

    /// The scores of the next `pairs` pairs in order; calls `make` unless a checkpoint has them.
    ///
    /// # Errors
    /// Errors of `make`.
    pub fn next(
        &mut self,
        ctx: &mut Context,
        pairs: usize,
        (done, total): (u64, u64),
        make: impl FnOnce() -> Result<Vec<f32>>,
    ) -> Result<Vec<f32>> {
        let end = self.used + pairs * self.per_pair;
        if self.found.len() < end {
            // Inputs and chunks are the same in every attempt, so an earlier attempt stopped between two calls.
            self.found.truncate(self.used);
            self.found.extend(make()?);
            if self.checkpoints.due() {
                let found = &self.found;
                self.checkpoints
                    .publish(ctx, StepProgress { done, total, unit: "pairs" }, |folder| Self::write(folder, found));
            }
        }
        let scores = self.found[self.used..end].to_vec();
        self.used = end;
        Ok(scores)
    }

    fn write(folder: &Path, found: &[f32]) -> Result<()> {
        let bytes: Vec<u8> = found.iter().flat_map(|score| score.to_le_bytes()).collect();
        let path = folder.join(Self::FILE);
        std::fs::write(&path, bytes).at(&path)
    }

    fn read(folder: &Path, total: u64, per_pair: usize) -> Result<Vec<f32>> {
        let path = folder.join(Self::FILE);
        let bytes = std::fs::read(&path).at(&path)?;
        let (scores, rest) = bytes.as_chunks::<4>();
        let is_whole = rest.is_empty() && scores.len().is_multiple_of(per_pair);
        if !is_whole || scores.len() as u64 > total.saturating_mul(per_pair as u64) {
            let what = format!("{}: holds {} bytes, no scores of {total} pairs", path.display(), bytes.len());
            return Err(Error::environment(what));
        }
        Ok(scores.iter().map(|score| f32::from_le_bytes(*score)).collect())
    }
}
