//! Prices of tokens: a dated built-in table, which a table in the pipeline file overrides.

use std::collections::BTreeMap;

use engine::error::{Error, Result};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The prices of one model, in dollars per million tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Price {
    /// Input tokens.
    pub input: f64,
    /// Output tokens, including thinking.
    pub output: f64,
    /// Input tokens written to the prompt cache for five minutes; `annotate.openai` may leave it out.
    #[serde(default)]
    pub cache_write: Option<f64>,
    /// Input tokens written to the prompt cache for an hour, as batches request; default: twice `input`, as for every
    /// model so far.
    #[serde(default)]
    pub cache_write_hour: Option<f64>,
    /// Input tokens read from the prompt cache; `annotate.openai` may leave it out, for `input`.
    #[serde(default)]
    pub cache_read: Option<f64>,
    /// Price factor of Message Batches.
    #[serde(default = "half")]
    pub batch: f64,
    /// Minimum tokens of a request's fixed prefix for caching; null if unknown.
    #[serde(default)]
    pub minimum_prefix: Option<u64>,
}

impl Price {
    /// Price of input tokens written to the prompt cache for five minutes.
    pub fn write(&self) -> f64 {
        self.cache_write.unwrap_or(self.input)
    }

    /// Price of input tokens read from the prompt cache.
    pub fn read(&self) -> f64 {
        self.cache_read.unwrap_or(self.input)
    }

    /// Price of input tokens written to the prompt cache for an hour.
    pub fn hour(&self) -> f64 {
        self.cache_write_hour.unwrap_or(2.0 * self.input)
    }
}

fn half() -> f64 {
    0.5
}

/// Prices by model on a given date.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Prices {
    /// Date of the look-up: `2026-11-25`.
    pub date: String,
    /// Source of the prices.
    #[serde(default)]
    pub source: String,
    /// By model id; an id without a date applies to all dated versions.
    pub models: BTreeMap<String, Price>,
}

impl Prices {
    /// A built-in table.
    ///
    /// # Errors
    /// If it is invalid (an internal error).
    pub fn parse(text: &str) -> Result<Self> {
        serde_json::from_str(text).map_err(|e| Error::internal(format!("prices.json: {e}")))
    }

    /// The price of a model with its source; `whose` names this table.
    pub fn quote(&self, model: &str, whose: &str) -> Option<Quote> {
        Some(Quote { price: self.of(model)?, from: format!("{whose} of {}", self.date) })
    }

    /// The price of a model, or of its id without a date.
    pub fn of(&self, model: &str) -> Option<Price> {
        let undated =
            model.rsplit_once('-').filter(|(_, date)| date.len() == 8 && date.bytes().all(|b| b.is_ascii_digit()));
        let by_name = |name: &str| self.models.get(name).copied();
        by_name(model).or_else(|| by_name(undated?.0))
    }

    /// Faults of the table as (path below this table, message).
    pub fn faults(&self) -> Vec<(String, String)> {
        let mut faults = Vec::new();
        if self.date.trim().is_empty() {
            faults.push(("date".to_owned(), "expected the day when the prices were looked up".to_owned()));
        }
        for (model, price) in &self.models {
            let named = [
                ("input", price.input),
                ("output", price.output),
                ("cache_write", price.cache_write.unwrap_or_default()),
                ("cache_write_hour", price.cache_write_hour.unwrap_or_default()),
                ("cache_read", price.cache_read.unwrap_or_default()),
                ("batch", price.batch),
            ];
            for (name, value) in named.into_iter().filter(|(_, value)| !(0.0..1e6).contains(value)) {
                faults.push((format!("models.{model}.{name}"), format!("expected dollars, found {value}")));
            }
        }
        faults
    }
}

/// A model's price and its source.
#[derive(Clone, Debug, PartialEq)]
pub struct Quote {
    pub price: Price,
    /// For example `prices of 2026-11-25`.
    pub from: String,
}

impl Quote {
    /// The price of an endpoint that costs nothing.
    pub fn free() -> Self {
        let price = Price {
            input: 0.0,
            output: 0.0,
            cache_write: None,
            cache_write_hour: None,
            cache_read: None,
            batch: 1.0,
            minimum_prefix: None,
        };
        Self { price, from: "free, as `prices` names no price of this model".to_owned() }
    }

    pub fn is_free(&self) -> bool {
        self.price.input == 0.0 && self.price.output == 0.0
    }
}

/// A count that a server reports; 0 if it is impossible.
pub fn believed(count: &Value) -> u64 {
    count.as_u64().filter(|n| *n < 1 << 40).unwrap_or(0)
}

/// Token counts of an answer by price category.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Input tokens neither written to the prompt cache nor read from it.
    pub input: u64,
    pub output: u64,
    /// Written to the prompt cache for five minutes.
    pub cache_written: u64,
    /// Written to the prompt cache for an hour.
    pub cache_written_hour: u64,
    pub cache_read: u64,
    /// Whether the request was part of a batch.
    pub batch: bool,
}

impl Usage {
    /// All input tokens.
    pub fn sent(&self) -> u64 {
        self.input + self.written() + self.cache_read
    }

    /// All tokens written to the prompt cache.
    pub fn written(&self) -> u64 {
        self.cache_written + self.cache_written_hour
    }

    /// The same usage as part of a batch, or as a single request: cache writes get the corresponding duration.
    #[must_use]
    pub fn asked_in(self, batch: bool) -> Self {
        let written = self.written();
        let (cache_written, cache_written_hour) = if batch { (0, written) } else { (written, 0) };
        Self { cache_written, cache_written_hour, batch, ..self }
    }

    /// The cost at these prices.
    pub fn dollars(&self, price: &Price) -> f64 {
        let full = self.input as f64 * price.input
            + self.cache_written as f64 * price.write()
            + self.cache_written_hour as f64 * price.hour()
            + self.cache_read as f64 * price.read()
            + self.output as f64 * price.output;
        full * 1e-6 * if self.batch { price.batch } else { 1.0 }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::judge::providers::anthropic::{PROTOCOL, quote};

    #[test]
    fn every_shipped_price_is_whole_and_of_a_day() {
        let shipped = Prices::parse(include_str!("providers/anthropic/prices.json")).unwrap();
        assert_eq!(shipped.faults(), []);
        assert_eq!(shipped.date.len(), 10);
        for (model, price) in &shipped.models {
            // According to the API's documentation, for every model: writing costs a quarter more, reading a tenth or
            // less.
            assert_eq!(price.write(), 1.25 * price.input, "{model}");
            assert!(price.read() <= 0.1 * price.input + 1e-12, "{model}");
            assert_eq!((price.output, price.batch), (5.0 * price.input, 0.5), "{model}");
            assert!(price.minimum_prefix.is_none_or(|n| (512..=4096).contains(&n)), "{model}");
        }
    }

    #[test]
    fn the_pipelines_price_goes_before_the_shipped_one_and_a_date_at_the_end_does_not_matter() {
        let own = |model: &str| -> Prices {
            let price = json!({ "input": 1, "output": 2, "cache_write": 3, "cache_read": 4 });
            serde_json::from_value(json!({ "date": "2027-01-01", "models": { model: price } })).unwrap()
        };
        let haiku = quote("claude-haiku-4-5-20251001", None).unwrap().unwrap();
        assert_eq!(haiku.price.input, 1.0);
        assert!(haiku.from.starts_with("prices of 20"), "{}", haiku.from);
        let mine = quote("claude-haiku-4-5-20251001", Some(&own("claude-haiku-4-5"))).unwrap().unwrap();
        assert_eq!((mine.price.output, mine.from.as_str()), (2.0, "the pipeline file's prices of 2027-01-01"));
        assert_eq!(quote("claude-haiku-4-5", Some(&own("other"))).unwrap(), quote("claude-haiku-4-5", None).unwrap());
        assert_eq!(quote("no-such-model", None).unwrap(), None);
        assert_eq!(quote("claude-haiku-4-5-latest", None).unwrap(), None);
    }

    #[test]
    fn what_was_used_costs_by_kind_of_token_and_half_in_a_batch() {
        let message = json!({ "usage": { "input_tokens": 1000, "cache_creation_input_tokens": 2000, "cache_read_input_tokens": 4000, "output_tokens": 500 } });
        let usage = (PROTOCOL.usage)(&message);
        let price = quote("claude-sonnet-4-6", None).unwrap().unwrap().price;
        let dollars = (1000.0 * 3.0 + 2000.0 * 3.75 + 4000.0 * 0.3 + 500.0 * 15.0) / 1e6;
        assert!((usage.dollars(&price) - dollars).abs() < 1e-12);
        assert!((Usage { batch: true, ..usage }.dollars(&price) - dollars / 2.0).abs() < 1e-12);
        // An hour costs twice the input price, unless the table says otherwise.
        let mut kept = message;
        kept["usage"]["cache_creation"] =
            json!({ "ephemeral_5m_input_tokens": 500, "ephemeral_1h_input_tokens": 1500 });
        let kept = (PROTOCOL.usage)(&kept);
        assert_eq!((kept.cache_written, kept.cache_written_hour, kept.sent()), (500, 1500, usage.sent()));
        assert!((kept.dollars(&price) - dollars - 1500.0 * (6.0 - 3.75) / 1e6).abs() < 1e-12);
        let dearer = Price { cache_write_hour: Some(7.0), ..price };
        assert!((kept.dollars(&dearer) - kept.dollars(&price) - 1500.0 / 1e6).abs() < 1e-12);
        let there = usage.asked_in(true);
        assert_eq!((there.cache_written, there.cache_written_hour, there.batch), (0, 2000, true));
        assert_eq!(there.asked_in(false), usage);
        let odd = json!({ "usage": { "cache_creation_input_tokens": 1, "cache_creation": { "ephemeral_1h_input_tokens": 5 } } });
        assert_eq!(((PROTOCOL.usage)(&odd).cache_written, (PROTOCOL.usage)(&odd).cache_written_hour), (0, 5));
        assert_eq!(
            (PROTOCOL.usage)(&json!({ "usage": { "input_tokens": -1, "output_tokens": u64::MAX } })),
            Usage::default()
        );
    }

    #[test]
    fn a_price_that_is_none_is_told_by_its_place() {
        let table =
            json!({ "date": " ", "models": { "m": { "input": -1, "output": 2, "cache_write": 3, "cache_read": 4 } } });
        let table: Prices = serde_json::from_value(table).unwrap();
        let places: Vec<String> = table.faults().into_iter().map(|(place, _)| place).collect();
        assert_eq!(places, ["date", "models.m.input"]);
    }
}
