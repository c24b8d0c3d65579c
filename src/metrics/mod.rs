//! The curves in an artifact's tables, and event files for TensorBoard.

pub mod tensorboard;

use std::path::Path;

use engine::error::Result;
use serde_json::Value;
use stages::table;
use stages::types::{Evaluation, LEARNING, PolicyRun};

/// Values of one quantity by step.
#[derive(Clone, Debug, PartialEq)]
pub struct Curve {
    /// The table and the column, such as `phases.kl`.
    pub name: String,
    /// In step order, one per step.
    pub points: Vec<(i64, f64)>,
}

/// The tables that hold curves.
const TABLES: [&str; 3] = [LEARNING, PolicyRun::PHASES, Evaluation::CURVE];
/// The columns that count steps.
const STEPS: [&str; 2] = ["step", "phase"];
/// Which rows count in a table with several per step: sampled responses to half B, as in the report.
const SELECTION: [(&str, &str); 2] = [("half", "B"), ("greedy", "false")];

/// Every curve in an artifact's folder: the numeric columns of its tables that have a row per step.
///
/// # Errors
/// If a table cannot be read.
pub fn curves(folder: &Path) -> Result<Vec<Curve>> {
    let mut curves = Vec::new();
    for file in TABLES {
        let path = folder.join(file);
        if path.is_file() {
            curves.extend(table_curves(&path, file.trim_end_matches(".parquet"))?);
        }
    }
    Ok(curves)
}

fn table_curves(path: &Path, table: &str) -> Result<Vec<Curve>> {
    let columns = table::columns(path)?;
    let has = |name: &str| columns.iter().any(|(column, _)| column == name);
    let Some(step) = STEPS.into_iter().find(|step| has(step)) else { return Ok(Vec::new()) };
    let numeric = |data_type: &str| matches!(data_type, "f64" | "f32" | "i64" | "i32" | "u64" | "u32");
    let values: Vec<&str> = columns
        .iter()
        .filter(|(name, data_type)| numeric(data_type) && !STEPS.contains(&name.as_str()))
        .map(|(name, _)| name.as_str())
        .collect();
    let selection: Vec<(&str, &str)> = SELECTION.into_iter().filter(|(column, _)| has(column)).collect();
    let wanted: Vec<&str> =
        values.iter().copied().chain([step]).chain(selection.iter().map(|(column, _)| *column)).collect();
    let mut points: Vec<Vec<(i64, f64)>> = vec![Vec::new(); values.len()];
    for row in table::json_rows(path, &wanted)? {
        let row = row?;
        let is = |column: &str, expected: &str| match &row[column] {
            Value::String(text) => text == expected,
            Value::Bool(value) => expected.parse() == Ok(*value),
            _ => false,
        };
        let Some(at) = row[step].as_i64().filter(|_| selection.iter().all(|(column, value)| is(column, value))) else {
            continue;
        };
        for (name, points) in values.iter().zip(&mut points) {
            points.extend(row[*name].as_f64().map(|value| (at, value)));
        }
    }
    let curves = values.iter().zip(points).filter(|(_, points)| !points.is_empty());
    Ok(curves
        .map(|(name, mut points)| {
            points.sort_by_key(|(step, _)| *step);
            points.dedup_by_key(|(step, _)| *step);
            Curve { name: format!("{table}.{name}"), points }
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use stages::types::LearningPoint;

    use super::*;

    #[test]
    fn the_numeric_columns_of_a_table_become_curves() {
        let dir = tempfile::tempdir().unwrap();
        assert_eq!(curves(dir.path()).unwrap(), []);
        let point = |step: i64, loss: f64| LearningPoint { step, loss, lr: 0.5, grad_norm: 2.0 };
        LearningPoint::write(dir.path(), vec![point(1, 3.0), point(2, 2.5)]).unwrap();
        let found = curves(dir.path()).unwrap();
        let names: Vec<&str> = found.iter().map(|curve| curve.name.as_str()).collect();
        assert_eq!(names, ["learning.loss", "learning.lr", "learning.grad_norm"]);
        assert_eq!(found[0].points, [(1, 3.0), (2, 2.5)]);
    }
}
