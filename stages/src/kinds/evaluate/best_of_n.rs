//! Best-of-n: the expected value of the best of n samples by each objective, computed from all samples of a prompt.
//!
//! The policy that returns the best of n samples is at most log n - (n - 1) / n nats from the sampled policy (Stiennon
//! et al. 2020; Gao et al. 2023). This bound puts its curves next to PPO's without depending on any PPO setting.

use engine::context::Context;
use engine::error::{Error, Result};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::SeedableRng;
use serde_json::json;

use super::calibration::{self, Fits};
use super::judge::{self, Judge};
use super::{Params, curve, examples, note};
use crate::stats::{Interval, bootstrap_mean, mean, std, variance};
use crate::table;
use crate::types::Objective;
use crate::types::best_of_n::{BestOfNInfo, Candidate};
use crate::types::folder::write_json;
use crate::types::{BestOfN, BestOfPoint, Evaluation, EvaluationInfo, Half, Mechanism, Sample, Score, SftScale};

/// Judges all samples of the artifact at port `policy`, a few prompts at a time.
pub fn evaluate(params: &Params, ctx: &mut Context) -> Result<()> {
    let folder = ctx.one("policy")?.folder.clone();
    let info = BestOfN::info(&folder)?;
    let mut judge = Judge::new(ctx, info.split, Some(&info.tokenizer_digest.to_string()), info.max_new_tokens)?;
    let sizes = sizes(info.n);
    let mut table = table::Writer::create(&ctx.out().join(Evaluation::SCORES))?;
    let (mut firsts, mut first_scores) = (Vec::new(), Vec::new());
    let mut prompts: Vec<Prompt> = Vec::new();

    let mut samples = BestOfN::samples(&folder)?;
    let total = samples.rows();
    let together = judge::CHUNK.div_ceil(info.n) * info.n;
    loop {
        let rows: Vec<Candidate> = samples.by_ref().take(together).collect::<Result<_>>()?;
        if rows.is_empty() {
            break;
        }
        let (phi, rows): (Vec<Vec<f64>>, Vec<Sample>) = rows.into_iter().map(sample).unzip();
        let scores = judge.scores(&rows)?;
        for ((rows, scores), phi) in rows.chunks(info.n).zip(scores.chunks(info.n)).zip(phi.chunks(info.n)) {
            prompts.push(Prompt::new(scores, phi, &info, &sizes)?);
            firsts.push(rows[0].clone());
            first_scores.push(scores[0].clone());
        }
        scores.into_iter().try_for_each(|score| table.push(score))?;
        ctx.progress((prompts.len() * info.n) as u64, total, "samples", None);
    }
    table.finish()?;
    judge.warn(ctx);
    if !prompts.iter().any(|prompt| prompt.half == Half::B) {
        let what = format!("evaluate: none of the {} prompts at port `policy` lies in half B", prompts.len());
        return Err(Error::user(what).help("raise `prompts` of `generate.best_of_n`"));
    }

    let points = points(&prompts, &info.objectives, &sizes, params.resamples);
    for point in points.iter().filter(|p| p.half == Half::B && p.n == info.n as i64) {
        ctx.metric(format!("{}_gold_sd", point.objective), point.gold_sd);
        if let Some(quality) = point.quality {
            ctx.metric(format!("{}_quality", point.objective), quality);
        }
    }
    table::write(&ctx.out().join(Evaluation::BEST_OF_N), points)?;
    let fits = Fits::of(&first_scores);
    table::write(&ctx.out().join(Evaluation::CALIBRATION), calibration::bins(&first_scores, &fits))?;
    let rows = curve::curve(&first_scores, &fits, params.resamples);
    if let Some(row) = rows.iter().find(|row| row.half == Half::B) {
        note("start", row, ctx);
    }
    table::write(&ctx.out().join(Evaluation::CURVE), rows)?;
    let examples = examples::pick(&firsts, &first_scores, &[0], params.examples, judge.posts());
    table::write(&ctx.out().join(Evaluation::EXAMPLES), examples)?;

    let sensitivity = judge::gold_about(ctx)?.fact_sensitivity;
    let gold: Vec<f64> = prompts.iter().filter(|p| p.half == Half::B).flat_map(|p| p.gold.iter().copied()).collect();
    let more =
        json!({ "objectives": info.objectives, "n": info.n, "k": info.k, "beta": info.beta, "members": info.members });
    let info = EvaluationInfo {
        objective: Evaluation::BEST_OF_N_OBJECTIVE.to_owned(),
        lambda: 0.0,
        seed: info.seed,
        evaluation_seed: info.seed,
        steps: vec![0],
        chosen_step: 0,
        final_step: 0,
        sft: SftScale { gold_mean: mean(&gold), gold_std: std(&gold) },
        reads_the_post: sensitivity.as_ref().is_some_and(|s| s.reads_the_post()),
        fact_sensitivity: sensitivity,
        mechanism: Mechanism::default(),
        prompt_count: prompts.len() as u64,
        more: more.as_object().cloned().unwrap_or_default(),
    };
    write_json(&ctx.out().join(Evaluation::INFO), &info)
}

/// The powers of 2 below `n`, then `n`.
fn sizes(n: usize) -> Vec<usize> {
    std::iter::successors(Some(1), |size| Some(2 * size)).take_while(|size| *size < n).chain([n]).collect()
}

/// Upper bound on the KL of best-of-`n` to the sampled policy: log n - (n - 1) / n nats.
fn kl_bound(n: usize) -> f64 {
    let n = n as f64;
    n.ln() - (n - 1.0) / n
}

/// The probability that each sample is the best by `phi` among `size` samples drawn without replacement. For the i-th
/// of n in ascending order it is C(i - 1, size - 1) / C(n, size). Equal samples share their probability, as if ties
/// were broken at random.
fn weights(phi: &[f64], size: usize) -> Vec<f64> {
    let n = phi.len();
    let mut order: Vec<usize> = (0..n).collect();
    order.sort_by(|&a, &b| phi[a].total_cmp(&phi[b]));
    // From the best downwards, C(i - 1, size - 1) = C(i, size - 1) (i - size + 1) / i, so that no binomial overflows.
    let mut rising = vec![0.0; n];
    let mut weight = size as f64 / n as f64;
    for i in (size..=n).rev() {
        rising[i - 1] = weight;
        weight *= (i - size) as f64 / (i - 1).max(1) as f64;
    }
    let mut weights = vec![0.0; n];
    let mut start = 0;
    for equal in order.chunk_by(|&a, &b| phi[a] == phi[b]) {
        let shared = mean(&rising[start..start + equal.len()]);
        equal.iter().for_each(|&i| weights[i] = shared);
        start += equal.len();
    }
    weights
}

/// Expected values for the best of some samples of a prompt.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Best {
    gold: f64,
    quality: Option<f64>,
    proxy: f64,
    mu: f64,
    variance: Option<f64>,
    length: f64,
}

impl Best {
    fn of(size: usize, phi: &[f64], scores: &[Score]) -> Self {
        let weights = weights(phi, size);
        let expected = |of: &dyn Fn(&Score) -> Option<f64>| -> Option<f64> {
            scores.iter().zip(&weights).map(|(score, weight)| Some(of(score)? * weight)).sum()
        };
        let all = |of: fn(&Score) -> f64| scores.iter().zip(&weights).map(|(score, weight)| of(score) * weight).sum();
        Self {
            gold: all(|s| s.gold),
            quality: expected(&|s| s.quality),
            proxy: phi.iter().zip(&weights).map(|(phi, weight)| phi * weight).sum(),
            mu: all(|s| s.mean),
            variance: expected(&|s| s.variance),
            length: all(|s| s.length as f64),
        }
    }
}

/// The data kept per prompt.
struct Prompt {
    half: Half,
    /// Gold score of every sample.
    gold: Vec<f64>,
    /// `[objective][size]`
    best: Vec<Vec<Best>>,
}

impl Prompt {
    /// # Errors
    /// If these are not `n` samples of one prompt with a finite phi for each objective.
    fn new(scores: &[Score], phi: &[Vec<f64>], info: &BestOfNInfo, sizes: &[usize]) -> Result<Self> {
        let post = &scores[0].post_id;
        let wrong = |what: &str| Error::user(format!("evaluate: the samples of post `{post}`: {what}"));
        if scores.len() != info.n || scores.iter().any(|score| score.post_id != *post) {
            return Err(wrong(&format!("expected {} that stand next to each other", info.n)));
        }
        if phi.iter().any(|phi| phi.len() != info.objectives.len() || phi.iter().any(|phi| !phi.is_finite())) {
            return Err(wrong("expected a finite phi for each objective"));
        }
        let best = (0..info.objectives.len()).map(|objective| {
            let phi: Vec<f64> = phi.iter().map(|sample| sample[objective]).collect();
            sizes.iter().map(|&size| Best::of(size, &phi, scores)).collect()
        });
        Ok(Self { half: scores[0].half, gold: scores.iter().map(|s| s.gold).collect(), best: best.collect() })
    }
}

/// Converts a samples row for the judge, as a sample of the SFT model at step 0. Its proxy is the first objective's
/// phi.
fn sample(row: Candidate) -> (Vec<f64>, Sample) {
    let scores: Vec<f64> = row.scores.iter().map(|&score| f64::from(score)).collect();
    let sample = Sample {
        step: 0,
        post_id: row.post_id,
        half: row.half,
        greedy: false,
        ids: row.ids,
        text: row.text,
        ended: row.ended,
        logp: 0.0,
        logp_ref: 0.0,
        kl_exact: 0.0,
        scores: row.scores,
        proxy: row.phi.first().copied().unwrap_or(f64::NAN),
        mean: mean(&scores),
        variance: (scores.len() > 1).then(|| variance(&scores)),
    };
    (row.phi, sample)
}

/// One row per half that has prompts, per objective and size.
fn points(prompts: &[Prompt], objectives: &[Objective], sizes: &[usize], resamples: usize) -> Vec<BestOfPoint> {
    let mut rows = Vec::new();
    for half in [Half::A, Half::B] {
        let here: Vec<&Prompt> = prompts.iter().filter(|p| p.half == half).collect();
        if here.is_empty() {
            continue;
        }
        let spread = std(&here.iter().flat_map(|p| p.gold.iter().copied()).collect::<Vec<_>>()).max(f64::MIN_POSITIVE);
        let sft: Vec<f64> = here.iter().map(|p| mean(&p.gold)).collect();
        for (o, &objective) in objectives.iter().enumerate() {
            for (s, &size) in sizes.iter().enumerate() {
                let best: Vec<Best> = here.iter().map(|p| p.best[o][s]).collect();
                rows.push(point(objective, size, half, &best, &sft, spread, resamples));
            }
        }
    }
    rows
}

fn point(
    objective: Objective,
    size: usize,
    half: Half,
    best: &[Best],
    sft: &[f64],
    spread: f64,
    resamples: usize,
) -> BestOfPoint {
    // One seed for all numbers, so that every number is resampled over the same prompts.
    let interval = |x: &[f64]| {
        let seed = blake3::derive_key("temper bootstrap of best-of-n v1", b"");
        bootstrap_mean(x, resamples, &mut ChaCha12Rng::from_seed(seed))
    };
    let of = |of: fn(&Best) -> f64| interval(&best.iter().map(of).collect::<Vec<_>>());
    let optional = |of: fn(&Best) -> Option<f64>| -> Option<Interval> {
        best.iter().map(of).collect::<Option<Vec<f64>>>().map(|x| interval(&x))
    };
    let gold_sd: Vec<f64> = best.iter().zip(sft).map(|(best, sft)| (best.gold - sft) / spread).collect();
    let (gold, gold_sd, quality) = (of(|b| b.gold), interval(&gold_sd), optional(|b| b.quality));
    let (proxy, mu, variance, length) = (of(|b| b.proxy), of(|b| b.mu), optional(|b| b.variance), of(|b| b.length));
    BestOfPoint {
        objective,
        n: size as i64,
        half,
        prompts: best.len() as i64,
        kl: kl_bound(size),
        gold: gold.mean,
        gold_low: gold.low,
        gold_high: gold.high,
        gold_sd: gold_sd.mean,
        gold_sd_low: gold_sd.low,
        gold_sd_high: gold_sd.high,
        quality: quality.map(|q| q.mean),
        quality_low: quality.map(|q| q.low),
        quality_high: quality.map(|q| q.high),
        proxy: proxy.mean,
        proxy_low: proxy.low,
        proxy_high: proxy.high,
        mu: mu.mean,
        mu_low: mu.low,
        mu_high: mu.high,
        variance: variance.map(|v| v.mean),
        variance_low: variance.map(|v| v.low),
        variance_high: variance.map(|v| v.high),
        length: length.mean,
        length_low: length.low,
        length_high: length.high,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The mean over all subsets of `size` samples of the mean value of their best by `phi`.
    fn by_subsets(phi: &[f64], values: &[f64], size: usize) -> f64 {
        let subsets = (0_u32..1 << phi.len()).filter(|subset| subset.count_ones() as usize == size);
        let best = |subset: u32| {
            let inside = || (0..phi.len()).filter(move |i| subset & 1 << i != 0);
            let most = inside().map(|i| phi[i]).fold(f64::NEG_INFINITY, f64::max);
            mean(&inside().filter(|&i| phi[i] == most).map(|i| values[i]).collect::<Vec<_>>())
        };
        mean(&subsets.map(best).collect::<Vec<_>>())
    }

    fn expected(phi: &[f64], values: &[f64], size: usize) -> f64 {
        weights(phi, size).iter().zip(values).map(|(w, v)| w * v).sum()
    }

    /// phi from few distinct values, so that ties occur, paired with independent values.
    fn samples() -> impl Strategy<Value = (Vec<f64>, Vec<f64>)> {
        let pair = (prop_oneof![(-2..3_i32).prop_map(f64::from), -2.0..2.0_f64], -3.0..3.0_f64);
        proptest::collection::vec(pair, 2..9).prop_map(|rows| rows.into_iter().unzip())
    }

    proptest! {
        #[test]
        fn the_estimate_is_the_mean_over_all_subsets((phi, values) in samples()) {
            for size in 1..=phi.len() {
                let (found, right) = (expected(&phi, &values, size), by_subsets(&phi, &values, size));
                prop_assert!((found - right).abs() < 1e-9, "size {size}: {found} and {right}");
                prop_assert!((weights(&phi, size).iter().sum::<f64>() - 1.0).abs() < 1e-12);
            }
        }

        #[test]
        fn the_order_of_the_samples_does_not_matter((phi, values) in samples(), size in 1..3_usize) {
            let back = |x: &[f64]| x.iter().rev().copied().collect::<Vec<_>>();
            let (one, other) = (expected(&phi, &values, size), expected(&back(&phi), &back(&values), size));
            prop_assert!((one - other).abs() < 1e-12);
        }

        #[test]
        fn the_expected_phi_does_not_fall_as_n_grows((phi, _) in samples()) {
            let expected: Vec<f64> = (1..=phi.len()).map(|size| expected(&phi, &phi, size)).collect();
            prop_assert!(expected.windows(2).all(|pair| pair[0] <= pair[1] + 1e-12), "{expected:?}");
            prop_assert!((expected[0] - mean(&phi)).abs() < 1e-12, "the best of one is any");
        }
    }

    #[test]
    fn weights_are_ratios_of_binomials_and_ties_share_theirs() {
        let near = |found: Vec<f64>, right: &[f64]| {
            assert!(found.iter().zip(right).all(|(a, b)| (a - b).abs() < 1e-12), "{found:?} {right:?}");
        };
        // C(i - 1, 1) / C(4, 2) for i = 1 to 4.
        near(weights(&[0.1, 0.4, 0.2, 0.3], 2), &[0.0, 3.0 / 6.0, 1.0 / 6.0, 2.0 / 6.0]);
        near(weights(&[0.1, 0.3, 0.2, 0.3], 2), &[0.0, 2.5 / 6.0, 1.0 / 6.0, 2.5 / 6.0]);
        near(weights(&[1.0, 1.0, 1.0], 3), &[1.0 / 3.0; 3]);
        let many: Vec<f64> = (0..4096).map(f64::from).collect();
        assert!((weights(&many, 2048).iter().sum::<f64>() - 1.0).abs() < 1e-9, "no binomial overflows");
    }

    #[test]
    fn sizes_double_up_to_n_and_the_kl_is_the_analytic_bound() {
        assert_eq!(sizes(16), [1, 2, 4, 8, 16]);
        assert_eq!(sizes(6), [1, 2, 4, 6]);
        assert_eq!(sizes(2), [1, 2]);
        assert_eq!(kl_bound(1), 0.0);
        assert!((kl_bound(2) - 0.193_147_180_559_945_3).abs() < 1e-15);
        assert!((kl_bound(16) - 1.835_088_722_239_781).abs() < 1e-12);
    }
}
