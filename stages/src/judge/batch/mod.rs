//! Sends requests as Message Batches, for half the price: batches are sent once and found again after a crash or a lost
//! response; results are delivered as they are read.

mod intent;
#[cfg(test)]
mod tests;

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::iter::Peekable;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use engine::error::{AtPath, Error, Result};
use serde_json::Value;

use super::client::Client;
use super::document::AnswerKey;
use super::providers::anthropic::batches::{Batch, Created, result};
use crate::http;
use intent::{Found, Intent};

pub use intent::Ticket;

/// Environment variable: seconds between two polls of a batch.
pub const POLL: &str = "TEMPER_BATCH_POLL";
/// Environment variable: seconds after which a batch without a response is assumed not to exist.
pub const GIVE_UP: &str = "TEMPER_BATCH_GIVE_UP";
/// Maximum difference between the clock of a batch's creation time and the clock of an intent's time.
const SLACK: Duration = Duration::from_secs(3600);

/// Sizes and waiting times of batches. They affect no answer.
#[derive(Clone, Copy, Debug)]
pub struct BatchConfig {
    pub poll: Duration,
    pub give_up: Duration,
    /// Maximum requests per batch.
    pub requests: usize,
    /// Maximum bytes per batch.
    pub bytes: u64,
}

impl Default for BatchConfig {
    /// The limits and the poll interval of the API's documentation.
    fn default() -> Self {
        let (poll, give_up) = (Duration::from_secs(60), Duration::from_secs(600));
        Self { poll, give_up, requests: 100_000, bytes: 256_000_000 }
    }
}

impl BatchConfig {
    /// The defaults, with times from the environment.
    ///
    /// # Errors
    /// If a variable is not a number of seconds.
    pub fn of_environment() -> Result<Self> {
        let seconds = |name: &str, usual: Duration| {
            let Some(text) = http::variable(name) else { return Ok(usual) };
            let seconds = text.trim().parse().ok().and_then(|s: f64| Duration::try_from_secs_f64(s).ok());
            seconds.ok_or_else(|| Error::user(format!("{name}: expected seconds, found `{text}`")).help("unset it"))
        };
        let usual = Self::default();
        Ok(Self { poll: seconds(POLL, usual.poll)?, give_up: seconds(GIVE_UP, usual.give_up)?, ..usual })
    }
}

/// The outcome of one request.
pub enum RequestOutcome {
    Answer(Value),
    /// The API rejected it, and would again.
    Refused(Error),
    /// May have been billed, but gave no answer.
    Lost(String),
    /// Neither answered nor billed: expired, or a server error.
    Unanswered(String),
    /// The batch was canceled. Not billed.
    Canceled,
}

/// Events while batches are in progress.
pub enum BatchEvent<'a> {
    /// The outcome of one request, to be stored.
    Done { ticket: &'a [AnswerKey], outcome: RequestOutcome },
    /// All results of a batch have been delivered. They must be durable when the handler returns, because they are not
    /// requested again.
    Whole,
    /// Number of requests of a batch still in progress.
    Waiting { left: u64 },
    /// A message for the user.
    Note(String),
}

/// Handles events. An error ends the work; batches in progress are found again by the next attempt.
pub type OnEvent<'a> = dyn FnMut(BatchEvent<'_>) -> Result<()> + 'a;

/// A request: its keys and its body.
pub struct Request {
    pub ticket: Ticket,
    pub body: Value,
}

/// Batches of one endpoint and one store.
pub struct Batches<'a> {
    client: &'a Client,
    /// The folder of intents.
    folder: PathBuf,
    config: BatchConfig,
}

impl<'a> Batches<'a> {
    /// `folder` is shared by all processes of the store.
    ///
    /// # Errors
    /// If the folder cannot be created.
    pub fn open(client: &'a Client, folder: &Path, config: BatchConfig) -> Result<Self> {
        std::fs::create_dir_all(folder).at(folder)?;
        Ok(Self { client, folder: folder.to_owned(), config })
    }

    /// Whether there may be batches to settle; creates nothing and sends nothing.
    pub fn are_open(folder: &Path) -> bool {
        let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
        entries.map(|entry| entry.path()).any(|path| path.extension().is_some_and(|e| e == "jsonl"))
    }

    /// Waits for unfinished batches of earlier attempts and of other processes, if they contain any `wanted` key.
    /// Returns whether there were any, so that fewer answers are needed than before.
    ///
    /// # Errors
    /// Errors of the API, the disk, and `on_event`.
    pub async fn settle_open(&self, wanted: &dyn Fn(AnswerKey) -> bool, on_event: &mut OnEvent<'_>) -> Result<bool> {
        let files = {
            let _guard = self.guard()?;
            Intent::files(&self.folder)?
        };
        let mut settled = false;
        for path in files {
            let mut told = false;
            loop {
                match Intent::open(&path)? {
                    Found::Gone => break,
                    Found::Held(tickets) => {
                        if !tickets.iter().flatten().any(|key| wanted(*key)) {
                            break;
                        }
                        settled = true;
                        if !std::mem::replace(&mut told, true) {
                            on_event(BatchEvent::Note(
                                "another process waits for a batch that asks the same: waiting for it".into(),
                            ))?;
                        }
                        tokio::time::sleep(self.config.poll).await;
                    }
                    Found::Ours(intent) if !intent.is_for(self.client.base()) => {
                        if intent.tickets.iter().flatten().any(|key| wanted(*key)) {
                            let (path, base) = (path.display(), intent.base());
                            on_event(BatchEvent::Note(format!(
                                "{path}: a batch that asks the same was sent to {base}: passed over"
                            )))?;
                        }
                        break;
                    }
                    Found::Ours(intent) => {
                        // A batch that is no longer needed is paid for anyway, so its results are read if that takes no
                        // waiting.
                        if intent.tickets.iter().flatten().any(|key| wanted(*key)) || self.has_ended(&intent).await? {
                            settled = true;
                            let count = intent.tickets.len();
                            on_event(BatchEvent::Note(format!(
                                "a batch of {count} requests is gone on with: an attempt before sent it"
                            )))?;
                            self.settle(intent, on_event).await?;
                        }
                        break;
                    }
                }
            }
        }
        Ok(settled)
    }

    /// Sends requests as batches within the size limits and waits for all results. Callers must settle open batches
    /// first ([`Batches::settle_open`]). If another process has meanwhile sent any of the same requests, sends nothing
    /// and returns `false`.
    ///
    /// # Errors
    /// Errors of the API, the disk, and `on_event`. Batches that were sent are found again by the next attempt.
    pub async fn send(
        &self,
        wanted: &dyn Fn(AnswerKey) -> bool,
        requests: &mut dyn Iterator<Item = Result<Request>>,
        on_event: &mut OnEvent<'_>,
    ) -> Result<bool> {
        let at = self.client.clock().await?;
        let mut intents = Vec::new();
        {
            let _guard = self.guard()?;
            for path in Intent::files(&self.folder)? {
                let tickets = match Intent::open(&path)? {
                    Found::Gone => continue,
                    Found::Held(tickets) => tickets,
                    Found::Ours(intent) if intent.is_for(self.client.base()) => intent.tickets,
                    Found::Ours(_) => continue,
                };
                if tickets.iter().flatten().any(|key| wanted(*key)) {
                    return Ok(false);
                }
            }
            let text = |request: Result<Request>| {
                let Request { ticket, body } = request?;
                let text = serde_json::to_vec(&body);
                Ok((ticket, text.map_err(|e| Error::internal(format!("a request does not serialise: {e}")))?))
            };
            let mut requests = requests.map(text).peekable();
            while requests.peek().is_some() {
                intents.push(self.intend(at, &mut requests)?);
            }
        }
        for n in 0..intents.len() {
            match self.client.create_batch(&intents[n].body()).await {
                Ok(Created::Yes(batch)) => intents[n].became(&batch.id)?,
                Ok(Created::Unknown(error)) => {
                    let looked = "whether there is a batch is looked up, not tried again";
                    on_event(BatchEvent::Note(format!("{}: {looked}", error.message)))?;
                }
                Err(error) => {
                    // Rejected: there is no batch, and the remaining ones are not sent.
                    intents.drain(n..).try_for_each(Intent::end)?;
                    return Err(error);
                }
            }
        }
        for intent in intents {
            self.settle(intent, on_event).await?;
        }
        Ok(true)
    }

    /// Its holder alone may look for other processes' intents and write new ones.
    fn guard(&self) -> Result<File> {
        let path = self.folder.join("lock");
        let file = File::options().create(true).append(true).open(&path).at(&path)?;
        file.lock().at(&path)?;
        Ok(file)
    }

    /// Writes one batch of the next requests: first its body, then the intent, which makes it valid.
    fn intend(&self, at: SystemTime, requests: &mut Peekable<impl Iterator<Item = Text>>) -> Result<Intent> {
        let nonce = Intent::fresh_nonce();
        let path = Intent::body_in(&self.folder, &nonce);
        let mut body = BufWriter::new(File::create_new(&path).at(&path)?);
        body.write_all(b"{\"requests\":[").at(&path)?;
        let (mut tickets, mut bytes): (Vec<Ticket>, u64) = (Vec::new(), ENVELOPE);
        loop {
            let fits = |text: &Text| {
                let longer = bytes + text.as_ref().map_or(0, |(_, text)| text.len() as u64 + ENVELOPE);
                tickets.is_empty() || (tickets.len() < self.config.requests && longer <= self.config.bytes)
            };
            let Some(text) = requests.next_if(fits) else { break };
            let (ticket, text) = text?;
            let comma = if tickets.is_empty() { "" } else { "," };
            let id = Intent::custom_id(&nonce, tickets.len());
            write!(body, "{comma}{{\"custom_id\":\"{id}\",\"params\":").at(&path)?;
            body.write_all(&text).and_then(|()| body.write_all(b"}")).at(&path)?;
            bytes += text.len() as u64 + ENVELOPE;
            tickets.push(ticket);
        }
        body.write_all(b"]}").and_then(|()| body.flush()).at(&path)?;
        Intent::create(&self.folder, nonce, self.client.base(), at, tickets)
    }

    /// Waits for a batch to end and delivers its results, then ends the intent. A batch without a response is first
    /// looked for; if there is none, the intent ends too, since nothing of it was processed or billed.
    async fn settle(&self, intent: Intent, on_event: &mut OnEvent<'_>) -> Result<()> {
        let Some(id) = intent.batch.clone() else {
            if !self.find(&intent, on_event).await? {
                let count = intent.tickets.len();
                on_event(BatchEvent::Note(format!("no batch of {count} requests was created: they are sent again")))?;
                for ticket in &intent.tickets {
                    on_event(BatchEvent::Done {
                        ticket,
                        outcome: RequestOutcome::Unanswered("no batch was created".to_owned()),
                    })?;
                }
            }
            return intent.end();
        };
        self.ended(&id, on_event).await.map_err(|error| gone(error, &intent))?;
        match self.results(&id, &intent, on_event).await.map_err(|error| gone(error, &intent))? {
            true => intent.end(),
            false => Err(Error::environment(format!("batch {id} does not answer what was sent")).help(format!(
                "look at the account's batches; {} is what was written down of it",
                intent.path().display()
            ))),
        }
    }

    /// Looks for the batch of an intent among those created since, by its number of requests, and confirms it by the
    /// names in its results, which are delivered. Returns whether there is one, waiting as long as a batch may take to
    /// appear.
    async fn find(&self, intent: &Intent, on_event: &mut OnEvent<'_>) -> Result<bool> {
        let since = intent.at().checked_sub(SLACK).unwrap_or(SystemTime::UNIX_EPOCH);
        let mut foreign: BTreeSet<String> = BTreeSet::new();
        loop {
            // The clock is read first: batches that appear later count in the next round.
            let late = self.client.clock().await? >= intent.at() + self.config.give_up;
            let mut alike = self.client.batches_since(since).await?;
            alike.retain(|batch| batch.count == intent.tickets.len() as u64 && !foreign.contains(&batch.id));
            if late && alike.is_empty() {
                return Ok(false);
            }
            for batch in alike.iter().rev().filter(|batch| batch.ended) {
                if self.results(&batch.id, intent, on_event).await? {
                    return Ok(true);
                }
                foreign.insert(batch.id.clone());
            }
            if let Some(Batch { processing, .. }) = alike.iter().find(|batch| !batch.ended) {
                on_event(BatchEvent::Waiting { left: *processing })?;
            }
            tokio::time::sleep(self.config.poll).await;
        }
    }

    async fn has_ended(&self, intent: &Intent) -> Result<bool> {
        match &intent.batch {
            Some(id) => Ok(self.client.batch(id).await.map_err(|error| gone(error, intent))?.ended),
            None => Ok(false),
        }
    }

    /// Waits until a batch has ended.
    async fn ended(&self, id: &str, on_event: &mut OnEvent<'_>) -> Result<()> {
        loop {
            let batch = self.client.batch(id).await?;
            on_event(BatchEvent::Waiting { left: batch.processing })?;
            if batch.ended {
                return Ok(());
            }
            tokio::time::sleep(self.config.poll).await;
        }
    }

    /// Delivers each result of an ended batch once, including missing ones. Returns whether the results belong to the
    /// intent: if the first one does not, stops reading.
    async fn results(&self, id: &str, intent: &Intent, on_event: &mut OnEvent<'_>) -> Result<bool> {
        let mut landed = vec![false; intent.tickets.len()];
        let mut foreign = false;
        let mut on_line = |mut line: Value| {
            let Some(index) = line["custom_id"].as_str().and_then(|id| intent.index(id)) else {
                foreign = true;
                return Ok(ControlFlow::Break(()));
            };
            if !std::mem::replace(&mut landed[index], true) {
                on_event(BatchEvent::Done {
                    ticket: &intent.tickets[index],
                    outcome: result(line["result"].take(), id),
                })?;
            }
            Ok(ControlFlow::Continue(()))
        };
        self.client.results(id, &mut on_line).await?;
        if foreign || !landed.contains(&true) {
            return Ok(false);
        }
        for (ticket, _) in intent.tickets.iter().zip(landed).filter(|(_, landed)| !landed) {
            on_event(BatchEvent::Done {
                ticket,
                outcome: RequestOutcome::Unanswered(format!("batch {id}: no result of a request")),
            })?;
        }
        on_event(BatchEvent::Whole)?;
        Ok(true)
    }
}

/// A request's keys and its serialised body.
type Text = Result<(Ticket, Vec<u8>)>;

/// Approximate bytes around a request in a batch's body.
const ENVELOPE: u64 = 80;

/// Adds the intent's path to the error for a batch that the API no longer has.
fn gone(error: Error, intent: &Intent) -> Error {
    match error.message.contains(": 404: ") {
        true => error.context("a batch that was sent").help(format!(
            "its results are kept for 29 days, for the workspace of the key that sent it; delete {} to give it up and pay again",
            intent.path().display()
        )),
        false => error,
    }
}
