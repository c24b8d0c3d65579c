//! A registry of small kinds that do nothing.

use std::collections::BTreeMap;
use std::path::Path;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::artifact::{ArtifactType, Facts};
use crate::context::Context;
use crate::error::{Error, Result};
use crate::external::{InputFiles, InputPath};
use crate::kind::{ConnectedInput, Kind, Registry, Signature};

pub fn registry() -> Registry {
    let types = ["Posts", "Model", "Pairs", "Preferences", "Ensemble", "Files"];
    let registry =
        Registry::default().kind(Dataset).kind(Base).kind(Train).kind(Pair).kind(Annotate).kind(Join).kind(Command);
    types.into_iter().fold(registry, |registry, name| registry.artifact_type(Named(name)))
}

struct Named(&'static str);

impl ArtifactType for Named {
    fn name(&self) -> &'static str {
        self.0
    }

    fn about(&self) -> &'static str {
        "nothing"
    }

    fn check(&self, _: &Path) -> Result<Facts> {
        Ok(Facts::default())
    }

    fn preview(&self, _: &Path, _: usize) -> Result<String> {
        Ok(String::new())
    }
}

macro_rules! kind {
    ($kind:ident, $name:literal, $params:ident, |$p:ident| $signature:expr, |$q:ident| $check:expr) => {
        struct $kind;

        impl Kind for $kind {
            type Params = $params;
            const NAME: &'static str = $name;
            const VERSION: u32 = 1;
            const ABOUT: &'static str = "does nothing";

            fn signature(&self, $p: &$params) -> Signature {
                $signature
            }

            fn check(&self, $q: &$params) -> Vec<(String, String)> {
                $check
            }

            fn run(&self, _: $params, _: &mut Context) -> Result<()> {
                Ok(())
            }
        }
    };
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct DatasetParams {
    posts: u64,
    style: Style,
    from: Option<InputPath>,
    shuffle: bool,
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Style {
    Plain,
    Wild,
}

impl Default for DatasetParams {
    fn default() -> Self {
        Self { posts: 100, style: Style::Plain, from: None, shuffle: false }
    }
}

kind!(
    Dataset,
    "dataset",
    DatasetParams,
    |p| match p.style {
        Style::Plain => Signature::producing("Posts").seeded(),
        Style::Wild => Signature::producing("Posts").one("wildlife", &["Files"]).seeded(),
    },
    |_p| Vec::new()
);

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct BaseParams {
    size: u32,
}

kind!(Base, "base", BaseParams, |_p| Signature::producing("Model"), |_p| Vec::new());

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct TrainParams {
    lr: f64,
    epochs: u32,
    lora: Option<Lora>,
    schedule: Vec<Step>,
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Lora {
    rank: u32,
    #[serde(default)]
    alpha: f64,
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct Step {
    at: u32,
    lr: f64,
}

impl Default for TrainParams {
    fn default() -> Self {
        Self { lr: 1e-3, epochs: 1, lora: None, schedule: Vec::new() }
    }
}

kind!(
    Train,
    "train",
    TrainParams,
    |_p| Signature::producing("Model")
        .one("base", &["Model"])
        .one("posts", &["Posts", "Preferences"])
        .numerics(1)
        .seeded(),
    |p| if p.lr > 0.0 { Vec::new() } else { vec![("lr".into(), "must be above 0".into())] }
);

#[derive(Default, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
struct Nothing {}

kind!(
    Pair,
    "pairs",
    Nothing,
    |_p| Signature::producing("Pairs").many("models", &["Model"]).one("posts", &["Posts"]).seeded(),
    |_p| Vec::new()
);
kind!(
    Annotate,
    "annotate",
    Nothing,
    |_p| Signature::producing("Preferences").optional("pairs", &["Pairs"]).optional("exclude", &["Posts"]),
    |_p| Vec::new()
);

struct Join;

impl Kind for Join {
    type Params = Nothing;
    const NAME: &'static str = "ensemble";
    const VERSION: u32 = 1;
    const ABOUT: &'static str = "does nothing";

    fn signature(&self, _: &Nothing) -> Signature {
        Signature::producing("Ensemble").many("members", &["Model"])
    }

    fn check_wiring(&self, _: &Nothing, inputs: &[ConnectedInput<'_>]) -> Vec<(&'static str, Error)> {
        let untrained = inputs.iter().filter(|input| input.kind != "train" || input.params["epochs"] == 0);
        untrained.map(|_| ("members", Error::user("a member was not trained").help("train it"))).collect()
    }

    fn run(&self, _: Nothing, _: &mut Context) -> Result<()> {
        Ok(())
    }
}

#[derive(Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct CommandParams {
    run: Vec<String>,
    #[serde(default = "files")]
    output: String,
    #[serde(default)]
    env: BTreeMap<String, String>,
    #[serde(default)]
    files: InputFiles,
}

fn files() -> String {
    "Files".into()
}

kind!(
    Command,
    "command",
    CommandParams,
    |p| Signature { open: true, deterministic: false, ..Signature::producing(p.output.clone()) },
    |_p| Vec::new()
);
