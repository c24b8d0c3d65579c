//! Reads the `*.index.json` of a model in several files, which maps tensors to files.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use serde::Deserialize;

use super::source::Source;
use super::unique_map::UniqueMap;
use crate::{Error, Result};

/// Size limit for an index, in bytes; one of 100,000 tensors has about 8 MB.
const MAX_BYTES: u64 = 64 << 20;

#[derive(Deserialize)]
struct Index {
    weight_map: UniqueMap<String>,
}

/// The file of each tensor, by tensor name. Errors: a file that is not a plain name, and so could lie anywhere.
pub(super) fn read(path: &Path) -> Result<BTreeMap<String, String>> {
    let bytes = Source::open(path)?.read_text(path, MAX_BYTES)?;
    let index: Index =
        serde_json::from_slice(&bytes).map_err(|e| Error::model(path, format!("not an index of weights: {e}")))?;
    let UniqueMap(files) = index.weight_map;
    for (tensor, file) in &files {
        if !is_plain(file) {
            let message =
                format!("puts tensor `{tensor}` into `{}`, expected a file in its own folder", file.escape_debug());
            return Err(Error::model(path, message));
        }
    }
    Ok(files)
}

/// Whether a name denotes a file directly in the folder.
fn is_plain(name: &str) -> bool {
    let mut components = Path::new(name).components();
    let only = (components.next(), components.next());
    matches!(only, (Some(Component::Normal(part)), None) if part == name) && !name.contains(['\\', '\0'])
}
