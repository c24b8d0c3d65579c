//! Parameters shared by several kinds.

use std::borrow::Cow;
use std::marker::PhantomData;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::value::MapAccessDeserializer;
use serde::de::{IntoDeserializer, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use super::TrainPlan;

/// Rank, scale and dropout of a LoRA on every linear layer (PEFT's `all-linear`).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Lora {
    /// Rank of the update.
    pub r: usize,
    /// The update is scaled by alpha / r.
    pub alpha: f64,
    /// Dropout on the adapter's input while training.
    pub dropout: f64,
}

impl Default for Lora {
    fn default() -> Self {
        Self { r: 8, alpha: 32.0, dropout: 0.1 }
    }
}

impl Lora {
    pub fn config(&self) -> lm::LoraConfig {
        lm::LoraConfig { r: self.r, alpha: self.alpha, dropout: self.dropout }
    }
}

/// A LoRA, or `null` or `none` to train every weight.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Adapter(pub Option<Lora>);

impl Default for Adapter {
    fn default() -> Self {
        Self(Some(Lora::default()))
    }
}

impl Adapter {
    /// Values out of range, as (field, message).
    pub fn faults(&self) -> Vec<(String, String)> {
        let Some(lora) = &self.0 else { return Vec::new() };
        let mut faults = Faults::default();
        faults.must(lora.r > 0, "lora.r", "must be at least 1");
        faults.at_most(lora.r as u64, RANK, "lora.r");
        faults.must(lora.alpha > 0.0 && lora.alpha.is_finite(), "lora.alpha", "must be above 0");
        faults.must((0.0..1.0).contains(&lora.dropout), "lora.dropout", "must be in [0, 1)");
        faults.0
    }

    pub fn dropout(&self) -> f64 {
        self.0.as_ref().map_or(0.0, |lora| lora.dropout)
    }
}

impl<'de> Deserialize<'de> for Adapter {
    fn deserialize<D: Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        or_none(d).map(Self)
    }
}

/// A map or a number, or `null` or `none`. In a profile or a variant, null only removes an earlier value, so "no value"
/// needs the word `none`.
pub fn or_none<'de, D: Deserializer<'de>, T: Deserialize<'de>>(d: D) -> Result<Option<T>, D::Error> {
    struct Either<T>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>> Visitor<'de> for Either<T> {
        type Value = Option<T>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            f.write_str("a map or a number, or `none`")
        }

        fn visit_unit<E>(self) -> Result<Option<T>, E> {
            Ok(None)
        }

        fn visit_none<E>(self) -> Result<Option<T>, E> {
            Ok(None)
        }

        fn visit_str<E: serde::de::Error>(self, s: &str) -> Result<Option<T>, E> {
            if s == "none" {
                return Ok(None);
            }
            T::deserialize(s.into_deserializer()).map(Some).map_err(|e: E| E::custom(format!("{e}, or `none`")))
        }

        fn visit_u64<E: serde::de::Error>(self, n: u64) -> Result<Option<T>, E> {
            T::deserialize(n.into_deserializer()).map(Some)
        }

        fn visit_i64<E: serde::de::Error>(self, n: i64) -> Result<Option<T>, E> {
            T::deserialize(n.into_deserializer()).map(Some)
        }

        fn visit_f64<E: serde::de::Error>(self, x: f64) -> Result<Option<T>, E> {
            T::deserialize(x.into_deserializer()).map(Some)
        }

        fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Option<T>, A::Error> {
            T::deserialize(MapAccessDeserializer::new(map)).map(Some)
        }
    }
    d.deserialize_any(Either(PhantomData))
}

impl JsonSchema for Adapter {
    fn schema_name() -> Cow<'static, str> {
        "Adapter".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        or_none_schema::<Lora>(generator)
    }
}

/// Schema of the values that [`or_none`] reads.
pub fn or_none_schema<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    let value = generator.subschema_for::<T>();
    schemars::json_schema!({ "anyOf": [value, { "type": "null" }, { "const": "none" }] })
}

/// Number type of saved weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Weights {
    #[default]
    F32,
    F16,
}

/// Number type for products of activations with weights. Weights, optimiser state and everything else are f32.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    #[default]
    F32,
    /// Operands rounded to bf16, sums in f32. These products are about twice as fast on CPUs with AVX512-BF16 and
    /// slower on others.
    Bf16,
}

impl Precision {
    /// The model set to compute in this precision.
    pub fn of(self, model: &lm::CausalLm) -> lm::CausalLm {
        model.with_precision(match self {
            Self::F32 => lm::Precision::F32,
            Self::Bf16 => lm::Precision::Bf16,
        })
    }
}

/// Length of training: `steps`, or `epochs` over the data.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Length {
    pub epochs: Option<f64>,
    pub steps: Option<u64>,
}

impl Length {
    pub fn faults(&self) -> Vec<(String, String)> {
        let mut faults = Faults::default();
        faults.must(self.steps.is_none() || self.epochs.is_none(), "epochs", "give `epochs` or `steps`, not both");
        faults.must(self.epochs.is_none_or(|e| e > 0.0 && e.is_finite()), "epochs", "must be above 0");
        faults.must(self.epochs.is_none_or(|e| e <= 1e6), "epochs", "must be at most 1000000");
        faults.must(self.steps.is_none_or(|s| s > 0), "steps", "must be at least 1");
        faults.at_most(self.steps.unwrap_or(1), STEPS, "steps");
        faults.0
    }

    /// Number of steps if an epoch has `per_epoch`; one epoch by default. At least 1.
    pub fn steps(&self, per_epoch: u64) -> u64 {
        self.steps.unwrap_or_else(|| ((self.epochs.unwrap_or(1.0) * per_epoch as f64).round() as u64).max(1))
    }
}

/// Learning settings shared by every kind that trains on rows; each kind has its own defaults. Built by [`learning!`].
#[derive(Clone, Copy, Debug)]
pub struct Learning {
    pub epochs: Option<f64>,
    pub steps: Option<u64>,
    /// Rows per step.
    pub batch: usize,
    pub lr: f64,
    pub warmup: u64,
    pub beta1: f64,
    pub beta2: f64,
    pub weight_decay: f64,
    pub clip: Option<f64>,
}

/// Builds [`Learning`] from parameters that contain its fields. Flattening it instead is ruled out by
/// `deny_unknown_fields`.
macro_rules! learning {
    ($params:expr) => {
        $crate::train::Learning {
            epochs: $params.epochs,
            steps: $params.steps,
            batch: $params.batch,
            lr: $params.lr,
            warmup: $params.warmup,
            beta1: $params.beta1,
            beta2: $params.beta2,
            weight_decay: $params.weight_decay,
            clip: $params.clip,
        }
    };
}
pub(crate) use learning;

impl Learning {
    pub fn faults(&self) -> Faults {
        let mut faults = Faults(self.length().faults());
        faults.must(self.batch > 0, "batch", "must be at least 1");
        faults.at_most(self.batch as u64, BATCH, "batch");
        faults.at_most(self.warmup, STEPS, "warmup");
        faults.optimiser(self.lr, (self.beta1, self.beta2), self.weight_decay);
        faults.limit(self.clip, "clip");
        faults
    }

    /// A plan with warm-up and cosine decay to 0 if an epoch has `per_epoch` steps.
    pub fn plan(&self, per_epoch: u64) -> TrainPlan {
        TrainPlan {
            steps: self.length().steps(per_epoch),
            lr: self.lr,
            warmup: self.warmup,
            shape: lm::LrDecay::Cosine,
            betas: (self.beta1, self.beta2),
            weight_decay: self.weight_decay,
            clip: self.clip,
        }
    }

    fn length(&self) -> Length {
        Length { epochs: self.epochs, steps: self.steps }
    }
}

/// Most rows of a table; `STEPS`: most steps of an optimiser.
pub const ROWS: u64 = 1_000_000_000;
pub const STEPS: u64 = ROWS;
/// Most rows per batch, and most tokens per sequence.
pub const BATCH: u64 = 1_000_000;
/// Highest rank of a LoRA, and largest width of a model.
pub const RANK: u64 = 65_536;

/// Collects invalid parameters as (field, message).
#[derive(Default)]
pub struct Faults(pub Vec<(String, String)>);

impl Faults {
    pub fn must(&mut self, holds: bool, field: &str, message: &str) {
        if !holds {
            self.0.push((field.to_owned(), message.to_owned()));
        }
    }

    /// Limits a count that costs memory or time. A larger value is a typo, better reported at planning than hours
    /// later.
    pub fn at_most(&mut self, value: u64, most: u64, field: &str) {
        self.must(value <= most, field, &format!("must be at most {most}"));
    }

    /// A learning rate or clip: above 0 and finite.
    pub fn positive(&mut self, value: f64, field: &str) {
        self.must(value > 0.0 && value.is_finite(), field, "must be above 0");
    }

    pub fn share(&mut self, value: f64, field: &str) {
        self.must((0.0..1.0).contains(&value), field, "must be in [0, 1)");
    }

    /// A limit on the gradient norm; `None`: no limit.
    pub fn limit(&mut self, value: Option<f64>, field: &str) {
        self.must(value.is_none_or(|c| c > 0.0), field, "must be above 0, or `none`");
    }

    /// AdamW settings, under the names that all training kinds use.
    pub fn optimiser(&mut self, lr: f64, betas: (f64, f64), weight_decay: f64) {
        self.positive(lr, "lr");
        self.share(betas.0, "beta1");
        self.share(betas.1, "beta2");
        self.must(weight_decay >= 0.0 && weight_decay.is_finite(), "weight_decay", "must not be negative");
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn an_adapter_is_a_map_or_none() {
        let parse = |text: &str| serde_json::from_str::<Adapter>(text);
        assert_eq!(parse("null").ok(), Some(Adapter(None)));
        assert_eq!(parse("\"none\"").ok(), Some(Adapter(None)));
        let lora = parse("{\"r\": 4}").ok().and_then(|a| a.0);
        assert_eq!(lora, Some(Lora { r: 4, ..Lora::default() }));
        let error = parse("{\"rank\": 4}").unwrap_err().to_string();
        assert!(error.contains("rank") && error.contains("alpha"), "{error}");
        let error = parse("\"full\"").unwrap_err().to_string();
        assert!(error.contains("full") && error.contains("Lora, or `none`"), "{error}");
        assert!(parse("3").is_err());
    }

    #[test]
    fn a_limit_is_a_number_or_none() {
        let parse =
            |clip: serde_json::Value| serde_json::from_value::<crate::kinds::sft::Params>(json!({ "clip": clip }));
        for (clip, limit) in
            [(json!("none"), None), (json!(null), None), (json!(2), Some(2.0)), (json!(0.5), Some(0.5))]
        {
            assert_eq!(parse(clip).unwrap().clip, limit);
        }
        assert!(parse(json!("all")).unwrap_err().to_string().contains("f64, or `none`"));
        assert!(parse(json!({})).is_err());
    }

    #[test]
    fn every_fault_of_a_training_is_told_at_once() {
        let learning = Learning {
            epochs: Some(0.0),
            steps: Some(3),
            batch: 0,
            lr: f64::NAN,
            warmup: 0,
            beta1: 1.0,
            beta2: -0.1,
            weight_decay: -1.0,
            clip: Some(0.0),
        };
        let fields: Vec<String> = learning.faults().0.into_iter().map(|(field, _)| field).collect();
        assert_eq!(fields, ["epochs", "epochs", "batch", "lr", "beta1", "beta2", "weight_decay", "clip"]);
    }

    #[test]
    fn counts_beyond_all_bounds_are_told_at_planning() {
        use engine::kind::AnyKind;
        let fields = |kind: &dyn AnyKind, with: serde_json::Value| -> Vec<String> {
            let faults = kind.normalise(&with).map(drop).unwrap_err();
            assert!(faults.iter().all(|(_, what)| what.starts_with("must be at most ")), "{faults:?}");
            faults.into_iter().map(|(field, _)| field).collect()
        };
        let ppo = json!({ "rollouts": 100_000_000_000_u64, "minibatch": 2_000_000, "epochs": 1e5 as u64,
            "steps": { "n": 18_000_000_000_000_000_000_u64 }, "lora": { "r": 1_000_000_000_000_u64 } });
        assert_eq!(fields(&crate::kinds::rl::Ppo, ppo), ["steps.n", "rollouts", "epochs", "minibatch", "lora.r"]);
        let sft = json!({ "batch": 1_000_000_000_000_u64, "lora": { "r": 1_000_000_000_000_u64 } });
        assert_eq!(fields(&crate::kinds::sft::Sft, sft), ["batch", "lora.r"]);
        let shape = json!({ "n_layer": 4_000_000_000_000_000_000_u64, "n_embd": 98_304, "n_positions": 10_000_000,
            "steps": 18_000_000_000_000_000_000_u64 });
        assert_eq!(
            fields(&crate::kinds::model::pretrain::Pretrain, shape),
            ["steps", "n_embd", "n_layer", "n_positions"]
        );
        assert_eq!(
            fields(&crate::kinds::tokenizer::Train, json!({ "vocab_size": 99_999_999_999_u64 })),
            ["vocab_size"]
        );
        let posts = json!({ "posts": 100_000_000_000_u64 });
        assert_eq!(fields(&crate::kinds::dataset::DatasetTinyTldr, posts), ["posts"]);
        let pairs = json!({ "pairs": 100_000_000_000_u64, "batch": 100_000_000_000_u64 });
        assert_eq!(fields(&crate::kinds::generate::GenerateContrast, pairs), ["pairs", "batch"]);
        let pairs = json!({ "split": "gold", "batch": 100_000_000_000_u64 });
        assert_eq!(fields(&crate::kinds::generate::GeneratePairs, pairs), ["batch"]);
    }

    #[test]
    fn fractions_of_an_epoch_round_to_steps() {
        assert_eq!(Length { epochs: Some(0.5), steps: None }.steps(9), 5);
        assert_eq!(Length { epochs: None, steps: None }.steps(9), 9);
        assert_eq!(Length { epochs: None, steps: Some(3) }.steps(9), 3);
        assert_eq!(Length { epochs: Some(0.001), steps: None }.steps(9), 1);
        assert_eq!(Length { epochs: Some(1.0), steps: Some(3) }.faults().len(), 1);
    }
}
