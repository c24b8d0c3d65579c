//! `model.pretrain`: trains a GPT-2 from scratch on posts and their summaries.

use std::borrow::Cow;

use engine::context::Context;
use engine::error::{Error, Result};
use engine::estimate::{Forecast, Scaling};
use engine::kind::{Kind, Signature};
use lm::{CausalLm, Gpt2Config, InitStd, ModelConfig, Tokenizer};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{IntoStageResult, on_a_big_stack};
use crate::model::forecast::{Models, Training};
use crate::random::share_of;
use crate::train::encode::Encoder;
use crate::train::language::{LanguageTask, response_nll, train};
use crate::train::params::{BATCH, RANK};
use crate::train::{BatchOrder, Precision, SequenceTable, Weights, learning};
use crate::types::{LearningPoint, ModelOutline, Posts, Split};

pub struct Pretrain;

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// Width of the model.
    pub n_embd: usize,
    /// Number of blocks.
    pub n_layer: usize,
    /// Attention heads; must divide the width.
    pub n_head: usize,
    /// Longest sequence, in tokens.
    pub n_positions: usize,
    /// Standard deviation of initial weights: `inverse_sqrt_width` (1/sqrt(n_embd); small models need it) or a number.
    pub init_std: Init,
    /// The split to train on; absent: every row.
    pub split: Option<Split>,
    /// Passes over the rows; excludes `steps`. Defaults to 1 if neither is given.
    pub epochs: Option<f64>,
    /// Optimiser steps; excludes `epochs`.
    pub steps: Option<u64>,
    /// Rows per step.
    pub batch: usize,
    /// Peak learning rate.
    pub lr: f64,
    /// Steps of linear warm-up, followed by cosine decay to 0.
    pub warmup: u64,
    pub beta1: f64,
    pub beta2: f64,
    /// Decoupled weight decay, on matrices only.
    pub weight_decay: f64,
    /// The largest gradient norm; null or `none`: no limit.
    #[serde(deserialize_with = "crate::train::params::or_none")]
    #[schemars(schema_with = "crate::train::params::or_none_schema::<f64>")]
    pub clip: Option<f64>,
    /// Weight of a prompt token in the loss, relative to 1 for a summary token.
    pub prompt_weight: f64,
    /// Share of the rows, by hash of their id, kept for the held-out loss.
    pub held_out: f64,
    /// Number type of the saved weights.
    pub weights: Weights,
    /// Number type for products with weights: `f32`, or `bf16` (operands rounded, sums in f32). Weights, norms,
    /// attention scores, losses and the optimiser stay f32.
    pub precision: Precision,
    /// Tokens per forward and backward pass, including padding; larger batches are split. Bounds memory.
    pub tokens_at_once: usize,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            n_embd: 96,
            n_layer: 3,
            n_head: 3,
            n_positions: 256,
            init_std: Init::InverseSqrtWidth,
            split: None,
            epochs: None,
            steps: None,
            batch: 16,
            lr: 1.5e-3,
            warmup: 30,
            beta1: 0.9,
            beta2: 0.98,
            weight_decay: 0.01,
            clip: Some(1.0),
            prompt_weight: 1.0,
            held_out: 0.02,
            weights: Weights::F32,
            precision: Precision::F32,
            tokens_at_once: 8192,
        }
    }
}

/// Standard deviation of initial weights.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Init {
    InverseSqrtWidth,
    Fixed(f64),
}

const INVERSE_SQRT_WIDTH: &str = "inverse_sqrt_width";

impl Serialize for Init {
    fn serialize<S: serde::Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        match self {
            Self::InverseSqrtWidth => s.serialize_str(INVERSE_SQRT_WIDTH),
            Self::Fixed(std) => s.serialize_f64(*std),
        }
    }
}

impl<'de> Deserialize<'de> for Init {
    fn deserialize<D: serde::Deserializer<'de>>(d: D) -> Result<Self, D::Error> {
        #[derive(Deserialize)]
        #[serde(untagged, expecting = "expected `inverse_sqrt_width` or a number")]
        enum Either {
            Number(f64),
            Word(String),
        }
        match Either::deserialize(d)? {
            Either::Number(std) => Ok(Self::Fixed(std)),
            Either::Word(word) if word == INVERSE_SQRT_WIDTH => Ok(Self::InverseSqrtWidth),
            Either::Word(word) => {
                Err(serde::de::Error::custom(format!("`{word}`: expected `inverse_sqrt_width` or a number")))
            }
        }
    }
}

impl JsonSchema for Init {
    fn schema_name() -> Cow<'static, str> {
        "Init".into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        schemars::json_schema!({ "anyOf": [{ "const": INVERSE_SQRT_WIDTH }, { "type": "number", "exclusiveMinimum": 0 }] })
    }
}

/// Maximum number of held-out rows in the loss. Further held-out rows are used neither for the loss nor for training.
const HELD_OUT_AT_MOST: usize = 512;

impl Kind for Pretrain {
    type Params = Params;
    const NAME: &'static str = "model.pretrain";
    const VERSION: u32 = 2;
    const ABOUT: &'static str = "trains a GPT-2 of any shape from scratch on prompts and summaries";

    fn signature(&self, _: &Params) -> Signature {
        Signature::producing("Model")
            .one("posts", &["Posts"])
            .one("tokenizer", &["Tokenizer"])
            .seeded()
            .numerics(lm::NUMERICS)
    }

    fn check(&self, p: &Params) -> Vec<(String, String)> {
        let mut faults = learning!(p).faults();
        for (value, most, field) in
            [(p.n_embd, RANK, "n_embd"), (p.n_layer, 4096, "n_layer"), (p.n_head, RANK, "n_head")]
        {
            faults.must(value > 0, field, "must be at least 1");
            faults.at_most(value as u64, most, field);
        }
        faults.must(p.n_positions >= 8, "n_positions", "must be at least 8");
        faults.at_most(p.n_positions as u64, BATCH, "n_positions");
        faults.must(p.n_head > 0 && p.n_embd.is_multiple_of(p.n_head), "n_head", "must divide `n_embd`");
        if let Init::Fixed(std) = p.init_std {
            faults.positive(std, "init_std");
        }
        faults.must(p.prompt_weight >= 0.0, "prompt_weight", "must not be negative");
        faults.must(p.tokens_at_once > 0, "tokens_at_once", "must be at least 1");
        faults.share(p.held_out, "held_out");
        faults.0
    }

    fn scaling(&self, p: &Params, size: &dyn Fn(&str) -> Option<f64>) -> Option<Scaling> {
        // Without the embeddings, whose size the tokenizer decides.
        let weights = p.n_layer as f64 * (p.n_embd * p.n_embd) as f64;
        let rows = match p.steps {
            Some(steps) => steps as f64 * p.batch as f64,
            None => p.epochs.unwrap_or(1.0) * size("posts")?,
        };
        Some(Scaling::new(rows * weights, weights))
    }

    fn forecast(&self, p: &Params, inputs: &dyn Fn(&str) -> Vec<Value>) -> Forecast {
        let vocab = inputs("tokenizer").first().and_then(Value::as_u64).unwrap_or_default() as usize;
        if vocab == 0 {
            return Forecast::default();
        }
        let config = Gpt2Config::new(vocab, p.n_positions, p.n_embd, p.n_layer, p.n_head);
        let outline = ModelOutline::of(ModelConfig::from(config).to_json());
        let training = Training {
            rank: None,
            sequences: p.batch,
            tokens_at_once: p.tokens_at_once,
            sampled: 0,
            scored: p.batch,
            merges: false,
        };
        Forecast { memory: Models::new([&outline]).map(|models| models.training(&training)), outline }
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        lm::follow_threads(ctx.thread_limit().clone());
        on_a_big_stack(|| pretrain(&params, ctx))
    }
}

fn pretrain(p: &Params, ctx: &mut Context) -> Result<()> {
    let tokenizer = Tokenizer::load(&ctx.one("tokenizer")?.folder.join("tokenizer.json")).into_stage_result()?;
    let held_out_key = ctx.generator_key("held out");
    let mut table = SequenceTable::create(ctx.checkpoints())?;
    let (mut held_out, mut too_long) = (Vec::new(), 0_u64);
    let mut encoder = Encoder::new(&tokenizer, p.n_positions);
    for post in Posts::open(&ctx.one("posts")?.folder)? {
        let post = post?;
        if p.split.is_some_and(|split| !post.is_in(split)) {
            continue;
        }
        // Fails only if the summary leaves no room for the prompt's fixed lines.
        let Ok(row) = encoder.reference(&post) else {
            too_long += 1;
            continue;
        };
        if share_of(&held_out_key, &post.id) >= p.held_out {
            table.push(&post.id, &row)?;
        } else if held_out.len() < HELD_OUT_AT_MOST {
            held_out.push(row);
        }
    }
    table.finish()?;
    if too_long > 0 {
        ctx.warn(format!(
            "{too_long} posts are left out: their summaries leave no room in {} positions",
            p.n_positions
        ));
    }
    if table.is_empty() {
        return Err(match p.split {
            Some(split) => Error::user(format!("no posts in split `{split}` to train on"))
                .help("give `dataset.filter` a size for it"),
            None => Error::user("no posts to train on").help("lower `held_out`, or give more posts"),
        });
    }
    let order = BatchOrder::bucketed(table.lengths(), p.batch, ctx.generator("order"));
    let plan = learning!(p).plan(order.batches_per_epoch());
    let config = Gpt2Config {
        eos_token_id: tokenizer.eos().ids().to_vec(),
        bos_token_id: tokenizer.bos_ids().first().copied().or(Some(tokenizer.eos().first())),
        ..Gpt2Config::new(tokenizer.vocab_size(), p.n_positions, p.n_embd, p.n_layer, p.n_head)
    };
    let init = match p.init_std {
        Init::InverseSqrtWidth => InitStd::InverseSqrtWidth,
        Init::Fixed(std) => InitStd::Fixed(std),
    };
    let model = CausalLm::init(config, init, &mut ctx.generator("weights"))
        .and_then(CausalLm::with_full_training)
        .into_stage_result()?;
    let model = p.precision.of(&model);
    let task = LanguageTask {
        model: &model,
        table: &table,
        order,
        prompt_weight: p.prompt_weight,
        dropout: None,
        tokens_at_once: p.tokens_at_once,
    };
    let trained = train(ctx, task, plan)?;
    if !held_out.is_empty() {
        ctx.activity("evaluating");
        let nll = response_nll(&model, &held_out, p.batch)?;
        ctx.metric("held_out_response_nll", nll);
    }
    ctx.metric("train_loss", trained.final_loss);
    ctx.metric("steps", trained.steps as f64);
    ctx.metric("tokens", trained.tokens as f64);
    ctx.metric("rows", table.len() as f64);
    ctx.metric("held_out_rows", held_out.len() as f64);
    encoder.truncation.tell(ctx);
    ctx.metric("too_long_rows", too_long as f64);
    LearningPoint::write(ctx.out(), trained.curve)?;
    crate::model::save(&model.frozen(), &tokenizer, ctx.out(), p.weights)
}
