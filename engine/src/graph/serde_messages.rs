//! Rewrites serde's messages in plain words.

use super::schema_view::SchemaView;
use crate::diagnostics::nearest;

/// The message for users, and help if there is any.
pub fn rewrite(message: &str, view: Option<&SchemaView>) -> (String, Option<String>) {
    if view.is_some_and(SchemaView::is_path) && message.contains("Either") {
        return ("expected a path".into(), None);
    }
    let typed = message.strip_prefix("invalid type: ").or_else(|| message.strip_prefix("invalid value: "));
    if let Some((found, expected)) = typed.and_then(|rest| rest.rsplit_once(", expected ")) {
        let truth =
            expected == "a boolean" && ["yes", "no", "on", "off"].iter().any(|w| found.contains(&format!("\"{w}\"")));
        let bare =
            expected == "a string" && ["integer", "floating", "boolean"].iter().any(|what| found.starts_with(what));
        let help = match (truth, bare) {
            (true, _) => Some("YAML booleans are `true` and `false`".to_owned()),
            (_, true) => Some("put the value in quotes".to_owned()),
            _ => None,
        };
        return (format!("expected {}, found {}", expected_text(expected), found_text(found)), help);
    }
    for (start, what) in [("unknown variant `", "value"), ("unknown field `", "parameter")] {
        if let Some((word, rest)) = message.strip_prefix(start).and_then(|rest| rest.split_once('`')) {
            let words: Vec<&str> = rest.split('`').skip(1).step_by(2).collect();
            let listed: Vec<String> = words.iter().map(|w| format!("`{w}`")).collect();
            let help = nearest(word, words.iter().copied()).map(|near| format!("did you mean `{near}`?"));
            let help = help.or((!listed.is_empty()).then(|| format!("expected one of {}", listed.join(", "))));
            return (format!("unknown {what} `{word}`"), help);
        }
    }
    (message.to_owned(), None)
}

fn expected_text(expected: &str) -> String {
    match expected {
        "f64" | "f32" => "a number".into(),
        "u8" | "u16" | "u32" | "u64" | "usize" => "a whole number, at least 0".into(),
        "i8" | "i16" | "i32" | "i64" | "isize" => "a whole number".into(),
        "a string" | "a borrowed string" => "text".into(),
        "a boolean" => "true or false".into(),
        "a sequence" => "a list".into(),
        "path string" => "a path".into(),
        "string or map" => "text or a map".into(),
        _ if expected.starts_with("a nonzero ") => "a whole number, at least 1".into(),
        _ if expected.starts_with("struct ")
            || expected == "a map"
            || expected.starts_with("internally tagged enum ") =>
        {
            "a map".into()
        }
        other => other.into(),
    }
}

fn found_text(found: &str) -> String {
    match found.split_once(' ') {
        Some(("string", text)) => format!("text {text}"),
        Some(("integer" | "boolean", value)) => value.into(),
        Some(("floating", rest)) => rest.strip_prefix("point ").unwrap_or(rest).into(),
        _ => match found {
            "null" | "unit value" => "nothing".into(),
            "map" => "a map".into(),
            "sequence" => "a list".into(),
            other => other.into(),
        },
    }
}
