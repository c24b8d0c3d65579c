//! An append-only file of lines shared by many processes. Each line ends with a checksum of the bytes before it.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use engine::error::{AtPath, Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::judge::document::AnswerKey;

/// The line of one request.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Line {
    /// Document keys by slot.
    pub documents: Vec<AnswerKey>,
    /// The answer as received.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<Value>,
    /// The reason why there is no answer and will be none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// Checksum, verified by [`Line::parse`]; absent in lines of an older temper.
    #[serde(default, skip_serializing)]
    sum: Option<String>,
}

/// Why a line cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The line was cut off by a crash and never complete on disk.
    Torn,
    /// The line was complete, but its bytes have changed since.
    Damaged,
}

/// Separator between a line's fields and its checksum.
const SUM: &[u8] = b",\"sum\":\"";

impl Line {
    pub fn answer(documents: Vec<AnswerKey>, answer: Value) -> Self {
        Self { documents, answer: Some(answer), failed: None, sum: None }
    }

    pub fn failed(documents: Vec<AnswerKey>, why: String) -> Self {
        Self { documents, answer: None, failed: Some(why), sum: None }
    }

    /// The line's bytes with checksum and newline.
    fn sealed(&self) -> serde_json::Result<Vec<u8>> {
        let mut text = serde_json::to_vec(self)?;
        text.pop_if(|byte| *byte == b'}');
        let sum = checksum(&text);
        text.extend([SUM, sum.as_bytes(), b"\"}\n"].concat());
        Ok(text)
    }

    /// # Errors
    /// If the bytes are not a line as it was written.
    fn parse(bytes: &[u8]) -> Result<Self, Fault> {
        let bytes = bytes.strip_suffix(b"\n").unwrap_or(bytes);
        let at = bytes.windows(SUM.len()).rposition(|window| window == SUM);
        let line: Self = serde_json::from_slice(bytes).map_err(|e| {
            let is_torn = e.is_eof() && at.is_none() && !bytes.ends_with(b"}");
            if is_torn { Fault::Torn } else { Fault::Damaged }
        })?;
        match (&line.sum, at) {
            (None, _) => Ok(line),
            (Some(_), Some(at)) if bytes[at + SUM.len()..] == *format!("{}\"}}", checksum(&bytes[..at])).as_bytes() => {
                Ok(line)
            }
            _ => Err(Fault::Damaged),
        }
    }
}

/// The first half of the BLAKE3 digest, in hexadecimal.
fn checksum(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..32].to_owned()
}

pub struct LineFile {
    path: PathBuf,
    file: File,
    /// Offset of the first unread line.
    read: u64,
}

impl LineFile {
    /// # Errors
    /// If the file cannot be opened or created.
    pub fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().create(true).append(true).read(true).open(path).at(path)?;
        // Makes the directory entry as durable as the lines.
        if let Some(folder) = path.parent() {
            File::open(folder).and_then(|folder| folder.sync_all()).at(folder)?;
        }
        let log = Self { path: path.to_owned(), file, read: 0 };
        // Writers hold the lock, so an unfinished line was cut off by a crash.
        log.locked(|| log.end_last_line())?;
        Ok(log)
    }

    /// Passes the unread lines to `each`, each with its offset. A line still being written is left for the next call.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn read_on(&mut self, each: impl FnMut(u64, Result<Line, Fault>)) -> Result<()> {
        let length = self.file.metadata().at(&self.path)?.len();
        self.read = self.lines(self.read, length, each)?;
        Ok(())
    }

    /// Passes the lines read so far to `each` again.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn read_again(&self, each: impl FnMut(u64, Result<Line, Fault>)) -> Result<()> {
        self.lines(0, self.read, each).map(drop)
    }

    /// Passes the complete lines between two offsets to `each`, holding one at a time; returns the end offset of the
    /// last one.
    fn lines(&self, from: u64, to: u64, mut each: impl FnMut(u64, Result<Line, Fault>)) -> Result<u64> {
        if to <= from {
            return Ok(from);
        }
        let mut file = &self.file;
        file.seek(SeekFrom::Start(from)).at(&self.path)?;
        let mut lines = BufReader::new(file.take(to - from));
        let (mut line, mut at) = (Vec::new(), from);
        loop {
            line.clear();
            let bytes = lines.read_until(b'\n', &mut line).at(&self.path)?;
            if !line.ends_with(b"\n") {
                return Ok(at);
            }
            // A blank line was moved to the file of damaged lines.
            if !line.trim_ascii().is_empty() {
                each(at, Line::parse(&line));
            }
            at += bytes as u64;
        }
    }

    /// The line at byte `offset`.
    ///
    /// # Errors
    /// If the line cannot be read or has changed.
    pub fn line_at(&self, offset: u64) -> Result<Line> {
        let place = || format!("{}: the line at byte {offset}", self.path.display());
        Line::parse(&self.bytes_at(offset)?).map_err(|_| Error::environment(format!("{} has changed", place())))
    }

    fn bytes_at(&self, offset: u64) -> Result<Vec<u8>> {
        let mut file = &self.file;
        let mut line = Vec::new();
        file.seek(SeekFrom::Start(offset)).at(&self.path)?;
        BufReader::new(file).read_until(b'\n', &mut line).at(&self.path)?;
        Ok(line)
    }

    /// Appends lines; they are durable on return.
    ///
    /// # Errors
    /// If the lines cannot be written.
    pub fn append(&self, lines: impl IntoIterator<Item = Line>) -> Result<()> {
        let mut text = Vec::new();
        for line in lines {
            text.extend(line.sealed().map_err(|e| Error::internal(format!("{}: {e}", self.path.display())))?);
        }
        if text.is_empty() {
            return Ok(());
        }
        self.locked(|| {
            self.end_last_line()?;
            let mut file = &self.file;
            file.write_all(&text)?;
            file.sync_data()
        })
    }

    /// Moves the damaged line at `offset` to the end of the file `aside` and overwrites it with blanks, so that all
    /// other lines keep their offsets. Does nothing if another process has already done so.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn set_aside(&self, offset: u64, aside: &Path) -> Result<()> {
        let line = self.bytes_at(offset)?;
        self.locked(|| {
            let mut found = vec![0; line.len()];
            self.file.read_exact_at(&mut found, offset)?;
            if found.trim_ascii().is_empty() || Line::parse(&found).is_ok() {
                return Ok(());
            }
            let mut kept = OpenOptions::new().create(true).append(true).open(aside)?;
            kept.write_all(&found)?;
            kept.sync_all()?;
            // A file opened for appending can only be written at its end.
            let log = OpenOptions::new().write(true).open(&self.path)?;
            log.write_all_at(&b" ".repeat(found.len().saturating_sub(1)), offset)?;
            log.sync_data()
        })
    }

    /// Allows one writer at a time, so that lines stay whole on every file system.
    fn locked(&self, write: impl FnOnce() -> std::io::Result<()>) -> Result<()> {
        self.file.lock().at(&self.path)?;
        let written = write();
        self.file.unlock().at(&self.path)?;
        written.at(&self.path)
    }

    /// Ends a line that was cut off by a crash.
    fn end_last_line(&self) -> std::io::Result<()> {
        let length = self.file.metadata()?.len();
        let mut last = [b'\n'];
        if length > 0 {
            self.file.read_exact_at(&mut last, length - 1)?;
        }
        let mut file = &self.file;
        if last == [b'\n'] { Ok(()) } else { file.write_all(b"\n") }
    }
}

/// Result of verifying the logs in a folder of requests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verified {
    pub answers: u64,
    /// The log and the offset of each damaged line.
    pub damaged: Vec<(PathBuf, u64)>,
}

/// Reads every line of a log without writing.
///
/// # Errors
/// If the log cannot be read.
pub fn verify(path: &Path, found: &mut Verified) -> Result<()> {
    let log = LineFile { path: path.to_owned(), file: File::open(path).at(path)?, read: 0 };
    // No line is being written while the lock is held.
    log.file.lock_shared().at(path)?;
    let length = log.file.metadata().at(path)?.len();
    let mut take = |at, line: Result<Line, Fault>| match line {
        Ok(_) => found.answers += 1,
        Err(Fault::Torn) => {}
        Err(Fault::Damaged) => found.damaged.push((path.to_owned(), at)),
    };
    let end = log.lines(0, length, &mut take)?;
    if end < length {
        // A line that lacks only its newline was either damaged or cut off exactly there.
        take(end, Line::parse(&log.bytes_at(end)?));
    }
    Ok(())
}
