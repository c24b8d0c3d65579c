//! Detects two instances of one stage with equal keys.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::names::{InstanceName, Key, StageName};

/// Keys seen so far, by stage. The runner has its own set, for keys that become known during the run.
#[derive(Clone, Debug, Default)]
pub struct Twins(HashMap<(StageName, Key), InstanceName>);

impl Twins {
    /// # Errors
    /// When another instance of the same stage has this key (user error). Without this check, five identical ensemble
    /// members would silently have a sigma of 0.
    pub fn insert(&mut self, instance: &InstanceName, key: Key) -> Result<()> {
        match self.0.insert((instance.stage.clone(), key), instance.clone()) {
            Some(twin) if twin != *instance => Err(Error::yours(format!(
                "`{twin}` and `{instance}` have the same recipe, so they would be one and the same artifact"
            ))
            .help("let the matrix variable reach a parameter, an input or the seed of a seeded kind; or drop one of the two")),
            _ => Ok(()),
        }
    }
}
