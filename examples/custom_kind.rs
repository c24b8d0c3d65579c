//! A stage kind of your own beside the built-in ones, with temper's whole command line:
//!
//! ```text
//! cargo run --release --example custom_kind -- kinds annotate.shorter
//! cargo run --release --example custom_kind -- run examples/custom_kind.yaml
//! ```
//!
//! In a crate of your own, `Cargo.toml` needs `temper` (a path or a git address), `schemars` and `serde`. If a program in
//! another language is enough, use the kind `command` instead: it needs no build (docs/pipeline.md).

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use temper::engine::context::Context;
use temper::engine::error::Result;
use temper::engine::kind::{Kind, Signature};
use temper::stages::types::{Outcome, Pairs, Preference, Preferences, Side};

fn main() -> std::process::ExitCode {
    temper::main_with(&temper::stages::registry().kind(Shorter))
}

/// Prefers the shorter summary: a judge that a reward model is easily trained to agree with.
struct Shorter;

/// The stage's `with`. Comments become the help of `temper kinds` and the schema of editors.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
struct Params {
    /// Pairs whose lengths differ by fewer characters are ties, which no reward model is trained on.
    margin: usize,
}

impl Default for Params {
    fn default() -> Self {
        Self { margin: 1 }
    }
}

impl Kind for Shorter {
    type Params = Params;

    const NAME: &'static str = "annotate.shorter";
    /// Raise it whenever `run` gives other bytes for the same parameters and inputs: it is part of the cache key.
    const VERSION: u32 = 1;
    const ABOUT: &'static str = "judges pairs by length: the shorter summary is preferred";

    fn signature(&self, _: &Params) -> Signature {
        Signature::producing(Preferences::NAME).one("pairs", &[Pairs::NAME])
    }

    /// What the types cannot express. Reported with the line of the pipeline file, before anything runs.
    fn check(&self, params: &Params) -> Vec<(String, String)> {
        if params.margin == 0 { vec![("margin".into(), "must be at least 1".into())] } else { Vec::new() }
    }

    /// Runs in a process of its own. Its folder becomes the artifact if it ends without an error.
    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        let mut table = Preferences::create(ctx.out())?;
        let mut ties = 0;
        for pair in Pairs::open(&ctx.one("pairs")?.folder)? {
            let pair = pair?;
            let (a, b) = (pair.a_text.chars().count(), pair.b_text.chars().count());
            let outcome = if a.abs_diff(b) < params.margin { Outcome::Tie } else { Outcome::Labelled };
            ties += u32::from(outcome == Outcome::Tie);
            let chosen = if a <= b { Side::A } else { Side::B };
            table.push(Preference::of(pair, chosen, outcome, "shorter"))?;
        }
        let rows = table.finish()?;
        // Metrics are shown by `temper show` and in the report.
        ctx.metric("rows", rows as f64);
        ctx.metric("ties", f64::from(ties));
        Ok(())
    }
}
