//! HTTP client of the API: paces requests, retries transient faults, and reports permanent ones.

mod batches;
mod endpoint;
mod faults;
mod pace;
mod retry;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use engine::error::{Error, Result};
use reqwest::header::{CONTENT_TYPE, HeaderMap};
use reqwest::{RequestBuilder, Response, Url};
use serde_json::Value;
use tokio::sync::mpsc::UnboundedSender;

pub use batches::{Batch, Created};
pub use endpoint::{Endpoint, address};
use pace::Pace;

use super::reply::is_message;
use crate::http;

pub const KEY: &str = "ANTHROPIC_API_KEY";
pub const BASE_URL: &str = "ANTHROPIC_BASE_URL";

/// A request with thinking may take long; the API's official clients use the same timeout.
const TIMEOUT: Duration = Duration::from_secs(600);
/// Maximum bytes of one response, or of one line of a batch's results.
const LONGEST_ANSWER: usize = 64 << 20;

/// API client; clones share one pace.
#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    endpoint: Endpoint,
    pace: Arc<Mutex<Pace>>,
    /// Receives a message about every wait before a retry.
    waits: UnboundedSender<String>,
    /// First wait if the server names none.
    first_wait: Duration,
    /// Timeout of a whole request with its response.
    timeout: Duration,
}

/// Called when a request may have been billed although no answer came.
pub type OnLost<'a> = dyn Fn() -> Result<()> + Sync + 'a;

/// A message of the API: [`is_message`] holds for its body.
pub struct Answer {
    pub body: Value,
}

impl Answer {
    /// # Errors
    /// The value itself if it is not a message.
    pub fn of(body: Value) -> Result<Self, Value> {
        if is_message(&body) { Ok(Self { body }) } else { Err(body) }
    }

    /// A count in the answer's `usage`.
    pub fn tokens(&self, what: &str) -> u64 {
        self.body["usage"][what].as_u64().unwrap_or(0)
    }
}

/// The expected type of a successful response: its name and a predicate.
type Expected = (&'static str, fn(&Value) -> bool);

const MESSAGE: Expected = ("a message", is_message);
const OBJECT: Expected = ("a JSON object", Value::is_object);

/// Why a try failed.
enum Failed {
    /// Worth another try, after the wait that the server asks for.
    Again(Error, Option<Duration>),
    /// As `Again`, but the response did not come from the API: the request may have been processed and billed.
    Lost(Error, Option<Duration>),
    ForGood(Error),
}

/// Why a try got no response.
enum Unsent {
    /// The request cannot be made.
    Never(Error),
    /// No connection was made.
    NotYet(Error),
    /// The connection ended before the response: the request may have been processed.
    Perhaps(Error),
}

impl From<Unsent> for Failed {
    fn from(unsent: Unsent) -> Self {
        match unsent {
            Unsent::Never(error) => Self::ForGood(error),
            Unsent::NotYet(error) => Self::Again(error, None),
            Unsent::Perhaps(error) => Self::Lost(error, None),
        }
    }
}

/// A complete response.
struct Whole {
    status: u16,
    headers: HeaderMap,
    body: Vec<u8>,
}

/// Retry state of a request.
struct Patience<'a> {
    client: &'a Client,
    failed: u32,
}

impl Patience<'_> {
    /// Waits before the next try, as long as the fault requires.
    ///
    /// # Errors
    /// If the fault is permanent, requires too long a wait, or occurred too often.
    async fn outlast(&mut self, fault: Failed) -> Result<()> {
        let Client { endpoint, waits, first_wait, .. } = self.client;
        let (error, asked) = match fault {
            Failed::ForGood(error) => return Err(endpoint.without_key(error)),
            Failed::Again(error, asked) | Failed::Lost(error, asked) => (endpoint.without_key(error), asked),
        };
        self.failed += 1;
        let too_long = asked.filter(|asked| *asked > retry::LONGEST_WAIT);
        if self.failed >= retry::TRIES || too_long.is_some() {
            let why = too_long.map_or_else(
                || format!("gave up after {} tries", self.failed),
                |asked| format!("told to wait {} s", asked.as_secs()),
            );
            let kept = "the answers so far are kept; run again";
            let help = error.help.as_ref().map_or(kept.to_owned(), |help| format!("{help}; {kept}"));
            return Err(error.within(why).help(help));
        }
        let wait = asked.unwrap_or_else(|| retry::backoff(*first_wait, self.failed, rand::random()));
        let (next, tries, seconds) = (self.failed + 1, retry::TRIES, wait.as_secs_f64());
        // Nobody listens any more once the stage has ended.
        let _ = waits.send(format!("{}; try {next} of {tries} in {seconds:.1} s", error.message));
        if asked.is_some() {
            self.client.pace().close(Instant::now(), wait);
        }
        tokio::time::sleep(wait).await;
        Ok(())
    }
}

/// A request in progress; ends when dropped.
struct Turn<'a>(&'a Client);

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        self.0.pace().ended();
    }
}

impl Client {
    /// # Errors
    /// If the HTTP client cannot be built.
    pub fn new(endpoint: Endpoint, waits: UnboundedSender<String>) -> Result<Self> {
        // On a redirect to another host, the HTTP library drops `Authorization` but not the API's own header with the
        // key.
        let http = http::client(Some(TIMEOUT), http::Redirects::Never)?;
        Ok(Self { http, endpoint, pace: Arc::default(), waits, first_wait: retry::FIRST_WAIT, timeout: TIMEOUT })
    }

    /// The same client with short waits, for tests.
    #[cfg(test)]
    pub fn in_a_hurry(self) -> Self {
        Self { first_wait: Duration::from_millis(1), ..self }
    }

    /// The same client with another timeout.
    #[cfg(test)]
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// The base address of the API.
    pub fn base(&self) -> &str {
        self.endpoint.base()
    }

    fn pace(&self) -> MutexGuard<'_, Pace> {
        // The data are plain numbers, valid also after a panic.
        self.pace.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the rate limits allow one more request.
    async fn turn(&self) -> Turn<'_> {
        loop {
            let wait = self.pace().ask(Instant::now());
            match wait {
                None => return Turn(self),
                Some(wait) => tokio::time::sleep(wait).await,
            }
        }
    }

    /// Sends a request for a message and retries transient faults. `on_lost` is called after each try that may have
    /// been billed although no answer came; an error of `on_lost` ends the tries.
    ///
    /// # Errors
    /// The API's message and request id, or why it cannot be reached. Never contains the key.
    pub async fn post(&self, body: &Value, on_lost: &OnLost<'_>) -> Result<Answer> {
        let url = self.endpoint.at("v1/messages");
        let text = serde_json::to_vec(body).map_err(|e| Error::ours(format!("a request does not serialise: {e}")))?;
        let request = || self.http.post(url.clone()).header(CONTENT_TYPE, "application/json").body(text.clone());
        let answer = Answer { body: self.json(&url, MESSAGE, request, on_lost).await? };
        let input = answer.tokens("input_tokens") + answer.tokens("cache_creation_input_tokens");
        self.pace().took(input, answer.tokens("output_tokens"));
        Ok(answer)
    }

    /// Sends a request until the expected response comes back.
    async fn json(
        &self,
        url: &Url,
        expected: Expected,
        request: impl Fn() -> RequestBuilder,
        on_lost: &OnLost<'_>,
    ) -> Result<Value> {
        let mut patience = self.patience();
        loop {
            let failed = match self.whole(url, request().timeout(self.timeout)).await {
                Ok(answer) => match judged(url, &answer, expected) {
                    Ok(body) => return Ok(body),
                    Err(failed) => failed,
                },
                Err(failed) => failed,
            };
            if matches!(failed, Failed::Lost(..)) {
                on_lost()?;
            }
            patience.outlast(failed).await?;
        }
    }

    /// The same for requests that are not billed.
    async fn json_for_free(&self, url: &Url, expected: Expected) -> Result<Value> {
        self.json(url, expected, || self.http.get(url.clone()), &|| Ok(())).await
    }

    /// New retry state for one request.
    fn patience(&self) -> Patience<'_> {
        Patience { client: self, failed: 0 }
    }

    /// Sends a request once and receives the response headers.
    async fn send(&self, url: &Url, request: RequestBuilder) -> Result<Response, Unsent> {
        let request = request.header("x-api-key", self.endpoint.header()).header("anthropic-version", "2023-06-01");
        let response = request.send().await.map_err(|e| match faults::unreachable(url, &e) {
            error if e.is_builder() => Unsent::Never(error),
            error if e.is_connect() => Unsent::NotYet(error),
            error => Unsent::Perhaps(error),
        })?;
        self.pace().told(Instant::now(), SystemTime::now(), response.headers());
        Ok(response)
    }

    /// The same, after waiting for the rate limits, with the complete response.
    async fn whole(&self, url: &Url, request: RequestBuilder) -> Result<Whole, Failed> {
        let _turn = self.turn().await;
        let response = self.send(url, request).await?;
        self.read(url, response).await.map_err(|error| Failed::Lost(error, None))
    }

    /// Reads the body of a response.
    async fn read(&self, url: &Url, mut response: Response) -> Result<Whole> {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|e| faults::unreachable(url, &e))? {
            body.extend_from_slice(&chunk);
            if body.len() > LONGEST_ANSWER {
                return Err(Error::surroundings(format!("{url}: answered with more than {} MB", LONGEST_ANSWER >> 20)));
            }
        }
        Ok(Whole { status, headers, body: self.endpoint.without_key_in(body) })
    }
}

/// Classifies a response. An error document is a failure whatever its status.
fn judged(url: &Url, Whole { status, headers, body }: &Whole, expected: Expected) -> Result<Value, Failed> {
    let parsed: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
    match *status {
        200..300 if faults::is_error(&parsed) => Err(error_within(url, *status, headers, &parsed)),
        200..300 if expected.1(&parsed) => Ok(parsed),
        200..300 => Err(Failed::Lost(faults::unexpected(url, *status, expected.0, &parsed), None)),
        300..400 => Err(Failed::ForGood(faults::redirect(url, *status, headers))),
        status => Err(refused(url, status, headers, &parsed)),
    }
}

/// Classifies a rejection as transient or permanent.
fn refused(url: &Url, status: u16, headers: &HeaderMap, body: &Value) -> Failed {
    let error = faults::refusal(url, status, headers, body);
    let wait = retry::asked_wait(headers, SystemTime::now());
    match retry::is_passing(status, headers, body) {
        // The error of a gateway, which may have lost a processed request: the API's own errors are JSON.
        true if body["error"].is_null() && (status == 408 || status >= 500) => Failed::Lost(error, wait),
        true => Failed::Again(error, wait),
        false => Failed::ForGood(error),
    }
}

/// Handles an error document under a successful status as if it had the status of its type.
fn error_within(url: &Url, status: u16, headers: &HeaderMap, document: &Value) -> Failed {
    let told = |error: Error| error.within(format!("an error document with status {status}"));
    match refused(url, retry::status_of(document), headers, document) {
        Failed::Again(error, wait) => Failed::Again(told(error), wait),
        Failed::Lost(error, wait) => Failed::Lost(told(error), wait),
        Failed::ForGood(error) => Failed::ForGood(told(error)),
    }
}
