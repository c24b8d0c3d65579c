//! Writes the action record of an attempt and checks determinism.

use std::collections::BTreeMap;

use super::node::{News, Work};
use crate::error::{Error, Result};
use crate::external;
use crate::graph::Instance;
use crate::names::Digest;
use crate::store::{ActionRecord, AttemptFolder, Platform, Presence, Provenance, Recorded, Settled, settle};

impl Work<'_> {
    pub fn provenance(
        &self,
        instance: &Instance,
        folder: &AttemptFolder,
        started: f64,
        seconds: f64,
        peak_bytes: u64,
        warnings: Vec<String>,
    ) -> Result<Provenance> {
        let mut paths = BTreeMap::new();
        external::replace(&instance.params, &mut |external| {
            for (path, alone) in external.single() {
                paths.insert(path, self.store.content_of(&alone)?.digest);
            }
            Ok(external.to_value())
        })?;
        Ok(Provenance {
            stage: instance.name.clone(),
            started,
            seconds,
            peak_bytes,
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            platform: Platform::this_cpu(),
            run: self.run.to_owned(),
            attempt: folder.root.file_name().unwrap_or_default().to_string_lossy().into_owned(),
            paths,
            warnings,
        })
    }

    /// Writes the action record and compares it with an earlier record of the same key. Returns the digest that is
    /// valid for this key.
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
