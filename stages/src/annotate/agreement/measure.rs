//! The statistics of judges who choose one of two: shares, Cohen's kappa, bins of length. Knows no table.

use crate::types::agreement::{Kappa, LengthBin, Share};

/// The 0.975 quantile of the normal distribution.
const Z: f64 = 1.959_963_984_540_054;

/// Yes and no.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub yes: u64,
    pub of: u64,
}

impl Tally {
    pub fn count(&mut self, yes: bool) {
        self.add(u64::from(yes), 1);
    }

    pub fn add(&mut self, yes: u64, of: u64) {
        self.yes += yes;
        self.of += of;
    }

    /// Wilson's interval; none of nothing.
    pub fn share(self) -> Option<Share> {
        if self.of == 0 {
            return None;
        }
        let (n, p) = (self.of as f64, self.yes as f64 / self.of as f64);
        let scale = 1.0 + Z * Z / n;
        let middle = (p + Z * Z / (2.0 * n)) / scale;
        let half = Z / scale * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
        // Rounding must not take an end beyond what it stands for.
        Some(Share { of: self.of, share: p, low: (middle - half).clamp(0.0, p), high: (middle + half).clamp(p, 1.0) })
    }
}

/// How often two judges gave which of two answers: by the first's, then the second's.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Square(pub [[u64; 2]; 2]);

impl Square {
    pub fn count(&mut self, first: usize, second: usize) {
        self.0[first][second] += 1;
    }

    pub fn agreement(self) -> Tally {
        let [[a, b], [c, d]] = self.0;
        Tally { yes: a + d, of: a + b + c + d }
    }

    /// Cohen's kappa with the large-sample interval of Fleiss, Cohen and Everitt (1969, Eq. 13), cut at -1 and 1; none where
    /// chance alone would agree always.
    pub fn kappa(self) -> Option<Kappa> {
        let n = self.agreement().of as f64;
        let p = self.0.map(|row| row.map(|count| count as f64 / n));
        let by_first = [p[0][0] + p[0][1], p[1][0] + p[1][1]];
        let by_second = [p[0][0] + p[1][0], p[0][1] + p[1][1]];
        let observed = p[0][0] + p[1][1];
        let chance = by_first[0] * by_second[0] + by_first[1] * by_second[1];
        if n == 0.0 || chance >= 1.0 {
            return None;
        }
        let kappa = (observed - chance) / (1.0 - chance);
        let mut spread = -(kappa - chance * (1.0 - kappa)).powi(2);
        for (i, j) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let term = if i == j {
                1.0 - (by_first[i] + by_second[i]) * (1.0 - kappa)
            } else {
                (1.0 - kappa) * (by_second[i] + by_first[j])
            };
            spread += p[i][j] * term * term;
        }
        let half = Z * (spread.max(0.0) / n).sqrt() / (1.0 - chance);
        Some(Kappa { kappa, low: (kappa - half).max(-1.0), high: (kappa + half).min(1.0) })
    }
}

/// The first number of words of each bin; the last has no end.
const BINS: [u64; 5] = [0, 3, 6, 11, 21];

/// What is counted in each bin of length.
#[derive(Clone, Copy, Debug, Default)]
pub struct ByLength([[Tally; 3]; BINS.len()]);

impl ByLength {
    /// Notes a pair whose summaries differ by so many words: whether both judges agree, and, where there is a longer one,
    /// whether each prefers it.
    pub fn count(&mut self, words: u64, agree: bool, for_longer: [bool; 2]) {
        let bin = BINS.partition_point(|&least| least <= words) - 1;
        let [agreement, first, second] = &mut self.0[bin];
        agreement.count(agree);
        if words > 0 {
            first.count(for_longer[0]);
            second.count(for_longer[1]);
        }
    }

    pub fn bins(&self) -> Vec<LengthBin> {
        let ends = BINS.iter().skip(1).map(|next| Some(next - 1)).chain([None]);
        BINS.iter()
            .zip(ends)
            .zip(&self.0)
            .map(|((&least, most), [agreement, first, second])| LengthBin {
                least,
                most,
                agreement: agreement.share(),
                first_for_longer: first.share(),
                second_for_longer: second.share(),
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::Rng;

    use super::*;
    use crate::stats;
    use crate::train::fixed_generator;

    fn near(found: f64, expected: f64) {
        assert!((found - expected).abs() < 5e-5, "{found} is not {expected}");
    }

    #[test]
    fn a_share_has_wilsons_interval() {
        // Newcombe (1998, table I), method 3: 81 of 263, 15 of 148, 0 of 20, 1 of 29.
        for (yes, of, low, high) in
            [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)]
        {
            let share = Tally { yes, of }.share().unwrap();
            near(share.low, low);
            near(share.high, high);
            assert_eq!((share.of, share.share), (of, yes as f64 / of as f64));
        }
        assert_eq!(Tally::default().share(), None);
        assert_eq!(Tally { yes: 7, of: 7 }.share().unwrap().high, 1.0);
    }

    #[test]
    fn kappa_is_agreement_beyond_chance() {
        // 35 of 50 agree, half would by chance.
        let kappa = Square([[20, 5], [10, 15]]).kappa().unwrap();
        near(kappa.kappa, 0.4);
        near(Square([[25, 0], [0, 30]]).kappa().unwrap().kappa, 1.0);
        near(Square([[0, 30], [30, 0]]).kappa().unwrap().kappa, -1.0);
        // As much agreement, but one answer is nearly always given: little beyond chance.
        near(Square([[34, 7], [8, 1]]).kappa().unwrap().kappa, -0.062_32);
        assert_eq!(Square([[9, 0], [0, 0]]).kappa(), None);
        assert_eq!(Square::default().kappa(), None);
    }

    #[test]
    fn kappas_interval_is_as_wide_as_resampling_says() {
        let square = Square([[60, 15], [25, 100]]);
        let answers: Vec<(usize, usize)> = [(0, 0), (0, 1), (1, 0), (1, 1)]
            .into_iter()
            .flat_map(|(i, j)| std::iter::repeat_n((i, j), square.0[i][j] as usize))
            .collect();
        let mut rng = fixed_generator(1, "resampling");
        let kappas: Vec<f64> = (0..4000)
            .map(|_| {
                let mut drawn = Square::default();
                for _ in &answers {
                    let (i, j) = answers[rng.random_range(0..answers.len())];
                    drawn.count(i, j);
                }
                drawn.kappa().unwrap().kappa
            })
            .collect();
        let kappa = square.kappa().unwrap();
        let half = (kappa.high - kappa.low) / 2.0;
        assert!((half / (1.96 * stats::std(&kappas)) - 1.0).abs() < 0.05, "{half}");
    }

    #[test]
    fn every_difference_in_length_has_its_bin() {
        let mut lengths = ByLength::default();
        for words in [0, 2, 3, 5, 6, 10, 11, 20, 21, 1000] {
            lengths.count(words, words > 5, [true, false]);
        }
        let bins = lengths.bins();
        let told: Vec<_> = bins.iter().map(|bin| (bin.least, bin.most, bin.agreement.unwrap().of)).collect();
        assert_eq!(told, [(0, Some(2), 2), (3, Some(5), 2), (6, Some(10), 2), (11, Some(20), 2), (21, None, 2)]);
        // A pair of equal length has no longer side.
        assert_eq!(bins[0].first_for_longer.map(|s| (s.of, s.share)), Some((1, 1.0)));
        assert_eq!((bins[1].agreement.unwrap().share, bins[2].agreement.unwrap().share), (0.0, 1.0));
        assert_eq!(ByLength::default().bins()[4].agreement, None);
    }

    proptest! {
        #[test]
        fn intervals_hold_what_they_are_of(cells in prop::array::uniform4(0u64..400)) {
            let square = Square([[cells[0], cells[1]], [cells[2], cells[3]]]);
            if let Some(share) = square.agreement().share() {
                prop_assert!(0.0 <= share.low && share.low <= share.share && share.share <= share.high && share.high <= 1.0);
            }
            if let Some(kappa) = square.kappa() {
                prop_assert!(-1.0 <= kappa.low && kappa.low <= kappa.kappa + 1e-12);
                prop_assert!(kappa.kappa <= kappa.high + 1e-12 && kappa.high <= 1.0);
            }
        }
    }
}
