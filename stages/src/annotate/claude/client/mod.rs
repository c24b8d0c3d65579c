//! `POST /v1/messages` with retries. Knows no document.

use std::time::Duration;

use engine::error::{Error, Result};
use reqwest::Url;
use reqwest::header::{HeaderMap, HeaderValue, LOCATION};
use serde_json::Value;
use tokio::sync::mpsc::UnboundedSender;

use crate::http;

pub const KEY: &str = "ANTHROPIC_API_KEY";
pub const BASE_URL: &str = "ANTHROPIC_BASE_URL";

/// Where the API is, and the key to it.
#[derive(Clone)]
pub struct Endpoint {
    url: Url,
    key: String,
    header: HeaderValue,
}

impl Endpoint {
    /// # Errors
    /// If no request could be made of them: names the variable, never the key.
    pub fn new(base: &str, key: &str) -> Result<Self> {
        // The base by itself first: `https://` and a path would make a host of the path.
        let plain = Url::parse(base).ok().filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host());
        let url = plain.and_then(|_| Url::parse(&format!("{}/v1/messages", base.trim_end_matches('/'))).ok());
        let url = url.ok_or_else(|| {
            Error::yours(format!("{BASE_URL}: `{base}` is no address of an API"))
                .help("expected one like https://api.anthropic.com; unset it for that one")
        })?;
        // Stricter than a header: a key is plain ASCII, and anything else in it is a slip.
        let plain = !key.is_empty() && key.bytes().all(|b| b.is_ascii_graphic());
        let mut header = HeaderValue::from_str(key).ok().filter(|_| plain).ok_or_else(|| {
            Error::yours(format!("{KEY} holds a character that no key has, such as a space or a line break"))
                .help("set it to the key alone")
        })?;
        header.set_sensitive(true);
        Ok(Self { url, key: key.to_owned(), header })
    }
}

#[derive(Clone)]
pub struct Client {
    http: reqwest::Client,
    endpoint: Endpoint,
    /// Is told of every wait before another try.
    waits: UnboundedSender<String>,
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
    pub fn new(endpoint: Endpoint, waits: UnboundedSender<String>) -> Result<Self> {
        // The client drops `Authorization` on the way to another host, but not the API's own header with the key.
        Ok(Self { http: http::client(Some(TIMEOUT), http::Redirects::Never)?, endpoint, waits })
    }

    /// Sends one request, again after faults that pass.
    ///
    /// # Errors
    /// The API's message and request id, or why it cannot be reached. Never the key.
    pub async fn post(&self, body: &Value) -> Result<Answer> {
        for attempt in 1.. {
            match self.once(body).await {
                Ok(answer) => return Ok(answer),
                Err(Failed::ForGood(error)) => return Err(self.without_key(error)),
                Err(Failed::Again(error, _)) if attempt >= TRIES => {
                    let kept = "the answers so far are kept; run again";
                    let help = error.help.as_ref().map_or(kept.to_owned(), |help| format!("{help}; {kept}"));
                    return Err(self.without_key(error.within(format!("gave up after {TRIES} tries")).help(help)));
                }
                Err(Failed::Again(error, wait)) => {
                    let doubling = Duration::from_millis(250 << attempt.min(8));
                    let wait = wait.unwrap_or(doubling).min(LONGEST_WAIT);
                    let error = self.without_key(error);
                    let told =
                        format!("{}; try {} of {TRIES} in {:.1} s", error.message, attempt + 1, wait.as_secs_f64());
                    // Nobody listens any more when the stage has ended.
                    let _ = self.waits.send(told);
                    tokio::time::sleep(wait).await;
                }
            }
        }
        unreachable!("the loop ends by returning")
    }

    async fn once(&self, body: &Value) -> Result<Answer, Failed> {
        let Endpoint { url, header, .. } = &self.endpoint;
        let request = self.http.post(url.clone()).header("x-api-key", header).header("anthropic-version", "2023-06-01");
        let unreachable = |e: &reqwest::Error| {
            let error = Error::surroundings(format!("{url}: {}", http::causes(e)));
            error.help(format!("check the network and {BASE_URL}"))
        };
        let answer = request.json(body).send().await.map_err(|e| match unreachable(&e) {
            // No request was made, and none will be.
            error if e.is_builder() => Failed::ForGood(error),
            error => Failed::Again(error, None),
        })?;
        let status = answer.status().as_u16();
        let headers = answer.headers().clone();
        let text = answer.text().await.map_err(|e| Failed::Again(unreachable(&e), None))?;
        let parsed: Value = serde_json::from_str(&text).unwrap_or(Value::Null);
        if (200..300).contains(&status) {
            return if parsed.is_object() {
                Ok(Answer { body: parsed })
            } else {
                Err(Failed::Again(
                    Error::surroundings(format!("{url}: answered {status} with something else than JSON")),
                    None,
                ))
            };
        }
        if (300..400).contains(&status) {
            return Err(Failed::ForGood(redirect(url, status, &headers)));
        }
        let error = refusal(url, status, &headers, &parsed);
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
        error.message = error.message.replace(&self.endpoint.key, "***");
        error
    }
}

/// Told, not followed: the key is for this address alone.
fn redirect(url: &Url, status: u16, headers: &HeaderMap) -> Error {
    let to = headers.get(LOCATION).and_then(|to| url.join(to.to_str().ok()?).ok());
    let to = to.map_or("another place".to_owned(), |mut to| {
        to.set_query(None);
        to.to_string()
    });
    Error::surroundings(format!("{url}: {status}: redirects to {to}; the key is not sent there"))
        .help(format!("if that is the API, name it in {BASE_URL}"))
}

/// The API's own message, with the request's id.
fn refusal(url: &Url, status: u16, headers: &HeaderMap, body: &Value) -> Error {
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
