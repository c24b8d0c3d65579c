//! Sampled tokens follow the distribution that transformers samples from: a chi-square test at p = 0.001.

use lm::{CounterRng, SampleOptions, sample};

use crate::fixture::Fixture;

const N: usize = 8000;

/// Counts of each token as the first of N responses to the fixture's prompt.
fn drawn(fixture: &Fixture, temperature: f64, top_p: f64, masked: bool) -> Vec<f64> {
    let prompts = vec![fixture.prompt.as_slice(); N];
    let rows: Vec<u64> = (0..N as u64).collect();
    let o = SampleOptions {
        temperature,
        top_p,
        min_new_tokens: usize::from(masked),
        max_new_tokens: 1,
        eos: fixture.eos.into(),
        greedy: false,
    };
    let mut seen = vec![0.0; fixture.numbers.expected("sampling/0").len()];
    for s in sample(&fixture.model(), &prompts, &o, &CounterRng([11; 32]), &rows).unwrap() {
        seen[s.ids[0] as usize] += 1.0;
    }
    seen
}

/// Whether the counts are consistent with `p`: Pearson's chi-square stays below its 0.999 quantile. Tokens expected
/// fewer than five times share a bin, as the approximation requires; an impossible token refutes `p` at once.
fn may_come_from(seen: &[f64], p: &[f64]) -> Result<(), String> {
    let total: f64 = seen.iter().sum();
    let (mut chi2, mut bins, mut rare) = (0.0, 0, (0.0, 0.0));
    let mut add = |expected: f64, seen: f64| {
        chi2 += (seen - expected).powi(2) / expected;
        bins += 1;
    };
    for (id, (&p, &seen)) in p.iter().zip(seen).enumerate() {
        let expected = p * total;
        if expected == 0.0 {
            if seen > 0.0 {
                return Err(format!("token {id} is impossible and was drawn {seen} times"));
            }
        } else if expected < 5.0 {
            rare = (rare.0 + expected, rare.1 + seen);
        } else {
            add(expected, seen);
        }
    }
    if rare.0 >= 5.0 {
        add(rare.0, rare.1);
    }
    assert!(bins > 4, "{bins} bins tell little");
    // Wilson and Hilferty's quantile of chi-square at p = 0.001.
    let k = f64::from(bins - 1);
    let limit = k * (1.0 - 2.0 / (9.0 * k) + 3.09 * (2.0 / (9.0 * k)).sqrt()).powi(3);
    if chi2 < limit { Ok(()) } else { Err(format!("chi-square {chi2:.1} of {bins} bins; the limit is {limit:.1}")) }
}

#[test]
fn sampled_tokens_follow_the_distribution_of_transformers() {
    for fixture in Fixture::all() {
        for (i, &(temperature, top_p, masked)) in fixture.sampling.iter().enumerate() {
            let seen = drawn(&fixture, temperature, top_p, masked);
            fixture.numbers.claim_by(&format!("sampling/{i}"), |p| may_come_from(&seen, p));
        }
    }
}
