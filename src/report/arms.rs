//! The table of arms: start, chosen on A and final step, every number from half B. Knows no markup.

use stages::types::CurvePoint;

use super::study::{Run, Study};

pub const HEAD: [&str; 11] =
    ["arm", "seed", "at", "phase", "true quality", "gold (SFT sd)", "win rate", "proxy", "KL", "length", "EOS"];
/// How many of the columns are text.
pub const TEXT: usize = 3;

/// Rows of text, an arm's seeds together.
pub fn rows(study: &Study) -> Vec<Vec<String>> {
    let mut rows = Vec::new();
    for arm in &study.arms {
        for run in &arm.runs {
            for (at, point) in points(run) {
                rows.push(row(&arm.label, run.seed, at, point));
            }
        }
    }
    rows
}

fn points(run: &Run) -> impl Iterator<Item = (&'static str, &CurvePoint)> {
    [("start", run.start()), ("chosen on A", run.chosen()), ("final", run.end())]
        .into_iter()
        .filter_map(|(at, point)| Some((at, point?)))
}

fn row(arm: &str, seed: u64, at: &str, p: &CurvePoint) -> Vec<String> {
    let quality = match (p.quality, p.quality_low, p.quality_high) {
        (Some(mean), Some(low), Some(high)) => interval(mean, low, high),
        _ => "–".to_owned(),
    };
    vec![
        arm.to_owned(),
        seed.to_string(),
        at.to_owned(),
        p.step.to_string(),
        quality,
        interval(p.gold_sd, p.gold_sd_low, p.gold_sd_high),
        interval(p.win_rate, p.win_rate_low, p.win_rate_high),
        format!("{:+.2}", p.proxy),
        format!("{:.2}", p.kl),
        format!("{:.1}", p.length),
        format!("{:.0}%", 100.0 * p.eos_rate),
    ]
}

fn interval(mean: f64, low: f64, high: f64) -> String {
    format!("{mean:.2} [{low:.2}, {high:.2}]")
}

pub const MECHANISM_HEAD: [&str; 8] =
    ["arm", "seed", "c/λ first", "c/λ max", "c/λ last", "mean(1 − c)", "Spearman(s², KL)", "Spearman(s², |μ − gold|)"];

/// The mechanism of every run; `None` for a number that the arm does not have.
pub fn mechanism(study: &Study) -> Vec<Vec<String>> {
    let tell = |v: Option<f64>| v.map_or_else(|| "–".to_owned(), |v| format!("{v:.3}"));
    study
        .arms
        .iter()
        .flat_map(|arm| arm.runs.iter().map(move |run| (arm, run)))
        .map(|(arm, run)| {
            let m = &run.about.mechanism;
            let mut row = vec![arm.label.clone(), run.seed.to_string()];
            row.extend(
                [
                    m.c_over_lambda_first,
                    m.c_over_lambda_max,
                    m.c_over_lambda_last,
                    m.one_minus_c,
                    m.spearman_s2_kl,
                    m.spearman_s2_error,
                ]
                .map(tell),
            );
            row
        })
        .collect()
}

/// c must have grown to this many times lambda for the mechanism to have been at work.
const ENGAGED: f64 = 3.0;

/// What the mechanism's numbers say of the adaptive arms; none without one.
pub fn engagement(study: &Study) -> Option<String> {
    let most = study
        .arms
        .iter()
        .filter(|arm| arm.objective == "adaptive")
        .flat_map(|arm| &arm.runs)
        .filter_map(|run| run.about.mechanism.c_over_lambda_max)
        .reduce(f64::max)?;
    Some(if most < ENGAGED {
        format!("The adaptive mechanism was not engaged: mean(c)/lambda reached {most:.2} at most, below {ENGAGED}.")
    } else {
        format!("The adaptive mechanism was engaged: mean(c)/lambda reached {most:.2}.")
    })
}
