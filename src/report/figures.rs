//! The paper's figures 4 to 6 for a study, with true quality next to them.

use std::collections::BTreeSet;

use stages::stats::GaoFit;
use stages::types::CurvePoint;

use super::best_of_n;
use super::chart::{self, Chart, ChartLine, Series, arm_lines, legend};
use super::html::{escape, table};
use super::study::{Run, Study};

type ValueOf = fn(&CurvePoint) -> Option<f64>;

const PANELS: [(&str, ValueOf); 4] = [
    ("gold reward (SFT deviations above SFT)", |r| Some(r.gold_sd)),
    ("true quality", |r| r.quality),
    ("proxy reward", |r| Some(r.proxy)),
    ("KL to the reference (nats)", |r| Some(r.kl_exact)),
];

/// Figure 4: by step, then by KL; figure 6: variance against KL. A second matrix dimension, such as the policy's size,
/// gives figures for each of its values; those of a policy other than the first are the paper's figure 5.
pub fn figures(study: &Study) -> String {
    let groups = groups(study);
    let policy = |group: &Study| group.arms.first()?.runs.first()?.policy;
    let first = groups.first().and_then(|(_, group)| policy(group));
    let panels = groups.iter().map(|(label, group)| {
        let number = if policy(group) == first { 4 } else { 5 };
        let label = if label.is_empty() { String::new() } else { format!(" ({})", escape(label)) };
        panels(group, number, &label)
    });
    panels.chain([best_of_n::figures(&study.best_of)]).collect()
}

/// The arms grouped by their labels in dimensions that do not set the objective, that is in which every value has
/// several objectives.
fn groups(study: &Study) -> Vec<(String, Study)> {
    let objectives = |dimension: &(String, String)| -> BTreeSet<&str> {
        let arms = study.arms.iter().filter(|arm| arm.labels.contains(dimension));
        arms.flat_map(|arm| &arm.runs).map(|run| run.about.objective.as_str()).collect()
    };
    let dimensions: BTreeSet<&str> =
        study.arms.iter().flat_map(|arm| arm.labels.iter().map(|(d, _)| d.as_str())).collect();
    let groups_by = |name: &str| {
        let mut labels = study.arms.iter().flat_map(|arm| &arm.labels).filter(|(d, _)| d == name);
        labels.all(|label| objectives(label).len() > 1)
    };
    let dimensions: BTreeSet<&str> = dimensions.into_iter().filter(|name| groups_by(name)).collect();
    let mut groups: Vec<(String, Study)> = Vec::new();
    for arm in &study.arms {
        let labels = arm.labels.iter().filter(|(d, _)| dimensions.contains(d.as_str()));
        let label = labels.map(|(_, label)| label.as_str()).collect::<Vec<_>>().join(", ");
        match groups.iter_mut().find(|(known, _)| *known == label) {
            Some((_, group)) => group.arms.push(arm.clone()),
            None => groups.push((label, Study { arms: vec![arm.clone()], ..study.clone() })),
        }
    }
    groups
}

fn panels(study: &Study, number: u32, label: &str) -> String {
    let by_step: Vec<Chart> =
        PANELS.iter().map(|(title, of)| chart(study, title, "phase", |r| Some(r.step as f64), *of)).collect();
    let distance: ValueOf = |r| Some(r.kl_exact.max(0.0).sqrt());
    let by_kl: Vec<Chart> =
        PANELS[..3].iter().map(|(title, of)| chart(study, title, "square root of KL", distance, *of)).collect();
    let variance = chart(study, "ensemble variance", "KL (nats)", |r| Some(r.kl_exact), |r| r.variance);
    let gold = escape(&study.gold_heading());
    format!(
        "<p class=\"soft\">Thick: mean over seeds; thin: single seeds. Half B of the held-out prompts.</p>\
         <h3>Figure {number}{label}: by step</h3>{legend}<p class=\"soft\">{gold}</p>{}\
         <h3>The same{label} by the square root of KL</h3>{legend}<p class=\"soft\">{gold}</p>{}{}\
         <h3>Figure 6{label}: reward variance against KL</h3>{legend}{}",
        chart::figures(&by_step),
        chart::figures(&by_kl),
        fits(study),
        chart::figures(&[variance]),
        legend = legend(study.arms.iter().map(|arm| arm.label.as_str())),
    )
}

/// Gao et al.'s R = d (a - b log d), d = sqrt(KL), fitted to the gain since the start over all seeds of each arm: the
/// curves over the seeds' points, and their coefficients.
fn fits(study: &Study) -> String {
    let charts: Vec<Chart> = PANELS[..3].iter().map(|(title, of)| fit_chart(study, title, *of)).collect();
    let rows: Vec<Vec<String>> = study
        .arms
        .iter()
        .map(|arm| {
            let numbers = PANELS[..3].iter().flat_map(|(_, of)| match GaoFit::of(&gains(&arm.runs, *of)) {
                Some(GaoFit { a, b }) => [format!("{a:.3}"), format!("{b:.3}")],
                None => ["–".to_owned(), "–".to_owned()],
            });
            std::iter::once(escape(&arm.label)).chain(numbers).collect()
        })
        .collect();
    let head = ["arm", "gold: a", "gold: b", "true quality: a", "true quality: b", "proxy: a", "proxy: b"];
    format!(
        "<p class=\"soft\">R = d (a - b log d) with d = √KL (Gao et al. 2023), fitted to the gain since the start over all seeds: \
         a is the gain at d = 1, b how fast the curve bends down. Thick: the fit; thin: single seeds.</p>{}{}",
        chart::figures(&charts),
        table(&head, 1, &rows)
    )
}

/// The gain since the start over d = sqrt(KL) of every evaluation of the runs.
fn gains(runs: &[Run], of: ValueOf) -> Vec<(f64, f64)> {
    let points = |run: &Run| {
        let start = run.start().and_then(of);
        let gain = |row: &CurvePoint| Some((row.kl_exact.max(0.0).sqrt(), of(row)? - start?));
        run.sampled().filter_map(gain).collect::<Vec<_>>()
    };
    runs.iter().flat_map(points).collect()
}

/// Every arm's fit over its range of distances, and the points that it was fitted to.
fn fit_chart(study: &Study, title: &str, of: ValueOf) -> Chart {
    const POINTS: usize = 48;
    let title = format!("gain in {title}");
    let lines = study.arms.iter().enumerate().flat_map(|(style, arm)| {
        let seed = |run: &Run| {
            let name = format!("{}, seed {}", arm.label, run.seed);
            ChartLine { name, points: gains(std::slice::from_ref(run), of), style, thin: true }
        };
        let all = gains(&arm.runs, of);
        let furthest = all.iter().map(|(d, _)| *d).fold(0.0, f64::max);
        let at = |fit: GaoFit, i: usize| {
            let d = furthest * i as f64 / POINTS as f64;
            (d, fit.at(d))
        };
        let fitted = GaoFit::of(&all).map(|fit| ChartLine {
            name: format!("{}, fit", arm.label),
            points: (0..=POINTS).map(|i| at(fit, i)).collect(),
            style,
            thin: false,
        });
        arm.runs.iter().map(seed).chain(fitted).collect::<Vec<_>>()
    });
    Chart { title: title.clone(), x: "square root of KL".to_owned(), y: title, lines: lines.collect() }
}

fn chart(study: &Study, title: &str, x: &str, along: ValueOf, of: ValueOf) -> Chart {
    let lines = study.arms.iter().enumerate().flat_map(|(style, arm)| {
        let runs: Vec<(String, Series)> =
            arm.runs.iter().map(|run| (format!("seed {}", run.seed), series(run, along, of))).collect();
        arm_lines(&arm.label, style, &runs)
    });
    Chart { title: title.to_owned(), x: x.to_owned(), y: title.to_owned(), lines: lines.collect() }
}

fn series(run: &Run, along: ValueOf, of: ValueOf) -> Series {
    run.sampled().filter_map(|row| Some((row.step, (along(row)?, of(row)?)))).collect()
}

#[cfg(test)]
mod tests {
    use engine::names::Digest;

    use super::super::study::tests::arm;
    use super::*;

    #[test]
    fn every_size_and_coefficient_has_figures_of_its_own_and_another_policy_is_figure_5() {
        let mut arms = Vec::new();
        for size in ["s", "m"] {
            for lambda in ["0.005", "0.01"] {
                for objective in ["mean", "adaptive"] {
                    let mut arm = arm(&[("size", size), ("lambda", lambda), ("arm", objective)], objective, &[0.5]);
                    arm.runs[0].policy = Some(Digest::of(size.as_bytes()));
                    arms.push(arm);
                }
            }
        }
        let study = Study { arms, ..Study::default() };
        let labels: Vec<(String, usize)> = groups(&study).into_iter().map(|(label, g)| (label, g.arms.len())).collect();
        assert_eq!(labels, ["s, 0.005", "s, 0.01", "m, 0.005", "m, 0.01"].map(|label| (label.to_owned(), 2)));
        let page = figures(&study);
        for heading in ["Figure 4 (s, 0.005): by step", "Figure 4 (s, 0.01): by step", "Figure 5 (m, 0.005): by step"] {
            assert!(page.contains(heading), "{heading}");
        }
        assert!(page.contains("Figure 6 (m, 0.01): reward variance"));
    }

    #[test]
    fn arms_alone_share_one_figure() {
        let arms = vec![
            arm(&[("arm", "mean")], "mean", &[0.5]),
            arm(&[("arm", "mean-0.02")], "mean", &[0.5]),
            arm(&[("arm", "adaptive")], "adaptive", &[0.5]),
        ];
        let study = Study { arms, ..Study::default() };
        assert_eq!(groups(&study).len(), 1);
        assert!(figures(&study).contains("<h3>Figure 4: by step</h3>"));
    }

    #[test]
    fn the_fitted_curve_passes_through_points_of_its_own_form() {
        let truth = GaoFit { a: 2.0, b: 0.7 };
        let mut arm = arm(&[("arm", "mean")], "mean", &[0.5, 0.6]);
        for point in arm.runs.iter_mut().flat_map(|run| &mut run.curve) {
            point.proxy = 3.0 + truth.at(point.kl_exact.sqrt());
        }
        let study = Study { arms: vec![arm], ..Study::default() };
        let chart = fit_chart(&study, "proxy reward", |r| Some(r.proxy));
        let names: Vec<&str> = chart.lines.iter().map(|line| line.name.as_str()).collect();
        assert_eq!(names, ["mean, seed 1", "mean, seed 2", "mean, fit"]);
        let fit = &chart.lines[2];
        assert!(!fit.thin);
        assert_eq!(fit.points.last().map(|p| p.0), Some(8f64.sqrt()));
        for (d, gain) in &fit.points {
            assert!((gain - truth.at(*d)).abs() < 1e-9, "{d}: {gain}");
        }
    }
}
