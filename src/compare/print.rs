//! Prints a comparison: as tables for people, as long rows for programs.

use serde_json::{Value, json};

use super::{CurveRow, Differences, Side};
use crate::report::terminal::table;
use crate::report::{csv_text, number};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    Table,
    Markdown,
    Csv,
    Json,
}

/// Rows of metrics, and curves, that fit on a screen with the rest.
const MAX_METRICS: usize = 20;
const MAX_CURVES: usize = 5;
/// The curves shown without `--all`, most important first.
const MAIN_CURVES: [&str; 7] =
    ["curve.quality", "curve.gold_sd", "curve.proxy", "curve.kl", "phases.proxy", "phases.kl", "learning.loss"];
/// Longest value of a parameter in a table, in characters.
const MAX_VALUE: usize = 40;

/// The comparison as text. `all`: without limits on the number of rows.
pub fn print(sides: &[Side], found: &Differences, format: Format, all: bool) -> String {
    match format {
        Format::Json => crate::output::json(&describe(sides, found)).expect("a JSON value is plain data") + "\n",
        // Without the carriage returns of files: on a terminal they would be shown.
        Format::Csv => csv_text(&["what", "stage", "name", "step", "side", "value"], &long_rows(sides, found))
            .replace("\r\n", "\n"),
        Format::Table | Format::Markdown => tables(sides, found, format, all),
    }
}

fn tables(sides: &[Side], found: &Differences, format: Format, all: bool) -> String {
    let write = |head: &[&str], text: usize, rows: &[Vec<String>]| match format {
        Format::Markdown => markdown(head, text, rows),
        _ => table(head, text, rows),
    };
    // Names of sides may be long: one letter each, explained once.
    let letters: Vec<String> = (0..sides.len()).map(letter).collect();
    let mut out = String::new();
    for (letter, side) in letters.iter().zip(sides) {
        out.push_str(&format!("{letter} = {}{}", side.name, if format == Format::Markdown { "  \n" } else { "\n" }));
    }
    if found.settings.is_empty() {
        out.push_str("\nno parameter differs\n");
    } else {
        let head: Vec<&str> = ["parameter"].into_iter().chain(letters.iter().map(String::as_str)).collect();
        let rows: Vec<Vec<String>> = found
            .settings
            .iter()
            .map(|row| {
                let values = row.values.iter().map(|value| value.as_deref().map_or_else(dash, shortened));
                std::iter::once(format!("{}.{}", row.stage, row.name)).chain(values).collect()
            })
            .collect();
        out.push_str(&format!("\n{}", write(&head, 1, &rows)));
    }
    if found.metrics.is_empty() {
        out.push_str("\nno common metric differs\n");
    } else {
        let mut head: Vec<&str> = ["stage", "metric"].into_iter().chain(letters.iter().map(String::as_str)).collect();
        if let [a, b] = &letters[..] {
            debug_assert_eq!((a.as_str(), b.as_str()), ("A", "B"));
            head.push("B - A");
        }
        let shown = if all { found.metrics.len() } else { MAX_METRICS };
        let rows: Vec<Vec<String>> = found
            .metrics
            .iter()
            .take(shown)
            .map(|row| {
                let mut cells = vec![row.stage.clone(), row.name.clone()];
                cells.extend(row.values.iter().map(|value| value.map_or_else(dash, number)));
                if let [a, b] = row.values[..] {
                    cells.push(a.zip(b).map_or_else(dash, |(a, b)| signed(b - a)));
                }
                cells
            })
            .collect();
        out.push_str(&format!("\n{}{}", write(&head, 2, &rows), more(found.metrics.len(), shown)));
    }
    let curves: Vec<&CurveRow> = if all { found.curves.iter().collect() } else { main_curves(&found.curves) };
    if !curves.is_empty() {
        let head = ["stage", "curve", "", "", "first", "last", "min", "max"];
        let shown = if all { curves.len() } else { MAX_CURVES };
        let rows: Vec<Vec<String>> = curves.iter().take(shown).flat_map(|row| curve_lines(row, &letters)).collect();
        let hidden = more(found.curves.len(), shown.min(curves.len()));
        out.push_str(&format!("\n{}{hidden}", write(&head, 4, &rows)));
    }
    out
}

fn letter(at: usize) -> String {
    match u8::try_from(at) {
        Ok(at) if at < 26 => char::from(b'A' + at).to_string(),
        _ => format!("S{}", at + 1),
    }
}

fn dash() -> String {
    "–".to_owned()
}

fn more(count: usize, shown: usize) -> String {
    if count > shown { format!("… and {} more (--all)\n", count - shown) } else { String::new() }
}

fn signed(difference: f64) -> String {
    let shown = number(difference);
    if difference > 0.0 { format!("+{shown}") } else { shown }
}

fn shortened(value: &str) -> String {
    let line = value.replace(['\n', '\r'], " ");
    match line.char_indices().nth(MAX_VALUE) {
        Some((at, _)) => format!("{}…", &line[..at]),
        None => line,
    }
}

fn main_curves(curves: &[CurveRow]) -> Vec<&CurveRow> {
    let rank = |row: &&CurveRow| MAIN_CURVES.iter().position(|name| row.name == *name);
    let mut main: Vec<&CurveRow> = curves.iter().filter(|row| rank(row).is_some()).collect();
    main.sort_by_key(rank);
    main
}

/// A line for each side that has the curve.
fn curve_lines(row: &CurveRow, letters: &[String]) -> Vec<Vec<String>> {
    let all = row.curves.iter().flatten().map(|(_, value)| *value);
    let (low, high) = all.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    let with_points = letters.iter().zip(&row.curves).filter(|(_, curve)| !curve.is_empty());
    with_points
        .enumerate()
        .map(|(i, (letter, curve))| {
            let values: Vec<f64> = curve.iter().map(|(_, value)| *value).collect();
            let least = values.iter().copied().fold(f64::INFINITY, f64::min);
            let most = values.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let name = |text: &str| if i == 0 { text.to_owned() } else { String::new() };
            let numbers = [values[0], values[values.len() - 1], least, most].map(number);
            let text = [name(&row.stage), name(&row.name), letter.clone(), sparkline(&values, low, high)];
            text.into_iter().chain(numbers).collect()
        })
        .collect()
}

const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
/// Characters of a sparkline.
const WIDTH: usize = 24;

/// The values as bars between `low` and `high`; longer curves are averaged piece by piece.
fn sparkline(values: &[f64], low: f64, high: f64) -> String {
    let width = values.len().min(WIDTH);
    (0..width)
        .map(|i| {
            let piece = &values[i * values.len() / width..(i + 1) * values.len() / width];
            let value = piece.iter().sum::<f64>() / piece.len() as f64;
            let share = if high > low { (value - low) / (high - low) } else { 0.0 };
            BARS[((share * BARS.len() as f64) as usize).min(BARS.len() - 1)]
        })
        .collect()
}

/// A table in GitHub's Markdown; the first `text` columns are aligned left.
fn markdown(head: &[&str], text: usize, rows: &[Vec<String>]) -> String {
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let cells: Vec<String> = cells.map(|cell| cell.replace('|', "\\|")).collect();
        format!("| {} |\n", cells.join(" | "))
    };
    let rule: Vec<&str> = (0..head.len()).map(|i| if i < text { "---" } else { "---:" }).collect();
    let mut out = line(&mut head.iter().copied()) + &line(&mut rule.into_iter());
    out.extend(rows.iter().map(|row| line(&mut row.iter().map(String::as_str))));
    out
}

/// One row per value: what, stage, name, step, side, value.
fn long_rows(sides: &[Side], found: &Differences) -> Vec<Vec<String>> {
    let row = |what: &str, stage: &str, name: &str, step: String, side: &Side, value: String| {
        vec![what.to_owned(), stage.to_owned(), name.to_owned(), step, side.name.clone(), value]
    };
    let mut rows = Vec::new();
    for setting in &found.settings {
        for (side, value) in sides.iter().zip(&setting.values) {
            let value = value.clone().unwrap_or_default();
            rows.push(row("parameter", &setting.stage, &setting.name, String::new(), side, value));
        }
    }
    for metric in &found.metrics {
        for (side, value) in sides.iter().zip(&metric.values) {
            let value = value.map_or_else(String::new, |value| value.to_string());
            rows.push(row("metric", &metric.stage, &metric.name, String::new(), side, value));
        }
    }
    for curve in &found.curves {
        for (side, points) in sides.iter().zip(&curve.curves) {
            for (step, value) in points {
                rows.push(row("curve", &curve.stage, &curve.name, step.to_string(), side, value.to_string()));
            }
        }
    }
    rows
}

/// The comparison as JSON.
pub fn describe(sides: &[Side], found: &Differences) -> Value {
    let settings =
        found.settings.iter().map(|row| json!({ "stage": row.stage, "name": row.name, "values": row.values }));
    let metrics = found.metrics.iter().map(|row| json!({ "stage": row.stage, "name": row.name, "values": row.values }));
    let curves = found.curves.iter().map(|row| json!({ "stage": row.stage, "name": row.name, "curves": row.curves }));
    json!({
        "sides": sides.iter().map(|side| side.name.as_str()).collect::<Vec<_>>(),
        "parameters": settings.collect::<Vec<_>>(),
        "metrics": metrics.collect::<Vec<_>>(),
        "curves": curves.collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sparkline_spans_the_range_and_has_a_limited_width() {
        assert_eq!(sparkline(&[0.0, 0.5, 1.0], 0.0, 1.0), "▁▅█");
        assert_eq!(sparkline(&[2.0, 2.0], 2.0, 2.0), "▁▁");
        let long: Vec<f64> = (0..1000).map(f64::from).collect();
        let shown = sparkline(&long, 0.0, 999.0);
        assert_eq!(shown.chars().count(), WIDTH);
        assert!(shown.starts_with('▁') && shown.ends_with('█'), "{shown}");
    }

    #[test]
    fn a_cell_cannot_break_a_markdown_table() {
        let rows = [vec!["a|b".to_owned(), "1".to_owned()]];
        assert_eq!(markdown(&["x", "y"], 1, &rows), "| x | y |\n| --- | ---: |\n| a\\|b | 1 |\n");
    }
}
