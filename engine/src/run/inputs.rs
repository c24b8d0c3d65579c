//! Checks an attempt's input artifacts before and after it runs.

use std::collections::BTreeMap;

use super::node::{Digests, Ended, Work};
use crate::error::{Error, Result};
use crate::graph::Instance;
use crate::names::Digest;
use crate::store::Presence;

impl Work<'_> {
    /// Checks the input artifacts. Damaged ones are quarantined; missing and quarantined ones must be made again.
    pub fn check_inputs(&self, instance: &Instance, digests: &Digests) -> Result<Option<Ended>> {
        for (source, digest) in inputs_of(instance, digests)? {
            let name = &self.instance(source).name;
            let message = match self.store.check_before_reading(&digest)? {
                Presence::Whole => continue,
                Presence::Missing if self.fetch_input(source, &digest)? => continue,
                Presence::Missing => {
                    format!("the artifact of its input {name} is gone from the store ({})", digest.short())
                }
                Presence::Rotten { file } => {
                    let aside = self.store.quarantine(&digest)?;
                    format!("its input {name} was damaged ({file}) and has been quarantined in {}", aside.display())
                }
            };
            return Ok(Some(Ended::Damaged { input: digest, error: Error::surroundings(message) }));
        }
        Ok(None)
    }

    /// Files in the inputs' folders that do not belong to the artifacts.
    pub fn strangers(&self, instance: &Instance, digests: &Digests) -> Result<Vec<String>> {
        let mut strangers = Vec::new();
        for (_, digest) in inputs_of(instance, digests)? {
            strangers.extend(self.store.strangers(&digest)?);
        }
        Ok(strangers)
    }

    /// Checks after an attempt that the inputs are unchanged; `strangers` are the foreign files found before.
    pub fn changed_input(&self, instance: &Instance, digests: &Digests, strangers: &[String]) -> Result<Option<Error>> {
        for (source, digest) in inputs_of(instance, digests)? {
            let name = &self.instance(source).name;
            let what = match self.store.check_before_reading(&digest)? {
                Presence::Missing => format!("its input {name} vanished while it ran"),
                Presence::Rotten { file } => {
                    self.store.quarantine(&digest)?;
                    format!("it wrote to its input {name} ({file}), which is quarantined now and will be made again")
                }
                Presence::Whole => match self.store.strangers(&digest)?.iter().find(|file| !strangers.contains(file)) {
                    Some(file) => format!("it wrote a file into its input {name} ({file})"),
                    None => continue,
                },
            };
            let error = Error::yours(what)
                .help("inputs are shared and read-only: copy what must be changed into the output folder");
            return Ok(Some(error));
        }
        Ok(None)
    }
}

/// The artifacts that an instance reads, without duplicates, each with the instance that produced it.
fn inputs_of(instance: &Instance, digests: &Digests) -> Result<Vec<(usize, Digest)>> {
    let mut inputs = BTreeMap::new();
    for source in instance.inputs.iter().flat_map(|port| &port.from) {
        inputs.insert(known(digests, source.instance)?, source.instance);
    }
    Ok(inputs.into_iter().map(|(digest, source)| (source, digest)).collect())
}

pub(super) fn known(digests: &Digests, instance: usize) -> Result<Digest> {
    digests[instance].ok_or_else(|| Error::ours("an attempt whose input is not known"))
}
