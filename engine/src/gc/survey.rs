//! The survey of a store: the size of everything in it, and what keeps each result.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::fmt;
use std::fs::Metadata;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

use super::roots::{self, KeptRuns, PipelineRoots, RunRoots, allocated};
use crate::error::{AtPath, Result};
use crate::names::{Digest, Key};
use crate::store::{ActionRecord, Store, files};

/// What keeps a result.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Keeper {
    /// A pipeline reuses it.
    Pipeline(String),
    Pin(String),
    /// A run that has ended used or made it.
    Run(String),
    /// A run that has not ended uses it, or may use it.
    Running(String),
}

impl fmt::Display for Keeper {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pipeline(name) => f.write_str(name),
            Self::Pin(name) => write!(f, "pin {name}"),
            Self::Run(id) => write!(f, "run {id}"),
            Self::Running(id) => write!(f, "running {id}"),
        }
    }
}

impl Serialize for Keeper {
    fn serialize<S: Serializer>(&self, s: S) -> Result<S::Ok, S::Error> {
        s.collect_str(self)
    }
}

/// An artifact of the store.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ArtifactUse {
    pub digest: Digest,
    /// Empty if the manifest cannot be read.
    #[serde(rename = "type")]
    pub artifact_type: String,
    /// The instances that made it, by its action records; empty without a record.
    pub stages: BTreeSet<String>,
    /// The run that made it first, and when (seconds since 1970).
    pub run: Option<String>,
    pub made: Option<f64>,
    /// Bytes on disk. Files that it shares with other artifacts count in each.
    pub bytes: u64,
    /// Bytes that its deletion frees, together with that of all artifacts before it that nothing keeps.
    pub freed: u64,
    pub kept_by: BTreeSet<Keeper>,
}

/// The work folder of a key: checkpoints, and the logs and outputs of attempts.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct WorkUse {
    pub key: Key,
    /// The instance, if a record or a run names it.
    pub stage: Option<String>,
    /// Whether the key has a result, so that nothing will resume from its checkpoints.
    pub finished: bool,
    pub bytes: u64,
    pub kept: bool,
}

/// The folder of a run.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RunUse {
    pub run: String,
    pub running: bool,
    /// Whether its results are kept.
    pub kept: bool,
    pub bytes: u64,
}

/// Everything in a store, in bytes on disk.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Survey {
    /// Largest first.
    pub artifacts: Vec<ArtifactUse>,
    /// All artifacts and blobs; each file once.
    pub artifact_bytes: u64,
    /// Files that no artifact uses once those that nothing keeps are deleted.
    #[serde(skip)]
    pub unused_blobs: Vec<PathBuf>,
    /// Bytes of blobs that belong to no artifact even now.
    pub unused_blob_bytes: u64,
    pub work: Vec<WorkUse>,
    pub runs: Vec<RunUse>,
    /// Temporary files that crashes left.
    pub leftovers: Vec<PathBuf>,
    pub leftover_bytes: u64,
    /// Paid answers; never deleted.
    pub requests_bytes: u64,
    pub quarantine_bytes: u64,
}

impl Survey {
    /// Bytes that a collection frees.
    pub fn freed(&self) -> u64 {
        let artifacts: u64 = self.artifacts.iter().map(|artifact| artifact.freed).sum();
        let work: u64 = self.work.iter().filter(|work| !work.kept).map(|work| work.bytes).sum();
        artifacts + work + self.unused_blob_bytes + self.leftover_bytes
    }

    /// Bytes of the whole store, except for its index files.
    pub fn total(&self) -> u64 {
        let work: u64 = self.work.iter().map(|work| work.bytes).sum();
        let runs: u64 = self.runs.iter().map(|run| run.bytes).sum();
        self.artifact_bytes + work + runs + self.leftover_bytes + self.requests_bytes + self.quarantine_bytes
    }
}

/// A file found by [`walk`].
#[derive(Clone, Copy, Debug)]
pub(super) struct FoundFile {
    pub device: u64,
    pub inode: u64,
    pub links: u64,
    /// Bytes on disk.
    pub allocated: u64,
}

impl From<&Metadata> for FoundFile {
    fn from(m: &Metadata) -> Self {
        Self { device: m.dev(), inode: m.ino(), links: m.nlink(), allocated: m.blocks() * 512 }
    }
}

/// Calls `visit` with everything below `path` and with `path` itself, except folders; what vanishes meanwhile is left out.
pub(super) fn walk(path: &Path, visit: &mut dyn FnMut(&Path, FoundFile)) -> Result<()> {
    let mut open = vec![path.to_owned()];
    while let Some(path) = open.pop() {
        let Some(metadata) = files::metadata_if_exists(&path)? else { continue };
        if !metadata.is_dir() {
            visit(&path, FoundFile::from(&metadata));
            continue;
        }
        open.extend(entries(&path)?);
    }
    Ok(())
}

/// The entries of a folder; none if it does not exist.
fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let listed = match std::fs::read_dir(folder) {
        Err(e) if matches!(e.kind(), std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        listed => listed.at(folder)?,
    };
    let mut entries = Vec::new();
    for entry in listed {
        entries.push(entry.at(folder)?.path());
    }
    entries.sort_unstable();
    Ok(entries)
}

/// An inode by device and number.
type Inode = (u64, u64);

/// Surveys the store. While others write to it, sizes are approximate; [`super::collect`] excludes them.
///
/// # Errors
/// When a run, a pin or a folder of the store cannot be read.
pub fn survey(store: &Store, kept: &KeptRuns, pipelines: &[PipelineRoots]) -> Result<Survey> {
    let mut found = Survey::default();
    // Before the records: an artifact that is recorded meanwhile has a run that is alive.
    let mut digests = Vec::new();
    for path in entries(&store.artifacts())? {
        let name = path.file_name().unwrap_or_default();
        match name.to_str().and_then(|name| name.parse::<Digest>().ok()) {
            Some(digest) => digests.push(digest),
            None if files::is_temporary_name(name) => found.leftovers.push(path),
            // Not ours.
            None => {}
        }
    }
    let runs = roots::runs(store, kept)?;
    let records = store.actions()?;
    let keepers = keepers(store, &runs, pipelines, &records)?;
    artifacts(store, digests, &runs, &records, &keepers, &mut found)?;
    work(store, &runs, pipelines, &records, &mut found)?;
    for run in runs {
        let bytes = allocated(&run.folder)?;
        found.runs.push(RunUse { run: run.id, running: run.running, kept: run.kept, bytes });
    }
    found.leftover_bytes = found.leftovers.iter().map(|path| allocated(path)).sum::<Result<u64>>()?;
    found.requests_bytes = allocated(&store.requests())?;
    found.quarantine_bytes = allocated(&store.root().join("quarantine"))?;
    Ok(found)
}

/// What keeps each artifact.
fn keepers(
    store: &Store,
    runs: &[RunRoots],
    pipelines: &[PipelineRoots],
    records: &[ActionRecord],
) -> Result<HashMap<Digest, BTreeSet<Keeper>>> {
    let mut keepers: HashMap<Digest, BTreeSet<Keeper>> = HashMap::new();
    let mut keep = |digest: &Digest, keeper: Keeper| {
        keepers.entry(*digest).or_default().insert(keeper);
    };
    for pipeline in pipelines {
        pipeline.digests.iter().for_each(|digest| keep(digest, Keeper::Pipeline(pipeline.name.clone())));
    }
    for pin in store.pins()? {
        pin.results.iter().for_each(|result| keep(&result.digest, Keeper::Pin(pin.name.clone())));
    }
    for run in runs.iter().filter(|run| run.kept) {
        let keeper = if run.running { Keeper::Running } else { Keeper::Run };
        run.digests.iter().for_each(|digest| keep(digest, keeper(run.id.clone())));
    }
    for run in runs.iter().filter(|run| run.running) {
        for record in records {
            // An instance whose key is not known yet may turn out to reuse any earlier result of its own.
            let may_use = run.keys.contains_key(&record.key)
                || record.provenance.run == run.id
                || run.pending.contains(&record.provenance.stage.to_string());
            if may_use {
                keep(&record.digest, Keeper::Running(run.id.clone()));
            }
        }
    }
    Ok(keepers)
}

fn artifacts(
    store: &Store,
    digests: Vec<Digest>,
    runs: &[RunRoots],
    records: &[ActionRecord],
    keepers: &HashMap<Digest, BTreeSet<Keeper>>,
    found: &mut Survey,
) -> Result<()> {
    let mut by_digest: HashMap<Digest, Vec<&ActionRecord>> = HashMap::new();
    for record in records {
        by_digest.entry(record.digest).or_default().push(record);
    }
    let mut contents: HashMap<Digest, Vec<FoundFile>> = HashMap::new();
    let mut kept_blobs: HashSet<Digest> = HashSet::new();
    for digest in digests {
        let mut files = Vec::new();
        walk(&store.artifact_folder(&digest), &mut |_, file| files.push(file))?;
        let records = by_digest.get(&digest).map(Vec::as_slice).unwrap_or_default();
        let mut kept_by = keepers.get(&digest).cloned().unwrap_or_default();
        // What a living run has committed and not recorded yet: it has no record, or only one of an earlier attempt
        // that gave the same bytes.
        let committed = std::fs::metadata(store.artifact_folder(&digest)).and_then(|folder| folder.modified()).ok();
        let since =
            |run: &&RunRoots| run.began.is_none_or(|began| committed.is_none_or(|committed| committed >= began));
        let living = runs.iter().filter(|run| run.running);
        let perhaps = living.filter(|run| records.is_empty() || since(run));
        kept_by.extend(perhaps.map(|run| Keeper::Running(run.id.clone())));
        let manifest = store.open_artifact(&digest).ok().map(|artifact| artifact.manifest);
        if let Some(manifest) = manifest.as_ref().filter(|_| !kept_by.is_empty()) {
            kept_blobs.extend(manifest.files.values().map(|file| file.digest));
        }
        let first = records.iter().min_by(|a, b| a.provenance.started.total_cmp(&b.provenance.started));
        let inodes: BTreeMap<Inode, u64> = files.iter().map(|f| ((f.device, f.inode), f.allocated)).collect();
        found.artifacts.push(ArtifactUse {
            digest,
            artifact_type: manifest.map_or_else(String::new, |manifest| manifest.artifact_type),
            stages: records.iter().map(|record| record.provenance.stage.to_string()).collect(),
            run: first.map(|record| record.provenance.run.clone()),
            made: first.map(|record| record.provenance.started + record.provenance.seconds),
            bytes: inodes.values().sum(),
            freed: 0,
            kept_by,
        });
        contents.insert(digest, files);
    }
    found.artifacts.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.stages.cmp(&b.stages)));
    freed(store, &contents, &kept_blobs, found)
}

/// Finds the blobs that become unused, and what each deletion frees: a file's bytes are freed with its last link.
fn freed(
    store: &Store,
    contents: &HashMap<Digest, Vec<FoundFile>>,
    kept_blobs: &HashSet<Digest>,
    found: &mut Survey,
) -> Result<()> {
    let key = |file: &FoundFile| (file.device, file.inode);
    let mut all: HashMap<Inode, u64> = HashMap::new();
    let (mut kept, mut removed) = (HashSet::new(), HashMap::<Inode, u64>::new());
    for artifact in &found.artifacts {
        for file in &contents[&artifact.digest] {
            all.insert(key(file), file.allocated);
            match artifact.kept_by.is_empty() {
                true => *removed.entry(key(file)).or_default() += 1,
                false => drop(kept.insert(key(file))),
            }
        }
    }
    for shard in entries(&store.blobs())? {
        for path in entries(&shard)? {
            let name = path.file_name().unwrap_or_default();
            if files::is_temporary_name(name) {
                found.leftovers.push(path);
                continue;
            }
            let shard = shard.file_name().unwrap_or_default();
            let digest = format!("{}{}", shard.to_string_lossy(), name.to_string_lossy()).parse::<Digest>();
            let (Ok(digest), Some(metadata)) = (digest, files::metadata_if_exists(&path)?) else { continue };
            let file = FoundFile::from(&metadata);
            let is_new = all.insert(key(&file), file.allocated).is_none();
            if kept_blobs.contains(&digest) || kept.contains(&key(&file)) {
                continue;
            }
            *removed.entry(key(&file)).or_default() += 1;
            found.unused_blobs.push(path);
            if is_new && file.links == 1 {
                found.unused_blob_bytes += file.allocated;
            }
        }
    }
    found.artifact_bytes = all.values().sum();
    let mut counted = HashSet::new();
    for artifact in found.artifacts.iter_mut().filter(|artifact| artifact.kept_by.is_empty()) {
        for file in &contents[&artifact.digest] {
            if removed.get(&key(file)) == Some(&file.links) && counted.insert(key(file)) {
                artifact.freed += file.allocated;
            }
        }
    }
    Ok(())
}

fn work(
    store: &Store,
    runs: &[RunRoots],
    pipelines: &[PipelineRoots],
    records: &[ActionRecord],
    found: &mut Survey,
) -> Result<()> {
    let finished: HashMap<Key, String> =
        records.iter().map(|record| (record.key, record.provenance.stage.to_string())).collect();
    let named = runs.iter().filter(|run| run.kept).map(|run| &run.keys);
    let named: Vec<&BTreeMap<Key, String>> = named.chain(pipelines.iter().map(|pipeline| &pipeline.keys)).collect();
    let is_writable = store.is_writable();
    for folder in entries(&store.work_root())? {
        let name = folder.file_name().unwrap_or_default().to_string_lossy();
        let Ok(key) = name.parse::<Key>() else { continue };
        let name = named.iter().find_map(|keys| keys.get(&key)).or_else(|| {
            // To tell the user whose folder it was.
            runs.iter().find_map(|run| run.keys.get(&key))
        });
        let is_finished = finished.contains_key(&key);
        let is_named = !is_finished && named.iter().any(|keys| keys.contains_key(&key));
        // Checked again under the lock before it is deleted.
        let kept = is_named || !is_writable || store.lease(&key)?.is_some() || store.try_lock(&key)?.is_none();
        let stage = finished.get(&key).or(name).cloned();
        found.work.push(WorkUse { key, stage, finished: is_finished, bytes: allocated(&folder)?, kept });
    }
    found.work.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.key.cmp(&b.key)));
    Ok(())
}
