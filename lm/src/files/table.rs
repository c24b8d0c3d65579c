//! A JSON object from tensor names to something, each name once; knows not what the values mean.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, Visitor};

/// The one key that is no tensor, in safetensors headers.
const METADATA: &str = "__metadata__";

/// More than any model has; each takes many times its bytes in the file.
pub(super) const MAX_NAMES: usize = 1 << 17;

/// A map by tensor name. serde's own maps take the last of two equal keys, and two readers then see two models.
#[derive(Debug)]
pub(super) struct Table<T>(pub BTreeMap<String, T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Table<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(Entries(PhantomData))
    }
}

struct Entries<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for Entries<T> {
    type Value = Table<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with an entry for each tensor")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Table<T>, A::Error> {
        let mut entries = BTreeMap::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let value = map.next_value()?;
            if entries.contains_key(&name) {
                return Err(A::Error::custom(format!("tensor `{name}` stands there twice")));
            }
            if entries.len() == MAX_NAMES {
                return Err(A::Error::custom(format!("more than {MAX_NAMES} tensors")));
            }
            entries.insert(name, value);
        }
        Ok(Table(entries))
    }
}
