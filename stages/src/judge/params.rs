//! The parameters that all judges share, and their validation.

use engine::external::InputPath;
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use super::instructions::{self, Criterion};
use super::prices::{Prices, Quote};
use super::template::{Template, examples as parse_examples};
use crate::types::Outcome;

/// Parameters that affect no label and so are not part of the key.
pub const EXCLUDED_FROM_KEY: [&str; 3] = ["max_cost", "max_requests", "prices"];

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

/// The parameters of a kind that all judges have, by name; see [`shared!`](super::shared).
#[derive(Clone, Debug)]
pub struct Shared {
    pub model: String,
    pub documents_per_request: usize,
    pub template: Option<InputPath>,
    pub examples: Option<InputPath>,
    pub rubric: Option<String>,
    pub questions: Vec<Criterion>,
    pub max_tokens: u32,
    pub strict_partner: bool,
    pub swap_share: f64,
    pub repeat_share: f64,
    pub retry: Retry,
    pub retries: u32,
    pub max_unlabelled: f64,
    pub mode: Mode,
    pub max_cost: Option<f64>,
    pub max_requests: Option<u64>,
    pub prices: Option<Prices>,
}

/// Declares the parameters of a judge behind an API: its own, those that all have, and its own that are not part of the key.
/// Flattening a struct instead is ruled out by `deny_unknown_fields`.
macro_rules! judge_params {
    ({ $($own:tt)* } excluded_from_key { $($excluded:tt)* }) => {
        #[derive(Clone, Debug, serde::Serialize, serde::Deserialize, schemars::JsonSchema)]
        #[serde(deny_unknown_fields)]
        pub struct Params {
            $($own)*
            /// A file with a request template instead of the built-in one. The part from `{{#document}}` to
            /// `{{/document}}` is repeated for each pair, with `{{n}}`, `{{summary.1}}`, `{{summary.2}}` and `{{prompt}}`,
            /// or `{{subreddit}}`, `{{title}}` and `{{post}}`; each of these texts except `{{n}}` must be enclosed in tags.
            #[serde(default)]
            pub template: Option<engine::external::InputPath>,
            /// A file with worked examples instead of the two built-in ones: lines of
            /// `{"prompt": "…", "summaries": ["…", "…"], "better": 1}`.
            #[serde(default)]
            pub examples: Option<engine::external::InputPath>,
            /// What counts in a good summary: a text that follows the template's instructions.
            #[serde(default, skip_serializing_if = "Option::is_none")]
            pub rubric: Option<String>,
            /// Several questions about each pair instead of one: `[{name, text, weight}]`. The label is their weighted
            /// vote; the single answers are in `aspects.parquet`.
            #[serde(default, skip_serializing_if = "Vec::is_empty")]
            pub questions: Vec<$crate::judge::instructions::Criterion>,
            /// The fraction of pairs that are also asked with the summaries in the other order.
            #[serde(default = "crate::judge::params::defaults::swap_share")]
            pub swap_share: f64,
            /// The fraction of pairs that are asked twice.
            #[serde(default = "crate::judge::params::defaults::repeat_share")]
            pub repeat_share: f64,
            /// Outcomes after which a pair is asked again: any of `refused`, `truncated`, `unparsable`, `failed`. The last
            /// answer counts.
            #[serde(default)]
            pub retry: $crate::judge::params::Retry,
            /// Maximum number of times that a pair is asked again.
            #[serde(default = "crate::judge::params::defaults::retries")]
            pub retries: u32,
            /// Maximum fraction of pairs without a label (refused, truncated, unparsable or failed).
            #[serde(default = "crate::judge::params::defaults::max_unlabelled")]
            pub max_unlabelled: f64,
            $($excluded)*
            /// Maximum cost in dollars over all attempts until the stage succeeds; the stage stops before it is exceeded.
            /// Needs a price. Like `max_requests` and `prices`, not part of the key.
            #[serde(default)]
            pub max_cost: Option<f64>,
            /// Maximum requests of one attempt. A pilot of 20 lets `plan` estimate the cost of thinking.
            #[serde(default)]
            pub max_requests: Option<u64>,
        }
    };
}
pub(crate) use judge_params;

/// The [`Shared`] parameters of a kind's parameters `$p`.
macro_rules! shared {
    ($p:expr, strict_partner: $strict:expr, mode: $mode:expr) => {
        $crate::judge::params::Shared {
            model: $p.model.clone(),
            documents_per_request: $p.documents_per_request,
            template: $p.template.clone(),
            examples: $p.examples.clone(),
            rubric: $p.rubric.clone(),
            questions: $p.questions.clone(),
            max_tokens: $p.max_tokens,
            strict_partner: $strict,
            swap_share: $p.swap_share,
            repeat_share: $p.repeat_share,
            retry: $p.retry.clone(),
            retries: $p.retries,
            max_unlabelled: $p.max_unlabelled,
            mode: $mode,
            max_cost: $p.max_cost,
            max_requests: $p.max_requests,
            prices: $p.prices.clone(),
        }
    };
}
pub(crate) use shared;

/// The defaults that all judges share, for serde.
pub mod defaults {
    pub fn swap_share() -> f64 {
        0.05
    }

    pub fn repeat_share() -> f64 {
        0.02
    }

    pub fn retries() -> u32 {
        1
    }

    pub fn max_unlabelled() -> f64 {
        0.05
    }
}

/// Whether `x` is in [0, 1].
pub fn is_share(x: f64) -> bool {
    (0.0..=1.0).contains(&x)
}

impl Shared {
    /// Faults beyond the types, each as (field, message).
    pub fn faults(&self) -> Vec<(String, String)> {
        let mut faults = Vec::new();
        let mut fault = |wrong: bool, field: &str, what: &str| {
            if wrong {
                faults.push((field.to_owned(), what.to_owned()));
            }
        };
        fault(self.model.trim().is_empty(), "model", "expected the id of a model");
        fault(!(1..=20).contains(&self.documents_per_request), "documents_per_request", "expected 1 to 20");
        fault(self.max_tokens == 0, "max_tokens", "expected at least 1");
        for (field, value) in [
            ("swap_share", self.swap_share),
            ("repeat_share", self.repeat_share),
            ("max_unlabelled", self.max_unlabelled),
        ] {
            fault(!is_share(value), field, "expected 0 to 1");
        }
        let labels = self.retry.0.iter().any(|outcome| matches!(outcome, Outcome::Labelled | Outcome::Tie));
        fault(
            labels,
            "retry",
            "expected `refused`, `truncated`, `unparsable` or `failed`: a label is not asked for again",
        );
        fault(!(1..=10).contains(&self.retries), "retries", "expected 1 to 10");
        faults.extend(instructions::faults(&self.questions));
        faults
    }

    /// Faults of the limits and prices, given the price of the model.
    pub fn money_faults(&self, quote: Option<&Quote>) -> Vec<(String, String)> {
        let mut faults: Vec<(String, String)> = Vec::new();
        if self.max_cost.is_some_and(|most| !(most > 0.0 && most.is_finite())) {
            faults.push(("max_cost".to_owned(), "expected dollars, more than 0".to_owned()));
        }
        if self.max_requests == Some(0) {
            faults.push(("max_requests".to_owned(), "expected at least 1".to_owned()));
        }
        let of_prices = self.prices.iter().flat_map(Prices::faults);
        faults.extend(of_prices.map(|(place, what)| (format!("prices.{place}"), what)));
        if self.max_cost.is_some() && quote.is_none() {
            let what = format!("no price of `{}` is known to hold it against: give one in `prices`", self.model);
            faults.push(("max_cost".to_owned(), what));
        }
        faults
    }

    /// As [`file_faults`].
    pub fn file_faults(&self) -> Vec<(String, String)> {
        file_faults(self.template.as_ref(), self.examples.as_ref(), &self.questions)
    }
}

/// Faults in the files named by the parameters; missing files are reported elsewhere.
pub fn file_faults(
    template: Option<&InputPath>,
    examples: Option<&InputPath>,
    questions: &[Criterion],
) -> Vec<(String, String)> {
    let mut faults = Vec::new();
    let mut check = |field: &str, file: Option<&InputPath>, parse: &dyn Fn(&str) -> Vec<String>| {
        let Some(InputPath(path)) = file.filter(|file| file.0.exists()) else { return };
        let found = match engine::text::read(path) {
            Ok(text) => parse(&text),
            Err(e) => vec![e.to_string()],
        };
        faults.extend(found.into_iter().map(|what| (field.to_owned(), format!("{}: {what}", path.display()))));
    };
    check("template", template, &|text| Template::parse(text).err().unwrap_or_default());
    let is_asked = |name: &&String| questions.iter().any(|question| question.name == **name);
    check("examples", examples, &|text| match parse_examples(text) {
        Err(faults) => faults,
        Ok(examples) => {
            let unknown = examples.iter().flat_map(|example| example.answers.keys()).find(|name| !is_asked(name));
            Vec::from_iter(unknown.map(|name| format!("`answers` names `{name}`, which is none of `questions`")))
        }
    });
    faults
}
