//! Work queue of an attempt: queued documents, requests in progress, and their outcomes.

use std::collections::HashSet;
use std::path::Path;

use engine::context::Context;
use engine::error::{Blame, Error, Result};
use serde_json::Value;
use tokio::task::JoinError;

use super::gate::{Admission, BudgetGate, Reservation};
use crate::judge::answer_log::{AnswerLog, Line};
use crate::judge::document::AnswerKey;
use crate::judge::settings::Settings;
use crate::judge::spool::{Entry, Group, Waiting};

/// After this number of rejected requests without an answer between them, the settings are at fault.
const FAULTY_IN_A_ROW: usize = 8;

/// The outcome of one request.
pub type Joined = Result<(Group, Reservation, Result<Value>), JoinError>;

/// A request ready to be sent; its documents are claimed.
pub struct Ready {
    pub group: Group,
    pub body: Value,
}

/// Queued documents, and the outcomes of requests.
pub struct WorkQueue<'a> {
    settings: &'a Settings,
    waiting: Waiting,
    log: &'a mut AnswerLog,
    /// Documents that another process is asking about.
    pub elsewhere: Vec<Group>,
    /// Requests that the API rejected since the last answer; whether they or the settings are at fault is not known
    /// yet.
    pub faulty: Vec<(Group, Error)>,
    pub gate: &'a mut BudgetGate,
    total: u64,
    done: u64,
}

impl<'a> WorkQueue<'a> {
    pub fn new(settings: &'a Settings, waiting: Waiting, log: &'a mut AnswerLog, gate: &'a mut BudgetGate) -> Self {
        let total = waiting.wanted();
        Self { settings, waiting, log, elsewhere: Vec::new(), faulty: Vec::new(), gate, total, done: 0 }
    }

    /// The next request, with its documents claimed and none of them answered yet.
    pub fn next(&mut self) -> Result<Option<Ready>> {
        while let Some(group) = self.waiting.take() {
            let (mut mine, mut others) = (Group::new(), Group::new());
            for entry in group {
                if self.log.claim(entry.key)? { mine.push(entry) } else { others.push(entry) }
            }
            // After claiming, because an earlier holder of a claim stores its answers before releasing it.
            self.log.refresh()?;
            if self.settings.strict_partner && !others.is_empty() {
                self.release(&mine)?;
                // In the order of slots.
                mine.extend(others);
                mine.sort_unstable();
                self.elsewhere.push(mine);
                continue;
            }
            if !others.is_empty() {
                self.elsewhere.push(others);
            }
            let is_open = |entry: &Entry| entry.wanted && self.log.get(entry.key).is_none();
            let (open, answered): (Group, Group) =
                mine.into_iter().partition(|entry| match self.settings.strict_partner {
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
            let documents = open.iter().map(|entry| self.waiting.document(entry)).collect::<Result<Vec<_>>>()?;
            return Ok(Some(Ready {
                body: self.settings.provider.body(self.settings, self.settings.mode, &documents),
                group: open,
            }));
        }
        Ok(None)
    }

    /// Stores the outcomes of requests.
    pub fn record(&mut self, finished: Vec<Joined>) -> Result<()> {
        let (mut answers, mut groups) = (Vec::new(), Vec::new());
        let mut stop = None;
        for joined in finished {
            match joined {
                Ok((group, sent, Ok(answer))) => {
                    let left = self.requests_left();
                    // Failing to record the cost must not lose the answer.
                    stop = stop.or(self.gate.record(sent, &answer, left).err());
                    answers.push(Line::answer(keys(&group), answer));
                    groups.push(group);
                }
                // The client reports a request that the API rejects as the user's fault.
                Ok((group, sent, Err(error))) if error.blame == Blame::User => {
                    stop = stop.or(self.gate.unpaid(sent).err());
                    self.faulty.push((group, error));
                }
                Ok((_, sent, Err(error))) => {
                    stop = stop.or(Some(error)).or(self.gate.unpaid(sent).err());
                }
                Err(e) => {
                    let error = Error::internal(format!("{}: a request's task ended: {e}", self.settings.kind()));
                    stop = stop.or(Some(error));
                }
            }
        }
        let any = !answers.is_empty();
        self.log.keep(answers)?;
        for group in groups {
            self.finish(&group)?;
        }
        if any {
            // An answer shows that the settings are not at fault.
            self.blame_documents()?;
        }
        if self.faulty.len() >= FAULTY_IN_A_ROW {
            let error = self.faulty.remove(0).1;
            stop.get_or_insert(error.context(format!("{FAULTY_IN_A_ROW} requests in a row were turned down")));
        }
        stop.map_or(Ok(()), Err)
    }

    /// Called when no other work is left: handles the rejected requests, and returns whether there is more to ask.
    pub fn judge_faulty(&mut self) -> Result<bool> {
        if self.faulty.is_empty() {
            return Ok(false);
        }
        let is_mixed = |group: &Group| group.len() > 1 && !self.settings.strict_partner;
        let answered = self.log.answered() > 0;
        if answered || self.faulty.iter().any(|(group, _)| is_mixed(group)) {
            let alone: Vec<_> = match answered {
                true => Vec::new(),
                // A document that was rejected alone remains undecided.
                false => self.faulty.extract_if(.., |(group, _)| !is_mixed(group)).collect(),
            };
            self.blame_documents()?;
            self.faulty = alone;
            return Ok(!self.waiting.is_empty());
        }
        Err(self.faulty.remove(0).1)
    }

    /// Asks the documents of rejected requests again one by one, so that a good one does not fail with a bad one; a
    /// document that was already alone fails.
    pub fn blame_documents(&mut self) -> Result<()> {
        for (group, error) in std::mem::take(&mut self.faulty) {
            if group.len() > 1 && !self.settings.strict_partner {
                self.release(&group)?;
                group.into_iter().for_each(|entry| self.waiting.give_back(vec![entry]));
            } else {
                self.log.keep(vec![Line::failed(keys(&group), error.message)])?;
                self.finish(&group)?;
            }
        }
        Ok(())
    }

    pub fn finish(&mut self, group: &Group) -> Result<()> {
        self.done += group.iter().filter(|entry| entry.wanted).count() as u64;
        self.release(group)
    }

    fn release(&self, group: &Group) -> Result<()> {
        group.iter().try_for_each(|entry| self.log.release(entry.key))
    }

    /// Stores outcomes durably.
    pub fn keep(&mut self, lines: Vec<Line>) -> Result<()> {
        self.log.keep(lines)
    }

    /// Puts a request that was not sent or not answered back into the queue.
    pub fn give_back(&mut self, group: Group) -> Result<()> {
        self.release(&group)?;
        self.waiting.give_back(group);
        Ok(())
    }

    pub fn admit(&mut self, ready: &Ready) -> Admission {
        self.gate.admit(&ready.body, self.total.saturating_sub(self.done), self.total)
    }

    /// Number of requests still queued.
    pub fn requests_left(&self) -> u64 {
        self.waiting.len() as u64
    }

    /// Whether any document is not known to be answered.
    pub fn has_more(&self) -> bool {
        !self.waiting.is_empty() || !self.elsewhere.is_empty()
    }

    /// Whether other processes are asking about everything that is left.
    pub fn only_elsewhere(&self) -> bool {
        self.waiting.is_empty() && !self.elsewhere.is_empty()
    }

    /// The keys of the queued answers that are needed.
    pub fn wanted(&self) -> HashSet<AnswerKey> {
        self.waiting.groups().flatten().filter(|entry| entry.wanted).map(|entry| entry.key).collect()
    }

    /// The kind, for messages.
    pub fn kind(&self) -> &'static str {
        self.settings.kind()
    }

    /// The folder of the answers.
    pub fn folder(&self) -> &Path {
        self.log.folder()
    }

    /// Reports progress and costs.
    pub fn report(&mut self, ctx: &mut Context) {
        self.gate.report(ctx, false);
        if let Some(warning) = self.log.model_warning() {
            ctx.warn(format!("{}: {warning}", self.settings.kind()));
        }
        self.progress(ctx, None);
    }

    pub fn progress(&self, ctx: &mut Context, headline: Option<(&str, f64)>) {
        ctx.progress(self.done, self.total, "labels", headline);
    }

    pub fn look_again(&mut self) {
        self.waiting.put_last(self.elsewhere.drain(..));
    }
}

fn keys(group: &Group) -> Vec<AnswerKey> {
    group.iter().map(|entry| entry.key).collect()
}
