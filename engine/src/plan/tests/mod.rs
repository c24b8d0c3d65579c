//! Tests of planning.

mod explained;
mod law;
mod oracle;
mod planned;
mod recipes;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Flags, StoreView};
use crate::context::Context;
use crate::document::ReportSettings;
use crate::error::{Error, Result};
use crate::external::ExternalInput;
use crate::graph::{Graph, InputSource, Instance, PortInputs};
use crate::kind::{Arity, Kind, Registry, Signature};
use crate::names::{Digest, Key};
use crate::store::tests::instance;
use crate::store::{ExternalContent, Presence};

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
        Signature::producing("Anything")
    }

    fn run(&self, _: NoParams, _: &mut Context) -> Result<()> {
        Err(Error::internal("not for running"))
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
            let from: Vec<InputSource> =
                inputs.iter().map(|i| InputSource { instance: *i, label: format!("l{i}") }).collect();
            let arity = if from.len() > 1 { Arity::Many } else { Arity::One };
            let inputs = if from.is_empty() { Vec::new() } else { vec![PortInputs { port: "in".into(), arity, from }] };
            Instance {
                name: instance(name),
                matrix: Vec::new(),
                kind: "test.work".into(),
                params: params.clone(),
                seed: 17,
                signature: Signature::producing("Anything"),
                inputs,
                placement: Default::default(),
            }
        })
        .collect();
    Graph {
        targets: (0..instances.len()).filter(|i| !used.contains(i)).collect(),
        instances,
        not_needed: vec![instance("unused")],
        name: "test".into(),
        seed: 17,
        report: ReportSettings::default(),
        remote: None,
        on_finish: Vec::new(),
        executors: Default::default(),
        pools: Default::default(),
    }
}

/// The graph a -> b -> c, each with one parameter.
fn chain(a: u64, b: u64, c: u64) -> Graph {
    graph(&[("a", json!({ "n": a }), &[]), ("b", json!({ "n": b }), &[0]), ("c", json!({ "n": c }), &[1])])
}

/// An in-memory store.
#[derive(Clone, Default)]
struct MemoryStore {
    records: BTreeMap<Key, Digest>,
    intact: BTreeSet<Digest>,
    damaged: BTreeSet<Digest>,
    contents: BTreeMap<PathBuf, Digest>,
}

impl MemoryStore {
    fn put(&mut self, key: Key, digest: Digest) {
        self.records.insert(key, digest);
        self.damaged.remove(&digest);
        self.intact.insert(digest);
    }
}

impl StoreView for MemoryStore {
    fn recorded_digest(&self, key: &Key) -> Result<Option<Digest>> {
        Ok(self.records.get(key).copied())
    }

    fn presence(&self, digest: &Digest) -> Result<Presence> {
        Ok(match (self.intact.contains(digest), self.damaged.contains(digest)) {
            (_, true) => Presence::Damaged { file: "x".into() },
            (true, _) => Presence::Intact,
            _ => Presence::Missing,
        })
    }

    fn content_of(&self, external: &ExternalInput) -> Result<ExternalContent> {
        let path = &external.absolute_paths()[0];
        let digest = self.contents.get(path).copied();
        let digest = digest.ok_or_else(|| Error::user(format!("{}: no such file", path.display())))?;
        Ok(ExternalContent { digest, store_excluded: path.ends_with("around-the-store") })
    }
}

fn force(names: &[&str]) -> Flags {
    Flags { force: names.iter().map(|name| instance(name)).collect(), ..Flags::default() }
}
