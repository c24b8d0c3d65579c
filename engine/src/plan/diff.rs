//! The fields in which two recipes differ.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use super::{Leaf, PathStep, Recipe, RecipeVisitor};
use crate::names::{Digest, InstanceName};

/// One changed field of a recipe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Change {
    /// For example `params.lora.rank` or `inputs.posts`.
    pub field: String,
    /// The old value; `None` if the field is new.
    pub old: Option<String>,
    /// The new value; `None` if the field is gone.
    pub new: Option<String>,
    /// The instance connected to this input.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub from: Option<InstanceName>,
    /// The file or folder that this parameter names; the values are digests of its content.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
}

/// The owned path to a leaf.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct FieldPath(Vec<OwnedPathStep>);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum OwnedPathStep {
    Field(String),
    Index(usize),
}

impl FieldPath {
    pub fn input(port: &str, index: usize) -> Self {
        Self(vec![
            OwnedPathStep::Field("inputs".into()),
            OwnedPathStep::Field(port.into()),
            OwnedPathStep::Index(index),
        ])
    }
}

impl fmt::Display for FieldPath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, step) in self.0.iter().enumerate() {
            match step {
                OwnedPathStep::Field(name) if i == 0 => f.write_str(name)?,
                OwnedPathStep::Field(name) => write!(f, ".{name}")?,
                OwnedPathStep::Index(n) => write!(f, "[{n}]")?,
            }
        }
        Ok(())
    }
}

/// The value of each leaf: for comparison, and for display.
pub(super) type Leaves = BTreeMap<FieldPath, (LeafValue, String)>;

/// A leaf's value for comparison.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum LeafValue {
    Null,
    Bool(bool),
    Unsigned(u64),
    Signed(i64),
    Float(u64),
    Text(String),
    Digest(Digest),
    EmptyMap,
    EmptyList,
}

impl RecipeVisitor for Leaves {
    fn leaf(&mut self, path: &[PathStep<'_>], leaf: Leaf<'_>) {
        let path = path.iter().map(|step| match step {
            PathStep::Field(name) => OwnedPathStep::Field((*name).to_owned()),
            PathStep::Index(i) => OwnedPathStep::Index(*i),
        });
        let shown = match leaf {
            Leaf::Null => (LeafValue::Null, "null".to_owned()),
            Leaf::Bool(b) => (LeafValue::Bool(b), b.to_string()),
            Leaf::Unsigned(n) => (LeafValue::Unsigned(n), n.to_string()),
            Leaf::Signed(n) => (LeafValue::Signed(n), n.to_string()),
            Leaf::Float(n) => (LeafValue::Float(n.to_bits()), format!("{n:?}")),
            Leaf::Text(text) => (LeafValue::Text(text.to_owned()), format!("{text:?}")),
            Leaf::Digest(digest) => (LeafValue::Digest(*digest), digest.to_string()),
            Leaf::EmptyMap => (LeafValue::EmptyMap, "{}".to_owned()),
            Leaf::EmptyList => (LeafValue::EmptyList, "[]".to_owned()),
        };
        self.insert(FieldPath(path.collect()), shown);
    }
}

pub(super) fn leaves(recipe: &Recipe) -> Leaves {
    let mut leaves = Leaves::new();
    recipe.visit(&mut leaves);
    leaves
}

/// The fields in which two recipes differ; empty if and only if their keys are equal.
pub(super) fn differences(old: &Leaves, new: &Leaves) -> Vec<Change> {
    let shown = |leaves: &Leaves, path: &FieldPath| leaves.get(path).map(|(_, shown)| shown.clone());
    let paths: BTreeSet<&FieldPath> = old.keys().chain(new.keys()).collect();
    let differs = |path: &&FieldPath| old.get(path).map(|(value, _)| value) != new.get(path).map(|(value, _)| value);
    let change = |path: &FieldPath| Change {
        field: path.to_string(),
        old: shown(old, path),
        new: shown(new, path),
        from: None,
        path: None,
    };
    paths.into_iter().filter(differs).map(change).collect()
}
