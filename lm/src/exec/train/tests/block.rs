//! Whole transformer blocks of every family against stock candle operations.

use std::sync::Arc;

use candle_core::{Device, Result, Tensor, Var};
use proptest::prelude::*;

use super::{agree, head, loss, noise, norm, small, values, var};
use crate::Precision;
use crate::exec::portable;
use crate::exec::train::{self, BITS, BlockPass, DropoutMask, RotaryTable, TargetTokens};
use crate::model::adapter::LoraAdapter;
use crate::model::block::{Activation, Attention, Block, Heads, LinearShape, Mlp, NormShape, Pairing, Rotary};
use crate::model::linear::Linear;

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
    pub qk_norm: bool,
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
    qk_norm: false,
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
pub const QWEN3: Style = Style { qk_norm: true, ..LLAMA };
pub const STYLES: [Style; 4] = [GPT2, GPTJ, LLAMA, QWEN3];

impl Style {
    /// The width of the residual stream, here equal to that of all heads.
    pub fn d(self) -> usize {
        self.heads * self.width
    }

    fn shape(self, inner: usize) -> Block<LinearShape, NormShape> {
        let (d, kv) = (self.d(), self.kv_heads * self.width);
        let [attn, mlp, norm] = self.biases;
        let norm = |d| NormShape { module: "", d, bias: norm, eps: 1e-5 };
        let linear = |bias: bool, d_in, d_out| LinearShape { module: "", d_in, d_out, bias };
        let qkv = if self.joint { vec![d + 2 * kv] } else { vec![d, kv, kv] };
        let up = vec![inner; self.activation.input_width(inner) / inner];
        // Only part of a head is rotated.
        let frequencies = [1.0, 0.2][..(self.width / 2).clamp(1, 2)].to_vec();
        Block {
            norm_1: norm(d),
            attention: Attention {
                qkv: qkv.into_iter().map(|d_out| linear(attn, d, d_out)).collect(),
                out: linear(attn, d, d),
                qk_norm: self.qk_norm.then(|| [norm(self.width), norm(self.width)]),
                heads: Heads { query: self.heads, key_value: self.kv_heads, width: self.width },
                rotary: self.pairing.map(|pairing| Arc::new(Rotary { pairing, frequencies })),
            },
            norm_2: (!self.parallel).then(|| norm(d)),
            mlp: Mlp {
                up: up.into_iter().map(|d_out| linear(mlp, d, d_out)).collect(),
                down: linear(mlp, inner, d),
                activation: self.activation,
            },
        }
    }

    /// A random block. Its weights are variables, or with `lora` those of its adapters.
    pub fn block(self, inner: usize, lora: bool, seed: u64) -> Arc<Block> {
        let tensor = |seed: &mut u64, shape: &[usize]| {
            *seed += 1;
            if lora { small(shape, *seed) } else { var(shape, *seed).into_inner() }
        };
        let block = self.shape(inner).map(
            &mut (seed << 8),
            |seed, LinearShape { d_in, d_out, bias, .. }| Linear {
                name: String::new(),
                weight: tensor(seed, &[d_in, d_out]),
                bias: bias.then(|| tensor(seed, &[d_out])),
                adapter: lora.then(|| LoraAdapter {
                    a: var(&[2, d_in], *seed + 50).into_inner(),
                    b: var(&[d_out, 2], *seed + 90).into_inner(),
                    scale: 0.5,
                    dropout: 0.0,
                }),
            },
            |seed, NormShape { d, bias, .. }| {
                let weight = tensor(seed, &[d]);
                norm(&weight, bias.then(|| tensor(seed, &[d])).as_ref())
            },
        );
        Arc::new(block)
    }

    /// A pass over `rows` rows, of which `outputs` are computed after attention.
    pub fn pass(self, time: usize, dropout: bool, [rows, outputs]: [usize; 2], inner: usize) -> BlockPass {
        let mask = |rows: usize, width: usize, which: u64| {
            if rows == 0 {
                return DropoutMask::new(0, 1.25, |_, _| {});
            }
            let kept =
                noise(&[rows * width], which << 41).ge(-0.5).and_then(|kept| kept.to_vec1::<u8>()).expect("bits");
            let word = |elements: &[u8]| elements.iter().rev().fold(0, |word, &kept| word << 1 | u32::from(kept));
            let words: Vec<u32> = kept.chunks(BITS).map(word).collect();
            DropoutMask::new(kept.len(), 1.25, |first, part| part.copy_from_slice(&words[first..first + part.len()]))
        };
        let shape = self.shape(inner);
        let rotary = shape.attention.rotary.as_ref().map(|rotary| Arc::new(RotaryTable::new(rotary, time)));
        let mut pass = BlockPass { rotary, ..BlockPass::new(time, Precision::F32) };
        if dropout {
            let qkv = shape.attention.qkv.len();
            let masks = shape.linears().enumerate();
            let masks =
                masks.map(|(i, linear)| Some(mask(if i < qkv { rows } else { outputs }, linear.d_in, i as u64)));
            pass.adapter_dropout = masks.collect();
            pass.residual_dropout = [20, 21].map(|which| Some(mask(outputs, self.d(), which)));
        }
        pass
    }
}

/// The trained tensors.
fn variables(block: &Block) -> Vec<Var> {
    let trained = block.tensors().into_iter().filter(|tensor| tensor.is_variable());
    trained.map(|tensor| Var::from_tensor(tensor).expect("a variable")).collect()
}

/// The fused and the stock block agree on `x` and on the gradients of all variables, `x` among them if it is tracked.
fn blocks_agree(x: &Tensor, block: &Arc<Block>, pass: &BlockPass) -> Result<()> {
    let mut vars = variables(block);
    if x.is_variable() {
        vars.push(Var::from_tensor(x)?);
    }
    agree(
        &vars.iter().collect::<Vec<_>>(),
        || train::transformer_block(x, block, pass.clone()),
        || portable::run_block(x, block, pass),
    )
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
        let block = style.block(inner, lora, seed);
        let pass = BlockPass { output_rows, ..style.pass(time, dropout, [rows, count], inner) };
        let x = var(&[rows, d], seed ^ 1);
        // With frozen embeddings, a model's first block gets an untracked input.
        blocks_agree(&if first { x.as_detached_tensor() } else { x.into_inner() }, &block, &pass)?;
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
            let pass = style.pass(time, dropout, [rows, output_rows.len()], 10);
            let pass = BlockPass { output_rows: Some(output_rows), ..pass };
            blocks_agree(&var(&[rows, style.d()], 1), &style.block(10, lora, 7), &pass)?;
        }
    }
    Ok(())
}

/// Bit-for-bit equality, which the reference cannot check.
#[test]
fn an_output_row_does_not_depend_on_the_selection() -> Result<()> {
    for style in STYLES.map(|s| Style { width: 48 / s.heads, ..s }) {
        let (time, rows, d) = (70, 280, style.d());
        let (x, block) = (noise(&[rows, d], 1), style.block(4 * d, true, 5));
        let pass = || style.pass(time, false, [rows, rows], 4 * d);
        let output_rows = [3, 69, 138, 139, 279];
        let all = train::transformer_block(&x, &block, pass())?;
        let all = all.index_select(&Tensor::new(&output_rows, &Device::Cpu)?, 0)?;
        let some = BlockPass { output_rows: Some(output_rows.to_vec()), ..pass() };
        assert_eq!(values(&train::transformer_block(&x, &block, some)?), values(&all));
    }
    Ok(())
}

#[test]
fn a_block_without_output_rows_gives_an_empty_result() -> Result<()> {
    for (style, lora) in STYLES.into_iter().flat_map(|style| [(style, false), (style, true)]) {
        for precision in [Precision::F32, Precision::Bf16] {
            let block = style.block(20, lora, 7);
            let pass = BlockPass { output_rows: Some(vec![]), precision, ..style.pass(4, true, [12, 0], 20) };
            let x = var(&[12, style.d()], 1);
            let y = train::transformer_block(&x, &block, pass)?;
            assert_eq!(y.dims(), [0, style.d()]);
            let grads = train::backward(&y.sum_all()?)?;
            for v in variables(&block).iter().chain([&x]) {
                assert!(values(grads.get(v).expect("a gradient")).iter().all(|&g| g == 0.0));
            }
        }
    }
    Ok(())
}

#[test]
fn output_rows_out_of_order_are_refused() -> Result<()> {
    let pass = BlockPass { output_rows: Some(vec![2, 1]), ..GPT2.pass(4, false, [12, 2], 20) };
    let result = train::transformer_block(&noise(&[12, GPT2.d()], 1), &GPT2.block(20, false, 7), pass);
    let error = result.expect_err("an order").to_string();
    assert!(error.contains("row 1 after row 2"), "{error}");
    Ok(())
}

#[test]
fn a_frozen_block_builds_no_graph_and_passes_gradients_on() -> Result<()> {
    for style in STYLES {
        let (block, pass) = (Arc::new(style.block(20, false, 7).frozen()), style.pass(4, false, [12, 12], 20));
        let x = var(&[12, style.d()], 1);
        assert!(!train::transformer_block(&x.as_detached_tensor(), &block, pass.clone())?.track_op());
        blocks_agree(&x, &block, &pass)?;
    }
    Ok(())
}

#[test]
fn a_trained_block_needs_our_backward_once_for_each_forward_pass() -> Result<()> {
    let block =
        || train::transformer_block(&noise(&[4, 12], 1), &GPT2.block(8, true, 7), GPT2.pass(4, false, [4, 4], 8));
    let error = block()?.sum_all()?.backward().expect_err("the weights' gradients have nowhere to go").to_string();
    assert!(error.contains("lm::backward"), "{error}");
    let y = block()?;
    train::backward(&y.sum_all()?)?;
    let error = train::backward(&y.sum_all()?).expect_err("what the forward pass left is used up").to_string();
    assert!(error.contains("runs backward once per forward pass"), "{error}");
    Ok(())
}

#[test]
fn gradients_of_a_variable_used_twice_add_up() -> Result<()> {
    let (x, block, pass) = (var(&[6, GPT2.d()], 1), GPT2.block(8, false, 3), GPT2.pass(3, false, [6, 6], 8));
    let twice = |f: &dyn Fn(&Tensor) -> Result<Tensor>| f(&f(&x)?);
    agree(
        &variables(&block).iter().chain([&x]).collect::<Vec<_>>(),
        || twice(&|x| train::transformer_block(x, &block, pass.clone())),
        || twice(&|x| portable::run_block(x, &block, &pass)),
    )?;
    // A tied embedding gets gradients both through a kernel and through candle's own operations.
    let e = var(&[8, 6], 2);
    let ids = Tensor::new(&[3u32, 0, 7, 3], &Device::Cpu)?;
    let f = |ours: bool| -> Result<Tensor> {
        let rows = if ours { train::embedding(&ids, &e)? } else { portable::embedding(&ids, &e)? };
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
        let h = (&train::embedding(&ids, &e)? + x.as_tensor())?;
        let h = train::norm(&h, &norm(&w, style.joint.then_some(b.as_tensor())))?;
        let inner = 4 * d;
        let pass = |time, dropout| style.pass(time, dropout, [n, n], inner);
        let (full, lora, ends) =
            (style.block(inner, false, 20), style.block(inner, true, 40), style.block(inner, false, 60));
        let h = train::transformer_block(&h, &full, pass(time, true))?;
        let h = train::transformer_block(&h, &lora, pass(time / 4, false))?;
        let h = train::transformer_block(&h, &lora, pass(time / 4, true))?;
        let last: Vec<u32> = (0..n as u32).filter(|row| row % 160 >= 90).collect();
        let end = style.pass(time, true, [n, last.len()], inner);
        let h_last = train::transformer_block(&h, &ends, BlockPass { output_rows: Some(last), ..end })?;
        let h = (h + h_last.mean_all()?.broadcast_as((n, d))?)?;
        let output = head(&e, style.parallel.then_some(bias.as_tensor()));
        let stats = train::token_stats(&h, &output, &TargetTokens { targets: &targets, forbidden: None }, true)?;
        let entropy = stats.entropy.expect("asked for");
        let grads = train::backward(&(loss(&stats.logprob)? + loss(&entropy)?)?)?;
        all.extend([h, stats.logprob, entropy]);
        let trained = [full, lora, ends].iter().flat_map(|block| variables(block)).chain([x, w, e]).collect::<Vec<_>>();
        all.extend(trained.iter().map(|v| grads.get(v).expect("a gradient").clone()));
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
