//! An endless stream of prompt indices in seeded passes.

use engine::error::Result;
use rand_chacha::ChaCha12Rng;
use serde::{Deserialize, Serialize};

use crate::stats::permutation;
use crate::train::checkpoint::GeneratorPosition;

/// Passes over `0..n`, each in its own order.
pub(crate) struct ShuffledPasses {
    n: usize,
    left: Vec<usize>,
    rng: ChaCha12Rng,
}

/// Position of the passes, for a checkpoint.
#[derive(Serialize, Deserialize)]
pub(crate) struct State {
    left: Vec<usize>,
    drawn: GeneratorPosition,
}

impl ShuffledPasses {
    pub(crate) fn new(n: usize, rng: ChaCha12Rng) -> Self {
        Self { n, left: Vec::new(), rng }
    }

    pub(crate) fn take(&mut self, k: usize) -> Vec<usize> {
        (0..k)
            .map(|_| {
                if self.left.is_empty() {
                    self.left = permutation(self.n, &mut self.rng);
                }
                self.left.pop().expect("just filled, and n > 0: an empty split is refused")
            })
            .collect()
    }

    pub(crate) fn state(&self) -> Result<State> {
        Ok(State { left: self.left.clone(), drawn: GeneratorPosition::of(&self.rng)? })
    }

    /// Moves fresh passes with the same generator to the position in `state`.
    pub(crate) fn restore(&mut self, state: State) {
        self.left = state.left;
        state.drawn.restore(&mut self.rng);
    }
}
