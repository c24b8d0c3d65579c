//! Builds a tree with source positions from YAML events; resolves aliases and merge keys, with limits on depth and
//! memory.

use std::borrow::Cow;
use std::collections::HashMap;

use granit_parser::{Event, Parser, ScalarStyle, Tag};

use super::node::{Entry, Map, Node, VALUE_BYTES, Value, resolve};
use crate::diagnostics::{Diagnostic, Diagnostics, Span};

/// Deepest nesting of lists and maps.
pub const MAX_DEPTH: usize = 64;
/// Maximum memory for the values of a file, including copies made by aliases.
pub const MAX_BYTES: usize = 64 << 20;

/// Parses the single document in `text`, which starts at byte `offset` of source number `source`. Returns `None` after
/// a fault that leaves no tree; after other faults, a tree without the faulty parts.
pub fn parse(source: u32, text: &str, offset: usize, faults: &mut Diagnostics) -> Option<Node> {
    let mut options = granit_parser::options! { emit_unresolved_aliases: true };
    options.set_emit_comments(false);
    let mut builder = Builder {
        source,
        offset,
        open: Vec::new(),
        anchors: HashMap::new(),
        bytes: 0,
        root: None,
        documents: 0,
        faults,
    };
    for event in Parser::new_from_str_with_options(text, options) {
        let next = match event {
            Ok((event, span)) => builder.event(event, span),
            Err(e) => {
                let at = e.marker().byte_offset().unwrap_or(text.len()).min(text.len());
                // Report the end of the text behind its last word, not on the empty line that follows.
                let at = if text[at..].trim().is_empty() { text.trim_end().len() } else { at };
                let span = Span { source, start: (offset + at) as u32, length: 1 };
                builder.faults.push(Diagnostic::new(span, format!("invalid YAML: {}", e.info())));
                None
            }
        };
        next?;
    }
    builder.root.map(|sized| sized.node)
}

/// A finished node with the sizes that its aliases need.
#[derive(Clone)]
struct SizedNode {
    node: Node,
    /// Memory taken by the node.
    bytes: usize,
    /// Nesting depth of lists and maps.
    depth: usize,
    /// Whether it is an unquoted scalar.
    plain: bool,
}

struct OpenNode {
    span: Span,
    anchor: usize,
    bytes: usize,
    depth: usize,
    content: OpenContent,
}

enum OpenContent {
    List(Vec<Node>),
    Map { entries: Vec<Entry>, key: Option<MapKey> },
}

enum MapKey {
    Text(String, Span),
    /// `<<`
    Merge(Span),
    /// A key whose fault has been reported; its value is dropped.
    Faulty,
}

struct Builder<'a> {
    source: u32,
    offset: usize,
    open: Vec<OpenNode>,
    anchors: HashMap<usize, SizedNode>,
    /// Memory of all values so far, including the copies that anchors keep for aliases.
    bytes: usize,
    root: Option<SizedNode>,
    documents: usize,
    faults: &'a mut Diagnostics,
}

/// Key under which merge entries are kept until their map ends; no key of a file can be equal to it.
const MERGE: &str = "<<\0";

impl Builder<'_> {
    /// Returns `None` if parsing cannot continue.
    fn event(&mut self, event: Event<'_>, span: granit_parser::Span) -> Option<()> {
        let bytes = span.byte_range().unwrap_or(0..0);
        let start = (self.offset + bytes.start) as u32;
        let span = Span { source: self.source, start, length: (bytes.end - bytes.start) as u32 };
        match event {
            Event::DocumentStart(..) => {
                self.documents += 1;
                if self.documents > 1 {
                    return self.stop(span, "expected one YAML document, found a second");
                }
            }
            Event::Scalar(text, style, anchor, tag) => {
                let value = self.scalar(&text, style, tag, span);
                let bytes = VALUE_BYTES + text.len();
                self.count_bytes(bytes, span)?;
                let plain = style == ScalarStyle::Plain;
                self.add_node(SizedNode { node: Node { span, value }, bytes, depth: 0, plain }, anchor)?;
            }
            Event::SequenceStart(_, anchor, tag) => self.begin(span, anchor, tag, OpenContent::List(Vec::new()))?,
            Event::MappingStart(_, anchor, tag) => {
                self.begin(span, anchor, tag, OpenContent::Map { entries: Vec::new(), key: None })?;
            }
            Event::SequenceEnd | Event::MappingEnd => self.end(span)?,
            Event::Alias(anchor) => {
                let Some(bytes) = self.anchors.get(&anchor).map(|sized| sized.bytes) else {
                    return self.stop(span, "an anchor cannot contain itself");
                };
                self.count_bytes(bytes, span)?;
                let sized = self.anchors[&anchor].clone();
                if self.open.len() + sized.depth > MAX_DEPTH {
                    return self.too_deep(span);
                }
                self.add_node(sized, 0)?;
            }
            Event::UnresolvedAlias(name) => {
                self.faults.push(Diagnostic::new(span, format!("no anchor `&{name}` before this alias")));
                self.add_node(
                    SizedNode { node: Node { span, value: Value::Null }, bytes: VALUE_BYTES, depth: 0, plain: false },
                    0,
                )?;
            }
            _ => {}
        }
        Some(())
    }

    fn stop(&mut self, span: Span, message: &str) -> Option<()> {
        self.faults.push(Diagnostic::new(span, message));
        None
    }

    /// Adds `bytes` to the memory count before a value is kept.
    fn count_bytes(&mut self, bytes: usize, span: Span) -> Option<()> {
        self.bytes = self.bytes.saturating_add(bytes);
        if self.bytes <= MAX_BYTES {
            return Some(());
        }
        let message = format!("the values of this file, with aliases expanded, take more than {} MiB", MAX_BYTES >> 20);
        self.stop(span, &message)
    }

    fn too_deep(&mut self, span: Span) -> Option<()> {
        self.stop(span, &format!("nested deeper than {MAX_DEPTH} levels"))
    }

    fn scalar(&mut self, text: &str, style: ScalarStyle, tag: Option<Cow<'_, Tag>>, span: Span) -> Value {
        let resolved = match tag.as_deref().map(|tag| (tag, tag.core_suffix())) {
            None if style == ScalarStyle::Plain => resolve(text),
            None | Some((_, Some("str"))) => Ok(Value::Str(text.to_owned())),
            Some((_, Some("null"))) if text.is_empty() => Ok(Value::Null),
            Some((_, Some("float"))) => resolve(text).map(|value| match value {
                Value::Int(n) => Value::Float(n as f64),
                other => other,
            }),
            Some((_, Some("int" | "bool" | "null"))) => resolve(text),
            Some((tag, _)) => {
                self.faults.push(Diagnostic::new(span, format!("tag `{}` is not supported", tag.original())));
                Ok(Value::Null)
            }
        };
        resolved.unwrap_or_else(|what| {
            self.faults.push(Diagnostic::new(span, format!("`{text}`: {what}")));
            Value::Null
        })
    }

    fn begin(&mut self, span: Span, anchor: usize, tag: Option<Cow<'_, Tag>>, content: OpenContent) -> Option<()> {
        if let Some(tag) = tag.filter(|tag| !matches!(tag.core_suffix(), Some("map" | "seq"))) {
            self.faults.push(Diagnostic::new(span, format!("tag `{}` is not supported", tag.original())));
        }
        if self.open.len() >= MAX_DEPTH {
            return self.too_deep(span);
        }
        self.count_bytes(VALUE_BYTES, span)?;
        self.open.push(OpenNode { span, anchor, bytes: VALUE_BYTES, depth: 1, content });
        Some(())
    }

    fn end(&mut self, end: Span) -> Option<()> {
        // The parser emits exactly one end for each start.
        let OpenNode { mut span, anchor, bytes, depth, content } = self.open.pop()?;
        span.length = (end.start + end.length).saturating_sub(span.start);
        let value = match content {
            OpenContent::List(items) => Value::List(items),
            OpenContent::Map { entries, .. } => Value::Map(self.finish_map(entries)),
        };
        self.add_node(SizedNode { node: Node { span, value }, bytes, depth, plain: false }, anchor)
    }

    /// Puts a finished node into the list or map that is open.
    fn add_node(&mut self, sized: SizedNode, anchor: usize) -> Option<()> {
        if anchor != 0 {
            self.count_bytes(sized.bytes, sized.node.span)?;
            self.anchors.insert(anchor, sized.clone());
        }
        let Some(parent) = self.open.last_mut() else {
            self.root = Some(sized);
            return Some(());
        };
        parent.bytes += sized.bytes;
        parent.depth = parent.depth.max(sized.depth + 1);
        let node = sized.node;
        match &mut parent.content {
            OpenContent::List(items) => items.push(node),
            OpenContent::Map { entries, key } => match key.take() {
                None => {
                    let span = node.span;
                    *key = Some(match node.value {
                        Value::Str(text) if sized.plain && text == "<<" => MapKey::Merge(span),
                        Value::Str(text) => MapKey::Text(text, span),
                        Value::List(_) | Value::Map(_) => {
                            self.faults.push(Diagnostic::new(span, "a key must be text"));
                            MapKey::Faulty
                        }
                        // Numbers, truth values and null: use the text as written.
                        _ => MapKey::Text(self.faults.slice(span).to_owned(), span),
                    });
                }
                Some(MapKey::Text(key, key_span)) => entries.push(Entry { key, key_span, value: node }),
                Some(MapKey::Merge(key_span)) => entries.push(Entry { key: MERGE.to_owned(), key_span, value: node }),
                Some(MapKey::Faulty) => {}
            },
        }
        Some(())
    }

    /// Builds a map without duplicate keys, with its merge key applied.
    fn finish_map(&mut self, entries: Vec<Entry>) -> Map {
        let mut first: HashMap<String, Span> = HashMap::with_capacity(entries.len());
        let mut unique = Vec::with_capacity(entries.len());
        let mut merges = false;
        for entry in entries {
            merges |= entry.key == MERGE;
            match first.get(&entry.key) {
                Some(before) => {
                    let shown = entry.key.trim_end_matches('\0');
                    let fault = Diagnostic::new(entry.key_span, format!("duplicate key `{shown}`"))
                        .also(*before, "first defined here");
                    self.faults.push(fault);
                }
                None => {
                    first.insert(entry.key.clone(), entry.key_span);
                    unique.push(entry);
                }
            }
        }
        if !merges {
            return Map(unique);
        }
        let mut map = Vec::with_capacity(unique.len());
        for entry in unique {
            if entry.key != MERGE {
                map.push(entry);
                continue;
            }
            for merged in self.merged(entry.value) {
                // Precedence: keys of the map itself, then earlier merged maps.
                if !first.contains_key(&merged.key) {
                    first.insert(merged.key.clone(), merged.key_span);
                    map.push(merged);
                }
            }
        }
        Map(map)
    }

    fn merged(&mut self, value: Node) -> Vec<Entry> {
        let sources = match value {
            Node { value: Value::List(items), .. } => items,
            one => vec![one],
        };
        let mut entries = Vec::new();
        for source in sources {
            match source.value {
                Value::Map(map) => entries.extend(map.0),
                _ => self.faults.push(Diagnostic::new(source.span, "`<<` takes a map or a list of maps")),
            }
        }
        entries
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Compares the tree, written as JSON-like text, or the rendered faults.
    fn check(text: &str, expected: &str) {
        let mut faults = Diagnostics::default();
        let source = faults.add_source("p.yaml", text);
        let node = parse(source, text, 0, &mut faults);
        let got = match faults.finish(node) {
            Ok(node) => show(&node),
            Err(faults) => faults.to_string(),
        };
        assert_eq!(got, expected.trim_start_matches('\n').trim_end(), "\n{got}\n");
    }

    fn show(node: &Node) -> String {
        match &node.value {
            Value::Null => "null".into(),
            Value::Bool(b) => b.to_string(),
            Value::Int(n) => n.to_string(),
            Value::Float(x) => format!("{x:?}"),
            Value::Str(s) => format!("{s:?}"),
            Value::List(items) => format!("[{}]", items.iter().map(show).collect::<Vec<_>>().join(", ")),
            Value::Map(map) => {
                let entries: Vec<_> = map.0.iter().map(|e| format!("{}: {}", e.key, show(&e.value))).collect();
                format!("{{{}}}", entries.join(", "))
            }
        }
    }

    #[test]
    fn a_document_is_parsed_into_a_tree() {
        check(
            "a: [1, 2.5, x, '3', null]\nb: { c: true }\n1: ~",
            r#"{a: [1, 2.5, "x", "3", null], b: {c: true}, 1: null}"#,
        );
        check("a: !!str 5\nb: !!float 5", r#"{a: "5", b: 5.0}"#);
    }

    #[test]
    fn aliases_and_merge_keys_apply() {
        check(
            "a: &a { x: 1, y: 2 }\nb: { <<: *a, y: 3 }\nc: *a",
            "{a: {x: 1, y: 2}, b: {x: 1, y: 3}, c: {x: 1, y: 2}}",
        );
        check(
            "a: &a { x: 1 }\nb: &b { x: 2, z: 2 }\nc: { <<: [*a, *b] }",
            "{a: {x: 1}, b: {x: 2, z: 2}, c: {x: 1, z: 2}}",
        );
    }

    #[test]
    fn a_duplicate_key_is_reported_with_both_locations() {
        check(
            "a: 1\nbc: 2\nbc: 3\n",
            "
error: duplicate key `bc`
 --> p.yaml:3:1
  |
3 | bc: 3
  | ^^
 ::: p.yaml:2:1
2 | bc: 2
  | -- first defined here
",
        );
    }

    #[test]
    fn bad_syntax_is_reported_with_its_location() {
        check(
            "a: [1, 2\nb: 3\n",
            "
error: invalid YAML: illegal placement of ':' indicator
 --> p.yaml:2:2
  |
2 | b: 3
  |  ^
",
        );
        check(
            "a: *b\nc: !thing 1",
            "
error: no anchor `&b` before this alias
 --> p.yaml:1:4
  |
1 | a: *b
  |    ^^

error: tag `!thing` is not supported
 --> p.yaml:2:11
  |
2 | c: !thing 1
  |           ^

2 errors
",
        );
    }

    fn faults_of(text: &str) -> Vec<String> {
        let mut faults = Diagnostics::default();
        let source = faults.add_source("p.yaml", text);
        parse(source, text, 0, &mut faults);
        faults.faults().iter().map(|f| f.message.clone()).collect()
    }

    const TOO_LARGE: &str = "the values of this file, with aliases expanded, take more than 64 MiB";

    #[test]
    fn depth_and_aliases_are_bounded() {
        let deep = format!("{}{}", "[".repeat(MAX_DEPTH), "]".repeat(MAX_DEPTH));
        assert_eq!(faults_of(&deep), [""; 0]);
        assert_eq!(faults_of(&format!("[{deep}]")), ["nested deeper than 64 levels"]);
        let mut bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n".to_owned();
        for n in 1..12 {
            let last = format!("*a{}", n - 1);
            bomb += &format!("a{n}: &a{n} [{}]\n", vec![last; 10].join(", "));
        }
        assert_eq!(faults_of(&bomb), [TOO_LARGE]);
        // Few values with much text; nested anchors, each of which keeps a copy; many values without text.
        let text = "x".repeat(100_000);
        assert_eq!(faults_of(&format!("a: &a {text}\nb: [{}]", vec!["*a"; 1_000].join(", "))), [TOO_LARGE]);
        let nested = format!("{}{}{}", "&a [".repeat(60), "x".repeat(2 << 20), "]".repeat(60));
        assert_eq!(faults_of(&nested), [TOO_LARGE]);
        assert_eq!(faults_of(&format!("[{}]", "x,".repeat(1 << 20))), [TOO_LARGE]);
        assert_eq!(faults_of(&format!("a: &a {text}\nb: [{}]", vec!["*a"; 500].join(", "))), [""; 0]);
        assert_eq!(faults_of("a: &a [*a]"), ["an anchor cannot contain itself"]);
        assert_eq!(faults_of("a: 1\n---\nb: 2"), ["expected one YAML document, found a second"]);
    }
}
