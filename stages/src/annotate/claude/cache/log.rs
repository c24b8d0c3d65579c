//! A file of lines that many processes append to and read; each line ends with a checksum of the bytes before it.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use engine::error::{At, Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::annotate::claude::document::AnswerKey;

/// One request's line.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Line {
    /// By slot.
    pub documents: Vec<AnswerKey>,
    /// As it came.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<Value>,
    /// Why there is no answer and will be none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub failed: Option<String>,
    /// Checked by [`Line::parse`]; lines of an older temper have none.
    #[serde(default, skip_serializing)]
    sum: Option<String>,
}

/// Why a line cannot be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    /// A crash cut the line off: it was never on disk as a whole.
    Torn,
    /// The line was whole once, and its bytes are no longer those that were written.
    Damaged,
}

/// Between a line's fields and its checksum.
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
    /// If the bytes are not those of a line that was written.
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

/// Half of the BLAKE3 digest in hexadecimal.
fn checksum(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..32].to_owned()
}

pub struct Log {
    path: PathBuf,
    file: File,
    /// Where the first line begins that was not read yet.
    read: u64,
}

impl Log {
    /// # Errors
    /// If the file cannot be opened or made.
    pub fn open(path: &Path) -> Result<Self> {
        let file = OpenOptions::new().create(true).append(true).read(true).open(path).at(path)?;
        // The folder's entry must be as durable as what will be written.
        if let Some(folder) = path.parent() {
            File::open(folder).and_then(|folder| folder.sync_all()).at(folder)?;
        }
        let log = Self { path: path.to_owned(), file, read: 0 };
        // Whoever writes holds the lock: a line without an end is one that a crash cut off.
        log.locked(|| log.end_last_line())?;
        Ok(log)
    }

    /// Gives the lines that were not read yet, each with its place. The end of a line that is being written is waited for by
    /// reading it another time.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn read_on(&mut self, each: impl FnMut(u64, Result<Line, Fault>)) -> Result<()> {
        let length = self.file.metadata().at(&self.path)?.len();
        self.read = self.lines(self.read, length, each)?;
        Ok(())
    }

    /// Gives the lines that were read already once more.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn read_again(&self, each: impl FnMut(u64, Result<Line, Fault>)) -> Result<()> {
        self.lines(0, self.read, each).map(drop)
    }

    /// Gives the whole lines between two places, one of which is held at a time; returns where the last of them ends.
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
            // A blank line is one that was set aside.
            if !line.trim_ascii().is_empty() {
                each(at, Line::parse(&line));
            }
            at += bytes as u64;
        }
    }

    /// The line that begins at `offset`.
    ///
    /// # Errors
    /// If it cannot be read any more.
    pub fn line_at(&self, offset: u64) -> Result<Line> {
        let place = || format!("{}: the line at byte {offset}", self.path.display());
        Line::parse(&self.bytes_at(offset)?).map_err(|_| Error::surroundings(format!("{} has changed", place())))
    }

    fn bytes_at(&self, offset: u64) -> Result<Vec<u8>> {
        let mut file = &self.file;
        let mut line = Vec::new();
        file.seek(SeekFrom::Start(offset)).at(&self.path)?;
        BufReader::new(file).read_until(b'\n', &mut line).at(&self.path)?;
        Ok(line)
    }

    /// Appends lines; they are on disk on return.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn append(&self, lines: impl IntoIterator<Item = Line>) -> Result<()> {
        let mut text = Vec::new();
        for line in lines {
            text.extend(line.sealed().map_err(|e| Error::ours(format!("{}: {e}", self.path.display())))?);
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

    /// Moves the damaged line that begins at `offset` to the end of the file `aside` and leaves blanks, so that all other
    /// lines stay where they are. Does nothing if another process has done so.
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
            // A file that is open for appending cannot be written to anywhere else.
            let log = OpenOptions::new().write(true).open(&self.path)?;
            log.write_all_at(&b" ".repeat(found.len().saturating_sub(1)), offset)?;
            log.sync_data()
        })
    }

    /// One writer at a time, so that a line stays in one piece on every file system.
    fn locked(&self, write: impl FnOnce() -> std::io::Result<()>) -> Result<()> {
        self.file.lock().at(&self.path)?;
        let written = write();
        self.file.unlock().at(&self.path)?;
        written.at(&self.path)
    }

    /// Ends the line that a crash cut off.
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

/// What verification found in the logs of a folder of requests.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Verified {
    pub answers: u64,
    /// The log and the byte where the damaged line begins.
    pub damaged: Vec<(PathBuf, u64)>,
}

/// Reads every line of a log and writes nothing.
///
/// # Errors
/// If the log cannot be read.
pub fn verify(path: &Path, found: &mut Verified) -> Result<()> {
    let log = Log { path: path.to_owned(), file: File::open(path).at(path)?, read: 0 };
    // Under the lock no line is being written.
    log.file.lock_shared().at(path)?;
    let length = log.file.metadata().at(path)?.len();
    let mut take = |at, line: Result<Line, Fault>| match line {
        Ok(_) => found.answers += 1,
        Err(Fault::Torn) => {}
        Err(Fault::Damaged) => found.damaged.push((path.to_owned(), at)),
    };
    let end = log.lines(0, length, &mut take)?;
    if end < length {
        // A line that is whole but for its newline was damaged there, or a crash cut off no more than that.
        take(end, Line::parse(&log.bytes_at(end)?));
    }
    Ok(())
}
