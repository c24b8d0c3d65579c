//! candle's CUDA back end over `null_driver.c`, without a GPU: every operation has its kernel, what passes take, and the errors
//! that a user sees. It proves no number. `check.sh` compiles and runs it.
#![cfg(null_driver)]

#[path = "../common/mod.rs"]
mod common;

use std::process::Command;

use candle_core::Tensor;
use common::*;
use lm::{
    AdamW, AdamWConfig, Batch, CausalLm, CounterRng, Dropout, Gpt2Config, InitStd, LoraConfig, ModelConfig, Precision,
    RewardModel, RewardPooling, SampleOptions, ScalarHead, Sequence, StatOptions,
};

/// `struct Counts` of `null_driver.c`.
#[repr(C)]
struct Counts {
    kernels: usize,
    products: usize,
    allocations: usize,
    host_to_device: usize,
    device_to_host: usize,
    device_to_device: usize,
    fills: usize,
    syncs: usize,
    events: usize,
    bytes: usize,
    peak_bytes: usize,
}

unsafe extern "C" {
    fn null_take() -> Counts;
    fn null_release_threshold() -> usize;
    fn null_print_kernels();
}

/// Ends a part of the work: prints and returns its counts.
fn take(part: &str) -> Counts {
    // SAFETY: the null driver has this function, and no other thread of this process calls it.
    let c = unsafe { null_take() };
    println!(
        "{part:<9} kernels {:>5}  products {:>4}  allocations {:>5}  fills {:>4}  copies to device {:>4}, from {:>4}, within {:>4}  \
         syncs {:>4}  GB {:.2}, peak {:.2}",
        c.kernels,
        c.products,
        c.allocations,
        c.fills,
        c.host_to_device,
        c.device_to_host,
        c.device_to_device,
        c.syncs,
        c.bytes as f64 / 1e9,
        c.peak_bytes as f64 / 1e9,
    );
    assert_eq!(c.events, 0, "tensors are not tracked by events: there is but one stream");
    c
}

fn options(new: usize, eos: u32) -> SampleOptions {
    SampleOptions {
        temperature: 1.0,
        top_p: 1.0,
        min_new_tokens: 2,
        max_new_tokens: new,
        eos: eos.into(),
        greedy: false,
    }
}

/// One optimiser step on `loss`.
fn step(optimiser: &mut AdamW, loss: &Tensor) {
    assert_eq!(loss.to_scalar::<f32>().unwrap(), 0.0, "nothing is computed");
    optimiser.step(&lm::backward(loss).unwrap(), 1e-3, Some(1.0)).unwrap();
}

/// Trains, scores and samples a model in every way that stages do.
fn use_model(lm: &CausalLm) {
    let rows = sequences();
    let batch = Batch::new(&refs(&rows)).unwrap();
    let mut dropout = Dropout::with_model(0.1, rng(5));
    let mut optimiser = AdamW::new(lm.variables(), AdamWConfig::default()).unwrap();
    optimiser
        .decay_towards(|name| lm.variables().into_iter().find(|v| v.name == name).map(|v| v.var.detach()))
        .unwrap();
    step(&mut optimiser, &lm.lm_loss(&batch, 0.5, Some(&mut dropout)).unwrap().loss);

    let stats = StatOptions { min_new_tokens: 2, eos: EOS.into(), entropy: true };
    let hidden = lm.hidden_for_responses(&batch, Some(&mut dropout)).unwrap();
    let found = lm.token_stats(&hidden, &batch, &stats).unwrap();
    let loss = (found.logprob + found.entropy.unwrap()).unwrap().sum_all().unwrap();
    step(&mut optimiser, &loss);
    let frozen = lm.frozen();
    let hidden = frozen.hidden_for_responses(&batch, None).unwrap();
    frozen.kl_divergence(&hidden, &frozen, &hidden, &batch, &stats).unwrap();

    for pool in [RewardPooling::Last, RewardPooling::Sum] {
        let model = RewardModel { lm: lm.clone(), head: ScalarHead::zeros(lm.config().width()).unwrap(), pool };
        let scores = model.scores(&batch, Some(&mut dropout)).unwrap();
        let mut optimiser = AdamW::new(model.variables(), AdamWConfig::default()).unwrap();
        step(&mut optimiser, &scores.sum_all().unwrap());
    }
    let prompts: Vec<&[u32]> = rows.iter().map(|row| &row.prompt[..]).collect();
    lm::sample(lm, &prompts, &options(5, EOS), &CounterRng([3; 32]), &[0, 1, 2]).unwrap();
}

#[test]
fn every_family_trains_scores_and_samples_without_a_missing_kernel() {
    lm::use_device("cuda").unwrap();
    // SAFETY: as in `take`.
    assert_eq!(unsafe { null_release_threshold() }, usize::MAX, "freed memory stays in the pool");
    for config in families() {
        for precision in [Precision::F32, Precision::Bf16] {
            let full = model(config.clone(), 1).with_precision(precision);
            use_model(&full);
            let lora = LoraConfig { r: 2, alpha: 4.0, dropout: 0.5 };
            let adapted = full.with_adapter(&lora, &mut rng(2)).unwrap();
            use_model(&adapted);
            adapted.merged().unwrap();
        }
    }
    take("families");

    gpt2_fits_a_minibatch_beside_its_weights();
}

/// GPT-2 124M with LoRA, a minibatch of 6 sequences of 512 and 48 tokens. In the same test: a process has one device, and the
/// driver counts for all threads.
fn gpt2_fits_a_minibatch_beside_its_weights() {
    let config = ModelConfig::from(Gpt2Config::new(50_257, 1024, 768, 12, 12));
    let lora = LoraConfig { r: 8, alpha: 32.0, dropout: 0.05 };
    let lm =
        CausalLm::init(config, InitStd::Fixed(0.02), &mut rng(1)).unwrap().with_adapter(&lora, &mut rng(2)).unwrap();
    let id = |i: usize, t: usize| ((i * 7919 + t * 104_729) % 50_000) as u32;
    let ids = |i, range: std::ops::Range<usize>| range.map(|t| id(i, t)).collect::<Vec<_>>();
    let rows: Vec<Sequence> = (0..6).map(|i| Sequence::new(ids(i, 0..512), ids(i, 512..560))).collect();
    let batch = Batch::new(&refs(&rows)).unwrap();
    let mut optimiser = AdamW::new(lm.variables(), AdamWConfig::default()).unwrap();
    let mut dropout = Dropout::new(rng(5));
    let weights = take("weights").bytes;
    let mut peak = 0;
    let mut part = |name| peak = peak.max(take(name).peak_bytes);
    let loss = lm.lm_loss(&batch, 0.0, Some(&mut dropout)).unwrap().loss;
    part("forward");
    let grads = lm::backward(&loss).unwrap();
    part("backward");
    optimiser.step(&grads, 1e-3, Some(1.0)).unwrap();
    part("AdamW");
    drop((loss, grads));
    let merged = lm.merged().unwrap();
    take("merge");
    let prompts: Vec<&[u32]> = rows.iter().map(|row| &row.prompt[..]).collect();
    for new in [1, 9] {
        lm::sample(&merged, &prompts, &options(new, 50_256), &CounterRng([3; 32]), &[0, 1, 2, 3, 4, 5]).unwrap();
        take(&format!("decode {new}"));
    }
    // SAFETY: as in `take`.
    unsafe { null_print_kernels() };
    let above = (peak - weights) as f64 / 1e9;
    println!("peak above the weights: {above:.2} GB");
    assert!(above <= 3.5, "{above} GB");
}

/// What the device called `device` gives as an error of a process with this environment.
fn error_of(device: &str, environment: &[(&str, &str)]) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "use_a_device", "--nocapture", "--include-ignored"]).env(lm::DEVICE_VARIABLE, device);
    let output = command.envs(environment.iter().copied()).output().unwrap();
    String::from_utf8_lossy(&output.stdout).into_owned()
}

#[test]
#[ignore = "a part of the next one, in processes of its own"]
fn use_a_device() {
    let lm = CausalLm::init(Gpt2Config::new(5000, 24, 256, 2, 4), InitStd::Fixed(0.02), &mut rng(1));
    println!("{}", lm.map_or_else(|error| error.to_string(), |_| "it works".to_owned()));
}

#[test]
fn what_a_user_of_a_gpu_meets_is_told() {
    let cases: [(&str, &[(&str, &str)], &[&str]); 7] = [
        ("cuda", &[], &["it works"]),
        ("cuda:1", &[], &["there is no CUDA device 1", "1 device", "0 to 0", "nvidia-smi"]),
        ("cuda:1", &[("NULL_DEVICES", "2")], &["it works"]),
        ("cuda", &[("NULL_MEMORY_POOLS", "0")], &["it works"]),
        ("cuda", &[("NULL_DEVICES", "0")], &["no CUDA device", "CUDA_VISIBLE_DEVICES"]),
        ("cuda", &[("NULL_CAPABILITY", "75")], &["compute capability 7.5", "8.0", "CUDA_COMPUTE_CAP=75"]),
        ("cuda", &[("NULL_MEMORY_MIB", "10")], &["no memory left", "of 0.01 GiB", "tokens_at_once"]),
    ];
    for (device, environment, expected) in cases {
        let found = error_of(device, environment);
        for expected in expected {
            assert!(found.contains(expected), "{device} {environment:?}: {found}");
        }
    }
}
