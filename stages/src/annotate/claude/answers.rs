//! Paid answers, kept as they land: one line each, flushed to disk, so that no later attempt pays again. Knows no network.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};

use engine::error::{At, Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::client::Answer;
use super::request::Reply;

/// The labels so far, and the file that keeps them.
pub struct Answers {
    path: PathBuf,
    file: File,
    labels: HashMap<String, u8>,
}

/// One request's line: labels of the documents that got one, and the whole answer, so that it can be read anew for free.
#[derive(Serialize, Deserialize)]
struct Line {
    labels: Vec<(String, u8)>,
    #[serde(default)]
    answer: Value,
}

impl Answers {
    /// # Errors
    /// If the file cannot be opened. A last line that a crash cut off is passed over.
    pub fn open(path: &Path) -> Result<Self> {
        let mut labels = HashMap::new();
        let file = OpenOptions::new().create(true).append(true).read(true).open(path).at(path)?;
        let mut lines = BufReader::new(&file);
        let mut line = Vec::new();
        while lines.read_until(b'\n', &mut line).at(path)? > 0 {
            if let Ok(line) = serde_json::from_slice::<Line>(&line) {
                labels.extend(line.labels.into_iter().filter(|(_, place)| matches!(place, 1 | 2)));
            }
            line.clear();
        }
        Ok(Self { path: path.to_owned(), file, labels })
    }

    /// The place, 1 or 2, of the better summary.
    pub fn label(&self, key: &str) -> Option<u8> {
        self.labels.get(key).copied()
    }

    /// Keeps an answer durably.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn keep(&mut self, keys: &[String], replies: &[Reply], answer: &Answer) -> Result<()> {
        let labels: Vec<(String, u8)> = (keys.iter().zip(replies))
            .filter_map(|(key, reply)| match reply {
                Reply::Label(place) => Some((key.clone(), *place)),
                _ => None,
            })
            .collect();
        // The newline in front ends a line that a crash cut off.
        let mut line = vec![b'\n'];
        serde_json::to_writer(&mut line, &Line { labels: labels.clone(), answer: answer.body.clone() })
            .map_err(|e| Error::ours(format!("{}: {e}", self.path.display())))?;
        line.push(b'\n');
        self.file.write_all(&line).at(&self.path)?;
        self.file.sync_data().at(&self.path)?;
        self.labels.extend(labels);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_come_back_and_a_line_cut_off_by_a_crash_loses_only_itself() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("answers.jsonl");
        let answer = Answer { body: serde_json::json!({ "id": "msg" }) };
        let keys = ["a".to_owned(), "b".to_owned()];
        Answers::open(&path).unwrap().keep(&keys, &[Reply::Label(2), Reply::Refused], &answer).unwrap();
        let mut text = std::fs::read(&path).unwrap();
        text.extend(b"\n{\"labels\":[[\"x\",1]],\"ans");
        std::fs::write(&path, &text).unwrap();
        let mut answers = Answers::open(&path).unwrap();
        assert_eq!([answers.label("a"), answers.label("b"), answers.label("x")], [Some(2), None, None]);
        answers.keep(&keys[1..], &[Reply::Label(1)], &answer).unwrap();
        let answers = Answers::open(&path).unwrap();
        assert_eq!([answers.label("a"), answers.label("b")], [Some(2), Some(1)]);
    }
}
