//! The embedded corpus: invented posts whose facts are known, so that a summary's true quality can be scored. Knows no model.

mod comparisons;
mod facts;
mod grammar;
pub(crate) mod rounds;
mod swap;
mod template;
mod tinytldr;
pub(crate) mod words;

#[cfg(test)]
mod tests;

pub use comparisons::DatasetComparisons;
pub use facts::{Category, Facts};
pub use grammar::{STYLES, Situation, all_summaries, draw, partial_summary, summary};
pub use swap::swap_facts;
pub use tinytldr::DatasetTinyTldr;

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::SeedableRng;

/// Post `index` of a corpus: depends on the generator key and its index alone, so that a longer corpus begins with a shorter.
pub fn situation(key: [u8; 32], index: u64) -> Situation {
    let mut rng = ChaCha12Rng::from_seed(key);
    rng.set_stream(index);
    draw(&mut rng)
}

/// The first `n` situations of a seed: the same bytes for the same arguments, for tests of whatever reads posts.
pub fn examples(n: u64, seed: u64) -> Vec<Situation> {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    (0..n).map(|index| situation(key, index)).collect()
}
