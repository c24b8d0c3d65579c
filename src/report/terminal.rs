//! What a run's end prints: the table of arms and the fixed sentences. Knows no markup.

use super::study::Study;
use super::{arms, verdict};

/// Empty for a run without arms whose annotators were not compared.
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
    out.push_str(&arms_table(study));
    out.push('\n');
    for sentence in arms::engagement(study) {
        out.push_str(&format!("{sentence}\n"));
    }
    if let Some(told) = study.flattered() {
        out.push_str(&format!("{told}\n"));
    }
    out.push('\n');
    for v in verdict::verdicts(study) {
        out.push_str(&format!("{:<12} {}\n             ({})\n", v.answer.to_string(), v.sentence, v.because));
    }
    out
}

/// With intervals where there is room: the page has them all.
fn arms_table(study: &Study) -> String {
    let head: Vec<&str> = arms::NAMED.into_iter().chain(arms::COLUMNS.iter().map(|column| column.short)).collect();
    let rows: Vec<Vec<String>> = arms::rows(study)
        .into_iter()
        .map(|row| {
            let cells = row.cells.iter().zip(&arms::COLUMNS).map(|(cell, column)| match cell {
                None => "–".to_owned(),
                Some(cell) if column.roomy => format!("{} {}", cell.mean, cell.interval),
                Some(cell) => cell.mean.clone(),
            });
            row.named.iter().cloned().chain(cells).collect()
        })
        .collect();
    table(&head, arms::TEXT, &rows)
}

/// Columns padded to their widest cell; the first `text` are set left, the rest right.
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
    fn the_table_of_arms_fits_a_terminal() {
        let arm = super::super::study::tests::arm(&[("arm", "pessimistic")], "pessimistic", &[-0.7, 0.7]);
        let table = arms_table(&Study { arms: vec![arm], ..Study::default() });
        let widest = table.lines().map(|line| line.chars().count()).max();
        assert!(widest.is_some_and(|widest| widest <= 155), "{table}");
    }

    #[test]
    fn columns_line_up() {
        let rows = [vec!["a".to_owned(), "1".to_owned()], vec!["long".to_owned(), "22".to_owned()]];
        assert_eq!(super::table(&["x", "n"], 1, &rows), "x      n\na      1\nlong  22\n");
    }
}
