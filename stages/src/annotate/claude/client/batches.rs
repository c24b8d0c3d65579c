//! The calls of `/v1/messages/batches`. Creating is the one that is never repeated blindly. Knows no intent and no document.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, SystemTime};

use chrono::DateTime;
use engine::error::{At, Error, Result};
use reqwest::Url;
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap};
use serde_json::Value;

use super::{Client, Expected, Failed, LONGEST_ANSWER, OBJECT, Unsent, Whole, error_within, faults, judged, retry};

/// Reading hundreds of megabytes may take long.
const DOWNLOAD: Duration = Duration::from_secs(4 * 3600);
/// Bytes a second at which a batch is sent at least.
const SLOWEST_UPLOAD: u64 = 100_000;
/// A download that brings nothing for so long is cut.
const STALLED: Duration = Duration::from_secs(120);
/// Batches in one page of the list; the API gives 1,000 at most.
const PAGE: usize = 100;

/// A batch as the API describes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Safe to stand in a path.
    pub id: String,
    pub created: SystemTime,
    pub ended: bool,
    /// Requests in it, whatever became of them.
    pub count: u64,
    /// Those that nothing has become of yet.
    pub processing: u64,
}

impl Batch {
    fn parse(value: &Value) -> Option<Self> {
        let id = value["id"].as_str()?;
        let safe =
            (1..=128).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-');
        let counts = value["request_counts"].as_object()?;
        let count = |name: &str| counts.get(name).and_then(Value::as_u64).unwrap_or(0);
        safe.then_some(())?;
        Some(Self {
            id: id.to_owned(),
            created: DateTime::parse_from_rfc3339(value["created_at"].as_str()?).ok()?.into(),
            ended: value["processing_status"] == "ended",
            count: ["processing", "succeeded", "errored", "canceled", "expired"].into_iter().map(count).sum(),
            processing: count("processing"),
        })
    }
}

const BATCH: Expected = ("a batch", |body| Batch::parse(body).is_some());
const BATCHES: Expected = ("a list of batches", |body| {
    body["data"].as_array().is_some_and(|all| all.iter().all(|b| Batch::parse(b).is_some()))
});

/// What became of an attempt to create a batch.
#[derive(Debug)]
pub enum Created {
    Yes(Batch),
    /// The request went out and no word of it came back: there may be a batch.
    Unknown(Error),
}

/// Called with each line of a batch's results; `Break` ends the reading.
pub type OnLine<'a> = dyn FnMut(Value) -> Result<ControlFlow<()>> + 'a;

impl Client {
    /// Creates a batch of the body in a file. Tried again only where it is certain that there is none: no connection, or an
    /// answer that turns the request away.
    ///
    /// # Errors
    /// As [`Client::post`]; there is no batch then.
    pub async fn create_batch(&self, body: &Path) -> Result<Created> {
        let url = self.endpoint.at("v1/messages/batches");
        let mut patience = self.patience();
        loop {
            match self.create_once(&url, body).await {
                Ok(Created::Unknown(error)) => return Ok(Created::Unknown(self.endpoint.without_key(error))),
                Ok(created) => return Ok(created),
                Err(failed) => patience.outlast(failed).await?,
            }
        }
    }

    async fn create_once(&self, url: &Url, body: &Path) -> Result<Created, Failed> {
        let file = tokio::fs::File::open(body).await.at(body).map_err(Failed::ForGood)?;
        let length = file.metadata().await.at(body).map_err(Failed::ForGood)?.len();
        let timeout = self.timeout + Duration::from_secs(length / SLOWEST_UPLOAD);
        let request = self.http.post(url.clone()).timeout(timeout).header(CONTENT_TYPE, "application/json");
        let _turn = self.turn().await;
        let answer = match self.send(url, request.header(CONTENT_LENGTH, length).body(file)).await {
            Ok(response) => self.read(url, response).await,
            Err(Unsent::Perhaps(error)) => Err(error),
            Err(unsent) => return Err(unsent.into()),
        };
        match answer {
            Ok(answer) => created(url, &answer),
            Err(error) => Ok(Created::Unknown(error)),
        }
    }

    /// # Errors
    /// As [`Client::post`].
    pub async fn batch(&self, id: &str) -> Result<Batch> {
        let url = self.endpoint.at(&format!("v1/messages/batches/{id}"));
        let body = self.json_for_free(&url, BATCH).await?;
        Batch::parse(&body).ok_or_else(|| odd(&url, "a batch"))
    }

    /// The batches of the key's workspace created at `since` or later, the newest first.
    ///
    /// # Errors
    /// As [`Client::post`].
    pub async fn batches_since(&self, since: SystemTime) -> Result<Vec<Batch>> {
        let mut found: Vec<Batch> = Vec::new();
        loop {
            let mut path = format!("v1/messages/batches?limit={PAGE}");
            if let Some(last) = found.last() {
                path += &format!("&after_id={}", last.id);
            }
            let url = self.endpoint.at(&path);
            let body = self.json_for_free(&url, BATCHES).await?;
            let page = body["data"].as_array().ok_or_else(|| odd(&url, "a list of batches"))?;
            let more = body["has_more"] == true && !page.is_empty();
            for batch in page {
                let batch = Batch::parse(batch).ok_or_else(|| odd(&url, "batches"))?;
                if batch.created < since {
                    return Ok(found);
                }
                found.push(batch);
            }
            if !more {
                return Ok(found);
            }
        }
    }

    /// Reads the results of a batch that has ended, line by line as they come; one line is held at a time. After a cut
    /// connection it begins anew, so `on_line` may meet a line again.
    ///
    /// # Errors
    /// As [`Client::post`], and what `on_line` fails with.
    pub async fn results(&self, id: &str, on_line: &mut OnLine<'_>) -> Result<()> {
        let url = self.endpoint.at(&format!("v1/messages/batches/{id}/results"));
        let mut patience = self.patience();
        loop {
            match self.results_once(&url, on_line).await {
                Ok(()) => return Ok(()),
                Err(failed) => patience.outlast(failed).await?,
            }
        }
    }

    async fn results_once(&self, url: &Url, on_line: &mut OnLine<'_>) -> Result<(), Failed> {
        let _turn = self.turn().await;
        let mut response = self.send(url, self.http.get(url.clone()).timeout(DOWNLOAD)).await?;
        if response.status().as_u16() != 200 {
            let answer = self.read(url, response).await.map_err(|error| Failed::Again(error, None))?;
            let failed = judged(url, &answer, OBJECT).err();
            return Err(failed.unwrap_or_else(|| Failed::ForGood(odd(url, "results"))));
        }
        let mut line = Vec::new();
        loop {
            let chunk = tokio::time::timeout(STALLED, response.chunk()).await;
            let stalled = |_| Error::surroundings(format!("{url}: nothing came for {} s", STALLED.as_secs()));
            let chunk = chunk.map_err(|e| Failed::Again(stalled(e).transient(), None))?;
            let chunk = chunk.map_err(|e| Failed::Again(faults::unreachable(url, &e), None))?;
            for piece in chunk.as_deref().unwrap_or(b"\n").split_inclusive(|byte| *byte == b'\n') {
                line.extend_from_slice(piece);
                if line.len() > LONGEST_ANSWER {
                    return Err(Failed::ForGood(odd(url, "shorter lines")));
                }
                if piece.ends_with(b"\n") {
                    let text = self.endpoint.without_key_in(std::mem::take(&mut line));
                    if on_text(url, &text, on_line)?.is_break() {
                        return Ok(());
                    }
                }
            }
            if chunk.is_none() {
                return Ok(());
            }
        }
    }

    /// The server's clock, as far as it tells it: what batches' times are held against.
    ///
    /// # Errors
    /// As [`Client::post`].
    pub async fn clock(&self) -> Result<SystemTime> {
        let url = self.endpoint.at("v1/messages/batches?limit=1");
        let mut patience = self.patience();
        loop {
            let answer = self.whole(&url, self.http.get(url.clone())).await;
            match answer.and_then(|answer| judged(&url, &answer, BATCHES).map(|_| answer.headers)) {
                Ok(headers) => return Ok(retry::server_time(&headers).unwrap_or_else(SystemTime::now)),
                Err(failed) => patience.outlast(failed).await?,
            }
        }
    }
}

/// Hands a line on, if there is anything in it.
fn on_text(url: &Url, line: &[u8], on_line: &mut OnLine<'_>) -> Result<ControlFlow<()>, Failed> {
    if line.trim_ascii().is_empty() {
        return Ok(ControlFlow::Continue(()));
    }
    let parsed: Value = serde_json::from_slice(line)
        .map_err(|_| Failed::Again(faults::unexpected(url, 200, "JSON lines", &Value::Null), None))?;
    if parsed["custom_id"].is_null() && faults::is_error(&parsed) {
        return Err(error_within(url, 200, &HeaderMap::new(), &parsed));
    }
    on_line(parsed).map_err(Failed::ForGood)
}

/// What the answer to a creation says of it.
fn created(url: &Url, answer: &Whole) -> Result<Created, Failed> {
    let status = answer.status;
    // The server's trouble may have come after the batch was made; an overloaded one turns away at the door.
    let unclear = status < 300 || status == 408 || (status >= 500 && status != 529);
    match judged(url, answer, OBJECT) {
        Ok(body) => Ok(match Batch::parse(&body) {
            Some(batch) => Created::Yes(batch),
            None => Created::Unknown(faults::unexpected(url, status, BATCH.0, &body)),
        }),
        Err(Failed::Again(error, _) | Failed::Lost(error, _) | Failed::ForGood(error)) if unclear => {
            Ok(Created::Unknown(error))
        }
        Err(failed) => Err(failed),
    }
}

fn odd(url: &Url, expected: &str) -> Error {
    Error::surroundings(format!("{url}: expected {expected}, got something else"))
        .help("is that the Message Batches API? check ANTHROPIC_BASE_URL")
}
