//! Tracks spending. A request is sent only if `max_cost` holds even if the request costs as much as it can.

use std::path::{Path, PathBuf};

use engine::context::ApiUsage;
use engine::error::{AtPath, Error, Result};
use serde::{Deserialize, Serialize};

use super::prices::{Quote, Usage};

/// Maximum tokens per byte, before anything is known about the model's tokenizer.
const TOKENS_PER_BYTE: f64 = 1.0;
/// Factor by which a text may be denser in tokens than all texts so far.
const MARGIN: f64 = 1.1;
/// Number of requests from which the cost of the others can be estimated.
pub const PILOT: u64 = 20;

/// Whether the next request may be sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Affordable {
    Now,
    /// Once a request in progress has cost less than its bound.
    Later,
    Never,
}

/// The spending of a stage.
pub struct Budget {
    quote: Option<Quote>,
    limit: Option<f64>,
    batch: bool,
    /// Spending of all attempts at this key in dollars, including amounts that may have been billed.
    spent: f64,
    /// The part of `spent` that is uncertain: reserved for requests without an answer.
    perhaps: f64,
    /// Upper bound of the cost of requests in progress.
    reserved: f64,
    /// The highest tokens per byte so far.
    tokens_per_byte: Option<f64>,
    ledger: PathBuf,
    /// Not yet reported.
    unreported: ApiUsage,
    /// Requests of this attempt, and what they cost.
    pub requests: u64,
    dollars: f64,
    output: u64,
}

/// Spending of all attempts at one key, including failed attempts.
#[derive(Default, Serialize, Deserialize)]
#[serde(default)]
struct Ledger {
    dollars: f64,
    perhaps: f64,
    /// Upper bound of the cost of requests in progress, which stays unknown if the attempt is killed. Zero for batches,
    /// whose answers are found again.
    under_way: f64,
}

impl Budget {
    /// `folder` is kept between attempts at a key.
    ///
    /// # Errors
    /// If the spending of earlier attempts cannot be read, or there is a limit but no price.
    pub fn open(folder: &Path, quote: Option<Quote>, limit: Option<f64>, batch: bool) -> Result<Self> {
        if limit.is_some() && quote.is_none() {
            return Err(Error::user("max_cost: no price of the model is known").help("give one in `prices`"));
        }
        let ledger = folder.join("spent.json");
        let spent = match std::fs::read(&ledger) {
            Ok(text) => serde_json::from_slice::<Ledger>(&text)
                .map_err(|e| Error::environment(format!("{}: {e}", ledger.display())).help("delete it to forget it"))?,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ledger::default(),
            Err(e) => return Err(e).at(&ledger),
        };
        Ok(Self {
            quote,
            limit,
            batch,
            spent: spent.dollars + spent.under_way,
            perhaps: spent.perhaps + spent.under_way,
            reserved: 0.0,
            tokens_per_byte: None,
            ledger,
            unreported: ApiUsage::default(),
            requests: 0,
            dollars: 0.0,
            output: 0,
        })
    }

    /// Upper bound of the cost of a request of this many bytes, in dollars; 0 without a limit.
    pub fn bound(&self, bytes: usize, max_tokens: u32) -> f64 {
        let (Some(_), Some(quote)) = (self.limit, &self.quote) else { return 0.0 };
        let ratio = self.tokens_per_byte.map_or(TOKENS_PER_BYTE, |ratio| (ratio * MARGIN).min(TOKENS_PER_BYTE));
        let sent = (bytes as f64 * ratio).ceil() as u64;
        let output = max_tokens.into();
        // The maximum of both extremes: all of the input, or none of it, is written to the prompt cache.
        let written = Usage { cache_written: sent, output, ..Usage::default() }.asked_in(self.batch);
        let plain = Usage { input: sent, output, batch: self.batch, ..Usage::default() };
        written.dollars(&quote.price).max(plain.dollars(&quote.price))
    }

    /// Reserves the upper bound of a request's cost if the limit allows it.
    ///
    /// # Errors
    /// If writing fails.
    pub fn reserve(&mut self, bound: f64) -> Result<Affordable> {
        let Some(limit) = self.limit else { return Ok(Affordable::Now) };
        if self.spent + self.reserved + bound <= limit {
            self.reserved += bound;
            self.write()?;
            Ok(Affordable::Now)
        } else if self.reserved > 0.0 {
            Ok(Affordable::Later)
        } else {
            Ok(Affordable::Never)
        }
    }

    /// Records that a request with reserved cost `bound` was sent and got no answer, so that it may have been billed.
    /// Returns whether it may be sent again with the same reservation.
    ///
    /// # Errors
    /// If writing fails.
    pub fn lost(&mut self, bound: f64) -> Result<bool> {
        let Some(limit) = self.limit else { return Ok(true) };
        self.spent += bound;
        self.perhaps += bound;
        self.write()?;
        Ok(self.spent + self.reserved <= limit)
    }

    /// Writes the spending to disk, if there is a limit.
    fn write(&self) -> Result<()> {
        if self.limit.is_none() {
            return Ok(());
        }
        let under_way = if self.batch { 0.0 } else { self.reserved };
        // Renamed, so that it is never half written; a power cut loses at most the last moments' few cents.
        let fresh = self.ledger.with_extension("new");
        let text = serde_json::json!(Ledger { dollars: self.spent, perhaps: self.perhaps, under_way }).to_string();
        std::fs::write(&fresh, text).and_then(|()| std::fs::rename(&fresh, &self.ledger)).at(&self.ledger)
    }

    /// Releases the reservation of a request that was not billed.
    ///
    /// # Errors
    /// If writing fails.
    pub fn unpaid(&mut self, bound: f64) -> Result<()> {
        self.release(bound);
        self.write()
    }

    fn release(&mut self, bound: f64) {
        // Rounding errors must not remain after everything is released.
        self.reserved = if self.reserved - bound < 1e-12 { 0.0 } else { self.reserved - bound };
    }

    /// Records an answer: releases its request's reservation and adds its cost. A request of an earlier attempt has no
    /// `bytes` and no reservation.
    ///
    /// # Errors
    /// If writing fails.
    pub fn record(&mut self, bound: f64, bytes: usize, usage: Usage) -> Result<()> {
        self.release(bound);
        self.requests += 1;
        self.output += usage.output;
        if bytes > 0 {
            let ratio = usage.sent() as f64 / bytes as f64;
            self.tokens_per_byte = Some(self.tokens_per_byte.map_or(ratio, |densest| densest.max(ratio)));
        }
        let dollars = self.quote.as_ref().map(|quote| usage.dollars(&quote.price));
        let (input_tokens, output_tokens) = (usage.sent(), usage.output);
        self.unreported.add(ApiUsage { requests: 1, input_tokens, output_tokens, dollars });
        self.dollars += dollars.unwrap_or(0.0);
        self.spent += dollars.unwrap_or(0.0);
        self.write()
    }

    /// Takes the spending not yet reported.
    pub fn unreported(&mut self) -> Option<ApiUsage> {
        let unreported = std::mem::take(&mut self.unreported);
        (unreported.requests > 0).then_some(unreported)
    }

    /// Dollars spent by this attempt.
    fn dollars(&self) -> Option<f64> {
        self.quote.as_ref().map(|_| self.dollars)
    }

    /// Whether the cost is limited, so that request sizes matter.
    pub fn is_limited(&self) -> bool {
        self.limit.is_some()
    }

    /// The error for a request beyond the limit.
    pub fn exhausted(&self, bound: f64, stopped: &str) -> Error {
        let limit = self.limit.unwrap_or_default();
        let from = self.quote.as_ref().map_or("", |quote| &quote.from);
        let perhaps = match self.perhaps {
            0.0 => String::new(),
            dollars => format!(", ${dollars:.4} of it perhaps, for what no answer came to"),
        };
        Error::environment(format!(
            "max_cost: ${:.4} of ${limit} are spent ({from}){perhaps}, and the next request can cost ${bound:.4}: {stopped}",
            self.spent
        ))
        .help("the answers so far are kept; raise `max_cost` and run again")
    }

    /// A forecast of the remaining cost from the requests so far. `left` counts requests.
    pub fn forecast(&self, left: u64) -> Option<String> {
        let each = self.dollars()? / self.requests.max(1) as f64;
        let output = self.output as f64 / self.requests.max(1) as f64;
        Some(format!(
            "after {} requests: {output:.0} tokens got each, thinking included; the other {left} will cost about ${:.2}",
            self.requests,
            each * left as f64
        ))
    }
}

/// Checks that the prompt cache works as estimated.
pub struct PromptCacheCheck {
    /// Whether the fixed prefix is long enough for the model's cache.
    expected: bool,
    requests: u64,
    read: bool,
}

impl PromptCacheCheck {
    pub fn new(expected: bool) -> Self {
        Self { expected, requests: 0, read: false }
    }

    /// Returns a warning, once, when many requests have read nothing from a cache that should be there.
    pub fn record(&mut self, usage: Usage) -> Option<String> {
        if usage.batch {
            // It is uncertain whether a batch hits the prompt cache.
            return None;
        }
        self.requests += 1;
        self.read |= usage.cache_read > 0;
        (self.expected && !self.read && self.requests == PILOT).then(|| {
            format!(
                "{PILOT} requests have read nothing from the prompt cache, though their fixed beginning is long enough for it: \
                 every token is paid in full"
            )
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::prices::Price;
    use crate::judge::providers::anthropic::quote;

    fn dollar_a_token() -> Option<Quote> {
        let million = 1e6;
        let price = Price {
            input: million,
            output: million,
            cache_write: Some(million),
            cache_write_hour: Some(million),
            cache_read: Some(0.0),
            batch: 0.5,
            minimum_prefix: None,
        };
        Some(Quote { price, from: "prices of a test".into() })
    }

    fn usage(input: u64, output: u64) -> Usage {
        Usage { input, output, ..Usage::default() }
    }

    #[test]
    fn a_request_goes_only_if_the_limit_is_kept_even_if_it_costs_the_most() {
        let folder = tempfile::tempdir().unwrap();
        let mut budget = Budget::open(folder.path(), dollar_a_token(), Some(100.0), false).unwrap();
        // 30 bytes are at most 30 tokens of input, plus at most 10 of output.
        let bound = budget.bound(30, 10);
        assert_eq!(bound, 40.0);
        assert_eq!(
            [bound; 3].map(|bound| budget.reserve(bound).unwrap()),
            [Affordable::Now, Affordable::Now, Affordable::Later]
        );
        // The request used 6 + 4 tokens, so texts have five bytes per token.
        budget.record(bound, 30, usage(6, 4)).unwrap();
        assert_eq!(budget.bound(30, 10), 17.0);
        assert_eq!(budget.reserve(17.0).unwrap(), Affordable::Now);
        budget.unpaid(17.0).unwrap();
        budget.record(bound, 30, usage(30, 10)).unwrap();
        assert_eq!(budget.dollars(), Some(50.0));
        assert_eq!([50.0, 0.1].map(|bound| budget.reserve(bound).unwrap()), [Affordable::Now, Affordable::Later]);
        budget.unpaid(50.0).unwrap();
        assert_eq!(budget.reserve(50.1).unwrap(), Affordable::Never);
        let told = budget.exhausted(50.1, "stopped");
        assert_eq!(told.exit_code(), 3);
        assert!(told.message.starts_with("max_cost: $50.0000 of $100 are spent (prices of a test)"), "{told}");
    }

    #[test]
    fn what_failed_attempts_spent_counts_for_the_next_one() {
        let folder = tempfile::tempdir().unwrap();
        let open = || Budget::open(folder.path(), dollar_a_token(), Some(50.0), true).unwrap();
        open().record(0.0, 10, Usage { batch: true, ..usage(40, 40) }).unwrap();
        let mut next = open();
        // In a batch the request cost half of 80.
        assert_eq!([11.0, 10.0].map(|bound| next.reserve(bound).unwrap()), [Affordable::Never, Affordable::Now]);
        assert_eq!(next.dollars(), Some(0.0));
    }

    #[test]
    fn what_no_answer_came_to_may_have_been_paid() {
        let folder = tempfile::tempdir().unwrap();
        let open = |batch| Budget::open(folder.path(), dollar_a_token(), Some(100.0), batch).unwrap();
        let mut budget = open(false);
        assert_eq!(budget.reserve(30.0).unwrap(), Affordable::Now);
        // One more try makes 60, a third one 90.
        assert_eq!([30.0, 30.0, 30.0].map(|bound| budget.lost(bound).unwrap()), [true, true, false]);
        budget.unpaid(30.0).unwrap();
        assert_eq!(budget.reserve(10.0).unwrap(), Affordable::Now);
        drop(budget);
        // After a kill, the last ten count too.
        let mut next = open(false);
        assert_eq!(next.reserve(0.1).unwrap(), Affordable::Never);
        let told = next.exhausted(0.1, "stopped").message;
        assert!(told.contains("$100.0000 of $100 are spent (prices of a test), $100.0000 of it perhaps"), "{told}");

        let folder = tempfile::tempdir().unwrap();
        let open = || Budget::open(folder.path(), dollar_a_token(), Some(100.0), true).unwrap();
        assert_eq!(open().reserve(90.0).unwrap(), Affordable::Now);
        // A batch's answers are found again, and count when they arrive.
        assert_eq!(open().reserve(90.0).unwrap(), Affordable::Now);
    }

    #[test]
    fn without_a_limit_nothing_is_held_back_and_a_limit_needs_a_price() {
        let folder = tempfile::tempdir().unwrap();
        let mut free = Budget::open(folder.path(), None, None, false).unwrap();
        assert_eq!((free.bound(1 << 30, 1 << 30), free.reserve(1e9).unwrap()), (0.0, Affordable::Now));
        assert!(free.lost(1e9).unwrap());
        free.record(0.0, 5, usage(2, 1)).unwrap();
        let told = ApiUsage { requests: 1, input_tokens: 2, output_tokens: 1, dollars: None };
        assert_eq!((free.unreported(), free.unreported(), free.forecast(3)), (Some(told), None, None));
        let error = Budget::open(folder.path(), None, Some(1.0), false).map(drop).unwrap_err();
        assert_eq!((error.exit_code(), error.help.as_deref()), (2, Some("give one in `prices`")));
    }

    #[test]
    fn the_first_requests_tell_what_the_rest_will_cost() {
        let folder = tempfile::tempdir().unwrap();
        let price = quote("claude-sonnet-4-6", None).unwrap();
        let mut budget = Budget::open(folder.path(), price, None, false).unwrap();
        (0..4).for_each(|_| budget.record(0.0, 4000, usage(1000, 200)).unwrap());
        let told = budget.forecast(1000).unwrap();
        let expected = "after 4 requests: 200 tokens got each, thinking included; the other 1000 will cost about $6.00";
        assert_eq!(told, expected);
    }

    #[test]
    fn a_cache_that_is_never_read_is_told_once_where_it_should_be_read() {
        let read = Usage { cache_read: 9, ..usage(1, 1) };
        let warnings = |expected: bool, first: Usage| {
            let mut caching = PromptCacheCheck::new(expected);
            (0..50).filter(|i| caching.record(if *i == 5 { first } else { usage(1, 1) }).is_some()).count()
        };
        assert_eq!([warnings(true, usage(1, 1)), warnings(true, read), warnings(false, usage(1, 1))], [1, 0, 0]);
    }
}
