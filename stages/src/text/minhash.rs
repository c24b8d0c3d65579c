//! Near-duplicate detection by MinHash over word shingles (Broder 1997), with banded buckets.

use std::collections::HashMap;

/// Words per shingle.
const SHINGLE: usize = 5;
/// Hashes per signature.
const HASHES: usize = 128;

type Signature = [u32; HASHES];

/// Finds texts whose shingles have at least a given Jaccard similarity with those of an earlier text.
pub struct NearDuplicates {
    threshold: f64,
    rows_per_band: usize,
    buckets: HashMap<(u16, u64), Vec<u32>>,
    signatures: Vec<Signature>,
}

impl NearDuplicates {
    /// `threshold` in (0, 1].
    pub fn new(threshold: f64) -> Self {
        // With b bands of r rows, texts of similarity s share a bucket with probability 1 - (1 - s^r)^b, which is steep
        // near (1/b)^(1/r). The largest r whose steep part lies below the threshold misses few texts and needs few
        // comparisons.
        let knee = |rows: usize| (rows as f64 / HASHES as f64).powf(1.0 / rows as f64);
        let rows_per_band = [32, 16, 8, 4, 2, 1].into_iter().find(|&rows| knee(rows) <= threshold * 0.9).unwrap_or(1);
        Self { threshold, rows_per_band, buckets: HashMap::new(), signatures: Vec::new() }
    }

    /// Whether a normalised text is near an earlier one; if not, the text is added.
    pub fn is_near(&mut self, normalised: &str) -> bool {
        let signature = signature(normalised);
        let bands: Vec<(u16, u64)> = (signature.chunks(self.rows_per_band).enumerate())
            .map(|(band, rows)| (band as u16, rows.iter().fold(0x9e37_79b9, |hash, &row| mix(hash ^ u64::from(row)))))
            .collect();
        let enough = (self.threshold * HASHES as f64).ceil() as usize;
        let near = bands.iter().filter_map(|band| self.buckets.get(band)).flatten().any(|&other| {
            let other = &self.signatures[other as usize];
            signature.iter().zip(other).filter(|(a, b)| a == b).count() >= enough
        });
        if !near {
            let n = self.signatures.len() as u32;
            self.signatures.push(signature);
            for band in bands {
                self.buckets.entry(band).or_default().push(n);
            }
        }
        near
    }
}

fn signature(text: &str) -> Signature {
    let words: Vec<u64> = text.split(' ').map(|word| first_word(blake3::hash(word.as_bytes()).as_bytes())).collect();
    let mut signature = [u32::MAX; HASHES];
    for shingle in words.windows(SHINGLE.min(words.len())) {
        let mut state = shingle.iter().fold(0, |hash, &word| mix(hash ^ word));
        for least in &mut signature {
            state = mix(state);
            *least = (*least).min((state >> 32) as u32);
        }
    }
    signature
}

fn first_word(hash: &[u8; 32]) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&hash[..8]);
    u64::from_le_bytes(word)
}

/// One step of SplitMix64 (Steele et al. 2014).
fn mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn text(n: usize, from: usize) -> String {
        (from..from + n).map(|i| format!("word{i}")).collect::<Vec<_>>().join(" ")
    }

    #[test]
    fn a_text_with_one_word_changed_is_near_and_another_text_is_not() {
        let mut seen = NearDuplicates::new(0.8);
        assert!(!seen.is_near(&text(200, 0)));
        assert!(seen.is_near(&text(200, 0).replace("word100", "other")));
        assert!(!seen.is_near(&text(200, 1000)));
        assert!(!seen.is_near(&text(200, 100)));
    }

    #[test]
    fn short_texts_are_near_only_if_equal() {
        let mut seen = NearDuplicates::new(0.8);
        assert!(!seen.is_near("one two"));
        assert!(!seen.is_near("one three"));
        assert!(seen.is_near("one two"));
    }
}
