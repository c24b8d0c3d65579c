//! Uniform random numbers by (row, position), so that a row's sample does not depend on the other rows.

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// A counter-based source of uniforms with a 32-byte key. The row is ChaCha12's stream number, the position its block
/// number, so there is no state and no drawing order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CounterRng(pub [u8; 32]);

impl CounterRng {
    /// Draws a fresh key from a generator.
    pub fn from_rng(rng: &mut impl RngCore) -> Self {
        let mut key = [0; 32];
        rng.fill_bytes(&mut key);
        Self(key)
    }

    /// A number in [0, 1), with 53 random bits, for the token at `position` of the response in `row`.
    pub fn uniform(&self, row: u64, position: u32) -> f64 {
        /// 32-bit words in a ChaCha block.
        const BLOCK: u128 = 16;
        let mut rng = ChaCha12Rng::from_seed(self.0);
        rng.set_stream(row);
        rng.set_word_pos(u128::from(position) * BLOCK);
        (rng.next_u64() >> 11) as f64 * (1.0 / (1u64 << 53) as f64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_draw_depends_on_key_row_and_position_only() {
        let rng = CounterRng([7; 32]);
        let (a, b) = (rng.uniform(3, 5), rng.uniform(5, 3));
        assert_ne!(a, b);
        assert_eq!(a, rng.uniform(3, 5));
        assert_ne!(a, CounterRng([8; 32]).uniform(3, 5));
    }

    #[test]
    fn draws_are_uniform_over_rows_and_positions() {
        let rng = CounterRng([1; 32]);
        let mut bins = [0usize; 20];
        for row in 0..200 {
            for position in 0..100 {
                bins[(rng.uniform(row, position) * 20.0) as usize] += 1;
            }
        }
        let chi2: f64 = bins.iter().map(|&n| (n as f64 - 1000.0).powi(2) / 1000.0).sum();
        // 19 degrees of freedom: p = 0.001 at 43.8.
        assert!(chi2 < 43.8, "chi-square {chi2}");
    }
}
