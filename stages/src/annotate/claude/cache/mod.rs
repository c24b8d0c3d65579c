//! Paid answers, kept as they land: a log that all pipelines and processes of a store share. Knows no network and no table.
//!
//! ```text
//! requests/annotate.claude/<fingerprint of the settings>/
//!     settings.json    what was asked, for people
//!     answers.jsonl    one line per answered request: the documents' keys by slot, the answer as it came, a checksum
//!     damaged.jsonl    lines whose checksum failed and which were paid for again
//!     claims/          bytes of its files are locked, one per document that is being asked
//! ```
//!
//! What is in memory is made from the log alone, by the same code whoever wrote a line: so parsing again costs nothing but
//! a restart. It is the key of each answer and where its line begins, 24 bytes; all else is read from the log again when it is
//! asked for. The first answer under a key counts.

mod claims;
mod log;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::io::Write;
use std::path::{Path, PathBuf};

use engine::error::{At, Error, Result};
use serde_json::Value;

use super::document::AnswerKey;
use super::prices::Usage;
use super::reply::{Reading, Reply, is_message};
use super::settings::Settings;
use claims::Claims;
pub use log::Verified;
use log::{Fault, Line, Log};

/// An answer about one document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    pub reply: Reply,
    /// Which document of its request it was, from 0.
    pub slot: usize,
    /// Which request it was in: where its line begins in the log.
    pub request: u64,
}

/// In the store's folder of requests: a folder for each fingerprint.
const LOGS: &str = "annotate.claude";

/// A [`Kept`] in as little memory as it takes: there may be a hundred thousand of them.
#[derive(Clone, Copy)]
struct Packed(u64);

/// By their place here.
const REPLIES: [Reply; 6] =
    [Reply::Label(1), Reply::Label(2), Reply::Refused, Reply::Truncated, Reply::Unparsable, Reply::Failed];

impl Packed {
    /// Slots and replies take a byte each; none if there are more documents in a request than that, or the log is longer than
    /// any disk.
    fn of(kept: Kept) -> Option<Self> {
        let reply = REPLIES.iter().position(|reply| *reply == kept.reply)? as u64;
        let slot = u8::try_from(kept.slot).ok()?;
        (kept.request < 1 << 48).then_some(Self(kept.request << 16 | u64::from(slot) << 8 | reply))
    }

    fn kept(self) -> Kept {
        let [reply, slot, ..] = self.0.to_le_bytes();
        Kept { reply: REPLIES[usize::from(reply)], slot: slot.into(), request: self.0 >> 16 }
    }
}

/// What came of a request, to be kept.
pub struct Landed {
    /// By slot.
    pub documents: Vec<AnswerKey>,
    pub what: What,
}

pub enum What {
    Answer(Value),
    /// The API took it for a faulty request, for this reason. Nothing was paid.
    Failed(String),
}

pub struct Cache {
    folder: PathBuf,
    log: Log,
    claims: Claims,
    reading: Reading,
    kept: HashMap<AnswerKey, Packed>,
    /// Requests that were answered.
    answered: u64,
    torn: u64,
    /// Where damaged lines begin.
    damaged: Vec<u64>,
}

impl Cache {
    /// The answers under these settings in `requests`, the store's folder.
    ///
    /// # Errors
    /// If the files cannot be opened.
    pub fn open(requests: &Path, settings: &Settings) -> Result<Self> {
        let folder = folder(requests, settings);
        std::fs::create_dir_all(&folder).at(&folder)?;
        describe(&folder.join("settings.json"), settings)?;
        let mut cache = Self {
            log: Log::open(&folder.join("answers.jsonl"))?,
            claims: Claims::open(&folder.join("claims"))?,
            folder,
            reading: Reading::of(settings),
            kept: HashMap::new(),
            answered: 0,
            torn: 0,
            damaged: Vec::new(),
        };
        cache.refresh()?;
        Ok(cache)
    }

    /// The answers under these settings, if the store has a folder for them; makes nothing.
    ///
    /// # Errors
    /// If the files cannot be opened.
    pub fn peek(requests: &Path, settings: &Settings) -> Result<Option<Self>> {
        if folder(requests, settings).is_dir() { Self::open(requests, settings).map(Some) } else { Ok(None) }
    }

    /// Where the answers under these settings lie.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn get(&self, key: AnswerKey) -> Option<Kept> {
        self.kept.get(&key).map(|packed| packed.kept())
    }

    /// What each answered request took that is in the log so far, by where its line begins, in the order of the log.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn usages(&self, mut each: impl FnMut(u64, Usage)) -> Result<()> {
        self.log.read_again(|offset, line| {
            let usage =
                line.ok().and_then(|line| line.answer.as_ref().filter(|answer| is_message(answer)).map(Usage::of));
            if let Some(usage) = usage.filter(|usage| usage.sent() > 0) {
                each(offset, usage);
            }
        })
    }

    /// How many requests under these settings were ever answered. If any was, a fault lies in a request, not in the settings.
    pub fn answered(&self) -> u64 {
        self.answered
    }

    /// Lines that a crash cut off: answers that were never kept.
    pub fn torn(&self) -> u64 {
        self.torn
    }

    /// Where lines begin that were kept and are no longer as they were written: answers that were paid for and are lost.
    pub fn damaged(&self) -> &[u64] {
        &self.damaged
    }

    /// Moves the damaged lines out of the log, so that it is whole again; returns where to.
    ///
    /// # Errors
    /// If the files cannot be written.
    pub fn set_damaged_aside(&mut self) -> Result<PathBuf> {
        let aside = self.folder.join("damaged.jsonl");
        for offset in std::mem::take(&mut self.damaged) {
            self.log.set_aside(offset, &aside)?;
        }
        Ok(aside)
    }

    /// Takes in what this and other processes have kept meanwhile.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn refresh(&mut self) -> Result<()> {
        let Self { log, reading, kept, answered, torn, damaged, .. } = self;
        log.read_on(|request, line| {
            let Line { documents, answer, failed, .. } = match line {
                Ok(line) => line,
                Err(Fault::Torn) => return *torn += 1,
                Err(Fault::Damaged) => return damaged.push(request),
            };
            let replies = match (&answer, &failed) {
                // Logs of an older temper hold error documents as answers: those documents are asked again.
                (Some(answer), _) if !is_message(answer) => return,
                (Some(answer), _) => reading.replies(answer, documents.len()),
                (None, _) => vec![Reply::Failed; documents.len()],
            };
            *answered += u64::from(answer.is_some());
            for (slot, (key, reply)) in documents.into_iter().zip(replies).enumerate() {
                match Packed::of(Kept { reply, slot, request }) {
                    Some(packed) => drop(kept.entry(key).or_insert(packed)),
                    None => damaged.push(request),
                }
            }
        })
    }

    /// Keeps what has landed; on return it is on disk and is what [`Cache::get`] tells.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn keep(&mut self, landed: Vec<Landed>) -> Result<()> {
        let lines = landed.into_iter().map(|Landed { documents, what }| match what {
            What::Answer(answer) => Line::answer(documents, answer),
            What::Failed(why) => Line::failed(documents, why),
        });
        self.log.append(lines)?;
        self.refresh()
    }

    /// Claims a document for this process until [`Cache::release`] or its death; false while another has it.
    ///
    /// # Errors
    /// If the file system has no locks.
    pub fn claim(&self, key: AnswerKey) -> Result<bool> {
        self.claims.claim(key)
    }

    /// # Errors
    /// If the file system has no locks.
    pub fn release(&self, key: AnswerKey) -> Result<()> {
        self.claims.release(key)
    }

    /// Why an answer gives no label; none if it does.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn reason(&self, kept: Kept) -> Result<Option<String>> {
        if matches!(kept.reply, Reply::Label(_)) {
            return Ok(None);
        }
        let line = self.log.line_at(kept.request)?;
        Ok(line.failed.or_else(|| self.reading.reason(kept.reply, &line.answer.unwrap_or_default())))
    }
}

fn folder(requests: &Path, settings: &Settings) -> PathBuf {
    let fingerprint: String = settings.fingerprint()[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    requests.join(LOGS).join(fingerprint)
}

/// Reads every paid answer in `requests`, the store's folder; writes nothing.
///
/// # Errors
/// If a log cannot be read.
pub fn verify(requests: &Path) -> Result<Verified> {
    let mut found = Verified::default();
    let logs = requests.join(LOGS);
    if !logs.is_dir() {
        return Ok(found);
    }
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(&logs).at(&logs)? {
        paths.push(entry.at(&logs)?.path().join("answers.jsonl"));
    }
    paths.sort();
    paths.iter().filter(|path| path.is_file()).try_for_each(|path| log::verify(path, &mut found))?;
    Ok(found)
}

/// Says what the folder's answers are to, once.
fn describe(path: &Path, settings: &Settings) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    let mut text = serde_json::to_vec_pretty(&settings.asked()).map_err(|e| Error::ours(format!("settings: {e}")))?;
    text.push(b'\n');
    // Whole or not at all; two that write at once write the same.
    let folder = path.parent().unwrap_or(path);
    let mut new = tempfile::NamedTempFile::new_in(folder).at(folder)?;
    new.write_all(&text).at(path)?;
    new.persist(path).map(drop).map_err(|e| e.error).at(path)
}
