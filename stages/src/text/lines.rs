//! Reads numbered lines of external files, plain or compressed with gzip or zstd, with a length limit.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};

use engine::error::{AtPath, Error, Result};
use engine::text::strip_bom;
use serde::de::DeserializeOwned;

/// Maximum length of a line or text, in bytes.
pub const LONGEST: u64 = 2 << 20;
/// Maximum window of a Zstandard stream, as a power of two: that of `zstd --long=31`. Memory is allocated only as the
/// stream fills it.
const ZSTD_WINDOW_LOG: u32 = 31;

/// File format as determined by the first bytes, never by the name: only a file's bytes are part of a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Parquet,
    Gzip,
    Zstd,
    /// Anything else: read as lines of text.
    Plain,
}

impl Format {
    fn of(start: &[u8]) -> Self {
        match start {
            [b'P', b'A', b'R', b'1', ..] => Self::Parquet,
            [0x1f, 0x8b, ..] => Self::Gzip,
            // The second magic number is a skippable frame, which pzstd writes first.
            [0x28, 0xb5, 0x2f, 0xfd, ..] | [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..] => Self::Zstd,
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

/// Opens a file for reading, decompressing it if necessary.
///
/// # Errors
/// If it cannot be opened.
pub fn open(path: &Path) -> Result<Box<dyn BufRead>> {
    let format = Format::of_file(path)?;
    let file = BufReader::with_capacity(1 << 17, File::open(path).at(path)?);
    Ok(match format {
        Format::Gzip => Box::new(BufReader::new(flate2::bufread::MultiGzDecoder::new(file))),
        Format::Zstd => {
            let mut decoder = zstd::Decoder::with_buffer(file).at(path)?;
            decoder.window_log_max(ZSTD_WINDOW_LOG).at(path)?;
            Box::new(BufReader::new(decoder))
        }
        Format::Parquet | Format::Plain => Box::new(file),
    })
}

/// First bytes of files that are often mistaken for JSON lines, also inside gzip or zstd.
const FOREIGN: &[(&[u8], &str)] = &[
    (b"\x1f\x8b", "compressed twice: gzip"),
    (b"\x28\xb5\x2f\xfd", "compressed twice: Zstandard"),
    (b"\x04\x22\x4d\x18", "LZ4"),
    (b"\x02\x21\x4c\x18", "LZ4"),
    (b"\xfd7zXZ\0", "xz"),
    (b"BZh", "bzip2"),
    (b"LZIP", "lzip"),
    (b"\x1f\x9d", "Unix compress (.Z)"),
    (b"\xff\x06\0\0sNaPpY", "Snappy"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"PK\x05\x06", "an empty ZIP archive"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (b"Rar!\x1a\x07", "a RAR archive"),
    (b"PAR1", "compressed Parquet, which has a compression of its own"),
    (b"PARE", "encrypted Parquet"),
    (b"ARROW1\0\0", "an Arrow file"),
    (b"\xff\xff\xff\xff", "an Arrow stream"),
    (b"Obj\x01", "Avro"),
    (b"ORC", "ORC"),
    (b"SQLite format 3\0", "an SQLite database"),
    (b"\x89HDF\r\n\x1a\n", "HDF5"),
    (b"%PDF-", "a PDF"),
    (b"\xff\xfe", "UTF-16 text"),
    (b"\xfe\xff", "UTF-16 text"),
    (b"{\0", "UTF-16 text"),
    (b"\0{", "UTF-16 text"),
    (b"<!DOCTYPE", "an HTML page"),
    (b"<!doctype", "an HTML page"),
    (b"<html", "an HTML page"),
    (b"version https://git-lfs.github.com/", "a pointer of Git LFS (`git lfs pull` fetches the file)"),
];
/// Offset of the magic bytes of a tar archive.
const TAR: usize = 257;

/// The format of a file with these first bytes, if it is known not to be JSON lines.
pub fn foreign(start: &[u8]) -> Option<&'static str> {
    if start.get(TAR..).is_some_and(|rest| rest.starts_with(b"ustar")) {
        return Some("a tar archive");
    }
    if matches!(start, [0x1e | 0x22..=0x27, 0xb5, 0x2f, 0xfd, ..]) {
        return Some("Zstandard of a version before 0.8");
    }
    FOREIGN.iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, what)| *what)
}

/// Whether a file name looks like a file of rows. Selects the files of a hub before download.
pub fn readable(name: &str) -> bool {
    let name = name.strip_suffix(".gz").or_else(|| name.strip_suffix(".zst")).unwrap_or(name);
    let extension = Path::new(name).extension().map(|e| e.to_string_lossy().to_lowercase());
    matches!(extension.as_deref(), Some("parquet" | "jsonl" | "ndjson"))
}

/// The lines of a file, numbered from 1; a line that is not UTF-8 gives a description of the fault.
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
        if self.number == 1 {
            match self.reader.fill_buf().map(foreign) {
                Err(e) => return Some(Err(Error::user(format!("{}: cannot be read: {e}", at())))),
                Ok(Some(what)) => {
                    let error = Error::user(format!("{}: this is {what}, not JSON lines", self.path.display()));
                    return Some(Err(error.help("give JSON lines, plain or in gzip or zstd, or Parquet")));
                }
                Ok(None) => {}
            }
        }
        match (&mut self.reader).take(LONGEST).read_until(b'\n', &mut bytes) {
            Err(e) => return Some(Err(Error::user(format!("{}: cannot be read: {e}", at())))),
            Ok(0) => return None,
            Ok(n) if n as u64 == LONGEST && bytes.last() != Some(&b'\n') => {
                return Some(Err(Error::user(format!("{}: longer than {} MiB", at(), LONGEST >> 20))));
            }
            Ok(_) => {}
        }
        if bytes.last() == Some(&b'\n') {
            bytes.pop();
        }
        if self.number == 1 {
            bytes.drain(..bytes.len() - strip_bom(&bytes).len());
        }
        Some(Ok((self.number, String::from_utf8(bytes).map_err(|_| "not UTF-8".to_owned()))))
    }
}

/// The number of bad rows that a stage tolerates.
pub struct BadRowLimit {
    allowed: u64,
    /// Bad rows so far.
    pub bad: u64,
}

impl BadRowLimit {
    pub fn new(allowed: u64) -> Self {
        Self { allowed, bad: 0 }
    }

    /// Counts a bad row.
    ///
    /// # Errors
    /// If there are too many; the error names this row by `place`.
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
        Err(Error::user(format!("{place}: {what}{beyond}")).help("`max_bad_rows` says how many bad rows are left out"))
    }
}

/// Parses a line that holds one row as a JSON object.
///
/// # Errors
/// Describes the fault in the line. Lists are refused too: serde would read them as a struct's fields in order.
pub fn object<T: DeserializeOwned>(line: &str) -> Result<T, String> {
    if !line.trim_start().starts_with('{') {
        return Err(NO_OBJECT.to_owned());
    }
    serde_json::from_str(line).map_err(|e| json_fault(&e))
}

/// Message for a line that is not an object.
pub const NO_OBJECT: &str = "expected one JSON object a line";

/// Describes a fault in a line of JSON. Gives only the column, since the input is a single line.
pub fn json_fault(e: &serde_json::Error) -> String {
    let text = e.to_string();
    match text.rsplit_once(" at line ") {
        Some((what, _)) => format!("{what} (column {})", e.column()),
        None => text,
    }
}

/// Passes every row of a JSON-lines file that `parse` accepts to `take`; other rows count as bad.
///
/// # Errors
/// As [`BadRowLimit::bad`], and errors of `take`.
pub fn each_line<T>(
    path: &Path,
    allowance: &mut BadRowLimit,
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

    fn lines(path: &Path) -> Vec<String> {
        Lines::open(path).unwrap().map(|line| line.unwrap().1.unwrap()).collect()
    }

    #[test]
    fn zstd_with_a_large_window_or_frames_to_skip_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.jsonl.zst");
        // A frame of one raw block, with a window of 2^(10 + 21) bytes.
        let long = [&b"\x28\xb5\x2f\xfd\0"[..], &[21 << 3, (8 << 3) | 1, 0, 0], b"one\ntwo\n"].concat();
        assert!(zstd::decode_all(&long[..]).is_err());
        std::fs::write(&path, long).unwrap();
        assert_eq!(lines(&path), ["one", "two"]);

        let skipped = |bytes: &[u8]| [b"\x5e\x2a\x4d\x18", &(bytes.len() as u32).to_le_bytes()[..], bytes].concat();
        let frame = zstd::encode_all(&b"three\n"[..], 1).unwrap();
        let bytes =
            [skipped(b"anything"), skipped(b""), frame.clone(), skipped(b"\n"), frame, skipped(b"end")].concat();
        std::fs::write(&path, bytes).unwrap();
        assert_eq!(Format::of_file(&path).unwrap(), Format::Zstd);
        assert_eq!(lines(&path), ["three", "three"]);
    }

    #[test]
    fn what_is_no_json_lines_is_called_what_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let gz = |bytes: &[u8]| {
            let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
            encoder.write_all(bytes).unwrap();
            encoder.finish().unwrap()
        };
        let mut tar = vec![0; 512];
        tar[..7].copy_from_slice(b"a.jsonl");
        tar[257..262].copy_from_slice(b"ustar");
        let utf16: Vec<u8> = "\u{feff}{\"post\"".encode_utf16().flat_map(u16::to_le_bytes).collect();
        let cases: [(Vec<u8>, &str); 11] = [
            (b"\xfd7zXZ\0\0\x04".to_vec(), "xz"),
            (b"BZh91AY&SY".to_vec(), "bzip2"),
            (b"PK\x03\x04\x14\0".to_vec(), "a ZIP archive"),
            (b"\x04\x22\x4d\x18\x64\x40".to_vec(), "LZ4"),
            (b"PARE".to_vec(), "encrypted Parquet"),
            (tar.clone(), "a tar archive"),
            (gz(&tar), "a tar archive"),
            (gz(&gz(b"{}\n")), "compressed twice: gzip"),
            (zstd::encode_all(&b"PAR1"[..], 1).unwrap(), "compressed Parquet, which has a compression of its own"),
            (utf16[..].to_vec(), "UTF-16 text"),
            (
                b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n".to_vec(),
                "a pointer of Git LFS (`git lfs pull` fetches the file)",
            ),
        ];
        for (bytes, what) in cases {
            let path = folder.path().join("a.jsonl");
            std::fs::write(&path, bytes).unwrap();
            let error = each_line(&path, &mut BadRowLimit::new(99), |_| Ok(()), |()| Ok(true)).unwrap_err();
            assert_eq!(error.message, format!("{}: this is {what}, not JSON lines", path.display()));
            assert_eq!(error.exit_code(), 2);
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
            let mut allowance = BadRowLimit::new(allowed);
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
