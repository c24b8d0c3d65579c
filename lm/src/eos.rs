//! The token ids that end a text.

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// The ids of the tokens that end a text, at least one. Sampling stops at any of them; the first one ends a written
/// response.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Eos(Vec<u32>);

impl Eos {
    /// `None` if there is no id. Drops duplicates.
    pub fn new(ids: impl IntoIterator<Item = u32>) -> Option<Self> {
        let mut distinct = Vec::new();
        for id in ids {
            if !distinct.contains(&id) {
                distinct.push(id);
            }
        }
        (!distinct.is_empty()).then_some(Self(distinct))
    }

    /// The id to append to a response that has ended.
    pub fn first(&self) -> u32 {
        self.0[0]
    }

    pub fn contains(&self, id: u32) -> bool {
        self.0.contains(&id)
    }

    pub fn ids(&self) -> &[u32] {
        &self.0
    }
}

impl From<u32> for Eos {
    fn from(id: u32) -> Self {
        Self(vec![id])
    }
}

/// Reads the ids in a config file: a number, a list, or null; a negative number, usually -1, means none.
pub(crate) fn deserialize_ids<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u32>, D::Error> {
    #[derive(Deserialize)]
    #[serde(untagged, expecting = "expected a token id, a list of them, or null")]
    enum Ids {
        One(i64),
        Many(Vec<i64>),
    }
    let ids = match Option::<Ids>::deserialize(deserializer)? {
        None => vec![],
        Some(Ids::One(id)) => vec![id],
        Some(Ids::Many(ids)) => ids,
    };
    let id = |id| u32::try_from(id).map_err(|_| serde::de::Error::custom(format!("{id} is not a token id")));
    ids.into_iter().filter(|&id| id >= 0).map(id).collect()
}

/// Writes one id as a number, several as a list, none as null.
pub(crate) fn serialize<S: Serializer>(ids: &[u32], serializer: S) -> Result<S::Ok, S::Error> {
    match ids {
        [] => serializer.serialize_none(),
        [id] => id.serialize(serializer),
        several => several.serialize(serializer),
    }
}

/// The first of [`deserialize_ids`].
pub(crate) fn deserialize_first_id<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<u32>, D::Error> {
    Ok(deserialize_ids(deserializer)?.first().copied())
}
