//! Lines of files that others made: plain, gzip or zstd, bounded, each with its number. Knows no schema.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use engine::error::{At, Error, Result};
use serde::de::DeserializeOwned;

/// What some programs put before a file's first line.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";
/// A line longer than this is no row of any table here.
const LONGEST_LINE: u64 = 64 << 20;

/// What a file's first bytes say that it is. Its name says nothing: files enter a key by their bytes alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Parquet,
    Gzip,
    Zstd,
    /// Anything else: lines.
    Plain,
}

impl Format {
    fn of(start: &[u8]) -> Self {
        match start {
            [b'P', b'A', b'R', b'1', ..] => Self::Parquet,
            [0x1f, 0x8b, ..] => Self::Gzip,
            [0x28, 0xb5, 0x2f, 0xfd, ..] => Self::Zstd,
            _ => Self::Plain,
        }
    }

    /// # Errors
    /// If the file cannot be read.
    pub fn of_file(path: &Path) -> Result<Self> {
        let mut start = Vec::new();
        File::open(path).at(path)?.take(4).read_to_end(&mut start).at(path)?;
        Ok(Self::of(&start))
    }
}

/// Opens a file for reading, decompressed.
///
/// # Errors
/// If it cannot be opened.
pub fn open(path: &Path) -> Result<Box<dyn BufRead>> {
    let format = Format::of_file(path)?;
    let file = BufReader::with_capacity(1 << 17, File::open(path).at(path)?);
    Ok(match format {
        Format::Gzip => Box::new(BufReader::new(flate2::bufread::MultiGzDecoder::new(file))),
        Format::Zstd => Box::new(BufReader::new(zstd::Decoder::with_buffer(file).at(path)?)),
        Format::Parquet | Format::Plain => Box::new(file),
    })
}

/// Whether a file of this name is one of rows: to choose among the files of a hub, before any is read.
pub fn readable(name: &str) -> bool {
    let name = name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst")).unwrap_or(name);
    let extension = Path::new(name).extension().map(|e| e.to_string_lossy().to_lowercase());
    matches!(extension.as_deref(), Some("parquet" | "jsonl" | "ndjson"))
}

/// The lines of a file with their numbers, from 1; a line that is not UTF-8 is told as what is wrong with it.
pub struct Lines {
    path: PathBuf,
    reader: Box<dyn BufRead>,
    number: u64,
}

impl Lines {
    /// # Errors
    /// If the file cannot be opened.
    pub fn open(path: &Path) -> Result<Self> {
        Ok(Self { path: path.to_owned(), reader: open(path)?, number: 0 })
    }
}

impl Iterator for Lines {
    type Item = Result<(u64, Result<String, String>)>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut bytes = Vec::new();
        self.number += 1;
        let at = || format!("{}, line {}", self.path.display(), self.number);
        match (&mut self.reader).take(LONGEST_LINE).read_until(b'\n', &mut bytes) {
            Err(e) => return Some(Err(Error::yours(format!("{}: cannot be read: {e}", at())))),
            Ok(0) => return None,
            Ok(n) if n as u64 == LONGEST_LINE && bytes.last() != Some(&b'\n') => {
                return Some(Err(Error::yours(format!("{}: longer than {} MiB", at(), LONGEST_LINE >> 20))));
            }
            Ok(_) => {}
        }
        if bytes.last() == Some(&b'\n') {
            bytes.pop();
        }
        if self.number == 1 && bytes.starts_with(BYTE_ORDER_MARK) {
            bytes.drain(..BYTE_ORDER_MARK.len());
        }
        Some(Ok((self.number, String::from_utf8(bytes).map_err(|_| "not UTF-8".to_owned()))))
    }
}

/// How many rows may be bad before a stage stops.
pub struct Allowance {
    allowed: u64,
    /// Bad rows so far.
    pub bad: u64,
}

impl Allowance {
    pub fn new(allowed: u64) -> Self {
        Self { allowed, bad: 0 }
    }

    /// Notes a bad row.
    ///
    /// # Errors
    /// If there were too many: names this one by `place`.
    pub fn bad(&mut self, place: impl std::fmt::Display, what: &str) -> Result<()> {
        self.bad += 1;
        if self.bad <= self.allowed {
            return Ok(());
        }
        let beyond = if self.allowed == 0 {
            String::new()
        } else {
            format!(" (bad row {} of {} allowed)", self.bad, self.allowed)
        };
        Err(Error::yours(format!("{place}: {what}{beyond}")).help("`max_bad_rows` says how many bad rows are left out"))
    }
}

/// A row from a line that holds it as an object.
///
/// # Errors
/// Says what is wrong with the line. A list is refused too, which serde would take as a struct's fields in order.
pub fn object<T: DeserializeOwned>(line: &str) -> Result<T, String> {
    if !line.trim_start().starts_with('{') {
        return Err(NO_OBJECT.to_owned());
    }
    serde_json::from_str(line).map_err(|e| json_fault(&e))
}

/// What a line that is no object is told.
pub const NO_OBJECT: &str = "expected one JSON object a line";

/// What is wrong with a line of JSON; its place is told by column, since the line is all there is.
pub fn json_fault(e: &serde_json::Error) -> String {
    let text = e.to_string();
    match text.rsplit_once(" at line ") {
        Some((what, _)) => format!("{what} (column {})", e.column()),
        None => text,
    }
}

/// Every line of a JSON-lines file that `parse` takes; the others are bad rows.
///
/// # Errors
/// As [`Allowance::bad`], or what `take` gives.
pub fn each_line<T>(
    path: &Path,
    allowance: &mut Allowance,
    parse: impl Fn(&str) -> Result<T, String>,
    mut take: impl FnMut(T) -> Result<bool>,
) -> Result<()> {
    for line in Lines::open(path)? {
        let (number, line) = line?;
        let parsed =
            line.and_then(|line| if line.trim().is_empty() { Err("empty line".to_owned()) } else { parse(&line) });
        match parsed {
            Ok(row) => {
                if !take(row)? {
                    break;
                }
            }
            Err(what) => allowance.bad(format_args!("{}, line {number}", path.display()), &what)?,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    #[test]
    fn compressed_files_read_as_plain_ones() {
        let folder = tempfile::tempdir().unwrap();
        let text = "one\ntwo\n";
        let plain = folder.path().join("a.jsonl");
        std::fs::write(&plain, text).unwrap();
        let gz = folder.path().join("a.jsonl.gz");
        let mut encoder = flate2::write::GzEncoder::new(File::create(&gz).unwrap(), flate2::Compression::fast());
        encoder.write_all(text.as_bytes()).unwrap();
        encoder.finish().unwrap();
        let zst = folder.path().join("a.jsonl.zst");
        std::fs::write(&zst, zstd::encode_all(text.as_bytes(), 1).unwrap()).unwrap();
        for path in [plain, gz, zst] {
            let lines: Vec<_> = Lines::open(&path).unwrap().map(|l| l.unwrap()).collect();
            assert_eq!(lines, [(1, Ok("one".to_owned())), (2, Ok("two".to_owned()))]);
            assert!(readable(&path.to_string_lossy()));
        }
        assert!(!readable("README.md") && readable("data/TRAIN.parquet"));
    }

    #[test]
    fn equal_bytes_read_equally_under_any_name() {
        let folder = tempfile::tempdir().unwrap();
        let zst = zstd::encode_all(&b"one\n"[..], 1).unwrap();
        for bytes in [&b"one\n"[..], &zst, b"\xef\xbb\xbfone\n"] {
            for name in ["a.jsonl", "a.jsonl.gz", "a.zst", "a.parquet", "a"] {
                let path = folder.path().join(name);
                std::fs::write(&path, bytes).unwrap();
                let lines: Vec<_> = Lines::open(&path).unwrap().map(|l| l.unwrap()).collect();
                assert_eq!(lines, [(1, Ok("one".to_owned()))], "{name}");
                assert_ne!(Format::of_file(&path).unwrap(), Format::Parquet);
            }
        }
    }

    #[test]
    fn a_cut_gzip_file_is_an_error_that_names_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl.gz");
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(&b"some line\n".repeat(1000)).unwrap();
        let bytes = encoder.finish().unwrap();
        std::fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
        let error = Lines::open(&path).unwrap().find_map(std::result::Result::err).unwrap();
        assert!(error.message.contains("a.jsonl.gz, line "), "{error}");
    }

    #[test]
    fn bad_rows_stop_at_the_allowance_naming_file_and_line() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl");
        std::fs::write(&path, b"1\n\nx\n\xff\n2\n").unwrap();
        let run = |allowed| {
            let mut allowance = Allowance::new(allowed);
            let mut rows = Vec::new();
            each_line(
                &path,
                &mut allowance,
                |l| l.parse::<i32>().map_err(|e| e.to_string()),
                |n| {
                    rows.push(n);
                    Ok(true)
                },
            )
            .map(|()| rows)
            .map_err(|e| e.message)
        };
        assert_eq!(run(3).unwrap(), [1, 2]);
        assert!(run(0).unwrap_err().ends_with("a.jsonl, line 2: empty line"));
        assert!(run(2).unwrap_err().ends_with("a.jsonl, line 4: not UTF-8 (bad row 3 of 2 allowed)"));
    }
}
