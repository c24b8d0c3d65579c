//! Forecasts of memory for stages that train, sample or score, from the outlines of their models.

use engine::estimate::Forecast;
use lm::{MemoryEstimate, ModelConfig, QuantizedFile, Trainable};
use serde_json::Value;

use crate::types::ModelOutline;

/// Bytes that an attempt takes without a model: program, tokenizer, tables.
const PROGRAM: f64 = 65e6;

/// Bytes of freed memory that the C library keeps: twice its largest threshold for memory maps (mallopt(3),
/// `M_TRIM_THRESHOLD`).
const KEPT_BY_MALLOC: f64 = (64 << 20) as f64;

/// The longest sequence that a forecast reckons with, in tokens. Posts and summaries are shorter; windows of today's models
/// are far longer.
const LONGEST: usize = 1024;

/// The models at one or more ports, all of which an attempt loads.
#[derive(Clone, Debug)]
pub struct Models {
    /// The memory of each, with the number of its copies.
    models: Vec<(MemoryEstimate, usize)>,
}

impl Models {
    /// `None` if something is not known of a model.
    pub fn new<'a>(outlines: impl IntoIterator<Item = &'a Value>) -> Option<Self> {
        let estimate = |outline: &Value| {
            let outline: ModelOutline = serde_json::from_value(outline.clone()).ok()?;
            let config = ModelConfig::from_json(outline.config).ok()?;
            Some((MemoryEstimate::new(&config).ok()?, outline.copies))
        };
        Some(Self { models: outlines.into_iter().map(estimate).collect::<Option<_>>()? })
    }

    /// Peak bytes of an attempt that holds all weights and, one after the other, takes each of `parts` besides.
    fn peak(&self, parts: impl IntoIterator<Item = f64>) -> f64 {
        let weights: f64 = self.models.iter().map(|(model, copies)| *copies as f64 * model.weights()).sum();
        let largest = parts.into_iter().fold(0.0, f64::max);
        PROGRAM + weights + largest + largest.min(KEPT_BY_MALLOC)
    }

    /// The largest of `bytes` over the models.
    fn largest(&self, bytes: impl Fn(&MemoryEstimate) -> f64) -> f64 {
        self.models.iter().map(|(model, _)| bytes(model)).fold(0.0, f64::max)
    }

    /// For an attempt that loads the models and does nothing with them.
    pub fn loaded(&self) -> f64 {
        self.peak([])
    }

    /// For an attempt that scores so many tokens at once.
    pub fn scoring_tokens(&self, tokens: usize) -> f64 {
        self.peak([self.largest(|model| model.scoring_pass(tokens))])
    }

    /// For an attempt that scores so many sequences at once.
    pub fn scoring(&self, sequences: usize) -> f64 {
        self.scoring_tokens(sequences * self.length())
    }

    /// For an attempt that samples from each of the models, and scores.
    pub fn sampling(&self, sequences: usize) -> f64 {
        let scoring = self.largest(|model| model.scoring_pass(sequences * length(model)));
        self.peak([self.largest(|model| model.sampling(sequences, length(model))), scoring])
    }

    /// For an attempt that trains the first model.
    pub fn training(&self, training: &Training) -> f64 {
        let Some((model, _)) = self.models.first() else { return self.peak([]) };
        let trainable = training.rank.map_or(Trainable::All, Trainable::Adapter);
        let length = length(model);
        let tokens = (training.sequences * length).min(training.tokens_at_once.max(length));
        let merged = if training.merges && trainable != Trainable::All { model.linear_copies() } else { 0.0 };
        let trained = [
            model.training_pass(tokens, trainable),
            model.sampling(training.sampled, length),
            self.largest(|model| model.scoring_pass(training.scored * length)),
            merged,
        ];
        self.peak(trained.map(|part| part + model.optimiser(trainable)))
    }

    fn length(&self) -> usize {
        self.models.iter().map(|(model, _)| length(model)).max().unwrap_or_default()
    }
}

fn length(model: &MemoryEstimate) -> usize {
    model.window().min(LONGEST)
}

/// What a stage trains.
pub struct Training {
    /// Of the LoRA; `None`: every weight is trained.
    pub rank: Option<usize>,
    /// Of an optimiser step.
    pub sequences: usize,
    /// Most tokens of a pass.
    pub tokens_at_once: usize,
    /// Sequences sampled together, from the model that is trained.
    pub sampled: usize,
    /// Sequences scored together without gradients.
    pub scored: usize,
    /// Whether the adapter is merged into a copy of the weights at the end.
    pub merges: bool,
}

/// For an attempt that computes with the quantised weights of a GGUF file.
pub fn quantised(file: &QuantizedFile) -> f64 {
    PROGRAM + file.memory() + KEPT_BY_MALLOC
}

/// A forecast of a stage whose artifact no stage loads as a model.
pub fn memory(bytes: Option<f64>) -> Forecast {
    Forecast { memory: bytes, outline: Value::Null }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// The forecast of a kind, with an outline of GPT-2's shape at every port, changed by `config`.
    fn forecast(kind: &str, with: Value, config: Value) -> f64 {
        let registry = crate::registry();
        let kind = registry.get_kind(kind).unwrap();
        let mut shape = json!({
            "model_type": "gpt2", "vocab_size": 5000, "n_positions": 256, "n_embd": 256, "n_layer": 6, "n_head": 4,
        });
        shape.as_object_mut().unwrap().extend(config.as_object().unwrap().clone());
        let inputs = |port: &str| match port {
            "tokenizer" => vec![shape["vocab_size"].clone()],
            "models" | "members" => vec![ModelOutline::of(shape.clone()); 2],
            "rewards" => vec![ModelOutline::ensemble(&vec![ModelOutline::of(shape.clone()); 3])],
            _ => vec![ModelOutline::of(shape.clone())],
        };
        kind.forecast(&kind.normalise(&with).unwrap(), &inputs).memory.unwrap()
    }

    #[test]
    fn memory_grows_with_each_setting_that_it_depends_on() {
        let lora = json!({ "r": 64, "alpha": 64, "dropout": 0.1 });
        for (kind, with, settings) in [
            (
                "model.pretrain",
                json!({ "n_embd": 64, "n_head": 4 }),
                vec![("batch", json!(32)), ("n_layer", json!(6)), ("n_positions", json!(512))],
            ),
            ("sft", json!({ "batch": 8 }), vec![("batch", json!(16)), ("lora", json!(null)), ("lora", lora.clone())]),
            ("reward.train", json!({ "batch": 8 }), vec![("batch", json!(16)), ("lora", json!(null)), ("lora", lora)]),
            (
                "rl.ppo",
                json!({ "minibatch": 16 }),
                vec![("minibatch", json!(32)), ("lora", json!(null)), ("lora", json!({ "r": 64, "alpha": 64 }))],
            ),
        ] {
            let before = forecast(kind, with.clone(), json!({}));
            for (setting, value) in settings {
                let mut with = with.clone();
                with[setting] = value;
                let after = forecast(kind, with.clone(), json!({}));
                assert!(after > before * 1.001, "{kind} {with}: {after}, {before} before");
            }
        }
    }

    #[test]
    fn memory_grows_with_the_models_and_stays_small_for_long_windows() {
        let kinds = [
            "sft",
            "reward.train",
            "reward.ensemble",
            "rl.ppo",
            "rl.rloo",
            "generate.pairs",
            "generate.best_of_n",
            "annotate.gold",
            "evaluate",
        ];
        for kind in kinds {
            let with = if kind == "generate.pairs" { json!({ "split": "proxy" }) } else { json!({}) };
            let of = |config: Value| forecast(kind, with.clone(), config);
            assert!(of(json!({ "n_layer": 12 })) > of(json!({})), "{kind}");
            let [longest, longer] = [1024, 131_072].map(|window| of(json!({ "n_positions": window })));
            // But for the tables of positions, of at most four models.
            let tables = 4.0 * 4.0 * 256.0 * (131_072.0 - 1024.0);
            assert!(longer - longest <= tables * 1.01, "{kind}: {longer}, {longest}");
        }
    }

    #[test]
    fn a_hostile_or_unknown_config_gives_no_number_and_no_panic() {
        let size = i32::MAX;
        let config = json!({
            "model_type": "gpt2", "vocab_size": size, "n_positions": size, "n_embd": size / 4, "n_layer": size, "n_head": 1,
        });
        let models = Models::new([&ModelOutline::of(config)]).unwrap();
        let training = Training { rank: None, sequences: 8, tokens_at_once: 8192, sampled: 8, scored: 8, merges: true };
        assert!(models.training(&training) > 1e28 && models.sampling(8) > 1e20);
        assert!(Models::new([&json!(null)]).is_none());
        assert!(Models::new([&ModelOutline::of(json!({ "model_type": "mamba" }))]).is_none());
    }
}
