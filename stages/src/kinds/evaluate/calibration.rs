//! Compares the ensemble's variance with its squared error against the gold reward and true quality, by KL.

use crate::stats::{mean, quantile};
use crate::types::{CalibrationBin, Half, Score};

/// Number of KL bins, with about equally many samples each.
const BINS: usize = 8;

/// truth = a + b mu by least squares: relates the ensemble's mean to the scale of the truth.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Fit {
    pub a: f64,
    pub b: f64,
}

impl Fit {
    /// `None` if mu does not rise with the truth, since no scale then relates the two.
    pub fn of(mu: &[f64], truth: &[f64]) -> Option<Self> {
        let (mu_mean, truth_mean) = (mean(mu), mean(truth));
        let covariance: f64 = mu.iter().zip(truth).map(|(m, t)| (m - mu_mean) * (t - truth_mean)).sum();
        let spread: f64 = mu.iter().map(|m| (m - mu_mean).powi(2)).sum();
        let b = covariance / spread;
        (b > 0.0 && b.is_finite()).then_some(Self { a: truth_mean - b * mu_mean, b })
    }

    /// (mu - (truth - a) / b)^2, in units of the ensemble's variance.
    pub fn squared_error(&self, mu: f64, truth: f64) -> f64 {
        (mu - (truth - self.a) / self.b).powi(2)
    }
}

/// The fits of gold reward and true quality, both on the SFT model's samples of half A; later differences are drift.
#[derive(Clone, Copy, Debug, Default)]
pub struct Fits {
    pub gold: Option<Fit>,
    pub quality: Option<Fit>,
}

impl Fits {
    pub fn of(scores: &[Score]) -> Self {
        let start = || super::curve::select(scores, 0, Half::A, false);
        let mu: Vec<f64> = start().map(|s| s.mean).collect();
        let gold: Vec<f64> = start().map(|s| s.gold).collect();
        let quality: Option<Vec<f64>> = start().map(|s| s.quality).collect();
        Self { gold: Fit::of(&mu, &gold), quality: quality.and_then(|quality| Fit::of(&mu, &quality)) }
    }

    pub fn gold_error(&self, score: &Score) -> Option<f64> {
        Some(self.gold?.squared_error(score.mean, score.gold))
    }

    pub fn quality_error(&self, score: &Score) -> Option<f64> {
        Some(self.quality?.squared_error(score.mean, score.quality?))
    }
}

/// The variance next to the squared errors, by KL, over the sampled responses of half B at every step. Empty with one
/// reward model.
pub fn bins(scores: &[Score], fits: &Fits) -> Vec<CalibrationBin> {
    let here: Vec<(&Score, f64)> =
        scores.iter().filter(|s| s.half == Half::B && !s.greedy).filter_map(|s| Some((s, s.variance?))).collect();
    let kl: Vec<f64> = here.iter().map(|(s, _)| s.kl_exact).collect();
    let mut edges: Vec<f64> = (0..=BINS).map(|i| quantile(&kl, i as f64 / BINS as f64)).collect();
    edges.dedup();
    if let [only] = edges[..] {
        edges.push(only);
    }
    let mut rows = Vec::new();
    for (i, edge) in edges.windows(2).enumerate() {
        let (low, high) = (edge[0], edge[1]);
        // The last bin includes its upper edge.
        let last = i + 2 == edges.len();
        let inside: Vec<&(&Score, f64)> = here
            .iter()
            .filter(|(s, _)| s.kl_exact >= low && (s.kl_exact < high || (last && s.kl_exact == high)))
            .collect();
        if inside.is_empty() {
            continue;
        }
        let of = |f: &dyn Fn(&Score) -> Option<f64>| -> Option<f64> {
            inside.iter().map(|(s, _)| f(s)).collect::<Option<Vec<f64>>>().map(|x| mean(&x))
        };
        rows.push(CalibrationBin {
            kl_low: low,
            kl_high: high,
            kl: mean(&inside.iter().map(|(s, _)| s.kl_exact).collect::<Vec<_>>()),
            n: inside.len() as i64,
            variance: mean(&inside.iter().map(|(_, variance)| *variance).collect::<Vec<_>>()),
            gold_error: of(&|s| fits.gold_error(s)),
            quality_error: of(&|s| fits.quality_error(s)),
        });
    }
    rows
}

/// The mean variance over members split into three parts that sum to it: the members' offsets, their slopes on mu, and
/// the rest.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Split {
    pub offset: f64,
    pub slope: f64,
    pub rest: f64,
}

/// Regresses each member's deviation from mu on (1, mu). `scores[i][m]` = phi_m of response i. `None` with one member.
pub fn split(scores: &[&[f32]]) -> Option<Split> {
    let members = scores.first()?.len();
    if members < 2 {
        return None;
    }
    let phi = |i: usize, m: usize| f64::from(scores[i][m]);
    let mu: Vec<f64> =
        (0..scores.len()).map(|i| (0..members).map(|m| phi(i, m)).sum::<f64>() / members as f64).collect();
    let centre = mean(&mu);
    let spread = mean(&mu.iter().map(|mu| (mu - centre).powi(2)).collect::<Vec<_>>());
    let (mut offset, mut slope, mut total) = (0.0, 0.0, 0.0);
    for m in 0..members {
        let deviation: Vec<f64> = (0..scores.len()).map(|i| phi(i, m) - mu[i]).collect();
        let own = mean(&deviation);
        let covariance = mean(&deviation.iter().zip(&mu).map(|(d, mu)| (d - own) * (mu - centre)).collect::<Vec<_>>());
        offset += own.powi(2);
        slope += if spread > 0.0 { covariance.powi(2) / spread } else { 0.0 };
        total += mean(&deviation.iter().map(|d| d.powi(2)).collect::<Vec<_>>());
    }
    let members = members as f64;
    Some(Split { offset: offset / members, slope: slope / members, rest: (total - offset - slope) / members })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kinds::evaluate::curve::tests::score;

    #[test]
    fn a_fit_undoes_scale_and_offset_and_sees_the_drift() {
        let fit = Fit::of(&[0.0, 1.0, 2.0], &[5.0, 7.0, 9.0]).unwrap();
        assert_eq!(fit, Fit { a: 5.0, b: 2.0 });
        assert_eq!(fit.squared_error(1.0, 7.0), 0.0);
        // The ensemble says 3; the truth on its scale is 1.
        assert_eq!(fit.squared_error(3.0, 7.0), 4.0);
        assert_eq!(Fit::of(&[0.0, 1.0], &[1.0, 0.0]), None);
        assert_eq!(Fit::of(&[1.0, 1.0], &[1.0, 0.0]), None);
    }

    #[test]
    fn drift_from_the_truth_is_seen_in_the_bins_of_high_kl() {
        // At step 0, mu and gold agree; later mu rises by 2 and gold does not. Centring would hide this.
        let rows: Vec<Score> = (0..64)
            .flat_map(|p| {
                let (start, later) = (score(0, p, p as f64), score(5, p, p as f64));
                [Score { kl_exact: 0.0, ..start }, Score { mean: p as f64 + 2.0, kl_exact: 1.0 + p as f64, ..later }]
            })
            .collect();
        let bins = bins(&rows, &Fits::of(&rows));
        assert!(bins.len() > 2, "{bins:?}");
        assert!(bins[0].gold_error.unwrap() < 1e-9, "{bins:?}");
        assert!((bins.last().unwrap().gold_error.unwrap() - 4.0).abs() < 1e-9, "{bins:?}");
        assert_eq!(bins.iter().map(|b| b.n).sum::<i64>(), 64);
        assert!(bins.iter().all(|b| b.quality_error.is_none()));
    }

    #[test]
    fn the_split_of_the_variance_tells_offset_slope_and_rest_apart() {
        let rows = |f: &dyn Fn(f64) -> [f32; 2]| (0..10).map(|i| f(f64::from(i))).collect::<Vec<_>>();
        let of = |rows: &[[f32; 2]]| split(&rows.iter().map(|r| r.as_slice()).collect::<Vec<_>>()).unwrap();
        let offset = of(&rows(&|x| [x as f32 + 1.0, x as f32 - 1.0]));
        assert!((offset.offset - 1.0).abs() < 1e-6 && offset.slope < 1e-9 && offset.rest.abs() < 1e-6, "{offset:?}");
        // Members 1.5 x and 0.5 x deviate by +-0.5 x: +-2.25 at the mean of x plus a pure slope.
        let slope = of(&rows(&|x| [1.5 * x as f32, 0.5 * x as f32]));
        assert!((slope.offset - 2.25 * 2.25).abs() < 1e-5 && (slope.slope - 0.25 * 8.25).abs() < 1e-5, "{slope:?}");
        assert!(slope.rest.abs() < 1e-5);
        let rest = of(&rows(&|x| if x as i32 % 2 == 0 { [1.0, -1.0] } else { [-1.0, 1.0] }));
        assert!((rest.rest - 1.0).abs() < 1e-6, "{rest:?}");
        assert_eq!(split(&[&[1.0]]), None);
    }
}
