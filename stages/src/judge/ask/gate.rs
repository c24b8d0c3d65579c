//! Budget gate of an attempt: admits requests, records their cost, and reports it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use engine::context::Context;
use engine::error::{Error, Result};
use serde_json::Value;

use crate::judge::answer_log::AnswerLog;
use crate::judge::budget::{Affordable, Budget, PILOT, PromptCacheCheck};
use crate::judge::estimate::{Prefix, Terms};
use crate::judge::prices::{Quote, Usage};
use crate::judge::provider::Protocol;
use crate::judge::settings::Settings;

/// Minimum time between two cost reports.
const REPORT_EVERY: Duration = Duration::from_secs(1);

pub struct BudgetGate {
    /// Shared with the senders.
    budget: Arc<Mutex<Budget>>,
    protocol: &'static Protocol,
    caching: PromptCacheCheck,
    max_tokens: u32,
    /// Maximum number of requests of this attempt.
    most: Option<u64>,
    sent: u64,
    /// Whether to forecast the cost from the first answers.
    forecast: bool,
    warnings: Vec<String>,
    reported: Option<Instant>,
}

/// Handle to the budget for senders of requests.
#[derive(Clone)]
pub struct LossRecorder(Arc<Mutex<Budget>>);

impl LossRecorder {
    /// Records that a request was sent without an answer.
    ///
    /// # Errors
    /// If the budget does not allow another try.
    pub fn lost(&self, sent: Reservation) -> Result<()> {
        let mut budget = locked(&self.0);
        match budget.lost(sent.bound)? {
            true => Ok(()),
            false => Err(budget.exhausted(sent.bound, "what was lost is not sent again")),
        }
    }
}

fn locked(budget: &Mutex<Budget>) -> MutexGuard<'_, Budget> {
    // The data are plain numbers, valid also after a panic.
    budget.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The amount reserved for a request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reservation {
    bound: f64,
    bytes: usize,
}

pub enum Admission {
    Now(Reservation),
    /// Once a request in progress has finished.
    Later,
    Never(Error),
}

impl BudgetGate {
    /// # Errors
    /// As [`Budget::open`].
    pub fn open(settings: &Settings, log: &AnswerLog, ctx: &Context) -> Result<Self> {
        let terms = Terms::of(settings);
        let is_free = terms.quote.as_ref().is_some_and(Quote::is_free);
        // It is uncertain whether a batch hits the prompt cache.
        let cached = !terms.batch && terms.prefix(settings.fixed_bytes()) == Prefix::Cached;
        Ok(Self {
            budget: Arc::new(Mutex::new(Budget::open(ctx.checkpoints(), terms.quote, settings.max_cost, terms.batch)?)),
            protocol: settings.provider.protocol(),
            caching: PromptCacheCheck::new(cached),
            max_tokens: settings.max_tokens,
            most: settings.max_requests,
            sent: 0,
            forecast: log.answered() < PILOT && !is_free,
            warnings: Vec::new(),
            reported: None,
        })
    }

    /// Whether a request may be sent; `left` of `of` documents are not answered yet.
    pub fn admit(&mut self, body: &Value, left: u64, of: u64) -> Admission {
        if self.most.is_some_and(|most| self.sent >= most) {
            let told =
                format!("max_requests: {} requests were sent: stopped with {left} of {of} documents left", self.sent);
            return Admission::Never(
                Error::environment(told).help("the answers so far are kept: `plan` says what the rest will cost"),
            );
        }
        let mut budget = locked(&self.budget);
        let bytes = if budget.is_limited() { body.to_string().len() } else { 0 };
        let bound = budget.bound(bytes, self.max_tokens);
        match budget.reserve(bound) {
            Ok(Affordable::Now) => {
                self.sent += 1;
                Admission::Now(Reservation { bound, bytes })
            }
            Ok(Affordable::Later) => Admission::Later,
            Ok(Affordable::Never) => {
                Admission::Never(budget.exhausted(bound, &format!("stopped with {left} of {of} documents left")))
            }
            Err(error) => Admission::Never(error),
        }
    }

    /// A handle to the budget for senders of requests.
    pub fn losses(&self) -> LossRecorder {
        LossRecorder(self.budget.clone())
    }

    /// Records an answer; `left` requests of this kind may follow.
    ///
    /// # Errors
    /// If the spending cannot be recorded.
    pub fn record(&mut self, sent: Reservation, answer: &Value, left: u64) -> Result<()> {
        let usage = (self.protocol.usage)(answer);
        let mut budget = locked(&self.budget);
        let is_told = usage != Usage::default();
        if !is_told && budget.is_limited() {
            // An answer without usage may have cost as much as it can.
            budget.lost(sent.bound)?;
        }
        budget.record(sent.bound, if is_told { sent.bytes } else { 0 }, usage)?;
        self.warnings.extend(self.caching.record(usage));
        if self.forecast && budget.requests == PILOT && left > 0 {
            self.warnings.extend(budget.forecast(left));
        }
        Ok(())
    }

    /// Records a request without an answer. If it may have been billed, the sender has already recorded that.
    ///
    /// # Errors
    /// If the spending cannot be recorded.
    pub fn unpaid(&mut self, sent: Reservation) -> Result<()> {
        locked(&self.budget).unpaid(sent.bound)
    }

    /// Whether an answer has come, so that the common prefix of all requests is in the prompt cache.
    pub fn is_warm(&self) -> bool {
        locked(&self.budget).requests > 0
    }

    /// Reports warnings and costs; at the end, everything that is pending.
    pub fn report(&mut self, ctx: &mut Context, at_the_end: bool) {
        for warning in self.warnings.drain(..) {
            ctx.warn(format!("{}: {warning}", self.protocol.kind));
        }
        if at_the_end || self.reported.is_none_or(|at| at.elapsed() >= REPORT_EVERY) {
            self.reported = Some(Instant::now());
            let unreported = locked(&self.budget).unreported();
            if let Some(paid) = unreported {
                ctx.paid(paid);
            }
        }
    }
}
