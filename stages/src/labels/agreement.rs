//! Statistics of judges who choose one of two: shares, Cohen's kappa, bins of length.
//!
//! Pairs of one post are not independent: a post that is hard to judge is hard in all of its pairs. Intervals use
//! variances between posts (linearised, with the usual correction for a small number of clusters), and are never
//! narrower than those of independent pairs.

use crate::types::agreement::{Kappa, LengthBin, Share};

/// The 0.975 quantile of the normal distribution.
const Z: f64 = 1.959_963_984_540_054;

/// Number of positive observations among all.
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

    /// The share with Wilson's interval; `None` without observations.
    pub fn share(self) -> Option<Share> {
        wilson(self.yes, self.of, self.of as f64)
    }
}

/// Wilson's interval for `yes` of `of`, with the width of `n` independent observations.
fn wilson(yes: u64, of: u64, n: f64) -> Option<Share> {
    if of == 0 {
        return None;
    }
    let p = yes as f64 / of as f64;
    let scale = 1.0 + Z * Z / n;
    let middle = (p + Z * Z / (2.0 * n)) / scale;
    let half = Z / scale * (p * (1.0 - p) / n + Z * Z / (4.0 * n * n)).sqrt();
    // Rounding must not put an end of the interval on the wrong side of the share.
    Some(Share { of, share: p, low: (middle - half).clamp(0.0, p), high: (middle + half).clamp(p, 1.0) })
}

/// Number of pairs in each of `K` categories, and their covariance between posts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Counts<const K: usize> {
    pairs: [u64; K],
    /// For every two categories, the product of a post's counts, summed over posts.
    products: [[u64; K]; K],
    posts: u64,
}

impl<const K: usize> Default for Counts<K> {
    fn default() -> Self {
        Self { pairs: [0; K], products: [[0; K]; K], posts: 0 }
    }
}

impl<const K: usize> Counts<K> {
    /// Adds the pairs of one post, by category.
    pub fn add_post(&mut self, counts: [u64; K]) {
        if counts == [0; K] {
            return;
        }
        self.posts += 1;
        for i in 0..K {
            self.pairs[i] += counts[i];
            for j in 0..K {
                self.products[i][j] += counts[i] * counts[j];
            }
        }
    }

    fn of(&self) -> u64 {
        self.pairs.iter().sum()
    }

    /// The variance of a statistic to which a pair of category `i` contributes `influence[i]` / pairs, where the mean
    /// influence is zero. Infinite for a single post.
    fn variance(&self, influence: [f64; K]) -> f64 {
        let n = self.of() as f64;
        let posts = self.posts as f64;
        let independent = (0..K).map(|i| self.pairs[i] as f64 * influence[i].powi(2)).sum::<f64>();
        let all = (0..K).flat_map(|i| (0..K).map(move |j| (i, j)));
        let between = all.map(|(i, j)| influence[i] * influence[j] * self.products[i][j] as f64).sum::<f64>();
        let few = posts / (posts - 1.0) * ((n - 1.0) / n);
        if self.posts == 1 && n > 1.0 { f64::INFINITY } else { independent.max(between * few) / (n * n) }
    }
}

impl Counts<2> {
    /// The share of the first category, with Wilson's interval for the number of independent pairs that has the same
    /// variance; if all pairs are of one category, each post counts once. `None` without pairs.
    pub fn share(&self) -> Option<Share> {
        let of = self.of();
        let p = self.pairs[0] as f64 / of as f64;
        let independent = p * (1.0 - p) / of as f64;
        let alike = independent / self.variance([1.0 - p, -p]);
        let n = if independent > 0.0 { (of as f64 * alike).max(1.0) } else { self.posts as f64 };
        wilson(self.pairs[0], of, n)
    }
}

/// Categories by the first and second judge's answers: `2 * first + second`.
impl Counts<4> {
    /// Counts of equal and of different answers.
    pub fn agreement(&self) -> Counts<2> {
        let kind = |i: usize| usize::from(!matches!(i, 0 | 3));
        let mut sum = Counts { posts: self.posts, ..Counts::default() };
        for i in 0..4 {
            sum.pairs[kind(i)] += self.pairs[i];
            for j in 0..4 {
                sum.products[kind(i)][kind(j)] += self.products[i][j];
            }
        }
        sum
    }

    /// Cohen's kappa with the large-sample interval of Fleiss, Cohen and Everitt (1969, Eq. 13), widened for the
    /// variance between posts and clamped to [-1, 1]. `None` if chance agreement is 1.
    pub fn kappa(&self) -> Option<Kappa> {
        let n = self.of() as f64;
        let p = self.pairs.map(|count| count as f64 / n);
        let (by_first, by_second) = ([p[0] + p[1], p[2] + p[3]], [p[0] + p[2], p[1] + p[3]]);
        let observed = p[0] + p[3];
        let chance = by_first[0] * by_second[0] + by_first[1] * by_second[1];
        if n == 0.0 || chance >= 1.0 {
            return None;
        }
        let kappa = (observed - chance) / (1.0 - chance);
        let influence = [(0, 0), (0, 1), (1, 0), (1, 1)].map(|(i, j)| {
            let by_chance = by_second[i] + by_first[j] - 2.0 * chance;
            (f64::from(u8::from(i == j)) - observed - (1.0 - kappa) * by_chance) / (1.0 - chance)
        });
        let half = Z * self.variance(influence).sqrt();
        Some(Kappa { kappa, low: (kappa - half).max(-1.0), high: (kappa + half).min(1.0) })
    }
}

/// Minimum number of words of each bin; the last bin is unbounded.
const BINS: [u64; 5] = [0, 3, 6, 11, 21];

/// Counts of one post in each bin of length: whether both judges agree, and whether each prefers the longer summary.
#[derive(Clone, Copy, Debug, Default)]
pub struct LengthCounts([[[u64; 2]; 3]; BINS.len()]);

impl LengthCounts {
    /// Adds a pair whose summaries differ by `words` words: whether both judges agree and, unless the lengths are
    /// equal, whether each judge prefers the longer summary.
    pub fn count(&mut self, words: u64, agree: bool, for_longer: [bool; 2]) {
        let [agreement, judges @ ..] = &mut self.0[BINS.partition_point(|&least| least <= words) - 1];
        agreement[usize::from(!agree)] += 1;
        for (judge, longer) in judges.iter_mut().zip(for_longer).filter(|_| words > 0) {
            judge[usize::from(!longer)] += 1;
        }
    }
}

/// [`LengthCounts`] summed over posts.
#[derive(Clone, Copy, Debug, Default)]
pub struct ByLength([[Counts<2>; 3]; BINS.len()]);

impl ByLength {
    pub fn add_post(&mut self, post: &LengthCounts) {
        for (bin, counts) in self.0.iter_mut().zip(post.0) {
            bin.iter_mut().zip(counts).for_each(|(sum, counts)| sum.add_post(counts));
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
    use crate::random::fixed_generator;
    use crate::stats;

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

    /// Counts with one pair per post.
    fn square(cells: [[u64; 2]; 2]) -> Counts<4> {
        let mut counts = Counts::default();
        for (i, count) in cells.into_iter().flatten().enumerate() {
            let mut one = [0; 4];
            one[i] = 1;
            (0..count).for_each(|_| counts.add_post(one));
        }
        counts
    }

    #[test]
    fn kappa_is_agreement_beyond_chance() {
        // 35 of 50 agree; half would agree by chance.
        let kappa = square([[20, 5], [10, 15]]).kappa().unwrap();
        near(kappa.kappa, 0.4);
        near(square([[25, 0], [0, 30]]).kappa().unwrap().kappa, 1.0);
        near(square([[0, 30], [30, 0]]).kappa().unwrap().kappa, -1.0);
        // The same agreement, but one answer is given nearly always: little beyond chance.
        near(square([[34, 7], [8, 1]]).kappa().unwrap().kappa, -0.062_32);
        assert_eq!(square([[9, 0], [0, 0]]).kappa(), None);
        assert_eq!(Counts::<4>::default().kappa(), None);
    }

    #[test]
    fn with_a_post_to_each_pair_the_intervals_are_those_of_independent_ones() {
        let square = square([[60, 15], [25, 100]]);
        assert_eq!(square.agreement().share(), Tally { yes: 160, of: 200 }.share());
        // (0.8 - 0.51875) / (1 - 0.51875), and its standard error by the printed formula of Fleiss, Cohen and Everitt.
        let kappa = square.kappa().unwrap();
        near(kappa.kappa, 0.584416);
        near(kappa.high - kappa.low, 2.0 * 1.959_964 * 0.058230);
    }

    #[test]
    fn pairs_of_one_post_that_are_alike_count_as_one() {
        let four_times = |pairs: &[usize]| {
            let mut counts = Counts::<4>::default();
            for pair in pairs {
                let mut post = [0; 4];
                post[*pair] = 4;
                counts.add_post(post);
            }
            counts
        };
        let pairs: Vec<usize> = (0..50).map(|i| [0, 3, 0, 1, 3, 2, 3, 0, 3, 3][i % 10]).collect();
        let (all, once) = (four_times(&pairs), square([[15, 5], [5, 25]]));
        let (a, b) = (all.agreement().share().unwrap(), once.agreement().share().unwrap());
        assert_eq!((a.share, a.of), (b.share, 4 * b.of));
        // As if each pair were present once, except for the correction for a small number of posts.
        assert!(((a.high - a.low) / (b.high - b.low) - 1.0).abs() < 0.02, "{a:?} {b:?}");
        let (a, b) = (all.kappa().unwrap(), once.kappa().unwrap());
        assert!(((a.high - a.low) / (b.high - b.low) - 1.0).abs() < 0.02, "{a:?} {b:?}");
        // If all answers agree, no variance is observed: the number of posts counts.
        let agreed = four_times(&[0, 3, 3, 0, 3]).agreement().share().unwrap();
        assert_eq!(agreed.low, Tally { yes: 5, of: 5 }.share().unwrap().low);
        let one_post = Counts { pairs: [3, 1], products: [[9, 3], [3, 1]], posts: 1 };
        assert!(one_post.share().is_some_and(|share| share.high - share.low > 0.8), "{:?}", one_post.share());
    }

    #[test]
    fn intervals_are_as_wide_as_resampling_posts_says() {
        let mut rng = fixed_generator(1, "posts");
        // Posts with one to six pairs; on some posts the judges mostly differ.
        let posts: Vec<[u64; 4]> = (0..150)
            .map(|_| {
                let (hard, mut post) = (rng.random_bool(0.3), [0; 4]);
                for _ in 0..rng.random_range(1..=6) {
                    let first = usize::from(rng.random_bool(0.5));
                    let second = if rng.random_bool(if hard { 0.8 } else { 0.1 }) { 1 - first } else { first };
                    post[2 * first + second] += 1;
                }
                post
            })
            .collect();
        let sum = |posts: &mut dyn Iterator<Item = [u64; 4]>| {
            let mut counts = Counts::default();
            posts.for_each(|post| counts.add_post(post));
            counts
        };
        let all = sum(&mut posts.iter().copied());
        let drawn: Vec<Counts<4>> =
            (0..4000).map(|_| sum(&mut (0..posts.len()).map(|_| posts[rng.random_range(0..posts.len())]))).collect();
        let widths = |low: f64, high: f64, drawn: Vec<f64>| (high - low) / (2.0 * Z * stats::std(&drawn));
        let share = all.agreement().share().unwrap();
        let shares = drawn.iter().map(|counts| counts.agreement().share().unwrap().share).collect();
        let kappa = all.kappa().unwrap();
        let kappas = drawn.iter().map(|counts| counts.kappa().unwrap().kappa).collect();
        for width in [widths(share.low, share.high, shares), widths(kappa.low, kappa.high, kappas)] {
            assert!((width - 1.0).abs() < 0.06, "{width}");
        }
        let independent = Tally { yes: all.agreement().pairs[0], of: all.of() }.share().unwrap();
        assert!(share.high - share.low > 1.3 * (independent.high - independent.low), "{share:?} {independent:?}");
    }

    #[test]
    fn every_difference_in_length_has_its_bin() {
        let mut lengths = ByLength::default();
        for words in [0, 2, 3, 5, 6, 10, 11, 20, 21, 1000] {
            let mut post = LengthCounts::default();
            post.count(words, words > 5, [true, false]);
            lengths.add_post(&post);
        }
        let bins = lengths.bins();
        let told: Vec<_> = bins.iter().map(|bin| (bin.least, bin.most, bin.agreement.unwrap().of)).collect();
        assert_eq!(told, [(0, Some(2), 2), (3, Some(5), 2), (6, Some(10), 2), (11, Some(20), 2), (21, None, 2)]);
        // A pair of equal lengths has no longer summary.
        assert_eq!(bins[0].first_for_longer.map(|s| (s.of, s.share)), Some((1, 1.0)));
        assert_eq!((bins[1].agreement.unwrap().share, bins[2].agreement.unwrap().share), (0.0, 1.0));
        assert_eq!(ByLength::default().bins()[4].agreement, None);
    }

    proptest! {
        #[test]
        fn intervals_hold_what_they_are_of(cells in prop::array::uniform4(0u64..400)) {
            let posts = [cells, [1, 0, 0, 0].map(|one: u64| one.min(cells[0])), [0, cells[1] / 2, 0, 1]];
            let mut square = Counts::<4>::default();
            posts.into_iter().for_each(|post| square.add_post(post));
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
