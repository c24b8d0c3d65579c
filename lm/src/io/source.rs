//! Random-access bytes, from a file or from memory.

use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::{Error, Result};

/// U+FEFF in UTF-8, which some programs put at the start of text files.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

/// Bytes of known length that are read in pieces, so that no file is held in memory whole.
pub(super) struct Source {
    bytes: Backing,
    len: u64,
}

enum Backing {
    File(File),
    Memory(Vec<u8>),
}

impl Source {
    pub fn open(path: &Path) -> Result<Self> {
        // Check before opening: opening a pipe waits for a writer.
        if !fs::metadata(path).map_err(Error::io(path))?.is_file() {
            return Err(Error::model(path, "not a file"));
        }
        let file = File::open(path).map_err(Error::io(path))?;
        let metadata = file.metadata().map_err(Error::io(path))?;
        Ok(Self { len: metadata.len(), bytes: Backing::File(file) })
    }

    pub fn from_memory(bytes: Vec<u8>) -> Self {
        Self { len: bytes.len() as u64, bytes: Backing::Memory(bytes) }
    }

    /// The contents of the text file at `path`, the source of these bytes, without a byte-order mark. Errors: more than
    /// `max_bytes` bytes.
    pub fn read_text(&self, path: &Path, max_bytes: u64) -> Result<Vec<u8>> {
        if self.len > max_bytes {
            return Err(Error::model(path, format!("has {} bytes; at most {max_bytes} are supported", self.len)));
        }
        let len = usize::try_from(self.len).map_err(|_| Error::model(path, "is too large for memory"))?;
        let mut bytes = vec![0; len];
        self.read_at(0, &mut bytes).map_err(Error::io(path))?;
        if bytes.starts_with(BYTE_ORDER_MARK) {
            bytes.drain(..BYTE_ORDER_MARK.len());
        }
        Ok(bytes)
    }

    /// Length in bytes when the source was opened.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Fills `buffer` from `offset` on. Errors: fewer bytes are left.
    pub fn read_at(&self, offset: u64, buffer: &mut [u8]) -> io::Result<()> {
        match &self.bytes {
            Backing::File(file) => file.read_exact_at(buffer, offset),
            Backing::Memory(bytes) => {
                let from = usize::try_from(offset).ok().and_then(|start| bytes.get(start..));
                let from = from.and_then(|rest| rest.get(..buffer.len())).ok_or(io::ErrorKind::UnexpectedEof)?;
                buffer.copy_from_slice(from);
                Ok(())
            }
        }
    }

    /// A sequential reader from the start.
    pub fn reader(&self) -> SourceReader<'_> {
        SourceReader { source: self, position: 0 }
    }
}

/// A position in a source.
pub(super) struct SourceReader<'a> {
    source: &'a Source,
    position: u64,
}

impl Read for SourceReader<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let remaining = self.source.len.saturating_sub(self.position);
        let count = buffer.len().min(usize::try_from(remaining).unwrap_or(usize::MAX));
        self.source.read_at(self.position, &mut buffer[..count])?;
        self.position += count as u64;
        Ok(count)
    }
}

impl Seek for SourceReader<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
            SeekFrom::End(by) => self.source.len.checked_add_signed(by),
        };
        self.position = target.ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.position)
    }
}
