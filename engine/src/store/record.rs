//! Action records: the digest that a key produced, how and when.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Store, files};
use crate::disk;
use crate::error::{AtPath, Error, Result};
use crate::names::{Digest, InstanceName, Key};
use crate::plan::Recipe;

/// The result of running a recipe. A stage is done if and only if its record exists.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ActionRecord {
    pub key: Key,
    /// The artifact's digest.
    pub digest: Digest,
    pub recipe: Recipe,
    pub provenance: Provenance,
}

/// How an artifact was made. Never part of a key or an artifact.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Provenance {
    /// The instance that produced it.
    pub stage: InstanceName,
    /// Seconds since 1970.
    pub started: f64,
    /// Wall time of the attempt.
    pub seconds: f64,
    /// Peak resident memory of the attempt; 0 in records of older versions.
    #[serde(default)]
    pub peak_bytes: u64,
    pub host: String,
    pub platform: Platform,
    /// The run's id.
    pub run: String,
    /// The name of the attempt's folder.
    pub attempt: String,
    /// The job of a batch system that ran the attempt; `None`: a child process.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub job: Option<JobName>,
    /// The files and folders outside the store whose content is in the recipe.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub paths: BTreeMap<PathBuf, Digest>,
    /// Warnings of the attempt.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// A job of a batch system.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct JobName {
    pub executor: String,
    /// The batch system's id of the job.
    pub id: String,
}

/// What an artifact's bytes may depend on besides the recipe.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Platform {
    /// Processor family and operating system, such as `x86_64-linux`.
    pub target: String,
    /// The widest vector instructions, such as `avx512`.
    pub instructions: String,
    /// `cpu`, or the name of another device.
    pub device: String,
}

impl Platform {
    /// This machine, with attempts on its processor.
    pub fn this_cpu() -> Self {
        Self::with_device("cpu")
    }

    /// This machine, with attempts on `device`.
    pub fn with_device(device: &str) -> Self {
        Self {
            target: format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS),
            instructions: vector_instructions().to_owned(),
            device: device.to_owned(),
        }
    }
}

#[cfg(target_arch = "x86_64")]
fn vector_instructions() -> &'static str {
    if std::arch::is_x86_feature_detected!("avx512f") {
        "avx512"
    } else if std::arch::is_x86_feature_detected!("avx2") {
        "avx2"
    } else {
        "sse2"
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn vector_instructions() -> &'static str {
    "baseline"
}

/// The result of [`Store::record`].
#[derive(Clone, Debug, PartialEq)]
pub enum RecordResult {
    New,
    /// A record with the same digest exists.
    Same,
    /// A record with another digest exists and stays. [`resolve_conflict`] says what to do.
    Differs {
        first: Box<ActionRecord>,
    },
}

/// How to handle a second digest for one key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Resolution {
    /// The first record stays, and its artifact is the stage's result.
    KeepFirst,
    /// The second replaces it ([`Store::replace`]).
    Replace,
    /// The same recipe must give the same bytes on one platform: an internal error.
    Bug,
}

/// Decides between two records of one key with different digests. `first_is_intact`: the first record's artifact is
/// intact; `forced`: the user asked for the second attempt.
pub fn resolve_conflict(
    first: &ActionRecord,
    second: &ActionRecord,
    deterministic: bool,
    first_is_intact: bool,
    forced: bool,
) -> Resolution {
    if first.digest == second.digest {
        Resolution::KeepFirst
    } else if deterministic && first.provenance.platform == second.provenance.platform {
        Resolution::Bug
    } else if !first_is_intact || (forced && !deterministic) {
        Resolution::Replace
    } else {
        Resolution::KeepFirst
    }
}

/// The beginning of a record's file. The seal follows, then the record.
const SEAL_PREFIX: &str = "{\n  \"seal\": \"";

/// The seal: a hash of every byte of the file after the seal.
fn seal(rest: &[u8]) -> String {
    blake3::Hasher::new_derive_key("temper action record v2").update(rest).finalize().to_hex().to_string()
}

/// The seal of older records, which covers only the key and the digest.
fn old_seal(key: &Key, digest: &Digest) -> String {
    Digest::of(format!("{key} {digest}").as_bytes()).to_string()
}

/// The fields needed to find the digest.
#[derive(Deserialize)]
struct RecordHead {
    key: Key,
    digest: Digest,
}

/// The head of the record at `key`, if its seal is valid.
fn read_sealed(key: &Key, bytes: &[u8]) -> Option<RecordHead> {
    let (found, rest) = bytes.strip_prefix(SEAL_PREFIX.as_bytes())?.split_at_checked(2 * blake3::OUT_LEN)?;
    let head: RecordHead = serde_json::from_slice(bytes).ok()?;
    let holds = found == seal(rest).as_bytes() || found == old_seal(key, &head.digest).as_bytes();
    (holds && head.key == *key).then_some(head)
}

/// The record at `key`, if its seal and its recipe are those of the key.
pub(crate) fn parse(key: &Key, bytes: &[u8]) -> Option<ActionRecord> {
    read_sealed(key, bytes)?;
    serde_json::from_slice::<ActionRecord>(bytes).ok().filter(|record| record.recipe.key() == *key)
}

impl Store {
    /// The record at a key; `None` if it is missing or damaged.
    pub fn action(&self, key: &Key) -> Result<Option<ActionRecord>> {
        let bytes = files::read_if_file(&self.action_file(key))?;
        Ok(bytes.and_then(|bytes| parse(key, &bytes)))
    }

    /// The digest in the record at a key: like [`Store::action`], but without parsing the whole record.
    pub fn recorded_digest(&self, key: &Key) -> Result<Option<Digest>> {
        let bytes = files::read_if_file(&self.action_file(key))?;
        Ok(bytes.and_then(|bytes| read_sealed(key, &bytes)).map(|head| head.digest))
    }

    /// Writes a record unless one exists: the first one wins. Only the orchestrator calls this, as the last step, after
    /// the artifact is committed. The record is on disk when this returns; a crash leaves either no record or a
    /// complete one.
    pub fn record(&self, record: &ActionRecord) -> Result<RecordResult> {
        let result = self.put_record(record, &self.serialise(record)?)?;
        if result == RecordResult::New {
            self.record_seconds(record)?;
        }
        Ok(result)
    }

    /// Writes `bytes`, the file of `record`, unless the key has a record.
    pub(super) fn put_record(&self, record: &ActionRecord, bytes: &[u8]) -> Result<RecordResult> {
        let path = self.action_file(&record.key);
        let (temporary, name) = files::write_temporary(&path, bytes)?;
        loop {
            match disk::rename_new(&name, &path) {
                Ok(()) => break,
                Err(rustix::io::Errno::EXIST) => match self.action(&record.key)? {
                    Some(first) if first.digest == record.digest => return Ok(RecordResult::Same),
                    Some(first) => return Ok(RecordResult::Differs { first: Box::new(first) }),
                    // Damaged: move it out of the way.
                    None => self.quarantine_file(&path, "this action record cannot be read")?,
                },
                // The file system lacks RENAME_NOREPLACE; rely on the key's lock, which the orchestrator holds.
                Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS) => {
                    if let Some(first) = self.action(&record.key)? {
                        return Ok(match first.digest == record.digest {
                            true => RecordResult::Same,
                            false => RecordResult::Differs { first: Box::new(first) },
                        });
                    }
                    if files::metadata_if_exists(&path)?.is_some() {
                        self.quarantine_file(&path, "this action record cannot be read")?;
                    }
                    disk::rename(&name, &path).at(&path)?;
                    break;
                }
                Err(e) => return Err(e.into()).at(&path),
            }
        }
        temporary.keep();
        files::sync_parent(&path)?;
        Ok(RecordResult::New)
    }

    /// Replaces a record, as [`resolve_conflict`] allows.
    pub fn replace(&self, record: &ActionRecord) -> Result<()> {
        files::write_atomically(&self.action_file(&record.key), &self.serialise(record)?)?;
        self.record_seconds(record)
    }

    /// Every readable record, unordered. Reads all of them.
    pub fn actions(&self) -> Result<Vec<ActionRecord>> {
        let folder = self.root().join("actions");
        let mut records = Vec::new();
        for entry in fs::read_dir(&folder).at(&folder)? {
            let name = entry.at(&folder)?.file_name();
            let key = name.to_str().and_then(|name| name.strip_suffix(".json")).and_then(|key| key.parse().ok());
            if let Some(key) = key {
                records.extend(self.action(&key)?);
            }
        }
        Ok(records)
    }

    fn serialise(&self, record: &ActionRecord) -> Result<Vec<u8>> {
        if record.recipe.key() != record.key {
            return Err(Error::internal(format!(
                "the action record of {} has a recipe that does not match its key",
                record.provenance.stage
            )));
        }
        let manifest = self.artifact_folder(&record.digest).join("manifest.json");
        if files::metadata_if_exists(&manifest)?.is_none() {
            return Err(Error::internal(format!(
                "{}: an action record names an artifact that does not exist",
                manifest.display()
            )));
        }
        let text = serde_json::to_string_pretty(record).expect("a record is plain data");
        let rest = format!("\",{}\n", text.strip_prefix('{').unwrap_or(&text));
        Ok(format!("{SEAL_PREFIX}{}{rest}", seal(rest.as_bytes())).into_bytes())
    }
}
