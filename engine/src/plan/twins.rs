//! Finds two instances of one stage with equal keys. Knows no recipes.

use std::collections::HashMap;

use crate::error::{Error, Result};
use crate::names::{InstanceName, Key, StageName};

/// The keys seen, by stage. The runner keeps one of its own for the keys that become known while it runs.
#[derive(Clone, Debug, Default)]
pub struct Twins(HashMap<(StageName, Key), InstanceName>);

impl Twins {
    /// # Errors
    /// When another instance of the same stage has this key (yours): five identical ensemble members would be a silent
    /// sigma of 0.
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
