//! Durable log of paid answers, shared by all pipelines and processes of a store.
//!
//! ```text
//! requests/<kind>/<fingerprint of the settings>/
//!     settings.json    the settings in readable form
//!     answers.jsonl    one line per answered request: the documents' keys by slot, the answer as it came, a checksum
//!     damaged.jsonl    lines whose checksum failed and which were paid for again
//!     claims/          lock files with one locked byte per document in progress
//! ```
//!
//! The in-memory index is rebuilt from the log alone, so improved parsing needs only a restart. It holds the key of
//! each answer and the offset of its line, 24 bytes; all else is read from the log on demand. The first answer under a
//! key counts.

mod claims;
mod lines;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use engine::error::{AtPath, Error, Result};
use serde_json::Value;

use super::document::AnswerKey;
use super::instructions::Instructions;
use super::prices::Usage;
use super::provider::Provider;
use super::reply::{Answer, Reply, one_line, verdict};
use super::settings::Settings;
use claims::Claims;
use lines::{Fault, LineFile};
pub use lines::{Line, Verified};

/// A stored answer about one document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Kept {
    pub reply: Reply,
    /// Index of the document in its request, from 0.
    pub slot: usize,
    /// Offset of the request's line in the log.
    pub request: u64,
}

/// A [`Kept`] in minimal memory: there may be hundreds of thousands.
#[derive(Clone, Copy)]
struct Packed(u64);

/// Reply codes by index.
const REPLIES: [Reply; 7] =
    [Reply::Label(1), Reply::Label(2), Reply::Refused, Reply::Truncated, Reply::Unparsable, Reply::Failed, Reply::Tie];

impl Packed {
    /// Slots and replies take one byte each; `None` if a request has more documents, or if the log is impossibly long.
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

pub struct AnswerLog {
    folder: PathBuf,
    log: LineFile,
    claims: Claims,
    provider: Arc<dyn Provider>,
    instructions: Instructions,
    kept: HashMap<AnswerKey, Packed>,
    /// Number of answered requests.
    answered: u64,
    torn: u64,
    /// Offsets of damaged lines.
    damaged: Vec<u64>,
    /// The model ids that answers report, each with its number of answers.
    models: BTreeMap<String, u64>,
    /// Another model id than before, not yet reported.
    new_model: Option<String>,
}

/// Most model ids that a log records; a server that reports more has no stable one.
const MODELS: usize = 16;

impl AnswerLog {
    /// Opens the answers for these settings; `requests` is the store's folder of requests.
    ///
    /// # Errors
    /// If the files cannot be opened.
    pub fn open(requests: &Path, settings: &Settings) -> Result<Self> {
        let folder = folder(requests, settings);
        std::fs::create_dir_all(&folder).at(&folder)?;
        describe(&folder.join("settings.json"), settings)?;
        let mut log = Self {
            log: LineFile::open(&folder.join("answers.jsonl"))?,
            claims: Claims::open(&folder.join("claims"))?,
            folder,
            provider: settings.provider.clone(),
            instructions: settings.instructions.clone(),
            kept: HashMap::new(),
            answered: 0,
            torn: 0,
            damaged: Vec::new(),
            models: BTreeMap::new(),
            new_model: None,
        };
        log.refresh()?;
        Ok(log)
    }

    /// Opens the answers for these settings if the store has a folder for them; creates nothing.
    ///
    /// # Errors
    /// If the files cannot be opened.
    pub fn peek(requests: &Path, settings: &Settings) -> Result<Option<Self>> {
        if folder(requests, settings).is_dir() { Self::open(requests, settings).map(Some) } else { Ok(None) }
    }

    /// The folder of the answers for these settings.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    pub fn get(&self, key: AnswerKey) -> Option<Kept> {
        self.kept.get(&key).map(|packed| packed.kept())
    }

    /// Passes the usage of each answered request read so far to `each`, with the offset of its line, in log order.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn usages(&self, mut each: impl FnMut(u64, Usage)) -> Result<()> {
        self.log.read_again(|offset, line| {
            let protocol = self.provider.protocol();
            let answer = line.ok().and_then(|line| line.answer.filter(|answer| protocol.is_answer(answer)));
            let usage = answer.map(|answer| (protocol.usage)(&answer));
            if let Some(usage) = usage.filter(|usage| usage.sent() > 0) {
                each(offset, usage);
            }
        })
    }

    /// Number of requests ever answered with these settings. If any was, a rejection is the fault of a request, not of
    /// the settings.
    pub fn answered(&self) -> u64 {
        self.answered
    }

    /// Number of lines cut off by a crash: answers that were never stored.
    pub fn torn(&self) -> u64 {
        self.torn
    }

    /// Offsets of damaged lines: answers that were paid for and are lost.
    pub fn damaged(&self) -> &[u64] {
        &self.damaged
    }

    /// Moves the damaged lines out of the log; returns the file that they are moved to.
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

    /// Reads the answers stored since the last call, by this and other processes.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn refresh(&mut self) -> Result<()> {
        let Self { log, provider, instructions, kept, answered, torn, damaged, models, new_model, .. } = self;
        log.read_on(|request, line| {
            let Line { documents, answer, failed, .. } = match line {
                Ok(line) => line,
                Err(Fault::Torn) => return *torn += 1,
                Err(Fault::Damaged) => return damaged.push(request),
            };
            let replies = match (&answer, &failed) {
                // Logs of an older temper may store error documents as answers; those documents are asked again.
                (Some(answer), _) if !provider.protocol().is_answer(answer) => return,
                (Some(answer), _) => answers_by_document(&**provider, instructions, answer, documents.len())
                    .iter()
                    .map(|answers| verdict(answers).0)
                    .collect(),
                (None, _) => vec![Reply::Failed; documents.len()],
            };
            *answered += u64::from(answer.is_some());
            if let Some(model) = answer.as_ref().and_then(|answer| answer["model"].as_str()) {
                if !models.is_empty() && models.len() < MODELS && !models.contains_key(model) {
                    *new_model = Some(model.to_owned());
                }
                if models.len() < MODELS || models.contains_key(model) {
                    *models.entry(model.to_owned()).or_default() += 1;
                }
            }
            for (slot, (key, reply)) in documents.into_iter().zip(replies).enumerate() {
                match Packed::of(Kept { reply, slot, request }) {
                    Some(packed) => drop(kept.entry(key).or_insert(packed)),
                    None => damaged.push(request),
                }
            }
        })
    }

    /// Stores outcomes durably and makes them available to [`AnswerLog::get`].
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn keep(&mut self, lines: Vec<Line>) -> Result<()> {
        self.log.append(lines)?;
        self.refresh()
    }

    /// A warning, once for each change, that answers report another model than before.
    pub fn model_warning(&mut self) -> Option<String> {
        let new = one_line(&self.new_model.take()?);
        let others = self.models.iter().filter(|(model, _)| **model != new);
        let others: Vec<String> = others.map(|(model, n)| format!("`{}` ({n} answers)", one_line(model))).collect();
        Some(format!("the endpoint reports the model `{new}`, before {}: the table mixes them", others.join(", ")))
    }

    /// The probability of a label or tie, if its answer tells.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn probability(&self, kept: Kept) -> Result<Option<f64>> {
        if !self.provider.tells_probability() || !matches!(kept.reply, Reply::Label(_) | Reply::Tie) {
            return Ok(None);
        }
        Ok(verdict(&self.answers(kept)?).1)
    }

    /// The answers to a pair's questions.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn answers(&self, kept: Kept) -> Result<Vec<Answer>> {
        let line = self.log.line_at(kept.request)?;
        let answer = line.answer.unwrap_or_default();
        let mut all = answers_by_document(&*self.provider, &self.instructions, &answer, line.documents.len());
        Ok(all.swap_remove(kept.slot))
    }

    /// Claims a document for this process until [`AnswerLog::release`] or the process ends; false while another process
    /// holds it.
    ///
    /// # Errors
    /// If the file system does not support locks.
    pub fn claim(&self, key: AnswerKey) -> Result<bool> {
        self.claims.claim(key)
    }

    /// # Errors
    /// If the file system does not support locks.
    pub fn release(&self, key: AnswerKey) -> Result<()> {
        self.claims.release(key)
    }

    /// The reason why an answer has no label; `None` if it has one.
    ///
    /// # Errors
    /// If the log cannot be read.
    pub fn reason(&self, kept: Kept) -> Result<Option<String>> {
        if matches!(kept.reply, Reply::Label(_) | Reply::Tie) {
            return Ok(None);
        }
        let line = self.log.line_at(kept.request)?;
        let reason = || self.provider.reason(kept.reply, &line.answer.unwrap_or_default());
        Ok(line.failed.or_else(|| Some(one_line(&reason()))))
    }
}

/// For each document of a response, the answers to its questions.
fn answers_by_document(
    provider: &dyn Provider,
    instructions: &Instructions,
    response: &Value,
    documents: usize,
) -> Vec<Vec<Answer>> {
    let fields = instructions.all_fields(documents);
    let replies = provider.replies(response, &fields);
    let is_alone = fields.len() == 1;
    let first_wins =
        |field: &str| provider.first_wins(response, field, is_alone).filter(|_| provider.tells_probability());
    let weights = instructions.weights();
    let answers: Vec<Answer> = replies
        .into_iter()
        .zip(&fields)
        .zip(weights.iter().cycle())
        .map(|((reply, field), weight)| Answer { weight: *weight, reply, first_wins: first_wins(field) })
        .collect();
    answers.chunks(weights.len()).map(<[Answer]>::to_vec).collect()
}

fn folder(requests: &Path, settings: &Settings) -> PathBuf {
    let fingerprint: String = settings.fingerprint()[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    requests.join(settings.kind()).join(fingerprint)
}

/// Reads every paid answer below the store's folder `requests`; writes nothing.
///
/// # Errors
/// If a log cannot be read.
pub fn verify(requests: &Path) -> Result<Verified> {
    let mut found = Verified::default();
    if !requests.is_dir() {
        return Ok(found);
    }
    let mut paths = Vec::new();
    for kind in std::fs::read_dir(requests).at(requests)? {
        let logs = kind.at(requests)?.path();
        if logs.is_dir() {
            for entry in std::fs::read_dir(&logs).at(&logs)? {
                paths.push(entry.at(&logs)?.path().join("answers.jsonl"));
            }
        }
    }
    paths.sort();
    paths.iter().filter(|path| path.is_file()).try_for_each(|path| lines::verify(path, &mut found))?;
    Ok(found)
}

/// Writes the settings of the folder's answers, once.
fn describe(path: &Path, settings: &Settings) -> Result<()> {
    if path.exists() {
        return Ok(());
    }
    let mut text = serde_json::to_vec_pretty(&settings.asked).map_err(|e| Error::internal(format!("settings: {e}")))?;
    text.push(b'\n');
    // Atomic; concurrent writers write the same content.
    let folder = path.parent().unwrap_or(path);
    let mut new = tempfile::NamedTempFile::new_in(folder).at(folder)?;
    new.write_all(&text).at(path)?;
    new.persist(path).map(drop).map_err(|e| e.error).at(path)
}
