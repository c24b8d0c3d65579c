//! Anthropic's Messages API: its address and key, the request in its form, its prices, and Message Batches.

pub mod batches;
mod reply;

use engine::error::Result;
use reqwest::Url;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::http;
use crate::judge::credentials;
use crate::judge::document::Document;
use crate::judge::endpoint::Endpoint;
use crate::judge::params::Mode;
use crate::judge::prices::{self, Prices, Quote, Usage};
use crate::judge::provider::{Protocol, Provider};
use crate::judge::reply::Reply;
use crate::judge::settings::Settings;

/// Environment variables: the key, and another address than the public one.
pub const KEY: &str = "ANTHROPIC_API_KEY";
pub const BASE_URL: &str = "ANTHROPIC_BASE_URL";
const PUBLIC: &str = "https://api.anthropic.com";

pub static PROTOCOL: Protocol = Protocol {
    kind: "annotate.claude",
    path: "v1/messages",
    key_header: ("x-api-key", ""),
    headers: &[("anthropic-version", "2023-06-01")],
    address_help: "expected one like https://api.anthropic.com; unset it for that one",
    rate_headers: Some("anthropic-ratelimit"),
    answer: ("a message", reply::is_message),
    usage,
    status,
    is_spent,
};

/// The tool that the model must call with `choice: tool`.
const TOOL: &str = "choose";
/// Raise with any change of the request for the same settings, because another request gives other answers.
const REQUEST: u32 = 2;

/// How the model is made to choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Choice {
    /// A JSON schema of the answer (`output_config.format`).
    #[default]
    Schema,
    /// A tool that the model must call.
    Tool,
    /// A prefilled start of the answer, as in the paper; newer models refuse it.
    Prefill,
}

/// Whether the model thinks before it answers. Thinking counts towards `max_tokens`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Thinking {
    /// Sends no setting: the model's own default.
    #[default]
    Model,
    /// No thinking. Models that always think refuse this.
    Disabled,
    /// As much as the model decides, guided by `effort`.
    Adaptive,
    /// At most this many tokens, 1024 or more; for models without adaptive thinking.
    Budget(u32),
}

/// The effort that the model should make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Effort {
    Low,
    Medium,
    High,
    Xhigh,
    Max,
}

/// The settings of this API alone.
#[derive(Clone, Debug)]
pub struct Anthropic {
    pub choice: Choice,
    pub thinking: Thinking,
    pub effort: Option<Effort>,
    pub temperature: Option<f64>,
    pub top_p: Option<f64>,
    pub top_k: Option<u32>,
}

/// The price of a model from the pipeline file, or else from the built-in table; `None` if neither has it.
///
/// # Errors
/// If the built-in table is invalid (an internal error).
pub fn quote(model: &str, own: Option<&Prices>) -> Result<Option<Quote>> {
    let shipped = Prices::parse(include_str!("prices.json"))?;
    Ok(own.and_then(|own| own.quote(model, "the pipeline file's prices")).or_else(|| shipped.quote(model, "prices")))
}

/// The API at `base`.
///
/// # Errors
/// As [`Endpoint::new`].
pub fn endpoint_at(base: &str, key: &str) -> Result<Endpoint> {
    Endpoint::new(&PROTOCOL, (base, BASE_URL), Some((key, KEY)))
}

/// The API's base address from the environment, unchecked.
fn base() -> String {
    http::variable(BASE_URL).unwrap_or_else(|| PUBLIC.to_owned())
}

/// The address that requests go to.
///
/// # Errors
/// If the variable [`BASE_URL`] holds no valid address.
pub fn address() -> Result<Url> {
    Endpoint::new(&PROTOCOL, (&base(), BASE_URL), None).map(|endpoint| endpoint.at(""))
}

/// The variables that may hold the key.
pub fn key_variables() -> [String; 2] {
    [KEY.to_owned(), credentials::file_variable(KEY)]
}

/// The variable that holds the key; `None` if no variable is set.
///
/// # Errors
/// If the key cannot be used.
pub fn key_variable_set() -> Result<Option<String>> {
    let Some(name) = credentials::variable_set(KEY) else { return Ok(None) };
    endpoint_at(PUBLIC, &credentials::key(KEY)?)?;
    Ok(Some(name))
}

/// The start of a prefilled answer, up to the first field.
fn beginning(field: &str) -> String {
    format!("{{\"{field}\":")
}

impl Provider for Anthropic {
    fn protocol(&self) -> &'static Protocol {
        &PROTOCOL
    }

    fn endpoint(&self) -> Result<Endpoint> {
        endpoint_at(&base(), &credentials::key(KEY)?)
    }

    fn asked(&self, settings: &Settings) -> Value {
        json!({
            "request": REQUEST,
            "model": settings.model,
            "documents_per_request": settings.documents_per_request,
            "choice": self.choice,
            "max_tokens": settings.max_tokens,
            "thinking": self.thinking,
            "effort": self.effort,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "template": settings.instructions.template_text,
            "examples": settings.instructions.examples,
        })
    }

    fn fixed(&self, settings: &Settings, mode: Mode) -> Vec<Value> {
        let mut messages: Vec<Value> =
            settings.instructions.worked_examples().into_iter().map(|message| json!(message)).collect();
        if let Some(last) = messages.last_mut() {
            // Everything up to here is the same in all requests, so the API may cache it and charge less for reading it.
            let text = last["content"].take();
            let control = match mode {
                Mode::Single => json!({ "type": "ephemeral" }),
                // A batch takes longer than the default cache duration of five minutes.
                Mode::Batch => json!({ "type": "ephemeral", "ttl": "1h" }),
            };
            last["content"] = json!([{ "type": "text", "text": text, "cache_control": control }]);
        }
        messages
    }

    fn body(&self, settings: &Settings, mode: Mode, documents: &[Document]) -> Value {
        let texts = &settings.instructions;
        let mut messages = self.fixed(settings, mode);
        messages.push(json!(texts.final_turn(documents)));
        let mut body = json!({ "model": settings.model, "max_tokens": settings.max_tokens });
        let mut output = Map::new();
        match self.choice {
            Choice::Schema => {
                let schema = texts.schema(documents.len());
                output.insert("format".to_owned(), json!({ "type": "json_schema", "schema": schema }));
            }
            Choice::Tool => {
                let about = "Says which summary of each document is better.";
                let schema = texts.schema(documents.len());
                body["tools"] = json!([{ "name": TOOL, "description": about, "input_schema": schema }]);
                body["tool_choice"] = json!({ "type": "tool", "name": TOOL, "disable_parallel_tool_use": true });
            }
            Choice::Prefill => {
                messages.push(json!({ "role": "assistant", "content": beginning(&texts.fields(texts.first())[0]) }));
                body["stop_sequences"] = json!(["}"]);
            }
        }
        body["messages"] = json!(messages);
        if let Some(effort) = self.effort {
            output.insert("effort".to_owned(), json!(effort));
        }
        if !output.is_empty() {
            body["output_config"] = Value::Object(output);
        }
        match self.thinking {
            Thinking::Model => {}
            Thinking::Disabled => body["thinking"] = json!({ "type": "disabled" }),
            Thinking::Adaptive => body["thinking"] = json!({ "type": "adaptive" }),
            Thinking::Budget(tokens) => body["thinking"] = json!({ "type": "enabled", "budget_tokens": tokens }),
        }
        let sampling =
            [("temperature", json!(self.temperature)), ("top_p", json!(self.top_p)), ("top_k", json!(self.top_k))];
        for (name, value) in sampling.into_iter().filter(|(_, value)| !value.is_null()) {
            body[name] = value;
        }
        body
    }

    fn thinks(&self) -> bool {
        self.thinking != Thinking::Disabled
    }

    fn replies(&self, answer: &Value, fields: &[String]) -> Vec<Reply> {
        reply::replies(self.choice, answer, fields)
    }

    fn reason(&self, reply: Reply, answer: &Value) -> String {
        reply::reason(self.choice, reply, answer)
    }
}

/// The usage reported in a message.
fn usage(message: &Value) -> Usage {
    let usage = &message["usage"];
    let count = |name: &str| prices::believed(&usage[name]);
    // The total and its parts; if the parts are missing, the shortest cache duration is assumed.
    let [brief, hour] = ["ephemeral_5m_input_tokens", "ephemeral_1h_input_tokens"]
        .map(|name| prices::believed(&usage["cache_creation"][name]));
    let written = count("cache_creation_input_tokens").max(brief + hour);
    Usage {
        input: count("input_tokens"),
        output: count("output_tokens"),
        cache_written: written - hour,
        cache_written_hour: hour,
        cache_read: count("cache_read_input_tokens"),
        batch: usage["service_tier"] == "batch",
    }
}

/// An error document under a successful status is handled as if it had the status of its type.
fn status(status: u16, document: &Value) -> u16 {
    if !(200..300).contains(&status) {
        return status;
    }
    match document.pointer("/error/type").and_then(Value::as_str).unwrap_or_default() {
        "invalid_request_error" => 400,
        "authentication_error" => 401,
        "billing_error" => 402,
        "permission_error" => 403,
        "not_found_error" => 404,
        "request_too_large" => 413,
        "rate_limit_error" => 429,
        "timeout_error" => 504,
        "overloaded_error" => 529,
        // `api_error`, and undocumented types.
        _ => 500,
    }
}

/// The API reports a reached spending limit in three ways, and waiting never helps.
fn is_spent(status: u16, body: &Value) -> bool {
    let code = body.pointer("/error/details/error_code").and_then(Value::as_str);
    let message = body.pointer("/error/message").and_then(Value::as_str).unwrap_or_default();
    match status {
        402 => true,
        429 => code == Some("enforced_spend_limit_reached"),
        400 => message.contains("reached your specified") && message.contains("usage limits"),
        _ => false,
    }
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::kinds::annotate::claude::Params;

    pub fn settings(with: Value) -> Settings {
        let mut with = with;
        with["model"] = json!("some-model");
        serde_json::from_value::<Params>(with).unwrap().settings().unwrap()
    }

    fn body(settings: &Settings, mode: Mode, documents: &[Document]) -> Value {
        settings.provider.body(settings, mode, documents)
    }

    fn document(prompt: &str) -> Document {
        Document { prompt: prompt.into(), first: "first".into(), second: "second".into() }
    }

    #[test]
    fn two_worked_examples_come_first_then_the_documents_and_the_schema_asks_for_each() {
        let body = body(&settings(json!({})), Mode::Single, &[document("one"), document("two")]);
        let messages = body["messages"].as_array().unwrap();
        let roles: Vec<_> = messages.iter().map(|m| m["role"].as_str().unwrap()).collect();
        assert_eq!(roles, ["user", "assistant", "user", "assistant", "user"]);
        assert!(messages[0]["content"].as_str().unwrap().starts_with("You are a helpful assistant"));
        assert_eq!(messages[1]["content"], r#"{"doc.1.chosen.summary":1}"#);
        let cached = json!({ "type": "text", "text": r#"{"doc.2.chosen.summary":2}"#, "cache_control": { "type": "ephemeral" } });
        assert_eq!(messages[3]["content"], json!([cached]), "what is fixed ends here");
        let last = messages[4]["content"].as_str().unwrap();
        assert!(last.starts_with("<doc.3>\none\n</doc.3>\n<doc.3.summary.1>\nfirst\n"), "{last}");
        assert!(last.contains("<doc.4>\ntwo\n</doc.4>"));
        let schema = &body["output_config"]["format"]["schema"];
        assert_eq!(schema["required"], json!(["doc.3.chosen.summary", "doc.4.chosen.summary"]));
        assert_eq!(schema["additionalProperties"], false);
        let keys: Vec<&String> = body.as_object().unwrap().keys().collect();
        assert_eq!(keys, ["model", "max_tokens", "messages", "output_config"], "nothing is sent that nobody asked for");
    }

    #[test]
    fn a_batch_keeps_the_beginning_an_hour_and_asks_the_same_else() {
        let (settings, one) = (settings(json!({})), [document("one")]);
        let (single, mut batch) = (body(&settings, Mode::Single, &one), body(&settings, Mode::Batch, &one));
        let control = &mut batch["messages"][3]["content"][0]["cache_control"];
        assert_eq!(control.take(), json!({ "type": "ephemeral", "ttl": "1h" }));
        *control = json!({ "type": "ephemeral" });
        assert_eq!(batch, single);
    }

    #[test]
    fn each_mode_forces_the_choice_in_its_own_way() {
        let one = [document("one")];
        let tool = body(&settings(json!({ "choice": "tool", "thinking": "disabled" })), Mode::Single, &one);
        assert_eq!(tool["tool_choice"]["name"], tool["tools"][0]["name"]);
        assert_eq!(tool["tools"][0]["input_schema"]["required"], json!(["doc.3.chosen.summary"]));
        assert_eq!((&tool["thinking"], tool.get("output_config")), (&json!({ "type": "disabled" }), None));
        let prefill = body(&settings(json!({ "choice": "prefill", "temperature": 0, "top_k": 5 })), Mode::Single, &one);
        let last = prefill["messages"].as_array().unwrap().last().unwrap();
        assert_eq!(last, &json!({ "role": "assistant", "content": "{\"doc.3.chosen.summary\":" }));
        assert_eq!((&prefill["temperature"], &prefill["top_k"]), (&json!(0.0), &json!(5)));
        let thinking = body(&settings(json!({ "thinking": { "budget": 2048 }, "effort": "max" })), Mode::Single, &one);
        assert_eq!(thinking["thinking"], json!({ "type": "enabled", "budget_tokens": 2048 }));
        assert_eq!(thinking["output_config"]["effort"], "max");
    }

    #[test]
    fn answers_of_an_older_temper_keep_their_folders() {
        let fingerprint = |with: Value| blake3::Hash::from_bytes(settings(with).fingerprint()).to_hex().to_string();
        // BLAKE3 of the documents that the first version wrote, computed outside this program.
        let plain = "59bdd9d36c8f10e0c66d9a966d398f18853e2278fdc86295d0e8999eb3460ac4";
        assert_eq!(fingerprint(json!({})), plain);
        let all = json!({ "choice": "tool", "max_tokens": 77, "thinking": { "budget": 2048 }, "effort": "low",
                          "temperature": 0.5, "top_p": 1, "top_k": 5 });
        assert_eq!(fingerprint(all), "1dbef0fb316d69755a8606bbe7da6c388bd967563e1f3da4536fbb4c158a2938");
    }

    #[test]
    fn whatever_changes_the_request_changes_the_fingerprint() {
        let plain = settings(json!({})).fingerprint();
        assert_eq!(
            plain,
            settings(json!({ "swap_share": 0.5, "retry": "failed", "strict_partner": true })).fingerprint()
        );
        for with in [
            json!({ "documents_per_request": 3 }),
            json!({ "choice": "tool" }),
            json!({ "max_tokens": 2 }),
            json!({ "thinking": "adaptive" }),
            json!({ "effort": "low" }),
            json!({ "temperature": 0 }),
            json!({ "top_p": 1 }),
            json!({ "top_k": 1 }),
        ] {
            assert_ne!(plain, settings(with.clone()).fingerprint(), "{with}");
        }
    }
}
