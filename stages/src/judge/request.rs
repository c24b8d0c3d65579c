//! The texts of the paper's request (A.2), which providers put into the form of their API. Pure.

use serde_json::{Map, Value, json};

use super::document::Document;
use super::params::Mode;
use super::settings::Settings;

/// The field of the choice for document `n`.
pub fn field(n: usize) -> String {
    format!("doc.{n}.chosen.summary")
}

/// The worked examples as messages: the same for all requests with the same settings.
pub fn examples(settings: &Settings) -> Vec<Value> {
    let mut messages = Vec::with_capacity(2 * settings.examples.len());
    for (i, example) in settings.examples.iter().enumerate() {
        let text = settings.template.document(i + 1, &example.document());
        let head = if i == 0 { settings.template.head.as_str() } else { "" };
        messages.push(json!({ "role": "user", "content": paragraphs(&[head, &text, &settings.template.tail]) }));
        let answer = json!({ (field(i + 1)): example.better }).to_string();
        messages.push(json!({ "role": "assistant", "content": answer }));
    }
    messages
}

/// The message about the documents.
pub fn question(settings: &Settings, documents: &[Document]) -> Value {
    let text = |(i, document)| settings.template.document(settings.first() + i, document);
    let texts: Vec<String> = documents.iter().enumerate().map(text).collect();
    json!({ "role": "user", "content": paragraphs(&[&texts.join("\n\n"), &settings.template.tail]) })
}

/// Bytes of the fixed prefix of all requests with the same settings.
pub fn fixed_bytes(settings: &Settings, mode: Mode) -> u64 {
    json!(settings.provider.fixed(settings, mode)).to_string().len() as u64
}

fn paragraphs(parts: &[&str]) -> String {
    parts.iter().filter(|part| !part.is_empty()).copied().collect::<Vec<_>>().join("\n\n")
}

/// The schema of exactly one choice for each of `n` documents.
pub fn schema(settings: &Settings, n: usize) -> Value {
    let names: Vec<String> = (0..n).map(|i| field(settings.first() + i)).collect();
    let properties: Map<String, Value> =
        names.iter().map(|name| (name.clone(), json!({ "type": "integer", "enum": [1, 2] }))).collect();
    json!({ "type": "object", "properties": properties, "required": names, "additionalProperties": false })
}
