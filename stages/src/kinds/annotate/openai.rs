//! `annotate.openai`: a language model behind any OpenAI-compatible endpoint labels pairs.

use std::collections::BTreeMap;
use std::sync::Arc;

use engine::context::Context;
use engine::error::Result;
use engine::estimate::Estimate;
use engine::kind::{Kind, Signature};
use serde_json::Value;

use crate::judge;
use crate::judge::params::{Mode, Shared, judge_params, shared};
use crate::judge::prices::{Prices, Quote};
use crate::judge::provider::Provider;
use crate::judge::providers::openai::{MaxTokensField, OWN_FIELDS, OpenAi, ResponseFormat, VerdictSource};
use crate::judge::settings::Settings;
use crate::train::params::{or_none, or_none_schema};

pub struct Openai;

judge_params! {
    {
        /// The address before `/chat/completions`, such as `http://localhost:8000/v1`.
        pub base_url: String,
        /// The model's id at the endpoint.
        pub model: String,
        /// Pairs per request.
        #[serde(default = "one")]
        pub documents_per_request: usize,
        /// `json_schema`: the server forces the form of the answer. `none`: the answer is read as text.
        #[serde(default)]
        pub response_format: ResponseFormat,
        /// `text`, or `logprobs`: the label is the more probable of `1` and `2`, and `confidence` its probability.
        #[serde(default)]
        pub verdict: VerdictSource,
        /// Maximum tokens of an answer, including thinking.
        #[serde(default = "answer_tokens")]
        pub max_tokens: u32,
        /// Sampling temperature; `none`: not sent, for models that refuse it.
        #[serde(default = "greedy", deserialize_with = "or_none")]
        #[schemars(schema_with = "or_none_schema::<f64>")]
        pub temperature: Option<f64>,
        /// More fields of the request's body, such as `{seed: 1, chat_template_kwargs: {enable_thinking: false}}`.
        #[serde(default)]
        pub extra_body: BTreeMap<String, Value>,
    }
    excluded_from_key {
        /// The environment variable that holds the endpoint's key, such as `OPENAI_API_KEY`, or with `_FILE` after it names
        /// a file that does. Absent: no key is sent. Not part of the stage's key.
        #[serde(default)]
        pub key_variable: Option<String>,
        /// The field that carries `max_tokens`: `max_tokens` or `max_completion_tokens`. Not part of the stage's key.
        #[serde(default)]
        pub max_tokens_field: MaxTokensField,
        /// Prices in dollars per million tokens: `{date, source, models: {ID: {input, output, cache_read}}}`. A model
        /// without a price counts as free.
        #[serde(default)]
        pub prices: Option<Prices>,
    }
}

fn one() -> usize {
    1
}

fn answer_tokens() -> u32 {
    1024
}

fn greedy() -> Option<f64> {
    Some(0.0)
}

impl Params {
    fn shared(&self) -> Shared {
        shared!(self, strict_partner: false, mode: Mode::Single)
    }

    /// The price that the pipeline file names.
    fn quote(&self) -> Option<Quote> {
        self.prices.as_ref()?.quote(&self.model, "the pipeline file's prices")
    }

    fn provider(&self) -> OpenAi {
        OpenAi {
            base_url: self.base_url.clone(),
            key_variable: self.key_variable.clone(),
            response_format: self.response_format,
            max_tokens_field: self.max_tokens_field,
            temperature: self.temperature,
            extra_body: self.extra_body.clone(),
            verdict: self.verdict,
        }
    }

    /// # Errors
    /// As [`Settings::load`].
    pub fn settings(&self) -> Result<Settings> {
        let quote = self.quote().unwrap_or_else(Quote::free);
        Settings::load(self.shared(), Some(quote), Arc::new(self.provider()))
    }

    /// Faults beyond the types, each as (field, message).
    fn faults(&self) -> Vec<(String, String)> {
        let mut faults = self.shared().faults();
        let mut fault = |wrong: bool, field: &str, what: String| {
            if wrong {
                faults.push((field.to_owned(), what));
            }
        };
        if let Err(error) = self.provider().endpoint_with(None) {
            fault(true, "base_url", [&error.message, error.help.as_deref().unwrap_or_default()].join("; "));
        }
        // An address is part of recipes and reports, which hold no secrets.
        let holds_more = self.base_url.contains(['@', '?', '#']);
        fault(holds_more, "base_url", "expected an address without user, password and query".to_owned());
        let is_name = |name: &String| {
            let starts = name.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_');
            starts && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_')
        };
        let what = "expected the name of an environment variable, not the key".to_owned();
        fault(!self.key_variable.as_ref().is_none_or(is_name), "key_variable", what);
        let in_range = self.temperature.is_none_or(|t| (0.0..=2.0).contains(&t));
        fault(!in_range, "temperature", "expected 0 to 2, or `none`".to_owned());
        for name in OWN_FIELDS.iter().filter(|name| self.extra_body.contains_key(**name)) {
            fault(
                true,
                &format!("extra_body.{name}"),
                "other parameters determine this field, or it has to stay out".to_owned(),
            );
        }
        let alone = self.verdict == VerdictSource::Text || self.documents_per_request == 1;
        fault(!alone, "documents_per_request", "expected 1 with `verdict: logprobs`".to_owned());
        faults.extend(self.shared().money_faults(self.quote().as_ref()));
        faults
    }
}

impl Kind for Openai {
    type Params = Params;

    const NAME: &'static str = "annotate.openai";
    const VERSION: u32 = 1;
    const ABOUT: &'static str = "judges pairs by a language model behind an OpenAI-compatible endpoint";

    fn signature(&self, params: &Params) -> Signature {
        judge::signature(&[], params.key_variable.as_deref(), &["key_variable", "max_tokens_field"])
    }

    fn check(&self, params: &Params) -> Vec<(String, String)> {
        params.faults()
    }

    fn check_files(&self, params: &Params) -> Vec<(String, String)> {
        params.shared().file_faults()
    }

    fn check_environment(&self, params: &Params) -> Result<()> {
        params.provider().endpoint().map(drop)
    }

    fn estimate(&self, params: &Params, ctx: &Context) -> Result<Option<Estimate>> {
        judge::estimate(&params.settings()?, ctx).map(Some)
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        judge::run(&params.settings()?, ctx)
    }
}

#[cfg(test)]
mod tests {
    use engine::kind::AnyKind;
    use serde_json::{Value, json};

    use super::Openai;

    fn faults(with: Value) -> Vec<String> {
        let mut all = json!({ "base_url": "http://localhost:8000/v1", "model": "m" });
        all.as_object_mut().unwrap().extend(with.as_object().unwrap().clone());
        let found = (&Openai as &dyn AnyKind).normalise(&all).err().unwrap_or_default();
        found.into_iter().map(|(field, _)| field).collect()
    }

    #[test]
    fn what_cannot_work_is_told_before_anything_is_asked() {
        for (with, fields) in [
            (json!({}), &[][..]),
            (json!({ "temperature": "none", "key_variable": "OPENAI_API_KEY", "verdict": "logprobs" }), &[]),
            (json!({ "base_url": "localhost:8000" }), &["base_url"]),
            (json!({ "base_url": "http://me:secret@localhost/v1" }), &["base_url"]),
            (json!({ "base_url": "http://localhost/v1?key=secret" }), &["base_url"]),
            (json!({ "key_variable": "sk-0123456789" }), &["key_variable"]),
            (json!({ "temperature": 3 }), &["temperature"]),
            (json!({ "extra_body": { "seed": 1, "stream": true, "n": 2 } }), &["extra_body.stream", "extra_body.n"]),
            (json!({ "verdict": "logprobs", "documents_per_request": 2 }), &["documents_per_request"]),
            (json!({ "max_cost": 1 }), &["max_cost"]),
        ] {
            assert_eq!(faults(with.clone()), fields, "{with}");
        }
        let prices = json!({ "date": "2027-01-01", "models": { "m": { "input": 1, "output": 2 } } });
        assert_eq!(faults(json!({ "max_cost": 1, "prices": prices })), [""; 0]);
    }
}
