//! Text display of column types and rows.

use std::fmt::Write as _;
use std::path::Path;

use arrow::datatypes::DataType;
use arrow::util::display::{ArrayFormatter, FormatOptions};
use engine::error::Result;
use parquet::arrow::ProjectionMask;

use super::batches::{Batches, builder};

/// The name of a type as shown to users: `utf8`, `f64`, `list<u32>`, …
pub(super) fn type_name(data_type: &DataType) -> String {
    match data_type {
        DataType::Utf8 => "utf8".to_owned(),
        DataType::Boolean => "bool".to_owned(),
        DataType::Float64 => "f64".to_owned(),
        DataType::Float32 => "f32".to_owned(),
        DataType::Int64 => "i64".to_owned(),
        DataType::Int32 => "i32".to_owned(),
        DataType::UInt32 => "u32".to_owned(),
        DataType::UInt64 => "u64".to_owned(),
        DataType::List(item) | DataType::LargeList(item) => format!("list<{}>", type_name(item.data_type())),
        other => format!("{other}").to_lowercase(),
    }
}

/// The first `rows` rows of a Parquet file as text: a block per row, a line per column, long values truncated.
///
/// # Errors
/// If the file cannot be read.
pub fn preview(file: &Path, rows: usize) -> Result<String> {
    let mut text = String::new();
    let mut shown = 0;
    for batch in Batches::open(file, builder(file)?, ProjectionMask::all(), rows.clamp(1, 1024))? {
        let batch = batch?;
        let options = FormatOptions::default().with_null("null");
        let schema = batch.schema();
        let width = schema.fields().iter().map(|f| f.name().len()).max().unwrap_or(0);
        for row in 0..batch.num_rows() {
            if shown == rows {
                return Ok(text);
            }
            shown += 1;
            let _ = writeln!(text, "row {shown}");
            for (field, array) in schema.fields().iter().zip(batch.columns()) {
                let value = ArrayFormatter::try_new(array.as_ref(), &options)
                    .map_or_else(|e| e.to_string(), |shown| shown.value(row).to_string());
                let _ = writeln!(text, "  {:width$}  {}", field.name(), cut(&value, 160));
            }
        }
    }
    Ok(text)
}

/// At most `limit` characters of the text, on one line.
pub(crate) fn cut(text: &str, limit: usize) -> String {
    let line = text.replace(['\n', '\r'], " / ");
    match line.char_indices().nth(limit) {
        Some((at, _)) => format!("{} …", &line[..at]),
        None => line,
    }
}
