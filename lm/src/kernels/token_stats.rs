//! Log-probabilities and entropies from hidden states and the output layer, a chunk of rows at a time: the logits of
//! all rows never exist at once, and the backward pass recomputes them.
//!
//! With logits l, p = softmax(l), H = -sum p log p: d log p_t / d l = [t] - p and d H / d l = -p (log p + H).

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;

use super::buffer::{for_chunks, scratch};
use super::gemm::{Into, Mat, Threads};
use super::glue::{Handover, View, gradient, output, slice};
use super::product::{Factor, Prepared, multiply, multiply_once};
use super::simd::{add_assign, exp, fma, max, simd, sum_map};
use super::sink::{deliver, deliver_aside};
use crate::Precision;

/// Logits held at once.
const LOGITS: usize = 4 << 20;

/// Sizes (`n` rows of `d` columns, a vocabulary of `v`) and the tokens of each row.
pub struct Stats {
    pub n: usize,
    pub d: usize,
    pub v: usize,
    /// `[v]`, added to the logits.
    pub bias: Option<Tensor>,
    pub precision: Precision,
    /// `[n]`, each below v.
    pub targets: Vec<u32>,
    /// Tokens that are impossible in the rows where the flag is set.
    pub forbidden: Option<(Vec<u32>, Vec<bool>)>,
    pub entropy: bool,
    /// Whether the forward pass also computes d logprob / d hidden. With a frozen output layer this saves the backward
    /// pass from recomputing the logits.
    pub eager: bool,
    /// Results of the forward pass.
    pub rows: OnceLock<Vec<Row>>,
    /// d logprob / d hidden `[n, d]`, if computed; a second backward pass recomputes the logits instead.
    pub slopes: Handover<Vec<f32>>,
}

/// The output layer's weight `[v, d]` and bias `[v]`.
struct Layer<'a> {
    weight: Mat<'a>,
    bias: Option<&'a [f32]>,
    /// The packed weight for logits, in bf16 only. In f32 products read the weight in place: it is the model's largest,
    /// and too few products would share a packed copy.
    forward: Option<Prepared>,
    /// The packed weight for gradients of hidden states, likewise.
    back: Option<Prepared>,
}

impl Layer<'_> {
    fn forward(&self) -> Factor<'_> {
        self.forward.as_ref().map_or(Factor::Once(self.weight.t()), Factor::Prepared)
    }

    fn back(&self) -> Factor<'_> {
        self.back.as_ref().map_or(Factor::Once(self.weight), Factor::Prepared)
    }
}

/// The statistics of one row.
#[derive(Clone, Copy)]
pub struct Row {
    logprob: f32,
    entropy: f32,
    log_sum_exp: f32,
}

impl Stats {
    /// The output layer prepared for logits and, if `back`, for gradients of hidden states.
    fn layer<'a>(&self, weight: &'a [f32], bias: Option<&'a [f32]>, back: bool) -> Layer<'a> {
        let weight = Mat::new(weight, self.v, self.d);
        let prepared =
            |used: bool, w| (used && self.precision == Precision::Bf16).then(|| Prepared::new(w, None, self.precision));
        Layer { weight, bias, forward: prepared(true, weight.t()), back: prepared(back, weight) }
    }

    /// Rows per chunk: a function of the shape alone.
    fn chunk(&self) -> usize {
        (LOGITS / self.v).clamp(64, 4096)
    }

    /// Computes the logits of the rows from `start` on into `logits`, -infinity where forbidden.
    fn logits(&self, logits: &mut [f32], hidden: &[f32], output: &Layer, start: usize) {
        let n = logits.len() / self.v;
        let hidden = Mat::new(&hidden[start * self.d..], n, self.d);
        let into = match output.bias {
            Some(bias) => {
                for_chunks(logits, self.v, |_, row| row.copy_from_slice(bias));
                Into::Add
            }
            None => Into::Overwrite,
        };
        multiply(logits, into, 1.0, hidden, output.forward(), Threads::Pool);
        if let Some((tokens, rows)) = &self.forbidden {
            for (row, &forbidden) in logits.chunks_exact_mut(self.v).zip(&rows[start..]) {
                if forbidden {
                    tokens.iter().for_each(|&token| row[token as usize] = f32::NEG_INFINITY);
                }
            }
        }
    }

    /// Turns the logits of the rows from `start` on into their gradient, in place; `g(i)` returns the gradients of row
    /// i's log-probability and entropy.
    fn logit_gradients(&self, logits: &mut [f32], found: &[Row], start: usize, g: impl Fn(usize) -> (f32, f32) + Sync) {
        for_chunks(logits, self.v, |at, logits| {
            let i = at / self.v;
            let (g_logprob, g_entropy) = g(start + i);
            logit_gradient(logits, found[i].log_sum_exp, found[i].entropy, g_logprob, g_entropy);
            logits[self.targets[start + i] as usize] += g_logprob;
        });
    }

    fn row(&self, logits: &[f32], target: u32) -> Row {
        let m = max(logits);
        let (sum, weighted) = exp_sums(logits, m, self.entropy);
        let log_sum_exp = m + sum.ln();
        // H = log sum - sum (l - m) e^(l - m) / sum
        let entropy = if self.entropy { sum.ln() - weighted / sum } else { 0.0 };
        Row { logprob: logits[target as usize] - log_sum_exp, entropy, log_sum_exp }
    }
}

simd! {
    /// The sums of e^(l - m) and, if `both`, of (l - m) e^(l - m).
    fn exp_sums(logits: &[f32], m: f32, both: bool) -> (f32, f32) {
        let sum = sum_map(logits, |l| exp::<FMA>(l - m));
        // Avoids -infinity times 0 for a forbidden token, which counts as 0.
        let weighted = |l: f32| if l - m < -80.0 { 0.0 } else { (l - m) * exp::<FMA>(l - m) };
        (sum, if both { sum_map(logits, weighted) } else { 0.0 })
    }
}

simd! {
    /// Turns logits into their gradient, in place, without the target's own term: -p (g_logprob + g_entropy (log p +
    /// H)).
    fn logit_gradient(logits: &mut [f32], log_sum_exp: f32, entropy: f32, g_logprob: f32, g_entropy: f32) {
        if g_entropy == 0.0 {
            for l in logits.iter_mut() {
                *l = -g_logprob * exp::<FMA>(*l - log_sum_exp);
            }
        } else {
            for l in logits.iter_mut() {
                let logp = *l - log_sum_exp;
                let p = exp::<FMA>(logp);
                let term = fma::<FMA>(g_entropy, logp + entropy, g_logprob);
                *l = if p == 0.0 { 0.0 } else { -p * term };
            }
        }
    }
}

/// KL(p || q) in nats of each row's two distributions, `[n]`: p from `own`, q from `other`. Both use the vocabulary and
/// the forbidden tokens of `own`.
pub fn divergence(own: (&Stats, &[f32], &[f32]), other: (&Stats, &[f32], &[f32])) -> Result<Vec<f32>> {
    let ((p, p_hidden, p_weight), (q, q_hidden, q_weight)) = (own, other);
    let (p_bias, q_bias) = (p.bias.as_ref().map(View::of).transpose()?, q.bias.as_ref().map(View::of).transpose()?);
    let p_layer = p.layer(p_weight, p_bias.as_deref(), false);
    let q_layer = q.layer(q_weight, q_bias.as_deref(), false);
    let (n, v) = (p.n, p.v);
    let mut out = Vec::with_capacity(n);
    scratch(2 * p.chunk().min(n) * v, |logits| {
        for start in (0..n).step_by(p.chunk()) {
            let rows = p.chunk().min(n - start);
            let (p_logits, rest) = logits.split_at_mut(rows * v);
            let q_logits = &mut rest[..rows * v];
            p.logits(p_logits, p_hidden, &p_layer, start);
            q.logits(q_logits, q_hidden, &q_layer, start);
            let pairs = p_logits.par_chunks_exact(v).zip(q_logits.par_chunks_exact_mut(v));
            out.par_extend(pairs.map(|(p, q)| {
                let log_sum = |logits: &[f32]| max(logits) + exp_sums(logits, max(logits), false).0.ln();
                divergence_terms(p, q, log_sum(p), log_sum(q));
                // Sum in f64: the terms nearly cancel if the distributions are close.
                q.iter().map(|&term| f64::from(term)).sum::<f64>() as f32
            }));
        }
    });
    Ok(out)
}

simd! {
    /// Replaces q's logits by p (log p - log q) of each token. A forbidden token's probability is 0 in both.
    fn divergence_terms(p: &[f32], q: &mut [f32], p_log_sum: f32, q_log_sum: f32) {
        for (p, q) in p.iter().zip(q.iter_mut()) {
            let log_p = *p - p_log_sum;
            let term = exp::<FMA>(log_p) * (log_p - (*q - q_log_sum));
            *q = if *p == f32::NEG_INFINITY { 0.0 } else { term };
        }
    }
}

/// Operands: hidden `[n, d]`, the output layer's weight `[v, d]`. Result `[2, n]`: log-probabilities, and entropies (0
/// if not requested).
impl CustomOp2 for Stats {
    fn name(&self) -> &'static str {
        "temper-token-stats"
    }

    fn cpu_fwd(&self, h: &CpuStorage, h_l: &Layout, e: &CpuStorage, e_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (h, e) = (slice(h, h_l)?, slice(e, e_l)?);
        let bias = self.bias.as_ref().map(View::of).transpose()?;
        let layer = self.layer(e, bias.as_deref(), self.eager);
        let mut found: Vec<Row> = Vec::with_capacity(self.n);
        let mut slopes = if self.eager { vec![0.0; self.n * self.d] } else { vec![] };
        scratch(self.chunk().min(self.n) * self.v, |logits| {
            for start in (0..self.n).step_by(self.chunk()) {
                let end = (start + self.chunk()).min(self.n);
                let logits = &mut logits[..(end - start) * self.v];
                self.logits(logits, h, &layer, start);
                let rows = logits.par_chunks_exact(self.v).zip(&self.targets[start..end]);
                found.par_extend(rows.map(|(logits, &target)| self.row(logits, target)));
                if self.eager {
                    self.logit_gradients(logits, &found[start..], start, |_| (1.0, 0.0));
                    let slopes = &mut slopes[start * self.d..end * self.d];
                    let dl = Mat::new(logits, end - start, self.v);
                    multiply(slopes, Into::Overwrite, 1.0, dl, layer.back(), Threads::Pool);
                }
            }
        });
        if self.eager {
            self.slopes.leave(slopes);
        }
        let out = found.iter().map(|r| r.logprob).chain(found.iter().map(|r| r.entropy)).collect();
        self.rows.get_or_init(|| found);
        output(out, (2, self.n))
    }

    fn bwd(&self, h: &Tensor, e: &Tensor, _res: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Some(found) = self.rows.get() else { bail!("token statistics' backward pass before their forward pass") };
        let g = g.contiguous()?;
        let (h_v, e_v, g_v) = (View::of(h)?, View::of(e)?, View::of(&g)?);
        let bias = self.bias.as_ref().map(View::of).transpose()?;
        let (g_logprob, g_entropy) = g_v.split_at(self.n);
        let Self { n, d, v, .. } = *self;
        if g_entropy.iter().all(|&g| g == 0.0)
            && let Some(mut dh) = self.slopes.take()
        {
            dh.chunks_exact_mut(d).zip(g_logprob).for_each(|(row, &g)| row.iter_mut().for_each(|x| *x *= g));
            return Ok((Some(gradient(dh, h)?), None));
        }
        let layer = self.layer(&e_v, bias.as_deref(), h.track_op());
        let mut dh = h.track_op().then(|| vec![0.0; n * d]);
        let mut de = e.track_op().then(|| vec![0.0; v * d]);
        let trained_bias = self.bias.as_ref().filter(|b| b.track_op());
        let mut db = vec![0.0; if trained_bias.is_some() { v } else { 0 }];
        scratch(self.chunk().min(n) * v, |logits| {
            for start in (0..n).step_by(self.chunk()) {
                let end = (start + self.chunk()).min(n);
                let logits = &mut logits[..(end - start) * v];
                self.logits(logits, &h_v, &layer, start);
                self.logit_gradients(logits, &found[start..], start, |i| (g_logprob[i], g_entropy[i]));
                let dl = Mat::new(logits, end - start, v);
                if let Some(dh) = &mut dh {
                    let dh = &mut dh[start * d..end * d];
                    multiply(dh, Into::Overwrite, 1.0, dl, layer.back(), Threads::Pool);
                }
                if let Some(de) = &mut de {
                    let h = Mat::new(&h_v[start * d..], end - start, d);
                    multiply_once(de, Into::Add, 1.0, dl.t(), h, self.precision);
                }
                if trained_bias.is_some() {
                    logits.chunks_exact(v).for_each(|row| add_assign(&mut db, row));
                }
            }
        });
        drop(bias);
        if let Some(bias) = trained_bias {
            deliver_aside(bias, db)?;
        }
        let dh = dh.map(|x| gradient(x, h)).transpose()?;
        Ok((dh, de.map_or(Ok(None), |x| deliver(e, x))?))
    }
}
