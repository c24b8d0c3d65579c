//! Checks for `temper doctor` that a folder's file system supports what a store needs, such as locks and links.

use std::fs::{self, File, TryLockError};
use std::path::Path;

use super::files::{self, TemporaryPath};
use crate::error::{AtPath, Result};

/// Features of a file system.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileSystemSupport {
    /// Files can have hard links. Without them, the store copies.
    pub hard_links: bool,
    /// A lock excludes others. If locks have no effect, two runs may make the same artifact at the same time.
    pub locks: bool,
}

/// Writes, syncs, locks and links a temporary file in `folder`.
///
/// # Errors
/// If a file cannot be written or locked there.
pub fn probe_file_system(folder: &Path) -> Result<FileSystemSupport> {
    let (_file, path) = files::write_temporary(&folder.join("probe"), b"temper")?;
    let (first, second) = (File::open(&path).at(&path)?, File::open(&path).at(&path)?);
    first.lock().at(&path)?;
    let locks = matches!(second.try_lock(), Err(TryLockError::WouldBlock));
    let link = files::temporary_name(&path);
    let hard_links = fs::hard_link(&path, &link).is_ok();
    drop(TemporaryPath::new(link));
    Ok(FileSystemSupport { hard_links, locks })
}
