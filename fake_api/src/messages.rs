//! `POST /v1/messages`: validation, rate limits, token usage with prompt caching, and a judge that prefers summaries
//! starting with `good`.

use std::time::{Instant, SystemTime};

use serde_json::{Value, json};

use super::{Fault, Reply, Shared, State};

/// Rate limit as a continuously refilled token bucket.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Capacity of the bucket, refilled within a minute.
    pub per_minute: f64,
    /// Initial content.
    pub left: f64,
}

/// Current content of the bucket, with the time of its last update.
#[derive(Default)]
pub struct Bucket(Option<(Instant, f64)>);

impl Bucket {
    /// Takes one request out of the bucket and returns the remaining content; `None` if it was empty.
    fn take(&mut self, limits: Limits) -> Option<f64> {
        let now = Instant::now();
        let left = self.0.map_or(limits.left, |(at, left)| {
            (left + now.duration_since(at).as_secs_f64() * limits.per_minute / 60.0).min(limits.per_minute)
        });
        let taken = left >= 1.0;
        let left = if taken { left - 1.0 } else { left };
        self.0 = Some((now, left));
        taken.then_some(left)
    }
}

pub fn create(shared: &Shared, body: &Value) -> Reply {
    let rules = &shared.rules;
    let mut state = shared.state();
    let n = state.messages;
    state.messages += 1;
    if let Some(missing) = ["model", "max_tokens", "messages"].iter().find(|field| body.get(**field).is_none()) {
        return Reply::error(400, "invalid_request_error", &format!("{missing}: Field required"));
    }
    let mut headers = Vec::new();
    if let Some(limits) = rules.limits {
        let left = state.bucket.take(limits);
        let full = 60.0 * (limits.per_minute - left.unwrap_or(0.0)) / limits.per_minute;
        headers = vec![
            ("anthropic-ratelimit-requests-limit", limits.per_minute.to_string()),
            ("anthropic-ratelimit-requests-remaining", left.unwrap_or(0.0).floor().to_string()),
            (
                "anthropic-ratelimit-requests-reset",
                rfc3339(SystemTime::now() + std::time::Duration::from_secs_f64(full)),
            ),
        ];
        if left.is_none() {
            state.turned_away += 1;
            let mut reply = Reply::error(429, "rate_limit_error", "too many requests");
            reply.headers.extend(headers);
            reply.headers.push(("retry-after", "1".into()));
            return reply;
        }
    }
    let fault = (rules.message)(n, body);
    if let Some(reply) = fault.as_ref().and_then(Reply::of) {
        return reply;
    }
    let message = match &fault {
        Some(Fault::Says(message)) => message.clone(),
        _ => (rules.judge)(body),
    };
    let message = pay(&mut state, rules.cacheable, body, message, "standard");
    drop(state);
    shared.changed.notify_all();
    std::thread::sleep(rules.latency);
    let mut reply = Reply::ok(&message);
    reply.headers = headers;
    reply.headers.push(("request-id", format!("req_{n}")));
    reply.under(fault.as_ref())
}

/// Counts a billed request and its documents.
pub fn count(state: &mut State, body: &Value) {
    state.paid_messages += 1;
    for (_, document) in documents(body) {
        *state.paid.entry(document).or_default() += 1;
    }
}

/// Bills a response and completes it with id, model and usage.
pub fn pay(state: &mut State, cacheable: usize, body: &Value, mut message: Value, tier: &str) -> Value {
    count(state, body);
    let usage = usage(state, cacheable, body, &message, tier);
    let sent = ["input_tokens", "cache_creation_input_tokens", "cache_read_input_tokens"];
    state.paid_tokens.0 += sent.iter().filter_map(|name| usage[*name].as_u64()).sum::<u64>();
    state.paid_tokens.1 += usage["output_tokens"].as_u64().unwrap_or(0);
    let id = format!("msg_{}", state.paid_messages);
    for (name, value) in [("id", json!(id)), ("type", json!("message")), ("role", json!("assistant"))] {
        message[name] = value;
    }
    message["model"] = body["model"].clone();
    message["usage"] = usage;
    message
}

/// Counts four bytes as one token. The prefix before the last `cache_control` is written to the cache once and read
/// from then on.
fn usage(state: &mut State, cacheable: usize, body: &Value, message: &Value, tier: &str) -> Value {
    let whole = body["messages"].to_string();
    let prefix = whole.rfind("\"cache_control\"").map_or("", |at| &whole[..at]);
    let (whole_tokens, prefix_tokens) = (whole.len() / 4, prefix.len() / 4);
    let (mut written, mut read) = (0, 0);
    if prefix_tokens >= cacheable && !prefix.is_empty() {
        if state.prefixes.insert(prefix.to_owned()) {
            written = prefix_tokens;
        } else {
            read = prefix_tokens;
        }
    }
    let hour = if whole[prefix.len()..].starts_with("\"cache_control\":{\"type\":\"ephemeral\",\"ttl\":\"1h\"") {
        written
    } else {
        0
    };
    json!({
        "input_tokens": whole_tokens - written - read,
        "cache_creation": { "ephemeral_5m_input_tokens": written - hour, "ephemeral_1h_input_tokens": hour },
        "cache_creation_input_tokens": written,
        "cache_read_input_tokens": read,
        "output_tokens": message["content"].to_string().len() / 4,
        "service_tier": tier,
    })
}

/// The documents in the last user message: number, and text without it.
pub fn documents(body: &Value) -> Vec<(usize, String)> {
    let messages = body["messages"].as_array().map_or(&[][..], Vec::as_slice);
    let asked = messages.iter().rev().find(|message| message["role"] == "user");
    let text = asked.map_or(String::new(), |message| text_of(&message["content"]));
    let document = |n: usize| {
        let from = text.find(&format!("<doc.{n}>"))?;
        let end = format!("</doc.{n}.summary.2>");
        let to = from + text[from..].find(&end)? + end.len();
        Some((n, text[from..to].replace(&format!("doc.{n}"), "doc")))
    };
    (1..200).filter_map(document).collect()
}

fn text_of(content: &Value) -> String {
    match content {
        Value::String(text) => text.clone(),
        Value::Array(blocks) => blocks.iter().filter_map(|block| block["text"].as_str()).collect(),
        _ => String::new(),
    }
}

/// The choice for each document: the first summary if it begins with `good`, otherwise the second.
pub fn labels(body: &Value) -> Value {
    let choice = |document: &str| {
        let first = document.split("<doc.summary.1>").nth(1).unwrap_or_default();
        if first.trim_start().starts_with("good") { 1 } else { 2 }
    };
    let labels = documents(body).into_iter();
    Value::Object(labels.map(|(n, document)| (format!("doc.{n}.chosen.summary"), json!(choice(&document)))).collect())
}

/// Prefers summaries that begin with `good`, in the response format of the request.
pub fn judge(body: &Value) -> Value {
    let labels = labels(body);
    let last = body["messages"].as_array().and_then(|messages| messages.last());
    if let Some(tool) = body.pointer("/tool_choice/name") {
        let block = json!({ "type": "tool_use", "id": "toolu_1", "name": tool, "input": labels });
        return json!({ "stop_reason": "tool_use", "stop_sequence": null, "content": [block] });
    }
    let mut text = labels.to_string();
    if let Some(begun) = last.filter(|message| message["role"] == "assistant") {
        let begun = text_of(&begun["content"]);
        text = text.strip_prefix(begun.trim_end()).unwrap_or(&text).to_owned();
    }
    json!({ "stop_reason": "end_turn", "stop_sequence": null, "content": [{ "type": "text", "text": text }] })
}

/// A time in the API's format.
pub fn rfc3339(time: SystemTime) -> String {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    let (days, seconds) = (since.as_secs() / 86_400, since.as_secs() % 86_400);
    // Days since 0000-03-01, as in Howard Hinnant's civil_from_days.
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (seconds / 3_600, seconds / 60 % 60, seconds % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{:06}Z", since.subsec_micros())
}
