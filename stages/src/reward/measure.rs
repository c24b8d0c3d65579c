//! Measurements of a trained reward model: accuracy, centre and scale of its scores, and whether it reads the post.

use engine::context::Context;
use engine::error::{Error, Result};
use lm::{CausalLm, RewardModel, Tokenizer};

use super::calibration::{self, CalibrationOptions, calibration_posts};
use super::pairs::{Corruption, PreferenceTable};
use super::params::{Centring, Normalise, Params};
use super::raw_scores;
use crate::error::{IntoStageResult, rounded};
use crate::model;
use crate::train::encode::Encoder;
use crate::types::FactSensitivity;

/// Sequences per scoring batch.
pub const SCORED: usize = 32;
/// Scores with a smaller deviation count as constant.
const SAME: f64 = 1e-6;

/// Share of held-out pairs whose chosen summary scores higher (a tie counts half), overall and by corruption.
pub fn accuracy(p: &Params, ctx: &mut Context, table: &PreferenceTable, model: &RewardModel) -> Result<()> {
    let pairs = table.held_out.iter().map(|&row| table.get(row)).collect::<Result<Vec<_>>>()?;
    ctx.metric("held_out_pairs", pairs.len() as f64);
    if pairs.is_empty() {
        if p.held_out > 0.0 {
            ctx.warn("no pair was held out, so there is no accuracy: raise `held_out`");
        }
        return Ok(());
    }
    ctx.activity("scoring held-out pairs");
    let chosen = raw_scores(model, &pairs.iter().map(|(a, _)| a).collect::<Vec<_>>(), SCORED)?;
    let rejected = raw_scores(model, &pairs.iter().map(|(_, b)| b).collect::<Vec<_>>(), SCORED)?;
    let right: Vec<f64> =
        chosen.iter().zip(&rejected).map(|(a, b)| if a == b { 0.5 } else { f64::from(u8::from(a > b)) }).collect();
    let mean = |keep: &dyn Fn(Option<Corruption>) -> bool| {
        let kept: Vec<f64> = table
            .held_out
            .iter()
            .zip(&right)
            .filter(|(row, _)| keep(table.corruption(**row)))
            .map(|(_, r)| *r)
            .collect();
        (!kept.is_empty()).then(|| kept.iter().sum::<f64>() / kept.len() as f64)
    };
    let mut by_kind =
        vec![("accuracy".to_owned(), mean(&|_| true)), ("accuracy_sampled".to_owned(), mean(&|c| c.is_none()))];
    for corruption in Corruption::ALL {
        by_kind.push((format!("accuracy_{corruption}"), mean(&|c| c == Some(*corruption))));
    }
    for (name, value) in by_kind {
        if let Some(value) = value {
            ctx.metric(name, value);
        }
    }
    Ok(())
}

/// Measurements of a model on the calibration samples.
pub struct Calibration {
    /// Subtracted from every raw score.
    pub centre: f64,
    /// Divisor of the centred score.
    pub scale: f64,
    pub fact_sensitivity: Option<FactSensitivity>,
}

/// Measures the centre and scale of the scores, and whether the model reads the post.
pub fn calibrate(
    p: &Params,
    ctx: &mut Context,
    base: &CausalLm,
    tokenizer: &Tokenizer,
    model: &RewardModel,
) -> Result<Calibration> {
    let none = Calibration { centre: 0.0, scale: 1.0, fact_sensitivity: None };
    let Some(input) = ctx.optional("posts") else { return Ok(none) };
    let mut posts = calibration_posts(&input.folder, p.calibration_posts)?;
    let sampler = ctx.optional("sampler").map(|input| model::load(&input.folder)).transpose()?;
    let (policy, policy_tokenizer) = sampler.as_ref().map_or((base, tokenizer), |(lm, tokenizer)| (lm, tokenizer));
    let mut encoder = Encoder::new(tokenizer, base.config().window());
    if p.drop_long {
        let mut sampling = Encoder::new(policy_tokenizer, policy.config().window());
        posts.retain(|post| sampling.prompt(post, p.max_new_tokens).is_ok() && encoder.reference(post).is_ok());
    }
    if posts.is_empty() {
        return match (p.centring, p.normalise) {
            (Centring::None, Normalise::None) => Ok(none),
            _ => Err(Error::user("no posts in split `calibration` to centre or normalise the scores on")
                .help("give `dataset.filter` a calibration split, or set `centring: none` and `normalise: none`")),
        };
    }
    let options = CalibrationOptions {
        seed: p.calibration_seed,
        min_new_tokens: p.min_new_tokens,
        max_new_tokens: p.max_new_tokens,
        batch: SCORED,
    };
    ctx.activity("calibrating");
    let samples = calibration::samples(ctx, policy, policy_tokenizer, &posts, &options)?;
    let same = sampler.is_none()
        || policy_tokenizer.to_json().into_stage_result()? == tokenizer.to_json().into_stage_result()?;
    let sequences = calibration::for_model(&samples, &posts, &mut encoder, same)?;
    let scores = raw_scores(model, &sequences.iter().collect::<Vec<_>>(), SCORED)?;
    let (mean, deviation) = calibration::mean_and_deviation(&scores.iter().map(|s| f64::from(*s)).collect::<Vec<_>>());
    if sequences.len() > 1 && deviation < SAME {
        ctx.warn(format!(
            "the model did not learn: all {} calibration samples score alike (standard deviation {})",
            sequences.len(),
            rounded(deviation)
        ));
    }
    ctx.metric("calibration_posts", posts.len() as f64);
    ctx.metric("calibration_score_mean", mean);
    ctx.metric("calibration_score_std", deviation);
    let centre = if p.centring == Centring::Calibration { mean } else { 0.0 };
    let scale = match p.normalise {
        Normalise::None => 1.0,
        Normalise::Calibration if deviation >= SAME => deviation,
        Normalise::Calibration => {
            let what = "`normalise: calibration`, but all calibration samples score alike";
            return Err(Error::user(what).help("look at `train_loss` and `lr`: the model did not learn"));
        }
    };
    let pairs = calibration::swapped_references(&posts, p.calibration_seed, &mut encoder)?;
    encoder.truncation.warn(ctx, "calibration prompts as the reward model reads them");
    let references = raw_scores(model, &pairs.iter().map(|(a, _)| a).collect::<Vec<_>>(), SCORED)?;
    let swapped = raw_scores(model, &pairs.iter().map(|(_, b)| b).collect::<Vec<_>>(), SCORED)?;
    let sensitivity = calibration::fact_sensitivity(&references, &swapped);
    if let Some(s) = sensitivity {
        for (name, value) in [("", s.mean), ("_low", s.low), ("_high", s.high), ("_n", s.n as f64)] {
            ctx.metric(format!("fact_sensitivity{name}"), value);
        }
    }
    Ok(Calibration { centre, scale, fact_sensitivity: sensitivity })
}
