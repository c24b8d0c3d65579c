//! The stat index: maps the stat of a file to the digest that it had when it was last hashed.
//!
//! One append-only file of fixed-size entries with a checksum each; any process may append to it or delete it. It is
//! never synced: entries are written only after the files that they describe, and an entry torn by a crash fails its
//! checksum.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::files::{self, Stat};
use crate::disk;
use crate::error::{AtPath, Result};
use crate::names::Digest;

/// Layout: device, inode, size, mtime, ctime (8 bytes each, little-endian), digest (32), checksum (8). In an index with
/// another entry size no entry passes its checksum; it is rewritten eventually.
const ENTRY_BYTES: usize = 80;
/// Encodes a missing ctime: a file of the store.
const NO_CTIME: i64 = i64::MIN;
/// Encodes that no digest is known any more.
const NO_DIGEST: [u8; 32] = [0; 32];

#[derive(Debug)]
pub(crate) struct StatIndex {
    file: PathBuf,
    lock: PathBuf,
    state: Mutex<IndexState>,
}

#[derive(Debug, Default)]
struct IndexState {
    /// (device, inode) of the loaded index file; changes when the file is rewritten.
    identity: (u64, u64),
    /// Bytes loaded.
    loaded: u64,
    /// Number of entries loaded, including those replaced later.
    entries: usize,
    /// By device, inode, and whether the stat is that of an input: a file of the store may be looked up as either.
    known: HashMap<(u64, u64, bool), (Stat, [u8; 32])>,
}

impl StatIndex {
    pub fn new(file: PathBuf, lock: PathBuf) -> Self {
        Self { file, lock, state: Mutex::default() }
    }

    /// The digest of a file whose stat has not changed since it was hashed.
    pub fn lookup(&self, stat: &Stat) -> Result<Option<Digest>> {
        let mut state = self.state();
        if let Some(digest) = state.get(stat) {
            return Ok(Some(digest));
        }
        // Another process may have hashed the file meanwhile.
        self.load(&mut state)?;
        Ok(state.get(stat))
    }

    /// Adds the digests of files that were just hashed.
    pub fn insert(&self, hashed: &[(Stat, Digest)]) -> Result<()> {
        let entries: Vec<_> = hashed.iter().map(|(stat, digest)| (*stat, *digest.as_bytes())).collect();
        self.append(&entries)
    }

    /// Makes the next reader hash these files again.
    pub fn forget(&self, stats: &[Stat]) -> Result<()> {
        let entries: Vec<_> = stats.iter().map(|stat| (*stat, NO_DIGEST)).collect();
        self.append(&entries)
    }

    fn append(&self, entries: &[(Stat, [u8; 32])]) -> Result<()> {
        let mut state = self.state();
        let fresh: Vec<_> = entries.iter().filter(|(stat, digest)| !state.contains(stat, digest)).collect();
        if fresh.is_empty() {
            return Ok(());
        }
        if self.file.parent().is_some_and(|root| !files::is_writable(root)) {
            // On a read-only store, keep the entries for this process only.
            state.known.extend(fresh.into_iter().map(|(stat, digest)| (map_key(stat), (*stat, *digest))));
            return Ok(());
        }
        let _lock = self.lock_exclusively()?;
        self.load(&mut state)?;
        let bytes: Vec<u8> = fresh.iter().flat_map(|(stat, digest)| encode(stat, digest)).collect();
        let file = disk::open(File::options().create(true).append(true), &self.file).at(&self.file)?;
        let length = file.metadata().at(&self.file)?.len();
        if length % ENTRY_BYTES as u64 != 0 {
            // A partial entry, left by a full disk or a crash.
            disk::set_len(&file, &self.file, length - length % ENTRY_BYTES as u64).at(&self.file)?;
        }
        disk::write_all(&file, &self.file, &bytes).at(&self.file)?;
        self.load(&mut state)?;
        if state.entries > 4096 && state.entries > 2 * state.known.len() {
            self.rewrite(&mut state)?;
        }
        Ok(())
    }

    /// Rewrites the file without replaced entries. The caller holds the lock.
    fn rewrite(&self, state: &mut IndexState) -> Result<()> {
        let bytes: Vec<u8> = state.known.values().flat_map(|(stat, digest)| encode(stat, digest)).collect();
        let name = files::temporary_name(&self.file);
        disk::write(&name, bytes).at(&self.file)?;
        disk::rename(&name, &self.file).at(&self.file)?;
        *state = IndexState::default();
        self.load(state)
    }

    /// Reads the entries appended since the last load.
    fn load(&self, state: &mut IndexState) -> Result<()> {
        let Some(metadata) = files::metadata_if_exists(&self.file)?.filter(Metadata::is_file) else {
            *state = IndexState::default();
            return Ok(());
        };
        let stat = Stat::from(&metadata);
        if (stat.device, stat.inode) != state.identity || stat.size < state.loaded {
            *state = IndexState { identity: (stat.device, stat.inode), ..IndexState::default() };
        }
        if stat.size < state.loaded + ENTRY_BYTES as u64 {
            return Ok(());
        }
        let Some(mut file) = files::open_if_file(&self.file)? else { return Ok(()) };
        file.seek(SeekFrom::Start(state.loaded)).at(&self.file)?;
        let mut bytes = Vec::with_capacity(usize::try_from(stat.size - state.loaded).unwrap_or(0));
        file.read_to_end(&mut bytes).at(&self.file)?;
        let (entries, _) = bytes.as_chunks::<ENTRY_BYTES>();
        state.known.reserve(entries.len());
        for entry in entries {
            if let Some((stat, digest)) = decode(entry) {
                state.known.insert(map_key(&stat), (stat, digest));
            }
        }
        state.entries += entries.len();
        state.loaded += (entries.len() * ENTRY_BYTES) as u64;
        Ok(())
    }

    fn lock_exclusively(&self) -> Result<File> {
        let file = disk::open(File::options().create(true).truncate(false).write(true), &self.lock).at(&self.lock)?;
        file.lock().at(&self.lock)?;
        Ok(file)
    }

    fn state(&self) -> MutexGuard<'_, IndexState> {
        // The map is consistent even after a panic.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl IndexState {
    fn get(&self, stat: &Stat) -> Option<Digest> {
        let (known, digest) = self.known.get(&map_key(stat))?;
        (known == stat && *digest != NO_DIGEST).then(|| blake3::Hash::from_bytes(*digest).into())
    }

    fn contains(&self, stat: &Stat, digest: &[u8; 32]) -> bool {
        self.known.get(&map_key(stat)) == Some(&(*stat, *digest))
    }
}

fn map_key(stat: &Stat) -> (u64, u64, bool) {
    (stat.device, stat.inode, stat.ctime.is_some())
}

fn encode(stat: &Stat, digest: &[u8; 32]) -> [u8; ENTRY_BYTES] {
    let mut entry = [0; ENTRY_BYTES];
    entry[..8].copy_from_slice(&stat.device.to_le_bytes());
    entry[8..16].copy_from_slice(&stat.inode.to_le_bytes());
    entry[16..24].copy_from_slice(&stat.size.to_le_bytes());
    entry[24..32].copy_from_slice(&stat.mtime.to_le_bytes());
    entry[32..40].copy_from_slice(&stat.ctime.unwrap_or(NO_CTIME).to_le_bytes());
    entry[40..72].copy_from_slice(digest);
    let check = check(&entry);
    entry[72..].copy_from_slice(&check);
    entry
}

fn decode(entry: &[u8; ENTRY_BYTES]) -> Option<(Stat, [u8; 32])> {
    let number = |at: usize| u64::from_le_bytes(std::array::from_fn(|i| entry[at + i]));
    let ctime = Some(number(32).cast_signed()).filter(|ctime| *ctime != NO_CTIME);
    let stat = Stat { device: number(0), inode: number(8), size: number(16), mtime: number(24).cast_signed(), ctime };
    (check(entry) == entry[72..]).then(|| (stat, std::array::from_fn(|i| entry[40 + i])))
}

fn check(entry: &[u8; ENTRY_BYTES]) -> [u8; 8] {
    let hash = blake3::hash(&entry[..72]);
    std::array::from_fn(|i| hash.as_bytes()[i])
}
