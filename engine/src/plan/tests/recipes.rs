use std::path::PathBuf;

use proptest::prelude::*;
use serde_json::{Map, Value, json};

use super::{MemoryStore, graph, registry};
use crate::names::Digest;
use crate::plan::diff::{differences, leaves};
use crate::plan::{Recipe, RecipeInput, RecipePort, RecipeState, recipe};

/// Values from a small set, so that equal and almost equal ones are frequent.
fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        (0..3_u64).prop_map(Value::from),
        (-2..2_i64).prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        prop_oneof![Just(0.0), Just(-0.0), Just(1.0), -1e300..1e300_f64, 0.0..1e-300_f64].prop_map(Value::from),
        prop_oneof!["", "0", "1", "null", "a.b", "[0]", "\\PC{0,4}"].prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 12, 3, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::vec((name(), inner), 0..3).prop_map(|fields| Map::from_iter(fields).into()),
        ]
    })
}

fn name() -> impl Strategy<Value = String> {
    prop_oneof!["a", "b", "a.b", "0", "label", ""].prop_map(String::from)
}

fn digest() -> impl Strategy<Value = Digest> {
    (0..3_u8).prop_map(|n| Digest::of(&[n]))
}

fn any_recipe() -> impl Strategy<Value = Recipe> {
    let input = (prop::option::of(name()), digest()).prop_map(|(label, digest)| RecipeInput { label, digest });
    let ports = prop::collection::btree_map(name(), prop::collection::vec(input, 1..3), 0..3)
        .prop_map(|ports| ports.into_iter().map(|(port, from)| RecipePort { port, from }).collect());
    let small = prop::option::of(0..2_u64);
    (name(), 0..2_u32, small.clone(), value(), small, ports).prop_map(
        |(kind, version, numerics, params, seed, inputs)| Recipe {
            kind,
            version,
            numerics: numerics.map(|n| n as u32),
            params,
            seed,
            inputs,
        },
    )
}

/// The recipe with one field replaced by that of another recipe.
fn with_one_field(recipe: &Recipe, other: &Recipe, field: usize) -> Recipe {
    let mut mutant = recipe.clone();
    match field {
        0 => mutant.kind = other.kind.clone(),
        1 => mutant.version = other.version,
        2 => mutant.numerics = other.numerics,
        3 => mutant.params = other.params.clone(),
        4 => mutant.seed = other.seed,
        5 => mutant.inputs = other.inputs.clone(),
        _ => match (mutant.inputs.first_mut(), other.inputs.first()) {
            (Some(port), Some(other)) if field == 6 => port.from = other.from.clone(),
            (Some(port), Some(other)) if field == 7 => port.from[0].digest = other.from[0].digest,
            (Some(port), Some(other)) if field == 8 => port.from[0].label = other.from[0].label.clone(),
            (Some(port), _) => port.from.reverse(),
            (None, _) => mutant.inputs = other.inputs.clone(),
        },
    }
    mutant
}

fn explainer_tells_apart(a: &Recipe, b: &Recipe) -> bool {
    !differences(&leaves(a), &leaves(b)).is_empty()
}

proptest! {
    #[test]
    fn keys_differ_exactly_when_the_explainer_names_a_difference(a in any_recipe(), b in any_recipe(), field in 0..10_usize) {
        let mutant = with_one_field(&a, &b, field);
        for (x, y) in [(&a, &mutant), (&a, &b), (&a, &a)] {
            prop_assert_eq!(x.key() != y.key(), explainer_tells_apart(x, y));
            prop_assert_eq!(explainer_tells_apart(x, y), explainer_tells_apart(y, x));
        }
    }

    #[test]
    fn a_recipe_read_back_from_json_has_the_same_key(a in any_recipe()) {
        let back: Recipe = serde_json::from_slice(&serde_json::to_vec_pretty(&a).unwrap()).unwrap();
        prop_assert_eq!(back.key(), a.key());
        prop_assert!(!explainer_tells_apart(&back, &a));
    }
}

fn with_params(params: Value) -> Recipe {
    Recipe { kind: "k".into(), version: 1, numerics: None, params, seed: None, inputs: Vec::new() }
}

#[test]
fn the_order_of_parameters_does_not_matter() {
    let (a, b) = (json!({ "x": 1, "y": { "p": 2, "q": 3 } }), json!({ "y": { "q": 3, "p": 2 }, "x": 1 }));
    assert_eq!(with_params(a).key(), with_params(b).key());
}

#[test]
fn similar_values_of_different_types_have_different_keys() {
    let alike = [
        json!({ "a": 1 }),
        json!({ "a": 1.0 }),
        json!({ "a": "1" }),
        json!({ "a": true }),
        json!({ "a": [1] }),
        json!({ "a": { "0": 1 } }),
        json!({ "a": null }),
        json!({ "a": {} }),
        json!({ "a": [] }),
        json!({ "a": "" }),
        json!({}),
        json!({ "a": -1 }),
        json!({ "a.b": 1 }),
        json!({ "a": { "b": 1 } }),
        json!([]),
        json!(null),
    ];
    let keys: std::collections::BTreeSet<_> = alike.iter().map(|params| with_params(params.clone()).key()).collect();
    assert_eq!(keys.len(), alike.len());
}

#[test]
fn keys_stay_what_they_were() {
    let recipe = Recipe {
        kind: "reward.train".into(),
        version: 2,
        numerics: Some(1),
        params: json!({ "lr": 1e-4, "lora": { "r": 8, "targets": ["all-linear"] }, "pool": null }),
        seed: Some(3),
        inputs: vec![RecipePort {
            port: "model".into(),
            from: vec![RecipeInput { label: Some("s".into()), digest: Digest::of(b"model") }],
        }],
    };
    // If this changes, every key in every store changes: increase the version in the derive-key string too.
    assert_eq!(recipe.key().to_string(), PINNED);
}

const PINNED: &str = "515747c5246bd1b388ffa60c538740c69a2380752355e108dee679e3a25a2ca4";

fn ready(graph: &crate::graph::Graph, store: &MemoryStore, i: usize, known: &[Option<Digest>]) -> Recipe {
    match recipe(graph, &registry(), store, i, known).unwrap() {
        RecipeState::Ready(recipe) => recipe,
        RecipeState::Pending(on) => panic!("pending on {on:?}"),
    }
}

#[test]
fn a_recipe_holds_exactly_what_determines_an_instances_bytes() {
    let mut g = graph(&[("a", json!({}), &[]), ("b", json!({ "n": 1 }), &[0])]);
    let known = [Some(Digest::of(b"a"))];
    let plain = ready(&g, &MemoryStore::default(), 1, &known);
    assert_eq!((plain.version, plain.seed, plain.numerics), (3, None, None));
    assert_eq!(plain.inputs[0].from, [RecipeInput { label: None, digest: Digest::of(b"a") }]);

    g.instances[1].seed = 99;
    g.instances[1].matrix = vec![("size".into(), "s".into())];
    g.instances[1].name = super::instance("other[s]");
    g.instances[1].inputs[0].from[0].label = "renamed".into();
    g.instances[1].signature.env = vec!["HOME".into()];
    assert_eq!(ready(&g, &MemoryStore::default(), 1, &known).key(), plain.key());

    g.instances[1].signature.seeded = true;
    let seeded = ready(&g, &MemoryStore::default(), 1, &known);
    assert_eq!(seeded.seed, Some(99));
    assert_ne!(seeded.key(), plain.key());
}

#[test]
fn labels_are_part_of_the_key_where_a_port_takes_many() {
    let mut g = graph(&[("a", json!({}), &[]), ("b", json!({}), &[]), ("c", json!({}), &[0, 1])]);
    let known = [Some(Digest::of(b"a")), Some(Digest::of(b"b"))];
    let first = ready(&g, &MemoryStore::default(), 2, &known);
    assert_eq!(first.inputs[0].from[1].label.as_deref(), Some("l1"));
    g.instances[2].inputs[0].from[1].label = "renamed".into();
    assert_ne!(ready(&g, &MemoryStore::default(), 2, &known).key(), first.key());
}

#[test]
fn a_recipe_waits_for_exactly_the_inputs_that_are_not_known() {
    let g = graph(&[("a", json!({}), &[]), ("b", json!({}), &[]), ("c", json!({}), &[1, 0, 1])]);
    let state = |known: &[Option<Digest>]| recipe(&g, &registry(), &MemoryStore::default(), 2, known).unwrap();
    assert_eq!(state(&[]), RecipeState::Pending(vec![0, 1]));
    assert_eq!(state(&[Some(Digest::of(b"a"))]), RecipeState::Pending(vec![1]));
    assert_eq!(state(&[None, Some(Digest::of(b"b"))]), RecipeState::Pending(vec![0]));
    assert!(matches!(state(&[Some(Digest::of(b"a")), Some(Digest::of(b"b"))]), RecipeState::Ready(_)));
}

#[test]
fn a_paths_digest_depends_on_the_content_there() {
    let digest = Digest::of(b"bytes");
    let mut store = MemoryStore::default();
    for path in ["/here/x", "/there/x"] {
        store.contents.insert(PathBuf::from(path), digest);
    }
    let with = |path: &str| graph(&[("a", json!({ "deep": [{ "file": { "$path": path } }] }), &[])]);
    let here = ready(&with("/here/x"), &store, 0, &[]);
    assert_eq!(here.params, json!({ "deep": [{ "file": { "content": digest.to_string() } }] }));
    assert_eq!(here.key(), ready(&with("/there/x"), &store, 0, &[]).key());
    store.contents.insert(PathBuf::from("/there/x"), Digest::of(b"others"));
    assert_ne!(here.key(), ready(&with("/there/x"), &store, 0, &[]).key());
    let files = |path: &str| graph(&[("a", json!({ "files": { "$files": [path] }, "none": { "$files": [] } }), &[])]);
    let list = ready(&files("/here/x"), &store, 0, &[]);
    assert_eq!(list.params, json!({ "files": [{ "content": digest.to_string() }], "none": [] }));
    let error = recipe(&with("/nowhere"), &registry(), &store, 0, &[]).unwrap_err();
    assert!(error.message.starts_with("a: /nowhere"), "{error}");
}

#[test]
fn a_parameter_excluded_from_the_key_changes_no_key_and_excludes_no_other_of_its_name() {
    let key = |params: Value, beside: &[&str]| {
        let mut graph = graph(&[("a", params, &[])]);
        graph.instances[0].signature.excluded_from_key = beside.iter().map(|name| (*name).to_owned()).collect();
        ready(&graph, &MemoryStore::default(), 0, &[]).key()
    };
    let with = |most: u64, inner: u64| json!({ "model": "m", "most": most, "inner": { "most": inner } });
    assert_eq!(key(with(1, 1), &["most"]), key(with(2, 1), &["most"]));
    assert_ne!(key(with(1, 1), &["most"]), key(with(1, 2), &["most"]));
    assert_ne!(key(with(1, 1), &[]), key(with(2, 1), &[]));
}
