//! Changes of files and folders, as in `std::fs`. The orchestrator, the store and the attempts change files through this
//! module only, so that each step is a fault point (`fault`).

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Result, Write};
use std::path::Path;

use rustix::fs::{CWD, RenameFlags};

use crate::fault;

fn point(step: &str, path: &Path) -> Result<()> {
    fault::next(step, path).map_or(Ok(()), |fault| Err(fault.strike()))
}

/// Writes all bytes to an open file at `path`. A fault leaves half of them.
pub(crate) fn write_all(mut file: impl Write, path: &Path, bytes: &[u8]) -> Result<()> {
    match fault::next("write", path) {
        None => file.write_all(bytes),
        Some(fault) => {
            file.write_all(&bytes[..bytes.len() / 2])?;
            Err(fault.strike())
        }
    }
}

pub(crate) fn write(path: &Path, bytes: impl AsRef<[u8]>) -> Result<()> {
    point("create", path)?;
    write_all(File::create(path)?, path, bytes.as_ref())
}

pub(crate) fn create_new(path: &Path) -> Result<File> {
    point("create", path)?;
    File::create_new(path)
}

/// Opens a file; a fault point if that creates it.
pub(crate) fn open(options: &OpenOptions, path: &Path) -> Result<File> {
    if fs::symlink_metadata(path).is_err() {
        point("create", path)?;
    }
    options.open(path)
}

pub(crate) fn set_len(file: &File, path: &Path, length: u64) -> Result<()> {
    point("truncate", path)?;
    file.set_len(length)
}

pub(crate) fn sync(file: &File, path: &Path) -> Result<()> {
    point("sync", path)?;
    file.sync_all()
}

/// Syncs the file system that `file` is on.
pub(crate) fn sync_file_system(file: &File, path: &Path) -> Result<()> {
    point("sync all of", path)?;
    rustix::fs::syncfs(file).map_err(Into::into)
}

pub(crate) fn rename(from: &Path, to: &Path) -> Result<()> {
    point("rename to", to)?;
    fs::rename(from, to)
}

/// Renames without replacing what is at `to`.
pub(crate) fn rename_new(from: &Path, to: &Path) -> rustix::io::Result<()> {
    if let Some(fault) = fault::next("rename to", to) {
        return Err(rustix::io::Errno::from_io_error(&fault.strike()).unwrap_or(rustix::io::Errno::IO));
    }
    rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)
}

pub(crate) fn hard_link(from: &Path, to: &Path) -> Result<()> {
    point("link", to)?;
    fs::hard_link(from, to)
}

pub(crate) fn copy(from: &Path, to: &Path) -> Result<()> {
    point("copy to", to)?;
    fs::copy(from, to).map(drop)
}

pub(crate) fn create_dir(path: &Path) -> Result<()> {
    point("make folder", path)?;
    fs::create_dir(path)
}

/// A fault point if the folder does not exist.
pub(crate) fn create_dir_all(path: &Path) -> Result<()> {
    if !path.is_dir() {
        point("make folder", path)?;
    }
    fs::create_dir_all(path)
}

pub(crate) fn set_permissions(path: &Path, permissions: Permissions) -> Result<()> {
    point("set permissions of", path)?;
    fs::set_permissions(path, permissions)
}

pub(crate) fn remove_file(path: &Path) -> Result<()> {
    point("remove", path)?;
    fs::remove_file(path)
}

pub(crate) fn remove_dir_all(path: &Path) -> Result<()> {
    point("remove", path)?;
    fs::remove_dir_all(path)
}
