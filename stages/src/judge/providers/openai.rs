//! Chat completions, the API that OpenAI defined and many servers speak: vLLM, llama.cpp, Ollama, gateways.

use std::collections::BTreeMap;

use engine::error::Result;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::judge::credentials;
use crate::judge::document::Document;
use crate::judge::endpoint::Endpoint;
use crate::judge::params::Mode;
use crate::judge::prices::{Usage, believed};
use crate::judge::provider::{Protocol, Provider};
use crate::judge::reply::Reply;
use crate::judge::settings::Settings;

static PROTOCOL: Protocol = Protocol {
    kind: "annotate.openai",
    path: "chat/completions",
    key_header: ("authorization", "Bearer "),
    headers: &[],
    address_help: "expected one like http://localhost:8000/v1",
    rate_headers: None,
    answer: ("a chat completion", is_completion),
    usage,
    status,
    is_spent,
};

/// Raise with any change of the request for the same settings, because another request gives other answers.
const REQUEST: u32 = 1;
/// Alternatives per token that are asked for; the most that all known servers take.
const TOP_LOGPROBS: u32 = 5;
/// Fields of a request that parameters of their own determine, or that would change the form of an answer.
pub const OWN_FIELDS: [&str; 11] = [
    "model",
    "messages",
    "max_tokens",
    "max_completion_tokens",
    "temperature",
    "response_format",
    "logprobs",
    "stream",
    "n",
    "best_of",
    "tools",
];

/// Whether the server forces the form of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ResponseFormat {
    /// A JSON schema (`response_format`).
    #[default]
    JsonSchema,
    /// Sends no `response_format`: the answer is read as text.
    None,
}

/// The name of the field that limits the tokens of an answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum MaxTokensField {
    #[default]
    MaxTokens,
    /// For models that refuse `max_tokens`.
    MaxCompletionTokens,
}

/// What the label is taken from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum VerdictSource {
    /// The text of the answer.
    #[default]
    Text,
    /// The probabilities of `1` and `2` where the answer names its choice.
    Logprobs,
}

/// The settings of this API alone.
#[derive(Clone, Debug)]
pub struct OpenAi {
    pub base_url: String,
    pub key_variable: Option<String>,
    pub response_format: ResponseFormat,
    pub max_tokens_field: MaxTokensField,
    pub temperature: Option<f64>,
    pub extra_body: BTreeMap<String, Value>,
    pub verdict: VerdictSource,
}

impl OpenAi {
    /// The API with this key, whatever the environment holds.
    ///
    /// # Errors
    /// As [`Endpoint::new`].
    pub fn endpoint_with(&self, key: Option<&str>) -> Result<Endpoint> {
        let key = key.zip(self.key_variable.as_deref());
        Endpoint::new(&PROTOCOL, (&self.base_url, "`base_url`"), key)
    }
}

impl Provider for OpenAi {
    fn protocol(&self) -> &'static Protocol {
        &PROTOCOL
    }

    fn endpoint(&self) -> Result<Endpoint> {
        let key = self.key_variable.as_deref().map(credentials::key).transpose()?;
        self.endpoint_with(key.as_deref())
    }

    // The address is part of it: model ids of local servers are arbitrary, so the same id elsewhere may be another model.
    fn asked(&self, settings: &Settings) -> Value {
        json!({
            "request": REQUEST,
            "base_url": self.base_url.trim_end_matches('/'),
            "model": settings.model,
            "documents_per_request": settings.documents_per_request,
            "response_format": self.response_format,
            "verdict": self.verdict,
            "max_tokens": settings.max_tokens,
            "temperature": self.temperature,
            "extra_body": self.extra_body,
            "template": settings.instructions.template_text,
            "examples": settings.instructions.examples,
        })
    }

    fn fixed(&self, settings: &Settings, _: Mode) -> Vec<Value> {
        settings.instructions.worked_examples().into_iter().map(|message| json!(message)).collect()
    }

    fn body(&self, settings: &Settings, mode: Mode, documents: &[Document]) -> Value {
        let mut messages = self.fixed(settings, mode);
        messages.push(json!(settings.instructions.final_turn(documents)));
        let mut body = json!({ "model": settings.model, "messages": messages, "stream": false });
        body[match self.max_tokens_field {
            MaxTokensField::MaxTokens => "max_tokens",
            MaxTokensField::MaxCompletionTokens => "max_completion_tokens",
        }] = json!(settings.max_tokens);
        if let Some(temperature) = self.temperature {
            body["temperature"] = json!(temperature);
        }
        if self.response_format == ResponseFormat::JsonSchema {
            let schema =
                json!({ "name": "choices", "strict": true, "schema": settings.instructions.schema(documents.len()) });
            body["response_format"] = json!({ "type": "json_schema", "json_schema": schema });
        }
        if self.verdict == VerdictSource::Logprobs {
            body["logprobs"] = json!(true);
            body["top_logprobs"] = json!(TOP_LOGPROBS);
        }
        for (name, value) in &self.extra_body {
            body[name.as_str()] = value.clone();
        }
        body
    }

    fn thinks(&self) -> bool {
        // Nothing in this API says so before the first answers.
        true
    }

    fn replies(&self, answer: &Value, fields: &[String]) -> Vec<Reply> {
        let choice = &answer["choices"][0];
        let refused = choice["message"]["refusal"].as_str().is_some_and(|refusal| !refusal.is_empty());
        if refused || choice["finish_reason"] == "content_filter" {
            return vec![Reply::Refused; fields.len()];
        }
        let is_cut = choice["finish_reason"] == "length";
        let unread = if is_cut { Reply::Truncated } else { Reply::Unparsable };
        let text = text(choice);
        let place = |field: &String| match self.verdict {
            // An answer of one token ends by its length, and says all.
            VerdictSource::Logprobs => {
                first_wins(choice, field, fields.len() == 1).map(|p| if p >= 0.5 { 1 } else { 2 })
            }
            VerdictSource::Text => chosen(&text, field, fields.len() == 1).filter(|_| !is_cut),
        };
        fields.iter().map(|field| place(field).map_or(unread, Reply::Label)).collect()
    }

    fn reason(&self, reply: Reply, answer: &Value) -> String {
        let choice = &answer["choices"][0];
        let text = text(choice);
        match reply {
            Reply::Refused => match choice["message"]["refusal"].as_str() {
                Some(refusal) => refusal.to_owned(),
                None => format!("ended by a content filter: `{text}`"),
            },
            Reply::Truncated => format!("cut off (length) after {} tokens", usage(answer).output),
            _ if self.verdict == VerdictSource::Logprobs && !choice["logprobs"]["content"].is_array() => {
                "the answer has no log-probabilities: does the server know `logprobs`?".to_owned()
            }
            _ if text.trim().is_empty() => "no text".to_owned(),
            _ => format!("no choice for it in `{text}`"),
        }
    }

    fn tells_probability(&self) -> bool {
        self.verdict == VerdictSource::Logprobs
    }

    fn first_wins(&self, answer: &Value, field: &str, is_alone: bool) -> Option<f64> {
        first_wins(&answer["choices"][0], field, is_alone)
    }
}

/// Whether a JSON value is a whole completion, not a part of a stream.
fn is_completion(answer: &Value) -> bool {
    answer.pointer("/choices/0/message").is_some_and(Value::is_object)
}

fn usage(answer: &Value) -> Usage {
    let usage = &answer["usage"];
    let cache_read = believed(&usage["prompt_tokens_details"]["cached_tokens"]);
    let (input, output) = (believed(&usage["prompt_tokens"]), believed(&usage["completion_tokens"]));
    Usage { input: input.saturating_sub(cache_read), output, cache_read, ..Usage::default() }
}

/// Servers differ: some report an error under a successful status, others a request that is too long, or has a field that
/// they do not know (llama-cpp-python), as their own failure.
fn status(status: u16, document: &Value) -> u16 {
    let error = if document["error"].is_object() { &document["error"] } else { document };
    let text = |field: &str| error[field].as_str().unwrap_or_default().to_lowercase();
    let (kind, code, message) = (text("type"), text("code"), text("message"));
    let says = |word: &str| kind.contains(word) || code.contains(word);
    let too_long = says("context_length") || says("exceed_context") || message.contains("context length");
    let is_refused = too_long || message.contains("validation error");
    match status {
        200..300 | 500.. if is_refused => 400,
        200..300 => {
            let number = error["code"].as_u64().filter(|code| (400..600).contains(code));
            let by_name = [
                ("invalid", 400),
                ("badrequest", 400),
                ("auth", 401),
                ("permission", 403),
                ("found", 404),
                ("rate_limit", 429),
            ];
            let named = || by_name.iter().find(|(word, _)| says(word)).map(|(_, status)| *status);
            number.and_then(|code| u16::try_from(code).ok()).or_else(named).unwrap_or(500)
        }
        status => status,
    }
}

fn is_spent(status: u16, document: &Value) -> bool {
    let is = |field: &str| document["error"][field] == "insufficient_quota";
    status == 402 || (status == 429 && (is("code") || is("type")))
}

/// The text of an answer without the thoughts that some servers leave in it.
fn text(choice: &Value) -> String {
    let text = match &choice["message"]["content"] {
        Value::String(text) => text.clone(),
        Value::Array(parts) => parts.iter().filter_map(|part| part["text"].as_str()).collect(),
        _ => String::new(),
    };
    text.rsplit_once("</think>").map_or(text.clone(), |(_, answer)| answer.to_owned())
}

/// The place that a text gives at a field, which must have the same value wherever it stands. An answer with one field
/// may also consist of anything with one number, which is 1 or 2.
fn chosen(text: &str, field: &str, is_alone: bool) -> Option<u8> {
    let value = |rest: &str| {
        let rest = rest.trim_start_matches(|c: char| c.is_whitespace() || "\"'`*:=\\".contains(c));
        match rest.split(|c: char| !c.is_ascii_digit() && c != '.').next()?.trim_end_matches('.') {
            "1" => Some(1),
            "2" => Some(2),
            _ => None,
        }
    };
    // Another field may begin with this one.
    let ends = |rest: &&str| !rest.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
    let named: Vec<&str> = text.split(field).skip(1).filter(ends).collect();
    if !named.is_empty() {
        let mut values = named.into_iter().map(value);
        let first = values.next()??;
        return values.all(|value| value == Some(first)).then_some(first);
    }
    let document = field.splitn(3, '.').take(2).collect::<Vec<_>>().join(".");
    if is_alone { numbers(&text.replace(&document, " ")) } else { None }
}

/// 1 or 2, if that is the only number in a text.
fn numbers(text: &str) -> Option<u8> {
    let mut numbers = text.split(|c: char| !c.is_ascii_digit()).filter(|number| !number.is_empty());
    let place = match numbers.next()? {
        "1" => 1,
        "2" => 2,
        _ => return None,
    };
    numbers.all(|number| number == place.to_string()).then_some(place)
}

/// The probability that the first summary is better: of `1` against `2`, at the token with the choice at `field`, or of an
/// answer that `is_alone` at its first number. `None` without such a token or its probability.
fn first_wins(choice: &Value, field: &str, is_alone: bool) -> Option<f64> {
    let tokens = choice["logprobs"]["content"].as_array()?;
    let text = |token: &Value| token["token"].as_str().unwrap_or_default().to_owned();
    let place = |token: &str| match token.trim_matches(|c: char| !c.is_alphanumeric()) {
        "1" => Some(0),
        "2" => Some(1),
        _ => None,
    };
    let probability =
        |token: &Value| token["logprob"].as_f64().map(f64::exp).filter(|p| (0.0..=1.0 + 1e-6).contains(p));
    let whole: String = tokens.iter().map(text).collect();
    let is_whole = |end: &usize| !whole[*end..].starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
    let named = whole.rmatch_indices(field).map(|(start, _)| start + field.len()).find(is_whole);
    let thought = whole.rfind("</think>").map(|start| start + "</think>".len());
    // A bare number answers a single question only.
    if named.is_none() && !is_alone {
        return None;
    }
    let from = named.max(thought).unwrap_or(0);
    let mut start = 0;
    let token = tokens.iter().find(|token| {
        let at = start;
        start += text(token).len();
        at >= from && place(&text(token)).is_some()
    })?;
    let empty = Vec::new();
    let mut listed: Vec<(String, f64)> = Vec::new();
    for alternative in token["top_logprobs"].as_array().unwrap_or(&empty).iter().chain([token]) {
        if !listed.iter().any(|(known, _)| *known == text(alternative)) {
            listed.push((text(alternative), probability(alternative)?));
        }
    }
    let mut sums = [0.0; 2];
    for (token, p) in &listed {
        if let Some(place) = place(token) {
            sums[place] += p;
        }
    }
    // What is not listed is less probable than anything listed, and all of it together is what the list leaves.
    let left = (1.0 - listed.iter().map(|(_, p)| p).sum::<f64>()).max(0.0);
    let least = listed.iter().map(|(_, p)| *p).fold(1.0, f64::min);
    for sum in sums.iter_mut().filter(|sum| **sum == 0.0) {
        *sum = left.min(least);
    }
    let all = sums[0] + sums[1];
    (all > 0.0).then(|| sums[0] / all)
}
