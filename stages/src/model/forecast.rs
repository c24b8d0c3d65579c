//! Forecasts of memory for stages that train, sample or score, from the outlines of their models.

use engine::estimate::Forecast;
use lm::{MemoryEstimate, ModelConfig, Trainable};
use serde_json::Value;

use crate::types::ModelOutline;

/// Bytes that an attempt takes without a model: program, tokenizer, tables.
const PROGRAM: f64 = 65e6;

/// Bytes of freed memory that the C library keeps: twice its largest threshold for memory maps (mallopt(3),
/// `M_TRIM_THRESHOLD`).
const KEPT_BY_MALLOC: f64 = (64 << 20) as f64;

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

    /// Bytes of the attempt with all weights, while its largest part takes `parts` on top.
    fn with(&self, parts: impl IntoIterator<Item = f64>) -> f64 {
        let weights: f64 = self.models.iter().map(|(model, copies)| *copies as f64 * model.weights()).sum();
        let largest = parts.into_iter().fold(0.0, f64::max);
        PROGRAM + weights + largest + largest.min(KEPT_BY_MALLOC)
    }

    /// Bytes on top for a forward pass of each model over this many sequences.
    fn scoring_pass(&self, sequences: usize) -> f64 {
        self.models.iter().map(|(model, _)| model.scoring_pass(sequences * model.window())).fold(0.0, f64::max)
    }

    /// Bytes of an attempt that scores so many tokens at once.
    pub fn scoring_tokens(&self, tokens: usize) -> f64 {
        self.with(self.models.iter().map(|(model, _)| model.scoring_pass(tokens)))
    }

    /// Bytes of an attempt that loads the models and does nothing with them.
    pub fn loaded(&self) -> f64 {
        self.with([])
    }

    /// Bytes of an attempt that scores so many sequences at once.
    pub fn scoring(&self, sequences: usize) -> f64 {
        self.with([self.scoring_pass(sequences)])
    }

    /// Bytes of an attempt that samples from the first model and scores with all.
    pub fn sampling(&self, sequences: usize) -> f64 {
        let sampling = self.models.first().map(|(model, _)| model.sampling(sequences, model.window()));
        self.with(sampling.into_iter().chain([self.scoring_pass(sequences)]))
    }

    /// Bytes of an attempt that trains the first model on batches of `sequences`, at most `tokens_at_once` tokens in a pass,
    /// and besides may sample.
    pub fn training(&self, training: &Training) -> f64 {
        let Some((model, _)) = self.models.first() else { return self.with([]) };
        let trainable = training.rank.map_or(Trainable::All, Trainable::Adapter);
        let tokens = (training.sequences * model.window()).min(training.tokens_at_once.max(model.window()));
        let sampling = model.sampling(training.sampled, model.window());
        let merged = if training.merges && trainable != Trainable::All { model.linear_copies() } else { 0.0 };
        let parts = [model.training_pass(tokens, trainable), sampling, merged];
        self.with(
            parts.map(|part| part + model.optimiser(trainable)).into_iter().chain([self.scoring_pass(training.scored)]),
        )
    }
}

/// What a stage trains.
pub struct Training {
    /// Of the LoRA; `None`: every weight is trained.
    pub rank: Option<usize>,
    /// Per optimiser step.
    pub sequences: usize,
    pub tokens_at_once: usize,
    /// Sequences sampled together.
    pub sampled: usize,
    /// Sequences scored together without gradients.
    pub scored: usize,
    /// Whether the adapter is merged into a copy of the weights at the end.
    pub merges: bool,
}

/// Bytes of an attempt that computes with the quantised weights of a GGUF file of this length.
pub fn quantised(file: u64) -> f64 {
    PROGRAM + file as f64
}

/// A forecast of a stage whose artifact no stage loads as a model.
pub fn memory(bytes: Option<f64>) -> Forecast {
    Forecast { memory: bytes, outline: Value::Null }
}
