//! Queue of documents to ask about, with their texts in a file, so that memory does not grow with them.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use engine::error::{AtPath, Error, Result};

use super::document::{AnswerKey, Document, Purpose, Question};

/// A document in the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Entry {
    // Derived ordering is the order of requests, so its fields come first.
    purpose: Purpose,
    place: u64,
    pub key: AnswerKey,
    /// Whether its answer is needed; otherwise the document only fills its slot beside others.
    pub wanted: bool,
    offset: u64,
    length: u32,
}

/// The documents of one request, by slot.
pub type Group = Vec<Entry>;

/// Collects documents in any order.
pub struct Spool {
    path: PathBuf,
    file: BufWriter<File>,
    entries: Vec<Entry>,
    end: u64,
}

impl Spool {
    /// Creates an anonymous temporary file in `folder`; it is deleted with this value.
    ///
    /// # Errors
    /// If the file cannot be created.
    pub fn new(folder: &Path) -> Result<Self> {
        let file = tempfile::tempfile_in(folder).at(folder)?;
        Ok(Self { path: folder.to_owned(), file: BufWriter::new(file), entries: Vec::new(), end: 0 })
    }

    /// # Errors
    /// If the file cannot be written.
    pub fn push(&mut self, question: &Question, key: AnswerKey, wanted: bool) -> Result<()> {
        let text = serde_json::to_vec(&question.document)
            .map_err(|e| Error::internal(format!("a document does not serialise: {e}")))?;
        self.file.write_all(&text).at(&self.path)?;
        let length = u32::try_from(text.len()).map_err(|_| Error::user("a post of more than 4 GB".to_owned()))?;
        let Question { purpose, place, .. } = *question;
        self.entries.push(Entry { purpose, place, key, wanted, offset: self.end, length });
        self.end += u64::from(length);
        Ok(())
    }

    /// Removes duplicates and forms groups of `n` in an order determined by content. Groups that need no answer are
    /// left out.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn groups_of(mut self, n: usize) -> Result<Waiting> {
        // The swapped question of one pair may equal the label question of another pair; the first one is kept.
        self.entries.sort_unstable_by_key(|entry| (entry.key, *entry));
        self.entries.dedup_by_key(|entry| entry.key);
        self.entries.sort_unstable();
        self.entries.shrink_to_fit();
        let file = self.file.into_inner().map_err(std::io::IntoInnerError::into_error).at(&self.path)?;
        let left = self.entries.chunks(n).filter(|group| is_wanted(group)).count();
        Ok(Waiting {
            path: self.path,
            file,
            entries: self.entries,
            n,
            next: 0,
            left,
            back: VecDeque::new(),
            last: Vec::new(),
            kept: 0,
        })
    }
}

fn is_wanted(group: &[Entry]) -> bool {
    group.iter().any(|entry| entry.wanted)
}

/// The groups still to be asked, in order.
pub struct Waiting {
    path: PathBuf,
    file: File,
    /// All entries in order; a group is built only when it is taken.
    entries: Vec<Entry>,
    /// Documents per group.
    n: usize,
    /// Index of the first entry not yet taken, and number of groups from there that need answers.
    next: usize,
    left: usize,
    /// Groups put back, before and after all others.
    back: VecDeque<Group>,
    last: Vec<Group>,
    /// Number of questions whose answers are already in the log.
    pub kept: u64,
}

impl Waiting {
    fn untaken(&self) -> impl Iterator<Item = &[Entry]> {
        self.entries[self.next..].chunks(self.n).filter(|group| is_wanted(group))
    }

    /// All groups in order.
    pub fn groups(&self) -> impl Iterator<Item = &[Entry]> {
        self.back.iter().map(Vec::as_slice).chain(self.untaken()).chain(self.last.iter().map(Vec::as_slice))
    }

    pub fn len(&self) -> usize {
        self.back.len() + self.left + self.last.len()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Takes the first group.
    pub fn take(&mut self) -> Option<Group> {
        if let Some(group) = self.back.pop_front() {
            return Some(group);
        }
        while let Some(group) = self.entries[self.next..].chunks(self.n).next() {
            self.next += group.len();
            if is_wanted(group) {
                self.left -= 1;
                return Some(group.to_vec());
            }
        }
        self.back.extend(self.last.drain(..));
        self.back.pop_front()
    }

    /// Puts a group back in front of all others.
    pub fn give_back(&mut self, group: Group) {
        self.back.push_front(group);
    }

    /// Puts groups behind all others.
    pub fn put_last(&mut self, groups: impl IntoIterator<Item = Group>) {
        self.last.extend(groups);
    }

    /// Number of answers needed.
    pub fn wanted(&self) -> u64 {
        self.groups().flatten().filter(|entry| entry.wanted).count() as u64
    }

    /// # Errors
    /// If the file cannot be read.
    pub fn document(&self, entry: &Entry) -> Result<Document> {
        let mut text = vec![0; entry.length as usize];
        self.file.read_exact_at(&mut text, entry.offset).at(&self.path)?;
        serde_json::from_slice(&text).map_err(|e| Error::internal(format!("a document comes back changed: {e}")))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::document::Shown;

    fn question(name: &str, purpose: Purpose, place: u64) -> Question {
        let document = Document { prompt: name.into(), first: "1".into(), second: "2".into() };
        Question { purpose, document, shown: Shown::AFirst, key: AnswerKey::of(&[name.as_bytes()]), place }
    }

    #[test]
    fn documents_come_back_once_each_in_an_order_of_their_own() {
        let folder = tempfile::tempdir().unwrap();
        let mut spool = Spool::new(folder.path()).unwrap();
        for (name, purpose, place, wanted) in [
            ("swapped", Purpose::Swap, 1, true),
            ("late", Purpose::Label, 9, false),
            ("early", Purpose::Label, 2, true),
            ("early", Purpose::Swap, 0, true),
            ("middle", Purpose::Label, 5, false),
        ] {
            let question = question(name, purpose, place);
            spool.push(&question, question.key, wanted).unwrap();
        }
        assert!(std::fs::read_dir(folder.path()).unwrap().next().is_none(), "nobody sees the file");
        let waiting = spool.groups_of(1).unwrap();
        let names: Vec<String> = waiting.groups().map(|group| waiting.document(&group[0]).unwrap().prompt).collect();
        assert_eq!((names, waiting.wanted()), (vec!["early".to_owned(), "swapped".to_owned()], 2));
    }

    #[test]
    fn a_group_is_asked_whole_if_one_of_it_is_wanted() {
        let folder = tempfile::tempdir().unwrap();
        let mut spool = Spool::new(folder.path()).unwrap();
        for (i, name) in ["a", "b", "c", "d", "e"].into_iter().enumerate() {
            let question = question(name, Purpose::Label, i as u64);
            spool.push(&question, question.key, name == "d").unwrap();
        }
        let mut waiting = spool.groups_of(2).unwrap();
        assert_eq!((waiting.len(), waiting.wanted()), (1, 1));
        let group = waiting.take().unwrap();
        assert_eq!((group.len(), waiting.document(&group[0]).unwrap().prompt), (2, "c".to_owned()));
        assert!(waiting.is_empty() && waiting.take().is_none());
        waiting.give_back(group.clone());
        assert_eq!((waiting.len(), waiting.wanted(), waiting.take()), (1, 1, Some(group.clone())));
        waiting.put_last([group.clone()]);
        waiting.give_back(vec![group[1]]);
        assert_eq!((waiting.len(), waiting.wanted()), (2, 2));
        assert_eq!([waiting.take(), waiting.take(), waiting.take()], [Some(vec![group[1]]), Some(group), None]);
    }
}
