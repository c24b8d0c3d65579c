//! Files on disk: identity by stat, digest, atomic writing.

use std::fs::{self, File, Metadata};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use crate::disk;
use crate::error::{AtPath, Error, Result};
use crate::names::Digest;

/// Identifies a file's content without reading it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct Stat {
    pub device: u64,
    pub inode: u64,
    /// Bytes.
    pub size: u64,
    /// Nanoseconds since 1970.
    pub mtime: i64,
    /// Nanoseconds since 1970, only for files outside the store: programs can reset mtime (`cp -p`, `tar`), but not
    /// ctime. `None` for files of the store, because making a hard link changes their ctime.
    pub ctime: Option<i64>,
}

/// For a file of the store.
impl From<&Metadata> for Stat {
    fn from(m: &Metadata) -> Self {
        Self {
            device: m.dev(),
            inode: m.ino(),
            size: m.len(),
            mtime: nanoseconds(m.mtime(), m.mtime_nsec()),
            ctime: None,
        }
    }
}

impl Stat {
    /// For a file outside the store.
    pub fn of_input(m: &Metadata) -> Self {
        Self { ctime: Some(nanoseconds(m.ctime(), m.ctime_nsec())), ..Self::from(m) }
    }

    /// The stat entry without the device, whose number differs between machines that share a file system.
    pub fn without_device(&self) -> String {
        format!("{} {} {} {:?}", self.inode, self.size, self.mtime, self.ctime)
    }

    /// Whether the file system appears to store only whole seconds.
    pub fn is_coarse(&self) -> bool {
        self.mtime % 1_000_000_000 == 0
    }

    /// Whether the file is old enough that a later write must change its times: the clock for them ticks every few
    /// milliseconds, or every two seconds on file systems that store only whole seconds.
    pub fn is_settled(&self) -> bool {
        let changed = self.ctime.unwrap_or(self.mtime);
        let needed = if changed % 1_000_000_000 == 0 { 2_000_000_000 } else { 50_000_000 };
        nanoseconds_now().saturating_sub(changed) > needed
    }
}

fn nanoseconds(seconds: i64, rest: i64) -> i64 {
    seconds.wrapping_mul(1_000_000_000).wrapping_add(rest)
}

fn nanoseconds_now() -> i64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_nanos()).unwrap_or(i64::MAX))
}

const BUFFER: usize = 4 << 20;

/// Whether rayon could start its threads. rayon panics when used after the system refused them.
static RAYON_AVAILABLE: LazyLock<bool> = LazyLock::new(|| match rayon::ThreadPoolBuilder::new().build_global() {
    Ok(()) => true,
    // An error without a source means that the pool already exists.
    Err(e) => std::error::Error::source(&e).is_none(),
});

/// BLAKE3 of a file's bytes, with its metadata. Hashes large files on several threads.
///
/// Reads the file instead of mapping it, because truncation of a mapped file would kill the process.
///
/// # Errors
/// When the file cannot be read, is not a regular file, or changes during the read.
pub(crate) fn hash_file(path: &Path) -> Result<(Digest, Metadata)> {
    let (mut file, before) = open_nonblocking(path, 0).at(path)?;
    if !before.is_file() {
        return Err(Error::environment(format!("{}: not a regular file", path.display())));
    }
    let mut hasher = blake3::Hasher::new();
    // One byte more than the file has, so that a single read reaches the end of a small file.
    let size = usize::try_from(before.len()).unwrap_or(BUFFER).saturating_add(1).min(BUFFER);
    let mut buffer = vec![0; size];
    loop {
        let mut filled = 0;
        while filled < buffer.len() {
            match file.read(&mut buffer[filled..]).at(path)? {
                0 => break,
                n => filled += n,
            }
        }
        if filled >= 1 << 20 && *RAYON_AVAILABLE {
            hasher.update_rayon(&buffer[..filled]);
        } else {
            hasher.update(&buffer[..filled]);
        }
        if filled < buffer.len() {
            break;
        }
    }
    let after = file.metadata().at(path)?;
    if Stat::from(&before) != Stat::from(&after) {
        return Err(Error::environment(format!("{}: the file changed while it was read", path.display()))
            .help("wait until no program writes to it, then run again"));
    }
    Ok((hasher.finalize().into(), after))
}

/// A unique name in the same folder as `path`. A crash may leave it behind, but nothing reads it.
pub(crate) fn temporary_name(path: &Path) -> PathBuf {
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let n = COUNTER.fetch_add(1, Ordering::Relaxed);
    let mut name = std::ffi::OsString::from(".new-");
    name.push(format!("{:x}-{:x}-{n:x}", nanoseconds_now(), std::process::id()));
    path.with_file_name(name)
}

/// Whether a name was made by [`temporary_name`].
pub(crate) fn is_temporary_name(name: &std::ffi::OsStr) -> bool {
    name.as_encoded_bytes().starts_with(b".new-")
}

/// A file or folder under a temporary name; deleted on drop unless kept.
pub(crate) struct TemporaryPath(Option<PathBuf>);

impl TemporaryPath {
    pub fn new(path: PathBuf) -> Self {
        Self(Some(path))
    }

    /// The file was renamed and must not be deleted.
    pub fn keep(mut self) {
        self.0 = None;
    }
}

impl Drop for TemporaryPath {
    fn drop(&mut self) {
        if let Some(path) = &self.0 {
            // Nothing reads temporary names, so a failed deletion does no harm.
            let _ = if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        }
    }
}

/// Writes a file atomically, even across a crash, and replaces an existing one.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> Result<()> {
    let temporary = write_temporary(path, bytes)?;
    disk::rename(&temporary.1, path).at(path)?;
    temporary.0.keep();
    sync_parent(path)
}

/// Writes and syncs a temporary file in the folder of `path`.
pub(crate) fn write_temporary(path: &Path, bytes: &[u8]) -> Result<(TemporaryPath, PathBuf)> {
    let name = temporary_name(path);
    let file = disk::create_new(&name).at(path)?;
    let temporary = TemporaryPath::new(name.clone());
    disk::write_all(&file, path, bytes).at(path)?;
    disk::sync(&file, path).at(path)?;
    Ok((temporary, name))
}

/// Syncs a file or a folder.
pub(crate) fn sync(path: &Path) -> Result<()> {
    File::open(path).and_then(|file| disk::sync(&file, path)).at(path)
}

/// Syncs in parallel, so that the file system can write everything together: a sync mostly waits.
pub(crate) fn sync_all(paths: &[PathBuf]) -> Result<()> {
    std::thread::scope(|scope| {
        let syncs: Vec<_> = paths
            .iter()
            .map(|path| std::thread::Builder::new().spawn_scoped(scope, move || sync(path)).map_err(|_| path))
            .collect();
        // A thread that only syncs does not panic. Paths whose thread could not start are synced here.
        syncs.into_iter().try_for_each(|started| match started {
            Ok(thread) => thread.join().unwrap_or(Ok(())),
            Err(path) => sync(path),
        })
    })
}

pub(crate) fn sync_parent(path: &Path) -> Result<()> {
    path.parent().map_or(Ok(()), sync)
}

pub(crate) fn make_read_only(path: &Path) -> Result<()> {
    disk::set_permissions(path, fs::Permissions::from_mode(0o444)).at(path)
}

pub(crate) fn make_executable(path: &Path) -> Result<()> {
    disk::set_permissions(path, fs::Permissions::from_mode(0o555)).at(path)
}

/// Sets the modification time of a file or folder to now, by the clock of its file system. Does nothing if that is not
/// allowed, such as in a store of another user.
pub(crate) fn touch(path: &Path) {
    use rustix::fs::{Timespec, Timestamps, UTIME_NOW, UTIME_OMIT};
    let at = |tv_nsec| Timespec { tv_sec: 0, tv_nsec };
    let times = Timestamps { last_access: at(UTIME_OMIT), last_modification: at(UTIME_NOW) };
    let _ = rustix::fs::utimensat(rustix::fs::CWD, path, &times, rustix::fs::AtFlags::empty());
}

/// The metadata of `path`; `None` if it does not exist. Does not follow symlinks.
pub(crate) fn metadata_if_exists(path: &Path) -> Result<Option<Metadata>> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(e) if is_absent(&e) => Ok(None),
        Err(e) => Err(e).at(path),
    }
}

/// The bytes of the regular file at `path`. `None` if it does not exist, is something else (a folder, a link, a FIFO),
/// or may not be read by this user.
pub(crate) fn read_if_file(path: &Path) -> Result<Option<Vec<u8>>> {
    /// More than most files of a store have; with this much room left, reading ends without a probe.
    const ROOM: u64 = 64 << 10;
    let Some((file, metadata)) = open_with_metadata(path)? else { return Ok(None) };
    let mut bytes = Vec::with_capacity(metadata.len().min(ROOM) as usize + 64);
    // `Take` hides that it is a file, whose size would be asked for again.
    file.take(u64::MAX).read_to_end(&mut bytes).at(path)?;
    Ok(Some(bytes))
}

/// Opens a file for reading; `None` as in [`read_if_file`].
pub(crate) fn open_if_file(path: &Path) -> Result<Option<File>> {
    Ok(open_with_metadata(path)?.map(|(file, _)| file))
}

fn open_with_metadata(path: &Path) -> Result<Option<(File, Metadata)>> {
    // Check first, because opening some special files has side effects.
    if !metadata_if_exists(path)?.is_some_and(|metadata| metadata.is_file()) {
        return Ok(None);
    }
    match open_nonblocking(path, libc::O_NOFOLLOW) {
        Ok((file, metadata)) => Ok(metadata.is_file().then_some((file, metadata))),
        Err(e) if is_absent(&e) || e.kind() == std::io::ErrorKind::PermissionDenied => Ok(None),
        Err(e) => Err(e).at(path),
    }
}

/// Opens without blocking: an ordinary `open` of a FIFO without a writer would block.
fn open_nonblocking(path: &Path, flags: i32) -> std::io::Result<(File, Metadata)> {
    let file = File::options().read(true).custom_flags(libc::O_NONBLOCK | flags).open(path)?;
    let metadata = file.metadata()?;
    Ok((file, metadata))
}

/// Whether this process may create, change and rename entries of a folder; false on a disk that is mounted read-only.
pub(crate) fn is_writable(folder: &Path) -> bool {
    rustix::fs::access(folder, rustix::fs::Access::WRITE_OK).is_ok()
}

/// Moves a path of the store at `root` into its quarantine, with a note; returns the new path.
pub(crate) fn move_to_quarantine(root: &Path, path: &Path, why: &str) -> Result<PathBuf> {
    let quarantine = root.join("quarantine");
    let fresh = temporary_name(&quarantine.join("new"));
    let fresh = fresh.file_name().unwrap_or_default().to_string_lossy().replace(".new-", "");
    // The quarantine's own path may be something other than a folder.
    if metadata_if_exists(&quarantine)?.is_some_and(|found| !found.is_dir()) {
        disk::rename(&quarantine, &root.join(format!(".quarantine-{fresh}"))).at(&quarantine)?;
    }
    disk::create_dir_all(&quarantine).at(&quarantine)?;
    if path == quarantine {
        return Ok(quarantine);
    }
    let name = path.strip_prefix(root).unwrap_or(path).to_string_lossy().replace('/', "-");
    let to = quarantine.join(format!("{name}-{fresh}"));
    match disk::rename(path, &to) {
        // Another process has already moved it.
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(to),
        other => other.at(path)?,
    }
    let note = quarantine.join(format!("{name}-{fresh}.txt"));
    disk::write(&note, format!("{}\n{why}\n", path.display())).at(&note)?;
    Ok(to)
}

/// Whether the path does not exist, including a path below a file and a link loop.
fn is_absent(e: &std::io::Error) -> bool {
    matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory)
        || e.raw_os_error() == Some(libc::ELOOP)
}
