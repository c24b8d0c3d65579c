//! Small random models, and an independent GPT-2 in f64 to compare with.
#![allow(dead_code, reason = "every test binary uses some of it")]

pub mod gguf;

use std::collections::HashMap;

use candle_core::Tensor;
use lm::{CausalLm, Gpt2Config, InitStd, ModelConfig, Sequence, Variable};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha12Rng;

pub const EOS: u32 = 0;

/// Runs the tests of this file again, in a process that computes by stock candle operations.
pub fn run_again_on_the_portable_path() {
    if std::env::var_os(lm::DEVICE_VARIABLE).is_some() {
        assert!(lm::is_portable());
        return;
    }
    let mut command = std::process::Command::new(std::env::current_exe().unwrap());
    let output = command.env(lm::DEVICE_VARIABLE, "portable").output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

pub fn rng(seed: u64) -> ChaCha12Rng {
    ChaCha12Rng::seed_from_u64(seed)
}

/// Two layers of width 12 with 3 heads, 31 tokens, 24 positions.
pub fn tiny_config() -> Gpt2Config {
    let mut config = Gpt2Config::new(31, 24, 12, 2, 3);
    config.eos_token_id = vec![EOS];
    config
}

/// A small model of each family, with the same vocabulary and window. In all but GPT-2, sizes that could be confused
/// with one another differ.
pub fn families() -> [ModelConfig; 4] {
    let gptj = serde_json::json!({
        "model_type": "gptj", "vocab_size": 31, "n_positions": 24, "n_embd": 12, "n_layer": 2, "n_head": 3,
        "rotary_dim": 2, "n_inner": 20, "eos_token_id": EOS,
    });
    let llama = serde_json::json!({
        "model_type": "llama", "vocab_size": 31, "max_position_embeddings": 24, "hidden_size": 12,
        "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 6, "rms_norm_eps": 1e-5, "eos_token_id": [EOS, 1],
    });
    let mut qwen3 = llama.clone();
    qwen3["model_type"] = "qwen3".into();
    let [gptj, llama, qwen3] = [gptj, llama, qwen3].map(|json| ModelConfig::from_json(json).unwrap());
    [tiny_config().into(), gptj, llama, qwen3]
}

/// Sets every variable, biases and norms too, to normal values of the given spread, so that mistakes show.
pub fn randomise(variables: &[Variable], std: f64, seed: u64) {
    let mut rng = rng(seed);
    for v in variables {
        let centre =
            if (v.name.contains("ln_") || v.name.contains("norm")) && v.name.ends_with("weight") { 1.0 } else { 0.0 };
        let values: Vec<f32> = (0..v.var.elem_count())
            .map(|_| {
                let normal: f64 = (0..12).map(|_| rng.random::<f64>()).sum::<f64>() - 6.0;
                (centre + std * normal) as f32
            })
            .collect();
        v.var.set(&Tensor::from_vec(values, v.var.shape(), v.var.device()).unwrap()).unwrap();
    }
}

/// A trainable model of the given shape, every tensor random.
pub fn model(config: impl Into<ModelConfig>, seed: u64) -> CausalLm {
    let lm = CausalLm::init(config, InitStd::Fixed(0.3), &mut rng(seed)).unwrap().with_full_training().unwrap();
    randomise(&lm.variables(), 0.3, seed + 1);
    lm
}

/// Three sequences of different lengths; the first ends with EOS.
pub fn sequences() -> Vec<Sequence> {
    vec![
        Sequence::new([5, 7, 11], [13, 2, 9, EOS]),
        Sequence::new([1, 2, 3, 4, 5, 6, 7, 8, 9], [30, 29]),
        Sequence::new([17], [4, 4, 4, 21, 22, 6, 1, 19]),
    ]
}

pub fn refs(rows: &[Sequence]) -> Vec<&Sequence> {
    rows.iter().collect()
}

pub fn floats(t: &Tensor) -> Vec<f32> {
    t.flatten_all().unwrap().to_vec1::<f32>().unwrap()
}

#[track_caller]
pub fn assert_close(a: &[f32], b: &[f32], tolerance: f32) {
    assert_eq!(a.len(), b.len());
    for (i, (a, b)) in a.iter().zip(b).enumerate() {
        assert!((a - b).abs() <= tolerance, "entry {i}: {a} and {b} differ by more than {tolerance}");
    }
}

/// GPT-2 in plain f64 loops, with the tensor names of Hugging Face's file.
pub struct Reference {
    config: Gpt2Config,
    tensors: HashMap<String, Vec<f64>>,
}

impl Reference {
    /// The reference for a model in full training.
    pub fn new(lm: &CausalLm) -> Self {
        let tensors = lm
            .variables()
            .into_iter()
            .map(|v| (v.name.replace("transformer.", ""), floats(&v.var).into_iter().map(f64::from).collect()))
            .collect();
        let ModelConfig::Gpt2(config) = lm.config().clone() else { panic!("the reference is a GPT-2") };
        Self { config: *config, tensors }
    }

    fn linear(&self, x: &[f64], name: &str) -> Vec<f64> {
        let (w, b) = (&self.tensors[&format!("{name}.weight")], &self.tensors[&format!("{name}.bias")]);
        let out = b.len();
        (0..out).map(|j| b[j] + x.iter().enumerate().map(|(i, x)| x * w[i * out + j]).sum::<f64>()).collect()
    }

    fn norm(&self, x: &[f64], name: &str) -> Vec<f64> {
        let (w, b) = (&self.tensors[&format!("{name}.weight")], &self.tensors[&format!("{name}.bias")]);
        let mean = x.iter().sum::<f64>() / x.len() as f64;
        let var = x.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / x.len() as f64;
        let scale = 1.0 / (var + self.config.layer_norm_epsilon).sqrt();
        x.iter().zip(w).zip(b).map(|((x, w), b)| (x - mean) * scale * w + b).collect()
    }

    /// The hidden state after the last norm at each position.
    pub fn hidden(&self, ids: &[u32]) -> Vec<Vec<f64>> {
        let (d, heads) = (self.config.n_embd, self.config.n_head);
        let width = d / heads;
        let (wte, wpe) = (&self.tensors["wte.weight"], &self.tensors["wpe.weight"]);
        let mut x: Vec<Vec<f64>> = ids
            .iter()
            .enumerate()
            .map(|(t, &id)| (0..d).map(|i| wte[id as usize * d + i] + wpe[t * d + i]).collect())
            .collect();
        for layer in 0..self.config.n_layer {
            let name = |s: &str| format!("h.{layer}.{s}");
            let qkv: Vec<Vec<f64>> =
                x.iter().map(|x| self.linear(&self.norm(x, &name("ln_1")), &name("attn.c_attn"))).collect();
            for t in 0..ids.len() {
                let mut mixed = vec![0.0; d];
                for h in 0..heads {
                    let q = &qkv[t][h * width..(h + 1) * width];
                    let scores: Vec<f64> = (0..=t)
                        .map(|s| {
                            let k = &qkv[s][d + h * width..d + (h + 1) * width];
                            q.iter().zip(k).map(|(q, k)| q * k).sum::<f64>() / (width as f64).sqrt()
                        })
                        .collect();
                    for (s, p) in softmax(&scores).into_iter().enumerate() {
                        for i in 0..width {
                            mixed[h * width + i] += p * qkv[s][2 * d + h * width + i];
                        }
                    }
                }
                for (x, y) in x[t].iter_mut().zip(self.linear(&mixed, &name("attn.c_proj"))) {
                    *x += y;
                }
            }
            for x in &mut x {
                let inner: Vec<f64> =
                    self.linear(&self.norm(x, &name("ln_2")), &name("mlp.c_fc")).into_iter().map(gelu).collect();
                for (x, y) in x.iter_mut().zip(self.linear(&inner, &name("mlp.c_proj"))) {
                    *x += y;
                }
            }
        }
        x.iter().map(|x| self.norm(x, "ln_f")).collect()
    }

    /// The next-token distribution after each position t, with the token `forbidden(t)` made impossible.
    pub fn probabilities(&self, ids: &[u32], forbidden: impl Fn(usize) -> Option<u32>) -> Vec<Vec<f64>> {
        let d = self.config.n_embd;
        let wte = &self.tensors["wte.weight"];
        let logits = |h: &Vec<f64>| -> Vec<f64> {
            wte.chunks_exact(d).map(|w| w.iter().zip(h).map(|(w, h)| w * h).sum()).collect()
        };
        self.hidden(ids)
            .iter()
            .enumerate()
            .map(|(t, h)| {
                let mut logits = logits(h);
                if let Some(id) = forbidden(t) {
                    logits[id as usize] = f64::NEG_INFINITY;
                }
                softmax(&logits)
            })
            .collect()
    }
}

fn gelu(x: f64) -> f64 {
    0.5 * x * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x.powi(3))).tanh())
}

pub fn softmax(x: &[f64]) -> Vec<f64> {
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let e: Vec<f64> = x.iter().map(|x| (x - max).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|e| e / sum).collect()
}
