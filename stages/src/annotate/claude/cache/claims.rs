//! Who is asking about which document just now: locks on single bytes of files, released by death. Knows no answer.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use engine::error::{At, Result};

use crate::annotate::claude::document::AnswerKey;

/// The kernel goes through all locks of a file for each new one: a batch claims its documents by the ten thousand, and over
/// so many files that costs nothing.
const FILES: u64 = 64;

/// The locks belong to the open files: others in the same process count as another process.
pub struct Claims {
    folder: PathBuf,
    files: Vec<File>,
}

impl Claims {
    /// # Errors
    /// If the files cannot be opened or made.
    pub fn open(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).at(folder)?;
        let open = |n: u64| {
            let path = folder.join(format!("{n:02}"));
            OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path).at(&path)
        };
        Ok(Self { folder: folder.to_owned(), files: (0..FILES).map(open).collect::<Result<_>>()? })
    }

    /// Whether the document is ours now.
    ///
    /// # Errors
    /// If the file system has no locks.
    pub fn claim(&self, key: AnswerKey) -> Result<bool> {
        match self.set(key, libc::F_WRLCK) {
            Ok(()) => Ok(true),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::PermissionDenied) => Ok(false),
            Err(e) => Err(e).at(&self.folder),
        }
    }

    /// # Errors
    /// If the file system has no locks.
    pub fn release(&self, key: AnswerKey) -> Result<()> {
        self.set(key, libc::F_UNLCK).at(&self.folder)
    }

    fn set(&self, key: AnswerKey, kind: i32) -> std::io::Result<()> {
        let (file, byte) = (key.number() % FILES, key.number() / FILES);
        // Less than the number of files.
        let file = &self.files[file as usize];
        // The file stays empty: a lock may lie beyond its end. The number has less than 62 bits, so that its end fits too.
        let start = i64::try_from(byte).unwrap_or(0);
        let lock = libc::flock {
            l_type: kind as libc::c_short,
            l_whence: libc::SEEK_SET as libc::c_short,
            l_start: start,
            l_len: 1,
            l_pid: 0,
        };
        // SAFETY: the descriptor is open while `file` lives, and the call only reads `lock`, which outlives it.
        match unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } {
            0 => Ok(()),
            _ => Err(std::io::Error::last_os_error()),
        }
    }
}
