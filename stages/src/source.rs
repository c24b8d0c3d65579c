//! Where a stage's external rows come from: local files, or a data set on a hub.

use std::path::PathBuf;

use engine::context::Context;
use engine::error::{Error, Result};
use engine::external::InputFiles;

use crate::hub::{Hub, HubId, Repo};
use crate::text::lines;

/// A fault if the row limit is zero.
pub fn no_rows(rows: Option<u64>) -> Option<(String, String)> {
    (rows == Some(0)).then(|| ("rows".to_owned(), "must be at least 1".to_owned()))
}

/// The error for files without any valid row.
pub fn empty(files: &[PathBuf], what: &str, bad: u64) -> Error {
    let names = files.iter().map(|f| f.display().to_string()).collect::<Vec<_>>().join(", ");
    match bad {
        0 if files.len() == 1 => Error::user(format!("{names}: holds no row")),
        0 => Error::user(format!("{names}: hold no row")),
        bad => Error::user(format!("{names}: no {what} in {bad} bad rows")),
    }
}

/// A fault unless exactly one of `hub` and the path parameter `name` is given.
pub fn one_source(files: &InputFiles, hub: Option<&HubId>, name: &str) -> Vec<(String, String)> {
    match (files.is_empty(), hub) {
        (true, None) => vec![(name.to_owned(), format!("give `{name}` or `hub`"))],
        (false, Some(_)) => vec![("hub".to_owned(), format!("give `{name}` or `hub`, not both"))],
        _ => Vec::new(),
    }
}

/// The input files, local or downloaded from the hub. Downloads are kept for the next attempt.
pub fn files_of(files: &InputFiles, id: Option<&HubId>, ctx: &mut Context) -> Result<Vec<PathBuf>> {
    let Some(id) = id else { return Ok(files.files()?.to_vec()) };
    let pattern = id
        .files
        .as_deref()
        .map(glob::Pattern::new)
        .transpose()
        .map_err(|e| Error::user(format!("`hub.files`: {e}")))?;
    let hub = Hub::open(Repo::Dataset, id, ctx)?;
    let is_wanted = |name: &String| pattern.as_ref().map_or_else(|| lines::readable(name), |p| p.matches(name));
    let wanted: Vec<String> = hub.files().iter().filter(|name| is_wanted(name)).cloned().collect();
    if wanted.is_empty() {
        return Err(
            Error::user(format!("hub `{}`: no Parquet or JSON-lines file", id.id)).help("say which with `hub.files`")
        );
    }
    hub.fetch_all(&wanted, ctx)
}
