//! Tables as JSON lines, for programs without a Parquet library.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use engine::artifact::{ArtifactType, FileSpec};
use engine::error::{AtPath, Error, Result};

use crate::table::{self, JsonRow, OTHER_COLUMNS, Row, Writer};
use crate::text::lines::{self as text_lines, Lines};

/// Describes the file `name` of an artifact, a table of `R`.
pub fn table<R: Row>(name: &'static str) -> FileSpec {
    FileSpec { from_json_lines: Some(read::<R>), ..table::spec::<R>(name) }
}

fn read<R: Row>(lines: &Path, table: &Path) -> Result<u64> {
    let mut writer = Writer::<R>::create(table)?;
    for line in Lines::open(lines)? {
        let (number, line) = line?;
        let fault = |what| Error::user(format!("{}, line {number}: {what}", lines.display()));
        let row = line.and_then(|line| text_lines::object(&line)).map_err(fault)?;
        writer.push(R::from_json(JsonRow::new(row)).map_err(|what| fault(what).help(OTHER_COLUMNS))?)?;
    }
    writer.finish()
}

/// Fills the new folder `to` with links to the files of `folder`, and with JSON lines in place of Parquet tables.
///
/// # Errors
/// As [`write`].
pub fn view(folder: &Path, to: &Path) -> Result<()> {
    std::fs::create_dir_all(to).at(to)?;
    for entry in std::fs::read_dir(folder).at(folder)? {
        let path = entry.at(folder)?.path();
        let lines = path.with_extension("jsonl");
        let name = |path: &Path| to.join(path.file_name().unwrap_or_default());
        if path.extension().is_some_and(|end| end == "parquet") && path.is_file() && !lines.exists() {
            write(&path, &name(&lines))?;
        } else {
            std::os::unix::fs::symlink(&path, name(&path)).at(&path)?;
        }
    }
    Ok(())
}

/// Writes the rows of the Parquet file `table` as JSON lines to the new file `lines`; nulls are written.
///
/// # Errors
/// If `table` cannot be read or holds bytes that are not text, or if `lines` cannot be written.
pub fn write(table: &Path, lines: &Path) -> Result<()> {
    let columns = table::columns(table)?;
    let names: Vec<&str> = columns.iter().map(|(name, _)| name.as_str()).collect();
    let mut file = BufWriter::new(File::create_new(lines).at(lines)?);
    for row in table::json_rows(table, &names)? {
        writeln!(file, "{}", row?).at(lines)?;
    }
    file.flush().at(lines)
}

/// Replaces each JSON-lines file in `folder` that stands in for a required table of `artifact_type` by that table:
/// `preferences.jsonl` by `preferences.parquet`. Leaves it if the table is there too.
///
/// # Errors
/// Names the first line that is not a row, with every fault of that line.
pub fn convert(folder: &Path, artifact_type: &dyn ArtifactType) -> Result<()> {
    // Beside an optional table, a file of that name has always been a file of its own.
    for spec in artifact_type.files().iter().filter(|spec| !spec.optional) {
        let Some(from_json_lines) = spec.from_json_lines else { continue };
        let table = folder.join(spec.name);
        let lines = table.with_extension("jsonl");
        let is_file = |path: &Path| std::fs::symlink_metadata(path).is_ok_and(|metadata| metadata.is_file());
        if is_file(&lines) && !table.exists() {
            from_json_lines(&lines, &table)?;
            std::fs::remove_file(&lines).at(&lines)?;
        }
    }
    Ok(())
}
