//! `annotate.human`: human comparisons from files, the hub or an artifact.

mod filters;
mod formats;
mod labels;
mod sources;
#[cfg(test)]
mod tests;

use std::path::{Path, PathBuf};

use engine::context::Context;
use engine::error::{Error, Result};
use engine::external::InputFiles;
use engine::kind::{Kind, Signature};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::filters::{Filters, Reason, RowFilter};
use self::formats::Format;
use self::labels::{Label, Labels, RecordSelector, Votes};
use crate::hub::{self, HubId};
use crate::labels::{HeldOut, PreferenceWriter};
use crate::source::{empty, files_of, no_rows, one_source};
use crate::text::lines::BadRowLimit;
use crate::types::{Comparisons, Posts, Preferences};

pub struct Human;

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Params {
    /// JSON lines, uncompressed or in gzip or zstd, or Parquet: a path, a list of paths, a folder, or a pattern.
    /// Replaces the input `comparisons`, which is then not read.
    pub files: InputFiles,
    /// For a folder: a pattern that file names must match.
    pub matching: Option<String>,
    /// A data set on the hub, instead of `files` or the input, such as `CarperAI/openai_summarize_comparisons` or
    /// `trl-lib/tldr-preference`; `hub.files` selects among its splits.
    pub hub: Option<HubId>,
    /// `comparisons` (Stiennon et al.'s records) or `preference` (prompt, chosen, rejected). Absent: detected from the
    /// first record of each file.
    pub format: Option<Format>,
    /// Labels to keep. Only Stiennon et al.'s records have the fields used here.
    pub filters: Filters,
    /// How to treat several labels of one pair.
    pub labels: Labels,
    /// Stop after so many preferences.
    pub rows: Option<u64>,
    /// Number of empty or malformed rows to skip and count. One more is an error.
    pub max_bad_rows: u64,
}

impl Default for Params {
    fn default() -> Self {
        Self {
            files: InputFiles::default(),
            matching: None,
            hub: None,
            format: None,
            filters: Filters::default(),
            labels: Labels::Each,
            rows: None,
            max_bad_rows: 0,
        }
    }
}

/// From this number on, choices that all fall on the same position are not chance: the probability is 1 in 2^15.
const ENOUGH: u64 = 16;

impl Kind for Human {
    type Params = Params;

    const NAME: &'static str = "annotate.human";
    const VERSION: u32 = 4;
    const ABOUT: &'static str =
        "takes people's comparisons of summaries as preferences, from an input, `files` or `hub`";

    fn signature(&self, params: &Params) -> Signature {
        let signature = Signature::producing(Preferences::NAME).optional("exclude", &[Posts::NAME]);
        let signature = if params.files.is_empty() && params.hub.is_none() {
            signature.one("comparisons", &[Comparisons::NAME])
        } else {
            signature.optional("comparisons", &[Comparisons::NAME])
        };
        hub::declare(signature, params.hub.as_ref())
    }

    fn check(&self, params: &Params) -> Vec<(String, String)> {
        let mut faults = match (&params.hub, params.files.is_empty()) {
            (None, true) => Vec::new(),
            _ => one_source(&params.files, params.hub.as_ref(), "files"),
        };
        faults.extend(no_rows(params.rows));
        faults.extend(params.filters.check());
        faults
    }

    fn complete(&self, params: &mut Params) {
        params.files.set_matching(params.matching.clone());
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        let files = match ctx.optional("comparisons") {
            Some(input) if params.files.is_empty() && params.hub.is_none() => {
                vec![input.folder.join(Comparisons::FILE)]
            }
            _ => files_of(&params.files, params.hub.as_ref(), ctx)?,
        };
        let limit = params.rows.unwrap_or(u64::MAX);
        let mut judged = PreferenceWriter::create(ctx.out())?;
        let (intake, bad) = match params.labels {
            Labels::Each => read(&files, &params, ctx, |label, _| {
                judged.push(label.row())?;
                Ok(judged.rows() < limit)
            })?,
            Labels::Majority => {
                let mut votes = Votes::default();
                read(&files, &params, ctx, |label, _| {
                    votes.count(&label);
                    Ok(true)
                })?;
                read(&files, &params, ctx, |label, intake| {
                    match votes.row(label) {
                        Some(row) => judged.push(row)?,
                        None => intake.count(Reason::Merged),
                    }
                    Ok(judged.rows() < limit)
                })?
            }
        };
        if intake.read == 0 {
            return Err(empty(&files, "comparison", bad));
        }
        let (names, dropped) = (names(&files), intake.dropped());
        if judged.rows() == 0 {
            return Err(Error::user(format!("{names}: of {} rows none is left: {dropped}", intake.read))
                .help("look at `filters`, and at what port `exclude` holds out"));
        }
        let [first, second] = intake.places;
        if first + second >= ENOUGH && first.min(second) == 0 {
            let always = u64::from(first == 0);
            return Err(Error::user(format!("{names}: one class only: all {} choices are {always}", first + second))
                .help("labels that always point to the same place are no judgements"));
        }
        if intake.articles() > 0 {
            ctx.warn(format!(
                "{} comparisons of news articles were left out: only Reddit posts fit the prompt",
                intake.articles()
            ));
        }
        intake.tell(ctx);
        ctx.metric("bad_rows", bad as f64);
        judged.finish(ctx)
    }
}

/// Passes every label that counts to `take` until `take` returns `false`. Returns the counts of dropped and bad rows.
fn read(
    files: &[PathBuf],
    params: &Params,
    ctx: &mut Context,
    mut take: impl FnMut(Label, &mut RecordSelector) -> Result<bool>,
) -> Result<(RecordSelector, u64)> {
    let mut intake = RecordSelector::new(RowFilter::new(&params.filters)?, HeldOut::of(ctx)?, params.labels);
    let mut allowance = BadRowLimit::new(params.max_bad_rows);
    let mut wanted = true;
    for (done, file) in files.iter().enumerate() {
        if wanted {
            sources::each_record(file, params.format, &mut allowance, |record| {
                wanted = match intake.take(record).map_err(|e| at(file, e))? {
                    Some(label) => take(label, &mut intake)?,
                    None => true,
                };
                Ok(wanted)
            })?;
        }
        ctx.progress(done as u64 + 1, files.len() as u64, "files", Some(("rows", intake.read as f64)));
    }
    Ok((intake, allowance.bad))
}

fn at(file: &Path, mut error: Error) -> Error {
    error.message = format!("{}: {}", file.display(), error.message);
    error
}

fn names(files: &[PathBuf]) -> String {
    files.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(", ")
}
