//! Writes the action record of an attempt and checks determinism.

use std::collections::BTreeMap;

use super::executor::Execution;
use super::node_runner::NodeRunner;
use super::runner_event::RunnerEvent;
use crate::error::{Error, Result};
use crate::external;
use crate::graph::Instance;
use crate::names::Digest;
use crate::store::{ActionRecord, AttemptFolder, Presence, Provenance, RecordResult, Resolution, resolve_conflict};

impl NodeRunner<'_> {
    pub fn provenance(
        &self,
        instance: &Instance,
        folder: &AttemptFolder,
        execution: Execution,
        peak_bytes: u64,
        warnings: Vec<String>,
    ) -> Result<Provenance> {
        let mut paths = BTreeMap::new();
        external::replace(&instance.params, &mut |external| {
            for (path, alone) in external.split() {
                paths.insert(path, self.store.content_of(&alone)?.digest);
            }
            Ok(external.to_value())
        })?;
        let Execution { host, platform, started, seconds, job } = execution;
        Ok(Provenance {
            stage: instance.name.clone(),
            started,
            seconds,
            peak_bytes,
            host,
            platform,
            run: self.run.to_owned(),
            attempt: folder.name(),
            job,
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
        emit: &mut dyn FnMut(RunnerEvent),
    ) -> Result<Digest> {
        let RecordResult::Differs { first } = self.store.record(record)? else { return Ok(record.digest) };
        let first_is_intact = self.store.presence(&first.digest)? == Presence::Intact;
        let (old, new) = (first.digest, record.digest);
        match resolve_conflict(&first, record, instance.signature.deterministic, first_is_intact, forced) {
            Resolution::KeepFirst => {
                let message = format!(
                    "produced {}, but run {} produced {}, which is kept",
                    new.short(),
                    first.provenance.run,
                    old.short()
                );
                emit(RunnerEvent::Warning(message));
                Ok(old)
            }
            Resolution::Replace => {
                self.store.replace(record)?;
                Ok(new)
            }
            Resolution::Bug => {
                let (was, run) = (&first.provenance.attempt, &first.provenance.run);
                let message = format!(
                    "not deterministic: the same recipe produced {new} now and {old} before (attempt {was} of run {run}, same platform)"
                );
                Err(Error::internal(message)
                    .help("`temper show` lists the files of the first artifact; please report this bug"))
            }
        }
    }
}
