//! `sft`: fine-tunes a language model on reference summaries and merges the adapter.

#[cfg(test)]
mod tests;

use engine::context::Context;
use engine::error::{Error, Result};
use engine::estimate::{Forecast, Scaling};
use engine::kind::{Kind, Signature};
use lm::{Dropout, Sequence};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::error::{IntoStageResult, on_a_big_stack};
use crate::model;
use crate::model::forecast::{Models, Training};
use crate::train::encode::{Encoder, fitting};
use crate::train::language::{LanguageTask, response_nll, train};
use crate::train::{Adapter, BatchOrder, Precision, SequenceTable, Weights, learning};
use crate::types::{LearningPoint, Posts, Split};

pub struct Sft;

/// The tokens that count in the loss.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Loss {
    /// Tokens of the summary and EOS.
    #[default]
    Response,
    /// Tokens of the prompt too.
    All,
}

/// The defaults are the paper's.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// The split to train on.
    pub split: Split,
    /// The split whose first `held_out_posts` posts give the held-out loss before and after training.
    pub held_out_split: Split,
    pub held_out_posts: usize,
    /// `{r, alpha, dropout}`, merged into the weights at the end; null or `none`: train every weight.
    pub lora: Adapter,
    /// Passes over the split; excludes `steps`. Defaults to 1 if neither is given.
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
    /// Tokens in the loss: `response`, or `all`.
    pub loss: Loss,
    /// Longest prompt, in tokens; a longer POST loses its end. Absent: the part of the window that the summary leaves
    /// free.
    pub max_prompt_tokens: Option<usize>,
    /// `true`: skip posts whose summary or title is too long for the window, counted as `dropped_long`. Absent or
    /// `false`: such a post is an error.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub drop_long: bool,
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
            split: Split::Sft,
            held_out_split: Split::Valid,
            held_out_posts: 256,
            lora: Adapter::default(),
            epochs: None,
            steps: None,
            batch: 128,
            lr: 7e-5,
            warmup: 50,
            beta1: 0.9,
            beta2: 0.999,
            weight_decay: 0.0,
            clip: Some(1.0),
            loss: Loss::Response,
            max_prompt_tokens: None,
            drop_long: false,
            weights: Weights::F32,
            precision: Precision::F32,
            tokens_at_once: 8192,
        }
    }
}

impl Kind for Sft {
    type Params = Params;
    const NAME: &'static str = "sft";
    const VERSION: u32 = 2;
    const ABOUT: &'static str =
        "fine-tunes a model on reference summaries, by default through a LoRA that is then merged";

    fn signature(&self, _: &Params) -> Signature {
        Signature::producing("Model").one("base", &["Model"]).one("posts", &["Posts"]).seeded().numerics(lm::NUMERICS)
    }

    fn check(&self, p: &Params) -> Vec<(String, String)> {
        let mut faults = learning!(p).faults();
        faults.0.extend(p.lora.faults());
        faults.must(p.tokens_at_once > 0, "tokens_at_once", "must be at least 1");
        faults.must(p.split != p.held_out_split, "held_out_split", "must differ from `split`");
        faults.0
    }

    fn scaling(&self, p: &Params, size: &dyn Fn(&str) -> Option<f64>) -> Option<Scaling> {
        let base = size("base")?;
        let rows = match p.steps {
            Some(steps) => steps as f64 * p.batch as f64,
            None => p.epochs.unwrap_or(1.0) * size("posts")?,
        };
        Some(Scaling::new(rows * base, base))
    }

    fn forecast(&self, p: &Params, inputs: &dyn Fn(&str) -> Vec<Value>) -> Forecast {
        let base = inputs("base");
        let training = Training {
            rank: p.lora.0.as_ref().map(|lora| lora.r),
            sequences: p.batch,
            tokens_at_once: p.tokens_at_once,
            sampled: 0,
            scored: p.batch,
            merges: true,
        };
        let memory = Models::new(&base).map(|models| models.training(&training));
        Forecast { memory, outline: base.into_iter().next().unwrap_or_default() }
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        lm::follow_threads(ctx.thread_limit().clone());
        on_a_big_stack(|| sft(&params, ctx))
    }
}

fn sft(p: &Params, ctx: &mut Context) -> Result<()> {
    let (base, tokenizer) = model::load(&ctx.one("base")?.folder)?;
    let base = p.precision.of(&base);
    let mut table = SequenceTable::create(ctx.checkpoints())?;
    let (mut held_out, mut dropped): (Vec<Sequence>, u64) = (Vec::new(), 0);
    let mut encoder = Encoder::new(&tokenizer, base.config().window()).longest_prompt(p.max_prompt_tokens);
    for post in Posts::open(&ctx.one("posts")?.folder)? {
        let post = post?;
        let learned = post.is_in(p.split);
        let kept = learned || (post.is_in(p.held_out_split) && held_out.len() < p.held_out_posts);
        if !kept {
            continue;
        }
        match fitting(encoder.reference(&post), p.drop_long, &mut dropped)? {
            Some(row) if learned => table.push(&post.id, &row)?,
            Some(row) => held_out.push(row),
            None => {}
        }
    }
    table.finish()?;
    if table.is_empty() {
        return Err(Error::user(format!("no posts in split `{}` to train on", p.split))
            .help("`dataset.filter` gives posts their splits: wire its output to port `posts`"));
    }
    let order = BatchOrder::bucketed(table.lengths(), p.batch, ctx.generator("order"));
    let plan = learning!(p).plan(order.batches_per_epoch());
    if !held_out.is_empty() {
        ctx.activity("evaluating");
        let nll = response_nll(&base, &held_out, p.batch)?;
        ctx.metric("held_out_response_nll_before", nll);
    }
    let (trainable, dropout) = match &p.lora.0 {
        Some(lora) => {
            let model = base.with_adapter(&lora.config(), &mut ctx.generator("adapter")).into_stage_result()?;
            (model, (lora.dropout > 0.0).then(|| Dropout::new(ctx.generator("dropout"))))
        }
        None => (base.with_full_training().into_stage_result()?, None),
    };
    let prompt_weight = if p.loss == Loss::All { 1.0 } else { 0.0 };
    let task = LanguageTask {
        model: &trainable,
        table: &table,
        order,
        prompt_weight,
        dropout,
        tokens_at_once: p.tokens_at_once,
    };
    let trained = train(ctx, task, plan)?;
    let merged = if p.lora.0.is_some() { trainable.merged().into_stage_result()? } else { trainable.frozen() };
    if !held_out.is_empty() {
        ctx.activity("evaluating");
        let nll = response_nll(&merged, &held_out, p.batch)?;
        ctx.metric("held_out_response_nll", nll);
    }
    ctx.metric("train_loss", trained.final_loss);
    ctx.metric("steps", trained.steps as f64);
    ctx.metric("tokens", trained.tokens as f64);
    ctx.metric("rows", table.len() as f64);
    ctx.metric("held_out_rows", held_out.len() as f64);
    encoder.truncation.tell(ctx);
    if p.drop_long {
        ctx.metric("dropped_long", dropped as f64);
    }
    LearningPoint::write(ctx.out(), trained.curve)?;
    model::save(&merged, &tokenizer, ctx.out(), p.weights)
}
