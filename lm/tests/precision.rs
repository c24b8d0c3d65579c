//! Effects of bf16 products on a model, and things they leave unchanged.

mod common;

use candle_core::Tensor;
use common::*;
use lm::{
    AdamW, AdamWConfig, Batch, CausalLm, CounterRng, InitStd, LoraConfig, ModelConfig, Precision, SampleOptions,
    Sequence, StatOptions, Variable, sample,
};
use rand::Rng;

const LORA: LoraConfig = LoraConfig { r: 4, alpha: 8.0, dropout: 0.0 };

/// Models of each family, large enough for rounding errors to average as they do in real ones.
fn configs() -> [ModelConfig; 4] {
    let of = |json| ModelConfig::from_json(json).unwrap();
    [
        of(serde_json::json!({ "model_type": "gpt2", "vocab_size": 300, "n_positions": 64, "n_embd": 96,
            "n_layer": 3, "n_head": 4 })),
        of(serde_json::json!({ "model_type": "gptj", "vocab_size": 300, "n_positions": 64, "n_embd": 96,
            "n_layer": 3, "n_head": 3, "rotary_dim": 8 })),
        of(serde_json::json!({ "model_type": "llama", "vocab_size": 300, "max_position_embeddings": 64,
            "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6,
            "num_key_value_heads": 3 })),
        of(serde_json::json!({ "model_type": "qwen3", "vocab_size": 300, "max_position_embeddings": 64,
            "hidden_size": 96, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 6,
            "num_key_value_heads": 3, "head_dim": 16 })),
    ]
}

/// Learnable sequences: each token mostly determines the next.
fn rows(count: usize, seed: u64) -> Vec<Sequence> {
    let mut rng = rng(seed);
    (0..count)
        .map(|_| {
            let mut id = rng.random_range(1..300u32);
            let mut next = || {
                id = if rng.random_bool(0.9) { 1 + (id * 7 + 3) % 299 } else { rng.random_range(1..300) };
                id
            };
            let prompt: Vec<u32> = (0..20).map(|_| next()).collect();
            Sequence::new(prompt, (0..20).map(|_| next()).collect::<Vec<_>>())
        })
        .collect()
}

const SETTINGS: AdamWConfig = AdamWConfig { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.0 };

/// Trains for some steps and returns the loss before each.
fn train(lm: &CausalLm, steps: usize) -> Vec<f32> {
    let mut adam = AdamW::new(lm.variables(), SETTINGS).unwrap();
    let rows = rows(16, 3);
    let batch = Batch::new(&refs(&rows)).unwrap();
    (0..steps)
        .map(|_| {
            let loss = lm.lm_loss(&batch, 1.0, None).unwrap().loss;
            adam.step(&lm::backward(&loss).unwrap(), 2e-3, Some(1.0)).unwrap();
            loss.to_scalar::<f32>().unwrap()
        })
        .collect()
}

fn fresh(config: ModelConfig) -> CausalLm {
    CausalLm::init(config, InitStd::InverseSqrtWidth, &mut rng(1)).unwrap().with_full_training().unwrap()
}

/// A trained model, so that its distributions are not flat.
fn trained(config: ModelConfig) -> CausalLm {
    let lm = fresh(config);
    train(&lm, 40);
    lm
}

fn logprobs(lm: &CausalLm, batch: &Batch) -> Vec<f32> {
    let o = StatOptions { min_new_tokens: 0, eos: EOS.into(), entropy: false };
    floats(&lm.token_stats(&lm.hidden_for_responses(batch, None).unwrap(), batch, &o).unwrap().logprob)
}

fn root_mean_square(x: impl Iterator<Item = f32> + Clone) -> f32 {
    (x.clone().map(|x| x * x).sum::<f32>() / x.count() as f32).sqrt()
}

fn gradients(lm: &CausalLm, variables: &[Variable], batch: &Batch) -> Vec<Tensor> {
    let grads = lm::backward(&lm.lm_loss(batch, 1.0, None).unwrap().loss).unwrap();
    variables.iter().map(|v| grads.get(&v.var).unwrap().clone()).collect()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
}

/// Measured: root mean square 0.005 to 0.016 nats, largest 0.070.
#[test]
fn bf16_changes_log_probabilities_by_hundredths() {
    let rows = rows(16, 4);
    let batch = Batch::new(&refs(&rows)).unwrap();
    for config in configs() {
        let lm = trained(config);
        let exact = logprobs(&lm, &batch);
        let rounded = logprobs(&lm.with_precision(Precision::Bf16), &batch);
        let differences = exact.iter().zip(&rounded).map(|(a, b)| a - b);
        let (usual, largest) =
            (root_mean_square(differences.clone()), differences.fold(0.0, |m: f32, x| m.max(x.abs())));
        assert!(usual > 0.0 && usual < 0.02 && largest < 0.1, "root mean square {usual}, largest {largest}");
        assert_eq!(logprobs(&lm.with_precision(Precision::Bf16).with_precision(Precision::F32), &batch), exact);
    }
}

/// Measured: cosine of the whole gradient 0.99991 and more, of a single tensor's 0.99976 and more.
#[test]
fn bf16_gradients_have_the_direction_of_f32_gradients() {
    let rows = rows(16, 5);
    let batch = Batch::new(&refs(&rows)).unwrap();
    for config in configs() {
        let full = trained(config);
        let adapted = full.frozen().with_adapter(&LORA, &mut rng(6)).unwrap();
        randomise(&adapted.variables(), 0.05, 7);
        for lm in [full, adapted] {
            let variables = lm.variables();
            let exact = gradients(&lm, &variables, &batch);
            let rounded = gradients(&lm.with_precision(Precision::Bf16), &variables, &batch);
            let mut all = [vec![], vec![]];
            let mut worst = (1.0, "");
            for ((v, a), b) in variables.iter().zip(&exact).zip(&rounded) {
                let (a, b) = (floats(a), floats(b));
                let same = cosine(&a, &b);
                if same < worst.0 {
                    worst = (same, &v.name);
                }
                all[0].extend(a);
                all[1].extend(b);
            }
            let whole = cosine(&all[0], &all[1]);
            assert!(whole > 0.9998 && worst.0 > 0.999, "cosine {whole}, worst {worst:?}");
        }
    }
}

/// Measured: final losses within 0.1 % of each other.
#[test]
fn bf16_training_reaches_the_same_loss() {
    for config in configs() {
        let exact = train(&fresh(config.clone()), 40);
        let rounded = train(&fresh(config).with_precision(Precision::Bf16), 40);
        let (first, last, other) = (exact[0], exact[39], rounded[39]);
        assert!(last < 0.7 * first, "{first} to {last}");
        assert!((other - last).abs() < 0.01 * last, "{last} in f32, {other} in bf16");
    }
}

/// Measured: root mean square up to 0.0032 nats, largest 0.019; rounding depends on the last bits of attention's
/// output.
#[test]
fn bf16_samples_score_close_to_their_sampling_log_probabilities() {
    let rows = rows(8, 8);
    let prompts: Vec<&[u32]> = rows.iter().map(|r| &*r.prompt).collect();
    let o = SampleOptions {
        temperature: 1.0,
        top_p: 1.0,
        min_new_tokens: 0,
        max_new_tokens: 12,
        eos: EOS.into(),
        greedy: false,
    };
    for config in configs() {
        let full = trained(config).frozen();
        let adapted = full.with_adapter(&LORA, &mut rng(9)).unwrap();
        randomise(&adapted.variables(), 0.05, 10);
        for lm in [full, adapted.frozen()] {
            let lm = lm.with_precision(Precision::Bf16);
            let sampled = sample(&lm, &prompts, &o, &CounterRng([3; 32]), &[0, 1, 2, 3, 4, 5, 6, 7]).unwrap();
            let sequences: Vec<Sequence> =
                prompts.iter().zip(&sampled).map(|(p, s)| Sequence::new(p.to_vec(), s.ids.clone())).collect();
            let scored = logprobs(&lm, &Batch::new(&refs(&sequences)).unwrap());
            let drawn: Vec<f32> = sampled.iter().flat_map(|s| s.logprobs.clone()).collect();
            let differences = drawn.iter().zip(&scored).map(|(a, b)| a - b);
            let (usual, largest) =
                (root_mean_square(differences.clone()), differences.fold(0.0, |m: f32, x| m.max(x.abs())));
            assert!(usual < 0.01 && largest < 0.05, "root mean square {usual}, largest {largest}");
        }
    }
}
