//! The calls of `/v1/messages/batches`. Creating a batch is the only call that is never repeated blindly.

use std::ops::ControlFlow;
use std::path::Path;
use std::time::{Duration, SystemTime};

use chrono::DateTime;
use engine::error::{AtPath, Error, Result};
use reqwest::Url;
use reqwest::header::{CONTENT_LENGTH, CONTENT_TYPE, HeaderMap};
use serde_json::Value;

use super::{BASE_URL, KEY, PROTOCOL};
use crate::judge::batch::RequestOutcome;
use crate::judge::client::{Client, Failed, FullResponse, LONGEST_ANSWER, OBJECT, Unsent, faults, retry};
use crate::judge::provider::Expected;
use crate::table::cut;

/// Timeout of a download, which may have hundreds of megabytes.
const DOWNLOAD: Duration = Duration::from_secs(4 * 3600);
/// Minimum upload speed in bytes per second, for the timeout.
const SLOWEST_UPLOAD: u64 = 100_000;
/// A download without data for this long is aborted.
const STALLED: Duration = Duration::from_secs(120);
/// Batches per page of the list; the API allows up to 1,000.
const PAGE: usize = 100;

/// A batch as described by the API.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    /// Safe to use in a path.
    pub id: String,
    pub created: SystemTime,
    pub ended: bool,
    /// Number of requests in the batch, whatever their state.
    pub count: u64,
    /// Number of requests still in processing.
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

/// The result of an attempt to create a batch.
#[derive(Debug)]
pub enum Created {
    Yes(Batch),
    /// The request was sent but no usable response came back: there may be a batch.
    Unknown(Error),
}

/// Called with each line of a batch's results; `Break` stops reading.
pub type OnLine<'a> = dyn FnMut(Value) -> Result<ControlFlow<()>> + 'a;

impl Client {
    /// Creates a batch from a file with the request body. Retries only where it is certain that there is no batch:
    /// without a connection, or after a rejection.
    ///
    /// # Errors
    /// As [`Client::post`]; in this case there is no batch.
    pub async fn create_batch(&self, body: &Path) -> Result<Created> {
        let url = self.endpoint.at("v1/messages/batches");
        let mut retries = self.retries();
        loop {
            match self.create_once(&url, body).await {
                Ok(Created::Unknown(error)) => return Ok(Created::Unknown(self.endpoint.without_key(error))),
                Ok(created) => return Ok(created),
                Err(failed) => retries.wait_or_fail(failed).await?,
            }
        }
    }

    async fn create_once(&self, url: &Url, body: &Path) -> Result<Created, Failed> {
        let file = tokio::fs::File::open(body).await.at(body).map_err(Failed::ForGood)?;
        let length = file.metadata().await.at(body).map_err(Failed::ForGood)?.len();
        let timeout = self.timeout + Duration::from_secs(length / SLOWEST_UPLOAD);
        let request = self.http.post(url.clone()).timeout(timeout).header(CONTENT_TYPE, "application/json");
        let _permit = self.permit().await;
        let answer = match self.send(url, request.header(CONTENT_LENGTH, length).body(file)).await {
            Ok(response) => self.read(url, response).await,
            Err(Unsent::Perhaps(error)) => Err(error),
            Err(unsent) => return Err(unsent.into()),
        };
        match answer {
            Ok(answer) => self.created(url, &answer),
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

    /// The batches of the key's workspace created at `since` or later, newest first.
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

    /// Streams the results of an ended batch line by line, holding one line at a time. After a lost connection it
    /// starts again, so `on_line` may see a line twice.
    ///
    /// # Errors
    /// As [`Client::post`], and errors of `on_line`.
    pub async fn results(&self, id: &str, on_line: &mut OnLine<'_>) -> Result<()> {
        let url = self.endpoint.at(&format!("v1/messages/batches/{id}/results"));
        let mut retries = self.retries();
        loop {
            match self.results_once(&url, on_line).await {
                Ok(()) => return Ok(()),
                Err(failed) => retries.wait_or_fail(failed).await?,
            }
        }
    }

    async fn results_once(&self, url: &Url, on_line: &mut OnLine<'_>) -> Result<(), Failed> {
        let _permit = self.permit().await;
        let mut response = self.send(url, self.http.get(url.clone()).timeout(DOWNLOAD)).await?;
        if response.status().as_u16() != 200 {
            let answer = self.read(url, response).await.map_err(|error| Failed::Again(error, None))?;
            let failed = self.judged(url, &answer, OBJECT).err();
            return Err(failed.unwrap_or_else(|| Failed::ForGood(odd(url, "results"))));
        }
        let mut line = Vec::new();
        loop {
            let chunk = tokio::time::timeout(STALLED, response.chunk()).await;
            let stalled = |_| Error::environment(format!("{url}: nothing came for {} s", STALLED.as_secs()));
            let chunk = chunk.map_err(|e| Failed::Again(stalled(e).transient(), None))?;
            let chunk = chunk.map_err(|e| Failed::Again(faults::unreachable(&self.endpoint, url, &e), None))?;
            for piece in chunk.as_deref().unwrap_or(b"\n").split_inclusive(|byte| *byte == b'\n') {
                line.extend_from_slice(piece);
                if line.len() > LONGEST_ANSWER {
                    return Err(Failed::ForGood(odd(url, "shorter lines")));
                }
                if piece.ends_with(b"\n") {
                    let text = self.endpoint.without_key_in(std::mem::take(&mut line));
                    if self.on_text(url, &text, on_line)?.is_break() {
                        return Ok(());
                    }
                }
            }
            if chunk.is_none() {
                return Ok(());
            }
        }
    }

    /// The server's clock, if it sends it: the reference for the creation times of batches.
    ///
    /// # Errors
    /// As [`Client::post`].
    pub async fn clock(&self) -> Result<SystemTime> {
        let url = self.endpoint.at("v1/messages/batches?limit=1");
        let mut retries = self.retries();
        loop {
            let answer = self.full(&url, self.http.get(url.clone())).await;
            match answer.and_then(|answer| self.judged(&url, &answer, BATCHES).map(|_| answer.headers)) {
                Ok(headers) => return Ok(retry::server_time(&headers).unwrap_or_else(SystemTime::now)),
                Err(failed) => retries.wait_or_fail(failed).await?,
            }
        }
    }

    /// Passes a line on unless it is blank.
    fn on_text(&self, url: &Url, line: &[u8], on_line: &mut OnLine<'_>) -> Result<ControlFlow<()>, Failed> {
        if line.trim_ascii().is_empty() {
            return Ok(ControlFlow::Continue(()));
        }
        let parsed: Value = serde_json::from_slice(line)
            .map_err(|_| Failed::Again(faults::unexpected(&self.endpoint, url, 200, "JSON lines", line), None))?;
        if parsed["custom_id"].is_null() && faults::is_error(&PROTOCOL, &parsed) {
            let response = FullResponse { status: 200, headers: HeaderMap::new(), body: Vec::new() };
            return Err(self.error_within(url, &response, &parsed));
        }
        on_line(parsed).map_err(Failed::ForGood)
    }

    /// Interprets the response to a creation.
    fn created(&self, url: &Url, answer: &FullResponse) -> Result<Created, Failed> {
        let status = answer.status;
        // After a server error the batch may exist, but an overloaded server rejects requests before processing.
        let unclear = status < 300 || status == 408 || (status >= 500 && status != 529);
        match self.judged(url, answer, OBJECT) {
            Ok(body) => Ok(match Batch::parse(&body) {
                Some(batch) => Created::Yes(batch),
                None => Created::Unknown(faults::unexpected(&self.endpoint, url, status, BATCH.0, &answer.body)),
            }),
            Err(Failed::Again(error, _) | Failed::Lost(error, _) | Failed::ForGood(error) | Failed::Useless(error))
                if unclear =>
            {
                Ok(Created::Unknown(error))
            }
            Err(failed) => Err(failed),
        }
    }
}

fn odd(url: &Url, expected: &str) -> Error {
    Error::environment(format!("{url}: expected {expected}, got something else"))
        .help(format!("is that the Message Batches API? check {BASE_URL}"))
}

/// The outcome in a line of results.
pub fn result(mut result: Value, batch: &str) -> RequestOutcome {
    match result["type"].as_str() {
        Some("succeeded") => match result["message"].take() {
            answer if PROTOCOL.is_answer(&answer) => RequestOutcome::Answer(answer),
            document if document["error"].is_object() => errored(&document, batch),
            _ => RequestOutcome::Lost(format!("batch {batch}: a result is something else than a message")),
        },
        Some("errored") => errored(&result["error"], batch),
        Some("canceled") => RequestOutcome::Canceled,
        Some("expired") => RequestOutcome::Unanswered(format!("batch {batch}: expired")),
        _ => RequestOutcome::Unanswered(format!("batch {batch}: a result of an unknown type")),
    }
}

/// The outcome of an error document in place of an answer; some results contain only its inner part.
fn errored(document: &Value, batch: &str) -> RequestOutcome {
    let error = document.get("error").unwrap_or(document);
    let text = |field: &str| error[field].as_str().unwrap_or("no message");
    let message = format!("batch {batch}: {}: {}", text("type"), cut(text("message"), 500));
    match text("type") {
        "invalid_request_error" | "not_found_error" | "request_too_large" => RequestOutcome::Refused(
            Error::user(message).help("check `model` and the other parameters of annotate.claude"),
        ),
        "authentication_error" | "permission_error" | "billing_error" => {
            RequestOutcome::Refused(Error::environment(message).help(format!("check the account and {KEY}")))
        }
        _ => RequestOutcome::Unanswered(message),
    }
}
