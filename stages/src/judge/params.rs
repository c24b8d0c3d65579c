//! The parameters of `annotate.claude` and their validation.

use engine::error::Result;
use engine::external::InputPath;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use super::prices::{self, Prices, Quote};
use super::template::{self, Template};
use crate::types::Outcome;

/// How the model is made to choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Choice {
    /// A JSON schema of the answer (`output_config.format`).
    #[default]
    Schema,
    /// A tool that the model must call.
    Tool,
    /// A prefilled start of the answer, as in the paper; newer models refuse it.
    Prefill,
}

/// Whether the model thinks before it answers. Thinking counts towards `max_tokens`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Thinking {
    /// Sends no setting: the model's own default.
    #[default]
    Model,
    /// No thinking. Models that always think refuse this.
    Disabled,
    /// As much as the model decides, guided by `effort`.
    Adaptive,
    /// At most this many tokens, 1024 or more; for models without adaptive thinking.
    Budget(u32),
}

/// The effort that the model should make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Effort {
    Low,
    Medium,
    High,
    Xhigh,
    Max,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Params {
    /// The model's id at the API. There is no default, because it determines cost and quality.
    pub model: String,
    /// Pairs per request. In the paper: 2.
    #[serde(default = "two")]
    pub documents_per_request: usize,
    /// A file with a request template instead of the built-in one. The part from `{{#document}}` to `{{/document}}` is
    /// repeated for each pair, with `{{n}}`, `{{summary.1}}`, `{{summary.2}}` and `{{prompt}}`, or `{{subreddit}}`,
    /// `{{title}}` and `{{post}}`; each of these texts except `{{n}}` must be enclosed in tags.
    #[serde(default)]
    pub template: Option<InputPath>,
    /// A file with worked examples instead of the two built-in ones: lines of
    /// `{"prompt": "…", "summaries": ["…", "…"], "better": 1}`.
    #[serde(default)]
    pub examples: Option<InputPath>,
    /// `schema`, `tool` or `prefill`.
    #[serde(default)]
    pub choice: Choice,
    /// Maximum tokens of an answer, including thinking.
    #[serde(default = "answer_tokens")]
    pub max_tokens: u32,
    /// `model`, `disabled`, `adaptive` or `{budget: TOKENS}`.
    #[serde(default)]
    pub thinking: Thinking,
    /// `low` to `max`; sent only if given.
    #[serde(default)]
    pub effort: Option<Effort>,
    /// Reservation only if given, as are `top_p` and `top_k`: newer models refuse them.
    #[serde(default)]
    pub temperature: Option<f64>,
    #[serde(default)]
    pub top_p: Option<f64>,
    #[serde(default)]
    pub top_k: Option<u32>,
    /// Whether an answer is valid only next to the same other pairs in the same order. Then adding or removing one pair
    /// causes many answers to be asked again.
    #[serde(default)]
    pub strict_partner: bool,
    /// The fraction of pairs that are also asked with the summaries in the other order.
    #[serde(default = "some")]
    pub swap_share: f64,
    /// The fraction of pairs that are asked twice.
    #[serde(default = "fewer")]
    pub repeat_share: f64,
    /// Outcomes after which a pair is asked again: any of `refused`, `truncated`, `unparsable`, `failed`. The last
    /// answer counts.
    #[serde(default)]
    pub retry: Retry,
    /// Maximum number of times that a pair is asked again.
    #[serde(default = "once")]
    pub retries: u32,
    /// Maximum fraction of pairs without a label (refused, truncated, unparsable or failed).
    #[serde(default = "some")]
    pub max_unlabelled: f64,
    /// `single`, or `batch` for half the price and an hour to a day of waiting. Like all parameters below, not part of
    /// the key.
    #[serde(default)]
    pub mode: Mode,
    /// Maximum cost in dollars over all attempts until the stage succeeds; the stage stops before it is exceeded.
    #[serde(default)]
    pub max_cost: Option<f64>,
    /// Maximum requests of one attempt. A pilot of 20 lets `plan` estimate the cost of thinking.
    #[serde(default)]
    pub max_requests: Option<u64>,
    /// Prices that override the built-in ones: `{date, source, models: {ID: {input, output, cache_write,
    /// cache_write_hour, cache_read, batch, minimum_prefix}}}`, in dollars per million tokens.
    #[serde(default)]
    pub prices: Option<Prices>,
}

/// Parameters that affect no label and so are not part of the key.
pub const BESIDE_KEY: [&str; 4] = ["mode", "max_cost", "max_requests", "prices"];

/// How requests are sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Single requests, several at a time.
    #[default]
    Single,
    /// Message Batches.
    Batch,
}

fn two() -> usize {
    2
}

fn answer_tokens() -> u32 {
    1024
}

fn some() -> f64 {
    0.05
}

fn fewer() -> f64 {
    0.02
}

fn once() -> u32 {
    1
}

/// One outcome or a list of them; sorted, so that equal sets have equal keys.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(transparent)]
pub struct Retry(pub Vec<Outcome>);

impl<'de> Deserialize<'de> for Retry {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected `refused`, `truncated`, `unparsable`, `failed` or a list of these")]
        enum Either {
            Many(Vec<Outcome>),
            One(Outcome),
        }
        let mut outcomes = match Either::deserialize(d)? {
            Either::Many(outcomes) => outcomes,
            Either::One(outcome) => vec![outcome],
        };
        outcomes.sort_unstable();
        outcomes.dedup();
        Ok(Self(outcomes))
    }
}

impl JsonSchema for Retry {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "Retry".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let outcome = generator.subschema_for::<Outcome>();
        schemars::json_schema!({ "anyOf": [outcome, { "type": "array", "items": outcome }] })
    }
}

impl Params {
    /// Faults beyond the types, each as (field, message).
    pub fn faults(&self) -> Vec<(String, String)> {
        let mut faults = Vec::new();
        let mut fault = |wrong: bool, field: &str, what: &str| {
            if wrong {
                faults.push((field.to_owned(), what.to_owned()));
            }
        };
        let share = |x: f64| (0.0..=1.0).contains(&x);
        fault(self.model.trim().is_empty(), "model", "expected the id of a model");
        fault(!(1..=20).contains(&self.documents_per_request), "documents_per_request", "expected 1 to 20");
        fault(self.max_tokens == 0, "max_tokens", "expected at least 1");
        for (field, value) in [
            ("swap_share", self.swap_share),
            ("repeat_share", self.repeat_share),
            ("max_unlabelled", self.max_unlabelled),
        ] {
            fault(!share(value), field, "expected 0 to 1");
        }
        fault(!self.temperature.is_none_or(share), "temperature", "expected 0 to 1");
        fault(!self.top_p.is_none_or(share), "top_p", "expected 0 to 1");
        fault(self.top_k == Some(0), "top_k", "expected at least 1");
        let labels = self.retry.0.iter().any(|outcome| matches!(outcome, Outcome::Labelled | Outcome::Tie));
        fault(
            labels,
            "retry",
            "expected `refused`, `truncated`, `unparsable` or `failed`: a label is not asked for again",
        );
        fault(!(1..=10).contains(&self.retries), "retries", "expected 1 to 10");

        if let Thinking::Budget(tokens) = self.thinking {
            fault(tokens < 1024, "thinking", "expected a budget of at least 1024 tokens");
            fault(tokens >= self.max_tokens, "thinking", "the budget counts towards max_tokens, which must be greater");
        }
        if matches!(self.thinking, Thinking::Adaptive | Thinking::Budget(_)) {
            let with = |what: &str| format!("the API takes no {what} from a model that thinks: leave `thinking` out");
            fault(self.choice == Choice::Prefill, "choice", &with("beginning of an answer"));
            fault(self.choice == Choice::Tool, "choice", &with("forced tool"));
            fault(self.temperature.is_some_and(|t| t != 1.0), "temperature", &with("temperature but 1"));
            fault(self.top_k.is_some(), "top_k", &with("top_k"));
            fault(self.top_p.is_some_and(|p| p < 0.95), "top_p", &with("top_p below 0.95"));
        }
        faults.extend(self.money_faults());
        faults
    }

    /// The price of the model's tokens.
    ///
    /// # Errors
    /// If the built-in price table is invalid (an internal error).
    pub fn quote(&self) -> Result<Option<Quote>> {
        prices::quote(&self.model, self.prices.as_ref())
    }

    fn money_faults(&self) -> Vec<(String, String)> {
        let mut faults: Vec<(String, String)> = Vec::new();
        if self.max_cost.is_some_and(|most| !(most > 0.0 && most.is_finite())) {
            faults.push(("max_cost".to_owned(), "expected dollars, more than 0".to_owned()));
        }
        if self.max_requests == Some(0) {
            faults.push(("max_requests".to_owned(), "expected at least 1".to_owned()));
        }
        let of_prices = self.prices.iter().flat_map(Prices::faults);
        faults.extend(of_prices.map(|(place, what)| (format!("prices.{place}"), what)));
        if self.max_cost.is_some() && matches!(self.quote(), Ok(None)) {
            let what = format!("no price of `{}` is known to hold it against: give one in `prices`", self.model);
            faults.push(("max_cost".to_owned(), what));
        }
        faults
    }

    /// Faults in the files named by the parameters; missing files are reported elsewhere.
    pub fn file_faults(&self) -> Vec<(String, String)> {
        let mut faults = Vec::new();
        let mut check = |field: &str, file: &Option<InputPath>, parse: &dyn Fn(&str) -> Vec<String>| {
            let Some(InputPath(path)) = file.as_ref().filter(|file| file.0.exists()) else { return };
            let found = match engine::text::read(path) {
                Ok(text) => parse(&text),
                Err(e) => vec![e.to_string()],
            };
            faults.extend(found.into_iter().map(|what| (field.to_owned(), format!("{}: {what}", path.display()))));
        };
        check("template", &self.template, &|text| Template::parse(text).err().unwrap_or_default());
        check("examples", &self.examples, &|text| template::examples(text).err().unwrap_or_default());
        faults
    }
}

#[cfg(test)]
mod tests {
    use engine::kind::AnyKind;
    use serde_json::{Value, json};

    fn faults(mut with: Value) -> Vec<String> {
        with["model"] = json!("m");
        let found = (&crate::kinds::annotate::Claude as &dyn AnyKind).normalise(&with).err().unwrap_or_default();
        found.into_iter().map(|(field, _)| field).collect()
    }

    #[test]
    fn what_the_api_would_refuse_is_told_before_anything_is_paid() {
        let none: [&str; 0] = [];
        assert_eq!(faults(json!({})), none);
        assert_eq!(faults(json!({ "thinking": "adaptive", "effort": "low", "temperature": 1 })), none);
        assert_eq!(faults(json!({ "thinking": "adaptive", "choice": "prefill" })), ["choice"]);
        assert_eq!(faults(json!({ "thinking": { "budget": 2048 }, "choice": "tool", "max_tokens": 4096 })), ["choice"]);
        assert_eq!(faults(json!({ "thinking": "disabled", "choice": "tool", "temperature": 0 })), none);
        assert_eq!(faults(json!({ "thinking": { "budget": 2048 } })), ["thinking"]);
        assert_eq!(
            faults(json!({ "thinking": { "budget": 100 }, "temperature": 0, "top_k": 0, "top_p": 0.5 })),
            ["top_k", "thinking", "temperature", "top_k", "top_p"]
        );
        assert_eq!(
            faults(json!({ "swap_share": 1.5, "repeat_share": -1, "retries": 0 })),
            ["swap_share", "repeat_share", "retries"]
        );
        assert_eq!(faults(json!({ "retry": "labelled" })), ["retry"]);
        assert_eq!(faults(json!({ "retry": "everything" })), ["retry"]);
    }

    #[test]
    fn a_word_and_a_list_of_it_have_one_key() {
        let normal = |retry: Value| {
            (&crate::kinds::annotate::Claude as &dyn AnyKind)
                .normalise(&json!({ "model": "m", "retry": retry }))
                .unwrap()["retry"]
                .clone()
        };
        assert_eq!(normal(json!("failed")), normal(json!(["failed"])));
        assert_eq!(normal(json!(["failed", "refused", "failed"])), json!(["refused", "failed"]));
    }

    #[test]
    fn files_are_checked_before_anything_runs() {
        let folder = tempfile::tempdir().unwrap();
        let file = |name: &str, text: &str| {
            let path = folder.path().join(name);
            std::fs::write(&path, text).unwrap();
            path
        };
        let with = json!({ "model": "m", "template": file("t", "{{#document}}<a>{{post}}</a>{{/document}}"),
                           "examples": file("e", "{\"prompt\": \"p\"}") });
        let kind: &dyn AnyKind = &crate::kinds::annotate::Claude;
        let found = kind.check_files(&kind.normalise(&with).unwrap()).unwrap();
        let fields: Vec<&str> = found.iter().map(|(field, _)| field.as_str()).collect();
        assert_eq!(fields, ["template", "template", "template", "examples"], "{found:?}");
        assert!(found[0].1.contains("{{n}}") && found[3].1.contains("line 1"), "{found:?}");
        let missing = json!({ "model": "m", "template": folder.path().join("none") });
        assert!(kind.check_files(&kind.normalise(&missing).unwrap()).unwrap().is_empty());
    }
}
