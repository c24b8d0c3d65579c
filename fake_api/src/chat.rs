//! `POST /v1/chat/completions`, as OpenAI documents it: validation, faults in its form, log-probabilities and usage.

use serde_json::{Value, json};

use super::messages::{count, labels};
use super::{Fault, KEY, Reply, Shared, wire};

pub const PATH: &str = "/v1/chat/completions";

pub fn create(shared: &Shared, head: &str, body: &Value) -> Reply {
    let rules = &shared.rules;
    let mut state = shared.state();
    let n = state.messages;
    state.messages += 1;
    // Like a local server, it takes requests without a key, but none with a wrong one.
    if wire::header(head, "authorization").is_some_and(|value| value != format!("Bearer {KEY}")) {
        return error(401, "invalid_api_key", "Incorrect API key provided");
    }
    if let Some(missing) = ["model", "messages"].iter().find(|field| body.get(**field).is_none()) {
        return error(400, "missing_required_parameter", &format!("Missing required parameter: '{missing}'."));
    }
    let fault = (rules.message)(n, body);
    match &fault {
        Some(Fault::Error { status, kind, message, headers, .. }) => {
            let mut reply = error(*status, kind, message);
            reply.headers.extend(headers.iter().cloned());
            return reply;
        }
        Some(fault) => {
            if let Some(reply) = Reply::of(fault) {
                return reply;
            }
        }
        None => {}
    }
    let choice = match &fault {
        Some(Fault::Says(choice)) => choice.clone(),
        _ => (rules.choose)(body),
    };
    count(&mut state, body);
    // Four bytes as one token, as for messages.
    let (sent, got) = (body["messages"].to_string().len() as u64 / 4, choice["message"].to_string().len() as u64 / 4);
    state.paid_tokens.0 += sent;
    state.paid_tokens.1 += got;
    let mut completion = json!({
        "id": format!("chatcmpl-{n}"),
        "object": "chat.completion",
        "model": (rules.model)(n).map_or_else(|| body["model"].clone(), |model| json!(model)),
        "choices": [choice],
    });
    if rules.usage {
        completion["usage"] = json!({ "prompt_tokens": sent, "completion_tokens": got, "total_tokens": sent + got });
    }
    drop(state);
    shared.changed.notify_all();
    std::thread::sleep(rules.latency);
    Reply::ok(&completion).under(fault.as_ref())
}

fn error(status: u16, code: &str, message: &str) -> Reply {
    let error = json!({ "message": message, "type": "invalid_request_error", "param": null, "code": code });
    Reply { status, ..Reply::ok(&json!({ "error": error })) }
}

/// Prefers summaries that begin with `good`. With `logprobs`, it is sure at 3 to 1.
pub fn choose(body: &Value) -> Value {
    let labels = labels(body);
    let mut choice = json!({
        "index": 0, "finish_reason": "stop", "logprobs": null,
        "message": { "role": "assistant", "content": labels.to_string() },
    });
    if body["logprobs"] == true {
        let token = |token: &str, p: f64| json!({ "token": token, "logprob": p.ln() });
        let mut tokens = Vec::new();
        for (name, label) in labels.as_object().into_iter().flatten() {
            let (this, other) = if label == 1 { ("1", "2") } else { ("2", "1") };
            let mut chosen = token(this, 0.75);
            chosen["top_logprobs"] =
                json!([token(this, 0.75), token(other, 0.2), token(" 0", 0.04), token(&format!(" {other}"), 0.01)]);
            tokens.extend([token(&format!("{{\"{name}"), 1.0), token("\":", 1.0), chosen, token("}", 1.0)]);
        }
        choice["logprobs"] = json!({ "content": tokens });
    }
    choice
}
