//! The page's section of answers: notes, gates, tested statements, and figures of the differences and the frontier.

use super::forest::{ArmPoint, forest, frontier};
use super::html::{escape, table};
use super::inference::{Family, Statement, Test, Verdict};
use super::outcome::{Measure, frontier_point};
use super::stopping;
use super::study::{Arm, Role, Study};
use super::verdict::{Findings, fixed_lambdas};
use stages::stats::mean;

pub fn section(study: &Study) -> String {
    let answers = Findings::of(study);
    let mut out: String = answers.notes.iter().map(|note| format!("<p>{}</p>", escape(note))).collect();
    if !answers.gates.is_empty() {
        out.push_str("<h3>Gates</h3>");
        out.push_str(&gates(&answers));
    }
    let secondary: Vec<Measure> = [Measure::Gold].into_iter().filter(|m| *m != answers.primary).collect();
    if !answers.hypotheses.is_empty() {
        out.push_str("<h3>Hypotheses</h3><p class=\"soft\">Tests: exact two-sided paired sign flips over seeds; intervals: 95%, by \
             inverting the test. A statement with several parts holds if each part does, so that its p is the largest of \
             theirs; Holm's correction is within one table. Detectable: with power 0.8, from the deviation of the \
             differences.</p>");
        out.extend(answers.hypotheses.iter().map(family));
    }
    for measure in std::iter::once(answers.primary).chain(secondary) {
        out.push_str(&differences(&answers, measure));
    }
    out.push_str(&frontier_figure(study, answers.primary));
    out.push_str(&stopping::section(study, answers.primary));
    if !answers.claims.is_empty() {
        out.push_str("<h3>Claims of the paper</h3>");
        out.extend(answers.claims.iter().map(family));
    }
    let missing = answers.not_judged();
    if !missing.is_empty() {
        out.push_str(&format!("<p class=\"soft\">{}</p>", escape(&missing)));
    }
    out
}

fn gates(answers: &Findings) -> String {
    let rows: Vec<Vec<String>> = answers
        .gates
        .iter()
        .map(|gate| {
            let seeds = gate.seeds.iter().map(|(seed, passed, numbers)| {
                let (class, word) = match passed {
                    Some(true) => ("seen", "passed"),
                    Some(false) => ("bad", "missed"),
                    None => ("cannot-tell", "unknown"),
                };
                format!(
                    "<span class=\"interval\">{seed}: <span class=\"{class}\">{word}</span>, {}</span>",
                    escape(numbers)
                )
            });
            vec![
                gate.name.to_owned(),
                escape(&gate.sentence),
                seeds.collect(),
                format!("{} of {}", gate.passed(), gate.seeds.len()),
            ]
        })
        .collect();
    table(&["gate", "condition", "by seed", "passed"], 3, &rows)
}

fn family(family: &Family) -> String {
    let rows: Vec<Vec<String>> = family.statements.iter().flat_map(rows).collect();
    let head = ["", "statement", "answer", "effect", "95% interval", "p", "Holm p", "n", "detectable"];
    let note = family.note.as_ref().map_or_else(String::new, |note| format!("<p class=\"soft\">{}</p>", escape(note)));
    format!("<h4>{}</h4>{note}{}", escape(&family.title), table(&head, 3, &rows))
}

/// One table row per part of a statement; the first row also has the statement and its answer.
fn rows(statement: &Statement) -> Vec<Vec<String>> {
    let class = match statement.verdict {
        Verdict::Shown => "seen",
        Verdict::Opposite => "bad",
        Verdict::NotShown | Verdict::NotJudged => "cannot-tell",
    };
    let number = |v: Option<f64>, decimals: usize| v.map_or_else(|| "–".to_owned(), |v| format!("{v:.decimals$}"));
    let row = |(i, part): (usize, &Test)| {
        let first = i == 0;
        let stated = if first { escape(&statement.sentence) } else { String::new() };
        let seeds: Vec<String> = part.seeds.iter().map(|(seed, value)| format!("{seed}: {value:+.3}")).collect();
        vec![
            if first { statement.name.to_owned() } else { String::new() },
            format!(
                "{stated}<span class=\"interval\" title=\"{}\">{}</span>",
                escape(&seeds.join("; ")),
                escape(&part.label)
            ),
            if first { format!("<span class=\"{class}\">{}</span>", statement.verdict) } else { String::new() },
            format!("{:+.3}", part.mean),
            part.interval.map_or_else(|| "–".to_owned(), |(low, high)| format!("[{low:+.3}, {high:+.3}]")),
            number(statement.corrected.map(|_| part.p), 4),
            if first { number(statement.corrected, 4) } else { String::new() },
            part.seeds.len().to_string(),
            number(part.detectable(), 3),
        ]
    };
    statement.parts.iter().enumerate().map(row).collect()
}

/// The forest plot of one measure's comparisons, with the A/A band.
fn differences(answers: &Findings, measure: Measure) -> String {
    let compared = answers.compared(measure);
    let noise: Vec<&Test> = answers.noise.iter().filter(|(of, _)| *of == measure).map(|(_, test)| test).collect();
    let drawn = forest(&format!("Paired differences in {measure}"), &compared, &noise);
    if drawn.is_empty() {
        return drawn;
    }
    let band = match noise.as_slice() {
        [] => "No arm repeats the mean arm, so that the noise floor is not known.",
        _ => "The band is the noise floor: differences of two arms that are equal but for their draws (A/A).",
    };
    format!(
        "<h3>Paired differences in {measure}</h3><p class=\"soft\">Large: mean over seeds with its interval; small: single seeds. \
         {band}</p>{drawn}"
    )
}

/// Every arm as a point of KL and outcome.
fn frontier_figure(study: &Study, measure: Measure) -> String {
    let adaptive = study.arms.iter().find(|arm| arm.role == Role::Adaptive);
    let fixed: Vec<&str> =
        adaptive.into_iter().flat_map(|arm| fixed_lambdas(study, arm)).map(|arm| arm.label.as_str()).collect();
    let place = |(style, arm): (usize, &Arm)| {
        let seeds: Vec<(f64, f64)> = arm.runs.iter().filter_map(|run| frontier_point(run, measure)).collect();
        let of = |axis: fn(&(f64, f64)) -> f64| mean(&seeds.iter().map(axis).collect::<Vec<_>>());
        let mean = (of(|p| p.0), of(|p| p.1));
        (!seeds.is_empty()).then(|| ArmPoint {
            label: arm.label.clone(),
            style,
            mean,
            seeds,
            on_frontier: fixed.contains(&arm.label.as_str()),
        })
    };
    let places: Vec<ArmPoint> = study.arms.iter().enumerate().filter_map(place).collect();
    let adaptive = study.arms.iter().enumerate().filter(|(_, arm)| arm.role == Role::Adaptive);
    let paths: Vec<(usize, Vec<(f64, f64)>)> = adaptive
        .flat_map(|(style, arm)| arm.runs.iter().map(move |run| (style, run)))
        .map(|(style, run)| {
            (style, run.sampled().filter_map(|point| Some((point.kl_exact, measure.of(point)?))).collect())
        })
        .collect();
    let title = format!("{measure} against KL");
    let drawn = frontier(&title, &measure.to_string(), &places, &paths);
    if drawn.is_empty() {
        return drawn;
    }
    format!(
        "<h3>{title}</h3><p class=\"soft\">Large: an arm's mean over seeds in the last third of its evaluations; small: single seeds. \
         Dashed: the frontier of the mean arms by lambda; lines: the adaptive arm's paths over its steps.</p>{drawn}"
    )
}

#[cfg(test)]
mod tests {
    use super::super::verdict::tests::constructed;
    use super::*;

    #[test]
    fn the_section_shows_gates_hypotheses_and_both_figures() {
        let page = section(&constructed(8));
        for part in ["<h3>Gates</h3>", "G1", "<h3>Hypotheses</h3>", "H7", "A/A", "Claims of the paper", "<polyline"] {
            assert!(page.contains(part), "{part}");
        }
        assert!(page.contains("shown") && !page.contains("NaN"));
        let page = section(&constructed(2));
        assert_eq!(page.matches("A demonstration with 2 seeds").count(), 1);
        assert!(!page.contains(">shown<") && !page.contains(">not shown<"), "{page}");
    }
}
