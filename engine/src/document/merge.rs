//! Merge rules: how profiles, overrides and matrix labels change a tree.
//!
//! Maps merge; scalars, lists and a stage's `matrix` replace; null deletes; a stage with `uses` replaces the whole
//! stage. A value that replaces nothing loses its null entries, so that merging is idempotent.

use std::collections::HashMap;

use super::node::{Entry, Map, Node, Value};

/// Selects the merge rule for a map.
#[derive(Clone, Copy, PartialEq, Eq)]
enum MergeLevel {
    /// The file or a profile.
    Top,
    /// `stages`.
    Stages,
    /// One stage.
    Stage,
    Plain,
}

impl MergeLevel {
    fn child(self, key: &str) -> Self {
        match (self, key) {
            (Self::Top, "stages") => Self::Stages,
            (Self::Stages, _) => Self::Stage,
            _ => Self::Plain,
        }
    }
}

/// Merges a profile into a file.
pub fn profile(base: &mut Map, overlay: &Map) {
    merge(base, overlay, MergeLevel::Top);
}

/// Merges into `stages`.
pub fn stages(base: &mut Map, overlay: &Map) {
    merge(base, overlay, MergeLevel::Stages);
}

/// Merges into one stage, like a profile, except that `uses` is an ordinary entry here.
pub fn stage(base: &mut Map, overlay: &Map) {
    merge(base, overlay, MergeLevel::Stage);
}

/// Merges ordinary maps such as `with`.
pub fn plain(base: &mut Map, overlay: &Map) {
    merge(base, overlay, MergeLevel::Plain);
}

fn merge(base: &mut Map, overlay: &Map, level: MergeLevel) {
    const SMALL: usize = 32;
    // Deletions come last, so that positions in `index` stay valid; no entry is both deleted and put.
    let index: Option<HashMap<String, usize>> = (base.0.len() > SMALL && overlay.0.len() > 1)
        .then(|| base.0.iter().enumerate().map(|(n, e)| (e.key.clone(), n)).collect());
    let mut deletes = false;
    for entry in &overlay.0 {
        let found = match &index {
            Some(index) => index.get(&entry.key).copied(),
            None => base.position(&entry.key),
        };
        let verbatim = match level {
            MergeLevel::Stages => entry.value.as_map().is_some_and(|stage| stage.entry("uses").is_some()),
            MergeLevel::Stage => entry.key == "matrix",
            MergeLevel::Top | MergeLevel::Plain => false,
        };
        match found {
            _ if entry.value.is_null() => deletes = true,
            Some(at) if verbatim => base.0[at] = entry.clone(),
            None if verbatim => base.0.push(entry.clone()),
            Some(at) => {
                let old = &mut base.0[at];
                match (&mut old.value.value, &entry.value.value) {
                    (Value::Map(old), Value::Map(new)) => merge(old, new, level.child(&entry.key)),
                    _ => *old = without_nulls(entry, level),
                }
            }
            None => base.0.push(without_nulls(entry, level)),
        }
    }
    if deletes {
        let gone: Vec<&str> = overlay.0.iter().filter(|e| e.value.is_null()).map(|e| e.key.as_str()).collect();
        base.0.retain(|entry| !gone.contains(&entry.key.as_str()));
    }
}

/// The result of merging the entry into an empty map.
fn without_nulls(entry: &Entry, level: MergeLevel) -> Entry {
    let value = match &entry.value.value {
        Value::Map(map) => {
            let mut bare = Map::default();
            merge(&mut bare, map, level.child(&entry.key));
            Value::Map(bare)
        }
        other => other.clone(),
    };
    Entry { value: Node { span: entry.value.span, value }, ..entry.clone() }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::diagnostics::Span;

    fn scalar() -> impl Strategy<Value = Value> {
        prop_oneof![
            Just(Value::Null),
            (0..3_i128).prop_map(Value::Int),
            "[ab]".prop_map(Value::Str),
            prop::collection::vec((0..3_i128).prop_map(|n| at(Value::Int(n))), 0..3).prop_map(Value::List),
        ]
    }

    fn at(value: Value) -> Node {
        Node { span: Span::default(), value }
    }

    /// Nested maps with the keys that matter to merging.
    fn tree() -> impl Strategy<Value = Map> {
        let value = scalar().prop_map(at).prop_recursive(5, 40, 4, |inner| {
            map_of("(stages|uses|with|matrix|needs|a|b|c)", inner).prop_map(|map| at(Value::Map(map)))
        });
        map_of("(stages|seed|targets|report)", value)
    }

    fn map_of(keys: &'static str, value: impl Strategy<Value = Node> + 'static) -> impl Strategy<Value = Map> {
        prop::collection::btree_map(keys, value, 0..4).prop_map(|map| {
            Map(map.into_iter().map(|(key, value)| Entry { key, key_span: Span::default(), value }).collect())
        })
    }

    proptest! {
        #[test]
        fn a_profile_applied_twice_equals_once(base in tree(), overlay in tree()) {
            let mut once = base;
            profile(&mut once, &overlay);
            let mut twice = once.clone();
            profile(&mut twice, &overlay);
            prop_assert_eq!(once, twice);
        }

        #[test]
        fn an_empty_profile_changes_nothing(base in tree()) {
            let mut merged = base.clone();
            profile(&mut merged, &Map::default());
            prop_assert_eq!(base, merged);
        }

        #[test]
        fn every_value_of_a_profile_is_in_the_merged_document(base in tree(), overlay in tree()) {
            let mut merged = base;
            profile(&mut merged, &overlay);
            for entry in &overlay.0 {
                match &entry.value.value {
                    Value::Null => prop_assert!(merged.get(&entry.key).is_none()),
                    Value::Map(_) => prop_assert!(merged.get(&entry.key).is_some_and(|v| v.as_map().is_some())),
                    value => prop_assert_eq!(&merged.get(&entry.key).expect("was put").value, value),
                }
            }
        }
    }
}
