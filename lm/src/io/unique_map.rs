//! A JSON object with tensor names as keys, each name once.

use std::collections::BTreeMap;
use std::fmt;
use std::marker::PhantomData;

use serde::de::{Deserialize, Deserializer, Error, IgnoredAny, MapAccess, Visitor};

/// The only key that is not a tensor, in safetensors headers.
const METADATA: &str = "__metadata__";

/// More than any model has. A limit, because each entry takes many times its bytes in the file.
pub(super) const MAX_NAMES: usize = 1 << 17;

/// A map by tensor name that rejects duplicates. serde's own maps keep the last of two equal keys, so two readers could
/// see two different models.
#[derive(Debug)]
pub(super) struct UniqueMap<T>(pub BTreeMap<String, T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for UniqueMap<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(UniqueMapVisitor(PhantomData))
    }
}

struct UniqueMapVisitor<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for UniqueMapVisitor<T> {
    type Value = UniqueMap<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object with an entry for each tensor")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<UniqueMap<T>, A::Error> {
        let mut entries = BTreeMap::new();
        while let Some(name) = map.next_key::<String>()? {
            if name == METADATA {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let value = map.next_value()?;
            if entries.contains_key(&name) {
                return Err(A::Error::custom(format!("tensor `{name}` is listed twice")));
            }
            if entries.len() == MAX_NAMES {
                return Err(A::Error::custom(format!("more than {MAX_NAMES} tensors")));
            }
            entries.insert(name, value);
        }
        Ok(UniqueMap(entries))
    }
}
