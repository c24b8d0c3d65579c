//! `temper config`: prints the pipeline with profiles and `--set` applied, as a pipeline file that plans to the same keys.

use std::cell::RefCell;
use std::path::Path;

use engine::error::{Error, Result};
use engine::graph::Options;
use engine::kind::Registry;
use engine::spec::Effective;
use engine::spec::node::{Entry, Map, Node, Value, resolve};
use engine::text::steers_terminal;
use serde::ser::{Serialize, SerializeMap, Serializer};
use serde_yaml::FlowSeq;

use super::Done;
use crate::args::Changes;
use crate::output;

const HEADER: &str = "\
# Profiles and `--set` are applied. Relative paths start from the folder of this file: keep it where the original is.
";
/// Longest list that is written on one line, in bytes.
const ONE_LINE: usize = 100;

pub fn config(file: &Path, changes: &Changes, registry: &Registry) -> Done {
    let options = Options { profiles: changes.profile.clone(), set: changes.set.clone(), until: Vec::new() };
    let effective = engine::graph::effective(file, &options, registry)?;
    put!("{HEADER}{}", yaml(&effective)?);
    Ok(0)
}

/// The pipeline as YAML. Numbers keep their spelling, because the spelling of a matrix label is its name.
fn yaml(effective: &Effective) -> Result<String> {
    let write = |marks: Option<&Marks>| {
        // YAML 1.2 decides what needs quotes, as it decides how the file is read. Texts of several lines are quoted too:
        // in blocks, spaces and line ends at their borders would depend on the indentation.
        let options = serde_yaml::ser_options! { yaml_12: true, no_lang_directive: true, prefer_block_scalars: false };
        serde_yaml::to_string_with_options(&Tree { effective, node: &effective.root, marks }, options)
            .map_err(|e| Error::ours(format!("the pipeline cannot be written as YAML: {e}")))
    };
    let mut word = "mark".to_owned();
    let unmarked = write(None)?;
    while unmarked.contains(&word) {
        word.push('k');
    }
    let marks = Marks { word, texts: RefCell::default() };
    let marked = write(Some(&marks))?;
    Ok(marks.replaced(&marked))
}

/// Stand-ins for texts that the serialiser would write in another form.
struct Marks {
    /// Occurs nowhere else in the document.
    word: String,
    texts: RefCell<Vec<String>>,
}

impl Marks {
    /// The mark of `text`, a word that needs no quotes.
    fn put(&self, text: String) -> String {
        let mut texts = self.texts.borrow_mut();
        texts.push(text);
        format!("{}{}x", self.word, texts.len() - 1)
    }

    /// The document with each mark replaced by its text.
    fn replaced(&self, document: &str) -> String {
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
struct Tree<'a> {
    effective: &'a Effective,
    node: &'a Node,
    marks: Option<&'a Marks>,
}

impl Tree<'_> {
    /// The mark that stands for a scalar or a key, if it needs one. `written`: its spelling in the file or in a `--set`
    /// argument.
    fn mark(&self, value: &Value, written: &str) -> Option<String> {
        let text = match value {
            Value::Bool(_) | Value::Int(_) | Value::Float(_) if resolve(written).as_ref() == Ok(value) => {
                written.to_owned()
            }
            // A JSON string is a YAML string.
            Value::Str(text) if text.contains(steers_terminal) => output::json(text).ok()?,
            _ => return None,
        };
        Some(self.marks?.put(text))
    }
}

impl Serialize for Tree<'_> {
    fn serialize<S: Serializer>(&self, s: S) -> std::result::Result<S::Ok, S::Error> {
        let value = &self.node.value;
        if let Some(mark) = self.mark(value, self.effective.written(self.node.span)) {
            return s.serialize_str(&mark);
        }
        let of = |node| Tree { node, ..*self };
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
                    let is_plain = self.effective.written(*key_span) == key;
                    let read = if is_plain { resolve(key).ok() } else { None };
                    let mark = self.mark(&read.unwrap_or_else(|| Value::Str(key.clone())), key);
                    map.serialize_entry(mark.as_ref().unwrap_or(key), &of(value))?;
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

    fn effective(text: &str) -> Effective {
        let mut sources = Diagnostics::default();
        sources.add_source("p.yaml", text);
        Effective::of(0, &[], &[], sources).unwrap_or_else(|| panic!("faults in {text}"))
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
        fn what_is_written_reads_back_and_steers_no_terminal(with in value()) {
            // JSON is YAML, once characters that YAML does not print are escaped.
            let json: String = with.to_string().chars().map(|c| match u32::from(c) {
                code @ (0x7f..=0x9f | 0xfffe | 0xffff | 0xfeff | 0x2028 | 0x2029) => format!("\\u{code:04x}"),
                _ => c.to_string(),
            }).collect();
            let before = effective(&format!("version: 1\nstages: {{ a: {{ uses: x, with: {json} }} }}\n"));
            let text = yaml(&before).expect("it can be written");
            prop_assert!(!text.contains(steers_terminal), "{}", text);
            prop_assert_eq!(bare(&effective(&text).root), bare(&before.root), "{}", text);
        }
    }

    #[test]
    fn numbers_keep_their_spelling_and_texts_that_look_like_numbers_their_quotes() {
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
