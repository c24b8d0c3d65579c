//! A file of lines that many processes append to and read. Knows no answer.

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
        Ok(Self { path: path.to_owned(), file, read: 0 })
    }

    /// Gives the lines that were not read yet, each with its place; none for one that cannot be read. The end of a line that
    /// is being written is waited for by reading it another time.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn read_on(&mut self, each: impl FnMut(u64, Option<Line>)) -> Result<()> {
        let length = self.file.metadata().at(&self.path)?.len();
        self.read = self.lines(self.read, length, each)?;
        Ok(())
    }

    /// Gives the lines that were read already once more.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn read_again(&self, each: impl FnMut(u64, Option<Line>)) -> Result<()> {
        self.lines(0, self.read, each).map(drop)
    }

    /// Gives the whole lines between two places, one of which is held at a time; returns where the last of them ends.
    fn lines(&self, from: u64, to: u64, mut each: impl FnMut(u64, Option<Line>)) -> Result<u64> {
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
            each(at, serde_json::from_slice(&line).ok());
            at += bytes as u64;
        }
    }

    /// The line that begins at `offset`.
    ///
    /// # Errors
    /// If it cannot be read any more.
    pub fn line_at(&self, offset: u64) -> Result<Line> {
        let mut file = &self.file;
        let mut line = Vec::new();
        file.seek(SeekFrom::Start(offset)).at(&self.path)?;
        BufReader::new(file).read_until(b'\n', &mut line).at(&self.path)?;
        let place = || format!("{}: the line at byte {offset}", self.path.display());
        serde_json::from_slice(&line).map_err(|e| Error::surroundings(format!("{} has changed: {e}", place())))
    }

    /// Appends lines; they are on disk on return.
    ///
    /// # Errors
    /// If they cannot be written.
    pub fn append(&self, lines: impl IntoIterator<Item = Line>) -> Result<()> {
        let mut text = Vec::new();
        for line in lines {
            serde_json::to_writer(&mut text, &line)
                .map_err(|e| Error::ours(format!("{}: {e}", self.path.display())))?;
            text.push(b'\n');
        }
        if text.is_empty() {
            return Ok(());
        }
        // One writer at a time, so that a line stays in one piece on every file system.
        self.file.lock().at(&self.path)?;
        let written = self.append_locked(&text);
        self.file.unlock().at(&self.path)?;
        written.at(&self.path)
    }

    fn append_locked(&self, text: &[u8]) -> std::io::Result<()> {
        let length = self.file.metadata()?.len();
        let mut last = [b'\n'];
        if length > 0 {
            self.file.read_exact_at(&mut last, length - 1)?;
        }
        let mut file = &self.file;
        if last != [b'\n'] {
            // Ends the line that a crash cut off.
            file.write_all(b"\n")?;
        }
        file.write_all(text)?;
        file.sync_data()
    }
}
