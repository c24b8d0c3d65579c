//! Records written before a batch is created, so that neither a crash nor a lost response makes anything paid twice.
//!
//! Each is a file in the store's `requests/batches`: a head, one line per request with its keys, and the batch's id
//! once it is known. The file exists as long as answers of its batch may still come, and is locked while a process
//! handles it.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use engine::error::{AtPath, Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::judge::document::AnswerKey;

/// The answer keys of one request, in order.
pub type Ticket = Vec<AnswerKey>;

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
struct Head {
    /// 32 hexadecimal digits, unique to each batch.
    nonce: String,
    /// Time before the batch was created, by the API's clock; milliseconds since 1970.
    at: u64,
    /// Number of requests in the batch.
    count: u64,
    /// The address of the API.
    base: String,
}

/// The line appended once the batch's id is known.
#[derive(Serialize, Deserialize)]
struct Known {
    batch: String,
}

/// A batch that was or will be created.
pub struct Intent {
    path: PathBuf,
    /// Holds the lock.
    file: File,
    head: Head,
    pub tickets: Vec<Ticket>,
    /// The batch's id at the API.
    pub batch: Option<String>,
}

/// The result of opening an intent's file.
pub enum Found {
    Ours(Intent),
    /// Another process handles it; with its keys.
    Held(Vec<Ticket>),
    /// It has ended.
    Gone,
}

impl Intent {
    /// A unique name for the requests of one batch.
    pub fn fresh_nonce() -> String {
        rand::random::<[u8; 16]>().iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// The name of a request in the API's results: at most 64 safe characters.
    pub fn custom_id(nonce: &str, index: usize) -> String {
        format!("{nonce}-{index}")
    }

    /// The file with the body of the creating request, kept until the batch's id is known.
    pub fn body_in(folder: &Path, nonce: &str) -> PathBuf {
        folder.join(format!("{nonce}.body"))
    }

    /// Writes the intent durably.
    ///
    /// # Errors
    /// If writing fails.
    pub fn create(folder: &Path, nonce: String, base: &str, at: SystemTime, tickets: Vec<Ticket>) -> Result<Self> {
        let at = at.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let at = u64::try_from(at.as_millis()).unwrap_or(u64::MAX);
        let head = Head { nonce, at, count: tickets.len() as u64, base: base.to_owned() };
        let path = folder.join(format!("{}.jsonl", head.nonce));
        let fresh = folder.join(format!("{}.new", head.nonce));
        let file = File::create_new(&fresh).at(&fresh)?;
        file.lock().at(&fresh)?;
        let mut writer = BufWriter::new(&file);
        line(&mut writer, &head).at(&fresh)?;
        for ticket in &tickets {
            line(&mut writer, ticket).at(&fresh)?;
        }
        writer.flush().at(&fresh)?;
        drop(writer);
        file.sync_all().at(&fresh)?;
        std::fs::rename(&fresh, &path).at(&path)?;
        File::open(folder).and_then(|folder| folder.sync_all()).at(folder)?;
        Ok(Self { path, file, head, tickets, batch: None })
    }

    /// The files of intents in a folder, ordered by name. Removes the remains of intents that were never completed.
    ///
    /// # Errors
    /// If the folder cannot be read.
    pub fn files(folder: &Path) -> Result<Vec<PathBuf>> {
        let mut files = Vec::new();
        for entry in std::fs::read_dir(folder).at(folder)? {
            let path = entry.at(folder)?.path();
            match path.extension().and_then(|e| e.to_str()) {
                Some("jsonl") => files.push(path),
                // A body without an intent was never sent. Writers of bodies hold the folder's lock, as this caller
                // does.
                Some("new") => std::fs::remove_file(&path).at(&path)?,
                Some("body") if !path.with_extension("jsonl").exists() => std::fs::remove_file(&path).at(&path)?,
                _ => {}
            }
        }
        files.sort();
        Ok(files)
    }

    /// # Errors
    /// If the file is not an intent, or reading fails.
    pub fn open(path: &Path) -> Result<Found> {
        let file = match OpenOptions::new().read(true).append(true).open(path) {
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Found::Gone),
            opened => opened.at(path)?,
        };
        let held = match file.try_lock() {
            Ok(()) => false,
            Err(TryLockError::WouldBlock) => true,
            Err(TryLockError::Error(e)) => return Err(e).at(path),
        };
        // Another process may have ended it between opening and locking.
        if !path.exists() {
            return Ok(Found::Gone);
        }
        let (head, tickets, batch) = read(path, &file)?;
        Ok(if held {
            Found::Held(tickets)
        } else {
            Found::Ours(Self { path: path.to_owned(), file, head, tickets, batch })
        })
    }

    /// The index of the request with this name; `None` if it belongs to another batch.
    pub fn index(&self, custom_id: &str) -> Option<usize> {
        let index = custom_id.strip_prefix(&self.head.nonce)?.strip_prefix('-')?.parse().ok()?;
        (index < self.tickets.len()).then_some(index)
    }

    pub fn at(&self) -> SystemTime {
        SystemTime::UNIX_EPOCH + Duration::from_millis(self.head.at)
    }

    pub fn is_for(&self, base: &str) -> bool {
        self.head.base == base
    }

    pub fn base(&self) -> &str {
        &self.head.base
    }

    /// The intent's file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The file with the body of its request.
    pub fn body(&self) -> PathBuf {
        self.path.with_extension("body")
    }

    /// Records the batch's id durably.
    ///
    /// # Errors
    /// If writing fails.
    pub fn became(&mut self, batch: &str) -> Result<()> {
        line(&mut &self.file, &Known { batch: batch.to_owned() }).and_then(|()| self.file.sync_data()).at(&self.path)?;
        self.batch = Some(batch.to_owned());
        self.remove_body()
    }

    /// Removes the intent, once nothing more can come of it.
    ///
    /// # Errors
    /// If removing fails.
    pub fn end(self) -> Result<()> {
        self.remove_body()?;
        std::fs::remove_file(&self.path).at(&self.path)
    }

    fn remove_body(&self) -> Result<()> {
        match std::fs::remove_file(self.body()) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => Err(e).at(self.body()),
            _ => Ok(()),
        }
    }
}

fn line(writer: &mut impl Write, value: &impl Serialize) -> std::io::Result<()> {
    let mut text = serde_json::to_vec(value)?;
    text.push(b'\n');
    writer.write_all(&text)
}

/// Reads an intent. Only the last line can be cut off by a crash; it names the batch, which can be found again.
fn read(path: &Path, file: &File) -> Result<(Head, Vec<Ticket>, Option<String>)> {
    let damaged = |what: &str| {
        Error::environment(format!("{}: expected {what} of a batch that was sent", path.display()))
            .help("look at the account's batches; delete the file to give up what may still come of it")
    };
    let mut lines = BufReader::new(file).split(b'\n');
    let first = lines.next().transpose().at(path)?.unwrap_or_default();
    let head: Head = serde_json::from_slice(&first).map_err(|_| damaged("the head"))?;
    let (mut tickets, mut batch) = (Vec::new(), None);
    for line in lines {
        match serde_json::from_slice::<Value>(&line.at(path)?) {
            Ok(keys @ Value::Array(_)) => {
                tickets.push(serde_json::from_value(keys).map_err(|_| damaged("the keys"))?);
            }
            Ok(known) => batch = Some(serde_json::from_value::<Known>(known).map_err(|_| damaged("the id"))?.batch),
            Err(_) => {}
        }
    }
    if tickets.len() as u64 != head.count {
        return Err(damaged(&format!("{} requests", head.count)));
    }
    Ok((head, tickets, batch))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn create(folder: &Path, at: SystemTime) -> Intent {
        Intent::create(folder, Intent::fresh_nonce(), "http://x/", at, tickets()).unwrap()
    }

    fn tickets() -> Vec<Ticket> {
        let key = |name: &str| AnswerKey::of(&[name.as_bytes()]);
        vec![vec![key("a"), key("b")], vec![key("c")]]
    }

    #[test]
    fn an_intent_comes_back_as_it_was_and_is_held_by_one_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let at = SystemTime::UNIX_EPOCH + Duration::from_millis(1_700_000_000_123);
        let intent = create(folder.path(), at);
        let path = intent.path().to_owned();
        assert!(matches!(Intent::open(&path).unwrap(), Found::Held(held) if held == tickets()));
        drop(intent);
        let Found::Ours(mut again) = Intent::open(&path).unwrap() else { panic!("not free") };
        assert_eq!((again.at(), again.tickets.clone(), again.batch.clone()), (at, tickets(), None));
        assert!(again.is_for("http://x/") && !again.is_for("http://y/"));
        again.became("msgbatch_1").unwrap();
        drop(again);
        let Found::Ours(again) = Intent::open(&path).unwrap() else { panic!("not free") };
        assert_eq!(again.batch.as_deref(), Some("msgbatch_1"));
        again.end().unwrap();
        assert!(matches!(Intent::open(&path).unwrap(), Found::Gone));
    }

    #[test]
    fn a_custom_id_is_short_and_safe_and_leads_back_to_its_request_alone() {
        let folder = tempfile::tempdir().unwrap();
        let [one, other] = [0, 1].map(|_| create(folder.path(), SystemTime::now()));
        let id = Intent::custom_id(&one.head.nonce, 1);
        assert!(id.len() <= 64 && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-'), "{id}");
        assert_eq!(
            (one.index(&id), other.index(&id), one.index(&Intent::custom_id(&one.head.nonce, 2))),
            (Some(1), None, None)
        );
        assert_eq!(one.index("theirs-1"), None);
    }

    #[test]
    fn a_torn_last_line_is_passed_over_and_a_damaged_file_is_told() {
        let folder = tempfile::tempdir().unwrap();
        let path = create(folder.path(), SystemTime::now()).path().to_owned();
        let whole = std::fs::read_to_string(&path).unwrap();
        std::fs::write(&path, format!("{whole}{{\"batch\":\"msgb")).unwrap();
        assert!(matches!(Intent::open(&path).unwrap(), Found::Ours(Intent { batch: None, .. })));
        let two_lines: Vec<&str> = whole.lines().take(2).collect();
        std::fs::write(&path, two_lines.join("\n")).unwrap();
        let error = Intent::open(&path).map(drop).unwrap_err();
        assert!(error.message.ends_with(".jsonl: expected 2 requests of a batch that was sent"), "{error}");
    }
}
