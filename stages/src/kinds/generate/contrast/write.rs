//! Creates the contrast pairs of a chunk of posts.

use std::collections::BTreeMap;

use engine::context::Context;
use engine::error::{Error, Result};
use lm::{CounterRng, SampleOptions, Tokenizer};
use rand::seq::IndexedRandom;
use rand_chacha::ChaCha12Rng;

use super::{Params, Writer};
use crate::corpus::corrupt::{Sound, corrupt, is_worse};
use crate::corpus::quality::Facts;
use crate::error::IntoStageResult;
use crate::prompt::{Fitted, Truncation, response_ids};
use crate::random::{bits_of, share_of};
use crate::train::by_length;
use crate::train::encode::{fit, response_text};
use crate::types::{Corruption, Pair, Post, Side};

/// Counts over all pairs for the metrics.
#[derive(Default)]
pub(super) struct ContrastCounts {
    corruptions: BTreeMap<Corruption, u64>,
    sampled: u64,
    truncation: Truncation,
}

impl ContrastCounts {
    pub fn tell(&self, ctx: &mut Context, rows: f64) {
        for (corruption, n) in &self.corruptions {
            ctx.metric(format!("share_{corruption}"), *n as f64 / rows);
        }
        ctx.metric("sampled", self.sampled as f64 / rows);
        self.truncation.tell(ctx);
    }
}

/// A summary as one side of a pair.
#[derive(Clone)]
struct Response {
    by: String,
    text: String,
    ids: Vec<u32>,
    ended: bool,
}

/// The pairs of `posts`, each given with its pass over the posts; a post whose summary cannot be made worse gives none.
/// `tried` is the number of posts in all earlier chunks.
pub(super) fn chunk(
    p: &Params,
    ctx: &Context,
    writer: &Writer,
    posts: &[(u64, Post)],
    tried: u64,
    tally: &mut ContrastCounts,
) -> Result<Vec<Pair>> {
    let order = ctx.generator_key("order");
    let prompts =
        posts.iter().map(|(_, post)| fit(&writer.tokenizer, post, writer.room)).collect::<Result<Vec<Fitted>>>()?;
    let names: Vec<String> = posts.iter().map(|(round, post)| name(*round, post)).collect();
    let sampled = sample(p, ctx, writer, &names, &prompts)?;
    let mut pairs = Vec::with_capacity(posts.len());
    for (i, ((_, post), prompt)) in posts.iter().zip(prompts).enumerate() {
        let is_sample = sampled[i].is_some();
        let sound = sampled[i].clone().unwrap_or_else(|| reference(post, &writer.tokenizer, p.max_new_tokens));
        let facts = facts(post)?;
        let mut rng = ctx.generator("corruptions");
        rng.set_stream(tried + i as u64);
        let told = format!("{}\n{}", post.title, post.post);
        let known = Sound {
            text: &sound.text,
            ended: sound.ended,
            post: &told,
            facts: facts.as_ref(),
            other_post: &posts[(i + 1) % posts.len()].1.post,
        };
        let Some((corruption, worse)) = worse(p, &writer.tokenizer, &known, &sound.by, &mut rng) else { continue };
        *tally.corruptions.entry(corruption).or_default() += 1;
        tally.sampled += u64::from(is_sample);
        tally.truncation.count(prompt.truncated);
        let corrupted = if bits_of(&order, &names[i]) & 1 == 0 { Side::A } else { Side::B };
        let (a, b) = if corrupted == Side::A { (worse, sound) } else { (sound, worse) };
        pairs.push(Pair {
            id: names[i].clone(),
            post_id: post.id.clone(),
            prompt: prompt.text,
            prompt_ids: prompt.ids,
            facts: post.facts.clone(),
            a_model: a.by,
            a_text: a.text,
            a_ids: a.ids,
            a_ended: a.ended,
            b_model: b.by,
            b_text: b.text,
            b_ids: b.ids,
            b_ended: b.ended,
            corruption: Some(corruption),
            corrupted: Some(corrupted),
        });
    }
    Ok(pairs)
}

/// The id of a post's pair in one pass over the posts.
fn name(round: u64, post: &Post) -> String {
    if round == 0 { format!("{}:contrast", post.id) } else { format!("{}:contrast{}", post.id, round + 1) }
}

fn facts(post: &Post) -> Result<Option<Facts>> {
    let parse =
        |json| Facts::parse(json).map_err(|e| Error::user(format!("post `{}`: its facts do not parse: {e}", post.id)));
    post.facts.as_deref().map(parse).transpose()
}

fn reference(post: &Post, tokenizer: &Tokenizer, most: usize) -> Response {
    written(tokenizer, "reference".to_owned(), post.summary.trim().to_owned(), true, most)
}

/// A text with its ids, cut to `most` ids.
fn written(tokenizer: &Tokenizer, by: String, text: String, ended: bool, most: usize) -> Response {
    let mut ids = response_ids(tokenizer, &text, ended);
    if ids.len() <= most {
        return Response { by, text, ids, ended };
    }
    ids.truncate(most);
    Response { by, text: response_text(tokenizer, &ids), ids, ended: false }
}

/// A copy of `sound` that is still worse after the cut to the maximum length. Corruptions are drawn by weight; one that
/// fails four times is replaced by the others.
fn worse(
    p: &Params,
    tokenizer: &Tokenizer,
    sound: &Sound,
    by: &str,
    rng: &mut ChaCha12Rng,
) -> Option<(Corruption, Response)> {
    const TRIES: usize = 4;
    let mut left: Vec<Corruption> = Corruption::ALL.iter().copied().filter(|&c| p.weights.of(c) > 0.0).collect();
    while let Ok(&corruption) = left.choose_weighted(rng, |&c| p.weights.of(c)) {
        for _ in 0..TRIES {
            if let Some((text, ended)) = corrupt(sound, corruption, rng) {
                let response = written(tokenizer, format!("{by}+{corruption}"), text, ended, p.max_new_tokens);
                if is_worse(sound, &response.text, response.ended) {
                    return Some((corruption, response));
                }
            }
        }
        left.retain(|&c| c != corruption);
    }
    None
}

/// The model's samples for its fraction of the prompts; `None` where the reference is used.
fn sample(
    p: &Params,
    ctx: &Context,
    writer: &Writer,
    names: &[String],
    prompts: &[Fitted],
) -> Result<Vec<Option<Response>>> {
    let mut out = vec![None; prompts.len()];
    let Some((model, label)) = &writer.model else { return Ok(out) };
    let who = ctx.generator_key("who writes");
    let key = ctx.generator_key("samples");
    let how = SampleOptions {
        temperature: 1.0,
        top_p: 1.0,
        min_new_tokens: p.min_new_tokens,
        max_new_tokens: p.max_new_tokens,
        eos: writer.tokenizer.eos().clone(),
        greedy: false,
    };
    let chosen: Vec<usize> = (0..prompts.len()).filter(|&i| share_of(&who, &names[i]) < p.samples).collect();
    let lengths: Vec<usize> = chosen.iter().map(|&i| prompts[i].ids.len()).collect();
    for numbers in by_length(&lengths, p.batch) {
        let chosen: Vec<usize> = numbers.into_iter().map(|n| chosen[n]).collect();
        let batch: Vec<&[u32]> = chosen.iter().map(|&i| prompts[i].ids.as_slice()).collect();
        // A sample depends only on its pair's name.
        let rows: Vec<u64> = chosen.iter().map(|&i| bits_of(&key, &names[i])).collect();
        for (i, s) in
            chosen.into_iter().zip(lm::sample(model, &batch, &how, &CounterRng(key), &rows).into_stage_result()?)
        {
            let text = response_text(&writer.tokenizer, &s.ids);
            out[i] = Some(Response { by: label.clone(), text, ids: s.ids, ended: s.ended });
        }
    }
    Ok(out)
}
