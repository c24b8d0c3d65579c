//! The stage contract: what a kind declares and what it does. Knows no graph and no store.

use std::collections::BTreeMap;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::artifact::ArtifactType;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::estimate::Estimate;

/// How many instances a port takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Arity {
    One,
    Optional,
    /// One or more, in the order of the pipeline file.
    Many,
}

/// A named, typed input of a kind.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Port {
    pub name: String,
    /// Names of the artifact types that it accepts; empty: any type.
    pub accepts: Vec<&'static str>,
    pub arity: Arity,
}

/// What a kind takes and gives at given parameters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Signature {
    pub ports: Vec<Port>,
    /// Whether further inputs under names of the pipeline's choosing are taken (`command`).
    pub open: bool,
    /// Name of the artifact type that it gives.
    pub output: String,
    /// Whether the seed enters the key.
    pub seeded: bool,
    /// Whether the same key must give the same bytes on this platform (false: a paid API, an arbitrary program).
    pub deterministic: bool,
    /// The version of the numerics, for kinds that train or sample; part of the key.
    pub numerics: Option<u32>,
    /// Whether one attempt can make use of several threads.
    pub parallel: bool,
    /// Environment variables that the attempt may see besides PATH, HOME, LANG and TMPDIR. Never part of the key.
    pub env: Vec<String>,
    /// Which of `env` are secrets: redacted wherever the attempt's output is kept.
    pub secrets: Vec<String>,
    /// Parameters that change no byte of what is made, such as how much may be spent on it: never part of the key.
    pub beside_key: Vec<String>,
    /// Whether an attempt may cost money; then [`Kind::estimate`] says how much.
    pub pays: bool,
    /// Which of `env` name files whose text, without white space at its ends, is a secret: redacted as well.
    pub secret_files: Vec<String>,
}

impl Signature {
    /// A deterministic, unseeded kind without ports that gives `output`.
    pub fn gives(output: impl Into<String>) -> Self {
        Self {
            ports: Vec::new(),
            open: false,
            output: output.into(),
            seeded: false,
            deterministic: true,
            numerics: None,
            parallel: false,
            env: Vec::new(),
            secrets: Vec::new(),
            beside_key: Vec::new(),
            pays: false,
            secret_files: Vec::new(),
        }
    }

    fn port(mut self, name: &str, accepts: &[&'static str], arity: Arity) -> Self {
        self.ports.push(Port { name: name.to_owned(), accepts: accepts.to_vec(), arity });
        self
    }

    #[must_use]
    pub fn one(self, name: &str, accepts: &[&'static str]) -> Self {
        self.port(name, accepts, Arity::One)
    }

    #[must_use]
    pub fn optional(self, name: &str, accepts: &[&'static str]) -> Self {
        self.port(name, accepts, Arity::Optional)
    }

    #[must_use]
    pub fn many(self, name: &str, accepts: &[&'static str]) -> Self {
        self.port(name, accepts, Arity::Many)
    }

    #[must_use]
    pub fn seeded(mut self) -> Self {
        self.seeded = true;
        self
    }

    /// For kinds that train or sample: `numerics` is `lm::NUMERICS`.
    #[must_use]
    pub fn numerics(mut self, numerics: u32) -> Self {
        self.numerics = Some(numerics);
        self.parallel = true;
        self
    }
}

/// One instance at a port of another, as planning sees it.
#[derive(Clone, Copy, Debug)]
pub struct Wired<'a> {
    pub port: &'a str,
    /// The kind of the instance at the port.
    pub kind: &'a str,
    /// Name of the artifact type that it gives.
    pub output: &'a str,
    /// Its parameters, as its kind normalised them.
    pub params: &'a Value,
}

/// A kind of stage. Register one with [`Registry::kind`].
pub trait Kind: Send + Sync + 'static {
    /// Deserialised from the stage's `with`; every field but required ones has a serde default. Use
    /// `#[serde(deny_unknown_fields)]` and doc comments: they become the schema and `temper kinds`.
    type Params: DeserializeOwned + Serialize + JsonSchema;

    /// `reward.train`, …
    const NAME: &'static str;
    /// Raised whenever the same recipe would give other bytes.
    const VERSION: u32;
    /// One line for people.
    const ABOUT: &'static str;

    fn signature(&self, params: &Self::Params) -> Signature;

    /// Checks what types cannot say (ranges, exclusive options): each fault as (path of the field such as `lr` or
    /// `lora.rank`, message). Runs at planning.
    fn check(&self, params: &Self::Params) -> Vec<(String, String)> {
        let _ = params;
        Vec::new()
    }

    /// Carries what one parameter says into another that acts on it, such as which files of a folder count.
    fn complete(&self, params: &mut Self::Params) {
        let _ = params;
    }

    /// Checks what is in the files that parameters name, whose paths are absolute by now; each fault as in [`Kind::check`]. A
    /// file that is missing is told by others. Runs at planning.
    fn check_files(&self, params: &Self::Params) -> Vec<(String, String)> {
        let _ = params;
        Vec::new()
    }

    /// Checks what its ports are given beyond types and counts, such as one reward model where an ensemble is needed: each
    /// fault as (port, error). Runs at planning; `inputs` are in the order of the pipeline file.
    fn check_wiring(&self, params: &Self::Params, inputs: &[Wired<'_>]) -> Vec<(&'static str, Error)> {
        let _ = (params, inputs);
        Vec::new()
    }

    /// Checks that the environment variables that an attempt cannot do without are there, such as an API's key. Runs at
    /// planning for stages that will run.
    ///
    /// # Errors
    /// What is missing and how to set it; never a secret.
    fn check_environment(&self, params: &Self::Params) -> Result<()> {
        let _ = params;
        Ok(())
    }

    /// What running with these inputs and what the store has kept is expected to cost; `None` for kinds that pay for nothing.
    /// Reads, and asks nobody. Runs at planning, when the inputs are there.
    ///
    /// # Errors
    /// As of [`Kind::run`].
    fn estimate(&self, params: &Self::Params, ctx: &Context) -> Result<Option<Estimate>> {
        let _ = (params, ctx);
        Ok(None)
    }

    /// Fills `ctx.out()`.
    ///
    /// # Errors
    /// Anything returned fails the stage and commits nothing.
    fn run(&self, params: Self::Params, ctx: &mut Context) -> Result<()>;
}

/// A kind with its parameter type erased; implemented for every [`Kind`].
pub trait AnyKind: Send + Sync {
    fn name(&self) -> &'static str;
    fn version(&self) -> u32;
    fn about(&self) -> &'static str;
    /// The JSON schema of the parameters.
    fn schema(&self) -> Schema;
    /// Parses `with` and writes it back with every default filled in.
    ///
    /// # Errors
    /// The faults found, each as (path of the field, or empty; message).
    fn normalise(&self, with: &Value) -> Result<Value, Vec<(String, String)>>;
    /// The faults of the files that `params`, as normalised and with absolute paths, name.
    fn check_files(&self, params: &Value) -> Result<Vec<(String, String)>>;
    /// `params` as normalised; as for the two below.
    fn check_wiring(&self, params: &Value, inputs: &[Wired<'_>]) -> Result<Vec<(&'static str, Error)>>;
    fn check_environment(&self, params: &Value) -> Result<()>;
    fn signature(&self, params: &Value) -> Result<Signature>;
    fn estimate(&self, params: &Value, ctx: &Context) -> Result<Option<Estimate>>;
    fn run(&self, params: &Value, ctx: &mut Context) -> Result<()>;
}

impl<K: Kind> AnyKind for K {
    fn name(&self) -> &'static str {
        K::NAME
    }

    fn version(&self) -> u32 {
        K::VERSION
    }

    fn about(&self) -> &'static str {
        K::ABOUT
    }

    fn schema(&self) -> Schema {
        SchemaGenerator::default().into_root_schema_for::<K::Params>()
    }

    fn normalise(&self, with: &Value) -> Result<Value, Vec<(String, String)>> {
        let mut params: K::Params = serde_path_to_error::deserialize(with).map_err(|e| {
            let path = e.path().to_string();
            vec![(if path == "." { String::new() } else { path }, e.into_inner().to_string())]
        })?;
        let faults = self.check(&params);
        if !faults.is_empty() {
            return Err(faults);
        }
        self.complete(&mut params);
        serde_json::to_value(&params).map_err(|e| vec![(String::new(), e.to_string())])
    }

    fn check_files(&self, params: &Value) -> Result<Vec<(String, String)>> {
        Ok(Kind::check_files(self, &parse::<K>(params)?))
    }

    fn check_wiring(&self, params: &Value, inputs: &[Wired<'_>]) -> Result<Vec<(&'static str, Error)>> {
        Ok(Kind::check_wiring(self, &parse::<K>(params)?, inputs))
    }

    fn check_environment(&self, params: &Value) -> Result<()> {
        Kind::check_environment(self, &parse::<K>(params)?)
    }

    fn signature(&self, params: &Value) -> Result<Signature> {
        Ok(Kind::signature(self, &parse::<K>(params)?))
    }

    fn estimate(&self, params: &Value, ctx: &Context) -> Result<Option<Estimate>> {
        Kind::estimate(self, &parse::<K>(params)?, ctx)
    }

    fn run(&self, params: &Value, ctx: &mut Context) -> Result<()> {
        Kind::run(self, parse::<K>(params)?, ctx)
    }
}

fn parse<K: Kind>(params: &Value) -> Result<K::Params> {
    serde_json::from_value(params.clone())
        .map_err(|e| Error::ours(format!("normalised parameters of {} do not parse: {e}", K::NAME)))
}

/// Everything that a pipeline can use: the kinds and artifact types of this binary.
#[derive(Default)]
pub struct Registry {
    kinds: BTreeMap<&'static str, Box<dyn AnyKind>>,
    types: BTreeMap<&'static str, Box<dyn ArtifactType>>,
}

impl Registry {
    /// Registers a kind; a second of the same name replaces the first.
    #[must_use]
    pub fn kind(mut self, kind: impl Kind) -> Self {
        let kind: Box<dyn AnyKind> = Box::new(kind);
        self.kinds.insert(kind.name(), kind);
        self
    }

    #[must_use]
    pub fn artifact_type(mut self, t: impl ArtifactType + 'static) -> Self {
        self.types.insert(t.name(), Box::new(t));
        self
    }

    pub fn get_kind(&self, name: &str) -> Option<&dyn AnyKind> {
        self.kinds.get(name).map(Box::as_ref)
    }

    pub fn get_type(&self, name: &str) -> Option<&dyn ArtifactType> {
        self.types.get(name).map(Box::as_ref)
    }

    /// In order of name.
    pub fn kinds(&self) -> impl Iterator<Item = &dyn AnyKind> {
        self.kinds.values().map(Box::as_ref)
    }

    /// In order of name.
    pub fn types(&self) -> impl Iterator<Item = &dyn ArtifactType> {
        self.types.values().map(Box::as_ref)
    }
}
