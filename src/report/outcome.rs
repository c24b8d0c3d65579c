//! Outcomes of one run that the tests across seeds compare: window means, drops from the peak, trends over steps.

use std::fmt;

use stages::stats::{mean, mean_gap, spearman};
use stages::types::{CurvePoint, Half};

use super::study::{Arm, Run};

/// A measure of the quality of the policy's summaries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Measure {
    Quality,
    Gold,
}

impl Measure {
    pub fn of(self, point: &CurvePoint) -> Option<f64> {
        match self {
            Self::Quality => point.quality,
            Self::Gold => Some(point.gold_sd),
        }
    }
}

impl fmt::Display for Measure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Quality => "true quality",
            Self::Gold => "gold (SFT deviations)",
        })
    }
}

/// Minimum number of evaluations, including the start, for a trend over steps.
pub const MIN_POINTS: usize = 6;

/// The last third of a run's sampled evaluations after the start: ceil(n / 3) of n.
pub fn window(run: &Run, half: Half) -> Vec<&CurvePoint> {
    let after: Vec<&CurvePoint> = run.sampled_on(half).filter(|point| point.step > 0).collect();
    after[after.len() - after.len().div_ceil(3)..].to_vec()
}

pub fn window_mean(run: &Run, half: Half, of: impl Fn(&CurvePoint) -> Option<f64>) -> Option<f64> {
    let values: Vec<f64> = window(run, half).into_iter().map(of).collect::<Option<_>>()?;
    (!values.is_empty()).then(|| mean(&values))
}

/// The outcome by which arms are compared: the measure's mean over [`window`].
pub fn outcome(run: &Run, measure: Measure, half: Half) -> Option<f64> {
    window_mean(run, half, |point| measure.of(point))
}

/// The run as one point of a frontier: KL and outcome over the same window, on half B.
pub fn frontier_point(run: &Run, measure: Measure) -> Option<(f64, f64)> {
    Some((window_mean(run, Half::B, |point| Some(point.kl_exact))?, outcome(run, measure, Half::B)?))
}

/// The step with the run's best value of the measure on half A (the earliest on ties) and the last step, both on half
/// B.
fn peak_and_last(run: &Run, measure: Measure) -> Option<(&CurvePoint, &CurvePoint)> {
    let mut best: Option<(i64, f64)> = None;
    for point in run.sampled_on(Half::A) {
        let value = measure.of(point)?;
        if best.is_none_or(|(_, most)| value > most) {
            best = Some((point.step, value));
        }
    }
    Some((run.at(best?.0)?, run.end()?))
}

/// D: the measure at its peak minus the measure at the end.
pub fn drop(run: &Run, measure: Measure) -> Option<f64> {
    let (peak, last) = peak_and_last(run, measure)?;
    Some(measure.of(peak)? - measure.of(last)?)
}

/// The proxy's rise since the measure's peak.
pub fn proxy_rise(run: &Run, measure: Measure) -> Option<f64> {
    let (peak, last) = peak_and_last(run, measure)?;
    Some(last.proxy - peak.proxy)
}

/// The proxy's gain over the first and the last third of the evaluations: from the start to the ceil(n / 3)th of n, and
/// over the ceil(n / 3) intervals before the last.
pub fn proxy_gains(run: &Run) -> Option<(f64, f64)> {
    let proxy: Vec<f64> = run.sampled().map(|point| point.proxy).collect();
    if proxy.len() < MIN_POINTS {
        return None;
    }
    let (last, third) = (proxy.len() - 1, (proxy.len() - 1).div_ceil(3));
    Some((proxy[third] - proxy[0], proxy[last] - proxy[last - third]))
}

/// Spearman's correlation of two numbers over the run's steps; `None` for fewer than [`MIN_POINTS`] steps.
pub fn trend(run: &Run, x: impl Fn(&CurvePoint) -> Option<f64>, y: impl Fn(&CurvePoint) -> Option<f64>) -> Option<f64> {
    let (x, y): (Vec<f64>, Vec<f64>) = run.sampled().filter_map(|point| Some((x(point)?, y(point)?))).unzip();
    if x.len() < MIN_POINTS { None } else { spearman(&x, &y) }
}

/// How far the adaptive run's trajectory lies above the frontier of the fixed coefficients, averaged over their common
/// range of sqrt(KL). The trajectory connects the run's evaluations, the frontier one [`frontier_point`] per lambda;
/// half B.
pub fn gap_to_frontier(adaptive: &Run, fixed: &[&Arm], measure: Measure) -> Option<f64> {
    let distance = |(kl, y): (f64, f64)| (kl.max(0.0).sqrt(), y);
    let path: Option<Vec<(f64, f64)>> =
        adaptive.sampled().map(|point| Some(distance((point.kl_exact, measure.of(point)?)))).collect();
    let frontier: Option<Vec<(f64, f64)>> =
        fixed.iter().map(|arm| frontier_point(arm.run(adaptive.seed)?, measure).map(distance)).collect();
    mean_gap(&path?, &frontier?)
}

#[cfg(test)]
mod tests {
    use super::super::study::tests::{arm, point, run};
    use super::*;

    /// A run whose evaluations have these values of quality, gold and proxy on both halves, with KL = step.
    fn through(values: &[(f64, f64, f64)]) -> Run {
        let points = values
            .iter()
            .zip(0..)
            .map(|(&(quality, gold, proxy), step)| point(step, false, Some(quality), gold, proxy));
        let curve = points.flat_map(|b| [CurvePoint { half: Half::A, ..b.clone() }, b]).collect();
        Run { curve, ..run("mean", 1, 0.0) }
    }

    #[test]
    fn the_outcome_is_the_mean_of_the_last_third_without_the_start() {
        let steps: Vec<(f64, f64, f64)> = (0..8).map(|i| (f64::from(i), -f64::from(i), 0.0)).collect();
        // The last three of the seven evaluations after the start.
        assert_eq!(outcome(&through(&steps), Measure::Quality, Half::B), Some(6.0));
        assert_eq!(outcome(&through(&steps[..2]), Measure::Gold, Half::B), Some(-1.0));
        assert_eq!(outcome(&through(&steps[..1]), Measure::Gold, Half::B), None);
        let mut greedy = through(&steps);
        greedy.curve.push(point(7, true, Some(100.0), 0.0, 0.0));
        assert_eq!(frontier_point(&greedy, Measure::Quality), Some((6.0, 6.0)));
    }

    #[test]
    fn the_peak_is_chosen_on_half_a_and_measured_on_half_b() {
        let mut fell = through(&[(0.5, 0.0, 0.0), (0.9, 1.0, 1.0), (0.3, 2.0, 3.0)]);
        assert!((drop(&fell, Measure::Quality).unwrap() - 0.6).abs() < 1e-12);
        assert_eq!(proxy_rise(&fell, Measure::Quality), Some(2.0));
        assert_eq!((drop(&fell, Measure::Gold), proxy_rise(&fell, Measure::Gold)), (Some(0.0), Some(0.0)));
        for a in fell.curve.iter_mut().filter(|point| point.half == Half::A) {
            a.quality = Some(if a.step == 0 { 1.0 } else { 0.0 });
        }
        assert!((drop(&fell, Measure::Quality).unwrap() - 0.2).abs() < 1e-12);
        fell.curve[0].quality = None;
        assert_eq!(drop(&fell, Measure::Quality), None);
    }

    #[test]
    fn trends_need_six_evaluations() {
        let rising: Vec<(f64, f64, f64)> = (0..7).map(|i| (f64::from(i), 1.0, f64::from(i).sqrt())).collect();
        let of = |n: usize| trend(&through(&rising[..n]), |point| point.quality, |point| Some(point.proxy));
        assert_eq!((of(5), of(6)), (None, Some(1.0)));
        assert_eq!(proxy_gains(&through(&rising[..5])), None);
        let (first, last) = proxy_gains(&through(&rising)).unwrap();
        assert!((first - 2.0_f64.sqrt()).abs() < 1e-12 && (last - (6.0_f64.sqrt() - 2.0)).abs() < 1e-12);
    }

    #[test]
    fn the_gap_is_taken_at_equal_kl() {
        let level = |label, quality: f64, kl: f64| {
            let mut arm = arm(&[("arm", label)], "mean", &[0.0]);
            for point in &mut arm.runs[0].curve {
                (point.quality, point.kl_exact) = (Some(quality), kl);
            }
            arm
        };
        let fixed = [level("a", 0.5, 1.0), level("b", 0.5, 9.0)];
        let adaptive = through(&[(0.8, 0.0, 0.0); 5]);
        let gap = gap_to_frontier(&adaptive, &fixed.iter().collect::<Vec<_>>(), Measure::Quality);
        assert!((gap.unwrap() - 0.3).abs() < 1e-12, "{gap:?}");
        let far = [level("a", 0.5, 100.0), level("b", 0.5, 400.0)];
        assert_eq!(gap_to_frontier(&adaptive, &far.iter().collect::<Vec<_>>(), Measure::Quality), None);
    }
}
