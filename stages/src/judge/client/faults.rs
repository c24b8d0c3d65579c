//! Error messages for failed requests: the API's own message, the request id, and a suggested fix. Pure.

use engine::error::Error;
use reqwest::Url;
use reqwest::header::{HeaderMap, LOCATION};
use serde_json::Value;

use super::{Endpoint, retry};
use crate::http;
use crate::judge::provider::Protocol;
use crate::table::cut;
use crate::text::clean::printable;

/// No response, or an incomplete one.
pub fn unreachable(endpoint: &Endpoint, url: &Url, e: &reqwest::Error) -> Error {
    let error = Error::environment(format!("{url}: {}", http::causes(e)));
    error.transient().help(format!("check the network and {}", endpoint.address_name))
}

/// Whether a body is an error document of the API, or one of a gateway that imitates it.
pub fn is_error(protocol: &Protocol, body: &Value) -> bool {
    let is_error = |error: &Value| error.is_object() || error.is_string();
    body["type"] == "error" || (!protocol.is_answer(body) && (is_error(&body["error"]) || body["object"] == "error"))
}

/// A successful response with an unexpected body.
pub fn unexpected(endpoint: &Endpoint, url: &Url, status: u16, expected: &str, body: &[u8]) -> Error {
    let told = match serde_json::from_slice(body).unwrap_or(Value::Null) {
        Value::Null => "something else than JSON".to_owned(),
        body => format!("something else than {expected}: {}", cut(&body.to_string(), 200)),
    };
    Error::environment(format!("{url}: answered {status} with {told}"))
        .transient()
        .help(format!("is a proxy in between? check {}", endpoint.address_name))
}

/// The response is a stream of events, although none was asked for.
pub fn stream(endpoint: &Endpoint, url: &Url) -> Error {
    Error::environment(format!("{url}: answered with a stream of events, which was not asked for"))
        .help(format!("turn streaming off at the server, or check {}", endpoint.address_name))
}

/// Redirects are reported instead of followed, because the key is for this address only.
pub fn redirect(endpoint: &Endpoint, url: &Url, status: u16, headers: &HeaderMap) -> Error {
    let to = headers.get(LOCATION).and_then(|to| url.join(to.to_str().ok()?).ok());
    let to = to.map_or("another place".to_owned(), |mut to| {
        to.set_query(None);
        to.to_string()
    });
    Error::environment(format!("{url}: {status}: redirects to {to}; the key is not sent there"))
        .help(format!("if that is the API, name it in {}", endpoint.address_name))
}

/// The message of an error document, in any of the forms that servers use.
fn message(body: &Value) -> Option<&str> {
    let places = ["/error/message", "/error", "/message", "/detail"];
    places.iter().find_map(|place| body.pointer(place).and_then(Value::as_str))
}

/// The API's own message, with the request id.
pub fn refusal(endpoint: &Endpoint, url: &Url, status: u16, headers: &HeaderMap, text: &[u8], body: &Value) -> Error {
    let protocol = endpoint.protocol;
    let said = match (message(body), String::from_utf8_lossy(text).trim()) {
        (Some(message), _) => cut(message, 500),
        (None, "") => "no message".to_owned(),
        (None, text) => format!("`{}`", cut(&printable(text), 100)),
    };
    let id = headers.get("request-id").and_then(|v| v.to_str().ok()).or_else(|| body["request_id"].as_str());
    let id = id.map_or(String::new(), |id| format!(" (request {})", cut(id, 100)));
    let message = format!("{url}: {status}: {said}{id}");
    if (protocol.is_spent)(status, body) {
        return Error::environment(message)
            .help("raise the account's spend limit or its credit, then run again: the answers so far are kept");
    }
    match status {
        400 | 404 | 413 | 422 => {
            Error::user(message).help(format!("check `model` and the other parameters of {}", protocol.kind))
        }
        401 | 403 => Error::environment(message).help(endpoint.key_help()),
        _ if retry::is_passing(protocol, status, headers, body) => Error::environment(message).transient(),
        _ => Error::environment(message).help("the answers so far are kept; run again later"),
    }
}
