//! Reads record batches from Parquet files of any origin.
//!
//! The library panics on some damaged files. Such a panic is reported as the file's fault, and the reader is not used
//! afterwards.

use std::fs::File;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};

use arrow::array::RecordBatch;
use engine::error::{AtPath, Error, Result};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::{ArrowReaderOptions, ParquetRecordBatchReader, ParquetRecordBatchReaderBuilder};
use parquet::basic::CompressionCodec;

use super::pages;

pub(super) type Builder = ParquetRecordBatchReaderBuilder<File>;

/// Help for a file with an unsupported codec.
const OTHER_CODEC: &str = "write it anew with zstd, snappy, gzip, brotli or lz4, or uncompressed";

/// A file's batches in order, up to and including the first error.
pub(super) struct Batches {
    path: PathBuf,
    reader: Option<ParquetRecordBatchReader>,
}

impl Batches {
    /// Reads the columns of `mask` in batches of at most `most` rows, or fewer to bound memory.
    pub(super) fn open(path: &Path, builder: Builder, mask: ProjectionMask, most: usize) -> Result<Self> {
        let reader = shielded(path, || {
            let rows = pages::batch_rows(path, builder.metadata(), &mask, most)?;
            builder.with_projection(mask).with_batch_size(rows).build().map_err(|e| unreadable(path, &e))
        })?;
        Ok(Self { path: path.to_owned(), reader: Some(reader) })
    }
}

impl Iterator for Batches {
    type Item = Result<RecordBatch>;

    fn next(&mut self) -> Option<Self::Item> {
        let mut reader = self.reader.take()?;
        let path = &self.path;
        let next = shielded(path, || {
            let batch = reader.next().transpose().map_err(|e| unreadable(path, &e))?;
            for (field, array) in batch.iter().flat_map(|batch| batch.schema_ref().fields().iter().zip(batch.columns()))
            {
                pages::check_texts(path, field.name(), array)?;
            }
            Ok(batch)
        });
        if matches!(next, Ok(Some(_))) {
            self.reader = Some(reader);
        }
        next.transpose()
    }
}

pub(super) fn builder(path: &Path) -> Result<Builder> {
    let file = File::open(path).at(path)?;
    // Parquet's own types: with the Arrow metadata, a text column is utf8 or large_utf8 depending on the program that
    // wrote it.
    let options = ArrowReaderOptions::new().with_skip_arrow_metadata(true);
    let builder = shielded(path, || Builder::try_new_with_options(file, options).map_err(|e| unreadable(path, &e)))?;
    let chunks = builder.metadata().row_groups().iter().flat_map(|group| group.columns());
    match chunks.into_iter().find(|chunk| chunk.compression_codec() == CompressionCodec::LZO) {
        None => Ok(builder),
        Some(chunk) => {
            let column = chunk.column_path().string();
            Err(Error::user(format!("{}: column `{column}` is compressed with LZO, which is not read", path.display()))
                .help(OTHER_CODEC))
        }
    }
}

pub(super) fn unreadable(path: &Path, e: &dyn std::fmt::Display) -> Error {
    let what = e.to_string();
    // A codec that is newer than the library.
    let is_codec = what.contains("CompressionCodec");
    Error::user(format!("{}: not a readable Parquet file: {what}", path.display())).help(if is_codec {
        OTHER_CODEC
    } else {
        "is it whole? fetch or write it again"
    })
}

fn shielded<T>(path: &Path, read: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(read)).unwrap_or_else(|_| Err(unreadable(path, &"it is damaged")))
}
