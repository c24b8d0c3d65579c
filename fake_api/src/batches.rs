//! `/v1/messages/batches`: create, list (newest first, paged), retrieve, and results in an order unlike the requests'.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use serde_json::{Value, json};

use super::messages::{pay, rfc3339};
use super::{Reply, Shared, State};

/// Result of one request of a batch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Line {
    Succeeded,
    /// Succeeded, with this value in place of a message. Not billed.
    Says(Value),
    /// Error type and message. Not billed.
    Errored(&'static str, &'static str),
    /// Not billed.
    Canceled,
    /// Not billed.
    Expired,
    /// Absent from the results. Not billed.
    Missing,
}

pub struct Batch {
    id: String,
    created: SystemTime,
    requests: Vec<(String, Value)>,
    looks: usize,
    /// One result per request, once the batch has ended.
    results: Option<Vec<Value>>,
}

impl Batch {
    pub fn new(n: usize, requests: Vec<(String, Value)>) -> Self {
        Self { id: format!("msgbatch_{n:04}"), created: SystemTime::now(), requests, looks: 0, results: None }
    }

    pub fn of_others(n: usize, count: usize) -> Self {
        let line = |i| json!({ "custom_id": format!("theirs-{i}"), "result": { "type": "canceled" } });
        Self { results: Some((0..count).map(line).collect()), ..Self::new(n, vec![]) }
    }

    fn describe(&self) -> Value {
        let count = |kind: &str| {
            let of_kind = |line: &&Value| line["result"]["type"] == kind;
            self.results.iter().flatten().filter(of_kind).count()
        };
        let ended = self.results.is_some();
        let results_url = ended.then(|| format!("https://api.example/v1/messages/batches/{}/results", self.id));
        json!({
            "id": self.id,
            "type": "message_batch",
            "processing_status": if ended { "ended" } else { "in_progress" },
            "request_counts": {
                "processing": if ended { 0 } else { self.requests.len() },
                "succeeded": count("succeeded"),
                "errored": count("errored"),
                "canceled": count("canceled"),
                "expired": count("expired"),
            },
            "created_at": rfc3339(self.created),
            "expires_at": rfc3339(self.created + Duration::from_secs(86_400)),
            "ended_at": if ended { json!(rfc3339(SystemTime::now())) } else { Value::Null },
            "results_url": results_url,
        })
    }
}

pub fn create(shared: &Shared, bytes: usize, body: &Value) -> Reply {
    let mut state = shared.state();
    let n = state.creates;
    state.creates += 1;
    if bytes > 256_000_000 {
        return Reply::error(413, "request_too_large", "a batch holds 256 MB at most");
    }
    let requests = body["requests"].as_array().map_or(&[][..], Vec::as_slice);
    let id = |request: &Value| request["custom_id"].as_str().unwrap_or_default().to_owned();
    let safe = |id: &String| {
        (1..=64).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_' || b == b'-')
    };
    let ids: BTreeSet<String> = requests.iter().map(id).filter(safe).collect();
    if !(1..=100_000).contains(&requests.len()) || ids.len() != requests.len() {
        return Reply::error(400, "invalid_request_error", "requests: 1 to 100000, each with a custom_id of its own");
    }
    let fault = (shared.rules.create)(n, body);
    if let Some(reply) = fault.as_ref().and_then(Reply::of) {
        return reply;
    }
    let requests = requests.iter().map(|request| (id(request), request["params"].clone())).collect();
    let batch = Batch::new(state.batches.len(), requests);
    let reply = Reply::ok(&batch.describe());
    state.batches.push(batch);
    reply.under(fault.as_ref())
}

pub fn get(shared: &Shared, rest: &[&str], query: &BTreeMap<String, String>) -> Reply {
    let mut state = shared.state();
    let n = state.gets;
    state.gets += 1;
    let fault = (shared.rules.get)(n, &json!(rest));
    if let Some(reply) = fault.as_ref().and_then(Reply::of) {
        return reply;
    }
    let place = |state: &State, id: &str| state.batches.iter().position(|batch| batch.id == id);
    let reply = match *rest {
        [] => {
            (0..state.batches.len()).for_each(|at| look(shared, &mut state, at));
            list(&state, query)
        }
        [id] => place(&state, id).map(|at| {
            look(shared, &mut state, at);
            Reply::ok(&state.batches[at].describe())
        }),
        [id, "results"] => place(&state, id).and_then(|at| state.batches[at].results.as_ref()).map(|results| {
            // Reversed: the API does not promise the order of requests.
            let lines: Vec<String> = results.iter().rev().map(|line| format!("{line}\n")).collect();
            Reply { body: lines.concat(), ..Reply::ok(&Value::Null) }
        }),
        _ => None,
    };
    reply.unwrap_or_else(|| Reply::error(404, "not_found_error", "no such batch")).under(fault.as_ref())
}

/// One page of the batches after `after_id`, newest first.
fn list(state: &State, query: &BTreeMap<String, String>) -> Option<Reply> {
    let limit: usize = query.get("limit").map_or(Some(20), |n| n.parse().ok())?;
    let mut rest: Vec<&Batch> = state.batches.iter().rev().collect();
    if let Some(after) = query.get("after_id") {
        rest.drain(..=rest.iter().position(|batch| batch.id == *after)?);
    }
    let page = &rest[..limit.min(rest.len())];
    let id = |batch: Option<&&Batch>| batch.map(|batch| batch.id.clone());
    Some(Reply::ok(&json!({
        "data": page.iter().map(|batch| batch.describe()).collect::<Vec<_>>(),
        "has_more": rest.len() > page.len(),
        "first_id": id(page.first()),
        "last_id": id(page.last()),
    })))
}

/// Polling advances time: a batch that was polled often enough ends, and its successful requests are billed.
fn look(shared: &Shared, state: &mut State, at: usize) {
    let batch = &mut state.batches[at];
    batch.looks += 1;
    if batch.results.is_some() || batch.looks < shared.rules.looks {
        return;
    }
    let requests = std::mem::take(&mut batch.requests);
    let mut results = Vec::with_capacity(requests.len());
    for (id, params) in &requests {
        let n = state.lines;
        state.lines += 1;
        let result = match (shared.rules.line)(n, params) {
            Line::Succeeded => {
                let message = (shared.rules.judge)(params);
                json!({ "type": "succeeded", "message": pay(state, shared.rules.cacheable, params, message, "batch") })
            }
            Line::Says(message) => json!({ "type": "succeeded", "message": message }),
            Line::Errored(kind, message) => {
                json!({ "type": "errored", "error": { "type": "error", "error": { "type": kind, "message": message } } })
            }
            Line::Canceled => json!({ "type": "canceled" }),
            Line::Expired => json!({ "type": "expired" }),
            Line::Missing => continue,
        };
        results.push(json!({ "custom_id": id, "result": result }));
    }
    state.batches[at].results = Some(results);
}
