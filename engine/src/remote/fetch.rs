//! Fetches records and artifacts into the local store.

use std::cell::Cell;
use std::collections::{BTreeMap, HashMap};
use std::time::Instant;

use futures::{StreamExt, stream};

use super::client::RemoteError;
use super::{MAX_MANIFEST, OnProgress, Remote, blob_name};
use crate::artifact::Manifest;
use crate::error::{Error, Result};
use crate::names::{Digest, Key};
use crate::store::{Presence, RecordFile, RecordResult, Stat, Store, check_manifest};

/// Maximum total size in bytes of an artifact that is fetched for reports, although no stage reads it.
const MAX_OPTIONAL_BYTES: u64 = 32 << 20;

/// An artifact to fetch.
#[derive(Clone, Debug)]
pub struct ArtifactRequest {
    pub digest: Digest,
    /// The output type of its stage.
    pub artifact_type: String,
    /// Whether its bytes are needed; otherwise it is fetched only if it is small.
    pub needed: bool,
}

/// The result of a transfer.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct FetchSummary {
    pub artifacts: u64,
    pub bytes: u64,
    pub seconds: f64,
    /// Needed artifacts that could not be fetched; each has a warning, and is refused from now on.
    pub failed: u64,
}

impl Remote {
    /// Fetches the records at these keys, which have these digests by the index. Returns how many could not be
    /// fetched; each has a warning, and its key is refused from now on.
    ///
    /// # Errors
    /// When the local disk fails.
    pub fn fetch_records(&self, store: &Store, records: &[(Key, Digest)]) -> Result<u64> {
        let fetch = |(key, digest)| async move { (key, self.record_of(&key, &digest).await) };
        let found: Vec<_> = self.block_on(
            stream::iter(records.iter().copied()).map(fetch).buffer_unordered(self.client.limits().parallel).collect(),
        );
        let mut failed = 0;
        for (key, outcome) in found {
            match outcome {
                // Another process may have recorded another artifact meanwhile; its record stays.
                Ok(file) => {
                    failed += u64::from(matches!(store.adopt_record(&file)?, RecordResult::Differs { .. }));
                }
                Err(RemoteError::Local(error)) => return Err(error),
                Err(error) => {
                    failed += 1;
                    self.refuse_key(&key, &error);
                }
            }
        }
        Ok(failed)
    }

    async fn record_of(&self, key: &Key, digest: &Digest) -> Result<RecordFile, RemoteError> {
        let looked_up = self.state().looked_up.get(key).cloned().flatten();
        let file = match looked_up {
            Some(file) => RecordFile::clone(&file),
            None => self.record(key).await?,
        };
        match file.record.digest == *digest {
            true => Ok(file),
            false => Err(RemoteError::Invalid(format!("the index names the artifact {}", digest.short()))),
        }
    }

    /// Fetches artifacts: first all manifests, then the blobs that the store lacks.
    ///
    /// # Errors
    /// When the local disk fails or has too little space.
    pub fn fetch_artifacts(
        &self,
        store: &Store,
        requests: &[ArtifactRequest],
        on_progress: OnProgress,
    ) -> Result<FetchSummary> {
        let clock = Instant::now();
        // Blobs that are here already must stay until they are linked into the artifacts.
        let _guard = store.hold_off_collection()?;
        let mut summary = FetchSummary::default();
        let needed: HashMap<Digest, bool> = requests.iter().fold(HashMap::new(), |mut needed, request| {
            *needed.entry(request.digest).or_default() |= request.needed;
            needed
        });
        let mut fail = |digest: &Digest, error: RemoteError| match error {
            RemoteError::Local(error) => Err(error),
            error => {
                summary.failed += u64::from(needed.get(digest).is_some_and(|needed| *needed));
                self.refuse(digest, &error);
                Ok(())
            }
        };
        let mut manifests = BTreeMap::new();
        for (digest, manifest) in self.manifests(requests) {
            match manifest {
                Ok(manifest) if needed[&digest] || size_of(&manifest) <= MAX_OPTIONAL_BYTES => {
                    manifests.insert(digest, manifest);
                }
                Ok(_) => {}
                Err(error) => fail(&digest, error)?,
            }
        }
        let blobs = missing_blobs(store, &manifests)?;
        let total: u64 = blobs.values().fold(0, |sum, bytes| sum.saturating_add(*bytes));
        let free = store.free_bytes()?;
        if total > free {
            return Err(Error::environment(format!(
                "{}: {total} bytes to fetch, {free} bytes free",
                store.root().display()
            ))
            .help("free some space, then run again"));
        }
        let received = self.blobs(store, &blobs, total, on_progress);
        let mut stats = BTreeMap::new();
        let mut bad: HashMap<Digest, RemoteError> = HashMap::new();
        for (blob, outcome) in received {
            match outcome {
                Ok(stat) => {
                    summary.bytes += blobs[&blob];
                    stats.insert(blob, stat);
                }
                Err(RemoteError::Local(error)) => return Err(error),
                Err(error) => {
                    // The next upload replaces it.
                    self.state().refused.insert(blob);
                    bad.insert(blob, error);
                }
            }
        }
        let mut made = 0;
        for (digest, manifest) in &manifests {
            let error = manifest.files.iter().find_map(|(name, entry)| Some((name, bad.get(&entry.digest)?)));
            match error {
                Some((name, RemoteError::Invalid(what))) => {
                    fail(digest, RemoteError::Invalid(format!("its file {name}: {what}")))?;
                }
                Some((_, error)) => fail(digest, error.clone())?,
                None => {
                    if let Presence::Damaged { .. } = store.presence(digest)? {
                        store.quarantine(digest)?;
                    }
                    store.adopt_artifact(digest, manifest, &stats)?;
                    made += 1;
                }
            }
        }
        (summary.artifacts, summary.seconds) = (made, clock.elapsed().as_secs_f64());
        Ok(summary)
    }

    fn manifests(&self, requests: &[ArtifactRequest]) -> Vec<(Digest, Result<Manifest, RemoteError>)> {
        let types: BTreeMap<Digest, &str> =
            requests.iter().map(|request| (request.digest, request.artifact_type.as_str())).collect();
        let fetch = |(digest, artifact_type)| async move { (digest, self.manifest(&digest, artifact_type).await) };
        self.block_on(stream::iter(types).map(fetch).buffer_unordered(self.client.limits().parallel).collect())
    }

    async fn manifest(&self, digest: &Digest, artifact_type: &str) -> Result<Manifest, RemoteError> {
        let bytes = self.client.get(&blob_name(digest), MAX_MANIFEST).await?;
        let manifest = check_manifest(digest, &bytes).map_err(RemoteError::Invalid)?;
        match manifest.artifact_type == artifact_type {
            true => Ok(manifest),
            false => {
                Err(RemoteError::Invalid(format!("a `{}` instead of a `{artifact_type}`", manifest.artifact_type)))
            }
        }
    }

    fn blobs(
        &self,
        store: &Store,
        blobs: &BTreeMap<Digest, u64>,
        total: u64,
        on_progress: OnProgress,
    ) -> Vec<(Digest, Result<Stat, RemoteError>)> {
        let done = Cell::new(0);
        let on_bytes = |bytes: u64| {
            // A restarted transfer counts twice.
            done.set(total.min(done.get() + bytes));
            on_progress(done.get(), total);
        };
        let on_bytes = &on_bytes;
        let fetch = |(digest, bytes): (&Digest, &u64)| {
            let (digest, bytes) = (*digest, *bytes);
            async move { (digest, self.client.fetch_blob(store, &digest, bytes, on_bytes).await) }
        };
        self.block_on(stream::iter(blobs).map(fetch).buffer_unordered(self.client.limits().parallel).collect())
    }
}

/// The blobs of these artifacts that the store lacks, with their sizes.
fn missing_blobs(store: &Store, manifests: &BTreeMap<Digest, Manifest>) -> Result<BTreeMap<Digest, u64>> {
    let mut blobs = BTreeMap::new();
    for entry in manifests.values().flat_map(|manifest| manifest.files.values()) {
        // If two manifests give a blob different sizes, one of them fails when the blob is received.
        if !blobs.contains_key(&entry.digest) && !store.has_blob(&entry.digest)? {
            blobs.insert(entry.digest, entry.bytes);
        }
    }
    Ok(blobs)
}

fn size_of(manifest: &Manifest) -> u64 {
    manifest.files.values().fold(0, |sum, entry| sum.saturating_add(entry.bytes))
}
