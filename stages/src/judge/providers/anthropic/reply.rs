//! Reads messages of the Messages API. Pure.

use serde_json::Value;

use super::{Choice, TOOL, beginning};
use crate::judge::reply::Reply;

/// Whether a JSON value is a message of the API.
pub fn is_message(answer: &Value) -> bool {
    answer["type"] == "message" && answer["content"].is_array()
}

/// The result for each field. The stop reason takes precedence over the text.
pub fn replies(choice: Choice, answer: &Value, fields: &[String]) -> Vec<Reply> {
    match answer["stop_reason"].as_str() {
        Some("refusal") => return vec![Reply::Refused; fields.len()],
        Some("max_tokens" | "model_context_window_exceeded") => return vec![Reply::Truncated; fields.len()],
        _ => {}
    }
    let choices = choices(choice, answer, fields.first().map_or("", String::as_str));
    let place = |field: &String| match choices.get(field)? {
        Value::Number(n) => n.as_u64(),
        Value::String(s) => s.trim().parse().ok(),
        _ => None,
    };
    let reply = |field| match place(field) {
        Some(1) => Reply::Label(1),
        Some(2) => Reply::Label(2),
        _ => Reply::Unparsable,
    };
    fields.iter().map(reply).collect()
}

/// The map of choices; null if there is none.
fn choices(choice: Choice, answer: &Value, first: &str) -> Value {
    if choice == Choice::Tool {
        let called = blocks(answer).iter().rev().find(|block| block["type"] == "tool_use" && block["name"] == TOOL);
        return called.map_or(Value::Null, |block| block["input"].clone());
    }
    let Some(text) = text(answer) else { return Value::Null };
    let whole = match choice {
        // The stop sequence removes the closing brace, if the model wrote it.
        Choice::Prefill if answer["stop_reason"] == "stop_sequence" => format!("{}{text}}}", beginning(first)),
        Choice::Prefill => format!("{}{text}", beginning(first)),
        Choice::Schema | Choice::Tool => text,
    };
    serde_json::from_str(whole.trim()).unwrap_or(Value::Null)
}

/// Why there is no label.
pub fn reason(choice: Choice, reply: Reply, answer: &Value) -> String {
    match reply {
        Reply::Refused => {
            let details = ["category", "explanation"].map(|part| answer["stop_details"][part].as_str());
            let text = text(answer);
            let told: Vec<&str> = details.into_iter().flatten().chain(text.as_deref()).collect();
            if told.is_empty() { "the model refused".to_owned() } else { told.join(": ") }
        }
        Reply::Truncated => {
            let why = answer["stop_reason"].as_str().unwrap_or_default();
            format!("cut off ({why}) after {} tokens", answer["usage"]["output_tokens"])
        }
        _ if choice == Choice::Tool => format!("no choice for it in {}", answer["content"]),
        _ => text(answer).map_or("no block of text".to_owned(), |text| format!("no choice for it in `{text}`")),
    }
}

fn blocks(answer: &Value) -> &[Value] {
    answer["content"].as_array().map_or(&[][..], Vec::as_slice)
}

/// The text of all text blocks in order, without anything between them; `None` without any text. Blocks of other types, such
/// as thinking, are skipped.
fn text(answer: &Value) -> Option<String> {
    let texts =
        blocks(answer).iter().filter(|block| block["type"] == "text").filter_map(|block| block["text"].as_str());
    Some(texts.collect::<String>()).filter(|text| !text.is_empty())
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::judge::provider::Provider;
    use crate::judge::providers::anthropic::tests::settings;
    use crate::judge::reply::one_line;

    /// How answers to requests with two examples are read.
    struct Reading(std::sync::Arc<dyn Provider>);

    impl Reading {
        fn replies(&self, answer: &Value, n: usize) -> Vec<Reply> {
            let fields: Vec<String> = (3..3 + n).map(|n| format!("doc.{n}.chosen.summary")).collect();
            self.0.replies(answer, &fields)
        }

        fn reason(&self, reply: Reply, answer: &Value) -> String {
            one_line(&self.0.reason(reply, answer))
        }
    }

    fn reading(choice: &str) -> Reading {
        Reading(settings(json!({ "choice": choice })).provider)
    }

    fn answer(text: &str) -> Value {
        json!({ "stop_reason": "end_turn", "content": [
            { "type": "thinking", "thinking": "{\"doc.3.chosen.summary\": 1}" }, { "type": "text", "text": text }
        ] })
    }

    #[test]
    fn the_text_block_is_read_and_every_other_end_is_no_label() {
        let replies = |answer: &Value, n| reading("schema").replies(answer, n);
        let both = answer(r#"{"doc.3.chosen.summary": 2, "doc.4.chosen.summary": 1}"#);
        assert_eq!(replies(&both, 2), [Reply::Label(2), Reply::Label(1)]);
        let one = answer(r#"{"doc.4.chosen.summary": 2, "doc.3.chosen.summary": 3}"#);
        assert_eq!(replies(&one, 2), [Reply::Unparsable, Reply::Label(2)]);
        assert_eq!(replies(&answer("the first"), 1), [Reply::Unparsable]);
        let mut ended = both.clone();
        ended["stop_reason"] = "refusal".into();
        assert_eq!(replies(&ended, 2), [Reply::Refused; 2]);
        ended["stop_reason"] = "max_tokens".into();
        assert_eq!(replies(&ended, 2), [Reply::Truncated; 2]);
        assert_eq!(replies(&json!({}), 1), [Reply::Unparsable]);
    }

    #[test]
    fn the_answer_is_the_text_of_all_text_blocks() {
        let thinking = json!({ "type": "thinking", "thinking": "{}" });
        let text = |text: &str| json!({ "type": "text", "text": text });
        let whole = "{\"doc.3.chosen.summary\": 2}";
        let (begin, end) = whole.split_at(9);
        for content in [
            json!([text(whole), text("")]),
            json!([text(""), text(whole), text(""), thinking]),
            json!([text(begin), text(end)]),
            json!([thinking, text(begin), thinking, text(""), text(end), text(" \n")]),
        ] {
            let answer = json!({ "type": "message", "stop_reason": "end_turn", "content": content });
            assert!(is_message(&answer));
            assert_eq!(reading("schema").replies(&answer, 1), [Reply::Label(2)], "{answer}");
        }
        let rest = json!({ "stop_reason": "stop_sequence", "content": [text(" 1, \"doc.4."), text("chosen.summary\": 2"), text("")] });
        assert_eq!(reading("prefill").replies(&rest, 2), [Reply::Label(1), Reply::Label(2)]);
        let none = json!({ "stop_reason": "end_turn", "content": [text(""), thinking] });
        assert_eq!(reading("schema").replies(&none, 1), [Reply::Unparsable]);
        assert_eq!(reading("schema").reason(Reply::Unparsable, &none), "no block of text");
    }

    #[test]
    fn only_a_message_is_an_answer() {
        for other in [
            json!(null),
            json!({}),
            json!([]),
            json!({ "type": "message" }),
            json!({ "type": "error", "error": { "type": "overloaded_error", "message": "busy" } }),
            json!({ "type": "completion", "content": [], "completion": "{}" }),
            json!({ "content": [], "stop_reason": "end_turn" }),
        ] {
            assert!(!is_message(&other), "{other}");
        }
    }

    #[test]
    fn a_tools_input_and_the_rest_of_a_beginning_are_read_too() {
        let tool = json!({ "stop_reason": "tool_use", "content": [
            { "type": "text", "text": "{\"doc.3.chosen.summary\": 1}" },
            { "type": "tool_use", "name": "choose", "input": { "doc.3.chosen.summary": 2 } } ] });
        assert_eq!(reading("tool").replies(&tool, 1), [Reply::Label(2)]);
        assert_eq!(reading("tool").replies(&answer("{\"doc.3.chosen.summary\": 1}"), 1), [Reply::Unparsable]);
        let mut rest = answer(" 1, \"doc.4.chosen.summary\": 2");
        assert_eq!(reading("prefill").replies(&rest, 2), [Reply::Unparsable; 2]);
        rest["stop_reason"] = "stop_sequence".into();
        assert_eq!(reading("prefill").replies(&rest, 2), [Reply::Label(1), Reply::Label(2)]);
        assert_eq!(reading("prefill").replies(&answer(" 2}"), 1), [Reply::Label(2)]);
    }

    #[test]
    fn a_reason_is_one_short_line() {
        let schema = reading("schema");
        let refused = json!({ "stop_reason": "refusal", "stop_details": { "category": "cyber", "explanation": "no\u{1b}[31m\nway" } });
        assert_eq!(schema.reason(Reply::Refused, &refused), "cyber: no[31m / way");
        let truncated = json!({ "stop_reason": "max_tokens", "usage": { "output_tokens": 9 } });
        assert_eq!(schema.reason(Reply::Truncated, &truncated), "cut off (max_tokens) after 9 tokens");
        let long = schema.reason(Reply::Unparsable, &answer(&"x".repeat(1000)));
        assert!(long.starts_with("no choice for it in `xxx") && long.chars().count() < 310, "{long}");
    }
}
