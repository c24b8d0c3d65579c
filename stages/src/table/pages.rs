//! Estimates the memory needed to read a Parquet file from its page headers: its encodings let a kilobyte of file
//! expand to gigabytes.

use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use std::sync::Arc;

use arrow::array::{Array, AsArray};
use arrow::datatypes::DataType;
use engine::error::{AtPath, Error, Result};
use parquet::arrow::ProjectionMask;
use parquet::basic::Type;
use parquet::column::page::{Page, PageReader};
use parquet::file::metadata::{ColumnChunkMetaData, ParquetMetaData};
use parquet::file::serialized_reader::SerializedPageReader;

use super::batches::unreadable;
use crate::text::lines::LONGEST;

/// Maximum bytes of the pages held at once: one data page and one dictionary per column.
const PAGES: u64 = 128 << 20;
/// Maximum bytes of the values in a batch.
const BATCH: u64 = 16 << 20;
/// Maximum elements of all lists of one column in a row group.
const ELEMENTS: u64 = 64 << 20;
/// Dictionaries below this size in bytes are not inspected, since none of their values can be larger.
const SMALL: u64 = 4 << 10;

/// Memory needed by one column, in bytes.
#[derive(Default)]
struct Column {
    dictionary: u64,
    page: u64,
    /// Upper bound for the value of one row.
    row: u64,
}

/// Number of rows, at most `most`, that may be read at once from the columns of `mask`.
///
/// # Errors
/// If even one row exceeds a limit, or a page's header is damaged.
pub(super) fn batch_rows(path: &Path, metadata: &ParquetMetaData, mask: &ProjectionMask, most: usize) -> Result<usize> {
    let file = Arc::new(File::open(path).at(path)?);
    let (mut pages, mut row) = (0_u64, 0_u64);
    for leaf in (0..metadata.file_metadata().schema_descr().num_columns()).filter(|&leaf| mask.leaf_included(leaf)) {
        let mut column = Column::default();
        for group in metadata.row_groups() {
            let rows = group.num_rows().max(1).unsigned_abs();
            survey(path, &file, group.column(leaf), rows, &mut column)?;
        }
        pages = pages.saturating_add(column.dictionary).saturating_add(column.page);
        row = row.saturating_add(column.row);
    }
    if pages > PAGES {
        return Err(Error::user(format!(
            "{}: reading it takes pages of {} MiB at once; at most {} MiB are read",
            path.display(),
            pages.div_ceil(1 << 20),
            PAGES >> 20
        ))
        .help("write it anew with smaller pages or row groups"));
    }
    Ok(usize::try_from(BATCH / row.max(1)).unwrap_or(most).clamp(1, most))
}

/// Adds the memory needed by the pages of one column in one row group.
fn survey(path: &Path, file: &Arc<File>, chunk: &ColumnChunkMetaData, rows: u64, column: &mut Column) -> Result<()> {
    let name = chunk.column_path().string();
    let (start, length) = chunk.byte_range();
    let mut reader = BufReader::with_capacity(1 << 10, &**file);
    let (mut at, mut values, mut dictionary, mut row) = (start, 0, 0, 8);
    while at < start.saturating_add(length) {
        reader.seek(SeekFrom::Start(at)).at(path)?;
        let header = Header::read(&mut reader)
            .map_err(|e| unreadable(path, &format!("column `{name}`: the page at byte {at}: {e}")))?;
        let bytes = header.uncompressed.max(header.compressed);
        // Taken now, because reading the dictionary below moves the shared file offset.
        let next = reader.stream_position().at(path)?.saturating_add(header.compressed);
        if header.is_dictionary {
            column.dictionary = column.dictionary.max(bytes);
            dictionary = bytes;
            if bytes > SMALL && bytes <= PAGES && chunk.column_type() == Type::BYTE_ARRAY {
                if at != start {
                    return Err(unreadable(path, &format!("column `{name}`: the dictionary is not its first page")));
                }
                dictionary = longest_entry(path, file, chunk)?;
                check_length(path, &name, dictionary)?;
            }
        } else {
            column.page = column.page.max(bytes);
            values += header.values;
            row = row.max(match header.encoding {
                DICTIONARY | OLD_DICTIONARY => dictionary,
                // A value may repeat all of the previous value as its prefix.
                PREFIXES => bytes,
                _ => bytes / header.values.max(1),
            });
        }
        at = next;
    }
    let is_list = chunk.column_descr().max_rep_level() > 0;
    if is_list {
        check_elements(path, &name, values)?;
    }
    let elements = if is_list { values.div_ceil(rows) } else { 1 };
    let width = u64::try_from(chunk.column_descr().type_length()).unwrap_or(0);
    column.row = column.row.max(row.max(width).saturating_mul(elements));
    Ok(())
}

fn check_elements(path: &Path, column: &str, elements: u64) -> Result<()> {
    if elements <= ELEMENTS {
        return Ok(());
    }
    Err(Error::user(format!(
        "{}: column `{column}`: lists of {elements} elements in a row group; at most {ELEMENTS} are read",
        path.display()
    ))
    .help("write it anew with smaller row groups"))
}

/// The length in bytes of the longest text in a column's dictionary.
fn longest_entry(path: &Path, file: &Arc<File>, chunk: &ColumnChunkMetaData) -> Result<u64> {
    let page = SerializedPageReader::new(file.clone(), chunk, 0, None).and_then(|mut pages| pages.get_next_page());
    let Some(Page::DictionaryPage { buf, .. }) = page.map_err(|e| unreadable(path, &e))? else { return Ok(0) };
    let (mut rest, mut longest) = (&buf[..], 0);
    while let Some((length, after)) = rest.split_first_chunk() {
        let length = u32::from_le_bytes(*length);
        longest = longest.max(length.into());
        rest = after.get(length as usize..).unwrap_or_default();
    }
    Ok(longest)
}

/// # Errors
/// If a text in the array, which may be nested, exceeds the limit.
pub(super) fn check_texts(path: &Path, column: &str, array: &dyn Array) -> Result<()> {
    match array.data_type() {
        DataType::Utf8 => {
            let longest = array.as_string::<i32>().offsets().lengths().max().unwrap_or(0);
            check_length(path, column, longest as u64)
        }
        DataType::List(_) => check_texts(path, column, array.as_list::<i32>().values()),
        DataType::Struct(_) => array.as_struct().columns().iter().try_for_each(|a| check_texts(path, column, a)),
        _ => Ok(()),
    }
}

fn check_length(path: &Path, column: &str, bytes: u64) -> Result<()> {
    if bytes <= LONGEST {
        return Ok(());
    }
    Err(Error::user(format!(
        "{}: column `{column}`: a text of {bytes} bytes; at most {} MiB are read",
        path.display(),
        LONGEST >> 20
    ))
    .help("leave such rows out"))
}

const DICTIONARY: u64 = 8;
const OLD_DICTIONARY: u64 = 2;
/// DELTA_BYTE_ARRAY.
const PREFIXES: u64 = 7;

/// The fields of a page header that determine memory use: `PageHeader` of parquet.thrift.
#[derive(Default)]
struct Header {
    is_dictionary: bool,
    uncompressed: u64,
    compressed: u64,
    values: u64,
    encoding: u64,
}

impl Header {
    fn read(reader: &mut (impl Read + Seek)) -> std::io::Result<Self> {
        let mut header = Self::default();
        header.fields(reader, &[])?;
        Ok(header)
    }

    /// Reads the fields of a struct in Thrift's compact protocol; `within` holds the field ids of the enclosing
    /// structs.
    fn fields(&mut self, reader: &mut (impl Read + Seek), within: &[u64]) -> std::io::Result<()> {
        let damaged = || std::io::Error::other("its header is damaged");
        let mut id = 0;
        loop {
            let [byte] = bytes(reader)?;
            if byte == 0 {
                return Ok(());
            }
            id = if byte >> 4 == 0 { zigzag(reader)?.ok_or_else(damaged)? } else { id + u64::from(byte >> 4) };
            match byte & 15 {
                // A boolean's value is encoded in its type.
                1 | 2 => {}
                3 => drop(bytes::<1>(reader)?),
                4..=6 => {
                    let value = zigzag(reader)?;
                    let place = match (within, id) {
                        ([], 1) => {
                            self.is_dictionary = value == Some(2);
                            continue;
                        }
                        ([], 2) => &mut self.uncompressed,
                        ([], 3) => &mut self.compressed,
                        ([5 | 8], 1) => &mut self.values,
                        ([5], 2) | ([8], 4) => &mut self.encoding,
                        _ => continue,
                    };
                    *place = value.ok_or_else(damaged)?;
                }
                7 => drop(bytes::<8>(reader)?),
                8 => {
                    let length = i64::try_from(varint(reader)?).map_err(|_| damaged())?;
                    reader.seek(SeekFrom::Current(length))?;
                }
                12 if within.len() < 4 => self.fields(reader, &[within, &[id]].concat())?,
                _ => return Err(damaged()),
            }
        }
    }
}

fn bytes<const N: usize>(reader: &mut impl Read) -> std::io::Result<[u8; N]> {
    let mut bytes = [0; N];
    reader.read_exact(&mut bytes)?;
    Ok(bytes)
}

fn varint(reader: &mut impl Read) -> std::io::Result<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let [byte] = bytes(reader)?;
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    Err(std::io::Error::other("its header is damaged"))
}

/// A zigzag-encoded number; `None` if it is negative.
fn zigzag(reader: &mut impl Read) -> std::io::Result<Option<u64>> {
    let value = varint(reader)?;
    Ok((value & 1 == 0).then_some(value >> 1))
}

#[cfg(test)]
mod tests {
    use arrow::array::{ArrayRef, BooleanArray, DictionaryArray, Int32Array, ListArray, RecordBatch, StringArray};
    use arrow::buffer::OffsetBuffer;
    use arrow::datatypes::{Field, Int32Type};
    use parquet::arrow::arrow_writer::ArrowWriter;
    use parquet::basic::{Compression, Encoding, ZstdLevel};
    use parquet::file::properties::{WriterProperties, WriterPropertiesBuilder};

    use super::*;
    use crate::table::batches::builder;

    fn write(path: &Path, column: ArrayRef, properties: WriterPropertiesBuilder) {
        let properties = properties
            .set_dictionary_page_size_limit(8 << 20)
            .set_compression(Compression::ZSTD(ZstdLevel::default()))
            .build();
        let batch = RecordBatch::try_from_iter([("post", column)]).unwrap();
        let mut writer = ArrowWriter::try_new(File::create(path).unwrap(), batch.schema(), Some(properties)).unwrap();
        writer.write(&batch).unwrap();
        writer.close().unwrap();
    }

    fn repeated(text: &str, rows: usize) -> ArrayRef {
        let keys = Int32Array::from(vec![0; rows]);
        Arc::new(DictionaryArray::<Int32Type>::new(keys, Arc::new(StringArray::from(vec![text]))))
    }

    fn rows(path: &Path) -> Result<usize> {
        batch_rows(path, builder(path)?.metadata(), &ProjectionMask::all(), 1024)
    }

    #[test]
    fn a_batch_holds_as_many_rows_as_its_bytes_allow() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.parquet");
        let megabyte = "x".repeat(1 << 20);
        write(&path, repeated(&megabyte, 200), WriterProperties::builder());
        assert!(std::fs::metadata(&path).unwrap().len() < 4 << 10);
        assert_eq!(rows(&path).unwrap(), 16);
        let read: Vec<usize> = crate::table::json_rows(&path, &["post"])
            .unwrap()
            .take(40)
            .map(|row| row.unwrap()["post"].as_str().unwrap().len())
            .collect();
        assert_eq!(read, [1 << 20; 40]);

        let plain = || WriterProperties::builder().set_dictionary_enabled(false);
        let texts = |n: usize, length: usize| Arc::new(StringArray::from(vec!["y".repeat(length); n])) as ArrayRef;
        write(&path, texts(64, 1 << 20), plain());
        assert_eq!(rows(&path).unwrap(), 15, "with the length before each text");
        write(&path, texts(5000, 1000), plain());
        assert_eq!(rows(&path).unwrap(), 1024);
        write(&path, texts(5000, 1000), plain().set_encoding(Encoding::DELTA_BYTE_ARRAY));
        assert_eq!(rows(&path).unwrap(), 1024, "prefixes of a small page");
    }

    #[test]
    fn what_a_small_file_stands_for_is_refused_before_it_is_decompressed() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.parquet");
        let at = path.display();
        let fault = || {
            let error = crate::table::json_rows(&path, &["post"]).and_then(|rows| rows.collect::<Result<Vec<_>>>());
            let error = error.unwrap_err();
            assert_eq!(error.exit_code(), 2);
            error.message
        };
        let too_long = format!("{at}: column `post`: a text of {} bytes; at most 2 MiB are read", 4 << 20);
        write(&path, repeated(&"z".repeat(4 << 20), 200), WriterProperties::builder());
        assert_eq!(fault(), too_long);
        let plain = WriterProperties::builder().set_dictionary_enabled(false);
        let text = |length: usize| Arc::new(StringArray::from(vec!["z".repeat(length)])) as ArrayRef;
        write(&path, text(4 << 20), plain.clone());
        assert_eq!(fault(), too_long);
        write(&path, text(130 << 20), plain);
        assert_eq!(fault(), format!("{at}: reading it takes pages of 131 MiB at once; at most 128 MiB are read"));
        assert!(std::fs::metadata(&path).unwrap().len() < 64 << 10);
    }

    #[test]
    fn long_lists_make_small_batches_and_longer_ones_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.parquet");
        // A million equal elements take only a few bytes in the file.
        let items = Arc::new(BooleanArray::from(vec![false; 4 << 20]));
        let field = Field::new("element", DataType::Boolean, false);
        let lists = ListArray::new(Arc::new(field), OffsetBuffer::from_lengths([1 << 20; 4]), items, None);
        write(&path, Arc::new(lists), WriterProperties::builder());
        assert_eq!(rows(&path).unwrap(), 2);
        let error = check_elements(&path, "mask", ELEMENTS + 1).unwrap_err();
        assert!(error.message.ends_with("lists of 67108865 elements in a row group; at most 67108864 are read"));
        assert_eq!(error.exit_code(), 2);
    }
}
