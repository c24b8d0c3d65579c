//! The report of a run: one self-contained HTML page, and what the terminal prints at the end. Computes no learning.

mod agreement;
mod arms;
mod chart;
mod figures;
mod graph;
mod html;
pub use html::escape;
pub mod load;
mod page;
mod study;
pub mod terminal;
mod verdict;

use std::path::{Path, PathBuf};

use engine::error::{At, Result};
use engine::store::Store;

use load::RunData;
use study::Study;

/// What was written, and what to print of it.
pub struct Report {
    pub path: PathBuf,
    /// The table of arms and the sentences; empty when the run has neither an evaluation nor an agreement.
    pub summary: String,
}

/// Renders `report.html` into the run's folder from its journal and artifacts; also for a failed or partial run.
///
/// # Errors
/// When the run's folder or one of its artifacts cannot be read.
pub fn render(folder: &Path, store: &Store) -> Result<Report> {
    let run = RunData::read(folder, store)?;
    let (study, agreement) = (Study::gather(&run), agreement::gather(&run));
    let path = folder.join("report.html");
    std::fs::write(&path, page::render(&run, &study, &agreement)).at(&path)?;
    Ok(Report { path, summary: terminal::summary(&study, &agreement::sentences(&agreement)) })
}
