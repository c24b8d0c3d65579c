//! `annotate.claude`: a language model behind the Messages API judges pairs, as in the paper (A.2). Knows no reward model.

mod answers;
mod client;
mod request;

use std::collections::{BTreeMap, HashMap};

use answers::Answers;
use client::{BASE_URL, Client, Endpoint, KEY};
use engine::context::Context;
use engine::error::{Error, Result};
use engine::kind::{Kind, Signature};
use request::{Document, Reply, Settings, Shown};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use super::{HeldOut, Judged, hash};
use crate::data::clean::normalised;
use crate::http;
use crate::prompt::Parts;
use crate::types::{Outcome, Pair, Pairs, Posts, Preference, Preferences, Side};

/// Requests under way at once, if the environment does not say.
const CONCURRENCY: usize = 8;
/// Says otherwise. Not a parameter: how many requests are under way changes no label and so belongs to no key.
const CONCURRENCY_VARIABLE: &str = "TEMPER_REQUESTS";

pub struct Claude;

/// How hard the model is to think.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Effort {
    Low,
    Medium,
    High,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Params {
    /// The model's id at the API. There is no default: it decides what is paid and what is got.
    pub model: String,
    /// Pairs judged in one request. The paper: 2.
    #[serde(default = "two")]
    pub documents_per_request: usize,
    /// Tokens of an answer at most, thinking included.
    #[serde(default = "answer_tokens")]
    pub max_tokens: u32,
    /// `low`, `medium` or `high`; sent only if given.
    #[serde(default)]
    pub effort: Option<Effort>,
    /// Sent only if given: newer models refuse it.
    #[serde(default)]
    pub temperature: Option<f64>,
    /// The greatest share of pairs that may stay without a label (refused, cut off, not readable).
    #[serde(default = "few")]
    pub max_unlabelled: f64,
}

fn two() -> usize {
    2
}

fn answer_tokens() -> u32 {
    1024
}

fn few() -> f64 {
    0.05
}

/// What came of one pair.
struct Judgement {
    reply: Reply,
    shown: Shown,
}

impl Kind for Claude {
    type Params = Params;

    const NAME: &'static str = "annotate.claude";
    const VERSION: u32 = 1;
    const ABOUT: &'static str = "judges pairs by a language model behind the Messages API";

    fn signature(&self, _: &Params) -> Signature {
        let mut signature = Signature::gives(Preferences::NAME)
            .many("pairs", &[Pairs::NAME])
            .optional("exclude", &[Posts::NAME])
            .seeded();
        signature.deterministic = false;
        signature.env = [KEY, BASE_URL, CONCURRENCY_VARIABLE].into_iter().chain(http::ENV).map(str::to_owned).collect();
        signature.secrets = vec![KEY.to_owned()];
        signature
    }

    fn check(&self, params: &Params) -> Vec<(String, String)> {
        let mut faults = Vec::new();
        let mut fault = |wrong: bool, field: &str, what: &str| {
            if wrong {
                faults.push((field.to_owned(), what.to_owned()));
            }
        };
        fault(params.model.trim().is_empty(), "model", "expected the id of a model");
        fault(!(1..=20).contains(&params.documents_per_request), "documents_per_request", "expected 1 to 20");
        fault(params.max_tokens == 0, "max_tokens", "expected at least 1");
        fault(!(0.0..=1.0).contains(&params.max_unlabelled), "max_unlabelled", "expected 0 to 1");
        faults
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        run_with(&params, ctx, || {
            let key = http::variable(KEY).ok_or_else(|| {
                Error::yours(format!("no API key: {KEY} is not set"))
                    .help("set it in the environment that `temper` runs in")
            })?;
            let base = http::variable(BASE_URL).unwrap_or_else(|| "https://api.anthropic.com".to_owned());
            Endpoint::new(&base, &key)
        })
    }
}

fn run_with(params: &Params, ctx: &mut Context, endpoint: impl FnOnce() -> Result<Endpoint>) -> Result<()> {
    let settings = Settings {
        model: params.model.clone(),
        max_tokens: params.max_tokens,
        effort: params.effort,
        temperature: params.temperature,
    };
    let order = ctx.generator_key("order");
    let mut held_out = HeldOut::of(ctx)?;
    let mut answers = Answers::open(&ctx.checkpoints().join("answers.jsonl"))?;

    // First pass: the documents without an answer, once each, in an order that content alone decides.
    let mut wanted: BTreeMap<(u64, String), Document> = BTreeMap::new();
    let mut held = Vec::new();
    let mut documents = 0_u64;
    for input in ctx.many("pairs") {
        for pair in Pairs::open(&input.folder)? {
            let pair = pair?;
            let out = held_out.holds(&pair.post_id, Parts::parse(&pair.prompt).map_or("", |parts| parts.post));
            held.push(out);
            if out || is_tie(&pair) {
                continue;
            }
            documents += 1;
            let (place, document) = document(&order, &pair);
            let key = document.key(&settings);
            if answers.label(&key).is_none() {
                wanted.insert((place, key), document);
            }
        }
    }
    let already = documents - (wanted.len() as u64).min(documents);
    ctx.metric("answers_kept_from_before", already as f64);
    let mut unlabelled: HashMap<String, Reply> = HashMap::new();
    if !wanted.is_empty() {
        let endpoint = endpoint()?;
        ask(&settings, params.documents_per_request, wanted, endpoint, &mut answers, &mut unlabelled, ctx)?;
    }

    // Second pass: the table, in the order of the pairs.
    let mut judged = Judged::create(ctx.out())?;
    let (mut first_shown, mut asked) = (0_u64, 0_u64);
    let mut held = held.into_iter();
    for input in ctx.many("pairs") {
        for pair in Pairs::open(&input.folder)? {
            let pair = pair?;
            if held.next().unwrap_or(false) {
                continue;
            }
            if is_tie(&pair) {
                judged.push(Preference::of(pair, Side::A, Outcome::Tie, &settings.model))?;
                continue;
            }
            let (_, document) = document(&order, &pair);
            let judgement = judgement(&document, &settings, &answers, &unlabelled);
            let (chosen, outcome) = match judgement.reply {
                Reply::Label(place) => {
                    asked += 1;
                    first_shown += u64::from(place == 1);
                    (judgement.shown.side(place), Outcome::Labelled)
                }
                Reply::Refused => (Side::A, Outcome::Refused),
                Reply::Truncated => (Side::A, Outcome::Truncated),
                Reply::Unparsable => (Side::A, Outcome::Unparsable),
            };
            judged.push(Preference::of(pair, chosen, outcome, &settings.model))?;
        }
    }
    if asked > 0 {
        ctx.metric("first_shown_share", first_shown as f64 / asked as f64);
    }
    ctx.metric("held_out_dropped", held_out.dropped as f64);
    let without = [Outcome::Refused, Outcome::Truncated, Outcome::Unparsable].map(|o| judged.count(o));
    let share = without.iter().sum::<u64>() as f64 / documents.max(1) as f64;
    if share > params.max_unlabelled {
        let [refused, truncated, unparsable] = without;
        return Err(Error::surroundings(format!(
            "{:.1}% of {documents} pairs have no label ({refused} refused, {truncated} cut off, {unparsable} not readable), \
             more than max_unlabelled = {}",
            100.0 * share,
            params.max_unlabelled
        ))
        .help("the labels that were got are kept: running again asks only for the others"));
    }
    judged.finish(ctx)
}

fn is_tie(pair: &Pair) -> bool {
    normalised(&pair.a_text) == normalised(&pair.b_text)
}

/// A pair as it is shown, and its place in the order of requests: both from its content.
fn document(order: &[u8; 32], pair: &Pair) -> (u64, Document) {
    let hash = hash(order, &[&pair.prompt, &pair.a_text, &pair.b_text]);
    let shown = if hash & 1 == 0 { Shown::AFirst } else { Shown::BFirst };
    let (first, second) =
        if shown == Shown::AFirst { (&pair.a_text, &pair.b_text) } else { (&pair.b_text, &pair.a_text) };
    (hash, Document { prompt: pair.prompt.clone(), first: first.clone(), second: second.clone(), shown })
}

fn judgement(
    document: &Document,
    settings: &Settings,
    answers: &Answers,
    unlabelled: &HashMap<String, Reply>,
) -> Judgement {
    let key = document.key(settings);
    let reply = match answers.label(&key) {
        Some(place) => Reply::Label(place),
        None => unlabelled.get(&key).copied().unwrap_or(Reply::Unparsable),
    };
    Judgement { reply, shown: document.shown }
}

/// Sends all requests, a bounded number at once, and keeps each answer as it lands. After a request that failed for good
/// nothing new is sent, and what is under way is awaited: it is paid for.
fn ask(
    settings: &Settings,
    documents_per_request: usize,
    wanted: BTreeMap<(u64, String), Document>,
    endpoint: Endpoint,
    answers: &mut Answers,
    unlabelled: &mut HashMap<String, Reply>,
    ctx: &mut Context,
) -> Result<()> {
    let (waits, mut waited) = tokio::sync::mpsc::unbounded_channel();
    let client = Client::new(endpoint, waits)?;
    let total = wanted.len() as u64;
    let mut waiting: Vec<(String, Document)> = wanted.into_iter().map(|((_, key), document)| (key, document)).collect();
    waiting.reverse();
    let concurrency =
        http::variable(CONCURRENCY_VARIABLE).and_then(|n| n.parse().ok()).unwrap_or(CONCURRENCY).clamp(1, 256);
    let (mut done, mut tokens) = (0_u64, [0_u64; 2]);
    let mut failed: Option<Error> = None;
    http::runtime()?.block_on(async {
        let mut running = JoinSet::new();
        loop {
            while failed.is_none() && running.len() < concurrency && !waiting.is_empty() {
                let from = waiting.len().saturating_sub(documents_per_request);
                let mut group = waiting.split_off(from);
                group.reverse();
                let (keys, documents): (Vec<_>, Vec<_>) = group.into_iter().unzip();
                let body = request::body(settings, &documents);
                let client = client.clone();
                running.spawn(async move { (keys, client.post(&body).await) });
            }
            let joined = tokio::select! {
                // Waits first, so that none is left when the last request ends.
                biased;
                Some(wait) = waited.recv() => {
                    ctx.warn(format!("annotate.claude: {wait}"));
                    continue;
                }
                joined = running.join_next() => joined,
            };
            let Some(joined) = joined else { break };
            let landed = joined.map_err(|e| Error::ours(format!("annotate.claude: a request's task ended: {e}")));
            let kept = landed.and_then(|(keys, answer)| {
                let answer = answer?;
                let replies = request::replies(&answer.body, keys.len());
                answers.keep(&keys, &replies, &answer)?;
                done += keys.len() as u64;
                tokens[0] += answer.tokens("input_tokens");
                tokens[1] += answer.tokens("output_tokens");
                let without = keys.into_iter().zip(replies).filter(|(_, reply)| !matches!(reply, Reply::Label(_)));
                unlabelled.extend(without);
                Ok(())
            });
            if let Err(e) = kept {
                failed.get_or_insert(e);
            }
            ctx.progress(done, total, "pairs", Some(("output tokens", tokens[1] as f64)));
        }
    });
    ctx.metric("input_tokens", tokens[0] as f64);
    ctx.metric("output_tokens", tokens[1] as f64);
    failed.map_or(Ok(()), Err)
}

#[cfg(test)]
mod tests;
