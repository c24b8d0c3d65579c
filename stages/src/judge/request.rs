//! Builds the paper's request (A.2) as a body of the Messages API. Pure.

use serde_json::{Map, Value, json};

use super::document::Document;
use super::params::{Choice, Mode, Thinking};
use super::settings::Settings;

/// The tool that the model must call with `choice: tool`.
pub const TOOL: &str = "choose";

/// The field of the choice for document `n`.
pub fn field(n: usize) -> String {
    format!("doc.{n}.chosen.summary")
}

/// The start of a prefilled answer; `n` is the number of the first document.
pub fn beginning(n: usize) -> String {
    format!("{{\"{}\":", field(n))
}

/// The worked examples as messages: the same for all requests with the same settings and mode.
fn fixed(settings: &Settings, mode: Mode) -> Vec<Value> {
    let mut messages = Vec::with_capacity(2 * settings.examples.len());
    for (i, example) in settings.examples.iter().enumerate() {
        let text = settings.template.document(i + 1, &example.document());
        let head = if i == 0 { settings.template.head.as_str() } else { "" };
        messages.push(json!({ "role": "user", "content": paragraphs(&[head, &text, &settings.template.tail]) }));
        let answer = json!({ (field(i + 1)): example.better }).to_string();
        messages.push(json!({ "role": "assistant", "content": answer }));
    }
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

/// Bytes of the fixed prefix of all requests with the same settings.
pub fn fixed_bytes(settings: &Settings, mode: Mode) -> u64 {
    json!(fixed(settings, mode)).to_string().len() as u64
}

fn paragraphs(parts: &[&str]) -> String {
    parts.iter().filter(|part| !part.is_empty()).copied().collect::<Vec<_>>().join("\n\n")
}

/// The schema of exactly one choice for each of `n` documents.
fn schema(settings: &Settings, n: usize) -> Value {
    let names: Vec<String> = (0..n).map(|i| field(settings.first() + i)).collect();
    let properties: Map<String, Value> =
        names.iter().map(|name| (name.clone(), json!({ "type": "integer", "enum": [1, 2] }))).collect();
    json!({ "type": "object", "properties": properties, "required": names, "additionalProperties": false })
}

/// The body of `POST /v1/messages`: the worked examples, then the documents. The mode affects how long the prefix stays
/// in the prompt cache, and so the price, but no answer.
pub fn body(settings: &Settings, mode: Mode, documents: &[Document]) -> Value {
    let first = settings.first();
    let texts: Vec<String> =
        documents.iter().enumerate().map(|(i, document)| settings.template.document(first + i, document)).collect();
    let mut messages = fixed(settings, mode);
    messages.push(json!({ "role": "user", "content": paragraphs(&[&texts.join("\n\n"), &settings.template.tail]) }));

    let mut body = json!({ "model": settings.model, "max_tokens": settings.max_tokens });
    let mut output = Map::new();
    match settings.choice {
        Choice::Schema => {
            let schema = schema(settings, documents.len());
            output.insert("format".to_owned(), json!({ "type": "json_schema", "schema": schema }));
        }
        Choice::Tool => {
            let about = "Says which summary of each document is better.";
            let schema = schema(settings, documents.len());
            body["tools"] = json!([{ "name": TOOL, "description": about, "input_schema": schema }]);
            body["tool_choice"] = json!({ "type": "tool", "name": TOOL, "disable_parallel_tool_use": true });
        }
        Choice::Prefill => {
            messages.push(json!({ "role": "assistant", "content": beginning(first) }));
            body["stop_sequences"] = json!(["}"]);
        }
    }
    body["messages"] = json!(messages);
    if let Some(effort) = settings.effort {
        output.insert("effort".to_owned(), json!(effort));
    }
    if !output.is_empty() {
        body["output_config"] = Value::Object(output);
    }
    match settings.thinking {
        Thinking::Model => {}
        Thinking::Disabled => body["thinking"] = json!({ "type": "disabled" }),
        Thinking::Adaptive => body["thinking"] = json!({ "type": "adaptive" }),
        Thinking::Budget(tokens) => body["thinking"] = json!({ "type": "enabled", "budget_tokens": tokens }),
    }
    let sampling = [
        ("temperature", json!(settings.temperature)),
        ("top_p", json!(settings.top_p)),
        ("top_k", json!(settings.top_k)),
    ];
    for (name, value) in sampling.into_iter().filter(|(_, value)| !value.is_null()) {
        body[name] = value;
    }
    body
}

#[cfg(test)]
pub mod tests {
    use super::*;
    use crate::judge::params::Params;

    pub fn settings(with: Value) -> Settings {
        let mut with = with;
        with["model"] = json!("some-model");
        Settings::load(&serde_json::from_value::<Params>(with).unwrap()).unwrap()
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
