//! The paper's figures 4 and 6 from a study, and true quality beside them. Knows how to draw no line itself.

use stages::types::CurvePoint;

use super::chart::{Chart, Line, svg, swatch};
use super::html::escape;
use super::study::{Arm, Study};

type Of = fn(&CurvePoint) -> Option<f64>;

const PANELS: [(&str, Of); 4] = [
    ("gold reward (SFT deviations above SFT)", |r| Some(r.gold_sd)),
    ("true quality", |r| r.quality),
    ("proxy reward", |r| Some(r.proxy)),
    ("KL to the reference (nats)", |r| Some(r.kl)),
];

/// Figure 4: by step, then by KL; figure 6: variance against KL.
pub fn figures(study: &Study) -> String {
    let by_step: Vec<Chart> =
        PANELS.iter().map(|(title, of)| chart(study, title, "phase", |r| Some(r.step as f64), *of)).collect();
    let by_kl: Vec<Chart> =
        PANELS[..3].iter().map(|(title, of)| chart(study, title, "KL (nats)", |r| Some(r.kl), *of)).collect();
    let variance = chart(study, "ensemble variance", "KL (nats)", |r| Some(r.kl), |r| r.variance);
    let gold = escape(&study.gold_heading());
    format!(
        "{legend}<h3>Figure 4: by step</h3><p class=\"soft\">{gold}</p><div class=\"charts\">{}</div>\
         <h3>The same by KL</h3><p class=\"soft\">{gold}</p><div class=\"charts\">{}</div>\
         <h3>Figure 6: reward variance against KL</h3><div class=\"charts\">{}</div>",
        drawn(&by_step),
        drawn(&by_kl),
        drawn(&[variance]),
        legend = legend(study),
    )
}

fn drawn(charts: &[Chart]) -> String {
    charts.iter().map(|chart| format!("<figure>{}</figure>", svg(chart))).collect()
}

fn legend(study: &Study) -> String {
    let entries: String = study
        .arms
        .iter()
        .enumerate()
        .map(|(i, arm)| format!("<span>{}{}</span>", swatch(i), escape(&arm.label)))
        .collect();
    format!(
        "<div class=\"legend\">{entries}</div><p class=\"soft\">Thick: mean over seeds; thin: single seeds. Half B of the held-out prompts.</p>"
    )
}

fn chart(study: &Study, title: &str, x: &str, along: Of, of: Of) -> Chart {
    let mut lines = Vec::new();
    for (look, arm) in study.arms.iter().enumerate() {
        for run in &arm.runs {
            let points = run.sampled().filter_map(|r| Some((along(r)?, of(r)?))).collect();
            lines.push(Line { points, look, thin: arm.runs.len() > 1 });
        }
        if arm.runs.len() > 1 {
            lines.push(Line { points: mean_line(arm, along, of), look, thin: false });
        }
    }
    Chart { title: title.to_owned(), x: x.to_owned(), y: title.to_owned(), lines }
}

/// The arm's mean at each step that all of its seeds have.
fn mean_line(arm: &Arm, along: Of, of: Of) -> Vec<(f64, f64)> {
    let Some(first) = arm.runs.first() else { return Vec::new() };
    first
        .sampled()
        .filter_map(|row| {
            let rows: Option<Vec<&CurvePoint>> = arm.runs.iter().map(|run| run.at(row.step)).collect();
            let points: Option<Vec<(f64, f64)>> = rows?.into_iter().map(|r| Some((along(r)?, of(r)?))).collect();
            let points = points?;
            let n = points.len() as f64;
            Some((points.iter().map(|p| p.0).sum::<f64>() / n, points.iter().map(|p| p.1).sum::<f64>() / n))
        })
        .collect()
}
