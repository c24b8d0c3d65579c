//! The Comparisons artifact: labelled pairs of summaries as JSON lines in Stiennon et al.'s schema (2020, "Learning to
//! summarize from human feedback": `info`, `summaries[2]`, `choice`, `worker`, `batch`, `split`, `extra.confidence`).

use std::fs::File;
use std::io::Write;
use std::path::Path;

use engine::artifact::{ArtifactType, Facts, FileSpec};
use engine::error::{AtPath, Error, Result};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::folder;
use crate::text::lines::Lines;

/// One line: two summaries of a post and the index of the one that a person preferred.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Comparison {
    pub info: Info,
    pub summaries: Vec<Summary>,
    /// Index of the preferred summary: 0 or 1.
    pub choice: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub batch: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub split: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub extra: Option<Extra>,
}

/// The post. Records from CNN/DailyMail have `article` instead of `post`.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Info {
    pub id: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub post: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub title: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subreddit: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub article: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    pub text: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Extra {
    /// From 1 to 9.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub confidence: Option<f64>,
}

impl Comparison {
    /// # Errors
    /// Names what the line is instead, if it can be recognised: an axis rating, a plain post.
    pub fn parse(line: &str) -> Result<Self, String> {
        let value: Value = serde_json::from_str(line).map_err(|e| crate::text::lines::json_fault(&e))?;
        Self::of(value)
    }

    /// Like [`Comparison::parse`], for a line that is already parsed as JSON.
    ///
    /// # Errors
    /// As [`Comparison::parse`].
    pub fn of(value: Value) -> Result<Self, String> {
        if !value.is_object() {
            return Err(crate::text::lines::NO_OBJECT.to_owned());
        }
        // Serde would accept a list as a struct's fields in order.
        let parts = ["info", "extra", "summaries"].into_iter().filter_map(|name| Some((name, value.get(name)?)));
        for (name, part) in parts {
            let list = if name == "summaries" {
                part.as_array().is_some_and(|all| all.iter().any(Value::is_array))
            } else {
                part.is_array()
            };
            if list {
                return Err(format!("not a comparison: `{name}` holds a list, expected an object"));
            }
        }
        if value.get("summaries").is_none() && value.pointer("/summary/axes").is_some() {
            return Err("this is an axis rating of one summary, not a comparison of two: \
                        take the files below `comparisons/`, not those below `axis_evals/`"
                .to_owned());
        }
        let comparison: Self = serde_json::from_value(value).map_err(|e| format!("not a comparison: {e}"))?;
        match (comparison.summaries.len(), comparison.choice) {
            (2, 0 | 1) => Ok(comparison),
            (2, choice) => Err(format!("`choice` is {choice}, expected 0 or 1")),
            (n, _) => Err(format!("`summaries` holds {n}, expected 2")),
        }
    }
}

/// The artifact type: `comparisons.jsonl`.
pub struct Comparisons;

impl Comparisons {
    pub const NAME: &'static str = "Comparisons";
    pub const FILE: &'static str = "comparisons.jsonl";

    /// # Errors
    /// If the file is missing. Each item's error names file and line.
    pub fn open(folder: &Path) -> Result<impl Iterator<Item = Result<Comparison>> + use<>> {
        let path = folder::file(folder, Self::FILE)?;
        let lines = Lines::open(&path)?;
        Ok(lines.map(move |line| {
            let (number, line) = line?;
            let parsed = line.and_then(|line| Comparison::parse(&line));
            parsed.map_err(|what| Error::user(format!("{}, line {number}: {what}", path.display())))
        }))
    }

    /// # Errors
    /// If the file cannot be written.
    pub fn write(folder: &Path, rows: impl IntoIterator<Item = Comparison>) -> Result<u64> {
        let path = folder.join(Self::FILE);
        let mut file = std::io::BufWriter::new(File::create(&path).at(&path)?);
        let mut n = 0;
        for row in rows {
            let mut line = serde_json::to_vec(&row).map_err(|e| Error::internal(format!("{}: {e}", path.display())))?;
            line.push(b'\n');
            file.write_all(&line).at(&path)?;
            n += 1;
        }
        file.flush().at(&path)?;
        Ok(n)
    }
}

impl ArtifactType for Comparisons {
    fn name(&self) -> &'static str {
        Self::NAME
    }

    fn about(&self) -> &'static str {
        "labelled comparisons of summaries in Stiennon et al.'s schema"
    }

    fn files(&self) -> Vec<FileSpec> {
        let about = "one comparison per line: `info` (`id`, `post` or `article`, `title`, `subreddit`), `summaries` (two of \
                     `text`, `policy`, `note`), `choice` (0 or 1: the preferred summary), and if known `worker`, `batch`, \
                     `split`, `extra.confidence` (1 to 9)";
        vec![FileSpec::new(Self::FILE, about)]
    }

    fn check(&self, folder: &Path) -> Result<Facts> {
        let mut facts = Facts::default();
        let mut rows = 0;
        for comparison in Self::open(folder)? {
            comparison?;
            rows += 1;
        }
        facts.rows.insert(Self::FILE.to_owned(), rows);
        folder::metrics(folder, &mut facts)?;
        Ok(facts)
    }

    fn preview(&self, folder: &Path, rows: usize) -> Result<String> {
        let mut text = String::new();
        for (i, row) in Self::open(folder)?.take(rows).enumerate() {
            let row = row?;
            let post = row.info.post.or(row.info.article).unwrap_or_default();
            text += &format!("row {}\n  post      {}\n", i + 1, crate::table::cut(&post, 160));
            for (side, summary) in row.summaries.iter().enumerate() {
                let mark = if side == row.choice { "chosen  " } else { "rejected" };
                text += &format!("  {mark}  {}\n", crate::table::cut(&summary.text, 160));
            }
        }
        Ok(text)
    }
}
