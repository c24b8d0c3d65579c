//! Cost estimates: a range from sizes alone, or a figure from earlier answers of the same kind. Pure.

use engine::estimate::{Estimate, EstimateRange};

use super::budget::PILOT;
use super::params::Mode;
use super::prices::{Quote, Usage};
use super::settings::Settings;

/// Tokens per byte of English text with current tokenizers.
const TOKENS_PER_BYTE: EstimateRange = EstimateRange { low: 1.0 / 5.0, high: 1.0 / 3.0 };
/// Output tokens of one document's label.
const LABEL_TOKENS: EstimateRange = EstimateRange { low: 10.0, high: 30.0 };

/// The amount of work.
#[derive(Clone, Copy, Debug, Default)]
pub struct Work {
    pub requests: u64,
    pub documents: u64,
    /// Number of documents with cached answers.
    pub kept: u64,
    /// Bytes of the fixed prefix of every request.
    pub fixed_bytes: u64,
    /// Bytes of all requests without the prefix.
    pub other_bytes: u64,
}

/// The conditions that determine the price.
#[derive(Clone, Debug)]
pub struct Terms {
    pub quote: Option<Quote>,
    pub batch: bool,
    pub max_tokens: u32,
    /// Whether the model may think before it answers.
    pub thinks: bool,
    /// Answers about each document.
    pub questions: u64,
}

/// Whether the model caches the fixed prefix.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Prefix {
    Cached,
    /// Uncertain from its length in bytes.
    Perhaps,
    TooShort,
    /// The minimum length is unknown.
    Unknown,
}

impl Terms {
    pub fn of(settings: &Settings) -> Self {
        Self {
            quote: settings.quote.clone(),
            batch: settings.mode == Mode::Batch,
            max_tokens: settings.max_tokens,
            thinks: settings.provider.thinks(),
            questions: settings.instructions.criteria_per_pair() as u64,
        }
    }

    /// Whether a prefix of `bytes` bytes is long enough for caching.
    pub fn prefix(&self, bytes: u64) -> Prefix {
        let Some(minimum) = self.quote.as_ref().and_then(|quote| quote.price.minimum_prefix) else {
            return Prefix::Unknown;
        };
        let tokens = TOKENS_PER_BYTE * bytes as f64;
        match minimum as f64 {
            minimum if tokens.low >= minimum => Prefix::Cached,
            minimum if tokens.high >= minimum => Prefix::Perhaps,
            _ => Prefix::TooShort,
        }
    }
}

/// Usage of earlier answers with the same settings.
#[derive(Clone, Copy, Debug, Default)]
pub struct Usages {
    pub requests: u64,
    input: Moments,
    output: Moments,
    dollars: Moments,
}

impl Usages {
    /// Adds an answer, priced like the next ones.
    pub fn add(&mut self, usage: Usage, terms: &Terms) {
        let usage = usage.asked_in(terms.batch);
        self.requests += 1;
        self.input.add(usage.sent() as f64);
        self.output.add(usage.output as f64);
        self.dollars.add(terms.quote.as_ref().map_or(0.0, |quote| usage.dollars(&quote.price)));
    }
}

#[derive(Clone, Copy, Debug, Default)]
struct Moments {
    n: f64,
    sum: f64,
    squares: f64,
}

impl Moments {
    fn add(&mut self, x: f64) {
        self.n += 1.0;
        self.sum += x;
        self.squares += x * x;
    }

    /// The mean with its 95% interval, not below zero.
    fn mean(&self) -> EstimateRange {
        let mean = self.sum / self.n;
        let variance = (self.squares / self.n - mean * mean).max(0.0) * self.n / (self.n - 1.0).max(1.0);
        let half = 1.96 * (variance / self.n).sqrt();
        EstimateRange::new((mean - half).max(0.0), mean + half)
    }
}

/// Estimates requests, tokens and cost of the remaining work.
pub fn estimate(work: &Work, terms: &Terms, seen: &Usages) -> Estimate {
    let requests = work.requests as f64;
    let mut notes = Vec::new();
    if work.kept > 0 {
        notes.push(format!("{} of {} documents are answered already", work.kept, work.kept + work.documents));
    }
    let (input_tokens, output_tokens, dollars) = if work.requests == 0 {
        (
            EstimateRange::exactly(0.0),
            EstimateRange::exactly(0.0),
            terms.quote.as_ref().map(|_| EstimateRange::exactly(0.0)),
        )
    } else if seen.requests >= PILOT {
        notes.push(format!("by {} answers to the same question, thinking included", seen.requests));
        let dollars = terms.quote.as_ref().map(|_| seen.dollars.mean() * requests);
        (seen.input.mean() * requests, seen.output.mean() * requests, dollars)
    } else {
        from_sizes(work, terms, &mut notes)
    };
    if let Some(quote) = &terms.quote {
        let batch = if terms.batch { format!(", batches at {} of them", quote.price.batch) } else { String::new() };
        notes.push(format!("{}{batch}", quote.from));
    }
    Estimate { requests: work.requests, input_tokens, output_tokens, dollars, notes }
}

fn from_sizes(
    work: &Work,
    terms: &Terms,
    notes: &mut Vec<String>,
) -> (EstimateRange, EstimateRange, Option<EstimateRange>) {
    let requests = work.requests as f64;
    let prefix = TOKENS_PER_BYTE * work.fixed_bytes as f64;
    let others = TOKENS_PER_BYTE * work.other_bytes as f64;
    let input = prefix * requests + others;
    let mut output = LABEL_TOKENS * (work.documents * terms.questions) as f64;
    if terms.thinks {
        output.high = output.high.max(f64::from(terms.max_tokens) * requests);
        notes.push(format!(
            "thinking is not known before a pilot of {PILOT} requests (`max_requests: {PILOT}`): up to max_tokens are reckoned with"
        ));
    }
    let Some(quote) = &terms.quote else {
        notes.push("no price of this model is known: give one in `prices`".to_owned());
        return (input, output, None);
    };
    if quote.is_free() {
        return (input, output, Some(EstimateRange::exactly(0.0)));
    }
    let price = quote.price;
    let plain = input * price.input;
    let write = if terms.batch { price.hour() } else { price.write() };
    // The first request writes the prefix, all others read it.
    let cached = prefix * (write + price.read() * (requests - 1.0)) + others * price.input;
    // Worst case: no request finds the prefix, so each writes it again.
    let written = prefix * (write * requests) + others * price.input;
    let about = ((prefix.low + prefix.high) / 2.0).round();
    let minimum = price.minimum_prefix.unwrap_or_default();
    let sent = match terms.prefix(work.fixed_bytes) {
        Prefix::Cached if terms.batch => {
            notes.push(
                "requests of a batch read the prompt cache or write it, for an hour: from all but one reading to all writing"
                    .to_owned(),
            );
            EstimateRange::new(cached.low, written.high.max(cached.high))
        }
        Prefix::Cached => {
            notes.push(format!("the fixed beginning, about {about} tokens, is read from the prompt cache"));
            cached
        }
        Prefix::Perhaps => {
            notes.push(format!(
                "the fixed beginning, about {about} tokens, may or may not reach the {minimum} that are cached"
            ));
            EstimateRange::new(
                cached.low.min(plain.low),
                if terms.batch { written.high.max(plain.high) } else { plain.high },
            )
        }
        Prefix::TooShort => {
            notes.push(format!(
                "the fixed beginning, about {about} tokens, is shorter than the {minimum} that this model caches: no discount"
            ));
            plain
        }
        Prefix::Unknown => {
            notes.push("how long a beginning must be for this model to log it is not known: no discount".to_owned());
            plain
        }
    };
    let share = if terms.batch { price.batch } else { 1.0 };
    (input, output, Some((sent + output * price.output) * (share * 1e-6)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::judge::providers::anthropic::quote;

    fn terms(model: &str, batch: bool, thinks: bool) -> Terms {
        Terms { quote: quote(model, None).unwrap(), batch, max_tokens: 1000, thinks, questions: 1 }
    }

    fn work() -> Work {
        Work { requests: 100, documents: 200, kept: 0, fixed_bytes: 6_000, other_bytes: 300_000 }
    }

    fn near(range: EstimateRange, low: f64, high: f64) {
        assert!((range.low - low).abs() < 1e-9 * low.abs().max(1.0), "{range:?} {low}");
        assert!((range.high - high).abs() < 1e-9 * high.abs().max(1.0), "{range:?} {high}");
    }

    #[test]
    fn sizes_give_a_range_and_a_prefix_that_is_too_short_gives_no_discount_and_says_so() {
        // Opus 4.6 caches from 4,096 tokens on; 6,000 bytes are 1,200 to 2,000 tokens.
        let found = estimate(&work(), &terms("claude-opus-4-6", false, false), &Usages::default());
        near(found.input_tokens, 180_000.0, 300_000.0);
        near(found.output_tokens, 2_000.0, 6_000.0);
        near(found.dollars.unwrap(), 0.9 + 0.05, 1.5 + 0.15);
        assert!(
            found
                .notes
                .iter()
                .any(|note| note.contains("is shorter than the 4096 that this model caches: no discount"))
        );
    }

    #[test]
    fn a_long_prefix_is_written_once_and_read_by_all_others() {
        let found = estimate(&work(), &terms("claude-sonnet-4-6", false, false), &Usages::default());
        let sent = |prefix: f64, others: f64| (prefix * (3.75 + 99.0 * 0.3) + others * 3.0) * 1e-6;
        near(found.dollars.unwrap(), sent(1_200.0, 60_000.0) + 0.03, sent(2_000.0, 100_000.0) + 0.09);
        let plain = estimate(&work(), &terms("claude-opus-4-8", false, false), &Usages::default()).dollars.unwrap();
        assert!(found.dollars.unwrap().high < plain.high);
    }

    #[test]
    fn a_batch_costs_half_and_may_or_may_not_find_the_cache() {
        let single = estimate(&work(), &terms("claude-haiku-4-5", false, false), &Usages::default()).dollars.unwrap();
        let batch = estimate(&work(), &terms("claude-haiku-4-5", true, false), &Usages::default()).dollars.unwrap();
        near(batch, single.low / 2.0, single.high / 2.0);
        let found = estimate(&work(), &terms("claude-sonnet-4-6", true, false), &Usages::default());
        near(
            found.dollars.unwrap(),
            {
                let cached = 1_200.0 * (6.0 + 99.0 * 0.3) + 60_000.0 * 3.0;
                (cached * 1e-6 + 0.03) / 2.0
            },
            {
                let written = 2_000.0 * 100.0 * 6.0 + 100_000.0 * 3.0;
                (written * 1e-6 + 0.09) / 2.0
            },
        );
        assert!(found.notes.iter().any(|note| note.ends_with("batches at 0.5 of them")), "{:?}", found.notes);
    }

    #[test]
    fn thinking_is_a_range_before_a_pilot_and_a_figure_after_it() {
        let terms = terms("claude-sonnet-4-6", false, true);
        let mut seen = Usages::default();
        let usage = |i: u64| Usage { input: 2_000, output: 300 + i % 2, ..Usage::default() };
        (0..PILOT - 1).for_each(|i| seen.add(usage(i), &terms));
        let before = estimate(&work(), &terms, &seen);
        near(before.output_tokens, 2_000.0, 100_000.0);
        assert!(before.notes.iter().any(|note| note.contains("not known before a pilot of 20 requests")));
        seen.add(usage(1), &terms);
        let after = estimate(&work(), &terms, &seen);
        near(after.input_tokens, 200_000.0, 200_000.0);
        assert!(after.output_tokens.low > 30_000.0 && after.output_tokens.high < 30_100.0, "{after:?}");
        let dollars = after.dollars.unwrap();
        assert!(dollars.low < 1.05075 && dollars.high > 1.05075 && dollars.high - dollars.low < 0.001, "{dollars:?}");
    }

    #[test]
    fn what_is_answered_already_costs_nothing_and_a_model_without_a_price_has_none() {
        let done = Work { requests: 0, documents: 0, kept: 50, other_bytes: 0, ..work() };
        let found = estimate(&done, &terms("claude-sonnet-4-6", false, true), &Usages::default());
        near(found.dollars.unwrap(), 0.0, 0.0);
        assert_eq!(found.notes[0], "50 of 50 documents are answered already");
        let unknown = estimate(&work(), &terms("no-such-model", false, false), &Usages::default());
        assert_eq!(unknown.dollars, None);
        assert!(unknown.notes.iter().any(|note| note == "no price of this model is known: give one in `prices`"));
        // The minimum prefix of this model is unknown.
        let found = estimate(&work(), &terms("claude-sonnet-5-5", false, false), &Usages::default());
        assert!(found.notes.iter().any(|note| note.contains("is not known: no discount")), "{:?}", found.notes);
    }
}
