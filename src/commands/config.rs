//! `temper config`: prints the pipeline with profiles and `--set` applied, as a pipeline file that plans to the same keys.

use std::cell::RefCell;
use std::path::Path;

use engine::document::EffectivePipeline;
use engine::document::node::{Entry, Map, Node, Value, resolve};
use engine::error::{Error, Result};
use engine::graph::LoadOptions;
use engine::kind::Registry;
use engine::text::is_terminal_control;
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_yaml::FlowSeq;

use super::CommandResult;
use crate::args::ChangeArgs;
use crate::output;

const HEADER: &str = "\
# Profiles and `--set` are applied. Relative paths start from the folder of this file: keep it where the original is.
";
/// Longest list that is written on one line, in bytes.
const ONE_LINE: usize = 100;

pub fn config(file: &Path, changes: &ChangeArgs, registry: &Registry) -> CommandResult {
    let options = LoadOptions { profiles: changes.profile.clone(), set: changes.set.clone(), ..LoadOptions::default() };
    let effective = engine::graph::effective(file, &options, registry)?;
    out!("{HEADER}{}", yaml(&effective)?);
    Ok(0)
}

/// The pipeline as YAML. Numbers keep their spelling, because the spelling of a matrix label is its name.
fn yaml(pipeline: &EffectivePipeline) -> Result<String> {
    let write = |placeholders: Option<&Placeholders>| {
        // YAML 1.2 because the file is read as YAML 1.2. Texts of several lines are quoted: in a block, leading and
        // trailing whitespace would depend on the indentation.
        let options = serde_yaml::ser_options! { yaml_12: true, no_lang_directive: true, prefer_block_scalars: false };
        serde_yaml::to_string_with_options(&YamlNode { pipeline, node: &pipeline.root, placeholders }, options)
            .map_err(|e| Error::internal(format!("the pipeline cannot be written as YAML: {e}")))
    };
    let mut word = "mark".to_owned();
    let plain = write(None)?;
    while plain.contains(&word) {
        word.push('k');
    }
    let placeholders = Placeholders { word, texts: RefCell::default() };
    let document = write(Some(&placeholders))?;
    Ok(placeholders.restore(&document))
}

/// Placeholders for texts that the serialiser would write in another form.
struct Placeholders {
    /// Occurs nowhere else in the document.
    word: String,
    texts: RefCell<Vec<String>>,
}

impl Placeholders {
    /// Returns the placeholder of `text`, a word that needs no quotes.
    fn insert(&self, text: String) -> String {
        let mut texts = self.texts.borrow_mut();
        texts.push(text);
        format!("{}{}x", self.word, texts.len() - 1)
    }

    /// Replaces each placeholder in the document by its text.
    fn restore(&self, document: &str) -> String {
        let texts = self.texts.borrow();
        let mut parts = document.split(&self.word);
        let mut whole = parts.next().unwrap_or_default().to_owned();
        for part in parts {
            let (index, rest) = part.split_once('x').unwrap_or_default();
            whole.extend([index.parse().ok().and_then(|at: usize| texts.get(at)).map_or("", String::as_str), rest]);
        }
        whole
    }
}

/// A value of the pipeline, to be serialised.
#[derive(Clone, Copy)]
struct YamlNode<'a> {
    pipeline: &'a EffectivePipeline,
    node: &'a Node,
    placeholders: Option<&'a Placeholders>,
}

impl YamlNode<'_> {
    /// The placeholder of a scalar or a key, if it needs one. `written`: its spelling in the file or in a `--set`
    /// argument.
    fn placeholder(&self, value: &Value, written: &str) -> Option<String> {
        let text = match value {
            Value::Bool(_) | Value::Int(_) | Value::Float(_) if resolve(written).as_ref() == Ok(value) => {
                written.to_owned()
            }
            // A JSON string is a YAML string.
            Value::Str(text) if text.contains(is_terminal_control) => output::json(text).ok()?,
            _ => return None,
        };
        Some(self.placeholders?.insert(text))
    }
}

impl Serialize for YamlNode<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        let value = &self.node.value;
        if let Some(placeholder) = self.placeholder(value, self.pipeline.source_text(self.node.span)) {
            return s.serialize_str(&placeholder);
        }
        let of = |node| YamlNode { node, ..*self };
        match value {
            Value::Null => s.serialize_unit(),
            Value::Bool(b) => s.serialize_bool(*b),
            Value::Int(n) => s.serialize_i128(*n),
            Value::Float(x) => s.serialize_f64(*x),
            Value::Str(text) => s.serialize_str(text),
            Value::List(items) if fits_a_line(items) => FlowSeq(items.iter().map(of).collect::<Vec<_>>()).serialize(s),
            Value::List(items) => s.collect_seq(items.iter().map(of)),
            Value::Map(Map(entries)) => {
                let mut map = s.serialize_map(Some(entries.len()))?;
                for Entry { key, key_span, value } in entries {
                    // A key without quotes may be the label of a number.
                    let is_plain = self.pipeline.source_text(*key_span) == key;
                    let read = if is_plain { resolve(key).ok() } else { None };
                    let placeholder = self.placeholder(&read.unwrap_or_else(|| Value::Str(key.clone())), key);
                    map.serialize_entry(placeholder.as_ref().unwrap_or(key), &of(value))?;
                }
                map.end()
            }
        }
    }
}

/// Whether a list has only scalars, on one short line.
fn fits_a_line(items: &[Node]) -> bool {
    let length = |item: &Node| match &item.value {
        Value::List(_) | Value::Map(_) => None,
        Value::Str(text) => Some(text.len() + 2),
        _ => Some(8),
    };
    items.iter().map(length).sum::<Option<usize>>().is_some_and(|sum| sum <= ONE_LINE)
}

#[cfg(test)]
mod tests {
    use engine::diagnostics::{Diagnostics, Span};
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn effective(text: &str) -> EffectivePipeline {
        let mut sources = Diagnostics::default();
        sources.add_source("p.yaml", text);
        EffectivePipeline::new(0, &[], &[], sources).unwrap_or_else(|| panic!("faults in {text}"))
    }

    /// The tree without source positions.
    fn bare(node: &Node) -> Node {
        let value = match &node.value {
            Value::List(items) => Value::List(items.iter().map(bare).collect()),
            Value::Map(Map(entries)) => {
                let bare = |e: &Entry| Entry { key: e.key.clone(), key_span: Span::default(), value: bare(&e.value) };
                Value::Map(Map(entries.iter().map(bare).collect()))
            }
            scalar => scalar.clone(),
        };
        Node { span: Span::default(), value }
    }

    fn value() -> impl Strategy<Value = serde_json::Value> {
        let text = prop_oneof![
            "(?s).{0,12}",
            "[a-z\n :#'\",-]{0,120}",
            prop::sample::select(vec![
                "", "~", "null", "true", "1", "0x1f", "1.0e-3", "<<", "-", "no", "${x}", "a: b", "\u{202e}"
            ])
            .prop_map(str::to_owned),
        ];
        let leaf = prop_oneof![
            Just(json!(null)),
            any::<bool>().prop_map(|b| json!(b)),
            any::<i64>().prop_map(|n| json!(n)),
            prop::num::f64::NORMAL.prop_map(|x| json!(x)),
            text.clone().prop_map(|s| json!(s)),
        ];
        leaf.prop_recursive(4, 24, 4, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(|items| json!(items)),
                prop::collection::hash_map(text.clone(), inner, 0..4).prop_map(|map| json!(map)),
            ]
        })
    }

    proptest! {
        #[test]
        fn output_reads_back_and_has_no_terminal_controls(with in value()) {
            // JSON is YAML, once characters that YAML does not print are escaped.
            let json: String = with.to_string().chars().map(|c| match u32::from(c) {
                code @ (0x7f..=0x9f | 0xfffe | 0xffff | 0xfeff | 0x2028 | 0x2029) => format!("\\u{code:04x}"),
                _ => c.to_string(),
            }).collect();
            let before = effective(&format!("version: 1\nstages: {{ a: {{ uses: x, with: {json} }} }}\n"));
            let text = yaml(&before).expect("it can be written");
            prop_assert!(!text.contains(is_terminal_control), "{}", text);
            prop_assert_eq!(bare(&effective(&text).root), bare(&before.root), "{}", text);
        }
    }

    #[test]
    fn numbers_keep_their_spelling_and_strings_like_numbers_keep_their_quotes() {
        let text = "\
version: 1
targets: [a]
stages:
  a:
    uses: x
    matrix:
      n: [0x10, 1.0e-3, True, \"5\", b]
      m:
        1.50:
          seed: 7
        b: null
    with:
      note: two lines,\\nquoted
      empty: {}
";
        assert_eq!(yaml(&effective(text)).unwrap(), text);
        let quoted = effective("version: 1\nstages: { a: { matrix: { m: { '1': { seed: 2 } } } } }\n");
        let text = yaml(&quoted).unwrap();
        assert!(text.contains("\"1\""), "{text}");
        assert_eq!(bare(&effective(&text).root), bare(&quoted.root), "{text}");
    }
}
