//! The embedded corpus: invented posts with known facts, so that a summary's true quality can be computed.

pub(crate) mod corrupt;
pub(crate) mod cycle;
mod facts;
mod grammar;
pub mod quality;
mod swap;
mod template;
pub(crate) mod words;

#[cfg(test)]
mod tests;

pub use corrupt::{Sound, corrupt};
pub use facts::{Category, Facts};
pub use grammar::{STYLES, Situation, all_summaries, draw, partial_summary, summary};
pub use swap::swap_facts;

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::SeedableRng;

/// Post `index` of a corpus. Depends only on the generator key and the index, so that a corpus is a prefix of any
/// longer one.
pub fn situation(key: [u8; 32], index: u64) -> Situation {
    let mut rng = ChaCha12Rng::from_seed(key);
    rng.set_stream(index);
    draw(&mut rng)
}

/// The first `n` situations of a seed, for tests.
pub fn examples(n: u64, seed: u64) -> Vec<Situation> {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    (0..n).map(|index| situation(key, index)).collect()
}
