//! Labels of pairs from a language model, asked as in the paper (A.2): behind an API, or in this process (`local`).
//!
//! What is general about APIs is here: questions about pairs, the log of answers, budget, pace, retries, resumable batches,
//! the table. A [`Provider`](provider::Provider) says how one API is spoken to; `providers` holds them.

mod answer_log;
mod answers;
mod ask;
pub(crate) mod batch;
mod budget;
mod client;
mod credentials;
mod document;
mod endpoint;
mod estimate;
pub(crate) mod instructions;
pub(crate) mod local;
pub(crate) mod params;
pub(crate) mod prices;
pub(crate) mod provider;
pub(crate) mod providers;
mod quality;
mod reply;
pub(crate) mod settings;
mod spool;
pub(crate) mod template;

use std::path::Path;

use answer_log::AnswerLog;
pub use answer_log::{Verified, verify};
use answers::{Answers, Found};
use ask::Asker;
use document::{Question, Questions};
use endpoint::Endpoint;
use engine::context::Context;
use engine::error::{AtPath, Error, Result};
use engine::estimate::Estimate;
use engine::kind::Signature;
use estimate::{Terms, Usages, Work};
use instructions::Instructions;
use prices::Usage;
use quality::Quality;
use reply::Reply;
use settings::Settings;
use spool::{Spool, Waiting};

use crate::http;
use crate::labels::{HeldOut, PreferenceWriter};
use crate::prompt::Parts;
use crate::text::clean::normalised;
use crate::types::{Aspect, Outcome, Pair, Pairs, Posts, Preference, Preferences, Side};

/// The inputs of a judge, and the environment that it uses beside its own variables `env`; `key` is the variable that
/// holds its key. `excluded_from_key` adds to the parameters that are not part of the stage's key.
pub(crate) fn signature(env: &[&str], key: Option<&str>, excluded_from_key: &[&str]) -> Signature {
    let mut signature = Signature::producing(Preferences::NAME)
        .many("pairs", &[Pairs::NAME])
        .optional("exclude", &[Posts::NAME])
        .seeded();
    signature.deterministic = false;
    signature.pays = true;
    signature.excluded_from_key =
        [excluded_from_key, &params::EXCLUDED_FROM_KEY].concat().into_iter().map(str::to_owned).collect();
    let env = env.iter().copied().chain([ask::CONCURRENCY_VARIABLE]).chain(http::ENV);
    signature.env = env.map(str::to_owned).collect();
    if let Some(key) = key {
        signature.secrets = vec![key.to_owned()];
        signature.secret_files = vec![credentials::file_variable(key)];
        signature.env.extend([key.to_owned(), credentials::file_variable(key)]);
    }
    signature
}

/// The cost of the answers that are not in the log.
pub(crate) fn estimate(settings: &Settings, ctx: &Context) -> Result<Estimate> {
    // Without a log, an empty temporary one is used, so that nothing is created in the store.
    let scratch = tempfile::tempdir().at(std::env::temp_dir())?;
    let log = match AnswerLog::peek(ctx.requests(), settings)? {
        Some(log) => log,
        None => AnswerLog::open(scratch.path(), settings)?,
    };
    let table = Table::survey(settings, ctx)?;
    let waiting = table.waiting(&log, ctx, scratch.path())?;
    estimated(settings, &waiting, &log)
}

/// Labels the pairs of the inputs.
pub(crate) fn run(settings: &Settings, ctx: &mut Context) -> Result<()> {
    run_with(settings, ctx, || settings.provider.endpoint())
}

fn run_with(settings: &Settings, ctx: &mut Context, endpoint: impl Fn() -> Result<Endpoint>) -> Result<()> {
    let mut log = AnswerLog::open(ctx.requests(), settings)?;
    if log.torn() > 0 {
        let (folder, lines) = (log.folder().display(), log.torn());
        ctx.warn(format!("{folder}: answers.jsonl: {lines} lines cannot be read: what a crash cut off is asked again"));
    }
    let damaged = damage(&log);
    if let Some(damaged) = &damaged {
        let aside = match ctx.may_pay_again() {
            true => format!("they are set aside in {}", log.set_damaged_aside()?.display()),
            false => "they are left out".to_owned(),
        };
        ctx.warn(format!("{damaged}: {aside}"));
    }
    let may_pay = if damaged.is_some() { ctx.may_pay_again() } else { ctx.may_pay() };
    let table = Table::survey(settings, ctx)?;
    let mut asker: Option<Asker> = None;
    for _ in 0..table.answers.rounds() {
        let mut waiting = table.waiting(&log, ctx, ctx.checkpoints())?;
        let open = ask::are_open(&log);
        if waiting.is_empty() || !(open || may_pay) {
            break;
        }
        let asker = match &mut asker {
            Some(asker) => asker,
            none => none.insert(Asker::new(settings, endpoint()?, &log, ctx)?),
        };
        if open {
            asker.settle(waiting, &mut log, ctx)?;
            waiting = table.waiting(&log, ctx, ctx.checkpoints())?;
        }
        if !waiting.is_empty() && may_pay {
            asker.ask(waiting, &mut log, ctx)?;
        }
    }
    let waiting = table.waiting(&log, ctx, ctx.checkpoints())?;
    if !waiting.is_empty() && !may_pay {
        let why = damaged.unwrap_or_else(|| "its table was paid for once and is lost".to_owned());
        return Err(would_pay_again(&why, &waiting, &estimated(settings, &waiting, &log)?));
    }
    if let Some(warning) = log.model_warning() {
        ctx.warn(format!("{}: {warning}", settings.kind()));
    }
    table.write(&log, ctx)
}

/// The expected cost of asking everything that is queued.
fn estimated(settings: &Settings, waiting: &Waiting, log: &AnswerLog) -> Result<Estimate> {
    let terms = Terms::of(settings);
    let fixed = settings.fixed_bytes();
    let mut work = Work { documents: waiting.wanted(), kept: waiting.kept, fixed_bytes: fixed, ..Work::default() };
    for group in waiting.groups() {
        let documents = group.iter().map(|entry| waiting.document(entry)).collect::<Result<Vec<_>>>()?;
        let bytes = settings.provider.body(settings, settings.mode, &documents)["messages"].to_string().len() as u64;
        work.requests += 1;
        work.other_bytes += bytes.saturating_sub(fixed);
    }
    let mut seen = Usages::default();
    log.usages(|_, usage| seen.add(usage, &terms))?;
    Ok(estimate::estimate(&work, &terms, &seen))
}

/// A message about damaged paid answers; `None` if all are intact.
fn damage(log: &AnswerLog) -> Option<String> {
    const MOST: usize = 5;
    let at = log.damaged();
    let places: Vec<String> = at.iter().take(MOST).map(u64::to_string).collect();
    let more = if at.len() > MOST { ", …" } else { "" };
    (!at.is_empty()).then(|| {
        let log = log.folder().join("answers.jsonl");
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
    Error::environment(message).help("bring back `requests/` of the store, or say `--pay` to pay again")
}

fn is_tie(pair: &Pair) -> bool {
    normalised(&pair.a_text) == normalised(&pair.b_text)
}

/// The pairs of the inputs, their questions, and the selection of answers.
struct Table<'a> {
    settings: &'a Settings,
    questions: Questions,
    answers: Answers,
    /// By row of the inputs: whether its post is held out.
    held_out: Vec<bool>,
    dropped: u64,
}

impl<'a> Table<'a> {
    fn survey(settings: &'a Settings, ctx: &Context) -> Result<Self> {
        let questions = Questions::new(settings.fingerprint(), settings.swap_share, settings.repeat_share, |purpose| {
            ctx.generator_key(purpose)
        });
        let mut posts = HeldOut::of(ctx)?;
        let mut held_out = Vec::new();
        let mut all = Vec::new();
        for pair in pairs(ctx) {
            let pair = pair?;
            let out = posts.holds(&pair.post_id, Parts::parse(&pair.prompt).map_or("", |parts| parts.post));
            held_out.push(out);
            if settings.strict_partner && !out && !is_tie(&pair) {
                all.extend(questions.of(&pair).iter().map(|question| (question.purpose, question.place, question.key)));
            }
        }
        let answers = Answers::new(settings);
        let answers =
            if settings.strict_partner { answers.in_company(all, settings.documents_per_request) } else { answers };
        Ok(Self { settings, questions, answers, held_out, dropped: posts.dropped })
    }

    /// The pairs to judge.
    fn rows(&self, ctx: &Context) -> impl Iterator<Item = Result<Pair>> {
        pairs(ctx).zip(&self.held_out).filter(|(_, out)| !**out).map(|(pair, _)| pair)
    }

    /// The questions without answers in groups; their texts are in a file in `scratch`.
    fn waiting(&self, log: &AnswerLog, ctx: &Context, scratch: &Path) -> Result<Waiting> {
        let mut spool = Spool::new(scratch)?;
        let mut kept = 0;
        for pair in self.rows(ctx) {
            let pair = pair?;
            if is_tie(&pair) {
                continue;
            }
            for question in self.questions.of(&pair) {
                match self.answers.find(log, &question) {
                    Found::Wanted(key) => spool.push(&question, key, true)?,
                    Found::Kept(_) if self.answers.are_strict() => {
                        kept += 1;
                        spool.push(&question, self.answers.key(&question), false)?
                    }
                    Found::Kept(_) => kept += 1,
                }
            }
        }
        let mut waiting = spool.groups_of(self.settings.documents_per_request)?;
        waiting.kept = kept;
        Ok(waiting)
    }

    /// Writes the table in the order of pairs; every answer must be in the log.
    fn write(&self, log: &AnswerLog, ctx: &mut Context) -> Result<()> {
        let instructions = &self.settings.instructions;
        let mut judged = writer(instructions, ctx)?;
        let mut quality = Quality::default();
        let mut requests = Vec::new();
        for pair in self.rows(ctx) {
            let pair = pair?;
            if is_tie(&pair) {
                let row = Preference::of(pair, Side::A, Outcome::Tie, &self.settings.model);
                push_aspects(&mut judged, instructions, &row.id, &[])?;
                judged.push(Preference { chosen_first: None, ..row })?;
                continue;
            }
            let mut asked = self.questions.of(&pair).into_iter().map(|question| {
                let Found::Kept(kept) = self.answers.find(log, &question) else {
                    return Err(Error::internal(format!("pair {} has no answer after all were asked", pair.id)));
                };
                requests.push(kept.request);
                Ok::<(Question, answer_log::Kept), Error>((question, kept))
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
            let row = Preference::of(pair, chosen, kept.reply.outcome(), &self.settings.model);
            let chosen_first = match kept.reply {
                Reply::Label(place) => Some(place == 1),
                _ => None,
            };
            let (confidence, reason) = (log.probability(kept)?, log.reason(kept)?);
            if !instructions.criteria.is_empty() {
                let place_of_chosen = if question.shown.side(1) == chosen { 1 } else { 2 };
                let answers = log.answers(kept)?.into_iter().map(|answer| match answer.reply {
                    Reply::Label(place) => (Some(place == place_of_chosen), answer.first_wins.map(|p| p.max(1.0 - p))),
                    _ => (None, None),
                });
                push_aspects(&mut judged, instructions, &row.id, &answers.collect::<Vec<_>>())?;
            }
            judged.push(Preference { chosen_first, confidence, reason, ..row })?;
        }
        quality.report(ctx);
        ctx.metric("held_out_dropped", self.dropped as f64);
        report_usage(log, requests, ctx)?;
        check_unlabelled(&judged, self.settings.max_unlabelled)?;
        judged.finish(ctx)
    }
}

/// The writer of a judge's table; with a second table for several questions.
fn writer(instructions: &Instructions, ctx: &Context) -> Result<PreferenceWriter> {
    if instructions.criteria.is_empty() {
        PreferenceWriter::create(ctx.out())
    } else {
        PreferenceWriter::with_aspects(ctx.out())
    }
}

/// Writes the answers to the questions about a pair, each as (for the chosen summary, probability); those that are
/// missing as no answer.
fn push_aspects(
    judged: &mut PreferenceWriter,
    instructions: &Instructions,
    id: &str,
    answers: &[(Option<bool>, Option<f64>)],
) -> Result<()> {
    for (i, criterion) in instructions.criteria.iter().enumerate() {
        let (for_chosen, confidence) = answers.get(i).copied().unwrap_or_default();
        let (question, weight) = (criterion.name.clone(), criterion.weight);
        judged.push_aspect(Aspect { id: id.to_owned(), question, weight, for_chosen, confidence })?;
    }
    Ok(())
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
fn report_usage(log: &AnswerLog, mut requests: Vec<u64>, ctx: &mut Context) -> Result<()> {
    requests.sort_unstable();
    requests.dedup();
    let mut sum = Usage::default();
    log.usages(|request, usage| {
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

fn check_unlabelled(judged: &PreferenceWriter, most: f64) -> Result<()> {
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
    Err(Error::environment(format!(
        "{:.1}% of {asked} pairs have no label ({refused} refused, {truncated} cut off, {unparsable} not readable, {failed} failed), \
         more than max_unlabelled = {most}",
        100.0 * share,
    ))
    .help(format!("all answers are kept; `retry: [{}]` asks those pairs once more", there.join(", "))))
}

#[cfg(test)]
mod tests;
