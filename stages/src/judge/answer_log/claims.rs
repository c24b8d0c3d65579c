//! Marks documents that a process is asking about with byte-range locks, which the kernel releases when the process
//! dies.

use std::fs::{File, OpenOptions};
use std::io::ErrorKind;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};

use engine::error::{AtPath, Result};

use crate::judge::document::AnswerKey;

/// The kernel scans all locks of a file for each new lock. A batch claims tens of thousands of documents; spread over
/// this many files, the scan is cheap.
const FILES: u64 = 64;

/// Open-file-description locks: two instances within one process also exclude each other.
pub struct Claims {
    folder: PathBuf,
    files: Vec<File>,
}

impl Claims {
    /// # Errors
    /// If the files cannot be opened or created.
    pub fn open(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).at(folder)?;
        let open = |n: u64| {
            let path = folder.join(format!("{n:02}"));
            OpenOptions::new().create(true).truncate(false).read(true).write(true).open(&path).at(&path)
        };
        Ok(Self { folder: folder.to_owned(), files: (0..FILES).map(open).collect::<Result<_>>()? })
    }

    /// Claims the document; false if another holder has it.
    ///
    /// # Errors
    /// If the file system does not support locks.
    pub fn claim(&self, key: AnswerKey) -> Result<bool> {
        match self.set(key, libc::F_WRLCK) {
            Ok(()) => Ok(true),
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::PermissionDenied) => Ok(false),
            Err(e) => Err(e).at(&self.folder),
        }
    }

    /// # Errors
    /// If the file system does not support locks.
    pub fn release(&self, key: AnswerKey) -> Result<()> {
        self.set(key, libc::F_UNLCK).at(&self.folder)
    }

    fn set(&self, key: AnswerKey, kind: i32) -> std::io::Result<()> {
        let (file, byte) = (key.number() % FILES, key.number() / FILES);
        // The remainder is less than the number of files.
        let file = &self.files[file as usize];
        // The file stays empty: a lock may lie beyond its end. The number has fewer than 62 bits, so the end of the
        // range fits too.
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
