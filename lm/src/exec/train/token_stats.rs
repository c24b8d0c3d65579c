//! Log-probabilities and entropies from hidden states and the output layer, a chunk of rows at a time: the logits of
//! all rows never exist at once, and the backward pass recomputes them.
//!
//! With logits l, p = softmax(l), H = -sum p log p: d log p_t / d l = [t] - p and d H / d l = -p (log p + H).

use std::sync::OnceLock;

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor, bail};
use rayon::prelude::*;
use temper_gemm::buffer::{for_each_chunk, with_scratch};
use temper_gemm::matmul::matmul_unpacked_into;
use temper_gemm::simd::{add_assign, exp, fma, max, sum_map};
use temper_gemm::{Mat, PackedRhs, Rhs, Threads, WriteMode, matmul, simd};

use super::candle_interop::{CpuSlice, SavedForBackward, contiguous_slice, grad_tensor, op_output};
use super::grad_accumulator::{accumulate, accumulate_or_return};
use crate::Precision;

/// Logits held in memory at once.
pub const MAX_LOGITS: usize = 4 << 20;

/// Sizes (`n` rows of `d` columns, a vocabulary of `v`) and the tokens of each row.
pub struct TokenStatsOp {
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
    pub saves_hidden_grads: bool,
    /// Results of the forward pass.
    pub row_stats: OnceLock<Vec<RowStats>>,
    /// d logprob / d hidden `[n, d]`, if computed; a second backward pass recomputes the logits instead.
    pub hidden_grads: SavedForBackward<Vec<f32>>,
}

/// The output layer's weight `[v, d]` and bias `[v]`.
struct PackedLmHead<'a> {
    weight: Mat<'a>,
    bias: Option<&'a [f32]>,
    /// The packed weight for logits, in bf16 only. In f32 products read the weight in place: it is the model's largest,
    /// and too few products would share a packed copy.
    forward: Option<PackedRhs>,
    /// The packed weight for gradients of hidden states, likewise.
    backward: Option<PackedRhs>,
}

impl PackedLmHead<'_> {
    fn forward(&self) -> Rhs<'_> {
        self.forward.as_ref().map_or(Rhs::InPlace(self.weight.t()), Rhs::Packed)
    }

    fn backward(&self) -> Rhs<'_> {
        self.backward.as_ref().map_or(Rhs::InPlace(self.weight), Rhs::Packed)
    }
}

/// The statistics of one row.
#[derive(Clone, Copy)]
pub struct RowStats {
    logprob: f32,
    entropy: f32,
    log_sum_exp: f32,
}

impl TokenStatsOp {
    /// The output layer prepared for logits and, if `backward`, for gradients of hidden states.
    fn pack_lm_head<'a>(&self, weight: &'a [f32], bias: Option<&'a [f32]>, backward: bool) -> PackedLmHead<'a> {
        let weight = Mat::new(weight, self.v, self.d);
        let packed = |used: bool, w| {
            (used && self.precision == Precision::Bf16).then(|| PackedRhs::new(w, None, self.precision))
        };
        PackedLmHead { weight, bias, forward: packed(true, weight.t()), backward: packed(backward, weight) }
    }

    /// Rows per chunk: a function of the shape alone.
    fn chunk_rows(&self) -> usize {
        (MAX_LOGITS / self.v).clamp(64, 4096)
    }

    /// Computes the logits of the rows from `start` on into `logits`, -infinity where forbidden.
    fn logits(&self, logits: &mut [f32], hidden: &[f32], lm_head: &PackedLmHead, start: usize) {
        let n = logits.len() / self.v;
        let hidden = Mat::new(&hidden[start * self.d..], n, self.d);
        let mode = match lm_head.bias {
            Some(bias) => {
                for_each_chunk(logits, self.v, |_, row| row.copy_from_slice(bias));
                WriteMode::Add
            }
            None => WriteMode::Overwrite,
        };
        matmul(logits, mode, 1.0, hidden, lm_head.forward(), Threads::Pool);
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
    fn logit_gradients(
        &self,
        logits: &mut [f32],
        row_stats: &[RowStats],
        start: usize,
        g: impl Fn(usize) -> (f32, f32) + Sync,
    ) {
        for_each_chunk(logits, self.v, |offset, logits| {
            let i = offset / self.v;
            let (g_logprob, g_entropy) = g(start + i);
            logit_gradient(logits, row_stats[i].log_sum_exp, row_stats[i].entropy, g_logprob, g_entropy);
            logits[self.targets[start + i] as usize] += g_logprob;
        });
    }

    fn row_stats(&self, logits: &[f32], target: u32) -> RowStats {
        let m = max(logits);
        let (sum, weighted) = exp_sums(logits, m, self.entropy);
        let log_sum_exp = m + sum.ln();
        // H = log sum - sum (l - m) e^(l - m) / sum
        let entropy = if self.entropy { sum.ln() - weighted / sum } else { 0.0 };
        RowStats { logprob: logits[target as usize] - log_sum_exp, entropy, log_sum_exp }
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
pub fn kl_divergence(own: (&TokenStatsOp, &[f32], &[f32]), other: (&TokenStatsOp, &[f32], &[f32])) -> Result<Vec<f32>> {
    let ((p, p_hidden, p_weight), (q, q_hidden, q_weight)) = (own, other);
    let (p_bias, q_bias) =
        (p.bias.as_ref().map(CpuSlice::new).transpose()?, q.bias.as_ref().map(CpuSlice::new).transpose()?);
    let p_head = p.pack_lm_head(p_weight, p_bias.as_deref(), false);
    let q_head = q.pack_lm_head(q_weight, q_bias.as_deref(), false);
    let (n, v) = (p.n, p.v);
    let mut out = Vec::with_capacity(n);
    with_scratch(2 * p.chunk_rows().min(n) * v, |logits| {
        for start in (0..n).step_by(p.chunk_rows()) {
            let rows = p.chunk_rows().min(n - start);
            let (p_logits, rest) = logits.split_at_mut(rows * v);
            let q_logits = &mut rest[..rows * v];
            p.logits(p_logits, p_hidden, &p_head, start);
            q.logits(q_logits, q_hidden, &q_head, start);
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
impl CustomOp2 for TokenStatsOp {
    fn name(&self) -> &'static str {
        "temper-token-stats"
    }

    fn cpu_fwd(&self, h: &CpuStorage, h_l: &Layout, e: &CpuStorage, e_l: &Layout) -> Result<(CpuStorage, Shape)> {
        let (h, e) = (contiguous_slice(h, h_l)?, contiguous_slice(e, e_l)?);
        let bias = self.bias.as_ref().map(CpuSlice::new).transpose()?;
        let lm_head = self.pack_lm_head(e, bias.as_deref(), self.saves_hidden_grads);
        let mut row_stats: Vec<RowStats> = Vec::with_capacity(self.n);
        let mut hidden_grads = if self.saves_hidden_grads { vec![0.0; self.n * self.d] } else { vec![] };
        with_scratch(self.chunk_rows().min(self.n) * self.v, |logits| {
            for start in (0..self.n).step_by(self.chunk_rows()) {
                let end = (start + self.chunk_rows()).min(self.n);
                let logits = &mut logits[..(end - start) * self.v];
                self.logits(logits, h, &lm_head, start);
                let rows = logits.par_chunks_exact(self.v).zip(&self.targets[start..end]);
                row_stats.par_extend(rows.map(|(logits, &target)| self.row_stats(logits, target)));
                if self.saves_hidden_grads {
                    self.logit_gradients(logits, &row_stats[start..], start, |_| (1.0, 0.0));
                    let hidden_grads = &mut hidden_grads[start * self.d..end * self.d];
                    let dl = Mat::new(logits, end - start, self.v);
                    matmul(hidden_grads, WriteMode::Overwrite, 1.0, dl, lm_head.backward(), Threads::Pool);
                }
            }
        });
        if self.saves_hidden_grads {
            self.hidden_grads.save(hidden_grads);
        }
        let out = row_stats.iter().map(|r| r.logprob).chain(row_stats.iter().map(|r| r.entropy)).collect();
        self.row_stats.get_or_init(|| row_stats);
        op_output(out, (2, self.n))
    }

    fn bwd(&self, h: &Tensor, e: &Tensor, _res: &Tensor, g: &Tensor) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let Some(row_stats) = self.row_stats.get() else { bail!("token statistics ran backward before forward") };
        let g = g.contiguous()?;
        let (h_v, e_v, g_v) = (CpuSlice::new(h)?, CpuSlice::new(e)?, CpuSlice::new(&g)?);
        let bias = self.bias.as_ref().map(CpuSlice::new).transpose()?;
        let (g_logprob, g_entropy) = g_v.split_at(self.n);
        let Self { n, d, v, .. } = *self;
        if g_entropy.iter().all(|&g| g == 0.0)
            && let Some(mut dh) = self.hidden_grads.take()
        {
            dh.chunks_exact_mut(d).zip(g_logprob).for_each(|(row, &g)| row.iter_mut().for_each(|x| *x *= g));
            return Ok((Some(grad_tensor(dh, h)?), None));
        }
        let lm_head = self.pack_lm_head(&e_v, bias.as_deref(), h.track_op());
        let mut dh = h.track_op().then(|| vec![0.0; n * d]);
        let mut de = e.track_op().then(|| vec![0.0; v * d]);
        let trained_bias = self.bias.as_ref().filter(|b| b.track_op());
        let mut db = vec![0.0; if trained_bias.is_some() { v } else { 0 }];
        with_scratch(self.chunk_rows().min(n) * v, |logits| {
            for start in (0..n).step_by(self.chunk_rows()) {
                let end = (start + self.chunk_rows()).min(n);
                let logits = &mut logits[..(end - start) * v];
                self.logits(logits, &h_v, &lm_head, start);
                self.logit_gradients(logits, &row_stats[start..], start, |i| (g_logprob[i], g_entropy[i]));
                let dl = Mat::new(logits, end - start, v);
                if let Some(dh) = &mut dh {
                    let dh = &mut dh[start * d..end * d];
                    matmul(dh, WriteMode::Overwrite, 1.0, dl, lm_head.backward(), Threads::Pool);
                }
                if let Some(de) = &mut de {
                    let h = Mat::new(&h_v[start * d..], end - start, d);
                    matmul_unpacked_into(de, WriteMode::Add, 1.0, dl.t(), h, self.precision);
                }
                if trained_bias.is_some() {
                    logits.chunks_exact(v).for_each(|row| add_assign(&mut db, row));
                }
            }
        });
        drop(bias);
        if let Some(bias) = trained_bias {
            accumulate(bias, db)?;
        }
        let dh = dh.map(|x| grad_tensor(x, h)).transpose()?;
        Ok((dh, de.map_or(Ok(None), |x| accumulate_or_return(e, x))?))
    }
}
