//! Floating-point operations of a GPT-2, counted once for both sides. Knows no implementation.
//!
//! Counted are products of matrices, two operations for each multiply-add, as far as the result needs them: of causal
//! attention the half that is seen; in the last layer, a position that nobody asks for counts with its key and value alone.
//! Not counted: norms, GELU, softmax, sampling, the optimiser; anything an implementation computes twice.

use crate::shapes::Shape;

/// What of a model is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trains {
    /// Every weight.
    All,
    /// An adapter of this rank on every linear layer.
    Lora(usize),
}

/// Operations of passes over sequences of one length.
#[derive(Clone, Copy, Debug)]
pub struct Passes<'a> {
    pub shape: &'a Shape,
    pub rows: usize,
    pub time: usize,
    /// Positions at the end of each sequence whose hidden states are wanted.
    pub wanted: usize,
    /// Whether these meet the output embedding.
    pub predicts: bool,
}

impl Passes<'_> {
    /// One forward pass: 24 d^2 a token and layer in linear layers, 2 d (time + 1) in attention, 2 d vocab a predicted token;
    /// in the last layer 4 d^2 a token and 20 d^2 a wanted one.
    pub fn forward(&self) -> f64 {
        self.linear() + self.attention() + self.output()
    }

    /// Forward and backward. The gradient of an input costs what the product itself did, that of a weight the same again;
    /// attention's backward pass twice its forward pass. An adapter adds its thin products thrice, and needs no gradient
    /// of the first layer's input (but for the adapter's share of that, which is counted and is next to nothing).
    pub fn train(&self, trains: Trains) -> f64 {
        let attention = 3.0 * self.attention();
        match trains {
            Trains::All => 3.0 * (self.linear() + self.output()) + attention,
            Trains::Lora(rank) => {
                let Shape { d, layers, .. } = *self.shape;
                // Inputs and outputs of the four layers: d + 3 d, d + d, d + 4 d, 4 d + d.
                let per_rank = self.tokens() * (16 * d * (layers - 1) + 3 * d) + self.wanted() * 13 * d;
                let thin = 2.0 * (rank * per_rank) as f64;
                let first = 2.0 * (self.tokens() * 3 * d * d) as f64;
                2.0 * (self.linear() + self.output()) - first + 3.0 * thin + attention
            }
        }
    }

    /// Of all sequences.
    fn tokens(&self) -> usize {
        self.rows * self.time
    }

    /// Of all sequences.
    fn wanted(&self) -> usize {
        self.rows * self.wanted
    }

    fn linear(&self) -> f64 {
        let Shape { d, layers, .. } = *self.shape;
        ((24 * self.tokens() * (layers - 1) + 4 * self.tokens() + 20 * self.wanted()) * d * d) as f64
    }

    fn attention(&self) -> f64 {
        let Shape { d, layers, .. } = *self.shape;
        // Of the first n positions, each over those up to itself.
        let first = |n: usize| 2 * n * (n + 1) * d;
        let all = first(self.time);
        (self.rows * (all * layers - first(self.time - self.wanted))) as f64
    }

    fn output(&self) -> f64 {
        let predicted = if self.predicts { self.wanted() } else { 0 };
        2.0 * (predicted * self.shape.d * self.shape.vocab) as f64
    }
}

impl Shape {
    /// Reading the prompts of `rows` sequences and predicting one token of each.
    pub fn prefill(&self, rows: usize) -> f64 {
        Passes { shape: self, rows, time: self.prompt, wanted: 1, predicts: true }.forward()
    }

    /// All further tokens of `rows` responses of the full length: what one pass over everything costs above the prompts.
    pub fn decode(&self, rows: usize) -> f64 {
        let time = self.prompt + self.max_new - 1;
        Passes { shape: self, rows, time, wanted: self.max_new, predicts: true }.forward() - self.prefill(rows)
    }

    /// One pass over whole sequences for the response tokens' log-probabilities, or for a score at the last token.
    pub fn whole(&self, rows: usize, predicts: bool) -> Passes<'_> {
        // No prediction depends on the last token.
        let (time, wanted) =
            if predicts { (self.prompt + self.max_new - 1, self.max_new) } else { (self.prompt + self.max_new, 1) };
        Passes { shape: self, rows, time, wanted, predicts }
    }

    /// A whole PPO phase: sampling, the policy's and the reference's log-probabilities, each member's scores, the updates.
    pub fn phase(&self, members: usize, trains: Trains) -> f64 {
        let rows = self.rollouts;
        self.prefill(rows)
            + self.decode(rows)
            + 2.0 * self.whole(rows, true).forward()
            + members as f64 * self.whole(rows, false).forward()
            + self.epochs as f64 * self.whole(rows, true).train(trains)
    }
}
