//! Work queue of an attempt: queued documents, requests in progress, and their outcomes.

use std::collections::HashSet;
use std::path::Path;

use engine::context::Context;
use engine::error::{Blame, Error, Result};
use serde_json::Value;

use super::gate::{Admission, BudgetGate, Reservation};
use crate::judge::answer_log::{AnswerLog, Line};
use crate::judge::batch::RequestOutcome;
use crate::judge::document::AnswerKey;
use crate::judge::settings::Settings;
use crate::judge::spool::{Entry, Group, Waiting};

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
    /// Why no more requests are sent.
    pub stop: Option<Error>,
    /// Answers that are not stored yet, and the groups that they answer.
    unsaved: Vec<Line>,
    finished: Vec<Group>,
    pub gate: &'a mut BudgetGate,
    total: u64,
    done: u64,
}

impl<'a> WorkQueue<'a> {
    pub fn new(settings: &'a Settings, waiting: Waiting, log: &'a mut AnswerLog, gate: &'a mut BudgetGate) -> Self {
        let total = waiting.wanted();
        Self {
            settings,
            waiting,
            log,
            elsewhere: Vec::new(),
            faulty: Vec::new(),
            stop: None,
            unsaved: Vec::new(),
            finished: Vec::new(),
            gate,
            total,
            done: 0,
        }
    }

    /// The next request within the budget, and what is reserved for it. `None` if there is none, or none until a request
    /// in progress has finished, or none ever ([`WorkQueue::stop`]).
    pub fn take(&mut self) -> Result<Option<(Ready, Reservation)>> {
        if self.stop.is_some() {
            return Ok(None);
        }
        let Some(ready) = self.next()? else { return Ok(None) };
        match self.gate.admit(&ready.body, self.total.saturating_sub(self.done), self.total) {
            Admission::Now(sent) => return Ok(Some((ready, sent))),
            Admission::Later => {}
            Admission::Never(error) => self.stop = Some(error),
        }
        self.give_back(ready.group)?;
        Ok(None)
    }

    /// The next request, with its documents claimed and none of them answered yet.
    fn next(&mut self) -> Result<Option<Ready>> {
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

    /// Notes the outcome of a request for these keys. Answers are stored by [`WorkQueue::flush`]. `ours` is absent for a
    /// request of an earlier attempt, whose answers are found in the log.
    pub fn record(
        &mut self,
        keys: Vec<AnswerKey>,
        ours: Option<(Group, Reservation)>,
        outcome: RequestOutcome,
    ) -> Result<()> {
        let (group, sent) = ours.map_or_else(Default::default, |(group, sent)| (Some(group), sent));
        if let RequestOutcome::Answer(answer) = outcome {
            // The number of queued documents that an earlier attempt's batch answers is unknown until its end.
            let left = if group.is_some() { self.requests_left() } else { 0 };
            let recorded = self.gate.record(sent, &answer, left);
            // Failing to record the cost must not lose the answer.
            self.unsaved.push(Line::answer(keys, answer));
            self.finished.extend(group);
            return recorded;
        }
        if matches!(outcome, RequestOutcome::Lost(_))
            && let Err(error) = self.gate.losses().lost(sent)
        {
            self.stop.get_or_insert(error);
        }
        self.gate.unpaid(sent)?;
        match (group, outcome) {
            // The client reports a request that the API rejects as the user's fault.
            (Some(group), RequestOutcome::Refused(error)) if error.blame == Blame::User => {
                self.faulty.push((group, error));
            }
            (Some(group), outcome) => {
                if let RequestOutcome::Refused(error) = outcome {
                    self.stop.get_or_insert(error);
                }
                self.give_back(group)?;
            }
            (None, _) => {}
        }
        Ok(())
    }

    /// Number of answers that are not stored yet.
    pub fn unsaved(&self) -> usize {
        self.unsaved.len()
    }

    /// Stores answers durably, and reports progress and costs.
    pub fn flush(&mut self, ctx: &mut Context) -> Result<()> {
        let any = !self.unsaved.is_empty();
        self.log.keep(std::mem::take(&mut self.unsaved))?;
        for group in std::mem::take(&mut self.finished) {
            self.finish(&group)?;
        }
        if any {
            // An answer shows that the settings are not at fault.
            self.blame_documents()?;
        }
        self.gate.report(ctx, false);
        if let Some(warning) = self.log.model_warning() {
            ctx.warn(format!("{}: {warning}", self.settings.kind()));
        }
        self.progress(ctx, None);
        Ok(())
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
    fn blame_documents(&mut self) -> Result<()> {
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

    fn finish(&mut self, group: &Group) -> Result<()> {
        self.done += group.iter().filter(|entry| entry.wanted).count() as u64;
        self.release(group)
    }

    fn release(&self, group: &Group) -> Result<()> {
        group.iter().try_for_each(|entry| self.log.release(entry.key))
    }

    /// Puts a request that was not sent or not answered back into the queue.
    pub fn give_back(&mut self, group: Group) -> Result<()> {
        self.release(&group)?;
        self.waiting.give_back(group);
        Ok(())
    }

    /// Number of requests still queued.
    fn requests_left(&self) -> u64 {
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

    pub fn progress(&self, ctx: &mut Context, headline: Option<(&str, f64)>) {
        ctx.progress(self.done, self.total, "labels", headline);
    }

    pub fn look_again(&mut self) {
        self.waiting.put_last(self.elsewhere.drain(..));
    }
}

/// The keys of a request's documents.
pub fn keys(group: &Group) -> Vec<AnswerKey> {
    group.iter().map(|entry| entry.key).collect()
}
