//! Error messages for failed requests: the API's own message, the request id, and a suggested fix. Pure.

use engine::error::Error;
use reqwest::Url;
use reqwest::header::{HeaderMap, LOCATION};
use serde_json::Value;

use super::{BASE_URL, retry};
use crate::http;

/// No response, or an incomplete one.
pub fn unreachable(url: &Url, e: &reqwest::Error) -> Error {
    let error = Error::surroundings(format!("{url}: {}", http::causes(e)));
    error.transient().help(format!("check the network and {BASE_URL}"))
}

/// Whether a body is an error document of the API, or one of a gateway that imitates it.
pub fn is_error(body: &Value) -> bool {
    body["type"] == "error" || (body["type"] != "message" && body["error"].is_object())
}

/// A successful response with an unexpected body; null: not JSON.
pub fn unexpected(url: &Url, status: u16, expected: &str, body: &Value) -> Error {
    let told = match body {
        Value::Null => "something else than JSON".to_owned(),
        body => format!("something else than {expected}: {}", crate::table::cut(&body.to_string(), 200)),
    };
    Error::surroundings(format!("{url}: answered {status} with {told}"))
        .transient()
        .help(format!("is a proxy in between? check {BASE_URL}"))
}

/// Redirects are reported instead of followed, because the key is for this address only.
pub fn redirect(url: &Url, status: u16, headers: &HeaderMap) -> Error {
    let to = headers.get(LOCATION).and_then(|to| url.join(to.to_str().ok()?).ok());
    let to = to.map_or("another place".to_owned(), |mut to| {
        to.set_query(None);
        to.to_string()
    });
    Error::surroundings(format!("{url}: {status}: redirects to {to}; the key is not sent there"))
        .help(format!("if that is the API, name it in {BASE_URL}"))
}

/// The API's own message, with the request id.
pub fn refusal(url: &Url, status: u16, headers: &HeaderMap, body: &Value) -> Error {
    let message = body.pointer("/error/message").and_then(Value::as_str).unwrap_or("no message");
    let id = headers.get("request-id").and_then(|v| v.to_str().ok()).or_else(|| body["request_id"].as_str());
    let id = id.map_or(String::new(), |id| format!(" (request {})", crate::table::cut(id, 100)));
    let message = format!("{url}: {status}: {}{id}", crate::table::cut(message, 500));
    if retry::is_spent(status, body) {
        return Error::surroundings(message)
            .help("raise the account's spend limit or its credit, then run again: the answers so far are kept");
    }
    match status {
        400 | 404 | 413 | 422 => {
            Error::yours(message).help("check `model` and the other parameters of annotate.claude")
        }
        401 | 403 => Error::surroundings(message).help("check ANTHROPIC_API_KEY"),
        _ if retry::is_passing(status, headers, body) => Error::surroundings(message).transient(),
        _ => Error::surroundings(message).help("the answers so far are kept; run again later"),
    }
}
