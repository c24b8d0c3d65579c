//! Disk use and garbage collection: what each result takes, what keeps it, and the deletion of what nothing keeps.
//!
//! A result is kept by a pipeline that reuses it now, by a run, by a pin, or by a process that is running. Everything is
//! decided and deleted under one lock (`locks/gc`), which planning, commits and transfers into the store hold shared. A
//! running pipeline is therefore either still before its plan, or its journal names what it uses; what it has made but
//! not recorded yet is kept because it was committed since the run began.

mod roots;
mod survey;
#[cfg(test)]
mod tests;

use std::path::Path;

pub use roots::{KeptRuns, PipelineRoots, pipeline_roots};
pub use survey::{ArtifactUse, Keeper, RunUse, Survey, WorkUse, survey};

use crate::disk;
use crate::error::{AtPath, Result};
use crate::store::{Stat, Store, files};

/// Deletes what nothing keeps, and returns the survey that it went by. Action records stay: they are small, and say how
/// a result was made. `on_wait` is called if the collection has to wait for a command that is planning or committing.
///
/// # Errors
/// When a run, a pin or a folder of the store cannot be read, before anything is deleted; when a deletion fails.
pub fn collect(store: &Store, kept: &KeptRuns, pipelines: &[PipelineRoots], on_wait: impl FnOnce()) -> Result<Survey> {
    let _guard = store.start_collection(on_wait)?;
    let found = survey(store, kept, pipelines)?;
    let mut deleted = Vec::new();
    for artifact in found.artifacts.iter().filter(|artifact| artifact.kept_by.is_empty()) {
        let folder = store.artifact_folder(&artifact.digest);
        // Gone for all readers at once: temporary names are never read.
        let name = files::temporary_name(&folder);
        disk::rename(&folder, &name).at(&folder)?;
        disk::remove_dir_all(&name).at(&name)?;
    }
    for path in &found.unused_blobs {
        if let Some(metadata) = files::metadata_if_exists(path)? {
            deleted.push(Stat::from(&metadata));
            disk::remove_file(path).at(path)?;
        }
    }
    // The inode of a deleted file may be used again.
    store.forget(&deleted)?;
    for path in &found.leftovers {
        remove(path)?;
    }
    for work in found.work.iter().filter(|work| !work.kept) {
        // An attempt, or a process that it left behind, holds the lock.
        if let Some(_lock) = store.try_lock(&work.key)? {
            store.clear_work(&work.key)?;
        }
    }
    Ok(found)
}

/// Deletes the folder of a run: its journal, graph and report.
///
/// # Errors
/// When it cannot be deleted.
pub fn remove_run(folder: &Path) -> Result<()> {
    let name = files::temporary_name(folder);
    disk::rename(folder, &name).at(folder)?;
    disk::remove_dir_all(&name).at(&name)
}

fn remove(path: &Path) -> Result<()> {
    match files::metadata_if_exists(path)? {
        None => Ok(()),
        Some(metadata) if metadata.is_dir() => disk::remove_dir_all(path).at(path),
        Some(_) => disk::remove_file(path).at(path),
    }
}
