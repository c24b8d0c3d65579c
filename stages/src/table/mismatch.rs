//! The columns in which a table differs from its declaration.

use super::Column;
use super::view::type_name;

/// Help for a table with other columns.
pub const OTHER_COLUMNS: &str =
    "was it written for another stage? `temper kinds --type TYPE` lists the columns of an artifact type";

/// All differences, so that one message lists every column to change.
#[derive(Default)]
pub(super) struct Mismatch {
    missing: Vec<String>,
    wrong: Vec<String>,
    unexpected: Vec<String>,
}

impl Mismatch {
    pub fn missing(&mut self, column: &Column) {
        self.missing.push(format!("`{}` ({})", column.name, type_name(&column.data_type)));
    }

    /// A column of another type or with a wrong value: `expected f64, found i64`.
    pub fn wrong(&mut self, name: &str, what: &str) {
        self.wrong.push(format!("column `{name}`: {what}"));
    }

    pub fn unexpected(&mut self, name: &str) {
        self.unexpected.push(format!("`{name}`"));
    }

    /// The message; `None` without differences. `found`: the columns of the file.
    pub fn message(self, found: &str, columns: &[Column]) -> Option<String> {
        let mut parts = Vec::new();
        match &self.missing[..] {
            [] => {}
            [one] => parts.push(format!("column {one} is missing")),
            several => parts.push(format!("columns {} are missing", several.join(", "))),
        }
        parts.extend(self.wrong);
        match &self.unexpected[..] {
            [] => {}
            [one] => parts.push(format!("unexpected column {one}")),
            several => parts.push(format!("unexpected columns {}", several.join(", "))),
        }
        if !self.missing.is_empty() {
            parts.push(format!("found {found}"));
        }
        if !self.unexpected.is_empty() {
            parts.push(format!("expected {}", columns.iter().map(|c| c.name).collect::<Vec<_>>().join(", ")));
        }
        (!parts.is_empty()).then(|| parts.join("; "))
    }
}
