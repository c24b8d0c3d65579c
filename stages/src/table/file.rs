//! Parquet files of rows: a streaming writer with reproducible bytes, a streaming reader, and a check.

use std::fs::File;
use std::marker::PhantomData;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow::array::{Array, ArrayRef, RecordBatch, new_null_array};
use arrow::datatypes::{Field, Schema, SchemaRef};
use engine::artifact::Facts;
use engine::error::{AtPath, Error, Result};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_writer::{ArrowWriter, ArrowWriterOptions};
use parquet::basic::{Compression, ZstdLevel};
use parquet::file::properties::{EnabledStatistics, WriterProperties, WriterVersion};

use super::Row;
use super::batches::{Batches, builder};
use super::mismatch::{Mismatch, OTHER_COLUMNS};
use super::view::type_name;

/// Rows per batch, in writing and reading.
const BATCH: usize = 1024;
/// Rows per row group: the most that a writer holds in memory.
const GROUP: usize = 16 * 1024;

/// Fixed so that equal rows give equal bytes: nothing here may depend on version, host or time.
fn properties() -> WriterProperties {
    WriterProperties::builder()
        .set_writer_version(WriterVersion::PARQUET_1_0)
        .set_created_by("temper".to_owned())
        .set_compression(Compression::ZSTD(ZstdLevel::try_new(3).expect("3 is a zstd level")))
        .set_statistics_enabled(EnabledStatistics::Chunk)
        .set_statistics_truncate_length(Some(64))
        .set_dictionary_enabled(true)
        .set_max_row_group_row_count(Some(GROUP))
        .build()
}

fn schema<R: Row>() -> SchemaRef {
    Arc::new(Schema::new(
        R::columns().into_iter().map(|c| Field::new(c.name, c.data_type, c.nullable)).collect::<Vec<_>>(),
    ))
}

/// Writes rows one by one; memory does not grow with their number.
pub struct Writer<R: Row> {
    path: PathBuf,
    inner: ArrowWriter<File>,
    schema: SchemaRef,
    waiting: Vec<R>,
    rows: u64,
}

impl<R: Row> Writer<R> {
    /// # Errors
    /// If the file cannot be created.
    pub fn create(path: &Path) -> Result<Self> {
        let schema = schema::<R>();
        // Parquet's own types suffice; Arrow's copy of the schema would only add bytes that must stay reproducible.
        let options = ArrowWriterOptions::new().with_properties(properties()).with_skip_arrow_metadata(true);
        let inner = ArrowWriter::try_new_with_options(File::create(path).at(path)?, schema.clone(), options)
            .map_err(|e| unwritable(path, e))?;
        Ok(Self { path: path.to_owned(), inner, schema, waiting: Vec::with_capacity(BATCH), rows: 0 })
    }

    /// # Errors
    /// If the file cannot be written.
    pub fn push(&mut self, row: R) -> Result<()> {
        self.waiting.push(row);
        self.rows += 1;
        if self.waiting.len() == BATCH { self.flush() } else { Ok(()) }
    }

    /// Rows pushed so far.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    /// Completes the file, which is not valid before, and returns the number of rows.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn finish(mut self) -> Result<u64> {
        self.flush()?;
        self.inner.close().map_err(|e| unwritable(&self.path, e))?;
        Ok(self.rows)
    }

    fn flush(&mut self) -> Result<()> {
        if self.waiting.is_empty() {
            return Ok(());
        }
        let batch = RecordBatch::try_new(self.schema.clone(), R::arrays(&self.waiting))
            .map_err(|e| Error::internal(format!("{}: {e}", self.path.display())))?;
        self.waiting.clear();
        self.inner.write(&batch).map_err(|e| unwritable(&self.path, e))
    }
}

/// Writes all `rows` into a new file.
///
/// # Errors
/// If the file cannot be written.
pub fn write<R: Row>(path: &Path, rows: impl IntoIterator<Item = R>) -> Result<u64> {
    let mut writer = Writer::create(path)?;
    rows.into_iter().try_for_each(|row| writer.push(row))?;
    writer.finish()
}

/// Reads rows one by one; memory does not grow with their number.
pub struct Reader<R: Row> {
    path: PathBuf,
    batches: Batches,
    /// Index of each row column in a batch; `None` if the file lacks the column.
    order: Vec<Option<usize>>,
    ready: std::vec::IntoIter<R>,
    rows: u64,
    read: u64,
    _row: PhantomData<R>,
}

impl<R: Row> Reader<R> {
    /// Opens a table with exactly R's columns and types, in any order. Nullable columns may be missing.
    ///
    /// # Errors
    /// Names the file and every column that is missing, unexpected or of another type.
    pub fn open(path: &Path) -> Result<Self> {
        Self::with(path, true)
    }

    /// As [`Reader::open`], but ignores additional columns: for files from other programs.
    ///
    /// # Errors
    /// Names the file and the column, with the expected and the found type.
    pub fn open_columns(path: &Path) -> Result<Self> {
        Self::with(path, false)
    }

    fn with(path: &Path, exact: bool) -> Result<Self> {
        let builder = builder(path)?;
        let found = builder.schema().clone();
        let columns = R::columns();
        let mut mismatch = Mismatch::default();
        for column in &columns {
            let expected = type_name(&column.data_type);
            match found.field_with_name(column.name).map(|field| type_name(field.data_type())) {
                Err(_) if column.nullable => {}
                Err(_) => mismatch.missing(column),
                Ok(other) if other != expected => {
                    mismatch.wrong(column.name, &format!("expected {expected}, found {other}"));
                }
                Ok(_) => {}
            }
        }
        if exact {
            let extra = found.fields().iter().filter(|f| columns.iter().all(|c| c.name != f.name()));
            extra.for_each(|field| mismatch.unexpected(field.name()));
        }
        if let Some(message) = mismatch.message(&list(&found), &columns) {
            return Err(Error::user(format!("{}: {message}", path.display())).help(OTHER_COLUMNS));
        }
        let roots: Vec<usize> =
            (0..found.fields().len()).filter(|&i| columns.iter().any(|c| c.name == found.field(i).name())).collect();
        let place = |name: &str| roots.iter().position(|&i| found.field(i).name() == name);
        let order = columns.iter().map(|c| place(c.name)).collect();
        let rows = builder.metadata().file_metadata().num_rows().max(0).unsigned_abs();
        let mask = ProjectionMask::roots(builder.parquet_schema(), roots);
        let batches = Batches::open(path, builder, mask, BATCH)?;
        Ok(Self {
            path: path.to_owned(),
            batches,
            order,
            ready: Vec::new().into_iter(),
            rows,
            read: 0,
            _row: PhantomData,
        })
    }

    /// Number of rows in the whole table.
    pub fn rows(&self) -> u64 {
        self.rows
    }

    fn next_batch(&mut self) -> Option<Result<Vec<R>>> {
        let batch = match self.batches.next()? {
            Ok(batch) => batch,
            Err(e) => return Some(Err(e)),
        };
        let arrays: Vec<ArrayRef> = (self.order.iter().zip(R::columns()))
            .map(|(place, column)| match place {
                Some(i) => batch.column(*i).clone(),
                None => new_null_array(&column.data_type, batch.num_rows()),
            })
            .collect();
        let start = self.read;
        self.read += batch.num_rows() as u64;
        for (column, array) in R::columns().iter().zip(&arrays) {
            if !column.nullable
                && let Some(row) = (0..array.len()).find(|&row| array.is_null(row))
            {
                return Some(Err(Error::user(format!(
                    "{}: column `{}`, row {}: expected {}, found null",
                    self.path.display(),
                    column.name,
                    start + row as u64 + 1,
                    type_name(&column.data_type)
                ))));
            }
        }
        Some(R::rows(&arrays).map_err(|what| {
            Error::user(format!("{}: rows {} to {}: {what}", self.path.display(), start + 1, self.read))
        }))
    }
}

impl<R: Row> Iterator for Reader<R> {
    type Item = Result<R>;

    fn next(&mut self) -> Option<Result<R>> {
        loop {
            if let Some(row) = self.ready.next() {
                return Some(Ok(row));
            }
            match self.next_batch()? {
                Ok(rows) => self.ready = rows.into_iter(),
                Err(e) => return Some(Err(e)),
            }
        }
    }
}

/// Reads all rows of a table into memory.
///
/// # Errors
/// As [`Reader::open`].
pub fn read<R: Row>(path: &Path) -> Result<Vec<R>> {
    Reader::open(path)?.collect()
}

/// Checks that [`Reader::open`] accepts the table and that non-nullable columns hold no nulls; records its rows and
/// schema.
///
/// # Errors
/// Names the file and the column, with the expected and the found type.
pub fn check<R: Row>(path: &Path, facts: &mut Facts) -> Result<()> {
    let reader = Reader::<R>::open(path)?;
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    let schema = R::columns()
        .iter()
        .map(|c| (c.name.to_owned(), format!("{}{}", type_name(&c.data_type), if c.nullable { "?" } else { "" })))
        .collect();
    facts.rows.insert(name.clone(), reader.rows());
    facts.schema.insert(name, schema);
    for row in reader {
        row?;
    }
    Ok(())
}

/// Names and types of the columns of any Parquet file, in order.
///
/// # Errors
/// If it is not a readable Parquet file.
pub fn columns(path: &Path) -> Result<Vec<(String, String)>> {
    Ok(builder(path)?.schema().fields().iter().map(|f| (f.name().clone(), type_name(f.data_type()))).collect())
}

fn list(schema: &Schema) -> String {
    schema
        .fields()
        .iter()
        .map(|f| format!("{} ({})", f.name(), type_name(f.data_type())))
        .collect::<Vec<_>>()
        .join(", ")
}

fn unwritable(path: &Path, e: parquet::errors::ParquetError) -> Error {
    match e {
        // Keeps the kind of an I/O error, so that a full disk is reported as such.
        parquet::errors::ParquetError::External(e) => match e.downcast::<std::io::Error>() {
            Ok(e) => Err::<(), _>(*e).at(path).expect_err("`at` keeps an error an error"),
            Err(e) => Error::environment(format!("{}: {e}", path.display())),
        },
        e => Error::environment(format!("{}: {e}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use parquet::basic::{BrotliLevel, GzipLevel};
    use proptest::prelude::*;

    use super::*;

    crate::words! {
        enum Colour { Red = "red", Blue = "blue" }
    }

    crate::table! {
        struct Thing {
            name: String,
            weight: f64,
            score: Option<f64>,
            count: i64,
            good: bool,
            ids: Vec<u32>,
            maybe_ids: Option<Vec<u32>>,
            scores: Vec<f32>,
            words: Vec<String>,
            colour: Colour,
            colours: Vec<Colour>,
            note: Option<String>,
        }
    }

    fn thing(i: u32) -> Thing {
        Thing {
            name: format!("thing {i}"),
            weight: f64::from(i) / 3.0,
            score: i.is_multiple_of(2).then_some(f64::from(i)),
            count: i64::from(i) - 5,
            good: i.is_multiple_of(3),
            ids: (0..i % 4).collect(),
            maybe_ids: (!i.is_multiple_of(5)).then(|| vec![i]),
            scores: vec![0.5; (i % 2) as usize],
            words: vec![String::new(), "wörter".into()],
            colour: if i.is_multiple_of(2) { Colour::Red } else { Colour::Blue },
            colours: Colour::ALL[..(i % 3) as usize].to_vec(),
            note: None,
        }
    }

    #[test]
    fn what_is_written_is_read_and_equal_rows_give_equal_bytes() {
        let folder = tempfile::tempdir().unwrap();
        let (a, b) = (folder.path().join("a.parquet"), folder.path().join("b.parquet"));
        for path in [&a, &b] {
            assert_eq!(write(path, (0..3000).map(thing)).unwrap(), 3000);
        }
        assert_eq!(read::<Thing>(&a).unwrap(), (0..3000).map(thing).collect::<Vec<_>>());
        assert_eq!(std::fs::read(a).unwrap(), std::fs::read(b).unwrap());
    }

    #[test]
    fn an_empty_table_is_a_table() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.parquet");
        write::<Thing>(&path, []).unwrap();
        let mut facts = Facts::default();
        check::<Thing>(&path, &mut facts).unwrap();
        assert_eq!(facts.rows["t.parquet"], 0);
        assert_eq!(facts.schema["t.parquet"][5], ("ids".to_owned(), "list<u32>".to_owned()));
        assert_eq!(facts.schema["t.parquet"][6], ("maybe_ids".to_owned(), "list<u32>?".to_owned()));
    }

    crate::table! { struct One { a: String, b: i64 } }
    crate::table! { struct Other { a: String, b: f64 } }
    crate::table! { struct Nulls { a: Option<String>, b: i64 } }
    crate::table! { struct More { a: String, b: i64, z: bool } }
    crate::table! { struct Far { id: String, b: f64, z: bool } }
    crate::table! { struct Without { b: i64 } }
    crate::table! { struct Turned { b: i64, a: String } }

    fn fault<R: Row>(path: &Path) -> String {
        check::<R>(path, &mut Facts::default()).unwrap_err().message
    }

    #[test]
    fn a_check_names_file_column_expected_and_found() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.parquet");
        let at = path.display();
        write(&path, [One { a: "x".into(), b: 1 }]).unwrap();
        assert_eq!(fault::<Other>(&path), format!("{at}: column `b`: expected f64, found i64"));
        assert_eq!(fault::<More>(&path), format!("{at}: column `z` (bool) is missing; found a (utf8), b (i64)"));
        let all = "columns `id` (utf8), `z` (bool) are missing; column `b`: expected f64, found i64; \
                   unexpected column `a`; found a (utf8), b (i64); expected id, b, z";
        assert_eq!(fault::<Far>(&path), format!("{at}: {all}"));
        write(&path, [More { a: "x".into(), b: 1, z: true }]).unwrap();
        assert_eq!(fault::<One>(&path), format!("{at}: unexpected column `z`; expected a, b"));
        assert_eq!(Reader::<One>::open_columns(&path).unwrap().next().unwrap().unwrap().b, 1);
        write(&path, [Nulls { a: Some("x".into()), b: 1 }, Nulls { a: None, b: 2 }]).unwrap();
        assert_eq!(fault::<One>(&path), format!("{at}: column `a`, row 2: expected utf8, found null"));
        write(&path, [Without { b: 1 }]).unwrap();
        assert_eq!(fault::<One>(&path), format!("{at}: column `a` (utf8) is missing; found b (i64)"));
        assert_eq!(read::<Nulls>(&path).unwrap(), [Nulls { a: None, b: 1 }]);
        write(&path, [Turned { b: 7, a: "y".into() }]).unwrap();
        assert_eq!(read::<One>(&path).unwrap(), [One { a: "y".into(), b: 7 }]);
        std::fs::write(&path, "a,b\n1,2\n").unwrap();
        assert!(fault::<One>(&path).contains("not a readable Parquet file"));
    }

    #[test]
    fn every_codec_is_read_and_one_that_is_not_is_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.parquet");
        let rows: Vec<One> = (0..2000).map(|b| One { a: format!("text {}", b % 7), b }).collect();
        let write_as = |codec| {
            let properties = WriterProperties::builder().set_compression(codec).build();
            let batch = RecordBatch::try_new(schema::<One>(), One::arrays(&rows)).unwrap();
            let mut writer =
                ArrowWriter::try_new(File::create(&path).unwrap(), schema::<One>(), Some(properties)).unwrap();
            writer.write(&batch).unwrap();
            writer.close().unwrap();
        };
        let codecs = [
            Compression::UNCOMPRESSED,
            Compression::SNAPPY,
            Compression::GZIP(GzipLevel::default()),
            Compression::BROTLI(BrotliLevel::default()),
            Compression::LZ4,
            Compression::LZ4_RAW,
            Compression::ZSTD(ZstdLevel::default()),
        ];
        for codec in codecs {
            write_as(codec);
            assert_eq!(read::<One>(&path).unwrap(), rows, "{codec:?}");
        }
        write_as(Compression::UNCOMPRESSED);
        let bytes = std::fs::read(&path).unwrap();
        // The metadata of column `a`: the end of its path, then its codec in zigzag, here 0.
        let at = 5 + bytes.windows(7).rposition(|at| at == b"\x19\x18\x01a\x15\0\x16").unwrap();
        for (codec, what) in [(3, "column `a` is compressed with LZO, which is not read"), (9, "CompressionCodec 9")] {
            let mut other = bytes.clone();
            other[at] = 2 * codec;
            std::fs::write(&path, other).unwrap();
            let error = read::<One>(&path).unwrap_err();
            assert!(error.message.ends_with(what), "{error}");
            assert!(error.help.is_some_and(|help| help.contains("write it anew with zstd")));
        }
    }

    #[test]
    fn a_word_outside_its_set_is_told() {
        crate::table! { struct Text { colour: String } }
        crate::table! { struct Word { colour: Colour } }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.parquet");
        write(&path, [Text { colour: "green".into() }]).unwrap();
        let message = fault::<Word>(&path);
        assert!(message.ends_with("column `colour`: `green` is none of red, blue"), "{message}");
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(24))]
        #[test]
        fn any_rows_come_back(rows in prop::collection::vec((any::<String>(), any::<i64>()), 0..40)) {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("t.parquet");
            let rows: Vec<One> = rows.into_iter().map(|(a, b)| One { a, b }).collect();
            write(&path, rows.clone()).unwrap();
            prop_assert_eq!(read::<One>(&path).unwrap(), rows);
        }
    }
}
