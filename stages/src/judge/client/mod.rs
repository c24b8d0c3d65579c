//! HTTP client of the API: paces requests, retries transient faults, and reports permanent ones.

pub mod faults;
mod rate;
pub mod retry;
#[cfg(test)]
mod tests;

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use engine::error::{Error, Result};
use reqwest::header::{CONTENT_TYPE, HeaderMap};
use reqwest::{RequestBuilder, Response, Url};
use serde_json::Value;
use tokio::sync::mpsc::UnboundedSender;

use rate::RateLimiter;

use super::endpoint::Endpoint;
use super::provider::Expected;
use crate::http;

/// A request with thinking may take long; the API's official clients use the same timeout.
const TIMEOUT: Duration = Duration::from_secs(600);
/// Maximum bytes of one response, or of one line of a batch's results.
pub(in crate::judge) const LONGEST_ANSWER: usize = 64 << 20;

/// API client; clones share one rate limiter.
#[derive(Clone)]
pub struct Client {
    pub(in crate::judge) http: reqwest::Client,
    pub(in crate::judge) endpoint: Endpoint,
    rate: Arc<Mutex<RateLimiter>>,
    /// Receives a message about every wait before a retry.
    waits: UnboundedSender<String>,
    /// First wait if the server names none.
    first_wait: Duration,
    /// Timeout of a whole request with its response.
    pub(in crate::judge) timeout: Duration,
}

/// Called when a request may have been billed although no answer came.
pub type OnLost<'a> = dyn Fn() -> Result<()> + Sync + 'a;

pub(in crate::judge) const OBJECT: Expected = ("a JSON object", Value::is_object);

/// Why a try failed.
pub(in crate::judge) enum Failed {
    /// Worth another try, after the wait that the server asks for.
    Again(Error, Option<Duration>),
    /// As `Again`, but the response did not come from the API: the request may have been processed and billed.
    Lost(Error, Option<Duration>),
    ForGood(Error),
    /// As `ForGood`, but the request may have been processed and billed.
    Useless(Error),
}

/// Why a try got no response.
pub(in crate::judge) enum Unsent {
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
pub(in crate::judge) struct FullResponse {
    pub(in crate::judge) status: u16,
    pub(in crate::judge) headers: HeaderMap,
    pub(in crate::judge) body: Vec<u8>,
}

/// Retry state of a request.
pub(in crate::judge) struct Retries<'a> {
    client: &'a Client,
    failed: u32,
}

impl Retries<'_> {
    /// Waits before the next try, as long as the fault requires.
    ///
    /// # Errors
    /// If the fault is permanent, requires too long a wait, or occurred too often.
    pub(in crate::judge) async fn wait_or_fail(&mut self, fault: Failed) -> Result<()> {
        let Client { endpoint, waits, first_wait, .. } = self.client;
        let (error, asked) = match fault {
            Failed::ForGood(error) | Failed::Useless(error) => return Err(endpoint.without_key(error)),
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
            return Err(error.context(why).help(help));
        }
        let wait = asked.unwrap_or_else(|| retry::backoff(*first_wait, self.failed, rand::random()));
        let (next, tries, seconds) = (self.failed + 1, retry::TRIES, wait.as_secs_f64());
        // Nobody listens any more once the stage has ended.
        let _ = waits.send(format!("{}; try {next} of {tries} in {seconds:.1} s", error.message));
        if asked.is_some() {
            self.client.rate().close(Instant::now(), wait);
        }
        tokio::time::sleep(wait).await;
        Ok(())
    }
}

/// A request in progress; ends when dropped.
pub(in crate::judge) struct Permit<'a>(&'a Client);

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.0.rate().ended();
    }
}

impl Client {
    /// # Errors
    /// If the HTTP client cannot be built.
    pub fn new(endpoint: Endpoint, waits: UnboundedSender<String>) -> Result<Self> {
        // On a redirect to another host, the HTTP library drops `Authorization` but not the API's own header with the
        // key.
        let http = http::client(Some(TIMEOUT), http::Redirects::Never)?;
        Ok(Self { http, endpoint, rate: Arc::default(), waits, first_wait: retry::FIRST_WAIT, timeout: TIMEOUT })
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

    fn rate(&self) -> MutexGuard<'_, RateLimiter> {
        // The data are plain numbers, valid also after a panic.
        self.rate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the rate limits allow one more request.
    pub(in crate::judge) async fn permit(&self) -> Permit<'_> {
        loop {
            let wait = self.rate().admit(Instant::now());
            match wait {
                None => return Permit(self),
                Some(wait) => tokio::time::sleep(wait).await,
            }
        }
    }

    /// Sends a request for an answer and retries transient faults. `on_lost` is called after each try that may have
    /// been billed although no answer came; an error of `on_lost` ends the tries.
    ///
    /// # Errors
    /// The API's message and request id, or why it cannot be reached. Never contains the key.
    pub async fn post(&self, body: &Value, on_lost: &OnLost<'_>) -> Result<Value> {
        let protocol = self.endpoint.protocol;
        let url = self.endpoint.at(protocol.path);
        let text =
            serde_json::to_vec(body).map_err(|e| Error::internal(format!("a request does not serialise: {e}")))?;
        let request = || self.http.post(url.clone()).header(CONTENT_TYPE, "application/json").body(text.clone());
        let answer = self.json(&url, protocol.answer, request, on_lost).await?;
        let usage = (protocol.usage)(&answer);
        self.rate().record_usage(usage.input + usage.written(), usage.output);
        Ok(answer)
    }

    /// Sends a request until the expected response comes back.
    pub(in crate::judge) async fn json(
        &self,
        url: &Url,
        expected: Expected,
        request: impl Fn() -> RequestBuilder,
        on_lost: &OnLost<'_>,
    ) -> Result<Value> {
        let mut retries = self.retries();
        loop {
            let failed = match self.full(url, request().timeout(self.timeout)).await {
                Ok(answer) => match self.judged(url, &answer, expected) {
                    Ok(body) => return Ok(body),
                    Err(failed) => failed,
                },
                Err(failed) => failed,
            };
            if matches!(failed, Failed::Lost(..) | Failed::Useless(_)) {
                on_lost()?;
            }
            retries.wait_or_fail(failed).await?;
        }
    }

    /// The same for requests that are not billed.
    pub(in crate::judge) async fn json_for_free(&self, url: &Url, expected: Expected) -> Result<Value> {
        self.json(url, expected, || self.http.get(url.clone()), &|| Ok(())).await
    }

    /// New retry state for one request.
    pub(in crate::judge) fn retries(&self) -> Retries<'_> {
        Retries { client: self, failed: 0 }
    }

    /// Sends a request once and receives the response headers.
    pub(in crate::judge) async fn send(&self, url: &Url, request: RequestBuilder) -> Result<Response, Unsent> {
        let request = request.headers(self.endpoint.headers().clone());
        let response = request.send().await.map_err(|e| match faults::unreachable(&self.endpoint, url, &e) {
            error if e.is_builder() => Unsent::Never(error),
            error if e.is_connect() => Unsent::NotYet(error),
            error => Unsent::Perhaps(error),
        })?;
        if let Some(prefix) = self.endpoint.protocol.rate_headers {
            self.rate().update(prefix, Instant::now(), SystemTime::now(), response.headers());
        }
        Ok(response)
    }

    /// The same, after waiting for the rate limits, with the complete response.
    pub(in crate::judge) async fn full(&self, url: &Url, request: RequestBuilder) -> Result<FullResponse, Failed> {
        let _permit = self.permit().await;
        let response = self.send(url, request).await?;
        self.read(url, response).await.map_err(|error| Failed::Lost(error, None))
    }

    /// Reads the body of a response.
    pub(in crate::judge) async fn read(&self, url: &Url, mut response: Response) -> Result<FullResponse> {
        let (status, headers) = (response.status().as_u16(), response.headers().clone());
        let mut body = Vec::new();
        while let Some(chunk) = response.chunk().await.map_err(|e| faults::unreachable(&self.endpoint, url, &e))? {
            body.extend_from_slice(&chunk);
            if body.len() > LONGEST_ANSWER {
                return Err(Error::environment(format!("{url}: answered with more than {} MB", LONGEST_ANSWER >> 20)));
            }
        }
        Ok(FullResponse { status, headers, body: self.endpoint.without_key_in(body) })
    }

    /// Classifies a response. An error document is a failure whatever its status.
    pub(in crate::judge) fn judged(
        &self,
        url: &Url,
        response: &FullResponse,
        expected: Expected,
    ) -> Result<Value, Failed> {
        let Self { endpoint, .. } = self;
        let FullResponse { status, headers, body } = response;
        let parsed: Value = serde_json::from_slice(body).unwrap_or(Value::Null);
        match *status {
            200..300 if faults::is_error(endpoint.protocol, &parsed) => Err(self.error_within(url, response, &parsed)),
            200..300 if expected.1(&parsed) => Ok(parsed),
            200..300 if body.starts_with(b"data:") => Err(Failed::Useless(faults::stream(endpoint, url))),
            200..300 => Err(Failed::Lost(faults::unexpected(endpoint, url, *status, expected.0, body), None)),
            300..400 => Err(Failed::ForGood(faults::redirect(endpoint, url, *status, headers))),
            _ => Err(self.refused(url, response, &parsed)),
        }
    }

    /// Classifies a rejection as transient or permanent. An error document under a successful status is handled as if
    /// it had the status of its type.
    fn refused(&self, url: &Url, FullResponse { status, headers, body: text }: &FullResponse, body: &Value) -> Failed {
        let protocol = self.endpoint.protocol;
        let status = (protocol.status)(*status, body);
        let error = faults::refusal(&self.endpoint, url, status, headers, text, body);
        let wait = retry::asked_wait(headers, SystemTime::now());
        match retry::is_passing(protocol, status, headers, body) {
            // The error of a gateway, which may have lost a processed request: the API's own errors are JSON.
            true if body["error"].is_null() && (status == 408 || status >= 500) => Failed::Lost(error, wait),
            true => Failed::Again(error, wait),
            false => Failed::ForGood(error),
        }
    }

    pub(in crate::judge) fn error_within(&self, url: &Url, response: &FullResponse, document: &Value) -> Failed {
        let told = |error: Error| error.context(format!("an error document with status {}", response.status));
        match self.refused(url, response, document) {
            Failed::Again(error, wait) => Failed::Again(told(error), wait),
            Failed::Lost(error, wait) => Failed::Lost(told(error), wait),
            Failed::ForGood(error) => Failed::ForGood(told(error)),
            Failed::Useless(error) => Failed::Useless(told(error)),
        }
    }
}
