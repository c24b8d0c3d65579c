//! The report of a run: a self-contained HTML page and the summary printed on the terminal.

mod agreement;
mod answers;
mod arms;
mod best_of_n;
mod chart;
mod export;
mod figures;
mod forest;
mod gates;
mod glossary;
mod graph;
mod html;
pub use html::{csv_text, escape};
mod inference;
mod learned;
pub use learned::number;
pub mod load;
mod outcome;
mod page;
mod parameters;
mod stopping;
mod study;
pub mod terminal;
mod timeline;
mod uncertainty;
mod verdict;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use engine::error::{AtPath, Result};
use engine::store::Store;

use load::RunData;
use study::Study;

/// The written report and the text to print.
pub struct Report {
    pub path: PathBuf,
    /// The table of arms and the sentences; empty if the run has neither an evaluation nor an agreement.
    pub summary: String,
}

/// Renders the report, and writes its figures as SVG, its summary and the run's keys into `to`.
///
/// # Errors
/// Like [`render`], and if a file cannot be written.
pub fn export(folder: &Path, store: &Store, to: &Path) -> Result<Report> {
    let report = render(folder, store)?;
    export::export(&RunData::read(folder, store)?, &report.path, &report.summary, to)?;
    Ok(report)
}

/// Renders `report.html` from the run's journal and artifacts, including failed and partial runs. Writes it into the
/// run's folder or, if the store is read-only, into the system's temporary folder.
///
/// # Errors
/// If the run's folder or one of its artifacts cannot be read.
pub fn render(folder: &Path, store: &Store) -> Result<Report> {
    let run = RunData::read(folder, store)?;
    let (study, agreement) = (Study::gather(&run), agreement::gather(&run));
    let page = page::render(&run, &study, &agreement);
    let path = if folder.starts_with(store.root()) && !store.is_writable() {
        let name = format!("temper-{}-{:x}.html", run.id, std::process::id());
        let path = std::env::temp_dir().join(name);
        // Do not overwrite a file that somebody else may have created there.
        File::create_new(&path).and_then(|mut file| file.write_all(page.as_bytes())).at(&path)?;
        path
    } else {
        let path = folder.join("report.html");
        std::fs::write(&path, page).at(&path)?;
        path
    };
    let mut summary = terminal::summary(&study, &agreement::sentences(&agreement));
    if !summary.is_empty() {
        summary.extend(run.settings.notes.iter().map(|note| format!("{note}\n")));
    }
    Ok(Report { path, summary })
}
