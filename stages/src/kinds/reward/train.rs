//! `reward.train`: trains a language model with a scalar head on preferences between summaries.

use engine::context::Context;
use engine::error::{AtPath, Error, Result};
use engine::estimate::{Forecast, Scaling};
use engine::kind::{Kind, Signature};
use lm::{Batch, CausalLm, Dropout, RewardModel, ScalarHead, Sequence, Tokenizer};
use rand_chacha::ChaCha12Rng;
use serde_json::Value;

use crate::error::{IntoStageResult, named, number, on_a_big_stack, rounded};
use crate::model;
use crate::model::forecast::{Models, Training};
use crate::random::below;
use crate::random::fixed_generator;
use crate::reward::loss::{preference_loss, soft_preference_loss};
use crate::reward::measure::{Calibration, SCORED, accuracy, calibrate};
use crate::reward::pairs::{Corruption, PreferenceTable};
use crate::reward::params::{Centring, Diversity, Normalise, Order, Params};
use crate::train::{BatchOrder, MicroBatchLoss, Trainer, Weights, learning, micro_batches};
use crate::types::folder::write_json;
use crate::types::reward::{ADAPTER, BASE, HEAD, INFO};
use crate::types::{LearningPoint, Model, ModelOutline, RewardInfo};

pub struct RewardTrain;

impl Kind for RewardTrain {
    type Params = Params;
    const NAME: &'static str = "reward.train";
    const VERSION: u32 = 2;
    const ABOUT: &'static str = "trains a reward model on preferences (Eq. 1) from a language model's weights";

    fn signature(&self, p: &Params) -> Signature {
        let signature =
            Signature::producing("RewardModel").one("model", &["Model"]).many("preferences", &["Preferences"]);
        let signature = match (p.centring, p.normalise) {
            (Centring::None, Normalise::None) => signature.optional("posts", &["Posts"]),
            _ => signature.one("posts", &["Posts"]),
        };
        signature.optional("sampler", &["Model"]).seeded().numerics(lm::NUMERICS)
    }

    fn check(&self, p: &Params) -> Vec<(String, String)> {
        p.faults()
    }

    fn scaling(&self, p: &Params, size: &dyn Fn(&str) -> Option<f64>) -> Option<Scaling> {
        let model = size("model")?;
        let rows = match p.steps {
            Some(steps) => steps as f64 * p.batch as f64,
            None => p.epochs.unwrap_or(1.0) * size("preferences")?,
        };
        Some(Scaling::new(rows * model, model))
    }

    fn forecast(&self, p: &Params, inputs: &dyn Fn(&str) -> Vec<Value>) -> Forecast {
        let model = inputs("model");
        let samples = !inputs("posts").is_empty();
        let training = Training {
            rank: p.lora.0.as_ref().map(|lora| lora.r),
            // Both summaries of a pair.
            sequences: 2 * p.batch,
            tokens_at_once: p.tokens_at_once,
            sampled: if samples { SCORED } else { 0 },
            scored: SCORED,
            merges: false,
        };
        let memory = Models::new(model.iter().chain(&inputs("sampler"))).map(|models| models.training(&training));
        let outline = model.first().map_or(Value::Null, |model| ModelOutline::trained(model, p.lora.0.is_some()));
        Forecast { memory, outline }
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        lm::follow_threads(ctx.thread_limit().clone());
        on_a_big_stack(|| reward(&params, ctx))
    }
}

fn reward(p: &Params, ctx: &mut Context) -> Result<()> {
    let (base, tokenizer) = model::load(&ctx.one("model")?.folder)?;
    let base = p.precision.of(&base);
    let table = PreferenceTable::read(ctx, &tokenizer, base.config().window(), p)?;
    let model = fresh(p, ctx, &base)?;
    train(p, ctx, &table, &model)?;
    let model = model.frozen();
    accuracy(p, ctx, &table, &model)?;
    let calibration = calibrate(p, ctx, &base, &tokenizer, &model)?;
    save(p, ctx, &tokenizer, &model, calibration)
}

/// The base with a fresh head and either a fresh adapter or all its weights trainable.
fn fresh(p: &Params, ctx: &Context, base: &CausalLm) -> Result<RewardModel> {
    let lm = match &p.lora.0 {
        Some(lora) => base.with_adapter(&lora.config(), &mut generator(p, ctx, "adapter")).into_stage_result()?,
        None => base.clone().with_full_training().into_stage_result()?,
    };
    let d = base.config().width();
    let std = p.head_init_std.unwrap_or_else(|| 1.0 / ((d + 1) as f64).sqrt());
    let head = ScalarHead::init(d, std, &mut ctx.generator("head")).into_stage_result()?;
    Ok(RewardModel { lm, head, pool: crate::reward::store::pool(p.pool) })
}

/// A generator that all members share unless `diversity` is `all`.
fn generator(p: &Params, ctx: &Context, purpose: &str) -> ChaCha12Rng {
    match p.diversity {
        Diversity::Head => fixed_generator(0, purpose),
        Diversity::All => ctx.generator(purpose),
    }
}

/// Warn if the loss exceeds ln 2, the loss of a model that scores everything alike, by this factor.
const UNLEARNT: f64 = 10.0;

fn train(p: &Params, ctx: &mut Context, table: &PreferenceTable, model: &RewardModel) -> Result<()> {
    let mut rows: Vec<usize> = table.training.iter().copied().take(p.pairs.unwrap_or(usize::MAX)).collect();
    if let Some(wanted) = p.pairs
        && rows.len() < wanted
    {
        return Err(Error::user(format!("{wanted} pairs wanted, the tables hold {} to train on", rows.len()))
            .help("lower `pairs`"));
    }
    if p.bootstrap {
        let mut rng = ctx.generator("bootstrap");
        rows = (0..rows.len()).map(|_| rows[below(&mut rng, rows.len())]).collect();
    }
    let lengths: Vec<u32> = rows.iter().map(|&row| table.length(row) as u32).collect();
    let mut order = BatchOrder::shuffled(lengths, p.batch, ctx.generator("order"));
    if p.order == Order::ContrastFirst {
        let swapped = (0..rows.len() as u32).filter(|&i| table.corruption(rows[i as usize]) == Some(Corruption::Swap));
        let mut swapped: Vec<u32> = swapped.collect();
        if swapped.is_empty() {
            return Err(Error::user("`order: contrast_first`, but no pair differs in swapped facts")
                .help("add the preferences of a `generate.contrast` stage with corruption `swap`"));
        }
        swapped.truncate((swapped.len() as f64 * p.contrast_lead).round() as usize);
        order = order.lead(swapped);
    }
    let plan = learning!(p).plan(order.batches_per_epoch());
    let mut dropout = (p.lora.dropout() > 0.0).then(|| Dropout::new(generator(p, ctx, "dropout")));
    let mut trainer = Trainer::new(ctx, model.variables(), plan)?;
    trainer.resume(ctx, dropout.as_mut())?;
    order.skip(trainer.done());
    while !trainer.finished() {
        let batch: Vec<usize> = order.next_batch().into_iter().map(|i| rows[i]).collect();
        let pairs = batch.iter().map(|&row| table.get(row)).collect::<Result<Vec<_>>>()?;
        // Both summaries of a pair are in the same part.
        let lengths: Vec<usize> = batch.iter().map(|&row| 2 * table.length(row)).collect();
        let parts = micro_batches(&lengths, p.tokens_at_once).into_iter().map(|part| {
            let share = part.len() as f64 / pairs.len() as f64;
            let certainties: Vec<f32> = batch[part.clone()].iter().filter_map(|&row| table.certainty(row)).collect();
            let pairs = &pairs[part];
            let sequences: Vec<&Sequence> = pairs.iter().map(|(a, _)| a).chain(pairs.iter().map(|(_, b)| b)).collect();
            let scores =
                model.scores(&Batch::new(&sequences).into_stage_result()?, dropout.as_mut()).into_stage_result()?;
            let loss = match p.soft_labels {
                true => soft_preference_loss(&scores, &certainties, p.eta),
                false => preference_loss(&scores, p.eta),
            };
            Ok(MicroBatchLoss { loss: loss.into_stage_result()?, share })
        });
        let ids = || batch.iter().map(|&row| table.id(row)).collect::<Result<Vec<_>>>();
        trainer.step(ctx, parts, || Ok(named("pairs", ids()?)))?;
        trainer.checkpoint(ctx, dropout.as_ref())?;
    }
    let loss = trainer.final_loss();
    if loss > UNLEARNT * std::f64::consts::LN_2 {
        ctx.warn(format!(
            "the model did not learn: its final loss is {}, that of equal scores is 0.6931; lower `lr` (it is {})",
            rounded(loss),
            number(p.lr)
        ));
    }
    ctx.metric("train_loss", loss);
    ctx.metric("steps", trainer.done() as f64);
    ctx.metric("pairs", rows.len() as f64);
    LearningPoint::write(ctx.out(), trainer.curve())
}

fn save(p: &Params, ctx: &Context, tokenizer: &Tokenizer, model: &RewardModel, calibration: Calibration) -> Result<()> {
    let (out, input) = (ctx.out(), ctx.one("model")?);
    let full = p.lora.0.is_none();
    if full {
        model::save(&model.lm, tokenizer, &out.join(BASE), Weights::F32)?;
    } else {
        for file in Model::files(&input.folder)? {
            ctx.link_or_copy(&input.folder.join(&file), &format!("{BASE}/{file}"))?;
        }
        let adapter = out.join(ADAPTER);
        std::fs::create_dir_all(&adapter).at(&adapter)?;
        model.lm.save_adapter(&adapter, "../base").into_stage_result()?;
    }
    model.head.save(&out.join(HEAD)).into_stage_result()?;
    let file = RewardInfo {
        pool: p.pool,
        centre: calibration.centre,
        scale: calibration.scale,
        base_digest: input.digest,
        member_seed: ctx.seed(),
        fact_sensitivity: calibration.fact_sensitivity,
        more: serde_json::Map::new(),
    };
    write_json(&out.join(INFO), &file)
}
