//! Tests of planning.

mod explained;
mod law;
mod planned;
mod recipes;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Flags, Index};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::external::External;
use crate::graph::{Graph, Instance, PortInputs, Source};
use crate::kind::{Arity, Kind, Registry, Signature};
use crate::names::{Digest, Key};
use crate::spec::Report;
use crate::store::tests::instance;
use crate::store::{Content, Presence};

#[derive(Serialize, Deserialize, JsonSchema)]
struct NoParams {}

/// A kind of which only the version matters.
struct Work<const VERSION: u32>;

impl<const VERSION: u32> Kind for Work<VERSION> {
    type Params = NoParams;
    const NAME: &'static str = "test.work";
    const VERSION: u32 = VERSION;
    const ABOUT: &'static str = "nothing";

    fn signature(&self, _: &NoParams) -> Signature {
        Signature::gives("Anything")
    }

    fn run(&self, _: NoParams, _: &mut Context) -> Result<()> {
        Err(Error::ours("not for running"))
    }
}

fn registry() -> Registry {
    Registry::default().kind(Work::<3>)
}

/// A graph in which instance `i` has the parameters `params` and, at the port `in`, the instances `inputs`. Targets are
/// the instances that no other uses.
fn graph(stages: &[(&str, Value, &[usize])]) -> Graph {
    let used: BTreeSet<usize> = stages.iter().flat_map(|(_, _, inputs)| inputs.iter().copied()).collect();
    let instances: Vec<Instance> = stages
        .iter()
        .map(|(name, params, inputs)| {
            let from: Vec<Source> = inputs.iter().map(|i| Source { instance: *i, label: format!("l{i}") }).collect();
            let arity = if from.len() > 1 { Arity::Many } else { Arity::One };
            let inputs = if from.is_empty() { Vec::new() } else { vec![PortInputs { port: "in".into(), arity, from }] };
            Instance {
                name: instance(name),
                matrix: Vec::new(),
                kind: "test.work".into(),
                params: params.clone(),
                seed: 17,
                signature: Signature::gives("Anything"),
                inputs,
            }
        })
        .collect();
    Graph {
        targets: (0..instances.len()).filter(|i| !used.contains(i)).collect(),
        instances,
        not_needed: vec![instance("unused")],
        name: "test".into(),
        seed: 17,
        report: Report::default(),
        remote: None,
    }
}

/// The graph a -> b -> c, each with one parameter.
fn chain(a: u64, b: u64, c: u64) -> Graph {
    graph(&[("a", json!({ "n": a }), &[]), ("b", json!({ "n": b }), &[0]), ("c", json!({ "n": c }), &[1])])
}

/// An in-memory store.
#[derive(Clone, Default)]
struct Shelf {
    records: BTreeMap<Key, Digest>,
    whole: BTreeSet<Digest>,
    rotten: BTreeSet<Digest>,
    contents: BTreeMap<PathBuf, Digest>,
}

impl Shelf {
    fn put(&mut self, key: Key, digest: Digest) {
        self.records.insert(key, digest);
        self.rotten.remove(&digest);
        self.whole.insert(digest);
    }
}

impl Index for Shelf {
    fn recorded(&self, key: &Key) -> Result<Option<Digest>> {
        Ok(self.records.get(key).copied())
    }

    fn presence(&self, digest: &Digest) -> Result<Presence> {
        Ok(match (self.whole.contains(digest), self.rotten.contains(digest)) {
            (_, true) => Presence::Rotten { file: "x".into() },
            (true, _) => Presence::Whole,
            _ => Presence::Missing,
        })
    }

    fn content_of(&self, external: &External) -> Result<Content> {
        let path = &external.written()[0];
        let digest = self.contents.get(path).copied();
        let digest = digest.ok_or_else(|| Error::yours(format!("{}: no such file", path.display())))?;
        Ok(Content { digest, without_store: path.ends_with("around-the-store") })
    }
}

fn force(names: &[&str]) -> Flags {
    Flags { force: names.iter().map(|name| instance(name)).collect(), ..Flags::default() }
}
