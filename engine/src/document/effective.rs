//! The effective pipeline: the file's tree with profiles and `--set` applied, to be written as a pipeline file.

use super::merged;
use super::node::{Entry, Node, Value};
use crate::diagnostics::{Diagnostics, Span};

/// A pipeline file's tree without profiles, with every change applied and its targets stated.
#[derive(Clone, Debug)]
pub struct EffectivePipeline {
    /// A map.
    pub root: Node,
    sources: Diagnostics,
}

impl EffectivePipeline {
    /// Builds the tree of source number `source` of `sources`. Callers have checked the file with the same changes.
    /// Returns `None` if the file has faults.
    pub fn new(source: u32, profiles: &[String], set: &[String], mut sources: Diagnostics) -> Option<Self> {
        let (mut root, default_targets) = merged(source, profiles, set, &mut sources)?;
        if root.get("targets").is_none_or(Node::is_null) {
            // A profile may add or remove stages that nothing needs, so the merged tree alone no longer implies the
            // targets of the file.
            let stages = root.get("stages").and_then(Node::as_map);
            let remaining =
                default_targets.into_iter().filter(|name| stages.is_some_and(|map| map.entry(name).is_some()));
            let targets = remaining.map(|name| Node { span: Span::default(), value: Value::Str(name) }).collect();
            let value = Node { span: Span::default(), value: Value::List(targets) };
            root.remove("targets");
            let at = root.position("stages").unwrap_or(0);
            root.0.insert(at, Entry { key: "targets".to_owned(), key_span: Span::default(), value });
        }
        let root = Node { span: Span::default(), value: Value::Map(root) };
        sources.faults().is_empty().then_some(Self { root, sources })
    }

    /// The text of a value or key as written in the file or in a `--set` argument; empty for generated values.
    pub fn source_text(&self, span: Span) -> &str {
        self.sources.slice(span)
    }
}
