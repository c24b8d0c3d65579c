//! Paths that stand for others: one reading of them, for the key and for the kind. Knows no parameter.

use std::path::{Path, PathBuf};

use crate::error::{Error, Result};

/// Whether a path, if nothing lies there, is a pattern for others.
pub fn is_wildcard(path: &Path) -> bool {
    path.to_string_lossy().contains(['*', '?', '['])
}

/// The files that a wildcard matches, sorted; none if it matches none.
///
/// # Errors
/// When it is no pattern, or a folder on its way cannot be read (yours).
pub fn files(pattern: &Path) -> Result<Vec<PathBuf>> {
    let wrong = |what: &dyn std::fmt::Display| Error::yours(format!("{}: {what}", pattern.display()));
    let found = glob::glob(&pattern.to_string_lossy()).map_err(|e| wrong(&e))?;
    let mut files = found.collect::<Result<Vec<PathBuf>, _>>().map_err(|e| wrong(&e))?;
    files.retain(|path| path.is_file());
    files.sort();
    Ok(files)
}
