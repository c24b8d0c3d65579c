//! Reads and writes rows of plain Rust structs as Parquet: streaming, with reproducible bytes.
//!
//! Declare tables with [`table!`](crate::table!) and closed sets of words with [`words!`](crate::words!):
//!
//! ```
//! stages::table! {
//!     /// One point of a curve.
//!     pub struct Point { pub step: i64, pub gold: f64, pub quality: Option<f64>, pub ids: Vec<u32> }
//! }
//! # fn main() -> engine::error::Result<()> {
//! # let folder = tempfile::tempdir().unwrap();
//! let file = folder.path().join("points.parquet");
//! let mut writer = stages::table::Writer::create(&file)?;
//! writer.push(Point { step: 0, gold: 0.5, quality: None, ids: vec![1, 2] })?;
//! assert_eq!(writer.finish()?, 1);
//! let points: Vec<Point> = stages::table::read(&file)?;
//! assert_eq!(points[0].ids, [1, 2]);
//! # Ok(())
//! # }
//! ```

mod batches;
mod cells;
mod file;
mod json;
mod mismatch;
mod pages;
mod row;
mod view;
#[macro_use]
mod declare;

pub use cells::Cell;
pub use file::{Reader, Writer, check, columns, read, write};
pub use json::json_rows;
pub(crate) use mismatch::OTHER_COLUMNS;
pub use row::{JsonRow, spec};
pub(crate) use view::cut;
pub use view::preview;

// Re-exported for the macros, so that their users need no dependency on arrow.
#[doc(hidden)]
pub use arrow::array::{Array, ArrayRef, StringArray};
#[doc(hidden)]
pub use arrow::datatypes::DataType;
#[doc(hidden)]
pub use cells::{mismatch, named as cell};
#[doc(hidden)]
pub use serde_json::Value;

/// One column of a table: its name, its type as shown to users (`utf8`, `f64`, `list<u32>`), whether it may hold nulls.
#[derive(Clone, Debug)]
pub struct Column {
    pub name: &'static str,
    pub data_type: DataType,
    pub nullable: bool,
    /// The lines of the field's doc comment.
    pub about: &'static [&'static str],
    /// See [`Cell::WORDS`].
    pub words: &'static [(&'static str, &'static [&'static str])],
}

impl Column {
    pub fn of<C: Cell>(name: &'static str, about: &'static [&'static str]) -> Self {
        Self { name, data_type: C::data_type(), nullable: C::NULLABLE, about, words: C::WORDS }
    }
}

/// A row of a table. Implemented by [`table!`](crate::table!).
pub trait Row: Sized {
    /// The lines of the struct's doc comment.
    const ABOUT: &'static [&'static str];

    fn columns() -> Vec<Column>;
    /// One array per column, in order.
    fn arrays(rows: &[Self]) -> Vec<ArrayRef>;
    /// Builds rows from arrays in the order and with the types of [`Row::columns`].
    ///
    /// # Errors
    /// Names the column with an invalid value.
    fn rows(arrays: &[ArrayRef]) -> Result<Vec<Self>, String>;
    /// Builds a row from a JSON object with one field per column. Nullable columns may be missing.
    ///
    /// # Errors
    /// Names every column that is missing, unexpected or invalid.
    fn from_json(row: JsonRow) -> Result<Self, String>;
}
