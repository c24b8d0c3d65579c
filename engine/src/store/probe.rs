//! Tests whether a folder's file system does what a store needs, for `temper doctor`.

use std::fs::{self, File, TryLockError};
use std::path::Path;

use super::files::{self, Temporary};
use crate::error::{At, Result};

/// What a file system can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Probe {
    /// Files can have hard links. Without them, the store copies.
    pub links: bool,
    /// A lock that is held cannot be taken again. Otherwise two runs may make the same artifact at the same time.
    pub locks: bool,
}

/// Writes, syncs, locks and links a temporary file in `folder`.
///
/// # Errors
/// If a file cannot be written or locked there.
pub fn probe(folder: &Path) -> Result<Probe> {
    let (_file, path) = files::write_beside(&folder.join("probe"), b"temper")?;
    let (first, second) = (File::open(&path).at(&path)?, File::open(&path).at(&path)?);
    first.lock().at(&path)?;
    let locks = matches!(second.try_lock(), Err(TryLockError::WouldBlock));
    let link = files::fresh_name(&path);
    let links = fs::hard_link(&path, &link).is_ok();
    drop(Temporary::new(link));
    Ok(Probe { links, locks })
}
