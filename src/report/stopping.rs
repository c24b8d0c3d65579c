//! Rules that end RL early, compared with the best step: would a simple rule achieve what the objective is meant to
//! achieve?

use std::fmt;

use stages::stats::mean;
use stages::types::{CurvePoint, Half};

use super::html::{escape, table};
use super::outcome::Measure;
use super::study::{Arm, Role, Run, Study};

/// Stops at the first evaluation whose signal crosses a threshold, or at the last one if none does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Rule {
    /// KL to the reference above the threshold.
    Kl,
    /// The ensemble's variance, divided by its value at the start, above the threshold.
    Variance,
    /// The proxy's gain since the previous evaluation, divided by the gain to the first one, below the threshold.
    Plateau,
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kl => "KL above a threshold",
            Self::Variance => "ensemble variance above a multiple of its start",
            Self::Plateau => "proxy gains less than a share of its first gain",
        })
    }
}

impl Rule {
    const ALL: [Self; 3] = [Self::Kl, Self::Variance, Self::Plateau];

    /// The signal at each evaluation after the start, as (step, value); it rises towards the threshold. Uses half A
    /// alone.
    fn signal(self, run: &Run) -> Option<Vec<(i64, f64)>> {
        let points: Vec<&CurvePoint> = run.sampled_on(Half::A).collect();
        let start = points.first()?;
        let first_gain = points.get(1)?.proxy - start.proxy;
        points
            .windows(2)
            .map(|pair| {
                let (before, now) = (pair[0], pair[1]);
                let signal = match self {
                    Self::Kl => now.kl_exact,
                    Self::Variance => now.variance? / start.variance?,
                    Self::Plateau => -(now.proxy - before.proxy) / first_gain,
                };
                signal.is_finite().then_some((now.step, signal))
            })
            .collect()
    }

    fn stop_step(self, run: &Run, threshold: f64) -> Option<i64> {
        let signal = self.signal(run)?;
        let last = signal.last()?.0;
        Some(signal.into_iter().find(|(_, signal)| *signal > threshold).map_or(last, |(step, _)| step))
    }

    /// The threshold that gives the best measure on half A, chosen among the signal values of the runs.
    fn learn_threshold(self, runs: &[&Run], measure: Measure) -> Option<f64> {
        let mut candidates: Vec<f64> =
            runs.iter().filter_map(|run| self.signal(run)).flatten().map(|(_, signal)| signal).collect();
        candidates.sort_by(f64::total_cmp);
        candidates.dedup();
        let mean_outcome = |threshold: f64| -> Option<f64> {
            let each = runs.iter().map(|run| value_at(run, Half::A, self.stop_step(run, threshold)?, measure));
            each.collect::<Option<Vec<f64>>>().map(|values| mean(&values))
        };
        let mut best: Option<(f64, f64)> = None;
        for threshold in candidates {
            let value = mean_outcome(threshold)?;
            if best.is_none_or(|(most, _)| value > most) {
                best = Some((value, threshold));
            }
        }
        best.map(|(_, threshold)| threshold)
    }
}

fn value_at(run: &Run, half: Half, step: i64, measure: Measure) -> Option<f64> {
    run.sampled_on(half).find(|point| point.step == step).and_then(|point| measure.of(point))
}

/// The mean over seeds of the measure on half B and the step where a rule stops. Each seed's threshold is learned from
/// the other seeds.
fn mean_outcome(rule: Rule, arm: &Arm, measure: Measure) -> Option<(f64, f64)> {
    let each = arm.runs.iter().map(|run| {
        let others: Vec<&Run> = arm.runs.iter().filter(|other| other.seed != run.seed).collect();
        let step = rule.stop_step(run, rule.learn_threshold(&others, measure)?)?;
        Some((value_at(run, Half::B, step, measure)?, step as f64))
    });
    let (values, steps): (Vec<f64>, Vec<f64>) = each.collect::<Option<Vec<_>>>()?.into_iter().unzip();
    Some((mean(&values), mean(&steps)))
}

/// The best step by the measure on half A, evaluated on half B: the limit for a rule that sees the measure itself.
fn oracle(arm: &Arm, measure: Measure) -> Option<(f64, f64)> {
    let each = arm.runs.iter().map(|run| {
        let on_a = run.sampled_on(Half::A).map(|point| Some((point.step, measure.of(point)?)));
        let on_a: Vec<(i64, f64)> = on_a.collect::<Option<_>>()?;
        let (step, _) = on_a.into_iter().reduce(|best, next| if next.1 > best.1 { next } else { best })?;
        Some((value_at(run, Half::B, step, measure)?, step as f64))
    });
    let (values, steps): (Vec<f64>, Vec<f64>) = each.collect::<Option<Vec<_>>>()?.into_iter().unzip();
    Some((mean(&values), mean(&steps)))
}

fn without_stopping(arm: &Arm, measure: Measure) -> Option<(f64, f64)> {
    let each = arm.runs.iter().map(|run| Some((measure.of(run.end()?)?, run.end()?.step as f64)));
    let (values, steps): (Vec<f64>, Vec<f64>) = each.collect::<Option<Vec<_>>>()?.into_iter().unzip();
    Some((mean(&values), mean(&steps)))
}

/// Minimum number of seeds to learn thresholds with one left out.
const MIN_SEEDS: usize = 2;

/// A table for the adaptive arms and those with a constant coefficient; empty with one seed.
pub fn section(study: &Study, measure: Measure) -> String {
    let mut rows: Vec<Vec<String>> = Vec::new();
    let arms = study.arms.iter().filter(|arm| matches!(arm.role, Role::Standard | Role::Mean | Role::Adaptive));
    for arm in arms.filter(|arm| arm.runs.len() >= MIN_SEEDS) {
        let mut row = |rule: &str, found: Option<(f64, f64)>| {
            if let Some((value, step)) = found {
                rows.push(vec![escape(&arm.label), rule.to_owned(), format!("{value:.3}"), format!("{step:.0}")]);
            }
        };
        row("never", without_stopping(arm, measure));
        for rule in Rule::ALL {
            row(&rule.to_string(), mean_outcome(rule, arm, measure));
        }
        row("oracle: the best step by the measure itself", oracle(arm, measure));
    }
    if rows.is_empty() {
        return String::new();
    }
    format!(
        "<h3>Stopping rules</h3><p class=\"soft\">{measure} on half B at the step where a rule stops, mean over seeds. A rule sees half A \
         only; its threshold is the one that served the other seeds best.</p>{}",
        table(&["arm", "stops when", "value", "mean step"], 2, &rows)
    )
}

#[cfg(test)]
mod tests {
    use super::super::study::tests::{arm, point};
    use super::*;

    /// Quality rises to its best at step 2 and falls; the proxy's gains shrink; KL = 2 step.
    fn falling() -> Arm {
        let mut arm = arm(&[("arm", "mean")], "mean", &[0.0; 3]);
        for run in &mut arm.runs {
            let rows = [(0, 0.5, 0.0), (1, 0.7, 1.0), (2, 0.9, 1.8), (3, 0.6, 2.0), (4, 0.2, 2.1)];
            let on = |half: Half| {
                rows.map(|(step, quality, proxy)| CurvePoint {
                    half,
                    kl_exact: 2.0 * step as f64,
                    ..point(step, false, Some(quality), 0.0, proxy)
                })
            };
            run.curve = [on(Half::A), on(Half::B)].concat();
        }
        arm
    }

    #[test]
    fn a_threshold_learned_on_other_seeds_stops_at_their_best_step() {
        let arm = falling();
        let is = |found: Option<(f64, f64)>, (value, step): (f64, f64)| {
            assert!(found.is_some_and(|(v, s)| (v - value).abs() < 1e-12 && s == step), "{found:?}");
        };
        is(without_stopping(&arm, Measure::Quality), (0.2, 4.0));
        is(oracle(&arm, Measure::Quality), (0.9, 2.0));
        for rule in [Rule::Kl, Rule::Plateau] {
            is(mean_outcome(rule, &arm, Measure::Quality), (0.9, 2.0));
        }
        // A constant variance gives no signal: the rule does not stop.
        is(mean_outcome(Rule::Variance, &arm, Measure::Quality), (0.2, 4.0));
    }

    #[test]
    fn one_seed_has_no_other_seeds_to_learn_from() {
        let mut arm = falling();
        arm.runs.truncate(1);
        assert!(section(&Study { arms: vec![arm], ..Study::default() }, Measure::Quality).is_empty());
        let page = section(&Study { arms: vec![falling()], ..Study::default() }, Measure::Quality);
        assert!(page.contains("KL above a threshold") && page.contains("oracle"));
    }
}
