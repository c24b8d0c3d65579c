//! The paper's figures 4 and 6 from a study, and true quality beside them.

use stages::types::CurvePoint;

use super::chart::{self, Chart, Series, arm_lines, legend};
use super::html::escape;
use super::study::{Run, Study};

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
        "{legend}<p class=\"soft\">Thick: mean over seeds; thin: single seeds. Half B of the held-out prompts.</p>\
         <h3>Figure 4: by step</h3><p class=\"soft\">{gold}</p>{}\
         <h3>The same by KL</h3><p class=\"soft\">{gold}</p>{}\
         <h3>Figure 6: reward variance against KL</h3>{}",
        chart::figures(&by_step),
        chart::figures(&by_kl),
        chart::figures(&[variance]),
        legend = legend(study.arms.iter().map(|arm| arm.label.as_str())),
    )
}

fn chart(study: &Study, title: &str, x: &str, along: Of, of: Of) -> Chart {
    let lines = study.arms.iter().enumerate().flat_map(|(look, arm)| {
        let runs: Vec<(String, Series)> =
            arm.runs.iter().map(|run| (format!("seed {}", run.seed), series(run, along, of))).collect();
        arm_lines(&arm.label, look, &runs)
    });
    Chart { title: title.to_owned(), x: x.to_owned(), y: title.to_owned(), lines: lines.collect() }
}

fn series(run: &Run, along: Of, of: Of) -> Series {
    run.sampled().filter_map(|row| Some((row.step, (along(row)?, of(row)?)))).collect()
}
