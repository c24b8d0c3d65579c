//! Fetches records and artifacts into the local store.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use futures::{StreamExt, stream};

use super::wire::Trouble;
use super::{MAX_MANIFEST, OnProgress, Remote, blob_name};
use crate::artifact::Manifest;
use crate::error::{Error, Result};
use crate::names::{Digest, Key};
use crate::store::{Foreign, Presence, Recorded, Stat, Store, check_manifest};

/// Total size in bytes up to which an artifact is fetched that no stage needs to read: reports show it.
const SMALL: u64 = 32 << 20;

/// An artifact to fetch.
#[derive(Clone, Debug)]
pub struct Wanted {
    pub digest: Digest,
    /// The type that its stage gives.
    pub artifact_type: String,
    /// Whether its bytes are needed; otherwise it is fetched only if it is small.
    pub needed: bool,
}

/// The result of a transfer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Moved {
    pub artifacts: u64,
    pub bytes: u64,
    pub seconds: f64,
    /// Needed artifacts that could not be had; each has a warning, and is refused from now on.
    pub failed: u64,
}

impl Remote {
    /// Fetches the records at these keys, which the index says to have these digests. Returns how many could not be
    /// had; each has a warning, and its key is refused from now on.
    ///
    /// # Errors
    /// When the local disk fails.
    pub fn fetch_records(&self, store: &Store, wanted: &[(Key, Digest)]) -> Result<u64> {
        let fetch = |(key, digest)| async move { (key, self.record_of(&key, &digest).await) };
        let found: Vec<_> = self.block_on(
            stream::iter(wanted.iter().copied()).map(fetch).buffer_unordered(self.wire.limits().parallel).collect(),
        );
        let mut failed = 0;
        for (key, outcome) in found {
            match outcome {
                // Another process may have made another artifact meanwhile; its record stays.
                Ok(foreign) => {
                    failed += u64::from(matches!(store.adopt_record(&foreign)?, Recorded::Differs { .. }));
                }
                Err(Trouble::Here(error)) => return Err(error),
                Err(trouble) => {
                    failed += 1;
                    self.refuse_key(&key, &trouble);
                }
            }
        }
        Ok(failed)
    }

    async fn record_of(&self, key: &Key, digest: &Digest) -> Result<Foreign, Trouble> {
        let asked = self.state().asked.get(key).cloned().flatten();
        let foreign = match asked {
            Some(foreign) => Foreign::clone(&foreign),
            None => self.record(key).await?,
        };
        match foreign.record.digest == *digest {
            true => Ok(foreign),
            false => Err(Trouble::Lies(format!("the index gives it the artifact {}", digest.short()))),
        }
    }

    /// Fetches artifacts: first all manifests, then the blobs that the store lacks.
    ///
    /// # Errors
    /// When the local disk fails or has too little space.
    pub fn fetch_artifacts(&self, store: &Store, wanted: &[Wanted], on_progress: OnProgress) -> Result<Moved> {
        let clock = Instant::now();
        let mut moved = Moved::default();
        let needed: HashMap<Digest, bool> = wanted.iter().fold(HashMap::new(), |mut needed, wanted| {
            *needed.entry(wanted.digest).or_default() |= wanted.needed;
            needed
        });
        let mut fail = |digest: &Digest, trouble: Trouble| match trouble {
            Trouble::Here(error) => Err(error),
            trouble => {
                moved.failed += u64::from(needed.get(digest).is_some_and(|needed| *needed));
                self.refuse(digest, &trouble);
                Ok(())
            }
        };
        let mut manifests = BTreeMap::new();
        for (digest, manifest) in self.manifests(wanted) {
            match manifest {
                Ok(manifest) if needed[&digest] || size_of(&manifest) <= SMALL => {
                    manifests.insert(digest, manifest);
                }
                Ok(_) => {}
                Err(trouble) => fail(&digest, trouble)?,
            }
        }
        let blobs = lacking(store, &manifests)?;
        let total: u64 = blobs.values().fold(0, |sum, bytes| sum.saturating_add(*bytes));
        let free = store.free_bytes()?;
        if total > free {
            return Err(Error::surroundings(format!(
                "{}: {total} bytes to fetch, {free} bytes free",
                store.root().display()
            ))
            .help("free some space, then run again"));
        }
        let arrived = self.blobs(store, &blobs, total, on_progress);
        let mut notes = BTreeMap::new();
        let mut bad: HashMap<Digest, Trouble> = HashMap::new();
        for (blob, outcome) in arrived {
            match outcome {
                Ok(stat) => {
                    moved.bytes += blobs[&blob];
                    notes.insert(blob, stat);
                }
                Err(Trouble::Here(error)) => return Err(error),
                Err(trouble) => {
                    // An upload replaces it.
                    self.state().refused.insert(blob);
                    bad.insert(blob, trouble);
                }
            }
        }
        let mut made = 0;
        for (digest, manifest) in &manifests {
            let trouble = manifest.files.iter().find_map(|(name, entry)| Some((name, bad.get(&entry.digest)?)));
            match trouble {
                Some((name, Trouble::Lies(what))) => {
                    fail(digest, Trouble::Lies(format!("its file {name}: {what}")))?;
                }
                Some((_, trouble)) => fail(digest, trouble.clone())?,
                None => {
                    if let Presence::Rotten { .. } = store.presence(digest)? {
                        store.quarantine(digest)?;
                    }
                    store.adopt_artifact(digest, manifest, &notes)?;
                    made += 1;
                }
            }
        }
        (moved.artifacts, moved.seconds) = (made, clock.elapsed().as_secs_f64());
        Ok(moved)
    }

    fn manifests(&self, wanted: &[Wanted]) -> Vec<(Digest, Result<Manifest, Trouble>)> {
        let types: BTreeMap<Digest, &str> =
            wanted.iter().map(|wanted| (wanted.digest, wanted.artifact_type.as_str())).collect();
        let fetch = |(digest, artifact_type)| async move { (digest, self.manifest(&digest, artifact_type).await) };
        self.block_on(stream::iter(types).map(fetch).buffer_unordered(self.wire.limits().parallel).collect())
    }

    async fn manifest(&self, digest: &Digest, artifact_type: &str) -> Result<Manifest, Trouble> {
        let bytes = self.wire.get(&blob_name(digest), MAX_MANIFEST).await?;
        let manifest = check_manifest(digest, &bytes).map_err(Trouble::Lies)?;
        match manifest.artifact_type == artifact_type {
            true => Ok(manifest),
            false => Err(Trouble::Lies(format!("a `{}` in place of a `{artifact_type}`", manifest.artifact_type))),
        }
    }

    fn blobs(
        &self,
        store: &Store,
        blobs: &BTreeMap<Digest, u64>,
        total: u64,
        on_progress: OnProgress,
    ) -> Vec<(Digest, Result<Stat, Trouble>)> {
        let done = Cell::new(0);
        let on_bytes = |bytes: u64| {
            // A transfer that was begun again counts twice.
            done.set(total.min(done.get() + bytes));
            on_progress(done.get(), total);
        };
        let on_bytes = &on_bytes;
        let fetch = |(digest, bytes): (&Digest, &u64)| {
            let (digest, bytes) = (*digest, *bytes);
            async move { (digest, self.wire.fetch_blob(store, &digest, bytes, on_bytes).await) }
        };
        self.block_on(stream::iter(blobs).map(fetch).buffer_unordered(self.wire.limits().parallel).collect())
    }
}

/// The blobs of these artifacts that the store lacks, with their sizes.
fn lacking(store: &Store, manifests: &BTreeMap<Digest, Manifest>) -> Result<BTreeMap<Digest, u64>> {
    let mut blobs = BTreeMap::new();
    for entry in manifests.values().flat_map(|manifest| manifest.files.values()) {
        // Two manifests that give a blob two sizes: one of them fails when the blob arrives.
        if !blobs.contains_key(&entry.digest) && !store.has_blob(&entry.digest)? {
            blobs.insert(entry.digest, entry.bytes);
        }
    }
    Ok(blobs)
}

fn size_of(manifest: &Manifest) -> u64 {
    manifest.files.values().fold(0, |sum, entry| sum.saturating_add(entry.bytes))
}
