//! Every kernel against stock candle operations, forward and backward, against finite differences, and across threads.

use candle_core::{Device, Result, Tensor, Var};
use proptest::prelude::*;

use super::{Adapter, Block, Projection, StatRows, reference};

/// A deterministic tensor with entries of about unit size.
fn noise(shape: &[usize], seed: u64) -> Tensor {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    let n = shape.iter().product();
    let values: Vec<f32> = (0..n).map(|_| (0..3).map(|_| next()).sum()).collect();
    Tensor::from_vec(values, shape, &Device::Cpu).expect("as many values as the shape has")
}

fn var(shape: &[usize], seed: u64) -> Var {
    Var::from_tensor(&noise(shape, seed)).expect("a fresh tensor becomes a variable")
}

fn values(t: &Tensor) -> Vec<f32> {
    t.flatten_all().and_then(|t| t.to_vec1()).expect("f32 tensors flatten")
}

/// |a - b| / |b|
fn distance(a: &Tensor, b: &Tensor) -> f64 {
    let (a, b) = (values(a), values(b));
    assert_eq!(a.len(), b.len());
    let norm = |x: &mut dyn Iterator<Item = f64>| x.map(|v| v * v).sum::<f64>().sqrt();
    let off = norm(&mut a.iter().zip(&b).map(|(a, b)| f64::from(a - b)));
    off / norm(&mut b.iter().map(|&b| f64::from(b))).max(1e-6)
}

/// A loss with a different weight on every output: sum(w y).
fn loss(y: &Tensor) -> Result<Tensor> {
    (y * noise(y.dims(), 99))?.sum_all()
}

/// Both functions agree on their results and on the gradient of every variable.
fn agree(vars: &[&Var], ours: impl Fn() -> Result<Tensor>, stock: impl Fn() -> Result<Tensor>) -> Result<()> {
    let (a, b) = (ours()?, stock()?);
    assert_eq!(a.dims(), b.dims());
    let off = distance(&a, &b);
    assert!(off < 1e-5, "forward: off by {off:e}");
    let (ga, gb) = (super::backward(&loss(&a)?)?, loss(&b)?.backward()?);
    for (i, v) in vars.iter().enumerate() {
        let gradient = ga.get(v.as_tensor()).expect("the kernel gives every variable a gradient");
        let off = distance(gradient, gb.get(v.as_tensor()).expect("so does candle"));
        assert!(off < 1e-4, "gradient {i}: off by {off:e}");
    }
    Ok(())
}

/// The gradient of sum(w y) by `v` agrees with central differences at a few entries.
fn differentiable(v: &Var, f: impl Fn() -> Result<Tensor>) -> Result<()> {
    let grads = loss(&f()?)?.backward()?;
    let gradient = values(grads.get(v.as_tensor()).expect("a gradient"));
    let base = values(v.as_tensor());
    let scale = gradient.iter().fold(0f32, |m, g| m.max(g.abs()));
    let h = 1e-2;
    for i in (0..base.len()).step_by(base.len().div_ceil(7)) {
        let at = |step: f32| -> Result<f64> {
            let mut moved = base.clone();
            moved[i] += step;
            v.set(&Tensor::from_vec(moved, v.shape(), &Device::Cpu)?)?;
            let y = f()?;
            let w = values(&noise(y.dims(), 99));
            Ok(values(&y).iter().zip(w).map(|(y, w)| f64::from(*y) * f64::from(w)).sum())
        };
        let slope = (at(h)? - at(-h)?) / (2.0 * f64::from(h));
        let off = (slope - f64::from(gradient[i])).abs() / f64::from(scale);
        assert!(off < 5e-3, "entry {i}: {slope} by differences, {} by backward", gradient[i]);
    }
    v.set(&Tensor::from_vec(base, v.shape(), &Device::Cpu)?)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn layer_norm_is_stock_layer_norm(rows in 1usize..150, d in 4usize..120, seed: u64) {
        let (x, w, b) = (var(&[rows, d], seed), var(&[d], seed ^ 1), var(&[d], seed ^ 2));
        agree(
            &[&x, &w, &b],
            || super::layer_norm(&x, &w, &b, 1e-5),
            || reference::layer_norm(&x, &w, &b, 1e-5),
        )?;
    }

    #[test]
    fn gelu_is_stock_gelu(n in 1usize..40_000, seed: u64) {
        let x = Var::from_tensor(&(noise(&[n], seed) * 3.0)?)?;
        agree(&[&x], || super::gelu_tanh(&x), || reference::gelu_tanh(&x))?;
    }

    #[test]
    fn linear_is_stock_matmul_and_addition(n in 1usize..200, i in 1usize..50, o in 1usize..50, seed: u64) {
        let (x, w, b) = (var(&[n, i], seed), var(&[i, o], seed ^ 1), var(&[o], seed ^ 2));
        agree(&[&x, &w, &b], || super::linear(&x, &w, Some(&b)), || reference::linear(&x, &w, Some(&b)))?;
        agree(&[&x, &w], || super::linear(&x, &w, None), || reference::linear(&x, &w, None))?;
        let (w, b) = (w.as_detached_tensor(), b.as_detached_tensor());
        agree(&[&x], || super::linear(&x, &w, Some(&b)), || reference::linear(&x, &w, Some(&b)))?;
    }

    #[test]
    fn lora_is_a_frozen_map_plus_a_low_rank_one(
        n in 1usize..100, i in 1usize..40, o in 1usize..40, r in 1usize..9, dropout: bool, seed: u64,
    ) {
        let (x, a, b) = (var(&[n, i], seed), var(&[r, i], seed ^ 1), var(&[o, r], seed ^ 2));
        let (w, bias) = (noise(&[i, o], seed ^ 3), noise(&[o], seed ^ 4));
        let mask = (noise(&[n, i], seed ^ 5).ge(-0.5)?.to_dtype(candle_core::DType::F32)? * 1.25)?;
        let adapter = Adapter { a: &a, b: &b, scale: 0.5, mask: dropout.then_some(&mask) };
        agree(
            &[&x, &a, &b],
            || super::lora_linear(&x, &w, Some(&bias), &adapter),
            || reference::lora_linear(&x, &w, Some(&bias), &adapter),
        )?;
    }

    #[test]
    fn attention_is_masked_softmax_attention(
        batch in 1usize..4, time in 1usize..150, heads in 1usize..4, width in 1usize..20, seed: u64,
    ) {
        let d = heads * width;
        let [q, k, v] = [1, 2, 3].map(|s| var(&[batch, time, d], seed ^ s));
        agree(
            &[&q, &k, &v],
            || super::causal_attention(&q, &k, &v, heads),
            || reference::causal_attention(&q, &k, &v, heads),
        )?;
        let qkv = var(&[batch * time, 3 * d], seed);
        agree(
            &[&qkv],
            || super::causal_attention_qkv(&qkv, time, heads),
            || reference::causal_attention_qkv(&qkv, time, heads),
        )?;
    }

    #[test]
    fn embedding_gathers_rows_and_scatters_gradients(n in 1usize..300, v in 1usize..50, d in 1usize..40, seed: u64) {
        let ids: Vec<u32> = (0..n as u64).map(|i| ((seed ^ i).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as u32 % v as u32).collect();
        let ids = Tensor::from_vec(ids, (n,), &Device::Cpu)?;
        let table = var(&[v, d], seed);
        agree(&[&table], || super::embedding(&ids, &table), || reference::embedding(&ids, &table))?;
    }

    #[test]
    fn token_stats_are_log_softmax_and_entropy(n in 1usize..100, d in 1usize..30, v in 2usize..90, frozen: bool, seed: u64) {
        let targets: Vec<u32> = (0..n).map(|i| 1 + (i * 7 + d) as u32 % (v as u32 - 1)).collect();
        let masked: Vec<bool> = (0..n).map(|i| i % 3 == 0).collect();
        let rows = StatRows { targets: &targets, forbidden: Some((0, &masked)) };
        let (h, e) = (var(&[n, d], seed), var(&[v, d], seed ^ 1));
        let e_tensor = if frozen { e.as_detached_tensor() } else { e.as_tensor().clone() };
        let vars = if frozen { vec![&h] } else { vec![&h, &e] };
        for entropy in [false, true] {
            let both = |s: super::TokenStats| match s.entropy {
                Some(entropy) => Tensor::cat(&[&s.logprob, &entropy], 0),
                None => Ok(s.logprob),
            };
            agree(
                &vars,
                || both(super::token_stats(&h, &e_tensor, &rows, entropy)?),
                || both(reference::token_stats(&h, &e_tensor, &rows, entropy)?),
            )?;
        }
        // The log-probability alone, beside an entropy that no loss uses.
        agree(
            &vars,
            || Ok(super::token_stats(&h, &e_tensor, &rows, true)?.logprob),
            || Ok(reference::token_stats(&h, &e_tensor, &rows, true)?.logprob),
        )?;
    }
}

#[test]
fn gradients_agree_with_finite_differences() -> Result<()> {
    let (x, w, b) = (var(&[6, 10], 1), var(&[10], 2), var(&[10], 3));
    for v in [&x, &w, &b] {
        differentiable(v, || super::layer_norm(&x, &w, &b, 1e-5))?;
    }
    differentiable(&x, || super::gelu_tanh(&x))?;
    let qkv = var(&[10, 12], 4);
    differentiable(&qkv, || super::causal_attention_qkv(&qkv, 5, 2))?;
    let e = var(&[9, 10], 5);
    let rows =
        StatRows { targets: &[1, 2, 3, 4, 5, 8], forbidden: Some((0, &[true, false, true, false, false, true])) };
    for v in [&x, &e] {
        differentiable(v, || Ok(super::token_stats(&x, &e, &rows, true)?.logprob))?;
        differentiable(v, || Ok(super::token_stats(&x, &e, &rows, true)?.entropy.expect("asked for")))?;
    }
    Ok(())
}

#[test]
fn a_frozen_operand_gets_no_gradient() -> Result<()> {
    let (x, a, b) = (var(&[5, 4], 1), var(&[2, 4], 2), var(&[3, 2], 3));
    let (w, bias) = (var(&[4, 3], 4), var(&[3], 5));
    let adapter = Adapter { a: &a, b: &b, scale: 2.0, mask: None };
    let grads = super::lora_linear(&x, &w, Some(&bias), &adapter)?.sum_all()?.backward()?;
    assert!(grads.get(&w).is_none() && grads.get(&bias).is_none() && grads.get(&a).is_some());
    let frozen = x.as_detached_tensor();
    let grads = super::lora_linear(&frozen, &w, Some(&bias), &adapter)?.sum_all()?.backward()?;
    assert!(grads.get(&frozen).is_none() && grads.get(&b).is_some());
    let y = super::linear(&frozen, &w.as_detached_tensor(), Some(&bias.as_detached_tensor()))?;
    assert!(!y.track_op(), "a wholly frozen map builds no graph");
    Ok(())
}

#[test]
fn mistaken_shapes_and_ids_are_errors() {
    let x = noise(&[4, 6], 1);
    let says = |r: Result<Tensor>, what: &str| {
        let e = r.expect_err("must be refused").to_string();
        assert!(e.contains(what), "{e}");
    };
    says(super::layer_norm(&x, &noise(&[5], 1), &noise(&[6], 1), 1e-5), "weight has shape [5], expected [6]");
    says(super::linear(&x, &noise(&[5, 2], 1), None), "linear map");
    says(super::causal_attention_qkv(&x, 3, 1), "sequences of 3");
    says(super::causal_attention_qkv(&x, 4, 3), "3 heads");
    let ids = Tensor::new(&[1u32, 4], &Device::Cpu).expect("two ids");
    says(super::embedding(&ids, &x), "token id 4 is not below the table's 4 rows");
    let rows = StatRows { targets: &[0, 1, 2, 9], forbidden: None };
    says(super::token_stats(&x, &noise(&[5, 6], 1), &rows, false).map(|s| s.logprob), "vocabulary of 5");
    let doubles = x.to_dtype(candle_core::DType::F64).expect("a conversion");
    assert!(super::gelu_tanh(&doubles).is_err());
}

#[test]
fn what_is_not_finite_stays_not_finite() -> Result<()> {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = values(&noise(&[3, 12], 1));
        x[15] = bad;
        let x = Tensor::from_vec(x, (3, 12), &Device::Cpu)?;
        let spoiled = |t: Tensor| values(&t).iter().any(|v| !v.is_finite());
        assert!(spoiled(super::layer_norm(&x, &noise(&[12], 1), &noise(&[12], 2), 1e-5)?));
        assert!(spoiled(super::gelu_tanh(&x)?));
        assert!(spoiled(super::causal_attention_qkv(&x, 3, 2)?));
        let rows = StatRows { targets: &[0, 1, 2], forbidden: None };
        assert!(spoiled(super::token_stats(&x, &noise(&[5, 12], 1), &rows, false)?.logprob));
    }
    Ok(())
}

/// The tensors of a block: weights in the order of the model file, adapters (A, B) of the four maps, masks.
struct BlockTensors {
    weights: Vec<Tensor>,
    adapters: Vec<Tensor>,
    masks: Vec<Tensor>,
}

impl BlockTensors {
    /// Weights are variables if there are no adapters.
    fn new(rows: usize, d: usize, inner: usize, lora: bool, seed: u64) -> Result<Self> {
        let widths = [(d, 3 * d), (d, d), (d, inner), (inner, d)];
        let mut shapes = vec![vec![d]; 4];
        shapes.extend(widths.iter().flat_map(|&(i, o)| [vec![i, o], vec![o]]));
        let small = |shape: &[usize], seed: u64| noise(shape, seed) * (0.7 / (shape[0] as f64).sqrt());
        let weights = shapes.iter().zip(seed..).map(|(shape, seed)| {
            let t = small(shape, seed)?;
            if lora { Ok(t) } else { Ok(Var::from_tensor(&t)?.into_inner()) }
        });
        let adapters = widths.iter().flat_map(|&(i, o)| [vec![2, i], vec![o, 2]]).zip(seed + 50..);
        let mask =
            |width| noise(&[rows, width], seed ^ width as u64).ge(-0.5)?.to_dtype(candle_core::DType::F32)? * 1.25;
        Ok(Self {
            weights: weights.collect::<Result<_>>()?,
            adapters: match lora {
                true => adapters.map(|(shape, seed)| var(&shape, seed).into_inner()).collect(),
                false => vec![],
            },
            masks: vec![mask(d)?, mask(inner)?],
        })
    }

    fn variables(&self) -> Vec<Tensor> {
        self.weights.iter().chain(&self.adapters).filter(|t| t.is_variable()).cloned().collect()
    }

    fn block(&self, time: usize, n_head: usize, dropout: bool) -> Block<'_> {
        let mask = |i: usize| dropout.then(|| &self.masks[i]);
        let map = |i: usize| Projection {
            w: &self.weights[4 + 2 * i],
            bias: &self.weights[5 + 2 * i],
            adapter: self.adapters.get(2 * i).map(|a| Adapter {
                a,
                b: &self.adapters[2 * i + 1],
                scale: 0.5,
                mask: mask(i / 3),
            }),
        };
        Block {
            ln_1: (&self.weights[0], &self.weights[1]),
            c_attn: map(0),
            attn_proj: map(1),
            ln_2: (&self.weights[2], &self.weights[3]),
            c_fc: map(2),
            mlp_proj: map(3),
            attn_mask: mask(0),
            mlp_mask: mask(0),
            eps: 1e-5,
            n_head,
            time,
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn a_block_is_its_parts_one_after_the_other(
        batch in 1usize..14, time in 1usize..70, heads in 1usize..3, width in 4usize..9, inner in 1usize..40,
        lora: bool, dropout: bool, first: bool, seed in 0u64..1 << 40,
    ) {
        let (rows, d) = (batch * time, heads * width);
        let tensors = BlockTensors::new(rows, d, inner, lora, seed)?;
        let x = var(&[rows, d], seed ^ 1);
        // The first block of a model with frozen embeddings gets an input that is not tracked.
        let input = if first { x.as_detached_tensor() } else { x.as_tensor().clone() };
        let mut vars: Vec<Var> = tensors.variables().iter().map(Var::from_tensor).collect::<Result<_>>()?;
        if !first {
            vars.push(x);
        }
        agree(
            &vars.iter().collect::<Vec<_>>(),
            || super::transformer_block(&input, &tensors.block(time, heads, dropout)),
            || reference::transformer_block(&input, &tensors.block(time, heads, dropout)),
        )?;
    }
}

#[test]
fn a_frozen_block_builds_no_graph_and_passes_gradients_on() -> Result<()> {
    let mut tensors = BlockTensors::new(12, 8, 20, false, 7)?;
    tensors.weights.iter_mut().for_each(|w| *w = w.detach());
    let x = var(&[12, 8], 1);
    let block = tensors.block(4, 2, false);
    assert!(!super::transformer_block(&x.as_detached_tensor(), &block)?.track_op());
    agree(&[&x], || super::transformer_block(&x, &block), || reference::transformer_block(&x, &block))
}

#[test]
fn a_blocks_loss_needs_our_backward() -> Result<()> {
    let tensors = BlockTensors::new(4, 8, 8, true, 7)?;
    let y = super::transformer_block(&noise(&[4, 8], 1), &tensors.block(4, 1, false))?;
    let error = y.sum_all()?.backward().expect_err("the weights' gradients have nowhere to go").to_string();
    assert!(error.contains("lm::backward"), "{error}");
    // Ours may run any number of times.
    let (a, b) = (super::backward(&y.sum_all()?)?, super::backward(&y.sum_all()?)?);
    for v in tensors.variables() {
        assert_eq!(a.get(&v).map(values), b.get(&v).map(values));
    }
    Ok(())
}

#[test]
fn gradients_of_a_variable_used_twice_add_up() -> Result<()> {
    let tensors = BlockTensors::new(6, 8, 8, false, 3)?;
    let (x, block) = (var(&[6, 8], 1), tensors.block(3, 2, false));
    let vars: Vec<Var> = tensors.variables().iter().map(Var::from_tensor).collect::<Result<_>>()?;
    let twice = |f: &dyn Fn(&Tensor) -> Result<Tensor>| f(&f(&x)?);
    agree(
        &vars.iter().chain([&x]).collect::<Vec<_>>(),
        || twice(&|x| super::transformer_block(x, &block)),
        || twice(&|x| reference::transformer_block(x, &block)),
    )?;
    // Both through a kernel and through candle's own operations.
    let w = var(&[8, 8], 2);
    let f = |ours: bool| -> Result<Tensor> {
        let y = if ours { super::linear(&x, &w, None)? } else { reference::linear(&x, &w, None)? };
        y.matmul(&w)
    };
    agree(&[&w, &x], || f(true), || f(false))
}

/// All results and gradients of all kernels, at sizes that need several chunks.
fn everything() -> Result<Vec<Vec<u32>>> {
    let (n, time, d, v) = (640, 160, 96, 7000);
    let (x, w, b) = (var(&[n, d], 1), var(&[d], 2), var(&[d], 3));
    let (m, bias) = (var(&[d, 3 * d], 4), var(&[3 * d], 5));
    let (lora_a, lora_b) = (var(&[8, d], 6), var(&[d, 8], 7));
    let e = var(&[v, d], 8);
    let targets: Vec<u32> = (0..n as u32).map(|i| i * 11 % v as u32).collect();
    let ids = Tensor::from_slice(&targets, (n,), &Device::Cpu)?;
    let h = (&super::embedding(&ids, &e)? + x.as_tensor())?;
    let h = super::layer_norm(&h, &w, &b, 1e-5)?;
    let h = super::linear(&h, &m, Some(&bias))?;
    let h = super::causal_attention_qkv(&h, time, 4)?;
    let adapter = Adapter { a: &lora_a, b: &lora_b, scale: 2.0, mask: None };
    let h = super::lora_linear(&h, &m.as_detached_tensor().narrow(1, 0, d)?, None, &adapter)?;
    let h = super::gelu_tanh(&h)?;
    let (full, lora) = (BlockTensors::new(n, d, 4 * d, false, 20)?, BlockTensors::new(n, d, 4 * d, true, 40)?);
    let h = super::transformer_block(&h, &full.block(time / 4, 4, true))?;
    let h = super::transformer_block(&h, &lora.block(time / 4, 4, false))?;
    let h = super::transformer_block(&h, &lora.block(time / 4, 4, true))?;
    let stats = super::token_stats(&h, &e, &StatRows { targets: &targets, forbidden: None }, true)?;
    let entropy = stats.entropy.expect("asked for");
    let grads = super::backward(&(loss(&stats.logprob)? + loss(&entropy)?)?)?;
    let mut all = vec![h, stats.logprob, entropy];
    all.extend([&x, &w, &b, &m, &bias, &lora_a, &lora_b, &e].map(|v| grads.get(v).expect("a gradient").clone()));
    all.extend(full.variables().iter().chain(&lora.variables()).map(|v| grads.get(v).expect("a gradient").clone()));
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
