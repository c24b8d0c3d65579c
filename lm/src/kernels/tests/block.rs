//! Whole transformer blocks of every family against stock candle operations.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor, Var};
use proptest::prelude::*;

use super::{agree, loss, noise, values, var};
use crate::kernels::{
    self, Activation, BITS, BlockArgs, DropoutMask, Heads, LinearRef, LmHeadRef, LoraRef, NormRef, Pairing, Rotary,
    TargetTokens,
};
use crate::{Precision, portable};

/// The differences between the families.
#[derive(Clone, Copy, Debug)]
pub struct Style {
    pub heads: usize,
    pub kv_heads: usize,
    pub width: usize,
    /// Queries, keys and values in one linear layer.
    pub joint: bool,
    /// Whether there are biases in attention's linear layers, in the MLP's, in the norms.
    pub biases: [bool; 3],
    /// Attention and MLP share one norm.
    pub parallel: bool,
    pub activation: Activation,
    pub pairing: Option<Pairing>,
}

pub const GPT2: Style = Style {
    heads: 2,
    kv_heads: 2,
    width: 6,
    joint: true,
    biases: [true; 3],
    parallel: false,
    activation: Activation::GeluTanh,
    pairing: None,
};
const GPTJ: Style =
    Style { joint: false, biases: [false, true, true], parallel: true, pairing: Some(Pairing::Interleaved), ..GPT2 };
pub const LLAMA: Style = Style {
    heads: 4,
    joint: false,
    biases: [false; 3],
    activation: Activation::SwiGlu,
    pairing: Some(Pairing::Halves),
    ..GPT2
};
pub const STYLES: [Style; 3] = [GPT2, GPTJ, LLAMA];

impl Style {
    /// The width of the residual stream, here equal to that of all heads.
    pub fn d(self) -> usize {
        self.heads * self.width
    }

    /// Input and output widths of the linear layers: of queries, keys and values; of attention's output; of the MLP's
    /// inputs; of its output.
    fn linear_shapes(self, inner: usize) -> Vec<(usize, usize)> {
        let (d, kv) = (self.d(), self.kv_heads * self.width);
        let mut linears = if self.joint { vec![(d, d + 2 * kv)] } else { vec![(d, d), (d, kv), (d, kv)] };
        linears.push((d, d));
        linears.extend(vec![(d, inner); self.activation.input_width(inner) / inner]);
        linears.push((inner, d));
        linears
    }
}

/// The tensors of a block: norms (weight, bias), linear layers (weight, bias), their adapters (A, B), dropout masks.
pub struct BlockTensors {
    style: Style,
    inner: usize,
    pub weights: Vec<Tensor>,
    adapters: Vec<Tensor>,
    /// Masks of the adapters' inputs, in the order of `linear_shapes` with one mask per input; then of the two residual
    /// branches.
    masks: Vec<DropoutMask>,
}

impl BlockTensors {
    /// Weights are variables unless there are adapters.
    pub fn new(style: Style, rows: usize, inner: usize, lora: bool, seed: u64) -> Result<Self> {
        Self::with_output_rows(style, [rows, rows], inner, lora, seed)
    }

    /// For `rows` rows, of which `output_rows` are computed after attention.
    fn with_output_rows(
        style: Style,
        [rows, output_rows]: [usize; 2],
        inner: usize,
        lora: bool,
        seed: u64,
    ) -> Result<Self> {
        let (d, linears) = (style.d(), style.linear_shapes(inner));
        let mut shapes = vec![vec![d]; 4];
        shapes.extend(linears.iter().flat_map(|&(i, o)| [vec![i, o], vec![o]]));
        let small = |shape: &[usize], seed: u64| noise(shape, seed) * (0.7 / (shape[0] as f64).sqrt());
        let weights = shapes.iter().zip(seed..).map(|(shape, seed)| {
            let t = small(shape, seed)?;
            if lora { Ok(t) } else { Ok(Var::from_tensor(&t)?.into_inner()) }
        });
        let adapters = linears.iter().flat_map(|&(i, o)| [vec![2, i], vec![o, 2]]).zip(seed + 50..);
        let mask = |rows: usize, width, which: u64| -> Result<DropoutMask> {
            if rows == 0 {
                return Ok(DropoutMask::new(0, 1.25, |_, _| {}));
            }
            let kept = noise(&[rows * width], seed ^ which << 41).ge(-0.5)?.to_vec1::<u8>()?;
            let word = |elements: &[u8]| elements.iter().rev().fold(0, |word, &kept| word << 1 | u32::from(kept));
            let words: Vec<u32> = kept.chunks(BITS).map(word).collect();
            Ok(DropoutMask::new(kept.len(), 1.25, |first, part| {
                part.copy_from_slice(&words[first..first + part.len()])
            }))
        };
        Ok(Self {
            style,
            inner,
            weights: weights.collect::<Result<_>>()?,
            adapters: match lora {
                true => adapters.map(|(shape, seed)| var(&shape, seed).into_inner()).collect(),
                false => vec![],
            },
            masks: vec![
                mask(rows, d, 0)?,
                mask(output_rows, style.d(), 1)?,
                mask(output_rows, d, 2)?,
                mask(output_rows, inner, 3)?,
                mask(output_rows, d, 4)?,
                mask(output_rows, d, 5)?,
            ],
        })
    }

    /// The variables that the style uses.
    pub fn variables(&self) -> Vec<Tensor> {
        let Style { biases: [attn, mlp, norm], parallel, .. } = self.style;
        let linears = self.style.linear_shapes(self.inner).len();
        let first_mlp = linears - 1 - self.style.activation.input_width(self.inner) / self.inner;
        let used = |i: usize| match i {
            1 => norm,
            2 => !parallel,
            3 => norm && !parallel,
            i if i >= 4 && i % 2 == 1 => {
                if (i - 4) / 2 >= first_mlp {
                    mlp
                } else {
                    attn
                }
            }
            _ => true,
        };
        let weights = self.weights.iter().enumerate().filter(|&(i, _)| used(i)).map(|(_, t)| t);
        weights.chain(&self.adapters).filter(|t| t.is_variable()).cloned().collect()
    }

    pub fn block(&self, time: usize, dropout: bool) -> BlockArgs<'_> {
        let style = self.style;
        let [attn, mlp, norm_bias] = style.biases;
        let mask = |i: usize| dropout.then(|| &self.masks[i]);
        let widths = style.linear_shapes(self.inner);
        let out = if style.joint { 1 } else { 3 };
        let linear = |i: usize, bias: bool| LinearRef {
            w: &self.weights[4 + 2 * i],
            bias: bias.then(|| &self.weights[5 + 2 * i]),
            adapter: self.adapters.get(2 * i).map(|a| LoraRef {
                a,
                b: &self.adapters[2 * i + 1],
                scale: 0.5,
                mask: mask(if i < out {
                    0
                } else if i == out {
                    1
                } else {
                    2 + usize::from(i + 1 == widths.len())
                }),
            }),
        };
        let norm =
            |i: usize| NormRef { weight: &self.weights[2 * i], bias: norm_bias.then(|| &self.weights[2 * i + 1]) };
        let down = widths.len() - 1;
        BlockArgs {
            norm_1: norm(0),
            qkv: (0..out).map(|i| linear(i, attn)).collect(),
            attn_out: linear(out, attn),
            norm_2: (!style.parallel).then(|| norm(1)),
            up: (out + 1..down).map(|i| linear(i, mlp)).collect(),
            down: linear(down, mlp),
            activation: style.activation,
            precision: Precision::F32,
            attn_dropout: mask(4),
            mlp_dropout: mask(5),
            rotary: style.pairing.map(|p| Arc::new(Rotary::new(p, &[0.7, 0.05], time))),
            eps: 1e-5,
            heads: Heads { query: style.heads, key_value: style.kv_heads, width: style.width },
            time,
            output_rows: None,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn a_block_agrees_with_its_parts_in_stock_operations(
        style in prop::sample::select(STYLES.to_vec()), group in 1usize..3, batch in 1usize..14, time in 1usize..150,
        kv_heads in 1usize..3, width in 4usize..9, inner in 1usize..40, lora: bool, dropout: bool, first: bool,
        seed in 0u64..1 << 40, part in prop::option::of(0f64..1.0), ends: bool,
    ) {
        // The kernel also accepts fewer key/value heads than GPT-2's joint layer has.
        let style = Style { heads: group * kv_heads, kv_heads, width, ..style };
        let batch = batch.min(600 / time).max(1);
        let (rows, d) = (batch * time, style.d());
        // Either random rows (some sequences with none, others with all), or the ends of sequences.
        let output_rows = part.map(|part| {
            let draws = noise(&[rows + batch], seed ^ 2).to_vec1::<f32>()?;
            let of = |row: usize| match ends {
                true => (row % time) as f64 >= time as f64 * (part + 0.3 * f64::from(draws[rows + row / time])),
                false => f64::from(draws[row] + 2.0 * draws[rows + row / time]) < 12.0 * part - 6.0,
            };
            candle_core::Result::Ok((0..rows).filter(|&row| of(row)).map(|row| row as u32).collect::<Vec<_>>())
        });
        let output_rows = output_rows.transpose()?;
        let count = output_rows.as_ref().map_or(rows, Vec::len);
        prop_assume!(count > 0);
        let tensors = BlockTensors::with_output_rows(style, [rows, count], inner, lora, seed)?;
        let block = BlockArgs { output_rows: output_rows.as_deref(), ..tensors.block(time, dropout) };
        let x = var(&[rows, d], seed ^ 1);
        // With frozen embeddings, a model's first block gets an untracked input.
        let input = if first { x.as_detached_tensor() } else { x.as_tensor().clone() };
        let mut vars: Vec<Var> = tensors.variables().iter().map(Var::from_tensor).collect::<Result<_>>()?;
        if !first {
            vars.push(x);
        }
        agree(
            &vars.iter().collect::<Vec<_>>(),
            || kernels::transformer_block(&input, &block),
            || portable::run_block(&input, &block),
        )?;
    }
}

/// Attention skips blocks of queries without an output row.
#[test]
fn query_blocks_without_an_output_row_are_skipped_correctly() -> Result<()> {
    for style in STYLES {
        for (time, lora, dropout) in [(128, false, false), (128, true, true), (150, false, true), (150, true, false)] {
            let from = [130 % time, 10, time - 1, time, 64];
            let rows = from.len() * time;
            let output_rows: Vec<u32> =
                (0..rows).filter(|row| row % time >= from[row / time]).map(|row| row as u32).collect();
            let tensors = BlockTensors::with_output_rows(style, [rows, output_rows.len()], 10, lora, 7)?;
            let block = BlockArgs { output_rows: Some(&output_rows), ..tensors.block(time, dropout) };
            let x = var(&[rows, style.d()], 1);
            let mut vars: Vec<Var> = tensors.variables().iter().map(Var::from_tensor).collect::<Result<_>>()?;
            vars.push(x.clone());
            agree(
                &vars.iter().collect::<Vec<_>>(),
                || kernels::transformer_block(&x, &block),
                || portable::run_block(&x, &block),
            )?;
        }
    }
    Ok(())
}

/// Bit-for-bit equality, which the reference cannot check.
#[test]
fn an_output_row_does_not_depend_on_the_selection() -> Result<()> {
    for style in STYLES.map(|s| Style { width: 48 / s.heads, ..s }) {
        let (time, rows, d) = (70, 280, style.d());
        let tensors = BlockTensors::new(style, rows, 4 * d, true, 5)?;
        let (x, block) = (noise(&[rows, d], 1), tensors.block(time, false));
        let output_rows = [3, 69, 138, 139, 279];
        let all = kernels::transformer_block(&x, &block)?.index_select(&Tensor::new(&output_rows, &Device::Cpu)?, 0)?;
        let some = kernels::transformer_block(&x, &BlockArgs { output_rows: Some(&output_rows), ..block })?;
        assert_eq!(values(&some), values(&all));
    }
    Ok(())
}

#[test]
fn a_block_without_output_rows_gives_an_empty_result() -> Result<()> {
    for (style, lora) in STYLES.into_iter().flat_map(|style| [(style, false), (style, true)]) {
        for precision in [Precision::F32, Precision::Bf16] {
            let tensors = BlockTensors::with_output_rows(style, [12, 0], 20, lora, 7)?;
            let block = BlockArgs { output_rows: Some(&[]), precision, ..tensors.block(4, true) };
            let x = var(&[12, style.d()], 1);
            let y = kernels::transformer_block(&x, &block)?;
            assert_eq!(y.dims(), [0, style.d()]);
            let grads = kernels::backward(&y.sum_all()?)?;
            for v in tensors.variables().iter().chain([x.as_tensor()]) {
                assert!(values(grads.get(v).expect("a gradient")).iter().all(|&g| g == 0.0));
            }
        }
    }
    Ok(())
}

#[test]
fn output_rows_out_of_order_are_refused() -> Result<()> {
    let tensors = BlockTensors::new(GPT2, 12, 20, false, 7)?;
    let block = BlockArgs { output_rows: Some(&[2, 1]), ..tensors.block(4, false) };
    let error = kernels::transformer_block(&noise(&[12, GPT2.d()], 1), &block).expect_err("an order").to_string();
    assert!(error.contains("row 1 after row 2"), "{error}");
    Ok(())
}

#[test]
fn a_frozen_block_builds_no_graph_and_passes_gradients_on() -> Result<()> {
    for style in STYLES {
        let mut tensors = BlockTensors::new(style, 12, 20, false, 7)?;
        tensors.weights.iter_mut().for_each(|w| *w = w.detach());
        let x = var(&[12, style.d()], 1);
        let block = tensors.block(4, false);
        assert!(!kernels::transformer_block(&x.as_detached_tensor(), &block)?.track_op());
        agree(&[&x], || kernels::transformer_block(&x, &block), || portable::run_block(&x, &block))?;
    }
    Ok(())
}

#[test]
fn a_trained_block_needs_our_backward() -> Result<()> {
    let tensors = BlockTensors::new(GPT2, 4, 8, true, 7)?;
    let y = kernels::transformer_block(&noise(&[4, GPT2.d()], 1), &tensors.block(4, false))?;
    let error = y.sum_all()?.backward().expect_err("the weights' gradients have nowhere to go").to_string();
    assert!(error.contains("lm::backward"), "{error}");
    Ok(())
}

#[test]
fn a_block_runs_backward_once() -> Result<()> {
    let tensors = BlockTensors::new(GPT2, 4, 8, true, 7)?;
    let y = kernels::transformer_block(&noise(&[4, GPT2.d()], 1), &tensors.block(4, false))?;
    kernels::backward(&y.sum_all()?)?;
    let error = kernels::backward(&y.sum_all()?).expect_err("what the forward pass left is used up").to_string();
    assert!(error.contains("runs backward once per forward pass"), "{error}");
    Ok(())
}

#[test]
fn gradients_of_a_variable_used_twice_add_up() -> Result<()> {
    let tensors = BlockTensors::new(GPT2, 6, 8, false, 3)?;
    let (x, block) = (var(&[6, GPT2.d()], 1), tensors.block(3, false));
    let vars: Vec<Var> = tensors.variables().iter().map(Var::from_tensor).collect::<Result<_>>()?;
    let twice = |f: &dyn Fn(&Tensor) -> Result<Tensor>| f(&f(&x)?);
    agree(
        &vars.iter().chain([&x]).collect::<Vec<_>>(),
        || twice(&|x| kernels::transformer_block(x, &block)),
        || twice(&|x| portable::run_block(x, &block)),
    )?;
    // A tied embedding gets gradients both through a kernel and through candle's own operations.
    let e = var(&[8, 6], 2);
    let ids = Tensor::new(&[3u32, 0, 7, 3], &Device::Cpu)?;
    let f = |ours: bool| -> Result<Tensor> {
        let rows = if ours { kernels::embedding(&ids, &e)? } else { portable::embedding(&ids, &e)? };
        rows.matmul(&e.t()?)
    };
    agree(&[&e], || f(true), || f(false))
}

/// All results and gradients of all kernels, at sizes that need several chunks.
fn everything() -> Result<Vec<Vec<u32>>> {
    let (n, time, v) = (640, 160, 7000);
    let mut all = vec![];
    for style in STYLES.map(|s| Style { width: 96 / s.heads, ..s }) {
        let d = style.d();
        let (x, w, b) = (var(&[n, d], 1), var(&[d], 2), var(&[d], 3));
        let (e, bias) = (var(&[v, d], 8), var(&[v], 9));
        let targets: Vec<u32> = (0..n as u32).map(|i| i * 11 % v as u32).collect();
        let ids = Tensor::from_slice(&targets, (n,), &Device::Cpu)?;
        let h = (&kernels::embedding(&ids, &e)? + x.as_tensor())?;
        let norm = NormRef { weight: &w, bias: style.joint.then_some(b.as_tensor()) };
        let h = kernels::norm(&h, &norm, 1e-5)?;
        let full = BlockTensors::new(style, n, 4 * d, false, 20)?;
        let lora = BlockTensors::new(style, n, 4 * d, true, 40)?;
        let h = kernels::transformer_block(&h, &full.block(time, true))?;
        let h = kernels::transformer_block(&h, &lora.block(time / 4, false))?;
        let h = kernels::transformer_block(&h, &lora.block(time / 4, true))?;
        let last: Vec<u32> = (0..n as u32).filter(|row| row % 160 >= 90).collect();
        let ends = BlockTensors::with_output_rows(style, [n, last.len()], 4 * d, false, 60)?;
        let h_last = kernels::transformer_block(&h, &BlockArgs { output_rows: Some(&last), ..ends.block(time, true) })?;
        let h = (h + h_last.mean_all()?.broadcast_as((n, d))?)?;
        let output =
            LmHeadRef { weight: &e, bias: style.parallel.then_some(bias.as_tensor()), precision: Precision::F32 };
        let stats = kernels::token_stats(&h, &output, &TargetTokens { targets: &targets, forbidden: None }, true)?;
        let entropy = stats.entropy.expect("asked for");
        let grads = kernels::backward(&(loss(&stats.logprob)? + loss(&entropy)?)?)?;
        all.extend([h, stats.logprob, entropy]);
        let trained = full.variables().into_iter().chain(lora.variables()).chain(ends.variables());
        let trained = trained.chain([x, w, e].map(|v| v.as_tensor().clone()));
        all.extend(trained.map(|v| grads.get(&v).expect("a gradient").clone()));
        all.extend([b, bias].iter().filter_map(|v| grads.get(v).cloned()));
    }
    Ok(all.iter().map(|t| values(t).iter().map(|v| v.to_bits()).collect()).collect())
}

#[test]
fn results_are_bitwise_equal_at_any_number_of_threads() -> Result<()> {
    let at = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().expect("a small pool");
        pool.install(everything)
    };
    let one = at(1)?;
    for threads in [2, 3, 4] {
        assert!(at(threads)? == one, "{threads} threads give other bits than one");
    }
    Ok(())
}
