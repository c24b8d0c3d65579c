//! `--set path=YAML`: sets one value at a path of the pipeline file's tree.

use super::node::{Entry, Map, Node, Value};
use super::{LABEL_KEYS, STAGE_KEYS, TOP_KEYS, merge, yaml};
use crate::diagnostics::{Diagnostic, Diagnostics, Span, did_you_mean};

/// The kind of map that a path has reached, which decides the keys allowed there.
#[derive(Clone, Copy)]
enum PathLevel {
    Top,
    Stages,
    Stage,
    Needs,
    Matrix,
    Dimension,
    Label,
    /// `with`, `report` and everything below: missing maps are created.
    Free,
    /// A value without parts: `uses`, `seed`, a port.
    Leaf,
}

impl PathLevel {
    fn child(self, key: &str) -> Self {
        match (self, key) {
            (Self::Top, "stages") => Self::Stages,
            (Self::Stages, _) => Self::Stage,
            (Self::Stage, "matrix") => Self::Matrix,
            (Self::Matrix, _) => Self::Dimension,
            (Self::Dimension, _) => Self::Label,
            (Self::Stage | Self::Label, "needs") => Self::Needs,
            (Self::Top, "remote" | "report" | "targets" | "on_finish")
            | (Self::Stage | Self::Label, "with")
            | (Self::Free | Self::Needs, _) => Self::Free,
            _ => Self::Leaf,
        }
    }

    /// The keys that a map at this place may have; `None`: any.
    fn keys(self) -> Option<&'static [&'static str]> {
        match self {
            Self::Top => Some(TOP_KEYS),
            Self::Stage => Some(STAGE_KEYS),
            Self::Label => Some(LABEL_KEYS),
            _ => None,
        }
    }

    /// What messages call a key at this place.
    fn key_noun(self) -> &'static str {
        match self {
            Self::Stages => "stage",
            Self::Matrix => "matrix variable",
            Self::Dimension => "matrix label",
            Self::Needs => "port",
            Self::Free => "entry",
            Self::Top | Self::Stage | Self::Label | Self::Leaf => "key",
        }
    }

    /// Whether a missing map under `key` is created on the way to the value.
    fn creates(self, key: &str) -> bool {
        match self {
            Self::Top => matches!(key, "stages" | "report"),
            Self::Stage | Self::Label | Self::Free => true,
            Self::Stages | Self::Matrix | Self::Dimension | Self::Needs | Self::Leaf => false,
        }
    }
}

/// Applies one `--set` argument to the merged file.
pub fn apply(root: &mut Map, argument: &str, faults: &mut Diagnostics) {
    let source = faults.add_source("--set", argument);
    let whole = Span { source, start: 0, length: argument.len() as u32 };
    let Some((path, text)) = argument.split_once('=') else {
        return faults.push(Diagnostic::new(whole, "expected `path=YAML`, such as `stages.sft.with.lr=1e-4`"));
    };
    let offset = path.len() + 1;
    if text.trim().is_empty() {
        let at = Span { start: path.len() as u32, length: 1, ..whole };
        return faults.push(Diagnostic::new(at, "no value").help("write `=null` to delete, `=''` for empty text"));
    }
    let Some(value) = yaml::parse(source, text, offset, faults) else { return };
    if let Err(fault) = put(root, source, path, value) {
        faults.push(fault);
    }
}

/// The arguments with each value of the argument's list in its place; the argument itself if its value is not a list.
pub fn sweep(argument: &str, faults: &mut Diagnostics) -> Vec<String> {
    let alone = || vec![argument.to_owned()];
    let Some((path, text)) = argument.split_once('=') else { return alone() };
    let source = faults.add_source("--set", argument);
    let Some(Node { value: Value::List(items), span }) = yaml::parse(source, text, path.len() + 1, faults) else {
        return alone();
    };
    if items.is_empty() {
        faults.push(Diagnostic::new(span, "`--sweep`: the list has no values"));
    }
    let value = |item: &Node| if item.is_null() { "null" } else { faults.slice(item.span) };
    items.iter().map(|item| format!("{path}={}", value(item))).collect()
}

fn put(root: &mut Map, source: u32, path: &str, value: Node) -> Result<(), Diagnostic> {
    let mut map = root;
    let mut level = PathLevel::Top;
    let mut start = 0;
    loop {
        let key = next_key(map, &path[start..]);
        let span = Span { source, start: start as u32, length: key.len() as u32 };
        start += key.len() + 1;
        let last = start > path.len();
        check_key(map, level, key, span, last.then_some(&value))?;
        if last {
            let entry = Entry { key: key.to_owned(), key_span: span, value };
            set_entry(map, level, entry);
            return Ok(());
        }
        let next = level.child(key);
        if matches!(next, PathLevel::Leaf) {
            return Err(Diagnostic::new(span, format!("`{key}` has no keys")));
        }
        let at = map.position(key).unwrap_or_else(|| {
            map.0.push(Entry { key: key.to_owned(), key_span: span, value: Node::map(span) });
            map.0.len() - 1
        });
        let node = &mut map.0[at].value;
        if node.is_null() {
            *node = Node::map(span);
        }
        let what = node.type_name();
        let Value::Map(inner) = &mut node.value else {
            let help = "set the whole value, such as `--set targets=[a, b]`";
            return Err(
                Diagnostic::new(span, format!("`{key}` is {what}: single values in it cannot be set")).help(help)
            );
        };
        map = inner;
        level = next;
    }
}

/// The part of `path` up to the next dot, or further if a key of `map` itself contains dots.
fn next_key<'p>(map: &Map, path: &'p str) -> &'p str {
    let first = path.split('.').next().unwrap_or(path);
    let whole = |key: &&str| path.strip_prefix(*key).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'));
    let longest = map.keys().filter(whole).map(str::len).max().unwrap_or(0);
    &path[..longest.max(first.len())]
}

/// Checks that `map` may have `key`; `value` is the value to set, if the path ends here.
fn check_key(map: &Map, level: PathLevel, key: &str, span: Span, value: Option<&Node>) -> Result<(), Diagnostic> {
    let unknown = |known: &[&str]| {
        let message = format!("unknown {} `{key}`", level.key_noun());
        Err(Diagnostic::new(span, message).maybe_help(did_you_mean(key, known.iter().copied())))
    };
    if let Some(keys) = level.keys()
        && !keys.contains(&key)
    {
        return unknown(keys);
    }
    match (level, key) {
        (PathLevel::Top, "profiles") => {
            return Err(Diagnostic::new(span, "profiles are applied before `--set`: set the value itself"));
        }
        (PathLevel::Top, "version") => {
            return Err(Diagnostic::new(span, "`version` cannot be set: it says how to read the file"));
        }
        _ => {}
    }
    if map.position(key).is_some() {
        return Ok(());
    }
    let existing: Vec<&str> = map.keys().collect();
    match value {
        Some(value) if value.is_null() => unknown(&existing),
        Some(value) if matches!(level, PathLevel::Stages) => {
            let whole = value.as_map().is_some_and(|stage| stage.entry("uses").is_some());
            if whole { Ok(()) } else { unknown(&existing) }
        }
        Some(_) => Ok(()),
        None if level.creates(key) => Ok(()),
        None => unknown(&existing),
    }
}

fn set_entry(map: &mut Map, level: PathLevel, entry: Entry) {
    match level {
        PathLevel::Matrix | PathLevel::Dimension if entry.value.is_null() => map.remove(&entry.key),
        PathLevel::Matrix | PathLevel::Dimension => map.put(entry),
        PathLevel::Top => merge::profile(map, &Map(vec![entry])),
        PathLevel::Stages => merge::stages(map, &Map(vec![entry])),
        PathLevel::Stage => merge::stage(map, &Map(vec![entry])),
        PathLevel::Needs | PathLevel::Label | PathLevel::Free | PathLevel::Leaf => merge::plain(map, &Map(vec![entry])),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const FILE: &str = "
seed: 1
targets: [a]
stages:
  a: { uses: x, needs: { p: b }, with: { lr: 1, lora: { rank: 2 } }, matrix: { n: [1, 2], arm: { m: { with: { k: 1 } } } } }
  b: { uses: y }
report: { title: t }
";

    fn with(arguments: &[String]) -> (Map, usize) {
        let mut faults = Diagnostics::default();
        let source = faults.add_source("p.yaml", FILE);
        let Some(Node { value: Value::Map(mut root), .. }) = yaml::parse(source, FILE, 0, &mut faults) else {
            panic!("a file of maps");
        };
        for argument in arguments {
            apply(&mut root, argument, &mut faults);
        }
        (root, faults.faults().len())
    }

    /// The value at a path, without source positions.
    fn at(root: &Map, path: &str) -> Option<serde_json::Value> {
        let whole = crate::document::interpolate::json(
            &Node { value: Value::Map(root.clone()), ..Node::map(Span::default()) },
            &[],
        );
        whole.pointer(&format!("/{}", path.replace('.', "/"))).cloned()
    }

    #[test]
    fn a_sweep_has_an_argument_for_each_value_of_a_list() {
        let cases: &[(&str, &[&str])] = &[
            ("a.b=[1e-4, 3e-4]", &["a.b=1e-4", "a.b=3e-4"]),
            ("a.b=['x, y', \"z\", null]", &["a.b='x, y'", "a.b=\"z\"", "a.b=null"]),
            ("a.b=[[1, 2], {c: [3]}]", &["a.b=[1, 2]", "a.b={c: [3]}"]),
            ("a.b=1", &["a.b=1"]),
            ("a.b={c: [1, 2]}", &["a.b={c: [1, 2]}"]),
        ];
        for (argument, expected) in cases {
            let mut faults = Diagnostics::default();
            assert_eq!(sweep(argument, &mut faults), *expected);
            assert_eq!(faults.faults().len(), 0, "{argument}");
        }
        for wrong in ["a.b=[]", "a.b=[1"] {
            let mut faults = Diagnostics::default();
            sweep(wrong, &mut faults);
            assert_eq!(faults.faults().len(), 1, "{wrong}");
        }
    }

    fn path() -> impl Strategy<Value = String> {
        let paths = [
            "seed",
            "targets",
            "stages.a.uses",
            "stages.a.seed",
            "stages.a.needs.p",
            "stages.a.with.lr",
            "stages.a.with.lora.rank",
            "stages.a.with.lora.fresh",
            "stages.a.with.made.on.the.way",
            "stages.a.matrix.n",
            "stages.a.matrix.arm.m.with.k",
            "stages.b.with.lr",
            "report.title",
            "report.made.here",
        ];
        prop::sample::select(paths.map(str::to_owned).to_vec())
    }

    proptest! {
        #[test]
        fn the_later_of_two_overrides_wins(path in path(), first in "[a-c1-3]", second in "(\\[[a-c1-3]\\]|[a-c1-3])") {
            let last = format!("{path}={second}");
            let (both, faults) = with(&[format!("{path}={first}"), last.clone()]);
            prop_assert_eq!(faults, 0);
            let (alone, _) = with(&[last]);
            prop_assert_eq!(at(&both, &path), at(&alone, &path));
            prop_assert!(at(&both, &path).is_some());
        }

        #[test]
        fn an_override_changes_only_its_path(path in path(), other in path(), value in "[a-c1-3]") {
            prop_assume!(!path.starts_with(&other) && !other.starts_with(&path));
            let (before, _) = with(&[]);
            let (after, _) = with(&[format!("{path}={value}")]);
            prop_assert_eq!(at(&before, &other), at(&after, &other));
        }
    }
}
