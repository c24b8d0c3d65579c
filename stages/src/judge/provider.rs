//! What the asking core needs to know of a provider: how its API is spoken to, and how its requests and replies read.

use std::fmt::Debug;

use engine::error::Result;
use serde_json::Value;

use super::document::Document;
use super::endpoint::Endpoint;
use super::params::Mode;
use super::prices::Usage;
use super::reply::Reply;
use super::settings::Settings;

/// The expected type of a successful response: its name and a predicate.
pub type Expected = (&'static str, fn(&Value) -> bool);

/// How an API is spoken to, whatever is asked.
#[derive(Debug)]
pub struct Protocol {
    /// The kind: names the folder of its answers and begins its messages.
    pub kind: &'static str,
    /// Path of a request below the API's address.
    pub path: &'static str,
    /// The header with the key, and what comes before the key in it.
    pub key_header: (&'static str, &'static str),
    /// Other headers of each request.
    pub headers: &'static [(&'static str, &'static str)],
    /// What an API's address looks like, for an error about another one.
    pub address_help: &'static str,
    /// Prefix of the rate-limit headers; `None` if the API sends none of a known form.
    pub rate_headers: Option<&'static str>,
    /// The only response that counts as an answer. Gateways also send error documents with status 200.
    pub answer: Expected,
    /// The tokens of an answer. Impossible counts are ignored.
    pub usage: fn(&Value) -> Usage,
    /// The status by which a response is handled, given its own status and its error document.
    pub status: fn(u16, &Value) -> u16,
    /// Whether an error document with this status says that the account's spending limit is reached.
    pub is_spent: fn(u16, &Value) -> bool,
}

impl Protocol {
    pub fn is_answer(&self, body: &Value) -> bool {
        self.answer.1(body)
    }
}

/// A provider with its own settings of a stage.
pub trait Provider: Debug + Send + Sync {
    fn protocol(&self) -> &'static Protocol;

    /// Address and key, from the parameters and the environment.
    ///
    /// # Errors
    /// If the key is missing, or either cannot be used in a request.
    fn endpoint(&self) -> Result<Endpoint>;

    /// The document that is hashed into the keys of answers: everything that determines an answer but the document
    /// asked about, the rubric and the questions.
    fn asked(&self, settings: &Settings) -> Value;

    /// The messages that begin every request: the worked examples.
    fn fixed(&self, settings: &Settings, mode: Mode) -> Vec<Value>;

    /// The body of a request: the worked examples, then the documents. The mode may affect the price, but no answer.
    fn body(&self, settings: &Settings, mode: Mode, documents: &[Document]) -> Value;

    /// Whether the model may think before it answers, which costs tokens.
    fn thinks(&self) -> bool;

    /// The result for each field of an answer. The reason why the answer ended takes precedence over its text.
    fn replies(&self, answer: &Value, fields: &[String]) -> Vec<Reply>;

    /// Why an answer has no label.
    fn reason(&self, reply: Reply, answer: &Value) -> String;

    /// Whether [`Provider::first_wins`] may give a probability.
    fn tells_probability(&self) -> bool {
        false
    }

    /// The probability that the first summary is better, at a field of an answer about one document, if the answer tells;
    /// `is_alone`: the answer should have no other field.
    fn first_wins(&self, _answer: &Value, _field: &str, _is_alone: bool) -> Option<f64> {
        None
    }
}
