//! What the stages of any run learned: metrics, learning curves, RL phases, samples by step.

use std::collections::{BTreeMap, BTreeSet};

use stages::prompt;
use stages::types::{
    Ensemble, Evaluation, Half, LearningPoint, Model, Phase, PolicyRun, Post, Posts, RewardModel, Sample,
};

use super::chart::{self, Chart, ChartLine, Series, arm_lines, legend};
use super::html::{escape, table};
use super::load::{Instance, RunData, SEED, with_arms};

/// Types whose metrics are shown in one column each; metrics of other types are shown in a list.
const LEARNING_TYPES: [&str; 4] = [Model::NAME, RewardModel::NAME, Ensemble::NAME, PolicyRun::NAME];

/// The metrics of every artifact except evaluations, which have their own sections; empty if there are none.
pub fn metrics(run: &RunData) -> String {
    let measured = || run.instances.iter().filter(|i| i.output != Evaluation::NAME && !run.metrics(i).is_empty());
    let learning = |instance: &&Instance| LEARNING_TYPES.contains(&instance.output.as_str());
    let mut kinds: Vec<&str> = Vec::new();
    for instance in measured().filter(learning) {
        if !kinds.contains(&instance.kind.as_str()) {
            kinds.push(&instance.kind);
        }
    }
    let mut out = String::new();
    for kind in kinds {
        let stages: Vec<(&str, BTreeMap<String, f64>)> =
            measured().filter(|i| i.kind == kind).map(|i| (i.name.as_str(), run.metrics(i))).collect();
        out.push_str(&format!("<h3>{}</h3>{}", escape(kind), columns(&stages)));
    }
    let rows: Vec<Vec<String>> = measured()
        .filter(|instance| !learning(instance))
        .map(|instance| {
            let metrics: Vec<String> =
                run.metrics(instance).iter().map(|(name, value)| format!("{name} {}", number(*value))).collect();
            vec![escape(&instance.name), escape(&instance.kind), escape(&metrics.join(", "))]
        })
        .collect();
    if !rows.is_empty() {
        out.push_str(&format!("<h3>Other stages</h3>{}", table(&["stage", "kind", "metrics"], 3, &rows)));
    }
    out
}

/// A table with a column for every metric that any of the stages has.
fn columns(stages: &[(&str, BTreeMap<String, f64>)]) -> String {
    let names: BTreeSet<&str> = stages.iter().flat_map(|(_, metrics)| metrics.keys().map(String::as_str)).collect();
    let head: Vec<&str> = ["stage"].into_iter().chain(names.iter().copied()).collect();
    let rows: Vec<Vec<String>> = stages
        .iter()
        .map(|(stage, metrics)| {
            let cells = names.iter().map(|name| metrics.get(*name).map_or_else(|| "–".to_owned(), |v| number(*v)));
            std::iter::once(escape(stage)).chain(cells).collect()
        })
        .collect();
    table(&head, 1, &rows)
}

/// Four significant digits; whole numbers in full.
pub fn number(v: f64) -> String {
    if v.fract() == 0.0 && v.abs() < 1e15 {
        return format!("{v:.0}");
    }
    let digits = 3 - v.abs().log10().floor() as i32;
    if (0..=7).contains(&digits) { format!("{v:.0$}", digits as usize) } else { format!("{v:.3e}") }
}

/// The losses of supervised and reward training, one chart per stage, followed by the RL phases; empty if nothing was
/// learned.
pub fn curves(run: &RunData) -> String {
    let mut unreadable = Vec::new();
    let training = training(run, &mut unreadable);
    let rl = phases(run, &mut unreadable);
    let unreadable: String =
        unreadable.iter().map(|message| format!("<p class=\"bad\">{}</p>", escape(message))).collect();
    unreadable + &training + &rl
}

/// Reads an artifact's table, if the artifact exists. If it cannot be read, adds a sentence to `unreadable`.
fn read<T>(
    run: &RunData,
    instance: &Instance,
    unreadable: &mut Vec<String>,
    table: impl FnOnce(&std::path::Path) -> engine::error::Result<T>,
) -> Option<T> {
    match table(&run.folder(instance)?) {
        Ok(rows) => Some(rows),
        Err(error) => {
            unreadable.push(format!("{} is left out, since it cannot be read: {error}", instance.name));
            None
        }
    }
}

/// A chart with more lines has no legend; its data name the lines.
const LEGEND_AT_MOST: usize = 12;

/// A stage or an arm, with the data read from each of its instances.
type Group<'a, T> = (String, Vec<(&'a Instance, T)>);

fn training(run: &RunData, unreadable: &mut Vec<String>) -> String {
    let mut stages: Vec<Group<'_, Vec<LearningPoint>>> = Vec::new();
    for instance in run.instances.iter().filter(|i| [Model::NAME, RewardModel::NAME].contains(&i.output.as_str())) {
        let Some(curve) = read(run, instance, unreadable, LearningPoint::read).filter(|curve| !curve.is_empty()) else {
            continue;
        };
        match stages.iter_mut().find(|(stage, _)| *stage == instance.stage()) {
            Some((_, members)) => members.push((instance, curve)),
            None => stages.push((instance.stage().to_owned(), vec![(instance, curve)])),
        }
    }
    if stages.is_empty() {
        return String::new();
    }
    let figures: String = stages.iter().map(|(stage, members)| loss(stage, members)).collect();
    format!("<h3>Training loss by step</h3><div class=\"charts\">{figures}</div>")
}

fn loss(stage: &str, members: &[(&Instance, Vec<LearningPoint>)]) -> String {
    let labels: Vec<String> = members
        .iter()
        .map(|(instance, _)| instance.matrix.iter().map(|(_, label)| label.as_str()).collect::<Vec<_>>().join(", "))
        .collect();
    let lines = members.iter().enumerate().map(|(style, (instance, curve))| ChartLine {
        name: instance.name.clone(),
        points: curve.iter().map(|point| (point.step as f64, point.loss)).collect(),
        style,
        thin: members.len() > LEGEND_AT_MOST,
    });
    let title = format!("loss of {stage}");
    let chart = Chart { title, x: "step".into(), y: "loss".into(), lines: lines.collect() };
    let legend = if (2..=LEGEND_AT_MOST).contains(&members.len()) {
        legend(labels.iter().map(String::as_str))
    } else {
        String::new()
    };
    format!("<div>{}{legend}</div>", chart::figure(&chart))
}

type ValueOf = fn(&Phase) -> Option<f64>;

const PANELS: [(&str, ValueOf); 6] = [
    ("proxy reward of the rollouts", |p| p.proxy),
    ("KL of the rollouts (nats)", |p| p.kl),
    ("s² of the rollouts", |p| p.s2),
    ("KL coefficient", |p| p.lambda_effective),
    ("entropy", |p| p.entropy),
    ("response length (tokens)", |p| p.length),
];

/// The RL runs by arm, with the data that `of` reads from each.
fn by_arm<'a, T>(run: &'a RunData, mut of: impl FnMut(&str, &'a Instance) -> Option<T>) -> Vec<Group<'a, T>> {
    let mut arms: Vec<Group<'a, T>> = Vec::new();
    for (arm, instance) in with_arms(run.instances.iter().filter(|i| i.output == PolicyRun::NAME)) {
        let Some(value) = of(&arm, instance) else { continue };
        match arms.iter_mut().find(|(name, _)| *name == arm) {
            Some((_, runs)) => runs.push((instance, value)),
            None => arms.push((arm, vec![(instance, value)])),
        }
    }
    arms
}

fn seed(instance: &Instance) -> String {
    let seed = instance.matrix.iter().find(|(dimension, _)| dimension == SEED);
    seed.map_or_else(|| instance.name.clone(), |(_, label)| format!("seed {label}"))
}

fn phases(run: &RunData, unreadable: &mut Vec<String>) -> String {
    let arms = by_arm(run, |_, instance| read(run, instance, unreadable, PolicyRun::phases));
    let charts = PANELS.map(|(title, of)| {
        let lines = arms.iter().enumerate().flat_map(|(style, (arm, runs))| {
            let series = |phases: &[Phase]| -> Series {
                phases.iter().filter_map(|p| Some((p.phase, (p.phase as f64, of(p)?)))).collect()
            };
            let runs: Vec<(String, Series)> =
                runs.iter().map(|(instance, phases)| (seed(instance), series(phases))).collect();
            arm_lines(arm, style, &runs)
        });
        Chart { title: title.into(), x: "phase".into(), y: title.into(), lines: lines.collect() }
    });
    // Drop panels without values in any arm.
    let charts: Vec<Chart> = charts.into_iter().filter(|chart| !chart.is_empty()).collect();
    if charts.is_empty() {
        return String::new();
    }
    let legend = legend(arms.iter().map(|(arm, _)| arm.as_str()));
    format!(
        "<h3>RL by phase</h3>{legend}<p class=\"soft\">Thick: mean over seeds; thin: single seeds.</p>{}",
        chart::figures(&charts)
    )
}

/// Number of posts, and of steps per post, for which samples are shown.
const POSTS: usize = 3;
const STEPS: usize = 5;

/// Samples of each arm's first run for a few held-out posts during RL; empty without RL runs.
pub fn samples(run: &RunData) -> String {
    let mut unreadable = Vec::new();
    let mut seen: BTreeSet<String> = BTreeSet::new();
    let arms = by_arm(run, |arm, instance| {
        // Show one run per arm.
        if seen.contains(arm) {
            return None;
        }
        let samples = read(run, instance, &mut unreadable, |folder| few(PolicyRun::samples(folder)?))?;
        seen.insert(arm.to_owned());
        Some(samples)
    });
    let mut out: String =
        unreadable.iter().map(|message| format!("<p class=\"bad\">{}</p>", escape(message))).collect();
    let ids: BTreeSet<&str> = arms.iter().flat_map(|(_, runs)| &runs[0].1).map(|s| s.post_id.as_str()).collect();
    let posts = arms.first().map(|(_, runs)| posts(run, runs[0].0, &ids)).unwrap_or_default();
    for id in ids.iter().take(POSTS) {
        let mut rows = Vec::new();
        for (arm, runs) in &arms {
            for sample in runs[0].1.iter().filter(|s| s.post_id == *id) {
                rows.push(vec![
                    escape(arm),
                    format!("<div class=\"long\">{}</div>", escape(&sample.text)),
                    sample.step.to_string(),
                    format!("{:+.2}", sample.proxy),
                    format!("{:.2}", sample.logp - sample.logp_ref),
                ]);
            }
        }
        let post = posts.get(*id).map_or_else(
            || format!("<p class=\"soft\">post {}</p>", escape(id)),
            |post| {
                format!(
                    "<pre>{}</pre><p class=\"soft\">reference: {}</p>",
                    escape(&prompt::text(post)),
                    escape(&post.summary)
                )
            },
        );
        out.push_str(&format!("{post}{}", table(&["arm", "summary", "phase", "proxy", "KL (nats)"], 2, &rows)));
    }
    out
}

/// The samples of the first posts of half B by id, at a few steps from the first to the last.
fn few(samples: impl Iterator<Item = engine::error::Result<Sample>>) -> engine::error::Result<Vec<Sample>> {
    let mut kept = samples
        .filter(|sample| sample.as_ref().map_or(true, |s| s.half == Half::B && !s.greedy))
        .collect::<engine::error::Result<Vec<Sample>>>()?;
    let ids: BTreeSet<String> = kept.iter().map(|s| s.post_id.clone()).collect();
    let ids: BTreeSet<String> = ids.into_iter().take(POSTS).collect();
    let steps: Vec<i64> = kept.iter().map(|s| s.step).collect::<BTreeSet<_>>().into_iter().collect();
    let steps = spread(&steps);
    kept.retain(|sample| ids.contains(&sample.post_id) && steps.contains(&sample.step));
    kept.sort_by(|a, b| (&a.post_id, a.step).cmp(&(&b.post_id, b.step)));
    Ok(kept)
}

/// At most [`STEPS`] steps, evenly spaced from the first to the last.
fn spread(steps: &[i64]) -> Vec<i64> {
    if steps.len() <= STEPS {
        return steps.to_vec();
    }
    (0..STEPS).map(|i| steps[i * (steps.len() - 1) / (STEPS - 1)]).collect()
}

/// The posts of an RL stage by id; empty if its artifact is gone.
fn posts(run: &RunData, instance: &Instance, ids: &BTreeSet<&str>) -> BTreeMap<String, Post> {
    let folder = run.input(instance, "posts").and_then(|posts| run.folder(posts));
    let Some(Ok(reader)) = folder.map(|folder| Posts::open(&folder)) else { return BTreeMap::new() };
    let found = reader.filter_map(Result::ok).filter(|post| ids.contains(post.id.as_str()));
    found.take(ids.len()).map(|post| (post.id.clone(), post)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_metric_that_a_stage_lacks_is_a_dash() {
        let metrics = |pairs: &[(&str, f64)]| pairs.iter().map(|(n, v)| ((*n).to_owned(), *v)).collect();
        let html =
            columns(&[("a", metrics(&[("accuracy", 0.75), ("steps", 120.0)])), ("b", metrics(&[("steps", 5.0)]))]);
        assert!(html.contains("<td>a</td><td class=\"n\">0.7500</td><td class=\"n\">120</td>"), "{html}");
        assert!(html.contains("<td>b</td><td class=\"n\">–</td><td class=\"n\">5</td>"), "{html}");
    }

    #[test]
    fn numbers_have_four_digits() {
        let shown = [0.123_456, -12.345_6, 98_765.432, 1e-9, 250_000.0, 0.0].map(number);
        assert_eq!(shown, ["0.1235", "-12.35", "9.877e4", "1.000e-9", "250000", "0"]);
    }

    #[test]
    fn the_chosen_steps_include_the_first_and_the_last() {
        assert_eq!(spread(&[0, 4, 8]), [0, 4, 8]);
        assert_eq!(spread(&(0..=12).map(|n| n * 4).collect::<Vec<_>>()), [0, 12, 24, 36, 48]);
    }

    #[test]
    fn samples_are_those_of_half_b_and_not_greedy() -> engine::error::Result<()> {
        let sample = |id: &str, step: i64, half: Half, greedy: bool| Sample {
            step,
            post_id: id.into(),
            half,
            greedy,
            ids: vec![1],
            text: "t".into(),
            ended: true,
            logp: -1.0,
            logp_ref: -2.0,
            kl_exact: 1.0,
            scores: vec![0.5],
            proxy: 0.5,
            mean: 0.5,
            variance: None,
        };
        let all = [
            sample("b", 0, Half::B, false),
            sample("a", 4, Half::B, false),
            sample("a", 0, Half::B, false),
            sample("c", 0, Half::A, false),
            sample("a", 0, Half::B, true),
        ];
        let kept = few(all.into_iter().map(Ok))?;
        assert_eq!(
            kept.iter().map(|s| (s.post_id.as_str(), s.step)).collect::<Vec<_>>(),
            [("a", 0), ("a", 4), ("b", 0)]
        );
        Ok(())
    }
}
