//! Statistics over slices: moments, quantiles, rank correlation, bootstrap intervals, exact paired tests, curve fits.

use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::SeedableRng;

/// The arithmetic mean; NaN for an empty slice.
pub fn mean(x: &[f64]) -> f64 {
    x.iter().sum::<f64>() / x.len() as f64
}

/// The population variance; NaN for an empty slice.
pub fn variance(x: &[f64]) -> f64 {
    let m = mean(x);
    x.iter().map(|v| (v - m).powi(2)).sum::<f64>() / x.len() as f64
}

/// mu_i and sigma_i^2 (population variance over the members), Eq. 6. `scores[m][i]` = phi_m of response i.
pub fn moments<T: Copy + Into<f64>>(scores: &[Vec<T>]) -> (Vec<f64>, Vec<f64>) {
    let responses = scores.first().map_or(0, Vec::len);
    (0..responses)
        .map(|i| {
            let phi: Vec<f64> = scores.iter().map(|member| member[i].into()).collect();
            (mean(&phi), variance(&phi))
        })
        .unzip()
}

/// The population standard deviation.
pub fn std(x: &[f64]) -> f64 {
    variance(x).sqrt()
}

/// The `q`-quantile (0..=1) with linear interpolation; NaN for an empty slice.
pub fn quantile(x: &[f64], q: f64) -> f64 {
    let mut sorted = x.to_vec();
    sorted.sort_by(f64::total_cmp);
    let Some(last) = sorted.len().checked_sub(1) else { return f64::NAN };
    let at = q * last as f64;
    let (low, high) = (at.floor() as usize, at.ceil() as usize);
    sorted[low] + (at - low as f64) * (sorted[high] - sorted[low])
}

/// Ranks from 1; ties share their mean rank.
pub fn ranks(x: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..x.len()).collect();
    order.sort_by(|&i, &j| x[i].total_cmp(&x[j]));
    let mut ranks = vec![0.0; x.len()];
    let mut start = 0;
    while start < order.len() {
        let mut end = start + 1;
        while end < order.len() && x[order[end]] == x[order[start]] {
            end += 1;
        }
        let shared = (start + 1 + end) as f64 / 2.0;
        for &i in &order[start..end] {
            ranks[i] = shared;
        }
        start = end;
    }
    ranks
}

/// Pearson's correlation; `None` if `x` or `y` is constant.
pub fn pearson(x: &[f64], y: &[f64]) -> Option<f64> {
    let (mx, my) = (mean(x), mean(y));
    let (mut xy, mut xx, mut yy) = (0.0, 0.0, 0.0);
    for (a, b) in x.iter().zip(y) {
        xy += (a - mx) * (b - my);
        xx += (a - mx).powi(2);
        yy += (b - my).powi(2);
    }
    (xx > 0.0 && yy > 0.0).then(|| xy / (xx * yy).sqrt())
}

/// Spearman's rank correlation; `None` if `x` or `y` is constant.
pub fn spearman(x: &[f64], y: &[f64]) -> Option<f64> {
    pearson(&ranks(x), &ranks(y))
}

/// A mean with its interval.
#[derive(Clone, Copy, Debug, PartialEq, serde::Serialize, serde::Deserialize)]
pub struct Interval {
    pub mean: f64,
    pub low: f64,
    pub high: f64,
}

/// The mean of `x` with its 95% percentile bootstrap interval.
pub fn bootstrap_mean(x: &[f64], resamples: usize, rng: &mut ChaCha12Rng) -> Interval {
    if x.is_empty() {
        return Interval { mean: f64::NAN, low: f64::NAN, high: f64::NAN };
    }
    let means: Vec<f64> = (0..resamples)
        .map(|_| (0..x.len()).map(|_| x[rng.random_range(0..x.len())]).sum::<f64>() / x.len() as f64)
        .collect();
    Interval { mean: mean(x), low: quantile(&means, 0.025), high: quantile(&means, 0.975) }
}

/// A random permutation of `0..n`.
pub fn permutation(n: usize, rng: &mut ChaCha12Rng) -> Vec<usize> {
    let mut order: Vec<usize> = (0..n).collect();
    order.shuffle(rng);
    order
}

/// The largest number of differences for which every sign flip is enumerated. Beyond it, a fixed sequence of 2^20 sign
/// flips is used.
const ENUMERATED: usize = 20;

/// The size and sum of each subset of `d`, the empty one first: all 2^n subsets, or 2^20 of them for n > 20.
fn subset_sums(d: &[f64]) -> impl Iterator<Item = (u32, f64)> {
    (0..1_u64 << d.len().min(ENUMERATED)).map(move |subset| {
        // Multiplying by an odd number spreads the bits of the subset's number over all differences.
        let pattern = if d.len() > ENUMERATED { subset.wrapping_mul(0x9E37_79B9_7F4A_7C15) } else { subset };
        let chosen = |&(i, _): &(usize, &f64)| pattern.rotate_right((i % 64) as u32) & 1 == 1;
        d.iter().enumerate().filter(chosen).fold((0, 0.0), |(n, sum), (_, d)| (n + 1, sum + d))
    })
}

/// Two-sided p-value of the sign-flip test that the paired differences `d` are symmetric about zero (Fisher 1935): the
/// share of sign patterns whose sum is at least as far from zero as the observed sum. Exact for up to 20 differences; 1
/// if `d` is empty.
pub fn sign_flip_p(d: &[f64]) -> f64 {
    let total: f64 = d.iter().sum();
    let size = d.iter().map(|d| d.abs()).sum::<f64>();
    let observed = total.abs() - 1e-12 * size;
    let (mut extreme, mut all) = (0_u64, 0_u64);
    for (_, sum) in subset_sums(d) {
        all += 1;
        extreme += u64::from((total - 2.0 * sum).abs() >= observed);
    }
    extreme as f64 / all as f64
}

/// The smallest p-value that [`sign_flip_p`] can return for `n` differences: 2 / 2^n.
pub fn smallest_sign_flip_p(n: usize) -> f64 {
    2.0 / 2.0_f64.powi(n.min(ENUMERATED) as i32)
}

/// The interval for the mean difference that inverts [`sign_flip_p`]: all shifts m for which the test does not reject
/// `d - m` at `alpha`. Its ends are order statistics of the means of the 2^n - 1 non-empty subsets (Hartigan 1969).
/// `None` if there are too few differences for the test to reject anything, so that the interval is unbounded.
pub fn sign_flip_interval(d: &[f64], alpha: f64) -> Option<(f64, f64)> {
    let mut means: Vec<f64> = subset_sums(d).filter(|(n, _)| *n > 0).map(|(n, sum)| sum / f64::from(n)).collect();
    // Below the mean, p(m) = 2 (1 + number of subset means <= m) / 2^n; `rejected` is the number of subset means
    // rejected at each end.
    let rejected = (alpha * (means.len() + 1) as f64 / 2.0 + 1e-9).floor() as usize;
    let (low, high) = (rejected.checked_sub(1)?, means.len().checked_sub(rejected)?);
    let low = *means.select_nth_unstable_by(low, f64::total_cmp).1;
    let high = *means.select_nth_unstable_by(high, f64::total_cmp).1;
    Some((low, high))
}

/// Holm's (1979) step-down correction of the p-values of one family, in the order of `p`.
pub fn holm(p: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..p.len()).collect();
    order.sort_by(|&i, &j| p[i].total_cmp(&p[j]));
    let mut corrected = vec![1.0; p.len()];
    let mut largest = 0.0_f64;
    for (rank, &i) in order.iter().enumerate() {
        largest = largest.max((p.len() - rank) as f64 * p[i]).min(1.0);
        corrected[i] = largest;
    }
    corrected
}

/// The smallest mean difference, in standard deviations of the differences, that [`sign_flip_p`] detects at `alpha`
/// with power 0.8 for `n` normal differences. `None` if `n` differences cannot reach `alpha`.
///
/// The test rejects a sample shifted by x once x exceeds minus the lower end of [`sign_flip_interval`], so the effect
/// is the 0.8-quantile of that bound over seeded samples of zero mean. For n > 12, the value for n = 12 is scaled like
/// that of the t test, 1 / sqrt(n - 1.92) (Guenther 1981).
pub fn detectable_effect(n: usize, alpha: f64) -> Option<f64> {
    const SIMULATED: usize = 12;
    const SAMPLES: usize = 1000;
    let mut rng = ChaCha12Rng::from_seed(blake3::derive_key("temper detectable effect v1", b""));
    let size = n.min(SIMULATED);
    let ends: Option<Vec<f64>> = (0..SAMPLES)
        .map(|_| {
            let sample: Vec<f64> = (0..size).map(|_| normal(&mut rng)).collect();
            // The samples are symmetric, so both ends of an interval count: half the simulations for the same
            // precision.
            sign_flip_interval(&sample, alpha).map(|(low, high)| [-low, high])
        })
        .collect::<Option<Vec<_>>>()
        .map(|ends| ends.concat());
    let degrees = |n: usize| n as f64 - 1.92;
    Some(quantile(&ends?, 0.8) * (degrees(size) / degrees(n)).sqrt())
}

/// A standard normal draw (Box and Muller 1958).
pub fn normal(rng: &mut impl Rng) -> f64 {
    let (radius, angle): (f64, f64) = (1.0 - rng.random::<f64>(), rng.random());
    (-2.0 * radius.ln()).sqrt() * (std::f64::consts::TAU * angle).cos()
}

/// R(d) = d (a - b ln d): the reward gained over the initial policy at distance d = sqrt(KL) (Gao et al. 2023, the form
/// for RL).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GaoFit {
    pub a: f64,
    pub b: f64,
}

impl GaoFit {
    /// Least squares on the features d and -d ln d. Points at d = 0 carry no information and are skipped. `None` with
    /// fewer than two distances.
    pub fn of(points: &[(f64, f64)]) -> Option<Self> {
        let (mut xx, mut xz, mut zz, mut xr, mut zr) = (0.0, 0.0, 0.0, 0.0, 0.0);
        for &(d, r) in points.iter().filter(|(d, r)| *d > 0.0 && d.is_finite() && r.is_finite()) {
            let (x, z) = (d, -d * d.ln());
            xx += x * x;
            xz += x * z;
            zz += z * z;
            xr += x * r;
            zr += z * r;
        }
        let determinant = xx * zz - xz * xz;
        (determinant > 1e-12 * xx * (xx + zz))
            .then(|| Self { a: (xr * zz - zr * xz) / determinant, b: (zr * xx - xr * xz) / determinant })
    }

    pub fn at(self, d: f64) -> f64 {
        if d > 0.0 { d * (self.a - self.b * d.ln()) } else { 0.0 }
    }
}

/// The mean vertical gap `f - g` between two curves of (x, y) points over their common range of x: the area between
/// them divided by the length of that range. Both are piecewise linear through their points in order of x; points of
/// equal x are averaged. `None` if the ranges do not overlap.
pub fn mean_gap(f: &[(f64, f64)], g: &[(f64, f64)]) -> Option<f64> {
    let (f, g) = (rising(f), rising(g));
    let (low, high) = (f.first()?.0.max(g.first()?.0), f.last()?.0.min(g.last()?.0));
    if high <= low {
        return None;
    }
    let inner = f.iter().chain(&g).map(|p| p.0).filter(|x| low < *x && *x < high);
    let mut knots: Vec<f64> = inner.chain([low, high]).collect();
    knots.sort_by(f64::total_cmp);
    let gap = |x: f64| interpolate(&f, x) - interpolate(&g, x);
    let area: f64 = knots.windows(2).map(|x| (x[1] - x[0]) * (gap(x[0]) + gap(x[1])) / 2.0).sum();
    Some(area / (high - low))
}

/// The points in order of x; points of equal x are averaged.
fn rising(points: &[(f64, f64)]) -> Vec<(f64, f64)> {
    let mut sorted: Vec<(f64, f64)> = points.iter().copied().filter(|(x, y)| x.is_finite() && y.is_finite()).collect();
    sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
    sorted
        .chunk_by(|a, b| a.0 == b.0)
        .map(|same| (same[0].0, same.iter().map(|p| p.1).sum::<f64>() / same.len() as f64))
        .collect()
}

/// The value at x of the piecewise linear curve through `points`, whose x are increasing. x must be within their range.
fn interpolate(points: &[(f64, f64)], x: f64) -> f64 {
    let right = points.partition_point(|p| p.0 < x).min(points.len() - 1);
    let ((x0, y0), (x1, y1)) = (points[right.saturating_sub(1)], points[right]);
    if x1 > x0 { y0 + (y1 - y0) * (x - x0) / (x1 - x0) } else { y1 }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_share_ties() {
        assert_eq!(ranks(&[3.0, 1.0, 3.0, 2.0]), [3.5, 1.0, 3.5, 2.0]);
    }

    #[test]
    fn spearman_sees_any_monotone_relation() {
        assert_eq!(spearman(&[1.0, 2.0, 3.0], &[1.0, 8.0, 27.0]), Some(1.0));
        assert_eq!(spearman(&[1.0, 2.0, 3.0], &[5.0, 5.0, 5.0]), None);
    }

    #[test]
    fn quantiles_interpolate() {
        assert_eq!(quantile(&[0.0, 1.0, 2.0, 3.0], 0.5), 1.5);
        assert_eq!(quantile(&[4.0], 0.9), 4.0);
    }

    #[test]
    fn the_bootstrap_interval_holds_the_mean() {
        let x: Vec<f64> = (0..100).map(|i| f64::from(i % 10)).collect();
        let i = bootstrap_mean(&x, 500, &mut ChaCha12Rng::seed_from_u64(1));
        assert!(i.low < i.mean && i.mean < i.high && i.high - i.low < 2.0, "{i:?}");
    }

    /// `count` samples of `n` normal differences with mean `mean`.
    fn samples(count: usize, n: usize, mean: f64) -> Vec<Vec<f64>> {
        let mut rng = ChaCha12Rng::seed_from_u64(7);
        (0..count).map(|_| (0..n).map(|_| mean + normal(&mut rng)).collect()).collect()
    }

    fn rate(samples: &[Vec<f64>], test: impl Fn(&[f64]) -> bool) -> f64 {
        samples.iter().filter(|d| test(d)).count() as f64 / samples.len() as f64
    }

    #[test]
    fn equal_signs_give_the_smallest_p() {
        for n in 1..=9 {
            assert_eq!(sign_flip_p(&vec![0.7; n]), smallest_sign_flip_p(n), "{n}");
        }
        assert_eq!([5, 6, 8].map(smallest_sign_flip_p), [0.0625, 0.03125, 0.0078125]);
        assert!(sign_flip_p(&[1.0, -1.0, 0.9, -1.1, 0.2, -0.1]) > 0.5);
        assert_eq!(sign_flip_p(&[0.0; 8]), 1.0);
        // By hand: of the 8 sign patterns of 1, 2, 3 only those with sums +-6 are as extreme; of -1, 2, 3 also those
        // with sums +-4.
        assert_eq!(sign_flip_p(&[1.0, 2.0, 3.0]), 0.25);
        assert_eq!(sign_flip_p(&[-1.0, 2.0, 3.0]), 0.5);
    }

    #[test]
    fn the_sign_flip_test_has_its_size_and_power() {
        let rejects = |d: &[f64]| sign_flip_p(d) <= 0.05;
        let size = rate(&samples(1000, 8, 0.0), rejects);
        assert!(size <= 0.065, "{size}");
        let power = rate(&samples(400, 8, 1.5), rejects);
        assert!(power > 0.8, "{power}");
        assert_eq!(rate(&samples(100, 5, 10.0), rejects), 0.0, "five differences can never be significant");
    }

    #[test]
    fn the_interval_holds_what_the_test_does_not_reject() {
        for d in samples(50, 7, 0.3) {
            let (low, high) = sign_flip_interval(&d, 0.05).unwrap();
            let p = |shift: f64| sign_flip_p(&d.iter().map(|d| d - shift).collect::<Vec<_>>());
            assert!(p(low - 1e-6) <= 0.05 && p(low + 1e-6) > 0.05, "{d:?}");
            assert!(p(high + 1e-6) <= 0.05 && p(high - 1e-6) > 0.05, "{d:?}");
        }
        assert_eq!(sign_flip_interval(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 0.05), Some((1.0, 6.0)));
        assert_eq!(sign_flip_interval(&[1.0; 5], 0.05), None);
        assert_eq!(sign_flip_interval(&[], 0.05), None);
    }

    #[test]
    fn the_interval_covers_the_truth_in_19_of_20_samples() {
        let covered = rate(&samples(1000, 8, 0.5), |d| {
            sign_flip_interval(d, 0.05).is_some_and(|(low, high)| low <= 0.5 && 0.5 <= high)
        });
        assert!((0.935..=0.975).contains(&covered), "{covered}");
    }

    #[test]
    fn holm_corrects_step_by_step() {
        let close = |p: &[f64], expected: &[f64]| {
            let corrected = holm(p);
            assert!(corrected.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-12), "{corrected:?}");
        };
        // Sorted: 0.005 x 4, 0.01 x 3, 0.03 x 2; 0.04 x 1 is raised to the value before it.
        close(&[0.01, 0.04, 0.03, 0.005], &[0.03, 0.06, 0.06, 0.02]);
        close(&[0.6, 0.7], &[1.0, 1.0]);
        assert!(holm(&[]).is_empty());
    }

    #[test]
    fn the_detectable_effect_is_detected_four_times_in_five() {
        // All six signs must agree: normal_cdf(x)^6 = 0.8 at x = 1.793.
        let six = detectable_effect(6, 0.05).unwrap();
        assert!((six - 1.793).abs() < 0.12, "{six}");
        for n in [8, 11] {
            let effect = detectable_effect(n, 0.05).unwrap();
            let power = rate(&samples(400, n, effect), |d| sign_flip_p(d) <= 0.05);
            assert!((0.74..0.86).contains(&power), "{n}: {effect} {power}");
        }
        assert_eq!(detectable_effect(5, 0.05), None);
        assert!(detectable_effect(8, 0.01).unwrap() > detectable_effect(8, 0.05).unwrap());
        assert!(detectable_effect(40, 0.05).unwrap() < detectable_effect(12, 0.05).unwrap());
    }

    #[test]
    fn gaos_form_is_fitted_as_numpy_fits_it() {
        let exact: Vec<(f64, f64)> = [0.0, 0.5, 1.0, 2.0, 3.0].map(|d| (d, GaoFit { a: 2.0, b: 0.7 }.at(d))).into();
        let fit = GaoFit::of(&exact).unwrap();
        assert!((fit.a - 2.0).abs() < 1e-9 && (fit.b - 0.7).abs() < 1e-9, "{fit:?}");
        // numpy.linalg.lstsq([[d, -d log d]], r)
        let noisy = [(0.5, 0.6), (1.0, 1.1), (1.5, 1.3), (2.0, 1.2), (3.0, 0.4)];
        let fit = GaoFit::of(&noisy).unwrap();
        assert!((fit.a - 1.126697539985).abs() < 1e-9 && (fit.b - 0.868752496439).abs() < 1e-9, "{fit:?}");
        assert_eq!(GaoFit::of(&[(1.0, 0.5)]), None);
    }

    #[test]
    fn the_gap_is_the_area_over_the_common_range() {
        let close = |gap: Option<f64>, expected: f64| assert!((gap.unwrap() - expected).abs() < 1e-12, "{gap:?}");
        let flat = [(0.0, 0.0), (10.0, 0.0)];
        close(mean_gap(&[(2.0, 1.0), (4.0, 3.0)], &flat), 2.0);
        // A triangle of height 1 over 2..6; the order of its points does not matter.
        close(mean_gap(&[(6.0, 0.0), (2.0, 0.0), (4.0, 1.0)], &flat), 0.5);
        // The common range is only 1..2; the two points at x = 1 are averaged.
        close(mean_gap(&[(0.0, 0.0), (2.0, 2.0)], &[(1.0, 0.0), (1.0, 1.0), (3.0, 0.5)]), 1.0);
        assert_eq!(mean_gap(&[(0.0, 0.0), (1.0, 0.0)], &[(1.0, 0.0), (2.0, 0.0)]), None);
        assert_eq!(mean_gap(&[], &flat), None);
    }
}
