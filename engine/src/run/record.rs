//! The action record of an attempt, and the watch over determinism. Runs nothing.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde_json::Value;

use super::node::{News, Work};
use crate::error::{Error, Result};
use crate::graph::Instance;
use crate::kind::PATH_KEY;
use crate::names::Digest;
use crate::store::{ActionRecord, AttemptFolder, Platform, Presence, Provenance, Recorded, Settled, settle};

impl Work<'_> {
    pub fn provenance(
        &self,
        instance: &Instance,
        folder: &AttemptFolder,
        started: f64,
        seconds: f64,
        warnings: Vec<String>,
    ) -> Result<Provenance> {
        let mut paths = BTreeMap::new();
        for path in paths_in(&instance.params) {
            paths.insert(path.clone(), self.store.content_of(&path)?);
        }
        Ok(Provenance {
            stage: instance.name.clone(),
            started,
            seconds,
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            platform: Platform::this_cpu(),
            run: self.run.to_owned(),
            attempt: folder.root.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            paths,
            warnings,
        })
    }

    /// Writes the action record and watches over determinism. Returns the digest that counts for this key.
    pub fn record(
        &self,
        instance: &Instance,
        record: &ActionRecord,
        forced: bool,
        tell: &mut dyn FnMut(News),
    ) -> Result<Digest> {
        let Recorded::Differs { first } = self.store.record(record)? else { return Ok(record.digest) };
        let first_is_whole = self.store.presence(&first.digest)? == Presence::Whole;
        let (old, new) = (first.digest, record.digest);
        match settle(&first, record, instance.signature.deterministic, first_is_whole, forced) {
            Settled::First => {
                let message = format!(
                    "gave {} where run {} gave {}, which stays",
                    new.short(),
                    first.provenance.run,
                    old.short()
                );
                tell(News::Warning(message));
                Ok(old)
            }
            Settled::Second => {
                self.store.replace(record)?;
                Ok(new)
            }
            Settled::Bug => {
                let (was, run) = (&first.provenance.attempt, &first.provenance.run);
                let message = format!(
                    "not deterministic: the same recipe gave {new} now and {old} before (attempt {was} of run {run}, same platform)"
                );
                Err(Error::ours(message).help("`temper show` gives the files of the first; please report this"))
            }
        }
    }
}

/// Every path parameter.
fn paths_in(params: &Value) -> Vec<PathBuf> {
    match params {
        Value::Object(fields) if fields.len() == 1 && fields.contains_key(PATH_KEY) => {
            fields[PATH_KEY].as_str().map(PathBuf::from).into_iter().collect()
        }
        Value::Object(fields) => fields.values().flat_map(paths_in).collect(),
        Value::Array(items) => items.iter().flat_map(paths_in).collect(),
        _ => Vec::new(),
    }
}
