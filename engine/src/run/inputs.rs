//! Checks an attempt's input artifacts before and after it runs.

use std::collections::BTreeMap;

use super::node_runner::{AttemptOutcome, Digests, NodeRunner, known_digest};
use crate::error::{Error, Result};
use crate::graph::Instance;
use crate::names::Digest;
use crate::store::Presence;

impl NodeRunner<'_> {
    /// Checks the input artifacts. Damaged ones are quarantined; missing and quarantined ones must be made again.
    pub fn check_inputs(&self, instance: &Instance, digests: &Digests) -> Result<Option<AttemptOutcome>> {
        for (source, digest) in inputs_of(instance, digests)? {
            let name = &self.instance(source).name;
            let message = match self.store.check_before_reading(&digest)? {
                Presence::Intact => continue,
                Presence::Missing if self.fetch_input(source, &digest)? => continue,
                Presence::Missing => {
                    format!("the artifact of input {name} is no longer in the store ({})", digest.short())
                }
                Presence::Damaged { file } => {
                    let quarantined = self.store.quarantine(&digest)?;
                    format!("input {name} was damaged ({file}) and was moved to {}", quarantined.display())
                }
            };
            return Ok(Some(AttemptOutcome::InputDamaged { input: digest, error: Error::environment(message) }));
        }
        Ok(None)
    }

    /// Files in the inputs' folders that do not belong to the artifacts.
    pub fn unlisted_files(&self, instance: &Instance, digests: &Digests) -> Result<Vec<String>> {
        let mut unlisted_files = Vec::new();
        for (_, digest) in inputs_of(instance, digests)? {
            unlisted_files.extend(self.store.unlisted_files(&digest)?);
        }
        Ok(unlisted_files)
    }

    /// Checks after an attempt that the inputs are unchanged; `unlisted_files` are the foreign files found before.
    pub fn changed_input(
        &self,
        instance: &Instance,
        digests: &Digests,
        unlisted_files: &[String],
    ) -> Result<Option<Error>> {
        for (source, digest) in inputs_of(instance, digests)? {
            let name = &self.instance(source).name;
            let what = match self.store.check_before_reading(&digest)? {
                Presence::Missing => format!("input {name} was deleted during the attempt"),
                Presence::Damaged { file } => {
                    self.store.quarantine(&digest)?;
                    format!(
                        "the attempt wrote to its input {name} ({file}); the input was quarantined and will be made again"
                    )
                }
                Presence::Intact => {
                    match self.store.unlisted_files(&digest)?.iter().find(|file| !unlisted_files.contains(file)) {
                        Some(file) => format!("the attempt added a file to its input {name} ({file})"),
                        None => continue,
                    }
                }
            };
            let error = Error::user(what)
                .help("inputs are shared and read-only: copy a file into the output folder before changing it");
            return Ok(Some(error));
        }
        Ok(None)
    }
}

/// The artifacts that an instance reads, without duplicates, each with the instance that produced it.
fn inputs_of(instance: &Instance, digests: &Digests) -> Result<Vec<(usize, Digest)>> {
    let mut inputs = BTreeMap::new();
    for source in instance.inputs.iter().flat_map(|port| &port.from) {
        inputs.insert(known_digest(digests, source.instance)?, source.instance);
    }
    Ok(inputs.into_iter().map(|(digest, source)| (source, digest)).collect())
}
