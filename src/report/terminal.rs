//! The summary printed at the end of a run: the table of arms and the answers in short.

use super::arms;
use super::inference::{Statement, Subject, Verdict};
use super::study::{Study, list};
use super::verdict::Findings;

/// Empty for a run without arms and without compared annotators.
pub fn summary(study: &Study, agreement: &[String]) -> String {
    let agreement: String = agreement.iter().map(|sentence| format!("{sentence}\n")).collect();
    if study.arms.is_empty() {
        return agreement;
    }
    let mut out = agreement;
    if !out.is_empty() {
        out.push('\n');
    }
    out.push_str(&format!("gold: {}\n\n", study.gold_heading()));
    if study.runs() > arms::MAX_RUNS_LISTED {
        out.push_str("means over seeds, half B, last third of the evaluations:\n");
        out.push_str(&table(&arms::OUTCOME_HEAD, 1, &arms::outcomes(study)));
    } else {
        out.push_str(&arms_table(study));
    }
    out.push('\n');
    for sentence in arms::engagement(study) {
        out.push_str(&format!("{sentence}\n"));
    }
    if let Some(warning) = study.tuning_overlap() {
        out.push_str(&format!("{warning}\n"));
    }
    out.push('\n');
    out.push_str(&answers(&Findings::of(study)));
    out
}

/// Each hypothesis in its primary measure, and counts of the results that the page lists in full.
fn answers(answers: &Findings) -> String {
    let mut out: String = answers.notes.first().map_or_else(String::new, |note| format!("{note}\n"));
    let gates: Vec<String> = answers
        .gates
        .iter()
        .map(|gate| match gate.missed().as_slice() {
            [] => format!("{} {} of {}", gate.name, gate.passed(), gate.seeds.len()),
            missed => format!("{} {} of {} (not {})", gate.name, gate.passed(), gate.seeds.len(), list(missed)),
        })
        .collect();
    if !gates.is_empty() {
        out.push_str(&format!("gates passed, by seeds: {}\n", gates.join("; ")));
    }
    let shown = [Subject::Preconditions, Subject::Outcomes(answers.primary)];
    let hypotheses = answers.hypotheses.iter().filter(|family| shown.contains(&family.subject));
    for statement in hypotheses.flat_map(|family| &family.statements) {
        out.push_str(&statement_line(statement));
    }
    for (_, test) in answers.noise.iter().filter(|(measure, _)| *measure == answers.primary) {
        out.push_str(&format!("A/A  {:<11} {}: {:+.3}\n", "", test.label, test.mean));
    }
    let claims: Vec<&Statement> = answers.claims.iter().flat_map(|family| &family.statements).collect();
    let counts: Vec<String> = [Verdict::Shown, Verdict::Opposite, Verdict::NotShown, Verdict::NotJudged]
        .into_iter()
        .map(|answer| (claims.iter().filter(|statement| statement.verdict == answer).count(), answer))
        .filter(|(count, _)| *count > 0)
        .map(|(count, answer)| format!("{count} {answer}"))
        .collect();
    if !counts.is_empty() {
        out.push_str(&format!("statements about the paper's claims, in the report: {}\n", counts.join(", ")));
    }
    let missing = answers.not_judged();
    if !missing.is_empty() {
        out.push_str(&format!("{missing}\n"));
    }
    out
}

fn statement_line(statement: &Statement) -> String {
    let parts: Vec<String> = statement
        .parts
        .iter()
        .map(|part| match part.interval {
            Some((low, high)) => format!("{:+.3} [{low:+.3}, {high:+.3}]", part.mean),
            None => format!("{:+.3}", part.mean),
        })
        .collect();
    let p = statement.corrected.map_or_else(String::new, |p| format!(", p {p:.3}"));
    format!("{:<4} {:<11} {}: {}{p}\n", statement.name, statement.verdict, statement.sentence, parts.join("; "))
}

/// Width of a terminal that the table of arms fits, unless the arms have very long names.
const WIDTH: usize = 100;

/// The table of arms, with intervals if they fit; the page has all columns and intervals.
fn arms_table(study: &Study) -> String {
    let whole = arms_columns(study, true);
    if whole.lines().all(|line| line.chars().count() <= WIDTH) { whole } else { arms_columns(study, false) }
}

fn arms_columns(study: &Study, intervals: bool) -> String {
    let head: Vec<&str> =
        ["arm", "seed", "at phase"].into_iter().chain(arms::COLUMNS.iter().filter_map(|column| column.short)).collect();
    let rows: Vec<Vec<String>> = arms::rows(study)
        .into_iter()
        .map(|row| {
            let [arm, seed, at, phase] = row.ids;
            let at = format!("{} {phase}", at.trim_end_matches(" on A"));
            let shown = row.cells.iter().zip(&arms::COLUMNS).filter(|(_, column)| column.short.is_some());
            let cells = shown.map(|(cell, column)| match cell {
                None => "–".to_owned(),
                Some(cell) if column.shows_interval && intervals => format!("{} {}", cell.mean, cell.interval),
                Some(cell) => cell.mean.clone(),
            });
            [arm, seed, at].into_iter().chain(cells).collect()
        })
        .collect();
    table(&head, 3, &rows)
}

/// Columns padded to their widest cell; the first `text` columns are aligned left, the others right.
pub fn table(head: &[&str], text: usize, rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([head[column].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..head.len()).map(width).collect();
    let mut out = String::new();
    let head: Vec<String> = head.iter().map(|h| (*h).to_owned()).collect();
    for row in std::iter::once(&head).chain(rows) {
        let cells: Vec<String> = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(i, (cell, &w))| {
                let pad = " ".repeat(w - cell.chars().count().min(w));
                if i < text { format!("{cell}{pad}") } else { format!("{pad}{cell}") }
            })
            .collect();
        out.push_str(cells.join("  ").trim_end());
        out.push('\n');
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tables_of_arms_fit_a_hundred_columns() {
        let cases = [
            ("pessimistic", -0.7, true),
            ("matched-constant", 0.7, true),
            ("matched-constant", -0.7, true),
            ("matched-constant-b", -0.7, false),
            ("m, 0.005, pessimistic", 0.7, false),
        ];
        for (name, end, interval) in cases {
            let arm = super::super::study::tests::arm(&[("arm", name)], "pessimistic", &[end, 0.7]);
            let study = Study { arms: vec![arm], ..Study::default() };
            let table = arms_table(&study);
            let means = super::table(&arms::OUTCOME_HEAD, 1, &arms::outcomes(&study));
            let widest = table.lines().chain(means.lines()).map(|line| line.chars().count()).max();
            assert!(widest.is_some_and(|widest| widest <= 100), "{table}{means}");
            assert_eq!(table.contains("0.60 [0.50, 0.70]"), interval, "{table}");
            assert!(table.contains("chosen 4") && table.contains(name), "{table}");
        }
    }

    #[test]
    fn the_answers_are_a_dozen_lines() {
        for seeds in [2, 8] {
            let text = answers(&Findings::of(&super::super::verdict::tests::constructed(seeds)));
            assert!(text.lines().count() <= 12, "{text}");
            assert!(text.contains("\nH3 ") && text.contains("\nA/A ") && text.contains("gates passed"), "{text}");
        }
    }

    #[test]
    fn columns_line_up() {
        let rows = [vec!["a".to_owned(), "1".to_owned()], vec!["long".to_owned(), "22".to_owned()]];
        assert_eq!(super::table(&["x", "n"], 1, &rows), "x      n\na      1\nlong  22\n");
    }
}
