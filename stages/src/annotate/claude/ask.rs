//! The asking loop: sends what waits, a bounded number of requests at once, and keeps each answer as it lands. Knows no pair.

use std::time::Duration;

use engine::context::Context;
use engine::error::{Blame, Error, Result};
use tokio::task::{JoinError, JoinSet};

use super::cache::{Cache, Landed, What};
use super::client::{Answer, Client, Endpoint};
use super::document::Document;
use super::request;
use super::settings::Settings;
use super::spool::{Entry, Group, Waiting};
use crate::http;

/// Requests under way at once, if the environment does not say.
const CONCURRENCY: usize = 8;
/// Says otherwise. Not a parameter: how many requests are under way changes no label and so belongs to no key.
pub const CONCURRENCY_VARIABLE: &str = "TEMPER_REQUESTS";
/// So many requests taken for faulty, with no answer between them, are a fault of the settings.
const FAULTY_IN_A_ROW: usize = 8;
/// How often documents that another process is asking about are looked for.
const POLL: Duration = Duration::from_millis(300);

/// What came of one request.
type Joined = Result<(Group, Result<Answer>), JoinError>;

/// Asks until every wanted answer is in the cache. After a failure nothing new is sent, and what is under way is awaited and
/// kept: it is paid for.
///
/// # Errors
/// Whatever stops the stage: an API that cannot be reached or does not let us in, settings that it takes for faulty.
pub fn ask(
    settings: &Settings,
    strict: bool,
    waiting: Waiting,
    endpoint: Endpoint,
    cache: &mut Cache,
    ctx: &mut Context,
) -> Result<()> {
    let (waits, mut waited) = tokio::sync::mpsc::unbounded_channel();
    let client = Client::new(endpoint, waits)?;
    let concurrency =
        http::variable(CONCURRENCY_VARIABLE).and_then(|n| n.parse().ok()).unwrap_or(CONCURRENCY).clamp(1, 256);
    let total = waiting.wanted();
    let mut desk = Desk { strict, waiting, cache, elsewhere: Vec::new(), faulty: Vec::new(), done: 0, tokens: 0 };
    let mut failed: Option<Error> = None;
    let mut told_elsewhere = false;
    http::runtime()?.block_on(async {
        let mut running = JoinSet::new();
        loop {
            while failed.is_none() && running.len() < concurrency {
                match desk.next() {
                    Ok(Some((group, documents))) => {
                        let (client, body) = (client.clone(), request::body(settings, &documents));
                        running.spawn(async move { (group, client.post(&body).await) });
                    }
                    Ok(None) => break,
                    Err(e) => failed = Some(e),
                }
            }
            let idle = running.is_empty();
            if idle && (failed.is_some() || desk.elsewhere.is_empty()) {
                match desk.judge_faulty() {
                    Ok(true) if failed.is_none() => continue,
                    Ok(_) => break,
                    Err(e) => {
                        failed.get_or_insert(e);
                        break;
                    }
                }
            }
            if !desk.elsewhere.is_empty() && !told_elsewhere {
                told_elsewhere = true;
                ctx.warn(
                    "annotate.claude: another process asks about some of the same pairs: its answers are waited for",
                );
            }
            tokio::select! {
                // Waits first, so that none is left when the last request ends.
                biased;
                Some(wait) = waited.recv() => ctx.warn(format!("annotate.claude: {wait}")),
                Some(joined) = running.join_next(), if !idle => {
                    let mut landed = vec![joined];
                    // Those that landed meanwhile are made durable together.
                    while let Some(joined) = running.try_join_next() {
                        landed.push(joined);
                    }
                    if let Err(e) = desk.land(landed) {
                        failed.get_or_insert(e);
                    }
                    ctx.progress(desk.done, total, "pairs", Some(("output tokens", desk.tokens as f64)));
                }
                () = tokio::time::sleep(POLL), if !desk.elsewhere.is_empty() => desk.look_again(),
            }
        }
    });
    failed.map_or(Ok(()), Err)
}

/// What waits, what is under way and what came of it.
struct Desk<'a> {
    /// Whether groups are asked whole.
    strict: bool,
    waiting: Waiting,
    cache: &'a mut Cache,
    /// Documents that another process is asking about.
    elsewhere: Vec<Group>,
    /// Requests that the API took for faulty, with no answer since; theirs or the settings' fault is not known yet.
    faulty: Vec<(Group, Error)>,
    done: u64,
    tokens: u64,
}

impl Desk<'_> {
    /// The next request: claimed, and not answered by anybody.
    fn next(&mut self) -> Result<Option<(Group, Vec<Document>)>> {
        while let Some(group) = self.waiting.groups.pop_front() {
            let (mut mine, mut others) = (Group::new(), Group::new());
            for entry in group {
                if self.cache.claim(entry.key)? { mine.push(entry) } else { others.push(entry) }
            }
            // After the claims: whoever held one before has kept what they got.
            self.cache.refresh()?;
            if self.strict && !others.is_empty() {
                self.release(&mine)?;
                // In the order of their slots.
                mine.extend(others);
                mine.sort_unstable();
                self.elsewhere.push(mine);
                continue;
            }
            if !others.is_empty() {
                self.elsewhere.push(others);
            }
            let is_open = |entry: &Entry| entry.wanted && self.cache.get(entry.key).is_none();
            let (open, answered): (Group, Group) = mine.into_iter().partition(|entry| match self.strict {
                true => true,
                false => is_open(entry),
            });
            self.release(&answered)?;
            self.done += answered.len() as u64;
            if !open.iter().any(is_open) {
                self.release(&open)?;
                self.done += open.iter().filter(|entry| entry.wanted).count() as u64;
                continue;
            }
            let documents = open.iter().map(|entry| self.waiting.document(entry)).collect::<Result<_>>()?;
            return Ok(Some((open, documents)));
        }
        Ok(None)
    }

    /// Keeps what has landed.
    fn land(&mut self, landed: Vec<Joined>) -> Result<()> {
        let (mut answers, mut groups) = (Vec::new(), Vec::new());
        let mut stop = None;
        for joined in landed {
            match joined {
                Ok((group, Ok(answer))) => {
                    self.tokens += answer.tokens("output_tokens");
                    answers.push(kept(&group, What::Answer(answer.body)));
                    groups.push(group);
                }
                // The client blames the caller for what the API finds wrong with a request.
                Ok((group, Err(error))) if error.blame == Blame::Yours => self.faulty.push((group, error)),
                Ok((_, Err(error))) => stop = stop.or(Some(error)),
                Err(e) => {
                    let error = Error::ours(format!("annotate.claude: a request's task ended: {e}"));
                    stop = stop.or(Some(error));
                }
            }
        }
        let any = !answers.is_empty();
        self.cache.keep(answers)?;
        for group in groups {
            self.finish(&group)?;
        }
        if any {
            // The settings are not at fault.
            self.blame_documents()?;
        }
        if self.faulty.len() >= FAULTY_IN_A_ROW {
            let error = self.faulty.remove(0).1;
            stop.get_or_insert(error.within(format!("{FAULTY_IN_A_ROW} requests in a row were turned down")));
        }
        stop.map_or(Ok(()), Err)
    }

    /// When nothing else is left: whether there is more to ask.
    fn judge_faulty(&mut self) -> Result<bool> {
        if self.faulty.is_empty() {
            return Ok(false);
        }
        let is_mixed = |group: &Group| group.len() > 1 && !self.strict;
        if self.cache.answered() || self.faulty.iter().any(|(group, _)| is_mixed(group)) {
            let alone: Vec<_> = match self.cache.answered() {
                true => Vec::new(),
                // What was asked alone stays open.
                false => self.faulty.extract_if(.., |(group, _)| !is_mixed(group)).collect(),
            };
            self.blame_documents()?;
            self.faulty = alone;
            return Ok(!self.waiting.groups.is_empty());
        }
        Err(self.faulty.remove(0).1)
    }

    /// Documents of faulty requests: asked again each by itself, so that none goes down with another; failed if it was.
    fn blame_documents(&mut self) -> Result<()> {
        for (group, error) in std::mem::take(&mut self.faulty) {
            if group.len() > 1 && !self.strict {
                self.release(&group)?;
                group.into_iter().for_each(|entry| self.waiting.groups.push_front(vec![entry]));
            } else {
                self.cache.keep(vec![kept(&group, What::Failed(error.message))])?;
                self.finish(&group)?;
            }
        }
        Ok(())
    }

    fn finish(&mut self, group: &Group) -> Result<()> {
        self.done += group.iter().filter(|entry| entry.wanted).count() as u64;
        self.release(group)
    }

    fn release(&self, group: &Group) -> Result<()> {
        group.iter().try_for_each(|entry| self.cache.release(entry.key))
    }

    fn look_again(&mut self) {
        self.waiting.groups.extend(self.elsewhere.drain(..));
    }
}

fn kept(group: &Group, what: What) -> Landed {
    Landed { documents: group.iter().map(|entry| entry.key).collect(), what }
}
