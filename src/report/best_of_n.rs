//! The figures of best-of-n: gold reward, true quality and proxy against the square root of the KL, by objective.

use stages::types::{BestOfPoint, Half};

use super::chart::{self, Chart, ChartLine, Series, arm_lines, legend};
use super::html::escape;
use super::study::BestOf;

type ValueOf = fn(&BestOfPoint) -> Option<f64>;

const PANELS: [(&str, ValueOf); 3] = [
    ("gold reward (SFT deviations above SFT)", |p| Some(p.gold_sd)),
    ("true quality", |p| p.quality),
    ("proxy (the objective's own phi)", |p| Some(p.proxy)),
];

/// One row of charts per evaluation; empty if there is none.
pub fn figures(best_of: &[BestOf]) -> String {
    best_of.iter().map(figure).collect()
}

fn figure(best_of: &BestOf) -> String {
    let objectives = objectives(best_of);
    let charts: Vec<Chart> = PANELS
        .iter()
        .map(|(title, of)| Chart {
            title: (*title).to_owned(),
            x: "square root of KL (nats)".to_owned(),
            y: (*title).to_owned(),
            lines: lines(best_of, &objectives, *of),
        })
        .collect();
    let most = best_of.runs.iter().flatten().map(|p| p.n).max().unwrap_or(1);
    format!(
        "<h3>Best of n: {}</h3><p class=\"soft\">What the best of 1 to {most} responses by each objective is worth: means over all \
         subsets of the responses to a prompt, half B. KL is the bound log n - (n - 1) / n. Thick: mean over seeds; thin: single \
         seeds.</p>{}{}",
        escape(&best_of.label),
        legend(objectives.iter().map(String::as_str)),
        chart::figures(&charts),
    )
}

/// The objectives in table order.
fn objectives(best_of: &BestOf) -> Vec<String> {
    let mut found: Vec<String> = Vec::new();
    for point in best_of.runs.iter().flatten() {
        let name = point.objective.to_string();
        if !found.contains(&name) {
            found.push(name);
        }
    }
    found
}

fn lines(best_of: &BestOf, objectives: &[String], of: ValueOf) -> Vec<ChartLine> {
    let lines = objectives.iter().enumerate().flat_map(|(style, objective)| {
        let runs = best_of.runs.iter().enumerate();
        let runs: Vec<(String, Series)> =
            runs.map(|(i, points)| (format!("run {}", i + 1), series(points, objective, of))).collect();
        arm_lines(objective, style, &runs)
    });
    lines.collect()
}

/// One objective's values on half B, by n.
fn series(points: &[BestOfPoint], objective: &str, of: ValueOf) -> Series {
    let here = points.iter().filter(|p| p.half == Half::B && p.objective.as_str() == objective);
    here.filter_map(|p| Some((p.n, (p.kl.sqrt(), of(p)?)))).collect()
}

#[cfg(test)]
mod tests {
    use stages::types::Objective;

    use super::*;

    fn point(objective: Objective, n: i64, half: Half, gold: f64) -> BestOfPoint {
        let none = None::<f64>;
        BestOfPoint {
            objective,
            n,
            half,
            prompts: 9,
            kl: (n as f64).ln() - (n as f64 - 1.0) / n as f64,
            gold,
            gold_low: gold,
            gold_high: gold,
            gold_sd: gold,
            gold_sd_low: gold,
            gold_sd_high: gold,
            quality: none,
            quality_low: none,
            quality_high: none,
            proxy: gold,
            proxy_low: gold,
            proxy_high: gold,
            mu: gold,
            mu_low: gold,
            mu_high: gold,
            variance: none,
            variance_low: none,
            variance_high: none,
            length: 9.0,
            length_low: 9.0,
            length_high: 9.0,
        }
    }

    #[test]
    fn each_objective_has_a_line_for_each_seed_and_their_mean_on_half_b() {
        let run = |gold: f64| -> Vec<BestOfPoint> {
            [Objective::Standard, Objective::Mean]
                .into_iter()
                .flat_map(|o| {
                    [1, 4].map(|n| [point(o, n, Half::A, 99.0), point(o, n, Half::B, gold * n as f64)]).concat()
                })
                .collect()
        };
        let best_of = BestOf { label: "best".to_owned(), runs: vec![run(0.1), run(0.3)] };
        let lines = lines(&best_of, &objectives(&best_of), PANELS[0].1);
        let drawn: Vec<(usize, bool, Vec<f64>)> =
            lines.iter().map(|l| (l.style, l.thin, l.points.iter().map(|p| p.1).collect())).collect();
        assert_eq!(drawn.len(), 6);
        assert_eq!(drawn[0], (0, true, vec![0.1, 0.4]));
        assert!(!drawn[2].1 && (drawn[2].2[1] - 0.8).abs() < 1e-12 && drawn[5].0 == 1, "{drawn:?}");
        assert_eq!(lines[0].points[0].0, 0.0, "the best of one is no KL away");
        let page = figures(&[best_of]);
        assert!(page.contains("Best of n: best") && page.contains("mean") && page.contains("best of 1 to 4"));
        assert!(figures(&[]).is_empty());
    }
}
