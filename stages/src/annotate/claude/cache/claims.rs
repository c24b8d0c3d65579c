//! Who is asking about which document just now: locks on single bytes of a file, released by death. Knows no answer.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use engine::error::{At, Result};

use crate::annotate::claude::document::AnswerKey;

/// The locks belong to the open file: another in the same process counts as another process.
pub struct Claims {
    path: PathBuf,
    file: File,
}

impl Claims {
    /// # Errors
    /// If the file cannot be opened or made.
    pub fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().create(true).truncate(false).read(true).write(true).open(path).at(path)?;
        Ok(Self { path: path.to_owned(), file })
    }

    /// Whether the document is ours now.
    ///
    /// # Errors
    /// If the file system has no locks.
    pub fn claim(&self, key: AnswerKey) -> Result<bool> {
        match self.set(key, libc::F_WRLCK) {
            Ok(()) => Ok(true),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::PermissionDenied) => Ok(false),
            Err(e) => Err(e).at(&self.path),
        }
    }

    /// # Errors
    /// If the file system has no locks.
    pub fn release(&self, key: AnswerKey) -> Result<()> {
        self.set(key, libc::F_UNLCK).at(&self.path)
    }

    fn set(&self, key: AnswerKey, kind: i32) -> std::io::Result<()> {
        // The file stays empty: a lock may lie beyond its end. The number has 62 bits, so that its end fits too.
        let start = i64::try_from(key.number()).unwrap_or(0);
        let lock = libc::flock {
            l_type: kind as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: start,
            l_len: 1,
            l_pid: 0,
        };
        // SAFETY: the descriptor is open while `self.file` lives, and the call only reads `lock`, which outlives it.
        match unsafe { libc::fcntl(self.file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }
}
