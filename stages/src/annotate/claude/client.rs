//! `POST /v1/messages` with retries. Knows no document.

use std::time::Duration;

use engine::error::{Error, Result};
use reqwest::header::HeaderMap;
use serde_json::Value;

use crate::http;

/// Where the API is, and the key to it.
#[derive(Clone)]
pub struct Endpoint {
    pub base: String,
    pub key: String,
}

#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    url: String,
    key: String,
}

/// A message of the API.
pub struct Answer {
    pub body: Value,
}

impl Answer {
    /// A count of the answer's `usage`.
    pub fn tokens(&self, what: &str) -> u64 {
        self.body["usage"][what].as_u64().unwrap_or(0)
    }
}

/// A request is sent so often at most.
const TRIES: u32 = 8;
/// A request that thinks may take long.
const TIMEOUT: Duration = Duration::from_secs(300);
const LONGEST_WAIT: Duration = Duration::from_secs(60);

/// Why a try failed.
enum Failed {
    /// Worth another try, after as long as the server says.
    Again(Error, Option<Duration>),
    ForGood(Error),
}

impl Client {
    /// # Errors
    /// If the machine gives no client.
    pub fn new(endpoint: &Endpoint) -> Result<Self> {
        let url = format!("{}/v1/messages", endpoint.base.trim_end_matches('/'));
        Ok(Self { http: http::client(Some(TIMEOUT))?, url, key: endpoint.key.clone() })
    }

    /// Sends one request, again after faults that pass.
    ///
    /// # Errors
    /// The API's message and request id, or why it cannot be reached. Never the key.
    pub async fn post(&self, body: &Value) -> Result<Answer> {
        for attempt in 0.. {
            match self.once(body).await {
                Ok(answer) => return Ok(answer),
                Err(Failed::ForGood(error)) => return Err(self.without_key(error)),
                Err(Failed::Again(error, _)) if attempt + 1 >= TRIES => {
                    return Err(self.without_key(error.within(format!("gave up after {TRIES} tries"))));
                }
                Err(Failed::Again(_, wait)) => {
                    let doubling = Duration::from_millis(500 << attempt.min(7));
                    tokio::time::sleep(wait.unwrap_or(doubling).min(LONGEST_WAIT)).await;
                }
            }
        }
        unreachable!("the loop ends by returning")
    }

    async fn once(&self, body: &Value) -> Result<Answer, Failed> {
        let request =
            self.http.post(&self.url).header("x-api-key", &self.key).header("anthropic-version", "2023-06-01");
        let unreachable = |e: &reqwest::Error| {
            let error = Error::surroundings(format!("{}: {}", self.url, http::causes(e)));
            error.help("check the network and ANTHROPIC_BASE_URL; the answers so far are kept")
        };
        let answer = request.json(body).send().await.map_err(|e| Failed::Again(unreachable(&e), None))?;
        let status = answer.status().as_u16();
        let headers = answer.headers().clone();
        let text = answer.text().await.map_err(|e| Failed::Again(unreachable(&e), None))?;
        let parsed: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
        if (200..300).contains(&status) {
            return if parsed.is_object() {
                Ok(Answer { body: parsed })
            } else {
                Err(Failed::Again(
                    Error::surroundings(format!("{}: answered {status} with something else than JSON", self.url)),
                    None,
                ))
            };
        }
        let error = refusal(&self.url, status, &headers, &parsed);
        let told = headers.get("x-should-retry").and_then(|v| v.to_str().ok());
        let spent =
            parsed.pointer("/error/details/error_code").and_then(Value::as_str) == Some("enforced_spend_limit_reached");
        let again = match told {
            Some("true") => true,
            Some("false") => false,
            _ => matches!(status, 408 | 409 | 429 | 500..) && !spent,
        };
        Err(if again { Failed::Again(error, wait(&headers)) } else { Failed::ForGood(error) })
    }

    fn without_key(&self, mut error: Error) -> Error {
        error.message = error.message.replace(&self.key, "***");
        error
    }
}

/// The API's own message, with the request's id.
fn refusal(url: &str, status: u16, headers: &HeaderMap, body: &Value) -> Error {
    let message = body.pointer("/error/message").and_then(Value::as_str).unwrap_or("no message");
    let id = headers.get("request-id").and_then(|v| v.to_str().ok()).or_else(|| body["request_id"].as_str());
    let id = id.map_or(String::new(), |id| format!(" (request {id})"));
    let message = format!("{url}: {status}: {}{id}", crate::table::cut(message, 500));
    match status {
        400 | 404 | 413 | 422 => {
            Error::yours(message).help("check `model` and the other parameters of annotate.claude")
        }
        401 | 403 => Error::surroundings(message).help("check ANTHROPIC_API_KEY"),
        408 | 409 | 429 | 500.. => Error::surroundings(message).transient(),
        _ => Error::surroundings(message),
    }
}

/// How long the server asks to wait; a date instead of seconds is left to our own backoff.
fn wait(headers: &HeaderMap) -> Option<Duration> {
    let number = |name: &str| headers.get(name)?.to_str().ok()?.trim().parse::<f64>().ok();
    let seconds = number("retry-after-ms").map(|ms| ms / 1000.0).or_else(|| number("retry-after"))?;
    (seconds >= 0.0 && seconds.is_finite()).then(|| Duration::from_secs_f64(seconds.min(3600.0)))
}
