//! Reads records of human comparisons from JSON lines or Parquet, each with its position.

use std::cell::Cell;
use std::path::Path;

use engine::error::{Error, Result};

use super::formats::{COLUMNS, Format, Record, named};
use crate::table;
use crate::text::lines::{self, BadRowLimit};

/// Passes every record of `file` to `take` until `take` returns `false`. The layout is `format` or, without it, the
/// layout of the first record.
///
/// # Errors
/// If there are more bad records than allowed: names the line or row of the first one too many. Also errors of `take`.
pub fn each_record(
    file: &Path,
    format: Option<Format>,
    allowance: &mut BadRowLimit,
    mut take: impl FnMut(Record) -> Result<bool>,
) -> Result<()> {
    if lines::Format::of_file(file)? != lines::Format::Parquet {
        let known = Cell::new(format);
        return lines::each_line(file, allowance, |line| of_line(line, &known), take);
    }
    let format = format.map_or_else(|| of_columns(file), Ok)?;
    for (row, record) in table::json_rows(file, COLUMNS)?.enumerate() {
        match format.read(record?) {
            Ok(record) => {
                if !take(record)? {
                    break;
                }
            }
            Err(what) => allowance.bad(format_args!("{}, row {}", file.display(), row + 1), &what)?,
        }
    }
    Ok(())
}

fn of_line(line: &str, known: &Cell<Option<Format>>) -> Result<Record, String> {
    let record: serde_json::Value = serde_json::from_str(line).map_err(|e| lines::json_fault(&e))?;
    let format = known.get().map_or_else(|| Format::of(&record), Ok)?;
    known.set(Some(format));
    format.read(record)
}

/// Reports a missing column before reading the first row.
fn of_columns(file: &Path) -> Result<Format> {
    let columns = table::columns(file)?;
    let has = |name: &str| columns.iter().any(|(column, _)| column == name);
    if has("summaries") && has("info") && has("choice") {
        return Ok(Format::Comparisons);
    }
    let Some(missing) = ["chosen", "rejected"].into_iter().find(|name| !has(name)) else {
        return Ok(Format::Preference);
    };
    let found = named(columns.iter().map(|(name, _)| name.as_str()));
    Err(Error::user(format!("{}: column `{missing}` is missing; found {found}", file.display()))
        .help("expected columns `prompt`, `chosen` and `rejected`, or `info`, `summaries` and `choice`"))
}
