//! The recipe: the readable document whose hash is the key.
//!
//! [`Recipe::visit`] is the only definition of a recipe's content. The hasher and the explainer both use it, so that
//! they cannot disagree.

use serde::{Deserialize, Serialize};
use serde_json::{Number, Value};

use crate::names::{Digest, Key};

/// Everything that determines the bytes of a stage's artifact, and nothing else.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Recipe {
    pub kind: String,
    /// The kind's version.
    pub version: u32,
    /// The version of the numerics, for kinds that train or sample.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub numerics: Option<u32>,
    /// Normalised; every path is replaced by `{"content": digest}`.
    pub params: Value,
    /// Present if and only if the kind is seeded.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
    /// Sorted by port name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub inputs: Vec<RecipePort>,
}

/// The artifacts at one port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecipePort {
    pub port: String,
    /// In the order of the pipeline file.
    pub from: Vec<RecipeInput>,
}

/// One artifact at a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RecipeInput {
    /// Only at ports that take many, where labels distinguish the artifacts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub label: Option<String>,
    pub digest: Digest,
}

/// One step of the path from a recipe to one of its leaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum PathStep<'a> {
    Field(&'a str),
    Index(usize),
}

/// The value at the end of such a path.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Leaf<'a> {
    Null,
    Bool(bool),
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Text(&'a str),
    Digest(&'a Digest),
    EmptyMap,
    EmptyList,
}

/// Receives the leaves of a recipe: one call per leaf, in an order that depends only on the set of leaves.
pub trait RecipeVisitor {
    fn leaf(&mut self, path: &[PathStep<'_>], leaf: Leaf<'_>);
}

impl Recipe {
    pub fn key(&self) -> Key {
        let mut hasher = KeyHasher(blake3::Hasher::new_derive_key("temper recipe v1"));
        self.visit(&mut hasher);
        hasher.0.finalize().into()
    }

    pub fn visit(&self, visitor: &mut dyn RecipeVisitor) {
        use PathStep::{Field, Index};
        visitor.leaf(&[Field("kind")], Leaf::Text(&self.kind));
        visitor.leaf(&[Field("version")], Leaf::Unsigned(self.version.into()));
        if let Some(numerics) = self.numerics {
            visitor.leaf(&[Field("numerics")], Leaf::Unsigned(numerics.into()));
        }
        visit_value(&mut vec![Field("params")], &self.params, visitor);
        if let Some(seed) = self.seed {
            visitor.leaf(&[Field("seed")], Leaf::Unsigned(seed));
        }
        for port in &self.inputs {
            for (i, input) in port.from.iter().enumerate() {
                let path = [Field("inputs"), Field(&port.port), Index(i), Field("label")];
                if let Some(label) = &input.label {
                    visitor.leaf(&path, Leaf::Text(label));
                }
                visitor.leaf(&path[..3], Leaf::Digest(&input.digest));
            }
        }
    }
}

/// Recursion is as deep as the parameters, whose depth the pipeline file's parser limits.
fn visit_value<'a>(path: &mut Vec<PathStep<'a>>, value: &'a Value, visitor: &mut dyn RecipeVisitor) {
    match value {
        Value::Null => visitor.leaf(path, Leaf::Null),
        Value::Bool(b) => visitor.leaf(path, Leaf::Bool(*b)),
        Value::Number(n) => visitor.leaf(path, number(n)),
        Value::String(s) => visitor.leaf(path, Leaf::Text(s)),
        Value::Array(items) if items.is_empty() => visitor.leaf(path, Leaf::EmptyList),
        Value::Array(items) => {
            for (i, item) in items.iter().enumerate() {
                path.push(PathStep::Index(i));
                visit_value(path, item, visitor);
                path.pop();
            }
        }
        Value::Object(fields) if fields.is_empty() => visitor.leaf(path, Leaf::EmptyMap),
        Value::Object(fields) => {
            let mut sorted: Vec<_> = fields.iter().collect();
            sorted.sort_unstable_by_key(|(name, _)| *name);
            for (name, field) in sorted {
                path.push(PathStep::Field(name));
                visit_value(path, field, visitor);
                path.pop();
            }
        }
    }
}

fn number(n: &Number) -> Leaf<'_> {
    if let Some(n) = n.as_u64() {
        Leaf::Unsigned(n)
    } else if let Some(n) = n.as_i64() {
        Leaf::Signed(n)
    } else {
        // Without its `arbitrary_precision` feature, serde_json only holds u64, i64 and f64.
        Leaf::Float(n.as_f64().unwrap_or(f64::NAN))
    }
}

/// Hashes each leaf as: number of steps, each step tagged and length-prefixed, then the leaf tagged and
/// length-prefixed.
struct KeyHasher(blake3::Hasher);

impl KeyHasher {
    fn part(&mut self, tag: u8, bytes: &[u8]) {
        self.0.update(&[tag]);
        self.0.update(&(bytes.len() as u64).to_le_bytes());
        self.0.update(bytes);
    }
}

impl RecipeVisitor for KeyHasher {
    fn leaf(&mut self, path: &[PathStep<'_>], leaf: Leaf<'_>) {
        self.part(b'w', &(path.len() as u64).to_le_bytes());
        for step in path {
            match step {
                PathStep::Field(name) => self.part(b'f', name.as_bytes()),
                PathStep::Index(i) => self.part(b'i', &(*i as u64).to_le_bytes()),
            }
        }
        match leaf {
            Leaf::Null => self.part(b'0', &[]),
            Leaf::Bool(b) => self.part(b'b', &[b.into()]),
            Leaf::Unsigned(n) => self.part(b'u', &n.to_le_bytes()),
            Leaf::Signed(n) => self.part(b's', &n.to_le_bytes()),
            Leaf::Float(n) => self.part(b'd', &n.to_bits().to_le_bytes()),
            Leaf::Text(text) => self.part(b't', text.as_bytes()),
            Leaf::Digest(digest) => self.part(b'h', digest.as_bytes()),
            Leaf::EmptyMap => self.part(b'm', &[]),
            Leaf::EmptyList => self.part(b'l', &[]),
        }
    }
}
