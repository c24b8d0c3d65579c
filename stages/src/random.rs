//! Seeded choices that depend only on a row's name or on a fixed seed, never on order or threads.

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// A generator key for one purpose, independent of the stage's own seed: BLAKE3 of (seed, purpose).
pub fn fixed_key(seed: u64, purpose: &str) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("temper fixed generator v1");
    hasher.update(&seed.to_le_bytes());
    hasher.update(purpose.as_bytes());
    *hasher.finalize().as_bytes()
}

/// A generator for one purpose, independent of the stage's own seed.
pub fn fixed_generator(seed: u64, purpose: &str) -> ChaCha12Rng {
    ChaCha12Rng::from_seed(fixed_key(seed, purpose))
}

/// 64 bits that depend only on `key` and a row's `name`.
pub fn bits_of(key: &[u8; 32], name: impl AsRef<[u8]>) -> u64 {
    let hash = blake3::keyed_hash(key, name.as_ref());
    let mut first = [0; 8];
    first.copy_from_slice(&hash.as_bytes()[..8]);
    u64::from_le_bytes(first)
}

/// A number in [0, 1) that depends only on `key` and a row's `name`.
pub fn share_of(key: &[u8; 32], name: impl AsRef<[u8]>) -> f64 {
    // 53 bits: every value is exact in an f64.
    (bits_of(key, name) >> 11) as f64 / (1_u64 << 53) as f64
}

/// An index below `n`; the bias is below n / 2^64.
pub fn below(rng: &mut ChaCha12Rng, n: usize) -> usize {
    // The product's upper half is below n.
    ((u128::from(rng.next_u64()) * n as u128) >> 64) as usize
}

/// Fisher-Yates, implemented here so that no library release changes the order.
pub fn shuffle<T>(items: &mut [T], rng: &mut ChaCha12Rng) {
    for i in (1..items.len()).rev() {
        items.swap(i, below(rng, i + 1));
    }
}

/// Uniform in [0, 1), from the hash of `parts` under a generator key: independent of a row's position and of other
/// rows.
pub fn draw(key: &[u8; 32], parts: &[&str]) -> f64 {
    share_of(key, prefixed(parts))
}

/// The first 64 bits of the keyed hash of `parts`, each prefixed with its length.
pub fn hash(key: &[u8; 32], parts: &[&str]) -> u64 {
    bits_of(key, prefixed(parts))
}

/// All `parts` in one string, each prefixed with its length, so that no two lists give the same.
fn prefixed(parts: &[&str]) -> Vec<u8> {
    parts.iter().flat_map(|part| [&(part.len() as u64).to_le_bytes(), part.as_bytes()].concat()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shuffling_keeps_every_item_and_depends_on_the_seed() {
        let order = |seed| {
            let mut items: Vec<u32> = (0..100).collect();
            shuffle(&mut items, &mut fixed_generator(seed, "test"));
            items
        };
        let mut sorted = order(1);
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<_>>());
        assert_eq!(order(1), order(1));
        assert_ne!(order(1), order(2));
    }

    #[test]
    fn shares_are_uniform_enough() {
        let key = fixed_key(1, "test");
        let below_a_tenth = (0..10_000).filter(|i| share_of(&key, i.to_string()) < 0.1).count();
        assert!((900..1100).contains(&below_a_tenth), "{below_a_tenth}");
    }
}
