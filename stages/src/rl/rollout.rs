//! One phase's responses with the log-probabilities, values and scores of their tokens.

use candle_core::Tensor;
use lm::{Batch, CausalLm, ScalarHead, Sequence, StatOptions};

use crate::error::IntoStageResult;
use crate::reward::LoadedReward;
use crate::train::by_length;
use engine::error::Result;

/// Responses with per-token outputs of the policy, the reference and the value head at the time of sampling.
#[derive(Debug, Default)]
pub struct Rollout {
    /// `[responses]`; responses to the same prompt are adjacent.
    pub sequences: Vec<Sequence>,
    /// Post id of each response, for messages.
    pub posts: Vec<String>,
    pub ended: Vec<bool>,
    /// log pi_old, `[responses][tokens]`; EOS is masked before the minimum length.
    pub logprob: Vec<Vec<f64>>,
    /// log pi_ref, with the same mask.
    pub reference: Vec<Vec<f64>>,
    /// V before each token; empty without a value head.
    pub value: Vec<Vec<f64>>,
    /// KL(pi_old || pi_ref) of the distribution that each token was drawn from.
    pub divergence: Vec<Vec<f64>>,
    /// Entropy of pi_old at each token, in nats.
    pub entropy: Vec<Vec<f64>>,
    /// `[members][responses]`, centred.
    pub scores: Vec<Vec<f64>>,
    /// Scores of the reference policy's response to each response's prompt, if the variance is relative to them.
    pub reference_scores: Option<Vec<Vec<f64>>>,
}

impl Rollout {
    /// (log pi_old - log pi_ref)_t of response `i`.
    pub fn log_ratio(&self, i: usize) -> Vec<f64> {
        self.logprob[i].iter().zip(&self.reference[i]).map(|(p, r)| p - r).collect()
    }

    /// The k1 estimate of each response's KL: the summed log ratio over its response tokens.
    pub fn kl(&self) -> Vec<f64> {
        (0..self.sequences.len()).map(|i| self.log_ratio(i).iter().sum()).collect()
    }

    /// The exact KL of each response given its visited tokens: the sum of its tokens' divergences. It has the
    /// expectation of k1 with a smaller variance, and is never negative.
    pub fn kl_exact(&self) -> Vec<f64> {
        self.divergence.iter().map(|tokens| tokens.iter().sum()).collect()
    }

    /// The k3 estimate: sum over tokens of (r - 1) - log r with r = pi_ref / pi_old (Schulman, "Approximating KL
    /// divergence"); never negative.
    pub fn kl_k3(&self) -> Vec<f64> {
        (0..self.sequences.len())
            .map(|i| self.log_ratio(i).iter().map(|log_ratio| (-log_ratio).exp() - 1.0 + log_ratio).sum())
            .collect()
    }
}

/// A policy's outputs for each response token, `[responses][tokens]`.
pub struct Scored {
    pub logprob: Vec<Vec<f64>>,
    /// Empty unless requested.
    pub entropy: Vec<Vec<f64>>,
    /// Empty without a value head.
    pub value: Vec<Vec<f64>>,
    /// log pi_ref.
    pub reference: Vec<Vec<f64>>,
    /// KL(policy || reference).
    pub divergence: Vec<Vec<f64>>,
}

/// Scores `sequences` with policy and reference without gradients, `batch` at a time.
pub fn score_tokens(
    policy: &CausalLm,
    head: Option<&ScalarHead>,
    reference: &CausalLm,
    sequences: &[Sequence],
    options: &StatOptions,
    batch: usize,
) -> Result<Scored> {
    let policy = policy.frozen();
    let head = head.map(ScalarHead::frozen);
    let empty = || vec![Vec::new(); sequences.len()];
    let mut scored =
        Scored { logprob: empty(), entropy: empty(), value: empty(), reference: empty(), divergence: empty() };
    let plain = StatOptions { entropy: false, ..options.clone() };
    let lengths: Vec<usize> = sequences.iter().map(|s| s.prompt.len() + s.response.len()).collect();
    for rows in by_length(&lengths, batch) {
        let members: Vec<&Sequence> = rows.iter().map(|&i| &sequences[i]).collect();
        let packed = Batch::new(&members).into_stage_result()?;
        let predicting = policy.hidden_for_responses(&packed, None).into_stage_result()?;
        let others = reference.hidden_for_responses(&packed, None).into_stage_result()?;
        let stats = policy.token_stats(&predicting, &packed, options).into_stage_result()?;
        let logprob = flat(&stats.logprob)?;
        let entropy = stats.entropy.as_ref().map(flat).transpose()?;
        let value = head.as_ref().map(|head| flat(&head.forward(&predicting).into_stage_result()?)).transpose()?;
        let log_reference = flat(&reference.token_stats(&others, &packed, &plain).into_stage_result()?.logprob)?;
        let divergence = policy.kl_divergence(&predicting, reference, &others, &packed, options).into_stage_result()?;
        for (&i, range) in rows.iter().zip(packed.row_ranges()) {
            scored.logprob[i] = logprob[range.clone()].to_vec();
            scored.reference[i] = log_reference[range.clone()].to_vec();
            scored.divergence[i] = divergence[range.clone()].iter().map(|&kl| f64::from(kl)).collect();
            if let Some(entropy) = &entropy {
                scored.entropy[i] = entropy[range.clone()].to_vec();
            }
            if let Some(value) = &value {
                scored.value[i] = value[range.clone()].to_vec();
            }
        }
    }
    Ok(scored)
}

/// phi_m of every response, `[members][responses]`, centred.
pub fn score_members(members: &[LoadedReward], sequences: &[Sequence], batch: usize) -> Result<Vec<Vec<f64>>> {
    let rows: Vec<&Sequence> = sequences.iter().collect();
    members
        .iter()
        .map(|member| Ok(crate::reward::score(member, &rows, batch)?.into_iter().map(f64::from).collect()))
        .collect()
}

fn flat(tensor: &Tensor) -> Result<Vec<f64>> {
    let values: Vec<f32> = tensor.to_vec1().into_stage_result()?;
    Ok(values.into_iter().map(f64::from).collect())
}
