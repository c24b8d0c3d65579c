//! Philox 4x32-10 (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"): counter-based random draws, many
//! at a time. Any part of a long sequence can be computed on its own.
use temper_gemm::simd;

/// Counters computed side by side.
const WIDTH: usize = 16;
/// Draws from `WIDTH` counters.
pub(crate) const DRAWS: usize = 4 * WIDTH;

const ROUNDS: usize = 10;
const MULTIPLIERS: [u32; 2] = [0xd251_1f53, 0xcd9e_8d57];
const WEYL: [u32; 2] = [0x9e37_79b9, 0xbb67_ae85];

simd! {
    /// Fills `draws` with the draws of `key` from number `first` on, a multiple of [`DRAWS`]. Draw `DRAWS b + WIDTH j +
    /// i` is word `j` of counter `WIDTH b + i`.
    pub(crate) fn fill(draws: &mut [[u32; DRAWS]], key: [u32; 2], first: u64) {
        for (b, draws) in draws.iter_mut().enumerate() {
            let block = first / DRAWS as u64 + b as u64;
            let (mut x, mut key) = ([[0_u32; WIDTH]; 4], key);
            let [low, high, ..] = &mut x;
            for (i, (low, high)) in low.iter_mut().zip(high).enumerate() {
                let counter = WIDTH as u64 * block + i as u64;
                (*low, *high) = (counter as u32, (counter >> 32) as u32);
            }
            for _ in 0..ROUNDS {
                x = round(x, key);
                key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
            }
            for j in 0..4 {
                draws[WIDTH * j..][..WIDTH].copy_from_slice(&x[j]);
            }
        }
    }
}

#[inline(always)]
fn round(x: [[u32; WIDTH]; 4], key: [u32; 2]) -> [[u32; WIDTH]; 4] {
    let mut y = [[0; WIDTH]; 4];
    for i in 0..WIDTH {
        let a = u64::from(MULTIPLIERS[0]) * u64::from(x[0][i]);
        let b = u64::from(MULTIPLIERS[1]) * u64::from(x[2][i]);
        y[0][i] = (b >> 32) as u32 ^ x[1][i] ^ key[0];
        y[1][i] = b as u32;
        y[2][i] = (a >> 32) as u32 ^ x[3][i] ^ key[1];
        y[3][i] = a as u32;
    }
    y
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Known answers from the authors' Random123.
    #[test]
    fn known_answers_of_philox_are_reproduced() {
        let ten_rounds = |counter: [u32; 4], mut key: [u32; 2]| {
            let mut x = counter.map(|word| [word; WIDTH]);
            for _ in 0..ROUNDS {
                x = round(x, key);
                key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
            }
            x.map(|words| words[0])
        };
        assert_eq!(ten_rounds([0; 4], [0; 2]), [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c, 0x9b00_dbd8]);
        assert_eq!(ten_rounds([u32::MAX; 4], [u32::MAX; 2]), [0x408f_276d, 0x41c8_3b0e, 0xa20b_c7c6, 0x6d54_51fd]);
        let pi = [0x243f_6a88, 0x85a3_08d3, 0x1319_8a2e, 0x0370_7344];
        assert_eq!(ten_rounds(pi, [0xa409_3822, 0x299f_31d0]), [0xd16c_fe09, 0x94fd_cceb, 0x5001_e420, 0x2412_6ea1]);
    }

    #[test]
    fn any_part_of_the_draws_can_be_computed_alone() {
        let (mut all, mut part) = ([[0; DRAWS]; 5], [[0; DRAWS]; 2]);
        fill(&mut all, [3, 4], 0);
        fill(&mut part, [3, 4], 2 * DRAWS as u64);
        assert_eq!(all[2..4], part);
        assert_eq!([all[0][0], all[0][WIDTH]].map(|x| x != 0), [true; 2]);
        let mut first = [[0; DRAWS]; 1];
        fill(&mut first, [0, 0], 0);
        assert_eq!([first[0][0], first[0][WIDTH], first[0][2 * WIDTH]], [0x6627_e8d5, 0xe169_c58d, 0xbc57_ac4c]);
    }
}
