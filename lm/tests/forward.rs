//! The results of the forward pass.

mod common;

use common::*;
use lm::{Batch, Gpt2Config, RewardModel, RewardPooling, ScalarHead, Sequence, StatOptions};

#[test]
fn the_forward_pass_agrees_with_a_plain_gpt2() {
    let lm = model(tiny_config(), 1);
    let reference = Reference::new(&lm);
    let rows = sequences();
    let hidden = lm.hidden(&Batch::new(&refs(&rows)).unwrap(), None).unwrap().to_vec3::<f32>().unwrap();
    for (row, hidden) in rows.iter().zip(&hidden) {
        let ids = [row.prompt.as_slice(), &row.response].concat();
        for (expected, h) in reference.hidden(&ids).iter().zip(hidden) {
            let expected: Vec<f32> = expected.iter().map(|&x| x as f32).collect();
            assert_close(h, &expected, 2e-5);
        }
    }
}

#[test]
fn padding_changes_nothing() {
    for config in families() {
        let lm = model(config, 2).frozen();
        let rows = sequences();
        let together = lm.hidden(&Batch::new(&refs(&rows)).unwrap(), None).unwrap();
        for (i, row) in rows.iter().enumerate() {
            let alone = lm.hidden(&Batch::new(&[row]).unwrap(), None).unwrap();
            let padded = together.get(i).unwrap().narrow(0, 0, row.len()).unwrap();
            assert_close(&floats(&padded), &floats(&alone), 1e-5);
        }
    }
}

#[test]
fn token_stats_are_those_of_the_masked_distribution() {
    let lm = model(tiny_config(), 3);
    let reference = Reference::new(&lm);
    let rows = sequences();
    let batch = Batch::new(&refs(&rows)).unwrap();
    let options = StatOptions { min_new_tokens: 3, eos: EOS.into(), entropy: true };
    let stats = lm.token_stats(&lm.hidden_for_responses(&batch, None).unwrap(), &batch, &options).unwrap();
    let (logprob, entropy) = (floats(&stats.logprob), floats(&stats.entropy.unwrap()));
    for (row, range) in rows.iter().zip(batch.row_ranges()) {
        let ids = [row.prompt.as_slice(), &row.response].concat();
        let first = row.prompt.len() - 1;
        let p = reference.probabilities(&ids, |t| (first..first + 3).contains(&t).then_some(EOS));
        for (j, at) in range.clone().enumerate() {
            let p = &p[first + j];
            let h: f64 = -p.iter().filter(|p| **p > 0.0).map(|p| p * p.ln()).sum::<f64>();
            assert!((f64::from(logprob[at]) - p[row.response[j] as usize].ln()).abs() < 2e-5);
            assert!((f64::from(entropy[at]) - h).abs() < 2e-5);
        }
    }
}

#[test]
fn the_loss_weighs_prompt_tokens_by_prompt_weight() {
    let lm = model(tiny_config(), 4);
    let reference = Reference::new(&lm);
    let rows = sequences();
    let batch = Batch::new(&refs(&rows)).unwrap();
    for weight in [0.0, 0.25, 1.0] {
        let (mut prompt, mut response, mut total, mut responses) = (0.0, 0.0, 0.0, 0.0);
        for row in &rows {
            let ids = [row.prompt.as_slice(), &row.response].concat();
            let p = reference.probabilities(&ids, |_| None);
            for t in 1..ids.len() {
                let nll = -p[t - 1][ids[t] as usize].ln();
                if t < row.prompt.len() {
                    prompt += weight * nll;
                    total += weight;
                } else {
                    response += nll;
                    total += 1.0;
                    responses += 1.0;
                }
            }
        }
        let loss = lm.lm_loss(&batch, weight, None).unwrap();
        let (got, got_response) =
            (loss.loss.to_scalar::<f32>().unwrap(), loss.response_nll.to_scalar::<f32>().unwrap());
        assert!((f64::from(got) - (prompt + response) / total).abs() < 2e-5);
        assert!((f64::from(got_response) - response / responses).abs() < 2e-5);
    }
}

#[test]
fn scores_follow_the_pooling() {
    let lm = model(tiny_config(), 5);
    let reference = Reference::new(&lm);
    let head = ScalarHead::init(12, 0.5, &mut rng(6)).unwrap();
    randomise(&head.variables(), 0.5, 7);
    let (w, b) = {
        let v = head.variables();
        (floats(&v[0].var), floats(&v[1].var)[0])
    };
    let rows = sequences();
    let batch = Batch::new(&refs(&rows)).unwrap();
    let value = |h: &[f64]| f64::from(b) + h.iter().zip(&w).map(|(h, w)| h * f64::from(*w)).sum::<f64>();
    for pool in [RewardPooling::Last, RewardPooling::Sum] {
        let reward = RewardModel { lm: lm.clone(), head: head.clone(), pool };
        for (row, score) in rows.iter().zip(floats(&reward.scores(&batch, None).unwrap())) {
            let hidden = reference.hidden(&[row.prompt.as_slice(), &row.response].concat());
            let expected = match pool {
                RewardPooling::Last => value(hidden.last().unwrap()),
                RewardPooling::Sum => hidden[row.prompt.len()..].iter().map(|h| value(h)).sum(),
            };
            assert!((f64::from(score) - expected).abs() < 5e-5, "{pool:?}: {score} and {expected}");
        }
    }
}

#[test]
fn impossible_batches_are_refused() {
    let lm = model(tiny_config(), 8);
    let error = |rows: &[Sequence]| match Batch::new(&refs(rows)) {
        Err(e) => e.to_string(),
        Ok(batch) => lm.hidden(&batch, None).unwrap_err().to_string(),
    };
    assert!(error(&[]).contains("at least one sequence"));
    assert!(error(&[Sequence::new([], [1])]).contains("empty prompt"));
    assert!(error(&[Sequence::new([31], [1])]).contains("token id 31 is not below the model's vocabulary of 31"));
    assert!(error(&[Sequence::new(vec![1; 25], [])]).contains("25 tokens, but the model has 24 positions"));
    let uneven = Gpt2Config::new(31, 24, 10, 2, 3);
    let error = lm::CausalLm::init(uneven, lm::InitStd::Fixed(0.1), &mut rng(1)).unwrap_err().to_string();
    assert!(error.contains("n_embd 10 is not a multiple of n_head 3"), "{error}");
}

#[test]
fn the_portable_path_passes_these_tests() {
    run_again_on_the_portable_path();
}
