//! Whether what an attempt reads is what it should be, before and after. Starts nothing and records nothing.

use std::collections::BTreeMap;

use super::node::{Digests, Ended, Work};
use crate::error::{Error, Result};
use crate::graph::Instance;
use crate::names::Digest;
use crate::store::Presence;

impl Work<'_> {
    /// Checks what is about to be read. What is rotten is set aside; what is gone or set aside has to be made again.
    pub fn check_inputs(&self, instance: &Instance, digests: &Digests) -> Result<Option<Ended>> {
        for (source, digest) in inputs_of(instance, digests)? {
            let name = &self.instance(source).name;
            let message = match self.store.check_before_reading(&digest)? {
                Presence::Whole => continue,
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

    /// Files that lie in the folders of the inputs and do not belong there.
    pub fn strangers(&self, instance: &Instance, digests: &Digests) -> Result<Vec<String>> {
        let mut strangers = Vec::new();
        for (_, digest) in inputs_of(instance, digests)? {
            strangers.extend(self.store.strangers(&digest)?);
        }
        Ok(strangers)
    }

    /// Whether an input is no longer what was read; `strangers` lay beside them before.
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

/// Each artifact that an instance reads, once, with the instance that made it.
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
