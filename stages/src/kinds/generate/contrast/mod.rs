//! `generate.contrast`: pairs of a sound summary and a corrupted copy of it.

mod write;

use engine::context::Context;
use engine::error::{Error, Result};
use engine::estimate::Scaling;
use engine::kind::{Kind, Signature};
use lm::{CausalLm, Tokenizer};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::corpus::cycle::{self, PostCycle};
use crate::error::{IntoStageResult, on_a_big_stack};
use crate::train::params::{BATCH, Faults, ROWS};
use crate::types::{self, Corruption, Model, Pairs, Posts, Split};

pub struct GenerateContrast;

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Params {
    /// Number of pairs; posts are reused if there are fewer posts.
    pub pairs: u64,
    /// The split to draw posts from; null: every post outside valid and calibration.
    #[serde(default = "gold")]
    pub split: Option<Split>,
    /// Relative frequencies of the corruptions.
    #[serde(default)]
    pub weights: Weights,
    /// With a model: the fraction of pairs whose sound summary is sampled from the model instead of the reference.
    #[serde(default = "half")]
    pub samples: f64,
    /// Tokens of a sample before EOS is allowed.
    #[serde(default = "five")]
    pub min_new_tokens: usize,
    /// Maximum tokens of a summary. Longer summaries are cut, and count as not ended.
    #[serde(default = "forty_eight")]
    pub max_new_tokens: usize,
    /// Maximum tokens of a prompt. Longer prompts lose the end of their post; a model's window may allow less.
    #[serde(default = "five_hundred_twelve")]
    pub prompt_tokens: usize,
    /// Prompts sampled at once; bounds memory.
    #[serde(default = "thirty_two")]
    pub batch: usize,
}

/// Relative frequencies of the corruptions. A corruption that cannot make a text worse is replaced by another.
#[derive(Clone, Copy, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Weights {
    /// One to three facts replaced by false ones; in posts without facts, words of the post by words of another.
    pub swap: f64,
    /// Words or sentences in another order.
    pub shuffle: f64,
    /// The end removed.
    pub truncate: f64,
    /// A phrase repeated.
    pub repeat: f64,
}

impl Default for Weights {
    fn default() -> Self {
        Self { swap: 0.6, shuffle: 0.15, truncate: 0.15, repeat: 0.1 }
    }
}

impl Weights {
    fn of(self, corruption: Corruption) -> f64 {
        match corruption {
            Corruption::Swap => self.swap,
            Corruption::Shuffle => self.shuffle,
            Corruption::Truncate => self.truncate,
            Corruption::Repeat => self.repeat,
        }
    }
}

#[allow(clippy::unnecessary_wraps)] // Serde's default for the field's type.
fn gold() -> Option<Split> {
    Some(Split::Gold)
}

fn half() -> f64 {
    0.5
}

fn five() -> usize {
    5
}

fn forty_eight() -> usize {
    48
}

fn five_hundred_twelve() -> usize {
    512
}

fn thirty_two() -> usize {
    32
}

impl Kind for GenerateContrast {
    type Params = Params;
    const NAME: &'static str = "generate.contrast";
    const VERSION: u32 = 1;
    const ABOUT: &'static str = "pairs summaries with copies of them that were made worse in a stated way";

    fn signature(&self, _: &Params) -> Signature {
        Signature::producing(Pairs::NAME)
            .one("posts", &[Posts::NAME])
            .optional("model", &[Model::NAME])
            .optional("tokenizer", &[types::Tokenizer::NAME])
            .seeded()
            .numerics(lm::NUMERICS)
    }

    fn check(&self, p: &Params) -> Vec<(String, String)> {
        let mut faults = Faults(cycle::fault(p.split).into_iter().collect());
        faults.must(p.pairs > 0, "pairs", "must be at least 1");
        faults.at_most(p.pairs, ROWS, "pairs");
        faults.must((0.0..=1.0).contains(&p.samples), "samples", "must be in [0, 1]");
        faults.must(
            p.max_new_tokens > 0 && p.min_new_tokens <= p.max_new_tokens,
            "max_new_tokens",
            "must be at least `min_new_tokens`, and 1",
        );
        faults.must(p.prompt_tokens > 0, "prompt_tokens", "must be at least 1");
        faults.must(p.batch > 0, "batch", "must be at least 1");
        faults.at_most(p.batch as u64, BATCH, "batch");
        let weights = Corruption::ALL.iter().map(|&c| p.weights.of(c));
        let good = weights.clone().all(|w| w >= 0.0 && w.is_finite()) && weights.sum::<f64>() > 0.0;
        faults.must(good, "weights", "must not be negative, and not all 0");
        faults.0
    }

    fn scaling(&self, p: &Params, _: &dyn Fn(&str) -> Option<f64>) -> Option<Scaling> {
        Some(Scaling::new(p.pairs as f64, p.pairs as f64))
    }

    fn run(&self, p: Params, ctx: &mut Context) -> Result<()> {
        lm::follow_threads(ctx.thread_limit().clone());
        on_a_big_stack(|| generate(&p, ctx))
    }
}

/// The source of sound summaries, and their tokenizer.
struct Writer {
    /// The model with its label.
    model: Option<(CausalLm, String)>,
    tokenizer: Tokenizer,
    /// Maximum tokens of a prompt.
    room: usize,
}

fn generate(p: &Params, ctx: &mut Context) -> Result<()> {
    /// Posts whose prompts and samples are in memory at once.
    const CHUNK: u64 = 512;
    let writer = open(p, ctx)?;
    let mut posts = PostCycle::open(&ctx.one("posts")?.folder, p.split)?;
    let mut pairs = Pairs::create(ctx.out())?;
    let mut tally = write::ContrastCounts::default();
    let mut tried = 0;
    while pairs.rows() < p.pairs {
        let wanted = (p.pairs - pairs.rows()).min(CHUNK);
        let chunk = (0..wanted).map(|_| posts.next()).collect::<Result<Vec<_>>>()?;
        let made = write::chunk(p, ctx, &writer, &chunk, tried, &mut tally)?;
        tried += wanted;
        // Any single post may fail, but if hardly any succeeds, more passes do not help.
        if made.is_empty() && tried > 10 * (pairs.rows() + CHUNK) {
            return Err(Error::user(format!("of {tried} summaries only {} could be made worse", pairs.rows()))
                .help("are they very short? give other posts, or more corruptions in `weights`"));
        }
        made.into_iter().try_for_each(|pair| pairs.push(pair))?;
        ctx.progress(pairs.rows(), p.pairs, "pairs", None);
    }
    let rows = pairs.finish()? as f64;
    ctx.metric("pairs", rows);
    ctx.metric("skipped", tried as f64 - rows);
    tally.tell(ctx, rows);
    Ok(())
}

fn open(p: &Params, ctx: &Context) -> Result<Writer> {
    match (ctx.optional("model"), ctx.optional("tokenizer")) {
        (Some(input), None) => {
            let (model, tokenizer) = crate::model::load(&input.folder)?;
            let window = model.config().window();
            let room = window.saturating_sub(p.max_new_tokens).min(p.prompt_tokens);
            if room == 0 {
                let why = format!(
                    "`max_new_tokens` {} leaves no room for a prompt in a window of {window} tokens",
                    p.max_new_tokens
                );
                return Err(Error::user(why));
            }
            Ok(Writer { model: Some((model, input.label.clone())), tokenizer, room })
        }
        (None, Some(input)) => {
            let tokenizer = Tokenizer::load(&input.folder.join(types::Tokenizer::FILE)).into_stage_result()?;
            Ok(Writer { model: None, tokenizer, room: p.prompt_tokens })
        }
        (None, None) => {
            Err(Error::user("nothing to encode the summaries with").help("need a `model` or a `tokenizer`"))
        }
        (Some(_), Some(_)) => Err(Error::user("both a model and a tokenizer are given")
            .help("the model brings its own tokenizer: need one of `model` and `tokenizer`")),
    }
}

#[cfg(test)]
mod tests;
