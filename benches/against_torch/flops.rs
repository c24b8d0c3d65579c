//! Floating-point operations of a GPT-2, counted once for both sides.
//!
//! Counts matrix products, with two operations per multiply-add, as far as the result needs them: the visible half of
//! causal attention, and in the last layer only keys and values for positions without a requested output. Excludes
//! norms, GELU, softmax, sampling, the optimiser, and anything that an implementation computes twice.

use crate::shapes::Shape;

/// The trained part of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrainedWeights {
    /// Every weight.
    All,
    /// An adapter of this rank on every linear layer.
    Lora(usize),
}

/// Operations of passes over sequences of one length.
#[derive(Clone, Copy, Debug)]
pub struct PassFlops<'a> {
    pub shape: &'a Shape,
    pub rows: usize,
    pub time: usize,
    /// Number of positions at the end of each sequence whose hidden states are requested.
    pub requested: usize,
    /// Whether these positions are multiplied with the output embedding.
    pub lm_head: bool,
}

impl PassFlops<'_> {
    /// One forward pass: 24 d^2 per token and layer in linear layers, 2 d (time + 1) in attention, 2 d vocab per
    /// predicted token. In the last layer, linear layers take 4 d^2 per token and 20 d^2 per requested one.
    pub fn forward(&self) -> f64 {
        self.linear_flops() + self.attention_flops() + self.lm_head_flops()
    }

    /// Forward and backward pass. The gradient of an input costs as much as the product itself, and so does that of a
    /// weight; attention's backward pass costs twice its forward pass. An adapter adds its thin products three times
    /// and needs no gradient of the first layer's input (except for the adapter's share, which is counted and
    /// negligible).
    pub fn forward_and_backward(&self, trained: TrainedWeights) -> f64 {
        let attention = 3.0 * self.attention_flops();
        match trained {
            TrainedWeights::All => 3.0 * (self.linear_flops() + self.lm_head_flops()) + attention,
            TrainedWeights::Lora(rank) => {
                let Shape { d, layers, .. } = *self.shape;
                // Inputs and outputs of the four linear layers: d + 3 d, d + d, d + 4 d, 4 d + d.
                let per_rank = self.tokens() * (16 * d * (layers - 1) + 3 * d) + self.requested_tokens() * 13 * d;
                let adapter = 2.0 * (rank * per_rank) as f64;
                let first = 2.0 * (self.tokens() * 3 * d * d) as f64;
                2.0 * (self.linear_flops() + self.lm_head_flops()) - first + 3.0 * adapter + attention
            }
        }
    }

    /// Tokens of all sequences.
    fn tokens(&self) -> usize {
        self.rows * self.time
    }

    /// Requested positions of all sequences.
    fn requested_tokens(&self) -> usize {
        self.rows * self.requested
    }

    fn linear_flops(&self) -> f64 {
        let Shape { d, layers, .. } = *self.shape;
        ((24 * self.tokens() * (layers - 1) + 4 * self.tokens() + 20 * self.requested_tokens()) * d * d) as f64
    }

    fn attention_flops(&self) -> f64 {
        let Shape { d, layers, .. } = *self.shape;
        // Attention of the first n positions, each over the positions up to itself.
        let first = |n: usize| 2 * n * (n + 1) * d;
        let all = first(self.time);
        (self.rows * (all * layers - first(self.time - self.requested))) as f64
    }

    fn lm_head_flops(&self) -> f64 {
        let predicted = if self.lm_head { self.requested_tokens() } else { 0 };
        2.0 * (predicted * self.shape.d * self.shape.vocab) as f64
    }
}

impl Shape {
    /// Reads the prompts of `rows` sequences and predicts one token for each.
    pub fn prefill(&self, rows: usize) -> f64 {
        PassFlops { shape: self, rows, time: self.prompt, requested: 1, lm_head: true }.forward()
    }

    /// All further tokens of `rows` responses of full length: the cost of one pass over everything minus that of the
    /// prompts.
    pub fn decode(&self, rows: usize) -> f64 {
        let time = self.prompt + self.max_new - 1;
        PassFlops { shape: self, rows, time, requested: self.max_new, lm_head: true }.forward() - self.prefill(rows)
    }

    /// One pass over complete sequences for the log-probabilities of the response tokens, or for a score at the last
    /// token.
    pub fn full_pass(&self, rows: usize, lm_head: bool) -> PassFlops<'_> {
        // No prediction depends on the last token.
        let (time, requested) =
            if lm_head { (self.prompt + self.max_new - 1, self.max_new) } else { (self.prompt + self.max_new, 1) };
        PassFlops { shape: self, rows, time, requested, lm_head }
    }

    /// A complete PPO phase: sampling, log-probabilities of policy and reference, each member's scores, the updates.
    pub fn phase(&self, members: usize, trained: TrainedWeights) -> f64 {
        let rows = self.rollouts;
        self.prefill(rows)
            + self.decode(rows)
            + 2.0 * self.full_pass(rows, true).forward()
            + members as f64 * self.full_pass(rows, false).forward()
            + self.epochs as f64 * self.full_pass(rows, true).forward_and_backward(trained)
    }
}
