//! Budget gate of an attempt: admits requests, records their cost, and reports it.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use engine::context::Context;
use engine::error::{Error, Result};
use serde_json::Value;

use crate::claude::cache::Cache;
use crate::claude::estimate::{Prefix, Terms};
use crate::claude::money::{Budget, Caching, Go, PILOT};
use crate::claude::params::Params;
use crate::claude::prices::Usage;
use crate::claude::request;
use crate::claude::settings::Settings;

/// Minimum time between two cost reports.
const TOLD_EVERY: Duration = Duration::from_secs(1);

pub struct Till {
    /// Shared with the senders.
    budget: Arc<Mutex<Budget>>,
    caching: Caching,
    max_tokens: u32,
    /// Maximum number of requests of this attempt.
    most: Option<u64>,
    sent: u64,
    /// Whether to forecast the cost from the first answers.
    forecast: bool,
    warnings: Vec<String>,
    told: Option<Instant>,
}

/// Handle to the budget for senders of requests.
#[derive(Clone)]
pub struct Purse(Arc<Mutex<Budget>>);

impl Purse {
    /// Records that a request was sent without an answer.
    ///
    /// # Errors
    /// If the budget does not allow another try.
    pub fn lost(&self, sent: Sent) -> Result<()> {
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
pub struct Sent {
    bound: f64,
    bytes: usize,
}

pub enum Admitted {
    Now(Sent),
    /// Once a request in progress has finished.
    Later,
    Never(Error),
}

impl Till {
    /// # Errors
    /// As [`Budget::open`].
    pub fn open(params: &Params, settings: &Settings, cache: &Cache, ctx: &Context) -> Result<Self> {
        let terms = Terms::of(params, settings)?;
        // It is uncertain whether a batch hits the prompt cache.
        let cached = !terms.batch && terms.prefix(request::fixed_bytes(settings, params.mode)) == Prefix::Cached;
        Ok(Self {
            budget: Arc::new(Mutex::new(Budget::open(ctx.checkpoints(), terms.quote, params.max_cost, terms.batch)?)),
            caching: Caching::new(cached),
            max_tokens: settings.max_tokens,
            most: params.max_requests,
            sent: 0,
            forecast: cache.answered() < PILOT,
            warnings: Vec::new(),
            told: None,
        })
    }

    /// Whether a request may be sent; `left` of `of` documents are not answered yet.
    pub fn admit(&mut self, body: &Value, left: u64, of: u64) -> Admitted {
        if self.most.is_some_and(|most| self.sent >= most) {
            let told =
                format!("max_requests: {} requests were sent: stopped with {left} of {of} documents left", self.sent);
            return Admitted::Never(
                Error::environment(told).help("the answers so far are kept: `plan` says what the rest will cost"),
            );
        }
        let mut budget = locked(&self.budget);
        let bytes = if budget.is_limited() { body.to_string().len() } else { 0 };
        let bound = budget.bound(bytes, self.max_tokens);
        match budget.reserve(bound) {
            Ok(Go::Now) => {
                self.sent += 1;
                Admitted::Now(Sent { bound, bytes })
            }
            Ok(Go::Later) => Admitted::Later,
            Ok(Go::Never) => {
                Admitted::Never(budget.exhausted(bound, &format!("stopped with {left} of {of} documents left")))
            }
            Err(error) => Admitted::Never(error),
        }
    }

    /// A handle to the budget for senders of requests.
    pub fn purse(&self) -> Purse {
        Purse(self.budget.clone())
    }

    /// Records an answer; `left` requests of this kind may follow.
    ///
    /// # Errors
    /// If the spending cannot be recorded.
    pub fn landed(&mut self, sent: Sent, answer: &Value, left: u64) -> Result<()> {
        let usage = Usage::of(answer);
        let mut budget = locked(&self.budget);
        budget.landed(sent.bound, sent.bytes, usage)?;
        self.warnings.extend(self.caching.landed(usage));
        if self.forecast && budget.requests == PILOT && left > 0 {
            self.warnings.extend(budget.forecast(left));
        }
        Ok(())
    }

    /// Records a request without an answer. If it may have been billed, the sender has already recorded that.
    ///
    /// # Errors
    /// If the spending cannot be recorded.
    pub fn unpaid(&mut self, sent: Sent) -> Result<()> {
        locked(&self.budget).unpaid(sent.bound)
    }

    /// Whether an answer has come, so that the common prefix of all requests is in the prompt cache.
    pub fn is_warm(&self) -> bool {
        locked(&self.budget).requests > 0
    }

    /// Reports warnings and costs; at the end, everything that is pending.
    pub fn tell(&mut self, ctx: &mut Context, at_the_end: bool) {
        for warning in self.warnings.drain(..) {
            ctx.warn(format!("annotate.claude: {warning}"));
        }
        if at_the_end || self.told.is_none_or(|told| told.elapsed() >= TOLD_EVERY) {
            self.told = Some(Instant::now());
            let untold = locked(&self.budget).untold();
            if let Some(paid) = untold {
                ctx.paid(paid);
            }
        }
    }
}
