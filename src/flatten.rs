//! Parameters as a list of paths and values.

use serde_json::Value;

/// Every leaf of a value with its path, such as `lora.rank`, as text. A list is one leaf.
pub fn flatten(value: &Value) -> Vec<(String, String)> {
    let mut leaves = Vec::new();
    collect("", value, &mut leaves);
    leaves
}

fn collect(path: &str, value: &Value, leaves: &mut Vec<(String, String)>) {
    match value {
        Value::Object(fields) if !fields.is_empty() => {
            for (name, value) in fields {
                let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
                collect(&path, value, leaves);
            }
        }
        Value::Object(_) if path.is_empty() => {}
        Value::String(text) => leaves.push((path.to_owned(), text.clone())),
        other => leaves.push((path.to_owned(), other.to_string())),
    }
}
