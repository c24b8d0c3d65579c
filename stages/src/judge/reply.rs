//! Parses the model's answer for each document. Pure: cached answers can be parsed again at no cost when the parser
//! improves.

use serde_json::Value;

use super::params::Choice;
use super::request::{TOOL, beginning, field};
use super::settings::Settings;
use crate::table::cut;
use crate::text::clean::printable;
use crate::types::Outcome;

/// The result for one document.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reply {
    /// Position of the better summary, 1 or 2.
    Label(u8),
    Refused,
    Truncated,
    Unparsable,
    /// The API rejected the request.
    Failed,
}

impl Reply {
    pub fn outcome(self) -> Outcome {
        match self {
            Self::Label(_) => Outcome::Labelled,
            Self::Refused => Outcome::Refused,
            Self::Truncated => Outcome::Truncated,
            Self::Unparsable => Outcome::Unparsable,
            Self::Failed => Outcome::Failed,
        }
    }
}

/// Whether a JSON value is a message of the API. Gateways also send error documents with status 200.
pub fn is_message(answer: &Value) -> bool {
    answer["type"] == "message" && answer["content"].is_array()
}

/// How to parse an answer.
#[derive(Clone, Copy, Debug)]
pub struct Reading {
    choice: Choice,
    /// The number of the first document.
    first: usize,
}

impl Reading {
    pub fn of(settings: &Settings) -> Self {
        Self { choice: settings.choice, first: settings.first() }
    }

    /// The results for each of `n` documents. The stop reason takes precedence over the text.
    pub fn replies(self, answer: &Value, n: usize) -> Vec<Reply> {
        match answer["stop_reason"].as_str() {
            Some("refusal") => return vec![Reply::Refused; n],
            Some("max_tokens" | "model_context_window_exceeded") => return vec![Reply::Truncated; n],
            _ => {}
        }
        let choices = self.choices(answer);
        let place = |i: usize| match choices.get(field(self.first + i))? {
            Value::Number(n) => n.as_u64(),
            Value::String(s) => s.trim().parse().ok(),
            _ => None,
        };
        let reply = |i: usize| match place(i) {
            Some(1) => Reply::Label(1),
            Some(2) => Reply::Label(2),
            _ => Reply::Unparsable,
        };
        (0..n).map(reply).collect()
    }

    /// The map of choices; null if there is none.
    fn choices(self, answer: &Value) -> Value {
        if self.choice == Choice::Tool {
            let called = blocks(answer).iter().rev().find(|block| block["type"] == "tool_use" && block["name"] == TOOL);
            return called.map_or(Value::Null, |block| block["input"].clone());
        }
        let Some(text) = text(answer) else { return Value::Null };
        let whole = match self.choice {
            // The stop sequence removes the closing brace, if the model wrote it.
            Choice::Prefill if answer["stop_reason"] == "stop_sequence" => format!("{}{text}}}", beginning(self.first)),
            Choice::Prefill => format!("{}{text}", beginning(self.first)),
            Choice::Schema | Choice::Tool => text,
        };
        serde_json::from_str(whole.trim()).unwrap_or(Value::Null)
    }

    /// A one-line reason why there is no label.
    pub fn reason(self, reply: Reply, answer: &Value) -> Option<String> {
        let line = match reply {
            Reply::Label(_) => return None,
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
            Reply::Unparsable if self.choice == Choice::Tool => format!("no choice for it in {}", answer["content"]),
            Reply::Unparsable => {
                text(answer).map_or("no block of text".to_owned(), |text| format!("no choice for it in `{text}`"))
            }
            Reply::Failed => "the request failed".to_owned(),
        };
        Some(cut(&printable(&line), 300))
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
    use crate::judge::request::tests::settings;

    fn reading(choice: &str) -> Reading {
        Reading::of(&settings(json!({ "choice": choice })))
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
        assert_eq!(reading("schema").reason(Reply::Unparsable, &none).unwrap(), "no block of text");
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
        assert_eq!(schema.reason(Reply::Refused, &refused).unwrap(), "cyber: no[31m / way");
        let truncated = json!({ "stop_reason": "max_tokens", "usage": { "output_tokens": 9 } });
        assert_eq!(schema.reason(Reply::Truncated, &truncated).unwrap(), "cut off (max_tokens) after 9 tokens");
        let long = schema.reason(Reply::Unparsable, &answer(&"x".repeat(1000))).unwrap();
        assert!(long.starts_with("no choice for it in `xxx") && long.chars().count() < 310, "{long}");
        assert_eq!(schema.reason(Reply::Label(1), &truncated), None);
    }
}
