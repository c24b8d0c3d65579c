//! Samples follow the model's distribution, whatever the batch.

mod common;

use common::*;
use lm::{
    Batch, CausalLm, CounterRng, Eos, Gpt2Config, LoraConfig, ModelConfig, SampleOptions, SampledResponse, Sequence,
    StatOptions, sample,
};

fn options() -> SampleOptions {
    SampleOptions {
        temperature: 1.0,
        top_p: 1.0,
        min_new_tokens: 2,
        max_new_tokens: 10,
        eos: EOS.into(),
        greedy: false,
    }
}

/// Twelve prompts of 1 to 12 tokens.
fn prompts() -> Vec<Vec<u32>> {
    (0..12u32).map(|i| (0..=i).map(|j| 1 + (7 * i + 3 * j) % 30).collect()).collect()
}

fn run(lm: &CausalLm, prompts: &[Vec<u32>], rows: &[u64], o: &SampleOptions) -> Vec<SampledResponse> {
    let prompts: Vec<&[u32]> = prompts.iter().map(Vec::as_slice).collect();
    sample(lm, &prompts, o, &CounterRng([3; 32]), rows).unwrap()
}

/// A model with layers too large for groups of rows to run in parallel, so that the work within a group does.
fn wide_config() -> Gpt2Config {
    let mut config = Gpt2Config::new(40, 24, 216, 2, 3);
    config.eos_token_id = vec![EOS];
    config
}

fn adapted(seed: u64) -> CausalLm {
    let lora = LoraConfig { r: 2, alpha: 4.0, dropout: 0.5 };
    let lm = model(tiny_config(), seed).with_adapter(&lora, &mut rng(seed)).unwrap();
    randomise(&lm.variables(), 0.2, seed);
    lm
}

/// Like [`wide_config`], for the other families.
fn wide_families() -> [ModelConfig; 3] {
    let gptj = serde_json::json!({
        "model_type": "gptj", "vocab_size": 40, "n_positions": 24, "n_embd": 264, "n_layer": 2, "n_head": 3,
        "rotary_dim": 16,
    });
    let llama = serde_json::json!({
        "model_type": "llama", "vocab_size": 40, "max_position_embeddings": 24, "hidden_size": 264,
        "intermediate_size": 500, "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 3,
    });
    let mut qwen3 = llama.clone();
    (qwen3["model_type"], qwen3["head_dim"]) = ("qwen3".into(), 44.into());
    [gptj, llama, qwen3].map(|json| ModelConfig::from_json(json).unwrap())
}

/// A model with so large a vocabulary that its LM head, which has a bias, is not packed into a second copy.
fn many_tokens() -> ModelConfig {
    let gptj = serde_json::json!({
        "model_type": "gptj", "vocab_size": (1 << 18) + 1, "n_positions": 24, "n_embd": 64, "n_layer": 1, "n_head": 2,
        "rotary_dim": 16,
    });
    ModelConfig::from_json(gptj).unwrap()
}

fn wide(seed: u64) -> CausalLm {
    spread(wide_config(), seed)
}

/// Weights of spread 0.3 are too large for a wide model; 0.05 gives it distributions with some entropy.
fn spread(config: impl Into<ModelConfig>, seed: u64) -> CausalLm {
    let lm = model(config, seed);
    randomise(&lm.variables(), 0.05, seed);
    lm
}

#[test]
fn decoding_with_a_cache_equals_the_full_forward_pass() {
    let narrow = families().map(|config| model(config, 1));
    let wide = [wide_config().into()].into_iter().chain(wide_families()).chain([many_tokens()]);
    let wide = wide.map(|config| spread(config, 3));
    for lm in narrow.into_iter().chain(wide).chain([adapted(2)]) {
        let prompts = prompts();
        let o = SampleOptions { min_new_tokens: 3, ..options() };
        let rows: Vec<u64> = (0..prompts.len() as u64).collect();
        let sampled = run(&lm, &prompts, &rows, &o);
        let sequences: Vec<Sequence> =
            prompts.iter().zip(&sampled).map(|(p, s)| Sequence::new(p.as_slice(), s.ids.as_slice())).collect();
        let batch = Batch::new(&refs(&sequences)).unwrap();
        let frozen = lm.frozen();
        let so = StatOptions { min_new_tokens: 3, eos: EOS.into(), entropy: false };
        let stats = frozen.token_stats(&frozen.hidden_for_responses(&batch, None).unwrap(), &batch, &so).unwrap();
        let kept: Vec<f32> = sampled.iter().flat_map(|s| s.logprobs.clone()).collect();
        assert!(kept.iter().any(|l| *l < -0.1), "the distributions have some entropy");
        assert_close(&floats(&stats.logprob), &kept, 1e-4);
    }
}

#[test]
fn a_rows_sample_does_not_depend_on_its_batch() {
    for lm in [model(tiny_config(), 4), wide(5)] {
        // Enough rows for several groups.
        let prompts: Vec<Vec<u32>> = prompts().into_iter().cycle().take(80).collect();
        let rows: Vec<u64> = (100..180).collect();
        let together = run(&lm, &prompts, &rows, &options());
        for i in (0..80).step_by(7) {
            let alone = run(&lm, &prompts[i..=i], &rows[i..=i], &options());
            assert_eq!(alone[0].ids, together[i].ids, "row {i}");
            assert_close(&alone[0].logprobs, &together[i].logprobs, 1e-4);
        }
        let reversed = run(
            &lm,
            &prompts.iter().rev().cloned().collect::<Vec<_>>(),
            &rows.iter().rev().copied().collect::<Vec<_>>(),
            &options(),
        );
        for (a, b) in together.iter().zip(reversed.iter().rev()) {
            assert_eq!(a.ids, b.ids);
        }
        assert_eq!(together, run(&lm, &prompts, &rows, &options()), "the same call gives the same bytes");
    }
}

#[test]
fn any_listed_eos_ends_a_response() {
    let lm = model(tiny_config(), 6);
    let prompts: Vec<Vec<u32>> = vec![vec![5, 6]; 300];
    let rows: Vec<u64> = (0..300).collect();
    let eos = Eos::new([EOS, 7, 11, 20]).unwrap();
    let sampled = run(&lm, &prompts, &rows, &SampleOptions { eos: eos.clone(), ..options() });
    let mut last: Vec<u32> = sampled.iter().filter(|s| s.ended).map(|s| s.ids[s.ids.len() - 1]).collect();
    last.sort_unstable();
    last.dedup();
    assert_eq!(last, eos.ids(), "each of them ends some");
    for s in &sampled {
        let at = s.ids.iter().position(|&id| eos.contains(id));
        assert_eq!(at.map(|at| at + 1), s.ended.then_some(s.ids.len()));
        assert!(at.is_none_or(|at| at >= 2), "none before the minimum");
    }
}

#[test]
fn eos_ends_a_response_and_never_comes_before_the_minimum() {
    // Nearly uniform over 31 tokens, so that EOS comes up often.
    let lm = model(tiny_config(), 6);
    randomise(&lm.variables(), 0.1, 6);
    let prompts: Vec<Vec<u32>> = prompts().into_iter().cycle().take(300).collect();
    let rows: Vec<u64> = (0..300).collect();
    for min_new_tokens in [0, 1, 5] {
        let o = SampleOptions { min_new_tokens, ..options() };
        let sampled = run(&lm, &prompts, &rows, &o);
        let ended = sampled.iter().filter(|s| s.ended).count();
        assert!(ended > 10 && ended < 290, "{ended} of 300 ended");
        for s in &sampled {
            assert_eq!(s.ids.len(), s.logprobs.len());
            assert_eq!(s.ended, s.ids.last() == Some(&EOS));
            assert!(s.ended || s.ids.len() == 10);
            assert!(!s.ids[..s.ids.len() - 1].contains(&EOS));
            assert!(!s.ended || s.ids.len() > min_new_tokens);
        }
        let shortest = sampled.iter().map(|s| s.ids.len()).min().unwrap();
        assert_eq!(shortest, min_new_tokens + 1, "the minimum is not exceeded needlessly");
    }
}

#[test]
fn sampled_tokens_follow_the_models_distribution() {
    let lm = model(tiny_config(), 7);
    let reference = Reference::new(&lm);
    let prompt = vec![3u32, 14, 15];
    const N: usize = 20_000;
    let prompts = vec![prompt.clone(); N];
    let rows: Vec<u64> = (0..N as u64).collect();
    for (temperature, top_p, min) in [(1.0, 1.0, 0), (1.0, 1.0, 1), (0.6, 1.0, 0), (1.0, 0.8, 0), (1.7, 0.9, 1)] {
        let o = SampleOptions { temperature, top_p, min_new_tokens: min, max_new_tokens: 1, ..options() };
        let sampled = run(&lm, &prompts, &rows, &o);
        let p = reference.probabilities(&prompt, |_| (min > 0).then_some(EOS)).pop().unwrap();
        let expected = {
            let tempered: Vec<f64> = p.iter().map(|p| p.powf(1.0 / temperature)).collect();
            let total: f64 = tempered.iter().sum();
            let mut order: Vec<usize> = (0..p.len()).collect();
            order.sort_by(|&a, &b| tempered[b].total_cmp(&tempered[a]));
            let mut kept = vec![0.0; p.len()];
            let mut sum = 0.0;
            for id in order {
                if sum < top_p * total {
                    kept[id] = tempered[id];
                }
                sum += tempered[id];
            }
            let total: f64 = kept.iter().sum();
            kept.iter().map(|k| k / total * N as f64).collect::<Vec<f64>>()
        };
        let mut seen = vec![0.0; p.len()];
        for s in &sampled {
            seen[s.ids[0] as usize] += 1.0;
            let exact = p[s.ids[0] as usize].ln();
            assert!((f64::from(s.logprobs[0]) - exact).abs() < 1e-4, "the untempered log-probability");
        }
        // Rare tokens share a bin, as the approximation needs at least 5 in each.
        let (mut chi2, mut bins, mut rare) = (0.0, 0, (0.0, 0.0));
        for (&e, &o) in expected.iter().zip(&seen) {
            if e == 0.0 {
                assert_eq!(o, 0.0, "an impossible token was drawn");
            } else if e < 5.0 {
                rare = (rare.0 + e, rare.1 + o);
            } else {
                chi2 += (o - e) * (o - e) / e;
                bins += 1;
            }
        }
        if rare.0 >= 5.0 {
            chi2 += (rare.1 - rare.0) * (rare.1 - rare.0) / rare.0;
            bins += 1;
        }
        // Wilson and Hilferty's quantile at p = 0.001.
        let k = f64::from(bins - 1);
        let limit = k * (1.0 - 2.0 / (9.0 * k) + 3.09 * (2.0 / (9.0 * k)).sqrt()).powi(3);
        assert!(bins > 4, "{bins} bins");
        assert!(chi2 < limit, "T {temperature}, top-p {top_p}: chi-square {chi2} of {bins} bins, limit {limit}");
    }
}

#[test]
fn greedy_takes_the_most_probable_token() {
    let lm = model(tiny_config(), 8);
    let reference = Reference::new(&lm);
    let o = SampleOptions { greedy: true, min_new_tokens: 10, ..options() };
    let prompts = prompts();
    let rows = vec![0; prompts.len()];
    for (prompt, s) in prompts.iter().zip(run(&lm, &prompts, &rows, &o)) {
        let ids = [prompt.as_slice(), &s.ids].concat();
        let p = reference.probabilities(&ids, |_| Some(EOS));
        for (t, &id) in s.ids.iter().enumerate() {
            let p = &p[prompt.len() + t - 1];
            let best = p.iter().copied().fold(0.0, f64::max);
            assert!(p[id as usize] >= best * (1.0 - 1e-4));
        }
    }
}

#[test]
fn draws_of_different_rows_differ_and_equal_rows_agree() {
    let lm = model(tiny_config(), 9);
    let prompts = vec![vec![5, 6]; 3];
    let s = run(&lm, &prompts, &[4, 5, 4], &options());
    assert_eq!(s[0], s[2]);
    assert_ne!(s[0].ids, s[1].ids);
}

#[test]
fn invalid_requests_are_refused() {
    let lm = model(tiny_config(), 10);
    let error = |prompt: &[u32], rows: &[u64], o: SampleOptions| {
        sample(&lm, &[prompt], &o, &CounterRng([0; 32]), rows).unwrap_err().to_string()
    };
    let o = options();
    assert!(error(&[], &[0], o.clone()).contains("prompt 0 is empty"));
    assert!(error(&[31], &[0], o.clone()).contains("has id 31"));
    assert!(error(&[1; 15], &[0], o.clone()).contains("15 tokens and 10 new ones, but the model has 24 positions"));
    assert!(error(&[1], &[], o.clone()).contains("1 prompts but 0 row numbers"));
    assert!(error(&[1], &[0], SampleOptions { temperature: 0.0, ..o.clone() }).contains("temperature is 0"));
    assert!(error(&[1], &[0], SampleOptions { top_p: 0.0, ..o.clone() }).contains("top_p is 0"));
    assert!(error(&[1], &[0], SampleOptions { eos: 31.into(), ..o.clone() }).contains("EOS id 31"));
    let none = SampleOptions { max_new_tokens: 0, ..o.clone() };
    assert_eq!(run(&lm, &[vec![1]], &[0], &none)[0], SampledResponse { ids: vec![], logprobs: vec![], ended: false });
    assert!(run(&lm, &[], &[], &o).is_empty());
}

#[test]
fn non_finite_weights_are_reported_instead_of_sampled() {
    let lm = model(tiny_config(), 11);
    randomise(&lm.variables(), f64::INFINITY, 12);
    let error = sample(&lm, &[&[1, 2]], &options(), &CounterRng([0; 32]), &[u64::MAX]).unwrap_err();
    assert!(
        matches!(&error, lm::Error::NonFinite { quantity } if quantity.contains("response 1 of the batch")),
        "{error}"
    );
}

#[test]
fn the_portable_path_passes_these_tests() {
    run_again_on_the_portable_path();
}
