//! The tree of values with source positions that YAML is parsed into.

use crate::diagnostics::Span;
use crate::names::MAX_NAME_BYTES;

/// A value and its source position.
#[derive(Clone, Debug, PartialEq)]
pub struct Node {
    pub span: Span,
    pub value: Value,
}

#[derive(Clone, Debug, PartialEq)]
pub enum Value {
    Null,
    Bool(bool),
    /// Between `i64::MIN` and `u64::MAX`.
    Int(i128),
    /// Finite.
    Float(f64),
    Str(String),
    List(Vec<Node>),
    Map(Map),
}

/// Entries in the order of the file; keys are unique.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Map(pub Vec<Entry>);

#[derive(Clone, Debug, PartialEq)]
pub struct Entry {
    pub key: String,
    pub key_span: Span,
    pub value: Node,
}

/// Memory that a value takes besides its text.
pub const VALUE_BYTES: usize = size_of::<Entry>();

impl Node {
    pub fn map(span: Span) -> Self {
        Self { span, value: Value::Map(Map::default()) }
    }

    pub fn as_map(&self) -> Option<&Map> {
        match &self.value {
            Value::Map(map) => Some(map),
            _ => None,
        }
    }

    /// Approximate upper bound of the memory that the node takes once variables are filled in.
    pub fn bytes(&self) -> usize {
        VALUE_BYTES
            + match &self.value {
                Value::Str(text) => text.len() + text.matches("${").count() * MAX_NAME_BYTES,
                Value::List(items) => items.iter().map(Self::bytes).sum(),
                Value::Map(map) => map.bytes(),
                _ => 0,
            }
    }

    pub fn is_null(&self) -> bool {
        self.value == Value::Null
    }

    /// The type of the value, for messages: `a list`, `text`, …
    pub fn type_name(&self) -> &'static str {
        match self.value {
            Value::Null => "nothing",
            Value::Bool(_) => "a boolean",
            Value::Int(_) | Value::Float(_) => "a number",
            Value::Str(_) => "text",
            Value::List(_) => "a list",
            Value::Map(_) => "a map",
        }
    }
}

impl Map {
    /// See [`Node::bytes`].
    pub fn bytes(&self) -> usize {
        self.0.iter().map(|entry| entry.key.len() + entry.value.bytes()).sum()
    }

    pub fn position(&self, key: &str) -> Option<usize> {
        self.0.iter().position(|entry| entry.key == key)
    }

    pub fn entry(&self, key: &str) -> Option<&Entry> {
        self.0.iter().find(|entry| entry.key == key)
    }

    pub fn get(&self, key: &str) -> Option<&Node> {
        self.entry(key).map(|entry| &entry.value)
    }

    pub fn remove(&mut self, key: &str) {
        self.0.retain(|entry| entry.key != key);
    }

    /// Replaces the entry with the same key, or appends `entry`.
    pub fn put(&mut self, entry: Entry) {
        match self.position(&entry.key) {
            Some(at) => self.0[at] = entry,
            None => self.0.push(entry),
        }
    }

    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|entry| entry.key.as_str())
    }
}

/// Resolves a plain scalar by the core schema of YAML 1.2.
///
/// # Errors
/// When a number is not finite or does not fit into 64 bits.
pub fn resolve(text: &str) -> Result<Value, &'static str> {
    match text {
        "" | "~" | "null" | "Null" | "NULL" => return Ok(Value::Null),
        "true" | "True" | "TRUE" => return Ok(Value::Bool(true)),
        "false" | "False" | "FALSE" => return Ok(Value::Bool(false)),
        _ => {}
    }
    let unsigned = text.strip_prefix(['+', '-']).unwrap_or(text);
    if !unsigned.starts_with(|c: char| c.is_ascii_digit() || c == '.') {
        return Ok(Value::Str(text.to_owned()));
    }
    if matches!(unsigned, ".inf" | ".Inf" | ".INF") || matches!(text, ".nan" | ".NaN" | ".NAN") {
        return Err("a number must be finite");
    }
    let digits = |s: &str, radix| !s.is_empty() && s.chars().all(|c| c.is_digit(radix));
    let integer = if digits(unsigned, 10) {
        text.parse::<i128>().ok()
    } else if let Some(hex) = text.strip_prefix("0x").filter(|s| digits(s, 16)) {
        i128::from_str_radix(hex, 16).ok()
    } else if let Some(octal) = text.strip_prefix("0o").filter(|s| digits(s, 8)) {
        i128::from_str_radix(octal, 8).ok()
    } else {
        return if is_float(unsigned) {
            // Rust parses every float of the core schema.
            let value: f64 = text.parse().map_err(|_| "not a number")?;
            if value.is_finite() { Ok(Value::Float(value)) } else { Err("a number must be finite") }
        } else {
            Ok(Value::Str(text.to_owned()))
        };
    };
    integer
        .filter(|n| (i128::from(i64::MIN)..=i128::from(u64::MAX)).contains(n))
        .map(Value::Int)
        .ok_or("an integer must fit into 64 bits")
}

/// Whether `unsigned` matches `(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?`.
fn is_float(unsigned: &str) -> bool {
    let (mantissa, exponent) = match unsigned.split_once(['e', 'E']) {
        Some((mantissa, exponent)) => (mantissa, Some(exponent)),
        None => (unsigned, None),
    };
    let digits = |s: &str| s.bytes().all(|b| b.is_ascii_digit());
    let (whole, part) = mantissa.split_once('.').unwrap_or((mantissa, "0"));
    let exponent = exponent.map(|e| e.strip_prefix(['+', '-']).unwrap_or(e));
    digits(whole)
        && digits(part)
        && !(whole.is_empty() && part.is_empty())
        && exponent.is_none_or(|e| !e.is_empty() && digits(e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn scalars_resolve_by_the_core_schema() {
        let str = |s: &str| Ok(Value::Str(s.to_owned()));
        let cases = [
            ("", Ok(Value::Null)),
            ("~", Ok(Value::Null)),
            ("yes", str("yes")),
            ("True", Ok(Value::Bool(true))),
            ("012", Ok(Value::Int(12))),
            ("0o17", Ok(Value::Int(15))),
            ("0xff", Ok(Value::Int(255))),
            ("-3", Ok(Value::Int(-3))),
            ("18446744073709551615", Ok(Value::Int(u64::MAX.into()))),
            ("18446744073709551616", Err("an integer must fit into 64 bits")),
            ("1e-5", Ok(Value::Float(1e-5))),
            (".5", Ok(Value::Float(0.5))),
            ("5.", Ok(Value::Float(5.0))),
            (".", str(".")),
            ("1_000", str("1_000")),
            ("1.2.3", str("1.2.3")),
            ("1e", str("1e")),
            ("-.inf", Err("a number must be finite")),
            ("1e999", Err("a number must be finite")),
            ("sft", str("sft")),
            ("-", str("-")),
        ];
        for (text, expected) in cases {
            assert_eq!(resolve(text), expected, "{text}");
        }
    }
}
