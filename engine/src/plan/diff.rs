//! The fields in which two recipes differ.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use super::{Leaf, Recipe, Step, Visitor};
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
pub(super) struct Way(Vec<OwnedStep>);

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum OwnedStep {
    Field(String),
    Index(usize),
}

impl Way {
    pub fn input(port: &str, index: usize) -> Self {
        Self(vec![OwnedStep::Field("inputs".into()), OwnedStep::Field(port.into()), OwnedStep::Index(index)])
    }
}

impl fmt::Display for Way {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, step) in self.0.iter().enumerate() {
            match step {
                OwnedStep::Field(name) if i == 0 => f.write_str(name)?,
                OwnedStep::Field(name) => write!(f, ".{name}")?,
                OwnedStep::Index(n) => write!(f, "[{n}]")?,
            }
        }
        Ok(())
    }
}

/// The value of each leaf: for comparison, and for display.
pub(super) type Leaves = BTreeMap<Way, (Exact, String)>;

/// A leaf's value for comparison.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Exact {
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

impl Visitor for Leaves {
    fn leaf(&mut self, way: &[Step<'_>], leaf: Leaf<'_>) {
        let way = way.iter().map(|step| match step {
            Step::Field(name) => OwnedStep::Field((*name).to_owned()),
            Step::Index(i) => OwnedStep::Index(*i),
        });
        let told = match leaf {
            Leaf::Null => (Exact::Null, "null".to_owned()),
            Leaf::Bool(b) => (Exact::Bool(b), b.to_string()),
            Leaf::Unsigned(n) => (Exact::Unsigned(n), n.to_string()),
            Leaf::Signed(n) => (Exact::Signed(n), n.to_string()),
            Leaf::Float(n) => (Exact::Float(n.to_bits()), format!("{n:?}")),
            Leaf::Text(text) => (Exact::Text(text.to_owned()), format!("{text:?}")),
            Leaf::Digest(digest) => (Exact::Digest(*digest), digest.to_string()),
            Leaf::EmptyMap => (Exact::EmptyMap, "{}".to_owned()),
            Leaf::EmptyList => (Exact::EmptyList, "[]".to_owned()),
        };
        self.insert(Way(way.collect()), told);
    }
}

pub(super) fn leaves(recipe: &Recipe) -> Leaves {
    let mut leaves = Leaves::new();
    recipe.visit(&mut leaves);
    leaves
}

/// The fields in which two recipes differ; empty if and only if their keys are equal.
pub(super) fn differences(old: &Leaves, new: &Leaves) -> Vec<Change> {
    let told = |leaves: &Leaves, way: &Way| leaves.get(way).map(|(_, told)| told.clone());
    let ways: BTreeSet<&Way> = old.keys().chain(new.keys()).collect();
    let differs = |way: &&Way| old.get(way).map(|(exact, _)| exact) != new.get(way).map(|(exact, _)| exact);
    let change =
        |way: &Way| Change { field: way.to_string(), old: told(old, way), new: told(new, way), from: None, path: None };
    ways.into_iter().filter(differs).map(change).collect()
}
