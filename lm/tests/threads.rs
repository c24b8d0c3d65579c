//! The number of threads changes no byte.

mod common;

use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use common::*;
use lm::{
    AdamW, AdamWConfig, Batch, CausalLm, CounterRng, Dropout, Gpt2Config, InitStd, LoraConfig, ModelConfig, Precision,
    RewardModel, RewardPooling, SampleOptions, ScalarHead, Sequence, StatOptions, sample,
};
use rand::Rng;

const THREADS: &str = "TEMPER_LM_TEST_THREADS";
/// In place of a number of threads.
const CHANGING: &str = "changing";

fn hash(bytes: impl IntoIterator<Item = u32>) -> u64 {
    bytes.into_iter().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01b3))
}

fn hash_floats(values: &[f32]) -> u64 {
    hash(values.iter().map(|v| v.to_bits()))
}

/// Trains a model, then an adapter with a head, for some steps, and samples: every path that a pipeline takes.
fn work(config: ModelConfig, precision: Precision) -> Vec<u64> {
    let mut rng = rng(1);
    let vocab = config.vocab_size() as u32;
    let rows: Vec<Sequence> = (0..24)
        .map(|_| {
            let mut ids = |n: usize| (0..n).map(|_| rng.random_range(1..vocab)).collect::<Vec<_>>();
            let (prompt, response) = (ids(30), ids(17));
            Sequence::new(prompt, response)
        })
        .collect();
    let batch = Batch::new(&refs(&rows)).unwrap();
    let mut hashes = Vec::new();

    let lm = CausalLm::init(config, InitStd::InverseSqrtWidth, &mut rng).unwrap();
    let lm = lm.with_full_training().unwrap().with_precision(precision);
    let settings = AdamWConfig { beta1: 0.9, beta2: 0.999, eps: 1e-8, weight_decay: 0.1 };
    let mut adam = AdamW::new(lm.variables(), settings).unwrap();
    for _ in 0..3 {
        let loss = (lm.lm_loss(&batch, 0.3, None).unwrap().loss + lm.lm_loss(&batch, 0.0, None).unwrap().loss).unwrap();
        adam.step(&lm::backward(&loss).unwrap(), 1e-3, Some(1.0)).unwrap();
        hashes.push(u64::from(loss.to_scalar::<f32>().unwrap().to_bits()));
    }
    hashes.extend(lm.variables().iter().map(|v| hash_floats(&floats(&v.var))));

    let lora = LoraConfig { r: 8, alpha: 32.0, dropout: 0.1 };
    let lm = lm.frozen().with_adapter(&lora, &mut rng).unwrap();
    let head = ScalarHead::init(lm.config().width(), 0.1, &mut rng).unwrap();
    let reward = RewardModel { lm: lm.clone(), head, pool: RewardPooling::Sum };
    let mut adam = AdamW::new(reward.variables(), settings).unwrap();
    let mut dropout = Dropout::new(rng.clone());
    for _ in 0..3 {
        let scores = reward.scores(&batch, Some(&mut dropout)).unwrap();
        let o = StatOptions { min_new_tokens: 3, eos: EOS.into(), entropy: true };
        let stats = lm.token_stats(&lm.hidden_for_responses(&batch, None).unwrap(), &batch, &o).unwrap();
        let loss = (scores.sqr().unwrap().mean_all().unwrap() - stats.entropy.unwrap().mean_all().unwrap()).unwrap();
        let loss = (loss - stats.logprob.mean_all().unwrap()).unwrap();
        adam.step(&lm::backward(&loss).unwrap(), 1e-3, Some(1.0)).unwrap();
        hashes.push(u64::from(loss.to_scalar::<f32>().unwrap().to_bits()));
    }
    hashes.extend(reward.variables().iter().map(|v| hash_floats(&floats(&v.var))));

    let prompts: Vec<&[u32]> = (0..96).map(|i| &rows[i % 24].prompt[..10 + i % 20]).collect();
    let numbers: Vec<u64> = (0..96).collect();
    let o = SampleOptions {
        temperature: 1.0,
        top_p: 1.0,
        min_new_tokens: 2,
        max_new_tokens: 17,
        eos: EOS.into(),
        greedy: false,
    };
    for s in sample(&lm, &prompts, &o, &CounterRng([5; 32]), &numbers).unwrap() {
        hashes.extend([hash(s.ids), hash_floats(&s.logprobs)]);
    }
    hashes
}

/// Lets the number of threads change between 1 and 4 all the time.
fn change_threads() {
    let limit = Arc::new(AtomicUsize::new(2));
    lm::follow_threads(limit.clone());
    std::thread::spawn(move || {
        for threads in [1, 4, 2, 3].into_iter().cycle() {
            std::thread::sleep(Duration::from_millis(1));
            limit.store(threads, Ordering::Relaxed);
        }
    });
}

/// Not a test of its own: the test below runs it in child processes.
#[test]
fn child() {
    let Ok(threads) = std::env::var(THREADS) else { return };
    match threads.parse() {
        Ok(threads) => {
            lm::set_threads(threads);
            assert_eq!(rayon::current_num_threads(), threads);
            // A test is not the only thread of its process, so the parent sets the variables that `set_threads` must
            // not change.
            assert_eq!(candle_core::utils::barrier_pool().n_workers() + 1, threads, "candle's own pool");
        }
        Err(_) => change_threads(),
    }
    // One model on each side of the threshold at which sampling changes its threading.
    let of = |json| ModelConfig::from_json(json).unwrap();
    let gptj = |d: usize| {
        of(serde_json::json!({ "model_type": "gptj", "vocab_size": 300, "n_positions": 64, "n_embd": d,
            "n_layer": 2, "n_head": 3, "rotary_dim": 8 }))
    };
    let llama = |d: usize| {
        of(serde_json::json!({ "model_type": "llama", "vocab_size": 300, "max_position_embeddings": 64,
            "hidden_size": d, "intermediate_size": 2 * d, "num_hidden_layers": 2, "num_attention_heads": 6,
            "num_key_value_heads": 3 }))
    };
    let qwen3 = of(serde_json::json!({ "model_type": "qwen3", "vocab_size": 300, "max_position_embeddings": 64,
        "hidden_size": 96, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 6,
        "num_key_value_heads": 3, "head_dim": 20 }));
    for config in [
        Gpt2Config::new(300, 64, 96, 3, 3).into(),
        Gpt2Config::new(1000, 64, 216, 2, 6).into(),
        gptj(96),
        gptj(264),
        llama(96),
        llama(264),
        qwen3,
    ] {
        for precision in [Precision::F32, Precision::Bf16] {
            println!("hashes {:?}", work(config.clone(), precision));
        }
    }
}

#[test]
fn results_are_the_same_bytes_at_one_two_and_a_changing_number_of_threads() {
    let run = |threads: &str| {
        let output = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child", "--nocapture", "--test-threads=1"])
            .env(THREADS, threads)
            .env("RAYON_NUM_THREADS", if threads == CHANGING { "2" } else { threads })
            .env("CANDLE_NUM_THREADS", if threads == CHANGING { "2" } else { threads })
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let lines: Vec<String> = String::from_utf8(output.stdout)
            .unwrap()
            .lines()
            .filter_map(|l| l.find("hashes ").map(|at| l[at..].to_owned()))
            .collect();
        assert_eq!(lines.len(), 14);
        lines
    };
    let one = run("1");
    assert_eq!(one, run("2"));
    assert_eq!(one, run(CHANGING));
}

/// A pool thread that waits within one pass runs another one meanwhile. The vocabulary is large, so that adding the
/// table's second gradient (the LM head's after the embedding's, or the reverse) takes many tasks.
#[test]
fn concurrent_backward_passes_do_not_interfere() {
    let lm = model(Gpt2Config::new(20_000, 24, 12, 1, 3), 11);
    let loss = |seed: u64| {
        let mut rng = rng(seed);
        let mut ids = |n: usize| (0..n).map(|_| rng.random_range(1..20_000)).collect::<Vec<u32>>();
        let rows = [Sequence::new(ids(4), ids(4))];
        lm.lm_loss(&Batch::new(&refs(&rows)).unwrap(), 0.0, None).unwrap().loss
    };
    let pass = |seed: u64| -> Vec<u64> {
        let grads = lm::backward(&loss(seed)).unwrap();
        lm.variables().iter().map(|v| hash_floats(&floats(grads.get(&v.var).unwrap()))).collect()
    };
    let alone: Vec<_> = (0..4).map(pass).collect();
    std::thread::scope(|scope| {
        for (seed, alone) in (0..4).zip(&alone) {
            scope.spawn(move || (0..100).for_each(|_| assert_eq!(pass(seed), *alone)));
        }
    });
}
