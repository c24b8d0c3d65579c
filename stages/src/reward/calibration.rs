//! The fixed set of samples that scores are centred on, and the test of whether a reward model reads the post.

use std::path::Path;

use engine::context::Context;
use engine::error::{Error, Result};
use lm::{CausalLm, CounterRng, SampleOptions, Sequence, Tokenizer};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::SeedableRng;

use crate::corpus::{Facts, swap_facts};
use crate::error::IntoStageResult;
use crate::random::{below, bits_of, fixed_key};
use crate::train::by_length;
use crate::train::encode::{Encoder, response_text};
use crate::types::{FactSensitivity, Post, Posts, Split};

/// Settings of the sample set. They leave out the member's seed, so that all members and the gold model share one set.
#[derive(Clone, Copy, Debug)]
pub struct CalibrationOptions {
    pub seed: u64,
    pub min_new_tokens: usize,
    pub max_new_tokens: usize,
    /// Prompts sampled per batch.
    pub batch: usize,
}

/// One sample for one calibration post.
#[derive(Clone, Debug)]
pub struct CalibrationSample {
    pub sequence: Sequence,
    pub text: String,
    pub ended: bool,
}

/// The first `most` posts of split `calibration`.
pub fn calibration_posts(folder: &Path, most: usize) -> Result<Vec<Post>> {
    let mut posts = Vec::new();
    for post in Posts::open(folder)? {
        let post = post?;
        if posts.len() < most && post.is_in(Split::Calibration) {
            posts.push(post);
        }
    }
    Ok(posts)
}

/// One sample of `sampler` per post at temperature 1, seeded by (calibration seed, post id).
pub fn samples(
    ctx: &mut Context,
    sampler: &CausalLm,
    tokenizer: &Tokenizer,
    posts: &[Post],
    options: &CalibrationOptions,
) -> Result<Vec<CalibrationSample>> {
    let mut encoder = Encoder::new(tokenizer, sampler.config().window());
    let prompts = posts.iter().map(|post| encoder.prompt(post, options.max_new_tokens)).collect::<Result<Vec<_>>>()?;
    encoder.truncation.warn(ctx, "calibration prompts");
    let key = fixed_key(options.seed, "calibration");
    let draws = CounterRng(key);
    let how = SampleOptions {
        temperature: 1.0,
        top_p: 1.0,
        min_new_tokens: options.min_new_tokens,
        max_new_tokens: options.max_new_tokens,
        eos: tokenizer.eos().clone(),
        greedy: false,
    };
    let lengths: Vec<usize> = prompts.iter().map(Vec::len).collect();
    let mut samples: Vec<Option<CalibrationSample>> = vec![None; posts.len()];
    for numbers in by_length(&lengths, options.batch) {
        let batch: Vec<&[u32]> = numbers.iter().map(|&i| prompts[i].as_slice()).collect();
        let rows: Vec<u64> = numbers.iter().map(|&i| bits_of(&key, &posts[i].id)).collect();
        for (i, sampled) in
            numbers.into_iter().zip(lm::sample(sampler, &batch, &how, &draws, &rows).into_stage_result()?)
        {
            let text = response_text(tokenizer, &sampled.ids);
            let sequence = Sequence { prompt: prompts[i].clone(), response: sampled.ids };
            samples[i] = Some(CalibrationSample { sequence, text, ended: sampled.ended });
        }
    }
    samples.into_iter().collect::<Option<_>>().ok_or_else(|| Error::internal("a calibration prompt without a sample"))
}

/// The samples as sequences for another model: unchanged if it shares the sampler's tokenizer, otherwise encoded again.
pub fn for_model(
    samples: &[CalibrationSample],
    posts: &[Post],
    encoder: &mut Encoder<'_>,
    same_tokenizer: bool,
) -> Result<Vec<Sequence>> {
    let pairs = samples.iter().zip(posts);
    pairs
        .map(|(sample, post)| {
            if same_tokenizer { Ok(sample.sequence.clone()) } else { encoder.summary(post, &sample.text, sample.ended) }
        })
        .collect()
}

/// The reference of every post with facts, paired with a copy in which one to three facts are swapped.
pub fn swapped_references(posts: &[Post], seed: u64, encoder: &mut Encoder<'_>) -> Result<Vec<(Sequence, Sequence)>> {
    let key = fixed_key(seed, "fact sensitivity");
    let mut pairs = Vec::new();
    for post in posts {
        let Some(facts) = &post.facts else { continue };
        let facts =
            Facts::parse(facts).map_err(|e| Error::user(format!("post `{}`: its facts do not parse: {e}", post.id)))?;
        let mut rng = generator_of(&key, &post.id);
        let n = 1 + below(&mut rng, 3);
        if let Some(swapped) = swap_facts(&post.summary, &facts, n, &mut rng) {
            pairs.push((encoder.reference(post)?, encoder.summary(post, &swapped, true)?));
        }
    }
    Ok(pairs)
}

fn generator_of(key: &[u8; 32], name: &str) -> ChaCha12Rng {
    ChaCha12Rng::from_seed(*blake3::keyed_hash(key, name.as_bytes()).as_bytes())
}

/// Mean difference of scores with its normal 95% interval; `None` for fewer than two posts.
pub fn fact_sensitivity(references: &[f32], swapped: &[f32]) -> Option<FactSensitivity> {
    let differences: Vec<f64> = references.iter().zip(swapped).map(|(a, b)| f64::from(*a) - f64::from(*b)).collect();
    let n = differences.len();
    if n < 2 {
        return None;
    }
    let (mean, deviation) = mean_and_deviation(&differences);
    let half = 1.96 * deviation / (n as f64).sqrt();
    Some(FactSensitivity { mean, low: mean - half, high: mean + half, n: n as u64 })
}

/// Mean and sample standard deviation; the deviation is 0 for fewer than two values.
pub fn mean_and_deviation(values: &[f64]) -> (f64, f64) {
    let n = values.len() as f64;
    if values.is_empty() {
        return (0.0, 0.0);
    }
    let mean = values.iter().sum::<f64>() / n;
    let sum = values.iter().map(|v| (v - mean).powi(2)).sum::<f64>();
    (mean, if n > 1.0 { (sum / (n - 1.0)).sqrt() } else { 0.0 })
}

/// Pearson's correlation; 0 if either side is constant.
pub fn correlation(a: &[f32], b: &[f32]) -> f64 {
    let wide = |x: &[f32]| x.iter().map(|v| f64::from(*v)).collect::<Vec<_>>();
    let (a, b) = (wide(a), wide(b));
    let ((mean_a, sd_a), (mean_b, sd_b)) = (mean_and_deviation(&a), mean_and_deviation(&b));
    if sd_a == 0.0 || sd_b == 0.0 || a.len() < 2 {
        return 0.0;
    }
    let sum: f64 = a.iter().zip(&b).map(|(x, y)| (x - mean_a) * (y - mean_b)).sum();
    sum / ((a.len() - 1) as f64 * sd_a * sd_b)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_of_fact_sensitivity_covers_zero_when_swaps_make_no_difference() {
        let blind = fact_sensitivity(&[1.0, 2.0, 1.0, 2.0], &[2.0, 1.0, 2.0, 1.0]);
        assert!(blind.is_some_and(|s| s.mean == 0.0 && s.low < 0.0 && s.high > 0.0 && s.n == 4));
        let reads = fact_sensitivity(&[1.0, 1.1, 0.9, 1.0], &[0.0, 0.1, 0.1, 0.0]);
        assert!(reads.is_some_and(|s| s.low > 0.5));
        assert_eq!(fact_sensitivity(&[1.0], &[0.0]), None);
    }

    #[test]
    fn correlation_is_pearsons() {
        assert!((correlation(&[1.0, 2.0, 3.0], &[2.0, 4.0, 6.0]) - 1.0).abs() < 1e-12);
        assert!((correlation(&[1.0, 2.0, 3.0], &[3.0, 2.0, 1.0]) + 1.0).abs() < 1e-12);
        assert_eq!(correlation(&[1.0, 1.0], &[1.0, 2.0]), 0.0);
    }
}
