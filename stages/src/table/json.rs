//! Reads rows of Parquet files from other programs as JSON, with any nesting.

use std::path::Path;

use arrow::array::RecordBatch;
use arrow::datatypes::DataType;
use arrow::json::WriterBuilder;
use arrow::json::writer::JsonArray;
use engine::error::{Error, Result};
use parquet::arrow::ProjectionMask;
use serde_json::Value;

use super::batches::{Batches, builder, unreadable};
use super::view::type_name;

/// Rows held in memory at once.
const BATCH: usize = 256;

/// The rows of a file as JSON objects with those of the `wanted` columns that it has. Nulls are kept.
///
/// # Errors
/// If it is not a Parquet file, or if one of the columns holds bytes that are not text.
pub fn json_rows(path: &Path, wanted: &[&str]) -> Result<impl Iterator<Item = Result<Value>> + use<>> {
    let builder = builder(path)?;
    let found = builder.schema().clone();
    let is_wanted = |i: &usize| wanted.contains(&found.field(*i).name().as_str());
    let roots: Vec<usize> = (0..found.fields().len()).filter(is_wanted).collect();
    if let Some(field) = roots.iter().map(|&i| found.field(i)).find(|field| holds_bytes(field.data_type())) {
        let told = type_name(field.data_type());
        return Err(Error::user(format!("{}: column `{}` holds bytes ({told})", path.display(), field.name()))
            .help("write texts as strings"));
    }
    let mask = ProjectionMask::roots(builder.parquet_schema(), roots);
    let batches = Batches::open(path, builder, mask, BATCH)?;
    let path = path.to_owned();
    Ok(batches.flat_map(move |batch| match batch.and_then(|batch| rows_of(&batch, &path)) {
        Ok(rows) => rows.into_iter().map(Ok).collect(),
        Err(e) => vec![Err(e)],
    }))
}

fn rows_of(batch: &RecordBatch, path: &Path) -> Result<Vec<Value>> {
    let mut bytes = Vec::new();
    let mut writer = WriterBuilder::new().with_explicit_nulls(true).build::<_, JsonArray>(&mut bytes);
    writer.write(batch).and_then(|()| writer.finish()).map_err(|e| unreadable(path, &e))?;
    drop(writer);
    serde_json::from_slice(&bytes).map_err(|e| unreadable(path, &e))
}

fn holds_bytes(data_type: &DataType) -> bool {
    match data_type {
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView | DataType::FixedSizeBinary(_) => true,
        DataType::List(item) | DataType::LargeList(item) => holds_bytes(item.data_type()),
        DataType::Struct(fields) => fields.iter().any(|field| holds_bytes(field.data_type())),
        _ => false,
    }
}
