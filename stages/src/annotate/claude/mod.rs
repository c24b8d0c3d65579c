//! `annotate.claude`: a language model behind the Messages API labels pairs, as in the paper (A.2).

mod answers;
mod ask;
mod batch;
mod cache;
mod client;
mod credentials;
mod document;
mod estimate;
mod money;
mod params;
mod prices;
mod quality;
mod reply;
mod request;
mod settings;
mod spool;
mod template;

use std::path::Path;

use answers::{Answers, Found};
use ask::Asker;
use cache::Cache;
pub use cache::{Verified, verify};
use client::{BASE_URL, Endpoint, KEY};
pub(crate) use credentials::service;
use document::{Question, Questions};
use engine::context::Context;
use engine::error::{At, Error, Result};
use engine::estimate::Estimate;
use engine::kind::{Kind, Signature};
use estimate::{Seen, Terms, Work};
pub use params::Params;
use prices::Usage;
use quality::Quality;
use reply::Reply;
use settings::Settings;
use spool::{Spool, Waiting};

use super::{HeldOut, Judged};
use crate::data::clean::normalised;
use crate::http;
use crate::prompt::Parts;
use crate::types::{Outcome, Pair, Pairs, Posts, Preference, Preferences, Side};

pub struct Claude;

impl Kind for Claude {
    type Params = Params;

    const NAME: &'static str = "annotate.claude";
    const VERSION: u32 = 3;
    const ABOUT: &'static str = "judges pairs by a language model behind the Messages API";

    fn signature(&self, _: &Params) -> Signature {
        let mut signature = Signature::gives(Preferences::NAME)
            .many("pairs", &[Pairs::NAME])
            .optional("exclude", &[Posts::NAME])
            .seeded();
        signature.deterministic = false;
        signature.pays = true;
        signature.beside_key = params::BESIDE_KEY.map(str::to_owned).to_vec();
        let env = [KEY, credentials::KEY_FILE, BASE_URL, ask::CONCURRENCY_VARIABLE, batch::POLL, batch::GIVE_UP];
        signature.env = env.into_iter().chain(http::ENV).map(str::to_owned).collect();
        signature.secrets = vec![KEY.to_owned()];
        signature.secret_files = vec![credentials::KEY_FILE.to_owned()];
        signature
    }

    fn check(&self, params: &Params) -> Vec<(String, String)> {
        params.faults()
    }

    fn check_files(&self, params: &Params) -> Vec<(String, String)> {
        params.file_faults()
    }

    fn check_environment(&self, _: &Params) -> Result<()> {
        credentials::endpoint().map(drop)
    }

    fn estimate(&self, params: &Params, ctx: &Context) -> Result<Option<Estimate>> {
        let settings = Settings::load(params)?;
        // Without cached answers, an empty temporary cache is used, so that nothing is created in the store.
        let scratch = tempfile::tempdir().at(std::env::temp_dir())?;
        let cache = match Cache::peek(ctx.requests(), &settings)? {
            Some(cache) => cache,
            None => Cache::open(scratch.path(), &settings)?,
        };
        let table = Table::survey(params, &settings, ctx)?;
        let waiting = table.waiting(&cache, settings.documents_per_request, ctx, scratch.path())?;
        estimated(params, &settings, &waiting, &cache).map(Some)
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        run_with(&params, ctx, credentials::endpoint)
    }
}

fn run_with(params: &Params, ctx: &mut Context, endpoint: impl Fn() -> Result<Endpoint>) -> Result<()> {
    let settings = Settings::load(params)?;
    let mut cache = Cache::open(ctx.requests(), &settings)?;
    if cache.torn() > 0 {
        let (folder, lines) = (cache.folder().display(), cache.torn());
        ctx.warn(format!("{folder}: answers.jsonl: {lines} lines cannot be read: what a crash cut off is asked again"));
    }
    let damaged = damage(&cache);
    if let Some(damaged) = &damaged {
        let aside = match ctx.may_pay_again() {
            true => format!("they are set aside in {}", cache.set_damaged_aside()?.display()),
            false => "they are left out".to_owned(),
        };
        ctx.warn(format!("{damaged}: {aside}"));
    }
    let may_pay = if damaged.is_some() { ctx.may_pay_again() } else { ctx.may_pay() };
    let table = Table::survey(params, &settings, ctx)?;
    let n = settings.documents_per_request;
    let mut asker: Option<Asker> = None;
    for _ in 0..table.answers.rounds() {
        let mut waiting = table.waiting(&cache, n, ctx, ctx.checkpoints())?;
        let open = ask::are_open(&cache);
        if waiting.is_empty() || !(open || may_pay) {
            break;
        }
        let asker = match &mut asker {
            Some(asker) => asker,
            none => none.insert(Asker::new(params, &settings, table.answers.are_strict(), endpoint()?, &cache, ctx)?),
        };
        if open {
            asker.settle(waiting, &mut cache, ctx)?;
            waiting = table.waiting(&cache, n, ctx, ctx.checkpoints())?;
        }
        if !waiting.is_empty() && may_pay {
            asker.ask(waiting, &mut cache, ctx)?;
        }
    }
    let waiting = table.waiting(&cache, n, ctx, ctx.checkpoints())?;
    if !waiting.is_empty() && !may_pay {
        let why = damaged.unwrap_or_else(|| "its table was paid for once and is lost".to_owned());
        return Err(would_pay_again(&why, &waiting, &estimated(params, &settings, &waiting, &cache)?));
    }
    table.write(params, &cache, ctx)
}

/// The expected cost of asking everything that is queued.
fn estimated(params: &Params, settings: &Settings, waiting: &Waiting, cache: &Cache) -> Result<Estimate> {
    let terms = Terms::of(params, settings)?;
    let fixed = request::fixed_bytes(settings, params.mode);
    let mut work = Work { documents: waiting.wanted(), kept: waiting.kept, fixed_bytes: fixed, ..Work::default() };
    for group in waiting.groups() {
        let documents = group.iter().map(|entry| waiting.document(entry)).collect::<Result<Vec<_>>>()?;
        let bytes = request::body(settings, params.mode, &documents)["messages"].to_string().len() as u64;
        work.requests += 1;
        work.other_bytes += bytes.saturating_sub(fixed);
    }
    let mut seen = Seen::default();
    cache.usages(|_, usage| seen.add(usage, &terms))?;
    Ok(estimate::estimate(&work, &terms, &seen))
}

/// A message about damaged paid answers; `None` if all are intact.
fn damage(cache: &Cache) -> Option<String> {
    const MOST: usize = 5;
    let at = cache.damaged();
    let places: Vec<String> = at.iter().take(MOST).map(u64::to_string).collect();
    let more = if at.len() > MOST { ", …" } else { "" };
    (!at.is_empty()).then(|| {
        let log = cache.folder().join("answers.jsonl");
        let places = places.join(", ");
        format!("{}: {} paid answers are damaged (the lines at bytes {places}{more})", log.display(), at.len())
    })
}

fn would_pay_again(why: &str, waiting: &Waiting, estimate: &Estimate) -> Error {
    let money = match &estimate.dollars {
        Some(dollars) => format!("about ${:.2} to {:.2}", dollars.low, dollars.high),
        None => "for which no price is known".to_owned(),
    };
    let message = format!(
        "{why}, and the store keeps no answer to {} of its questions: making it again takes {} requests, {money}",
        waiting.wanted(),
        estimate.requests,
    );
    Error::surroundings(message).help("bring back `requests/` of the store, or say `--pay` to pay again")
}

fn is_tie(pair: &Pair) -> bool {
    normalised(&pair.a_text) == normalised(&pair.b_text)
}

/// The pairs of the inputs, their questions, and the selection of answers.
struct Table {
    questions: Questions,
    answers: Answers,
    /// By row of the inputs: whether its post is held out.
    held_out: Vec<bool>,
    dropped: u64,
}

impl Table {
    fn survey(params: &Params, settings: &Settings, ctx: &Context) -> Result<Self> {
        let questions = Questions::new(settings.fingerprint(), params.swap_share, params.repeat_share, |purpose| {
            ctx.generator_key(purpose)
        });
        let mut posts = HeldOut::of(ctx)?;
        let mut held_out = Vec::new();
        let mut all = Vec::new();
        for pair in pairs(ctx) {
            let pair = pair?;
            let out = posts.holds(&pair.post_id, Parts::parse(&pair.prompt).map_or("", |parts| parts.post));
            held_out.push(out);
            if params.strict_partner && !out && !is_tie(&pair) {
                all.extend(questions.of(&pair).iter().map(|question| (question.purpose, question.place, question.key)));
            }
        }
        let answers = Answers::new(params);
        let answers =
            if params.strict_partner { answers.in_company(all, params.documents_per_request) } else { answers };
        Ok(Self { questions, answers, held_out, dropped: posts.dropped })
    }

    /// The pairs to judge.
    fn rows(&self, ctx: &Context) -> impl Iterator<Item = Result<Pair>> {
        pairs(ctx).zip(&self.held_out).filter(|(_, out)| !**out).map(|(pair, _)| pair)
    }

    /// The questions without answers, in groups of `n`; their texts are in a file in `scratch`.
    fn waiting(&self, cache: &Cache, n: usize, ctx: &Context, scratch: &Path) -> Result<Waiting> {
        let mut spool = Spool::new(scratch)?;
        let mut kept = 0;
        for pair in self.rows(ctx) {
            let pair = pair?;
            if is_tie(&pair) {
                continue;
            }
            for question in self.questions.of(&pair) {
                match self.answers.find(cache, &question) {
                    Found::Wanted(key) => spool.push(&question, key, true)?,
                    Found::Kept(_) if self.answers.are_strict() => {
                        kept += 1;
                        spool.push(&question, self.answers.key(&question), false)?
                    }
                    Found::Kept(_) => kept += 1,
                }
            }
        }
        let mut waiting = spool.groups_of(n)?;
        waiting.kept = kept;
        Ok(waiting)
    }

    /// Writes the table in the order of pairs; every answer must be cached.
    fn write(&self, params: &Params, cache: &Cache, ctx: &mut Context) -> Result<()> {
        let mut judged = Judged::create(ctx.out())?;
        let mut quality = Quality::default();
        let mut requests = Vec::new();
        for pair in self.rows(ctx) {
            let pair = pair?;
            if is_tie(&pair) {
                let row = Preference::of(pair, Side::A, Outcome::Tie, &params.model);
                judged.push(Preference { chosen_first: None, ..row })?;
                continue;
            }
            let mut asked = self.questions.of(&pair).into_iter().map(|question| {
                let Found::Kept(kept) = self.answers.find(cache, &question) else {
                    return Err(Error::ours(format!("pair {} has no answer after all were asked", pair.id)));
                };
                requests.push(kept.request);
                Ok::<(Question, cache::Kept), Error>((question, kept))
            });
            let Some((question, kept)) = asked.next().transpose()? else { continue };
            let others = asked.collect::<Result<Vec<_>>>()?;
            let chosen = match kept.reply {
                Reply::Label(place) => {
                    quality.label(place, kept.slot);
                    let chosen = question.shown.side(place);
                    for (other, answer) in others {
                        quality.again(chosen, other.purpose, other.shown, answer);
                    }
                    chosen
                }
                _ => Side::A,
            };
            let row = Preference::of(pair, chosen, kept.reply.outcome(), &params.model);
            let chosen_first = match kept.reply {
                Reply::Label(place) => Some(place == 1),
                _ => None,
            };
            judged.push(Preference { chosen_first, reason: cache.reason(kept)?, ..row })?;
        }
        quality.tell(ctx);
        ctx.metric("held_out_dropped", self.dropped as f64);
        tell_usage(cache, requests, ctx)?;
        check_unlabelled(&judged, params.max_unlabelled)?;
        judged.finish(ctx)
    }
}

/// The pairs of all inputs, in the order of the pipeline file.
fn pairs(ctx: &Context) -> impl Iterator<Item = Result<Pair>> + use<> {
    let folders: Vec<_> = ctx.many("pairs").iter().map(|input| input.folder.clone()).collect();
    folders.into_iter().flat_map(|folder| {
        let (rows, error) = match Pairs::open(&folder) {
            Ok(rows) => (Some(rows), None),
            Err(error) => (None, Some(Err(error))),
        };
        rows.into_iter().flatten().chain(error)
    })
}

/// Reports the cost of the answers in the table, whenever they were paid; each request counts once.
fn tell_usage(cache: &Cache, mut requests: Vec<u64>, ctx: &mut Context) -> Result<()> {
    requests.sort_unstable();
    requests.dedup();
    let mut sum = Usage::default();
    cache.usages(|request, usage| {
        if requests.binary_search(&request).is_ok() {
            sum.input += usage.input;
            sum.output += usage.output;
            sum.cache_written += usage.cache_written;
            sum.cache_written_hour += usage.cache_written_hour;
            sum.cache_read += usage.cache_read;
        }
    })?;
    ctx.metric("requests", requests.len() as f64);
    ctx.metric("input_tokens", sum.input as f64);
    ctx.metric("output_tokens", sum.output as f64);
    ctx.metric("cache_written_tokens", sum.written() as f64);
    ctx.metric("cache_written_hour_tokens", sum.cache_written_hour as f64);
    ctx.metric("cache_read_tokens", sum.cache_read as f64);
    Ok(())
}

fn check_unlabelled(judged: &Judged, most: f64) -> Result<()> {
    let counts = [Outcome::Refused, Outcome::Truncated, Outcome::Unparsable, Outcome::Failed].map(|o| judged.count(o));
    let asked = judged.count(Outcome::Labelled) + counts.iter().sum::<u64>();
    let share = counts.iter().sum::<u64>() as f64 / asked.max(1) as f64;
    if share <= most {
        return Ok(());
    }
    let [refused, truncated, unparsable, failed] = counts;
    let names = ["refused", "truncated", "unparsable", "failed"];
    let there: Vec<&str> =
        names.into_iter().zip(counts).filter(|(_, count)| *count > 0).map(|(name, _)| name).collect();
    Err(Error::surroundings(format!(
        "{:.1}% of {asked} pairs have no label ({refused} refused, {truncated} cut off, {unparsable} not readable, {failed} failed), \
         more than max_unlabelled = {most}",
        100.0 * share,
    ))
    .help(format!("all answers are kept; `retry: [{}]` asks those pairs once more", there.join(", "))))
}

#[cfg(test)]
mod tests;
