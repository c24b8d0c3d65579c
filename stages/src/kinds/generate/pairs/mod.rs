//! `generate.pairs`: two models each write a summary of the same post.

#[cfg(test)]
mod tests;

use engine::context::Context;
use engine::error::{Error, Result};
use engine::estimate::{Forecast, Scaling};
use engine::kind::{ConnectedInput, Kind, Signature};
use lm::{CausalLm, CounterRng, SampleOptions, SampledResponse, Tokenizer};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{IntoStageResult, on_a_big_stack};
use crate::model;
use crate::model::forecast::{Models, memory};
use crate::prompt::{Fitted, Truncation};
use crate::random::bits_of;
use crate::train::by_length;
use crate::train::encode::{fit, response_text, room};
use crate::train::params::{BATCH, Faults, Precision};
use crate::types::{Pair, Pairs, Post, Posts, Split};

pub struct GeneratePairs;

/// The defaults are those of the paper.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Params {
    /// The split whose posts are summarised.
    pub split: Split,
    /// Number of posts, drawn by the seed; absent: all posts of the split.
    #[serde(default)]
    pub pairs: Option<usize>,
    #[serde(default = "one")]
    pub temperature: f64,
    /// Sample only from the most probable tokens whose probabilities reach this sum; 1 disables this.
    #[serde(default = "one")]
    pub top_p: f64,
    /// Tokens of a summary before EOS is allowed.
    #[serde(default = "five")]
    pub min_new_tokens: usize,
    #[serde(default = "forty_eight")]
    pub max_new_tokens: usize,
    /// Take both summaries from the same model if only one is given.
    #[serde(default)]
    pub same_model: bool,
    /// Precision of matrix products with weights: `f32`, or `bf16` (operands rounded, sums in f32). Weights, norms,
    /// attention scores, losses and the optimiser stay f32.
    #[serde(default)]
    pub precision: Precision,
    /// Prompts sampled at once; bounds memory.
    #[serde(default = "thirty_two")]
    pub batch: usize,
}

fn one() -> f64 {
    1.0
}

fn five() -> usize {
    5
}

fn forty_eight() -> usize {
    48
}

fn thirty_two() -> usize {
    32
}

impl Kind for GeneratePairs {
    type Params = Params;
    const NAME: &'static str = "generate.pairs";
    const VERSION: u32 = 1;
    const ABOUT: &'static str = "samples two summaries of each post from two distinct models of a list";

    fn signature(&self, _: &Params) -> Signature {
        Signature::producing("Pairs")
            .many("models", &["Model"])
            .one("posts", &["Posts"])
            .seeded()
            .numerics(lm::NUMERICS)
    }

    fn check(&self, p: &Params) -> Vec<(String, String)> {
        let mut faults = Faults::default();
        faults.positive(p.temperature, "temperature");
        faults.must(p.top_p > 0.0 && p.top_p <= 1.0, "top_p", "must be in (0, 1]");
        faults.must(
            p.max_new_tokens > 0 && p.min_new_tokens <= p.max_new_tokens,
            "max_new_tokens",
            "must be at least `min_new_tokens`, and 1",
        );
        faults.must(p.batch > 0, "batch", "must be at least 1");
        faults.at_most(p.batch as u64, BATCH, "batch");
        faults.must(p.pairs.is_none_or(|n| n > 0), "pairs", "must be at least 1");
        faults.0
    }

    fn check_wiring(&self, p: &Params, inputs: &[ConnectedInput<'_>]) -> Vec<(&'static str, Error)> {
        let models = inputs.iter().filter(|input| input.port == "models").count();
        Vec::from_iter((models == 1 && !p.same_model).then(|| ("models", too_few())))
    }

    fn scaling(&self, p: &Params, size: &dyn Fn(&str) -> Option<f64>) -> Option<Scaling> {
        let pairs = p.pairs? as f64;
        let (models, tokens) = (size("models")?, p.max_new_tokens as f64);
        Some(Scaling::new(pairs * tokens * models, pairs))
    }

    fn forecast(&self, p: &Params, inputs: &dyn Fn(&str) -> Vec<Value>) -> Forecast {
        memory(Models::new(&inputs("models")).map(|models| models.sampling(p.batch)))
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        lm::follow_threads(ctx.thread_limit().clone());
        on_a_big_stack(|| generate(&params, ctx))
    }
}

struct Named {
    label: String,
    model: CausalLm,
}

/// Posts whose prompts and samples are in memory at once.
const CHUNK: usize = 512;

fn generate(p: &Params, ctx: &mut Context) -> Result<()> {
    let (models, tokenizer) = load(p, ctx)?;
    // The smallest window applies, so that both models of a pair read the same prompt.
    let window = models.iter().map(|m| m.model.config().window()).min().unwrap_or(0);
    let room = room(window, p.max_new_tokens)?;
    let chosen = choose(p, ctx)?;
    let keys = Keys { models: ctx.generator_key("models"), samples: ctx.generator_key("samples") };
    let mut writer = Pairs::create(ctx.out())?;
    let (mut truncation, mut ended, mut length) = (Truncation::default(), 0_u64, 0_u64);
    let (mut done, mut chunk) = (0, Vec::with_capacity(CHUNK));
    let mut posts = chosen_posts(ctx, &chosen)?;
    loop {
        let post = posts.next().transpose()?;
        let last = post.is_none();
        chunk.extend(post);
        if chunk.len() == CHUNK || last {
            for pair in sample_chunk(p, ctx, &models, &tokenizer, &keys, room, &chunk, (done, chosen.len()))? {
                truncation.count(pair.1);
                ended += u64::from(pair.0.a_ended) + u64::from(pair.0.b_ended);
                length += (pair.0.a_ids.len() + pair.0.b_ids.len()) as u64;
                writer.push(pair.0)?;
            }
            done += chunk.len();
            chunk.clear();
        }
        if last {
            break;
        }
    }
    let rows = writer.finish()?;
    ctx.metric("pairs", rows as f64);
    truncation.tell(ctx);
    ctx.metric("ended", ended as f64 / (2 * rows.max(1)) as f64);
    ctx.metric("mean_tokens", length as f64 / (2 * rows.max(1)) as f64);
    Ok(())
}

struct Keys {
    models: [u8; 32],
    samples: [u8; 32],
}

fn too_few() -> Error {
    Error::user("one model cannot give pairs of two distinct models")
        .help("list more models at port `models`, or set `same_model: true`")
}

fn load(p: &Params, ctx: &Context) -> Result<(Vec<Named>, Tokenizer)> {
    let inputs = ctx.many("models");
    if inputs.len() == 1 && !p.same_model {
        return Err(too_few());
    }
    let mut models = Vec::new();
    let mut shared: Option<(Tokenizer, String)> = None;
    for input in inputs {
        let (model, tokenizer) = model::load(&input.folder)?;
        let json = tokenizer.to_json().into_stage_result()?;
        match &shared {
            Some((_, first)) if *first != json => {
                return Err(Error::user(format!(
                    "models `{}` and `{}` have different tokenizers",
                    inputs[0].label, input.label
                ))
                .help("pairs keep sampled ids: all models of the list must share one tokenizer"));
            }
            Some(_) => {}
            None => shared = Some((tokenizer, json)),
        }
        models.push(Named { label: input.label.clone(), model: p.precision.of(&model) });
    }
    let (tokenizer, _) = shared.ok_or_else(|| Error::internal("no model at port `models`"))?;
    Ok((models, tokenizer))
}

/// Indices of the chosen posts, in the order of the table: those with the smallest hash of (seed, id).
fn choose(p: &Params, ctx: &Context) -> Result<Vec<u64>> {
    let key = ctx.generator_key("posts");
    let mut ranked = Vec::new();
    for (number, post) in Posts::open(&ctx.one("posts")?.folder)?.enumerate() {
        let post = post?;
        if post.is_in(p.split) {
            ranked.push((bits_of(&key, &post.id), number as u64));
        }
    }
    if ranked.is_empty() {
        return Err(Error::user(format!("no posts in split `{}`", p.split)).help("give `dataset.filter` a size for it"));
    }
    let wanted = p.pairs.unwrap_or(ranked.len());
    if wanted > ranked.len() {
        return Err(Error::user(format!("`pairs` is {wanted}, split `{}` holds {} posts", p.split, ranked.len()))
            .help("lower `pairs`, or give `dataset.filter` a larger split"));
    }
    ranked.sort_unstable();
    let mut chosen: Vec<u64> = ranked.into_iter().take(wanted).map(|(_, number)| number).collect();
    chosen.sort_unstable();
    Ok(chosen)
}

fn chosen_posts<'a>(ctx: &Context, chosen: &'a [u64]) -> Result<impl Iterator<Item = Result<Post>> + 'a> {
    let mut next = 0;
    let posts = Posts::open(&ctx.one("posts")?.folder)?.enumerate();
    Ok(posts.filter_map(move |(number, post)| {
        let wanted = chosen.get(next) == Some(&(number as u64));
        next += usize::from(wanted);
        (wanted || post.is_err()).then_some(post)
    }))
}

/// Two distinct models, or twice the only one, drawn by a hash of seed and post.
fn two_of(models: usize, bits: u64) -> (usize, usize) {
    let n = models as u64;
    if n == 1 {
        return (0, 0);
    }
    let (a, b) = (bits % n, (bits / n) % (n - 1));
    (a as usize, (b + u64::from(b >= a)) as usize)
}

/// One chunk's pairs in the order of its posts, each with whether its prompt was truncated.
#[allow(clippy::too_many_arguments)] // One call site; a struct of these eight would say no more.
fn sample_chunk(
    p: &Params,
    ctx: &mut Context,
    models: &[Named],
    tokenizer: &Tokenizer,
    keys: &Keys,
    room: usize,
    posts: &[Post],
    (done, total): (usize, usize),
) -> Result<Vec<(Pair, bool)>> {
    let prompts = posts.iter().map(|post| fit(tokenizer, post, room)).collect::<Result<Vec<Fitted>>>()?;
    let writers: Vec<(usize, usize)> =
        posts.iter().map(|post| two_of(models.len(), bits_of(&keys.models, &post.id))).collect();
    let how = SampleOptions {
        temperature: p.temperature,
        top_p: p.top_p,
        min_new_tokens: p.min_new_tokens,
        max_new_tokens: p.max_new_tokens,
        eos: tokenizer.eos().clone(),
        greedy: false,
    };
    let draws = CounterRng(keys.samples);
    // Two slots per post: 2 i is its summary a, 2 i + 1 its summary b.
    let mut samples: Vec<Option<SampledResponse>> = vec![None; 2 * posts.len()];
    let mut sampled = 0;
    for (m, named) in models.iter().enumerate() {
        let slots: Vec<usize> = (0..2 * posts.len())
            .filter(|slot| m == if slot % 2 == 0 { writers[slot / 2].0 } else { writers[slot / 2].1 })
            .collect();
        let lengths: Vec<usize> = slots.iter().map(|slot| prompts[slot / 2].ids.len()).collect();
        for numbers in by_length(&lengths, p.batch) {
            let batch: Vec<&[u32]> = numbers.iter().map(|&i| prompts[slots[i] / 2].ids.as_slice()).collect();
            // A row's draws depend only on its post and side.
            let rows: Vec<u64> = numbers
                .iter()
                .map(|&i| (bits_of(&keys.samples, &posts[slots[i] / 2].id) & !1) | (slots[i] % 2) as u64)
                .collect();
            let out = lm::sample(&named.model, &batch, &how, &draws, &rows).into_stage_result()?;
            sampled += out.len();
            for (i, sample) in numbers.into_iter().zip(out) {
                samples[slots[i]] = Some(sample);
            }
            ctx.progress((done + sampled / 2) as u64, total as u64, "pairs", None);
        }
    }
    let mut samples = samples.into_iter();
    let mut next = || samples.next().flatten().ok_or_else(|| Error::internal("a prompt without a sample"));
    let mut pairs = Vec::with_capacity(posts.len());
    for ((post, fitted), (a, b)) in posts.iter().zip(prompts).zip(writers) {
        let (first, second) = (next()?, next()?);
        let pair = Pair {
            id: format!("{}:sampled", post.id),
            post_id: post.id.clone(),
            prompt: fitted.text,
            prompt_ids: fitted.ids,
            facts: post.facts.clone(),
            a_model: models[a].label.clone(),
            a_text: response_text(tokenizer, &first.ids),
            a_ids: first.ids,
            a_ended: first.ended,
            b_model: models[b].label.clone(),
            b_text: response_text(tokenizer, &second.ids),
            b_ids: second.ids,
            b_ended: second.ended,
            corruption: None,
            corrupted: None,
        };
        pairs.push((pair, fitted.truncated));
    }
    Ok(pairs)
}
