//! Samples one token from one row of logits and one uniform number.

use temper_gemm::simd;
use temper_gemm::simd::{exp, max};

use crate::Eos;

/// Sampling settings.
#[derive(Debug, Clone, PartialEq)]
pub struct SampleOptions {
    /// Divides the logits before sampling; above 0.
    pub temperature: f64,
    /// Restricts sampling to the fewest most probable tokens that together reach this probability; in (0, 1], 1 is off.
    pub top_p: f64,
    /// The first `min_new_tokens` tokens cannot be EOS.
    pub min_new_tokens: usize,
    pub max_new_tokens: usize,
    /// Any of these ids ends a response.
    pub eos: Eos,
    /// Take the most probable token (the smallest id among equals) instead of drawing.
    pub greedy: bool,
}

/// Samples tokens; holds only reusable buffers.
pub(crate) struct TokenSampler<'a> {
    options: &'a SampleOptions,
    /// e^(l - max) of each token.
    weights: Vec<f32>,
    /// `weights` at the requested temperature.
    tempered_weights: Vec<f32>,
    order: Vec<u32>,
}

impl<'a> TokenSampler<'a> {
    pub fn new(options: &'a SampleOptions) -> Self {
        Self { options, weights: vec![], tempered_weights: vec![], order: vec![] }
    }

    /// The token at `step` of a response for the uniform `u` in [0, 1), and its log-probability at temperature 1 with
    /// EOS masked before the minimum. `None` if the logits do not form a distribution. Masks `logits` in place.
    ///
    /// Sums run in f64 in a fixed order: by id, or with top-p by falling probability, ties by id.
    pub fn sample(&mut self, logits: &mut [f32], step: usize, u: f64) -> Option<(u32, f32)> {
        let options = self.options;
        if step < options.min_new_tokens {
            options.eos.ids().iter().for_each(|&id| logits[id as usize] = f32::NEG_INFINITY);
        }
        let m = max_logit(logits);
        self.weights.resize(logits.len(), 0.0);
        exponentials(&mut self.weights, logits, m, 1.0);
        let total = sum(&self.weights);
        // The greatest logit has weight 1, so a valid sum is at least 1; a NaN or an infinity anywhere makes it
        // invalid.
        if !(total.is_finite() && total >= 1.0) {
            return None;
        }
        let id = if options.greedy {
            logits.iter().position(|&l| l == m)?
        } else {
            let (weights, total) = if options.temperature == 1.0 {
                (&self.weights, total)
            } else {
                self.tempered_weights.resize(logits.len(), 0.0);
                exponentials(&mut self.tempered_weights, logits, m, (1.0 / options.temperature) as f32);
                (&self.tempered_weights, sum(&self.tempered_weights))
            };
            if options.top_p < 1.0 {
                sample_top_p(weights, options.top_p, u, &mut self.order)
            } else {
                sample_by_id(weights, total, u)?
            }
        };
        let logprob = f64::from(logits[id] - m) - total.ln();
        Some((id as u32, logprob as f32))
    }
}

/// Sums in the order of ids.
fn sum(weights: &[f32]) -> f64 {
    weights.iter().map(|&w| f64::from(w)).sum()
}

/// The first token whose cumulative weight exceeds `u * total`.
fn sample_by_id(weights: &[f32], total: f64, u: f64) -> Option<usize> {
    let target = u * total;
    let mut sum = 0.0;
    for (id, &w) in weights.iter().enumerate() {
        sum += f64::from(w);
        if sum > target {
            return Some(id);
        }
    }
    // `u * total` may round up to `total`: then take the last token with a positive weight.
    weights.iter().rposition(|&w| w > 0.0)
}

/// Like `sample_by_id`, among the fewest most probable tokens that together reach `top_p`.
fn sample_top_p(weights: &[f32], top_p: f64, u: f64, order: &mut Vec<u32>) -> usize {
    order.clear();
    order.extend(0..weights.len() as u32);
    let weight = |id: u32| weights[id as usize];
    order.sort_unstable_by(|&a, &b| weight(b).total_cmp(&weight(a)).then(a.cmp(&b)));
    let total: f64 = order.iter().map(|&id| f64::from(weight(id))).sum();
    let mut kept = 0.0;
    let mut n = 0;
    while n < order.len() && (n == 0 || kept < top_p * total) {
        kept += f64::from(weight(order[n]));
        n += 1;
    }
    let target = u * kept;
    let mut sum = 0.0;
    for &id in &order[..n] {
        sum += f64::from(weight(id));
        if sum > target {
            return id as usize;
        }
    }
    order[n - 1] as usize
}

simd! {
    fn max_logit(x: &[f32]) -> f32 {
        max(x)
    }
}

simd! {
    /// `out = e^((x - m) scale)`.
    fn exponentials(out: &mut [f32], x: &[f32], m: f32, scale: f32) {
        for (o, &x) in out.iter_mut().zip(x) {
            *o = exp::<FMA>((x - m) * scale);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn default_options() -> SampleOptions {
        SampleOptions {
            temperature: 1.0,
            top_p: 1.0,
            min_new_tokens: 0,
            max_new_tokens: 9,
            eos: 0.into(),
            greedy: false,
        }
    }

    /// Logits of the probabilities 0.1, 0.4, 0.2, 0.3.
    fn logits() -> Vec<f32> {
        [0.1f32, 0.4, 0.2, 0.3].iter().map(|p| p.ln() + 5.0).collect()
    }

    fn sample(options: &SampleOptions, step: usize, u: f64) -> (u32, f32) {
        TokenSampler::new(options).sample(&mut logits(), step, u).unwrap()
    }

    #[test]
    fn a_uniform_number_selects_by_cumulative_probability_in_id_order() {
        let options = default_options();
        for (u, id) in [(0.0, 0), (0.09, 0), (0.11, 1), (0.49, 1), (0.51, 2), (0.69, 2), (0.71, 3), (0.999_999_999, 3)]
        {
            let (token, logprob) = sample(&options, 0, u);
            assert_eq!(token, id, "at {u}");
            assert!((logprob - [0.1f32, 0.4, 0.2, 0.3][id as usize].ln()).abs() < 1e-6);
        }
    }

    #[test]
    fn eos_is_impossible_before_the_minimum_and_the_rest_renormalised() {
        let options = SampleOptions { min_new_tokens: 2, ..default_options() };
        let (id, logprob) = sample(&options, 1, 0.0);
        assert_eq!(id, 1);
        assert!((logprob - (0.4f32 / 0.9).ln()).abs() < 1e-6);
        assert_eq!(sample(&options, 2, 0.0).0, 0);
        let greedy = SampleOptions { greedy: true, eos: 1.into(), min_new_tokens: 1, ..default_options() };
        assert_eq!((sample(&greedy, 0, 0.9).0, sample(&greedy, 1, 0.9).0), (3, 1));
        let several = SampleOptions { eos: Eos::new([0, 3]).unwrap(), min_new_tokens: 1, ..default_options() };
        for (u, expected) in [(0.0, 1), (0.66, 1), (0.67, 2), (0.999, 2)] {
            let (id, logprob) = sample(&several, 0, u);
            assert_eq!(id, expected, "at {u}");
            assert!((logprob - ([0.4f32, 0.2][id as usize - 1] / 0.6).ln()).abs() < 1e-6);
        }
    }

    #[test]
    fn top_p_keeps_the_fewest_tokens_and_reports_untempered_probabilities() {
        let options = SampleOptions { top_p: 0.65, ..default_options() };
        for i in 0..100 {
            let (id, logprob) = sample(&options, 0, f64::from(i) / 100.0);
            assert_eq!(
                id,
                if i < 57 {
                    1
                } else if i > 57 {
                    3
                } else {
                    id
                }
            );
            assert!((logprob - if id == 1 { 0.4f32.ln() } else { 0.3f32.ln() }).abs() < 1e-6);
        }
        assert_eq!(sample(&SampleOptions { top_p: 1e-9, ..default_options() }, 0, 0.99).0, 1);
    }

    #[test]
    fn temperature_changes_the_sample_but_not_the_log_probability() {
        let options = SampleOptions { temperature: 0.5, ..default_options() };
        // Squares: 0.01, 0.16, 0.04, 0.09 of 0.3.
        for (u, id) in [(0.03, 0), (0.04, 1), (0.56, 1), (0.57, 2), (0.69, 2), (0.71, 3)] {
            let (token, logprob) = sample(&options, 0, u);
            assert_eq!(token, id, "at {u}");
            assert!((logprob - [0.1f32, 0.4, 0.2, 0.3][id as usize].ln()).abs() < 1e-6);
        }
    }

    #[test]
    fn non_finite_logits_are_refused() {
        let options = default_options();
        for bad in [f32::NAN, f32::INFINITY] {
            let mut logits = logits();
            logits[2] = bad;
            assert_eq!(TokenSampler::new(&options).sample(&mut logits, 0, 0.5), None);
        }
        assert_eq!(TokenSampler::new(&options).sample(&mut [f32::NEG_INFINITY; 3], 0, 0.5), None);
    }
}
