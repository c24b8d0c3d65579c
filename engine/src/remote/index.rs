//! Names of the entries of `index/`.

use crate::names::{Digest, Key};

/// The key and digest in the name of an index entry; `None` for any other name.
pub(super) fn parse(name: &str) -> Option<(Key, Digest)> {
    let (key, digest) = name.rsplit('/').next()?.split_once('-')?;
    Some((key.parse().ok()?, digest.parse().ok()?))
}

pub(super) fn name(key: &Key, digest: &Digest) -> String {
    format!("index/{key}-{digest}")
}
