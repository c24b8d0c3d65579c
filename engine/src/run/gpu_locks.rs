//! Host-wide locks on GPUs, so that no two attempts get the same one, in whichever process they were started.

use std::fs::{File, OpenOptions, Permissions};
use std::io::ErrorKind;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, OFlags, flock};

use crate::error::{AtPath, Result};

/// Where the lock files are: the first of these that exists, which is the same for every user and store. Programs that clean
/// `/tmp` by age would delete a lock that is held.
const FOLDERS: [&str; 2] = ["/dev/shm", "/tmp"];

/// A GPU that an attempt may use. An attempt inherits the lock, so it ends with the attempt's last process.
#[derive(Debug)]
pub(super) struct GpuLock {
    /// As in `CUDA_VISIBLE_DEVICES`.
    pub id: String,
    pub file: File,
}

/// Locks `n` of `gpus`; `None` if fewer are free.
///
/// # Errors
/// When a lock file cannot be created.
pub(super) fn lock(gpus: &[String], n: usize) -> Result<Option<Vec<GpuLock>>> {
    let mut locked = Vec::with_capacity(n);
    for id in gpus {
        if locked.len() == n {
            break;
        }
        let path = path(id);
        let file = open(&path).at(&path)?;
        match flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => locked.push(GpuLock { id: id.clone(), file }),
            Err(rustix::io::Errno::WOULDBLOCK) => {}
            Err(e) => return Err(std::io::Error::from(e)).at(&path),
        }
    }
    Ok((locked.len() == n).then_some(locked))
}

fn path(id: &str) -> PathBuf {
    let name: String = id.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' }).collect();
    let folder = FOLDERS.map(Path::new).into_iter().find(|folder| folder.is_dir()).unwrap_or(Path::new("/tmp"));
    folder.join(format!("temper-gpu-{name}.lock"))
}

/// Opens a lock file of any user, or creates it; neither follows a link nor waits at a pipe that another user may have put
/// there.
fn open(path: &Path) -> std::io::Result<File> {
    let flags = (OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC).bits() as i32;
    let existing = || OpenOptions::new().read(true).custom_flags(flags).open(path);
    let file = match existing() {
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let mut new = OpenOptions::new();
            match new.read(true).write(true).create_new(true).custom_flags(flags).open(path) {
                Err(e) if e.kind() == ErrorKind::AlreadyExists => existing()?,
                // Readable by all, whatever the umask: other users lock it too.
                created => {
                    created.and_then(|file| file.set_permissions(Permissions::from_mode(0o444)).map(|()| file))?
                }
            }
        }
        opened => opened?,
    };
    match file.metadata()?.is_file() {
        true => Ok(file),
        false => Err(std::io::Error::new(ErrorKind::InvalidInput, "not a file")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_is_given_to_one_holder_at_a_time() {
        let ids: Vec<String> = (0..3).map(|n| format!("test-{}-{n}", std::process::id())).collect();
        let names = |locks: &[GpuLock]| locks.iter().map(|lock| lock.id.clone()).collect::<Vec<_>>();
        let first = lock(&ids, 2).unwrap().unwrap();
        assert_eq!(names(&first), ids[..2]);
        assert!(lock(&ids, 2).unwrap().is_none());
        let second = lock(&ids, 1).unwrap().unwrap();
        assert_eq!(names(&second), ids[2..]);
        drop(first);
        assert_eq!(names(&lock(&ids, 2).unwrap().unwrap()), ids[..2]);
        ids.iter().for_each(|id| std::fs::remove_file(path(id)).unwrap());
    }
}
