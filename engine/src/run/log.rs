//! The log of an attempt: its standard error, without the middle if it grows too long.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

/// Maximum number of bytes kept from the beginning of a log, and from its end.
pub(crate) const LOG_HALF: usize = 8 << 20;

/// A log that omits its middle when it grows too long. The last part of such a log is written when the stream ends.
pub(crate) struct BoundedLog<W> {
    file: W,
    /// Number of bytes left to write for the first part.
    head_left: usize,
    half: usize,
    end: VecDeque<u8>,
    omitted: u64,
}

impl<W: Write> BoundedLog<W> {
    pub fn new(file: W, half: usize) -> Self {
        Self { file, head_left: half, half, end: VecDeque::new(), omitted: 0 }
    }

    /// Ignores errors: a log that cannot be written (full disk) is no reason to fail.
    pub fn write(&mut self, bytes: &[u8]) {
        let (first, rest) = bytes.split_at(bytes.len().min(self.head_left));
        let _ = self.file.write_all(first);
        self.head_left -= first.len();
        self.end.extend(rest);
        let over = self.end.len().saturating_sub(self.half);
        self.end.drain(..over);
        self.omitted += over as u64;
    }

    pub fn end(mut self) {
        if self.omitted > 0 {
            let _ = write!(self.file, "\n[{} bytes of this log were omitted]\n", self.omitted);
        }
        let (a, b) = self.end.as_slices();
        let _ = self.file.write_all(a).and_then(|()| self.file.write_all(b));
    }
}

/// The last `n` lines of a log.
pub(crate) fn tail(log: &Path, n: usize) -> Vec<String> {
    const TAIL_BYTES: u64 = 16 << 10;
    let read = || -> std::io::Result<Vec<u8>> {
        let mut file = File::open(log)?;
        let start = file.metadata()?.len().saturating_sub(TAIL_BYTES);
        file.seek(SeekFrom::Start(start))?;
        let mut bytes = Vec::new();
        file.read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    let text = String::from_utf8_lossy(&read().unwrap_or_default()).into_owned();
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines[lines.len().saturating_sub(n)..].iter().map(|line| (*line).to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_long_log_keeps_its_beginning_and_its_end() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("log");
        let text: String = (0..1000).map(|n| format!("{n:03}\n")).collect();
        for (half, expected) in [
            (2_000, text.clone()),
            (2_001, text.clone()),
            (8, { format!("000\n001\n\n[{} bytes of this log were omitted]\n998\n999\n", 4_000 - 16) }),
        ] {
            for piece in [1, 7, 5_000] {
                let mut log = BoundedLog::new(File::create(&path).unwrap(), half);
                text.as_bytes().chunks(piece).for_each(|piece| log.write(piece));
                log.end();
                assert_eq!(std::fs::read_to_string(&path).unwrap(), expected, "half {half}, pieces of {piece}");
            }
        }
    }
}
