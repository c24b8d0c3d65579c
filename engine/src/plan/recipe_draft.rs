//! Builds an instance's recipe from what is known of its inputs.

use serde_json::{Value, json};

use super::{Recipe, RecipeInput, RecipePort, StoreView};
use crate::error::{Error, Result};
use crate::external::{self, ExternalInput};
use crate::graph::{Graph, Instance};
use crate::kind::{Arity, Registry};
use crate::names::Digest;

/// A recipe, or the inputs that it waits for.
#[derive(Clone, Debug, PartialEq)]
pub enum RecipeState {
    Ready(Recipe),
    /// Instances at the ports whose digests are unknown; sorted indices into the graph.
    Pending(Vec<usize>),
}

/// The recipe of an instance, given the digests known so far. `known` may be shorter than the graph: the rest is
/// unknown.
///
/// # Errors
/// When a path parameter names nothing (user error).
pub fn recipe(
    graph: &Graph,
    registry: &Registry,
    store: &dyn StoreView,
    instance: usize,
    known: &[Option<Digest>],
) -> Result<RecipeState> {
    let draft = draft_recipe(graph, registry, store, instance, known)?;
    Ok(match draft.unknown.is_empty() {
        true => RecipeState::Ready(draft.recipe),
        false => RecipeState::Pending(draft.waits_on()),
    })
}

/// A recipe in which each unknown input has a placeholder digest, one per instance: drafts of two instances that wait
/// for the same inputs have equal keys exactly if their final recipes will.
pub(super) struct RecipeDraft {
    pub recipe: Recipe,
    pub unknown: Vec<UnknownInput>,
    /// Notes for the user about the files that the parameters name.
    pub notes: Vec<String>,
}

/// An input whose digest is not known yet.
pub(super) struct UnknownInput {
    pub port: String,
    /// Index among the artifacts at the port.
    pub index: usize,
    /// The instance that will produce it.
    pub instance: usize,
}

impl RecipeDraft {
    /// Sorted, without duplicates.
    pub fn waits_on(&self) -> Vec<usize> {
        let mut waits_on: Vec<usize> = self.unknown.iter().map(|unknown| unknown.instance).collect();
        waits_on.sort_unstable();
        waits_on.dedup();
        waits_on
    }
}

pub(super) fn draft_recipe(
    graph: &Graph,
    registry: &Registry,
    store: &dyn StoreView,
    instance: usize,
    known: &[Option<Digest>],
) -> Result<RecipeDraft> {
    let Instance { name, kind, params, seed, signature, inputs, .. } = &graph.instances[instance];
    let Some(any_kind) = registry.get_kind(kind) else {
        return Err(Error::internal(format!("{name}: the graph has a kind `{kind}` that is not registered")));
    };
    let (mut unknown, mut notes) = (Vec::new(), Vec::new());
    let mut ports = Vec::with_capacity(inputs.len());
    for port in inputs {
        let mut from = Vec::with_capacity(port.from.len());
        for (at, source) in port.from.iter().enumerate() {
            let digest = known.get(source.instance).copied().flatten().unwrap_or_else(|| {
                unknown.push(UnknownInput { port: port.port.clone(), index: at, instance: source.instance });
                Digest::of(format!("instance {} is not known yet", source.instance).as_bytes())
            });
            let label = (port.arity == Arity::Many).then(|| source.label.clone());
            from.push(RecipeInput { label, digest });
        }
        if !from.is_empty() {
            ports.push(RecipePort { port: port.port.clone(), from });
        }
    }
    ports.sort_by(|a, b| a.port.cmp(&b.port));
    let recipe = Recipe {
        kind: kind.clone(),
        version: any_kind.version(),
        numerics: signature.numerics,
        params: with_content_digests(&key_params(params, &signature.excluded_from_key), store, &mut notes)
            .map_err(|e| e.context(name))?,
        seed: signature.seeded.then_some(*seed),
        inputs: ports,
    };
    Ok(RecipeDraft { recipe, unknown, notes })
}

/// Removes the parameters that do not change the artifact's bytes.
fn key_params(params: &Value, excluded: &[String]) -> Value {
    let mut params = params.clone();
    if let Value::Object(fields) = &mut params {
        fields.retain(|name, _| !excluded.contains(name));
    }
    params
}

/// Replaces every path in the parameters by the digest of its files.
fn with_content_digests(params: &Value, store: &dyn StoreView, notes: &mut Vec<String>) -> Result<Value> {
    external::replace(params, &mut |external| {
        if external.is_empty() {
            return Ok(json!([]));
        }
        let content = store.content_of(&external)?;
        if content.store_excluded {
            let paths: Vec<String> = external.absolute_paths().iter().map(|path| path.display().to_string()).collect();
            notes.push(format!("the store lies within {} and is excluded", paths.join(", ")));
        }
        let content = json!({ "content": content.digest });
        Ok(match external {
            ExternalInput::Path(_) => content,
            ExternalInput::Files(_) => json!([content]),
        })
    })
}
