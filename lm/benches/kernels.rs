//! Kernels against the same functions in stock candle operations, some alone and all in a whole training step:
//! milliseconds and ratios (stock / ours). Run it with nothing else on the machine:
//!
//!     MIMALLOC_PURGE_DELAY=-1 cargo bench -p temper-lm --bench kernels [-- T|M [rounds] [step [alone]]]
//!
//! Shapes: T is the default pipeline's policy, M a 14-million-parameter GPT-2. Medians of interleaved rounds.

use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_nn::{Optimizer, ParamsAdamW};
use lm::internals::{
    Activation, Attention, Block, BlockPass, Heads, Linear, LmHead, LoraAdapter, Mlp, Norm, TargetTokens, kernels,
    portable,
};
use lm::{AdamW, AdamWConfig, Precision, TokenStats, Variable};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

#[derive(Clone, Copy)]
struct Shape {
    name: &'static str,
    layers: usize,
    d: usize,
    heads: usize,
    vocab: usize,
    batch: usize,
    time: usize,
}

const SHAPES: [Shape; 2] = [
    Shape { name: "T", layers: 3, d: 96, heads: 4, vocab: 1536, batch: 32, time: 128 },
    Shape { name: "M", layers: 6, d: 384, heads: 6, vocab: 8192, batch: 8, time: 128 },
];
const RANK: usize = 8;

impl Shape {
    fn rows(self) -> usize {
        self.batch * self.time
    }

    /// Targets of the response part: the last 3/8 of each sequence.
    fn targets(self) -> Vec<u32> {
        (0..self.rows() * 3 / 8).map(|i| (i * 7919 % self.vocab) as u32).collect()
    }
}

fn normal(shape: &[usize], std: f64) -> Tensor {
    Tensor::randn(0f32, 1.0, shape, &Device::Cpu).and_then(|t| t * std).expect("random numbers")
}

fn var(shape: &[usize], std: f64) -> Tensor {
    Var::from_tensor(&normal(shape, std)).expect("a variable").into_inner()
}

/// The functions under test: ours or stock.
struct Implementation {
    norm: fn(&Tensor, &Norm) -> Result<Tensor>,
    block: fn(&Tensor, &Arc<Block>, BlockPass) -> Result<Tensor>,
    embedding: fn(&Tensor, &Tensor) -> Result<Tensor>,
    stats: fn(&Tensor, &LmHead, &TargetTokens, bool) -> Result<TokenStats>,
    backward: fn(&Tensor) -> Result<GradStore>,
}

const OURS: Implementation = Implementation {
    norm: kernels::norm,
    block: kernels::transformer_block,
    embedding: kernels::embedding,
    stats: kernels::token_stats,
    backward: kernels::backward,
};
const STOCK: Implementation = Implementation {
    norm: portable::norm,
    block: |x, block, pass| portable::run_block(x, block, &pass),
    embedding: portable::embedding,
    stats: portable::token_stats,
    backward: Tensor::backward,
};

fn milliseconds(f: impl FnOnce()) -> f64 {
    let start = Instant::now();
    f();
    start.elapsed().as_secs_f64() * 1e3
}

fn median(mut times: Vec<f64>) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get(times.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Runs both in turn and prints medians and their ratio.
fn compare(name: &str, rounds: usize, mut ours: impl FnMut(), mut stock: impl FnMut()) {
    ours();
    stock();
    let (mut a, mut b) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        a.push(milliseconds(&mut ours));
        b.push(milliseconds(&mut stock));
    }
    let (a, b) = (median(a), median(b));
    println!("{name:<34} {a:9.2} {b:9.2} {:6.2}x", b / a);
}

fn forward_and_backward(
    name: &str,
    rounds: usize,
    ours: impl Fn() -> Result<Tensor>,
    stock: impl Fn() -> Result<Tensor>,
) {
    let run = |f: &dyn Fn() -> Result<Tensor>| drop(black_box(f().expect("the forward pass")));
    compare(&format!("{name} forward"), rounds, || run(&ours), || run(&stock));
    // Random weights on the outputs make the incoming gradient realistic.
    let weights = normal(ours().expect("the forward pass").dims(), 1.0);
    let backward = |f: &dyn Fn() -> Result<Tensor>| {
        let y = f().expect("the forward pass");
        let loss = y.mul(&weights).and_then(|y| y.sum_all()).expect("a loss");
        drop(black_box(loss.backward().expect("the backward pass")));
    };
    compare(&format!("{name} forward + backward"), rounds, || backward(&ours), || backward(&stock));
}

fn kernel_by_kernel(s: Shape, rounds: usize) {
    let (n, d) = (s.rows(), s.d);
    let x = var(&[n, d], 1.0);
    for (name, bias) in [("layer norm", Some(var(&[d], 1.0))), ("RMS norm", None)] {
        let norm = Norm { bias, ..norm(d, false) };
        forward_and_backward(name, rounds, || kernels::norm(&x, &norm), || portable::norm(&x, &norm));
    }
    let table = var(&[s.vocab, d], 0.05);
    let ids: Vec<u32> = (0..n).map(|i| (i * 7919 % s.vocab) as u32).collect();
    let ids = Tensor::from_vec(ids, (n,), &Device::Cpu).expect("ids");
    forward_and_backward(
        "embedding",
        rounds,
        || kernels::embedding(&ids, &table),
        || portable::embedding(&ids, &table),
    );
    let targets = s.targets();
    let rows = TargetTokens { targets: &targets, forbidden: None };
    let hidden = var(&[targets.len(), d], 1.0);
    for (name, table, entropy) in [
        ("token stats, tied, trained", table.clone(), false),
        ("token stats, frozen", table.detach(), false),
        ("token stats, frozen, entropy", table.detach(), true),
    ] {
        let head = LmHead { weight: table, bias: None, precision: Precision::F32 };
        forward_and_backward(
            name,
            rounds,
            || Ok(kernels::token_stats(&hidden, &head, &rows, entropy)?.logprob),
            || Ok(portable::token_stats(&hidden, &head, &rows, entropy)?.logprob),
        );
    }
}

fn kept(tensor: Tensor, frozen: bool) -> Tensor {
    if frozen { tensor.detach() } else { tensor }
}

fn norm(d: usize, frozen: bool) -> Norm {
    let (weight, bias) = (kept(var(&[d], 1.0), frozen), Some(kept(var(&[d], 0.1), frozen)));
    Norm { name: String::new(), weight, bias, eps: 1e-5 }
}

fn linear(d_in: usize, d_out: usize, lora: bool) -> Linear {
    let adapter =
        || LoraAdapter { a: var(&[RANK, d_in], 0.02), b: var(&[d_out, RANK], 0.02), scale: 2.0, dropout: 0.0 };
    let (weight, bias) = (kept(var(&[d_in, d_out], 0.02), lora), Some(kept(var(&[d_out], 0.02), lora)));
    Linear { name: String::new(), weight, bias, adapter: lora.then(adapter) }
}

/// A GPT-2, reduced to the parts of a training step.
struct Model {
    shape: Shape,
    wte: Tensor,
    wpe: Tensor,
    blocks: Vec<Arc<Block>>,
    norm: Norm,
}

impl Model {
    fn new(shape: Shape, lora: bool) -> Self {
        let Shape { d, heads, .. } = shape;
        let block = |_| {
            Arc::new(Block {
                norm_1: norm(d, lora),
                attention: Attention {
                    qkv: vec![linear(d, 3 * d, lora)],
                    out: linear(d, d, lora),
                    qk_norm: None,
                    heads: Heads { query: heads, key_value: heads, width: d / heads },
                    rotary: None,
                },
                norm_2: Some(norm(d, lora)),
                mlp: Mlp {
                    up: vec![linear(d, 4 * d, lora)],
                    down: linear(4 * d, d, lora),
                    activation: Activation::GeluTanh,
                },
            })
        };
        Self {
            shape,
            wte: kept(var(&[shape.vocab, d], 0.02), lora),
            wpe: kept(var(&[shape.time, d], 0.02), lora),
            blocks: (0..shape.layers).map(block).collect(),
            norm: norm(d, lora),
        }
    }

    fn variables(&self) -> Vec<Variable> {
        let blocks = self.blocks.iter().flat_map(|block| block.tensors());
        let all = [&self.wte, &self.wpe].into_iter().chain(blocks).chain(self.norm.tensors());
        all.filter(|tensor| tensor.is_variable())
            .enumerate()
            .map(|(i, t)| Variable {
                name: i.to_string(),
                var: Var::from_tensor(t).expect("a variable"),
                decays: t.rank() == 2,
            })
            .collect()
    }

    fn loss(
        &self,
        implementation: &Implementation,
        ids: &Tensor,
        response: &Tensor,
        targets: &[u32],
    ) -> Result<Tensor> {
        let Shape { d, batch, time, .. } = self.shape;
        let tokens = (implementation.embedding)(ids, &self.wte)?.reshape((batch, time, d))?;
        let mut x = tokens.broadcast_add(&self.wpe)?.reshape((batch * time, d))?;
        for block in &self.blocks {
            x = (implementation.block)(&x, block, BlockPass::new(time, Precision::F32))?;
        }
        let h = (implementation.norm)(&x, &self.norm)?.index_select(response, 0)?;
        let output = LmHead { weight: self.wte.clone(), bias: None, precision: Precision::F32 };
        (implementation.stats)(&h, &output, &TargetTokens { targets, forbidden: None }, false)?
            .logprob
            .mean_all()?
            .neg()
    }
}

/// With `alone`, skips stock, for use with a profiler.
fn training_step(s: Shape, lora: bool, rounds: usize, alone: bool) {
    let model = Model::new(s, lora);
    let ids: Vec<u32> = (0..s.rows()).map(|i| (i * 7919 % s.vocab) as u32).collect();
    let ids = Tensor::from_vec(ids, (s.rows(),), &Device::Cpu).expect("ids");
    let targets = s.targets();
    let response: Vec<u32> = (0..s.rows() as u32).filter(|i| i % 8 >= 5).collect();
    let response = Tensor::from_vec(response, (targets.len(),), &Device::Cpu).expect("rows");
    let variables = model.variables();
    let mut ours = AdamW::new(variables.clone(), AdamWConfig::default()).expect("an optimiser");
    let vars = variables.into_iter().map(|v| v.var).collect();
    let mut stock =
        candle_nn::AdamW::new(vars, ParamsAdamW { lr: 1e-4, ..ParamsAdamW::default() }).expect("an optimiser");
    let mut times = [[(); 3]; 2].map(|implementation| implementation.map(|()| Vec::new()));
    for round in 0..=rounds {
        for (which, implementation) in [OURS, STOCK].iter().enumerate().take(if alone { 1 } else { 2 }) {
            let mut phases = [0.0; 3];
            let (mut loss, mut grads) = (None, None);
            phases[0] = milliseconds(|| loss = model.loss(implementation, &ids, &response, &targets).ok());
            let loss = loss.expect("the forward pass");
            phases[1] = milliseconds(|| grads = (implementation.backward)(&loss).ok());
            let grads = grads.expect("the backward pass");
            phases[2] = milliseconds(|| match which {
                0 => drop(ours.step(&grads, 1e-4, Some(1.0)).expect("a step")),
                _ => stock.step(&grads).expect("a step"),
            });
            // The first round warms up.
            if round > 0 {
                times[which].iter_mut().zip(phases).for_each(|(t, p)| t.push(p));
            }
        }
    }
    let name = if lora { "LoRA step" } else { "full step" };
    let medians = times.map(|implementation| implementation.map(median));
    for (i, phase) in ["forward", "backward", "optimiser"].iter().enumerate() {
        let (a, b) = (medians[0][i], medians[1][i]);
        println!("{:<34} {a:9.2} {b:9.2} {:6.2}x", format!("{name}: {phase}"), b / a);
    }
    let [a, b] = medians.map(|implementation| implementation.iter().sum::<f64>());
    let rate = |ms: f64| s.rows() as f64 / ms * 1e3;
    println!("{name:<34} {a:9.2} {b:9.2} {:6.2}x   {:.0} against {:.0} tokens/s", b / a, rate(a), rate(b));
}

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|a| !a.starts_with('-')).collect();
    let rounds = words.iter().find_map(|w| w.parse().ok()).unwrap_or(7);
    let chosen =
        |s: &Shape| !words.iter().any(|w| SHAPES.iter().any(|o| o.name == w)) || words.iter().any(|w| w == s.name);
    for s in SHAPES.into_iter().filter(chosen) {
        let Shape { name, layers, d, heads, vocab, batch, time } = s;
        println!(
            "\nshape {name}: {layers} layers, d {d}, {heads} heads, vocab {vocab}, batch {batch} x {time}, {:?}",
            DType::F32
        );
        println!("{:<34} {:>9} {:>9} {:>7}", "milliseconds", "ours", "stock", "ratio");
        let asked = |word: &str| words.iter().any(|w| w == word);
        if !asked("step") {
            kernel_by_kernel(s, rounds);
        }
        training_step(s, true, rounds, asked("alone"));
        training_step(s, false, rounds, asked("alone"));
    }
}
