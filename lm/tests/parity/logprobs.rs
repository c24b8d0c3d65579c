//! Log-probabilities of real tokens, independent of padding, cache and the reference's precision.

use lm::{CounterRng, SampleOptions, sample};

use crate::fixture::{Fixture, logprobs};
use crate::numbers::Within;

const TOLERANCE: Within = Within::Each(1e-4);

#[test]
fn log_probabilities_agree_with_transformers() {
    for fixture in Fixture::all() {
        fixture.numbers.claim("logprobs", &logprobs(&fixture.model(), &fixture.rows), TOLERANCE);
    }
}

#[test]
fn log_probabilities_agree_at_any_padding_cache_and_precision() {
    for fixture in Fixture::all() {
        let ours = logprobs(&fixture.model(), &fixture.rows);
        let settings = fixture.numbers.names("logprobs/");
        assert_eq!(settings, ["f32/cache", "f32/left", "f32/right", "f64/cache", "f64/left", "f64/right"]);
        for setting in settings {
            fixture.numbers.claim(&format!("logprobs/{setting}"), &ours, TOLERANCE);
        }
    }
}

#[test]
fn greedy_responses_agree_with_transformers_with_left_padding() {
    for fixture in Fixture::all() {
        let prompts: Vec<&[u32]> = fixture.rows.iter().map(Vec::as_slice).collect();
        let expected = fixture.numbers.expected("greedy/ids");
        let new = expected.len() / prompts.len();
        let o = SampleOptions {
            temperature: 1.0,
            top_p: 1.0,
            min_new_tokens: new,
            max_new_tokens: new,
            eos: fixture.eos.into(),
            greedy: true,
        };
        let rows: Vec<u64> = (0..prompts.len() as u64).collect();
        let sampled = sample(&fixture.model(), &prompts, &o, &CounterRng([0; 32]), &rows).unwrap();
        let ids: Vec<f64> = sampled.iter().flat_map(|s| s.ids.iter().copied().map(f64::from)).collect();
        assert_eq!(ids, expected, "{}", fixture.family);
        let ours: Vec<f64> = sampled.iter().flat_map(|s| s.logprobs.iter().copied().map(f64::from)).collect();
        fixture.numbers.claim("greedy/logprobs", &ours, TOLERANCE);
    }
}
