//! Groups scores by step and half, with bootstrap intervals over prompts.

use std::collections::{BTreeMap, BTreeSet};

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::SeedableRng;

use super::calibration::{Fits, split};
use crate::stats::{Interval, bootstrap_mean, mean, spearman, std};
use crate::types::{CurvePoint, Half, Score};

/// The steps at which samples were drawn, in ascending order.
pub fn steps(scores: &[Score]) -> Vec<i64> {
    scores.iter().map(|s| s.step).collect::<BTreeSet<_>>().into_iter().collect()
}

pub fn select(scores: &[Score], step: i64, half: Half, greedy: bool) -> impl Iterator<Item = &Score> {
    scores.iter().filter(move |s| s.step == step && s.half == half && s.greedy == greedy)
}

/// One row per (step, half, greedy) that has samples.
pub fn curve(scores: &[Score], fits: &Fits, resamples: usize) -> Vec<CurvePoint> {
    // A fixed seed: renaming or reseeding a stage should not move an interval.
    let mut rng = ChaCha12Rng::from_seed(blake3::derive_key("temper bootstrap v1", b""));
    let mut rows = Vec::new();
    for step in steps(scores) {
        for half in [Half::A, Half::B] {
            for greedy in [false, true] {
                let here: Vec<&Score> = select(scores, step, half, greedy).collect();
                let sft: BTreeMap<&str, f64> =
                    select(scores, 0, half, false).map(|s| (s.post_id.as_str(), s.gold)).collect();
                if !here.is_empty() && !sft.is_empty() {
                    rows.push(row((step, half, greedy), &here, &sft, fits, resamples, &mut rng));
                }
            }
        }
    }
    rows
}

fn row(
    (step, half, greedy): (i64, Half, bool),
    here: &[&Score],
    sft: &BTreeMap<&str, f64>,
    fits: &Fits,
    resamples: usize,
    rng: &mut ChaCha12Rng,
) -> CurvePoint {
    let of = |f: fn(&Score) -> f64| -> Vec<f64> { here.iter().map(|s| f(s)).collect() };
    let optional = |f: fn(&Score) -> Option<f64>| optional_of(here, f);
    let golds = of(|s| s.gold);
    let gold = bootstrap_mean(&golds, resamples, rng);
    let baseline: Vec<f64> = sft.values().copied().collect();
    let spread = std(&baseline).max(f64::MIN_POSITIVE);
    let paired = |f: &dyn Fn(f64, f64) -> f64| -> Vec<f64> {
        here.iter().filter_map(|s| Some(f(s.gold, *sft.get(s.post_id.as_str())?))).collect()
    };
    let gold_sd = bootstrap_mean(&paired(&|gold, sft| (gold - sft) / spread), resamples, rng);
    let win = |gold: f64, sft: f64| if gold == sft { 0.5 } else { f64::from(u8::from(gold > sft)) };
    let win_rate = bootstrap_mean(&paired(&win), resamples, rng);
    let quality: Option<Interval> = optional(|s| s.quality).map(|q| bootstrap_mean(&q, resamples, rng));
    let mu = of(|s| s.mean);
    let error = optional_of(here, |s| fits.gold_error(s));
    let members: Vec<&[f32]> = here.iter().map(|s| s.scores.as_slice()).collect();
    let parts = split(&members);
    let variance = optional(|s| s.variance);
    let proxy = bootstrap_mean(&of(|s| s.proxy), resamples, rng);
    let kl = bootstrap_mean(&of(|s| s.kl), resamples, rng);
    let length = bootstrap_mean(&of(|s| s.length as f64), resamples, rng);
    let eos_rate = bootstrap_mean(&of(|s| f64::from(u8::from(s.ended))), resamples, rng);
    CurvePoint {
        step,
        half,
        greedy,
        n: here.len() as i64,
        gold: gold.mean,
        gold_low: gold.low,
        gold_high: gold.high,
        gold_sd: gold_sd.mean,
        gold_sd_low: gold_sd.low,
        gold_sd_high: gold_sd.high,
        win_rate: win_rate.mean,
        win_rate_low: win_rate.low,
        win_rate_high: win_rate.high,
        proxy: proxy.mean,
        proxy_low: proxy.low,
        proxy_high: proxy.high,
        mu: mean(&mu),
        variance: variance.as_deref().map(mean),
        variance_offset: parts.map(|p| p.offset),
        variance_slope: parts.map(|p| p.slope),
        variance_rest: parts.map(|p| p.rest),
        kl: kl.mean,
        kl_low: kl.low,
        kl_high: kl.high,
        kl_exact: mean(&of(|s| s.kl_exact)),
        length: length.mean,
        length_low: length.low,
        length_high: length.high,
        eos_rate: eos_rate.mean,
        eos_rate_low: eos_rate.low,
        eos_rate_high: eos_rate.high,
        quality: quality.map(|q| q.mean),
        quality_low: quality.map(|q| q.low),
        quality_high: quality.map(|q| q.high),
        coverage: optional(|s| s.coverage).map(|x| mean(&x)),
        invented: optional(|s| s.invented).map(|x| mean(&x)),
        fluency: optional(|s| s.fluency).map(|x| mean(&x)),
        spearman_s2_error: variance.zip(error).and_then(|(s2, error)| spearman(&s2, &error)),
    }
}

/// Each sample's value, or `None` if any sample has none.
fn optional_of(here: &[&Score], f: impl Fn(&Score) -> Option<f64>) -> Option<Vec<f64>> {
    here.iter().map(|s| f(s)).collect()
}

/// The step with the highest sampled gold reward on `half`; the earliest one on ties.
pub fn best_on(rows: &[CurvePoint], half: Half) -> Option<i64> {
    let mut best: Option<&CurvePoint> = None;
    for row in rows.iter().filter(|r| r.half == half && !r.greedy) {
        if best.is_none_or(|b| row.gold > b.gold) {
            best = Some(row);
        }
    }
    best.map(|row| row.step)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub fn score(step: i64, post: usize, gold: f64) -> Score {
        Score {
            step,
            post_id: format!("p{post}"),
            half: if post.is_multiple_of(2) { Half::A } else { Half::B },
            greedy: false,
            gold,
            proxy: gold + 1.0,
            mean: gold,
            variance: Some(0.1 * post as f64),
            kl: step as f64,
            kl_exact: step as f64,
            scores: vec![gold as f32, gold as f32 + 1.0],
            length: 10,
            ended: true,
            quality: None,
            coverage: None,
            invented: None,
            fluency: None,
        }
    }

    #[test]
    fn gold_is_told_in_sft_deviations_above_sft() {
        let scores: Vec<Score> = (0..8).flat_map(|p| [score(0, p, p as f64), score(5, p, p as f64 + 2.0)]).collect();
        let rows = curve(&scores, &Fits::of(&scores), 200);
        let b = rows.iter().find(|r| r.step == 5 && r.half == Half::B).unwrap();
        let sd = std(&[1.0, 3.0, 5.0, 7.0]);
        assert!((b.gold_sd - 2.0 / sd).abs() < 1e-12);
        assert_eq!(b.win_rate, 1.0);
        let start = rows.iter().find(|r| r.step == 0 && r.half == Half::B).unwrap();
        assert_eq!((start.gold_sd, start.win_rate), (0.0, 0.5));
    }

    #[test]
    fn every_mean_lies_in_its_interval() {
        let scores: Vec<Score> = (0..40).flat_map(|p| [score(0, p, p as f64), score(5, p, (p * p) as f64)]).collect();
        for row in curve(&scores, &Fits::of(&scores), 200) {
            for (low, mean, high) in [
                (row.proxy_low, row.proxy, row.proxy_high),
                (row.kl_low, row.kl, row.kl_high),
                (row.length_low, row.length, row.length_high),
                (row.eos_rate_low, row.eos_rate, row.eos_rate_high),
            ] {
                assert!(low <= mean && mean <= high, "{low} {mean} {high}");
            }
            assert!(row.proxy_low < row.proxy_high);
        }
    }

    #[test]
    fn one_reward_model_has_no_variance() {
        let lone = |p| Score { variance: None, scores: vec![0.0], ..score(0, p, p as f64) };
        let scores: Vec<Score> = (0..8).map(lone).collect();
        let rows = curve(&scores, &Fits::of(&scores), 100);
        assert!(rows.iter().all(|r| r.variance.is_none() && r.spearman_s2_error.is_none()));
    }

    #[test]
    fn the_best_step_is_chosen_on_its_own_half_only() {
        let scores = vec![
            score(0, 0, 1.0),
            score(0, 1, 1.0),
            score(5, 0, 2.0),
            score(5, 1, 0.0),
            score(9, 0, 0.0),
            score(9, 1, 9.0),
        ];
        let rows = curve(&scores, &Fits::of(&scores), 100);
        assert_eq!(best_on(&rows, Half::A), Some(5));
    }
}
