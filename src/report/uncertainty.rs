//! Figures of the ensemble's variance: next to its error, in its parts, and as the share of the KL term.

use stages::kinds::evaluate::kl_shares;
use stages::types::CalibrationBin;

use super::chart::{self, Chart, ChartLine, Series, arm_lines, legend};
use super::html::escape;
use super::study::{Arm, Role, Run, Study};

/// One row of charts per question; empty if no run has an ensemble.
pub fn figures(study: &Study) -> String {
    let is_listed = |arm: &&Arm| matches!(arm.role, Role::Mean | Role::Adaptive);
    let has_variance = |arm: &&Arm| arm.runs.iter().any(|run| run.sampled().any(|point| point.variance.is_some()));
    let arms: Vec<&Arm> = study.arms.iter().filter(is_listed).filter(has_variance).collect();
    if arms.is_empty() {
        return String::new();
    }
    let errors = charts(&arms, "KL (nats)", "variance or squared error", &ERRORS, |run, of| {
        run.calibration.iter().zip(0..).filter_map(|(bin, i)| Some((i, (bin.kl, of(bin)?)))).collect()
    });
    let parts = charts(&arms, "phase", "part of the variance", &PARTS, |run, of| {
        run.sampled().filter_map(|point| Some((point.step, (point.step as f64, of(point)?)))).collect()
    });
    let shares = Chart {
        title: "mean(c KL) over the gain in mean((1 - c) mu)".to_owned(),
        x: "phase".to_owned(),
        y: "share".to_owned(),
        lines: arms
            .iter()
            .enumerate()
            .flat_map(|(style, arm)| {
                let runs: Vec<(String, Series)> =
                    arm.runs.iter().map(|run| (format!("seed {}", run.seed), share(run))).collect();
                arm_lines(&arm.label, style, &runs)
            })
            .collect(),
    };
    format!(
        "<h3>Variance against squared error</h3><p class=\"soft\">By KL, over the samples of all evaluations on half B. The error is \
         (mu - (truth - a) / b)², with truth = a + b mu fitted on the SFT model's samples of half A: it is in the variance's units, \
         and what it gains with KL is drift. An ensemble that knows its error has the three lines together.</p>{}{}\
         <h3>Parts of the variance</h3><p class=\"soft\">Members' offsets, their slopes on mu, and the rest; they sum to the \
         variance.</p>{}{}\
         <h3>The KL term's share</h3><p class=\"soft\">Of the objective's gain since the first phase; in an arm that is not adaptive, \
         what it would be with Algorithm 1's coefficient. Phases with less than a tenth of the largest gain are left \
         out.</p>{}{}",
        legend(ERRORS.iter().map(|(name, _)| *name)),
        chart::figures(&errors),
        legend(PARTS.iter().map(|(name, _)| *name)),
        chart::figures(&parts),
        legend(arms.iter().map(|arm| arm.label.as_str())),
        chart::figures(&[shares]),
    )
}

type OfBin = fn(&CalibrationBin) -> Option<f64>;
const ERRORS: [(&str, OfBin); 3] = [
    ("variance of the members", |bin| Some(bin.variance)),
    ("squared error against gold", |bin| bin.gold_error),
    ("squared error against true quality", |bin| bin.quality_error),
];

type OfPoint = fn(&stages::types::CurvePoint) -> Option<f64>;
const PARTS: [(&str, OfPoint); 3] = [
    ("offsets", |point| point.variance_offset),
    ("slopes on mu", |point| point.variance_slope),
    ("the rest", |point| point.variance_rest),
];

/// One chart per arm with one line per entry of `named`, and thin lines for its seeds.
fn charts<T: Copy>(
    arms: &[&Arm],
    x: &str,
    y: &str,
    named: &[(&str, T)],
    series: impl Fn(&Run, T) -> Series,
) -> Vec<Chart> {
    let lines = |arm: &Arm| -> Vec<ChartLine> {
        let each = named.iter().enumerate().flat_map(|(style, (name, of))| {
            let runs: Vec<(String, Series)> =
                arm.runs.iter().map(|run| (format!("seed {}", run.seed), series(run, *of))).collect();
            arm_lines(name, style, &runs)
        });
        each.collect()
    };
    let chart = |arm: &&Arm| Chart { title: escape(&arm.label), x: x.to_owned(), y: y.to_owned(), lines: lines(arm) };
    arms.iter().map(chart).collect()
}

fn share(run: &Run) -> Series {
    kl_shares(&run.phases).into_iter().map(|(phase, share)| (phase, (phase as f64, share))).collect()
}

#[cfg(test)]
mod tests {
    use super::super::study::tests::arm;
    use super::*;

    #[test]
    fn an_arm_with_an_ensemble_shows_its_variance_beside_its_error() {
        let mut adaptive = arm(&[("arm", "adaptive")], "adaptive", &[0.5, 0.6]);
        for run in &mut adaptive.runs {
            run.calibration = [(0.0, 0.1, 0.2), (3.0, 0.2, 0.9)]
                .map(|(kl, variance, gold_error)| CalibrationBin {
                    kl_low: kl,
                    kl_high: kl + 1.0,
                    kl,
                    n: 10,
                    variance,
                    gold_error: Some(gold_error),
                    quality_error: None,
                })
                .to_vec();
        }
        let page = figures(&Study { arms: vec![adaptive], ..Study::default() });
        assert!(page.contains("squared%20error%20against%20gold,%20mean"), "{page}");
        assert!(!page.contains("squared%20error%20against%20true%20quality,%20mean"), "there are no facts");
        let mut lone = arm(&[("arm", "mean")], "mean", &[0.5]);
        lone.runs[0].curve.iter_mut().for_each(|point| point.variance = None);
        assert!(figures(&Study { arms: vec![lone], ..Study::default() }).is_empty());
    }
}
