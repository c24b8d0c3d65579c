//! Every kernel against stock candle operations, forward and backward, against finite differences, and across threads.

use candle_core::{Device, Result, Tensor, Var};
use proptest::prelude::*;

use std::sync::Arc;

use super::{LmHead, TargetTokens};
use crate::Precision;
use crate::exec::portable;
use crate::model::block::Norm;
use block::{GPT2, LLAMA, STYLES, Style};

mod block;
mod mutants;

/// The largest distance between results of a kernel and of stock operations.
const FORWARD: f64 = 1e-5;

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

/// A weight of a layer whose outputs are of about unit size.
fn small(shape: &[usize], seed: u64) -> Tensor {
    (noise(shape, seed) * (0.7 / (shape[0] as f64).sqrt())).expect("a product")
}

fn norm(weight: &Tensor, bias: Option<&Tensor>) -> Norm {
    Norm { name: String::new(), weight: weight.clone(), bias: bias.cloned(), eps: 1e-5 }
}

fn head(weight: &Tensor, bias: Option<&Tensor>) -> LmHead {
    LmHead { weight: weight.clone(), bias: bias.cloned(), precision: Precision::F32 }
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
    assert!(off < FORWARD, "forward: off by {off:e}");
    let (ga, gb) = (super::backward(&loss(&a)?)?, super::backward(&loss(&b)?)?);
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
    fn norms_agree_with_stock_operations(rows in 1usize..150, d in 4usize..120, seed: u64) {
        let (x, w, b) = (var(&[rows, d], seed), var(&[d], seed ^ 1), var(&[d], seed ^ 2));
        for (norm, vars) in [(norm(&w, Some(&b)), &[&x, &w, &b][..]), (norm(&w, None), &[&x, &w])] {
            agree(vars, || super::norm(&x, &norm), || portable::norm(&x, &norm))?;
        }
    }

    #[test]
    fn embedding_gathers_rows_and_scatters_gradients(n in 1usize..300, v in 1usize..50, d in 1usize..40, seed: u64) {
        let ids: Vec<u32> = (0..n as u64).map(|i| ((seed ^ i).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33) as u32 % v as u32).collect();
        let ids = Tensor::from_vec(ids, (n,), &Device::Cpu)?;
        let table = var(&[v, d], seed);
        agree(&[&table], || super::embedding(&ids, &table), || portable::embedding(&ids, &table))?;
    }

    #[test]
    fn token_stats_are_log_softmax_and_entropy(
        n in 1usize..100, d in 1usize..30, v in 2usize..90, frozen: bool, biased: bool, seed: u64,
    ) {
        let targets: Vec<u32> = (0..n).map(|i| 1 + (i * 7 + d) as u32 % (v as u32 - 1)).collect();
        let masked: Vec<bool> = (0..n).map(|i| i % 3 == 0).collect();
        // The last token is no row's target in a vocabulary of more than two.
        let targets: Vec<u32> = targets.into_iter().map(|t| if v > 2 { t.min(v as u32 - 2) } else { t }).collect();
        let forbidden: &[u32] = if v > 2 { &[0, v as u32 - 1] } else { &[0] };
        let rows = TargetTokens { targets: &targets, forbidden: Some((forbidden, &masked)) };
        let (h, e, b) = (var(&[n, d], seed), var(&[v, d], seed ^ 1), var(&[v], seed ^ 2));
        let kept = |v: &Var| if frozen { v.as_detached_tensor() } else { v.as_tensor().clone() };
        let (e_tensor, b_tensor) = (kept(&e), kept(&b));
        let output = head(&e_tensor, biased.then_some(&b_tensor));
        let vars = match (frozen, biased) {
            (true, _) => vec![&h],
            (false, false) => vec![&h, &e],
            (false, true) => vec![&h, &e, &b],
        };
        for entropy in [false, true] {
            let both = |s: super::TokenStats| match s.entropy {
                Some(entropy) => Tensor::cat(&[&s.logprob, &entropy], 0),
                None => Ok(s.logprob),
            };
            agree(
                &vars,
                || both(super::token_stats(&h, &output, &rows, entropy)?),
                || both(portable::token_stats(&h, &output, &rows, entropy)?),
            )?;
        }
        // The log-probability alone, with an entropy that no loss uses.
        agree(
            &vars,
            || Ok(super::token_stats(&h, &output, &rows, true)?.logprob),
            || Ok(portable::token_stats(&h, &output, &rows, true)?.logprob),
        )?;
    }
}

#[test]
fn kl_divergence_agrees_with_its_definition_and_is_zero_for_equal_distributions() -> Result<()> {
    let (n, d, v) = (70, 8, 30);
    let (p, q, e, f, b) = (var(&[n, d], 1), var(&[n, d], 2), var(&[v, d], 3), var(&[v, d], 4), var(&[v], 5));
    let masked: Vec<bool> = (0..n).map(|i| i % 3 == 0).collect();
    let rows = TargetTokens { targets: &vec![1; n], forbidden: Some((&[0, 29], &masked)) };
    let (own, other) = (head(&e, Some(&b)), head(&f, None));
    let found = super::kl_divergence((&p, &own), (&q, &other), &rows)?;
    // By definition, from the log-probabilities of each token in turn.
    let mut expected = vec![0.0; n];
    for token in 0..v as u32 {
        let rows = TargetTokens { targets: &vec![token; n], ..rows };
        let log = |h: &Var, o: &LmHead| portable::token_stats(h, o, &rows, false)?.logprob.to_vec1::<f32>();
        for (i, (log_p, log_q)) in log(&p, &own)?.into_iter().zip(log(&q, &other)?).enumerate() {
            if !(masked[i] && [0, 29].contains(&token)) {
                expected[i] += f64::from(log_p).exp() * f64::from(log_p - log_q);
            }
        }
    }
    for (found, expected) in found.iter().zip(&expected) {
        assert!((f64::from(*found) - expected).abs() < 1e-4 * (1.0 + expected), "{found} {expected}");
    }
    assert!(expected.iter().all(|kl| *kl > 1e-3));
    assert!(super::kl_divergence((&p, &own), (&p, &own), &rows)?.iter().all(|kl| *kl == 0.0));
    Ok(())
}

#[test]
fn gradients_agree_with_finite_differences() -> Result<()> {
    let (x, w, b) = (var(&[6, 10], 1), var(&[10], 2), var(&[10], 3));
    for v in [&x, &w, &b] {
        differentiable(v, || super::norm(&x, &norm(&w, Some(&b))))?;
    }
    for v in [&x, &w] {
        differentiable(v, || super::norm(&x, &norm(&w, None)))?;
    }
    let e = var(&[9, 10], 5);
    let output = head(&e, None);
    let rows = TargetTokens {
        targets: &[1, 2, 3, 4, 5, 8],
        forbidden: Some((&[0, 6], &[true, false, true, false, false, true])),
    };
    for v in [&x, &e] {
        differentiable(v, || Ok(super::token_stats(&x, &output, &rows, true)?.logprob))?;
        differentiable(v, || Ok(super::token_stats(&x, &output, &rows, true)?.entropy.expect("asked for")))?;
    }
    for style in STYLES {
        let block = Arc::new(style.block(24, false, 4).frozen());
        let x = var(&[10, style.d()], 1);
        differentiable(&x, || super::transformer_block(&x, &block, style.pass(5, false, [10, 10], 24)))?;
    }
    Ok(())
}

#[test]
fn wrong_shapes_and_ids_are_errors() {
    let x = noise(&[4, 6], 1);
    let says = |r: Result<Tensor>, what: &str| {
        let e = r.expect_err("must be refused").to_string();
        assert!(e.contains(what), "{e}");
    };
    let (short, long) = (noise(&[5], 1), noise(&[6], 1));
    says(super::norm(&x, &norm(&short, Some(&long))), "weight has shape [5], expected [6]");
    let block = |rows: usize, style: Style, time: usize| {
        let pass = style.pass(time, false, [rows, rows], 8);
        super::transformer_block(&noise(&[rows, style.d()], 1), &style.block(8, false, 1), pass)
    };
    says(block(4, GPT2, 3), "sequences of 3");
    says(block(4, Style { kv_heads: 3, ..LLAMA }, 4), "got 4 and 3");
    let ids = Tensor::new(&[1u32, 4], &Device::Cpu).expect("two ids");
    says(super::embedding(&ids, &x), "token id 4 is not below the table's 4 rows");
    let rows = TargetTokens { targets: &[0, 1, 2, 9], forbidden: None };
    let weight = noise(&[5, 6], 1);
    says(super::token_stats(&x, &head(&weight, None), &rows, false).map(|s| s.logprob), "vocabulary of 5");
    let [doubles, weight] = [&x, &long].map(|t| t.to_dtype(candle_core::DType::F64).expect("a conversion"));
    assert!(super::norm(&doubles, &norm(&weight, None)).is_err());
}

#[test]
fn non_finite_inputs_give_non_finite_outputs() -> Result<()> {
    for bad in [f32::NAN, f32::INFINITY] {
        let mut x = values(&noise(&[3, 24], 1));
        x[30] = bad;
        let x = Tensor::from_vec(x, (3, 24), &Device::Cpu)?;
        let spoiled = |t: Tensor| values(&t).iter().any(|v| !v.is_finite());
        let (w, b) = (noise(&[24], 1), noise(&[24], 2));
        assert!(spoiled(super::norm(&x, &norm(&w, Some(&b)))?));
        assert!(spoiled(super::norm(&x, &norm(&w, None))?));
        for style in STYLES.map(|s| Style { width: 24 / s.heads, ..s }) {
            let block = style.block(8, false, 1);
            assert!(spoiled(super::transformer_block(&x, &block, style.pass(3, false, [3, 3], 8))?));
        }
        let rows = TargetTokens { targets: &[0, 1, 2], forbidden: None };
        let output = head(&noise(&[5, 24], 1), None);
        assert!(spoiled(super::token_stats(&x, &output, &rows, false)?.logprob));
    }
    Ok(())
}
