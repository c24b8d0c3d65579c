//! The paper's figures 4 to 6 for a study, with true quality next to them.

use std::collections::BTreeSet;

use stages::stats::GaoFit;
use stages::types::CurvePoint;

use super::best_of_n;
use super::chart::{self, Chart, Series, arm_lines, legend};
use super::html::{escape, table};
use super::study::{Arm, Run, Study};

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

/// Gao et al.'s R = d (a - b log d), d = sqrt(KL), fitted to the gain since the start over all seeds of each arm.
fn fits(study: &Study) -> String {
    let fit = |arm: &Arm, of: ValueOf| {
        let points = arm.runs.iter().flat_map(|run| {
            let start = run.start().and_then(of);
            let gain = move |row: &CurvePoint| Some((row.kl_exact.max(0.0).sqrt(), of(row)? - start?));
            run.sampled().filter_map(gain).collect::<Vec<_>>()
        });
        GaoFit::of(&points.collect::<Vec<_>>())
    };
    let rows: Vec<Vec<String>> = study
        .arms
        .iter()
        .map(|arm| {
            let numbers = PANELS[..3].iter().flat_map(|(_, of)| match fit(arm, *of) {
                Some(GaoFit { a, b }) => [format!("{a:.3}"), format!("{b:.3}")],
                None => ["–".to_owned(), "–".to_owned()],
            });
            std::iter::once(escape(&arm.label)).chain(numbers).collect()
        })
        .collect();
    let head = ["arm", "gold: a", "gold: b", "true quality: a", "true quality: b", "proxy: a", "proxy: b"];
    format!(
        "<p class=\"soft\">R = d (a - b log d) with d = √KL (Gao et al. 2023), fitted to the gain since the start over all seeds: \
         a is the gain at d = 1, b how fast the curve bends down.</p>{}",
        table(&head, 1, &rows)
    )
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
}
