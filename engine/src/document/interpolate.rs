//! Parsing and substitution of `${name}` in text.

use std::borrow::Cow;

use super::node::{Node, Value};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TextPart<'a> {
    Text(&'a str),
    Variable(&'a str),
    /// `${` without a closing `}`.
    Unclosed(&'a str),
}

/// Splits `text` into its parts; `$${` is an escaped `${`.
pub fn parts(text: &str) -> Vec<TextPart<'_>> {
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        if rest[..at].ends_with('$') {
            parts.extend([TextPart::Text(&rest[..at - 1]), TextPart::Text("${")]);
            rest = &rest[at + 2..];
            continue;
        }
        parts.push(TextPart::Text(&rest[..at]));
        let Some(length) = rest[at..].find('}') else {
            parts.push(TextPart::Unclosed(&rest[at..]));
            return parts;
        };
        parts.push(TextPart::Variable(&rest[at + 2..at + length]));
        rest = &rest[at + length + 1..];
    }
    parts.push(TextPart::Text(rest));
    parts.retain(|part| *part != TextPart::Text(""));
    parts
}

/// A variable's name and values.
#[derive(Clone, Copy, Debug)]
pub struct Variable<'a> {
    pub name: &'a str,
    /// The text to insert into surrounding text.
    pub text: &'a str,
    /// The value if the variable stands alone; always a scalar.
    pub value: &'a Value,
}

/// `text` with its variables filled in; unknown variables stay as they are.
pub fn substitute<'t>(text: &'t str, variables: &[Variable<'_>]) -> Cow<'t, str> {
    if !text.contains("${") {
        return Cow::Borrowed(text);
    }
    let mut filled = String::with_capacity(text.len());
    for part in parts(text) {
        match part {
            TextPart::Text(text) | TextPart::Unclosed(text) => filled.push_str(text),
            TextPart::Variable(name) => match variables.iter().find(|v| v.name == name) {
                Some(variable) => filled.push_str(variable.text),
                None => filled.extend(["${", name, "}"]),
            },
        }
    }
    Cow::Owned(filled)
}

/// The value with its variables filled in; if the whole text is `"${x}"`, the result has the type of x.
pub fn value<'a>(value: &'a Value, variables: &[Variable<'a>]) -> Cow<'a, Value> {
    let Value::Str(text) = value else { return Cow::Borrowed(value) };
    if !text.contains("${") {
        return Cow::Borrowed(value);
    }
    match parts(text).as_slice() {
        [TextPart::Variable(name)] => match variables.iter().find(|v| v.name == *name) {
            Some(variable) => Cow::Borrowed(variable.value),
            None => Cow::Borrowed(value),
        },
        _ => Cow::Owned(Value::Str(substitute(text, variables).into_owned())),
    }
}

/// The tree as JSON, with variables filled in. Recursion is safe: YAML limits the depth.
pub fn json(node: &Node, variables: &[Variable<'_>]) -> serde_json::Value {
    match value(&node.value, variables).as_ref() {
        Value::Null => serde_json::Value::Null,
        Value::Bool(b) => (*b).into(),
        // An `Int` fits into u64 or i64, see `Value::Int`.
        Value::Int(n) => u64::try_from(*n).map_or_else(|_| (*n as i64).into(), Into::into),
        Value::Float(x) => (*x).into(),
        Value::Str(s) => s.as_str().into(),
        Value::List(items) => items.iter().map(|item| json(item, variables)).collect(),
        Value::Map(map) => map.0.iter().map(|e| (e.key.clone(), json(&e.value, variables))).collect(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::diagnostics::Span;

    #[test]
    fn a_variable_alone_takes_its_type_and_embedded_becomes_text() {
        let (five, half) = (Value::Int(5), Value::Float(0.5));
        let variables =
            [Variable { name: "n", text: "5", value: &five }, Variable { name: "x", text: "0.50", value: &half }];
        let cases = [
            ("${n}", "5"),
            ("${x}", "0.5"),
            ("a${n}-${x}", "\"a5-0.50\""),
            ("$${n}", "\"${n}\""),
            ("$${${n}}", "\"${5}\""),
            ("$n $$ {n}", "\"$n $$ {n}\""),
            ("${n}${n}", "\"55\""),
            ("${absent}", "\"${absent}\""),
        ];
        for (text, expected) in cases {
            let node = Node { span: Span::default(), value: Value::Str(text.to_owned()) };
            assert_eq!(json(&node, &variables).to_string(), expected, "{text}");
        }
    }
}
