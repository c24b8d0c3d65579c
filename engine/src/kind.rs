//! The stage contract: what a stage kind declares (parameters, ports, output type) and how it runs.

use std::collections::BTreeMap;
use std::path::PathBuf;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::artifact::ArtifactType;
use crate::context::Context;
use crate::error::{Error, Result};
use crate::estimate::{Estimate, Forecast, Scaling};

/// How many instances may be connected to a port.
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
    /// Names of the accepted artifact types; empty: any type.
    pub accepts: Vec<&'static str>,
    pub arity: Arity,
}

/// The inputs, output and properties of a kind for given parameters.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Signature {
    pub ports: Vec<Port>,
    /// Whether the pipeline may add inputs under names of its own choice, besides `ports` (used by `command`).
    pub open: bool,
    /// Name of the artifact type that the kind produces.
    pub output: String,
    /// Whether the seed is part of the key.
    pub seeded: bool,
    /// Whether the same key must give the same bytes on this platform (false: a paid API, an arbitrary program).
    pub deterministic: bool,
    /// The version of the numerics, for kinds that train or sample; part of the key.
    pub numerics: Option<u32>,
    /// Whether one attempt can use several threads.
    pub parallel: bool,
    /// Environment variables passed to the attempt besides PATH, HOME, LANG and TMPDIR. Never part of the key.
    pub env: Vec<String>,
    /// The subset of `env` that holds secrets: redacted wherever the attempt's output is kept.
    pub secrets: Vec<String>,
    /// Parameters that do not change the artifact's bytes, such as a spending limit: never part of the key.
    #[serde(rename = "beside_key")]
    pub excluded_from_key: Vec<String>,
    /// Whether an attempt may cost money; [`Kind::estimate`] then says how much.
    pub pays: bool,
    /// The subset of `env` that names files whose trimmed text is a secret: redacted as well.
    pub secret_files: Vec<String>,
}

impl Signature {
    /// A deterministic, unseeded kind without ports that produces `output`.
    pub fn producing(output: impl Into<String>) -> Self {
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
            excluded_from_key: Vec::new(),
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

/// One instance connected to a port of another, as seen at planning.
#[derive(Clone, Copy, Debug)]
pub struct ConnectedInput<'a> {
    pub port: &'a str,
    /// The kind of the instance at the port.
    pub kind: &'a str,
    /// Name of the artifact type that the instance produces.
    pub output: &'a str,
    /// The instance's parameters, normalised by its kind.
    pub params: &'a Value,
}

/// Files and folders by absolute paths; a folder stands for everything below it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Access {
    pub read: Vec<PathBuf>,
    /// May also be read.
    pub write: Vec<PathBuf>,
}

/// A kind of stage. Register one with [`Registry::kind`].
pub trait Kind: Send + Sync + 'static {
    /// Deserialised from the stage's `with`; every field except required ones has a serde default. Use
    /// `#[serde(deny_unknown_fields)]` and doc comments: they become the JSON schema and the text of `temper kinds`.
    type Params: DeserializeOwned + Serialize + JsonSchema;

    /// `reward.train`, …
    const NAME: &'static str;
    /// Must be increased whenever the same recipe would produce different bytes.
    const VERSION: u32;
    /// One-line description for users.
    const ABOUT: &'static str;

    fn signature(&self, params: &Self::Params) -> Signature;

    /// Checks what the types cannot express (ranges, exclusive options). Returns each fault as (path of the field such
    /// as `lr` or `lora.rank`, message). Runs at planning.
    fn check(&self, params: &Self::Params) -> Vec<(String, String)> {
        let _ = params;
        Vec::new()
    }

    /// Fills in parameters that follow from other parameters, such as which files of a folder count.
    fn complete(&self, params: &mut Self::Params) {
        let _ = params;
    }

    /// Checks the content of the files that parameters name; their paths are absolute by now. Returns faults as in
    /// [`Kind::check`]. Missing files are reported elsewhere. Runs at planning.
    fn check_files(&self, params: &Self::Params) -> Vec<(String, String)> {
        let _ = params;
        Vec::new()
    }

    /// Checks what is connected to the ports beyond types and counts, such as a single reward model where an ensemble
    /// is needed. Returns each fault as (port, error). Runs at planning; `inputs` are in the order of the pipeline
    /// file.
    fn check_wiring(&self, params: &Self::Params, inputs: &[ConnectedInput<'_>]) -> Vec<(&'static str, Error)> {
        let _ = (params, inputs);
        Vec::new()
    }

    /// Checks that required environment variables are set, such as an API key. Runs at planning for stages that will
    /// run.
    ///
    /// # Errors
    /// Names the missing variable and how to set it; never contains a secret.
    fn check_environment(&self, params: &Self::Params) -> Result<()> {
        let _ = params;
        Ok(())
    }

    /// The expected cost of a run with these inputs, given the answers that the store has kept; `None` for kinds that
    /// pay for nothing. Reads local files only and sends no requests. Runs at planning, once the inputs exist.
    ///
    /// # Errors
    /// The same as [`Kind::run`].
    fn estimate(&self, params: &Self::Params, ctx: &Context) -> Result<Option<Estimate>> {
        let _ = (params, ctx);
        Ok(None)
    }

    /// How the time of an attempt and the size of its artifact grow with the parameters and with the sizes of the inputs,
    /// for the expected time of a plan. `size` gives the total size at a port, in bytes; `None`: not known, or nothing
    /// connected. `None` if the kind cannot tell.
    fn scaling(&self, params: &Self::Params, size: &dyn Fn(&str) -> Option<f64>) -> Option<Scaling> {
        let _ = (params, size);
        None
    }

    /// The memory of an attempt, and what later stages' forecasts need to know of its artifact. `inputs` gives the outlines of
    /// the artifacts at a port, in the order of the pipeline file; null: not known. Runs at planning.
    fn forecast(&self, params: &Self::Params, inputs: &dyn Fn(&str) -> Vec<Value>) -> Forecast {
        let _ = (params, inputs);
        Forecast::default()
    }

    /// The files and folders that an attempt uses besides its inputs, its own folders, the files that its parameters name, and
    /// installed software. Never part of the key. Asked on the machine of the attempt.
    fn access(&self, params: &Self::Params) -> Access {
        let _ = params;
        Access::default()
    }

    /// Runs the stage: writes the artifact into `ctx.out()`.
    ///
    /// # Errors
    /// Any error fails the stage and commits nothing.
    fn run(&self, params: Self::Params, ctx: &mut Context) -> Result<()>;
}

/// A kind with its parameter type erased; implemented for every [`Kind`].
pub trait AnyKind: Send + Sync {
    fn name(&self) -> &'static str;
    fn version(&self) -> u32;
    fn about(&self) -> &'static str;
    /// The JSON schema of the parameters.
    fn schema(&self) -> Schema;
    /// Parses `with` and returns it with every default filled in.
    ///
    /// # Errors
    /// The faults found, each as (path of the field, may be empty; message).
    fn normalise(&self, with: &Value) -> Result<Value, Vec<(String, String)>>;
    /// See [`Kind::check_files`]; `params` are normalised and their paths absolute.
    fn check_files(&self, params: &Value) -> Result<Vec<(String, String)>>;
    /// See [`Kind::check_wiring`]; here and in the methods below, `params` are normalised.
    fn check_wiring(&self, params: &Value, inputs: &[ConnectedInput<'_>]) -> Result<Vec<(&'static str, Error)>>;
    fn check_environment(&self, params: &Value) -> Result<()>;
    fn signature(&self, params: &Value) -> Result<Signature>;
    fn estimate(&self, params: &Value, ctx: &Context) -> Result<Option<Estimate>>;
    /// See [`Kind::scaling`]. `params` may be those of a record; `None` also if they do not parse, such as a parameter
    /// that names a file.
    fn scaling(&self, params: &Value, size: &dyn Fn(&str) -> Option<f64>) -> Option<Scaling>;
    /// See [`Kind::forecast`]; `params` as for `scaling`.
    fn forecast(&self, params: &Value, inputs: &dyn Fn(&str) -> Vec<Value>) -> Forecast;
    fn access(&self, params: &Value) -> Result<Access>;
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

    fn check_wiring(&self, params: &Value, inputs: &[ConnectedInput<'_>]) -> Result<Vec<(&'static str, Error)>> {
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

    fn scaling(&self, params: &Value, size: &dyn Fn(&str) -> Option<f64>) -> Option<Scaling> {
        Kind::scaling(self, &serde_json::from_value(params.clone()).ok()?, size)
    }

    fn forecast(&self, params: &Value, inputs: &dyn Fn(&str) -> Vec<Value>) -> Forecast {
        let params = serde_json::from_value(params.clone());
        params.map(|params| Kind::forecast(self, &params, inputs)).unwrap_or_default()
    }

    fn access(&self, params: &Value) -> Result<Access> {
        Ok(Kind::access(self, &parse::<K>(params)?))
    }

    fn run(&self, params: &Value, ctx: &mut Context) -> Result<()> {
        Kind::run(self, parse::<K>(params)?, ctx)
    }
}

fn parse<K: Kind>(params: &Value) -> Result<K::Params> {
    serde_json::from_value(params.clone())
        .map_err(|e| Error::internal(format!("normalised parameters of {} do not parse: {e}", K::NAME)))
}

/// Everything that a pipeline can use: the kinds and artifact types of this binary.
#[derive(Default)]
pub struct Registry {
    kinds: BTreeMap<&'static str, Box<dyn AnyKind>>,
    types: BTreeMap<&'static str, Box<dyn ArtifactType>>,
}

impl Registry {
    /// Registers a kind; a second kind with the same name replaces the first.
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

    /// Sorted by name.
    pub fn kinds(&self) -> impl Iterator<Item = &dyn AnyKind> {
        self.kinds.values().map(Box::as_ref)
    }

    /// Sorted by name.
    pub fn types(&self) -> impl Iterator<Item = &dyn ArtifactType> {
        self.types.values().map(Box::as_ref)
    }
}
