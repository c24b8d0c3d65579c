//! `annotate.claude`: a language model behind Anthropic's Messages API labels pairs.

use std::sync::Arc;

use engine::context::Context;
use engine::error::Result;
use engine::estimate::Estimate;
use engine::kind::{Kind, Signature};

use crate::judge::params::{Mode, Shared, is_share, judge_params, shared};
use crate::judge::prices::{Prices, Quote};
use crate::judge::provider::Provider;
use crate::judge::providers::anthropic::{self, Anthropic, Choice, Effort, Thinking};
use crate::judge::settings::Settings;
use crate::judge::{self, batch};

pub struct Claude;

judge_params! {
    {
        /// The model's id at the API. There is no default, because it determines cost and quality.
        pub model: String,
        /// Pairs per request. In the paper: 2.
        #[serde(default = "two")]
        pub documents_per_request: usize,
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
        /// Sent only if given, as are `top_p` and `top_k`: newer models refuse them.
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
    }
    excluded_from_key {
        /// `single`, or `batch` for half the price and an hour to a day of waiting. Not part of the key.
        #[serde(default)]
        pub mode: Mode,
        /// Prices that override the built-in ones: `{date, source, models: {ID: {input, output, cache_write,
        /// cache_write_hour, cache_read, batch, minimum_prefix}}}`, in dollars per million tokens.
        #[serde(default)]
        pub prices: Option<Prices>,
    }
}

fn two() -> usize {
    2
}

fn answer_tokens() -> u32 {
    1024
}

impl Params {
    fn shared(&self) -> Shared {
        shared!(self, strict_partner: self.strict_partner, mode: self.mode)
    }

    /// The price of the model's tokens.
    ///
    /// # Errors
    /// If the built-in price table is invalid (an internal error).
    pub fn quote(&self) -> Result<Option<Quote>> {
        anthropic::quote(&self.model, self.prices.as_ref())
    }

    fn provider(&self) -> Anthropic {
        let Self { choice, thinking, effort, temperature, top_p, top_k, .. } = *self;
        Anthropic { choice, thinking, effort, temperature, top_p, top_k }
    }

    /// # Errors
    /// As [`Settings::load`].
    pub fn settings(&self) -> Result<Settings> {
        Settings::load(self.shared(), self.quote()?, Arc::new(self.provider()))
    }

    /// Faults beyond the types, each as (field, message).
    fn faults(&self) -> Vec<(String, String)> {
        let mut faults = self.shared().faults();
        let mut fault = |wrong: bool, field: &str, what: &str| {
            if wrong {
                faults.push((field.to_owned(), what.to_owned()));
            }
        };
        fault(!self.temperature.is_none_or(is_share), "temperature", "expected 0 to 1");
        fault(!self.top_p.is_none_or(is_share), "top_p", "expected 0 to 1");
        fault(self.top_k == Some(0), "top_k", "expected at least 1");
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
        // This API charges more than `input` for writing its cache, so a limit needs both prices.
        for (model, price) in self.prices.iter().flat_map(|prices| &prices.models) {
            for (name, dollars) in [("cache_write", price.cache_write), ("cache_read", price.cache_read)] {
                if dollars.is_none() {
                    faults.push((format!("prices.models.{model}.{name}"), "expected dollars".to_owned()));
                }
            }
        }
        faults.extend(self.shared().money_faults(self.quote().ok().flatten().as_ref()));
        faults
    }
}

impl Kind for Claude {
    type Params = Params;

    const NAME: &'static str = "annotate.claude";
    const VERSION: u32 = 3;
    const ABOUT: &'static str = "judges pairs by a language model behind the Messages API";

    fn signature(&self, _: &Params) -> Signature {
        let env = [anthropic::BASE_URL, batch::POLL, batch::GIVE_UP];
        judge::signature(&env, Some(anthropic::KEY), &["mode"])
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
    use engine::external::InputPath;
    use engine::kind::AnyKind;
    use serde_json::{Value, json};

    use super::Params;
    use crate::judge::template::{EXAMPLES, TEMPLATE};

    fn faults(mut with: Value) -> Vec<String> {
        with["model"] = json!("m");
        let found = (&super::Claude as &dyn AnyKind).normalise(&with).err().unwrap_or_default();
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
            (&super::Claude as &dyn AnyKind).normalise(&json!({ "model": "m", "retry": retry })).unwrap()["retry"]
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
        let kind: &dyn AnyKind = &super::Claude;
        let found = kind.check_files(&kind.normalise(&with).unwrap()).unwrap();
        let fields: Vec<&str> = found.iter().map(|(field, _)| field.as_str()).collect();
        assert_eq!(fields, ["template", "template", "template", "examples"], "{found:?}");
        assert!(found[0].1.contains("{{n}}") && found[3].1.contains("line 1"), "{found:?}");
        let missing = json!({ "model": "m", "template": folder.path().join("none") });
        assert!(kind.check_files(&kind.normalise(&missing).unwrap()).unwrap().is_empty());
    }

    #[test]
    fn a_byte_order_mark_in_a_file_changes_no_question() {
        let folder = tempfile::tempdir().unwrap();
        let fingerprint = |mark: &str| {
            let file = |name: &str, text: &str| {
                let path = folder.path().join(name);
                std::fs::write(&path, format!("{mark}{text}")).unwrap();
                Some(InputPath(path))
            };
            let mut params: Params = serde_json::from_value(json!({ "model": "m" })).unwrap();
            params.template = file("template.txt", TEMPLATE);
            params.examples = file("examples.jsonl", EXAMPLES);
            assert_eq!(params.shared().file_faults(), []);
            params.settings().unwrap().fingerprint()
        };
        assert_eq!(fingerprint("\u{feff}"), fingerprint(""));
    }
}
