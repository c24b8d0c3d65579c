//! The till of an attempt: which request may go, what came back for it, what is told of that. Knows no document.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use engine::context::Context;
use engine::error::{Error, Result};
use serde_json::Value;

use crate::annotate::claude::cache::Cache;
use crate::annotate::claude::estimate::{Prefix, Terms};
use crate::annotate::claude::money::{Budget, Caching, Go, PILOT};
use crate::annotate::claude::params::Params;
use crate::annotate::claude::prices::Usage;
use crate::annotate::claude::request;
use crate::annotate::claude::settings::Settings;

/// How often it is told what was paid.
const TOLD_EVERY: Duration = Duration::from_secs(1);

pub struct Till {
    /// Shared with those who send.
    budget: Arc<Mutex<Budget>>,
    caching: Caching,
    max_tokens: u32,
    /// Requests of this attempt at most.
    most: Option<u64>,
    sent: u64,
    /// Whether the first answers tell something that was not known.
    forecast: bool,
    warnings: Vec<String>,
    told: Option<Instant>,
}

/// The budget, for whoever sends a request.
#[derive(Clone)]
pub struct Purse(Arc<Mutex<Budget>>);

impl Purse {
    /// A try was sent and no answer came.
    ///
    /// # Errors
    /// If there is no money to try it again.
    pub fn lost(&self, sent: Sent) -> Result<()> {
        let mut budget = locked(&self.0);
        match budget.lost(sent.bound)? {
            true => Ok(()),
            false => Err(budget.exhausted(sent.bound, "what was lost is not sent again")),
        }
    }
}

fn locked(budget: &Mutex<Budget>) -> MutexGuard<'_, Budget> {
    // Plain numbers: whole after a panic too.
    budget.lock().unwrap_or_else(PoisonError::into_inner)
}

/// What was put aside for a request.
#[derive(Clone, Copy, Debug, Default)]
pub struct Sent {
    bound: f64,
    bytes: usize,
}

pub enum Admitted {
    Now(Sent),
    /// When something that is under way has landed.
    Later,
    Never(Error),
}

impl Till {
    /// # Errors
    /// As [`Budget::open`].
    pub fn open(params: &Params, settings: &Settings, cache: &Cache, ctx: &Context) -> Result<Self> {
        let terms = Terms::of(params, settings)?;
        // Whether a batch finds the prompt cache is chance.
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

    /// Whether a request may go; `left` documents `of` all are not answered yet.
    pub fn admit(&mut self, body: &Value, left: u64, of: u64) -> Admitted {
        if self.most.is_some_and(|most| self.sent >= most) {
            let told =
                format!("max_requests: {} requests were sent: stopped with {left} of {of} documents left", self.sent);
            return Admitted::Never(
                Error::surroundings(told).help("the answers so far are kept: `plan` says what the rest will cost"),
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

    /// For whoever sends a request.
    pub fn purse(&self) -> Purse {
        Purse(self.budget.clone())
    }

    /// An answer has come; `left` requests of its kind may still be to come.
    ///
    /// # Errors
    /// If what was spent cannot be written down.
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

    /// A request came back without an answer; if that may have been paid, whoever sent it has said so.
    ///
    /// # Errors
    /// If that cannot be written down.
    pub fn unpaid(&mut self, sent: Sent) -> Result<()> {
        locked(&self.budget).unpaid(sent.bound)
    }

    /// Whether an answer has come, so that what every request begins with is in the prompt cache.
    pub fn is_warm(&self) -> bool {
        locked(&self.budget).requests > 0
    }

    /// Tells what there is to tell; at the end, all of it.
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
