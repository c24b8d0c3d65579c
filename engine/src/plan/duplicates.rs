//! Detects two instances of one stage with equal keys.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::names::{InstanceName, Key, StageName};

/// Keys seen so far, by stage. The runner has its own set, for keys that become known during the run.
#[derive(Clone, Debug, Default)]
pub struct DuplicateCheck(HashMap<(StageName, Key), InstanceName>);

impl DuplicateCheck {
    /// # Errors
    /// When another instance of the same stage has this key (user error). Without this check, five identical ensemble
    /// members would silently have a sigma of 0.
    pub fn insert(&mut self, instance: &InstanceName, key: Key) -> Result<()> {
        match self.0.insert((instance.stage.clone(), key), instance.clone()) {
            Some(other) if other != *instance => Err(Error::user(format!(
                "`{other}` and `{instance}` have the same recipe and would give the same artifact"
            ))
            .help("use the matrix variable in a parameter, an input or a used seed, or remove one of the two")),
            _ => Ok(()),
        }
    }
}
