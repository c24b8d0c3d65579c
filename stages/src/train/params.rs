//! Parameters that several kinds share. Knows how they are written in a pipeline file, not what they do.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::de::value::MapAccessDeserializer;
use serde::de::{MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

/// The rank, scale and dropout of a LoRA on every linear layer (PEFT's `all-linear`).
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

/// A LoRA, or `null` (or `none`): train every weight.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(transparent)]
pub struct Adapter(pub Option<Lora>);

impl Default for Adapter {
    fn default() -> Self {
        Self(Some(Lora::default()))
    }
}

impl Adapter {
    /// Faults of the ranges, as (field, message).
    pub fn faults(&self) -> Vec<(String, String)> {
        let Some(lora) = &self.0 else { return Vec::new() };
        let mut faults = Faults::default();
        faults.must(lora.r > 0, "lora.r", "must be at least 1");
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
        struct Either;
        impl<'de> Visitor<'de> for Either {
            type Value = Adapter;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a map of r, alpha and dropout, or `none`")
            }

            fn visit_unit<E>(self) -> Result<Adapter, E> {
                Ok(Adapter(None))
            }

            fn visit_none<E>(self) -> Result<Adapter, E> {
                Ok(Adapter(None))
            }

            fn visit_str<E: serde::de::Error>(self, s: &str) -> Result<Adapter, E> {
                if s == "none" {
                    Ok(Adapter(None))
                } else {
                    Err(E::invalid_value(serde::de::Unexpected::Str(s), &self))
                }
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Adapter, A::Error> {
                Lora::deserialize(MapAccessDeserializer::new(map)).map(|lora| Adapter(Some(lora)))
            }
        }
        d.deserialize_any(Either)
    }
}

impl JsonSchema for Adapter {
    fn schema_name() -> Cow<'static, str> {
        "Adapter".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let lora = generator.subschema_for::<Lora>();
        schemars::json_schema!({ "anyOf": [lora, { "type": "null" }, { "const": "none" }] })
    }
}

/// The number type of saved weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Weights {
    #[default]
    F32,
    F16,
}

/// How long to train: `steps`, or passes over the data.
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
        faults.must(self.steps.is_none_or(|s| s > 0), "steps", "must be at least 1");
        faults.0
    }

    /// Steps, when an epoch has this many; one epoch if nothing is said. At least 1.
    pub fn steps(&self, per_epoch: u64) -> u64 {
        self.steps.unwrap_or_else(|| ((self.epochs.unwrap_or(1.0) * per_epoch as f64).round() as u64).max(1))
    }
}

/// Collects what is wrong with parameters.
#[derive(Default)]
pub struct Faults(pub Vec<(String, String)>);

impl Faults {
    pub fn must(&mut self, holds: bool, field: &str, message: &str) {
        if !holds {
            self.0.push((field.to_owned(), message.to_owned()));
        }
    }

    /// A learning rate, a clip: above 0 and finite.
    pub fn positive(&mut self, value: f64, field: &str) {
        self.must(value > 0.0 && value.is_finite(), field, "must be above 0");
    }

    pub fn share(&mut self, value: f64, field: &str) {
        self.must((0.0..1.0).contains(&value), field, "must be in [0, 1)");
    }
}

#[cfg(test)]
mod tests {
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
        assert!(parse("\"full\"").is_err());
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
