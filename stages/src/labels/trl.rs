//! Preferences and posts as the JSON lines that TRL's trainers read, and `annotate.human` reads back.

use std::io::Write;
use std::path::Path;

use engine::error::{AtPath, Error, Result};
use serde_json::{Value, json};

use crate::prompt;
use crate::types::{Outcome, Posts, Preferences};

/// The layout of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Layout {
    /// Texts: `{"prompt", "chosen", "rejected"}`, or `{"prompt", "completion"}` for a post and its summary.
    Texts,
    /// The same fields as lists of messages, `[{"role", "content"}]`.
    Messages,
}

impl Layout {
    fn text(self, role: &str, text: &str) -> Value {
        match self {
            Self::Texts => json!(text),
            Self::Messages => json!([{ "role": role, "content": text }]),
        }
    }
}

/// Writes the labelled pairs of a Preferences artifact to `file`; returns their number.
///
/// # Errors
/// The table cannot be read, or the file not written.
pub fn write_preferences(folder: &Path, layout: Layout, file: &Path) -> Result<usize> {
    let rows = Preferences::open(folder)?.filter_map(|row| match row {
        Ok(row) if row.outcome != Outcome::Labelled => None,
        row => Some(row.map(|row| {
            let assistant = |text: &str| layout.text("assistant", text);
            let (chosen, rejected) = (assistant(&row.chosen_text), assistant(&row.rejected_text));
            json!({ "prompt": layout.text("user", &row.prompt), "chosen": chosen, "rejected": rejected })
        })),
    });
    write_lines(file, rows)
}

/// Writes the posts with their summaries to `file`; returns their number.
///
/// # Errors
/// The table cannot be read, or the file not written.
pub fn write_posts(folder: &Path, layout: Layout, file: &Path) -> Result<usize> {
    let rows = Posts::open(folder)?.map(|row| {
        let row = row?;
        let completion = layout.text("assistant", &row.summary);
        Ok(json!({ "prompt": layout.text("user", &prompt::text(&row)), "completion": completion }))
    });
    write_lines(file, rows)
}

/// One JSON object a line.
fn write_lines(file: &Path, rows: impl Iterator<Item = Result<Value>>) -> Result<usize> {
    let mut out = std::io::BufWriter::new(std::fs::File::create(file).at(file)?);
    let mut count = 0;
    for row in rows {
        serde_json::to_writer(&mut out, &row?).map_err(|e| Error::environment(format!("{}: {e}", file.display())))?;
        out.write_all(b"\n").at(file)?;
        count += 1;
    }
    out.flush().at(file)?;
    Ok(count)
}
