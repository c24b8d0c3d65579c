//! Token sequences with their ids, stored on disk and addressed by number, so that memory does not grow with the text.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use engine::error::{AtPath, Error, Result};
use lm::Sequence;

/// Location of a row: byte offset, prompt and response tokens, bytes of its id, which comes last.
#[derive(Clone, Copy)]
struct RowLocation {
    offset: u64,
    prompt: u32,
    response: u32,
    id: u32,
}

/// A growing table of sequences. Its file is unlinked, so nothing stays behind.
pub struct SequenceTable {
    file: BufWriter<File>,
    end: u64,
    places: Vec<RowLocation>,
}

impl SequenceTable {
    /// Creates the file on the file system of `folder`, which is created if it is missing.
    pub fn create(folder: &Path) -> Result<Self> {
        std::fs::create_dir_all(folder).at(folder)?;
        let path = folder.join(format!("sequences-{}", std::process::id()));
        let (mut taken, mut number) = (path.clone(), 0);
        let file = loop {
            match File::options().read(true).write(true).create_new(true).open(&taken) {
                Err(e) if e.kind() == std::io::ErrorKind::AlreadyExists => {
                    number += 1;
                    taken = path.with_extension(number.to_string());
                }
                other => break other.at(&taken)?,
            }
        };
        std::fs::remove_file(&taken).at(&taken)?;
        Ok(Self { file: BufWriter::new(file), end: 0, places: Vec::new() })
    }

    /// `id` is used in messages and need not be unique.
    pub fn push(&mut self, id: &str, sequence: &Sequence) -> Result<()> {
        let (prompt, response) = (sequence.prompt.len() as u32, sequence.response.len() as u32);
        let place = RowLocation { offset: self.end, prompt, response, id: id.len() as u32 };
        self.places.push(place);
        for token in sequence.prompt.iter().chain(&sequence.response) {
            self.file.write_all(&token.to_le_bytes()).map_err(lost)?;
        }
        self.file.write_all(id.as_bytes()).map_err(lost)?;
        self.end += 4 * u64::from(prompt + response) + u64::from(place.id);
        Ok(())
    }

    /// Call once after the last `push`, before `get`.
    pub fn finish(&mut self) -> Result<()> {
        self.file.flush().map_err(lost)
    }

    pub fn len(&self) -> usize {
        self.places.len()
    }

    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// Tokens in prompt and response.
    pub fn length(&self, row: usize) -> usize {
        (self.places[row].prompt + self.places[row].response) as usize
    }

    pub fn lengths(&self) -> Vec<u32> {
        self.places.iter().map(|p| p.prompt + p.response).collect()
    }

    /// The row with this number, counted from 0 in the order of `push`.
    pub fn get(&self, row: usize) -> Result<Sequence> {
        let place = self.places[row];
        let mut bytes = vec![0; 4 * self.length(row)];
        self.file.get_ref().read_exact_at(&mut bytes, place.offset).map_err(lost)?;
        let mut tokens = bytes.as_chunks::<4>().0.iter().map(|b| u32::from_le_bytes(*b));
        let prompt = tokens.by_ref().take(place.prompt as usize).collect();
        Ok(Sequence { prompt, response: tokens.collect() })
    }

    /// The id of a row.
    pub fn id(&self, row: usize) -> Result<String> {
        let place = self.places[row];
        let mut bytes = vec![0; place.id as usize];
        self.file.get_ref().read_exact_at(&mut bytes, place.offset + 4 * self.length(row) as u64).map_err(lost)?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    pub fn get_all(&self, rows: &[usize]) -> Result<Vec<Sequence>> {
        rows.iter().map(|&row| self.get(row)).collect()
    }
}

fn lost(e: std::io::Error) -> Error {
    Error::environment(format!("the table of sequences in the checkpoint folder: {e}"))
        .help("look whether the disk is full")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_come_back_as_they_went_in_and_no_file_stays() -> Result<()> {
        let folder = tempfile::tempdir().at("temp")?;
        let (mut one, mut two) = (SequenceTable::create(folder.path())?, SequenceTable::create(folder.path())?);
        let sequence = |n: u32| Sequence { prompt: (0..n).collect(), response: vec![n; 3] };
        for n in 0..50 {
            one.push(&format!("row {n}"), &sequence(n))?;
            two.push("", &sequence(n + 1))?;
        }
        one.finish()?;
        two.finish()?;
        for n in (0..50).rev() {
            let (got, other) = (one.get(n)?, two.get(n)?);
            assert_eq!((got.prompt, got.response), (sequence(n as u32).prompt, sequence(n as u32).response));
            assert_eq!(other.response, [n as u32 + 1; 3]);
            assert_eq!((one.length(n), one.id(n)?, two.id(n)?), (n + 3, format!("row {n}"), String::new()));
        }
        assert_eq!(std::fs::read_dir(folder.path()).at(folder.path())?.count(), 0);
        Ok(())
    }
}
