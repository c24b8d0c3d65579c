//! Rows from JSON objects, and the description of a table for users.

use engine::artifact::{ColumnSpec, FileSpec};
use serde_json::{Map, Value};

use super::mismatch::Mismatch;
use super::view::type_name;
use super::{Cell, Column, Row};

/// A JSON object while a [`Row`] takes its columns from it.
pub struct JsonRow {
    /// The columns that were not taken yet.
    rest: Map<String, Value>,
    names: Vec<String>,
    mismatch: Mismatch,
}

impl JsonRow {
    pub fn new(rest: Map<String, Value>) -> Self {
        let names = rest.keys().cloned().collect();
        Self { rest, names, mismatch: Mismatch::default() }
    }

    /// The value of a column; notes a fault and returns `None` if it is missing or has another type.
    pub fn cell<C: Cell>(&mut self, name: &'static str) -> Option<C> {
        let value = match self.rest.shift_remove(name) {
            Some(value) => value,
            None if C::NULLABLE => Value::Null,
            None => {
                self.mismatch.missing(&Column::of::<C>(name, &[]));
                return None;
            }
        };
        C::from_json(&value).map_err(|what| self.mismatch.wrong(name, &what)).ok()
    }

    /// # Errors
    /// If a column was missing or had another type, or if the object has other fields; names all of them.
    pub fn finish<R: Row>(mut self) -> Result<(), String> {
        self.rest.keys().for_each(|name| self.mismatch.unexpected(name));
        self.mismatch.message(&self.names.join(", "), &R::columns()).map_or(Ok(()), Err)
    }
}

/// One text of the lines of a doc comment.
pub(super) fn paragraph(lines: &[&str]) -> String {
    lines.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ")
}

/// Describes the file `name`, a table of `R`; without a converter from JSON lines.
pub fn spec<R: Row>(name: &'static str) -> FileSpec {
    let columns = R::columns().into_iter().map(|column| ColumnSpec {
        name: column.name,
        data_type: type_name(&column.data_type),
        nullable: column.nullable,
        about: about(&column),
        words: column.words.iter().map(|(word, lines)| (*word, paragraph(lines))).collect(),
    });
    FileSpec { columns: columns.collect(), ..FileSpec::new(name, paragraph(R::ABOUT)) }
}

/// The doc comment of a column; the ends of an interval, `x_low` and `x_high`, need none.
fn about(column: &Column) -> String {
    let end = [("_low", "Lower"), ("_high", "Upper")].into_iter();
    let end = end.filter_map(|(suffix, end)| Some((column.name.strip_suffix(suffix)?, end))).next();
    match end {
        Some((of, end)) if column.about.is_empty() => format!("{end} end of the interval of `{of}`."),
        _ => paragraph(column.about),
    }
}
