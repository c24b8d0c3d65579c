//! Reads a run's folder: its instances, their outcomes, warnings and timings.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use engine::context::ApiUsage;
use engine::document;
use engine::error::{AtPath, Error, Result};
use engine::journal::{self, Event};
use engine::names::{Digest, Key};
use engine::store::Store;
use serde::Deserialize;
use serde_json::Value;
use stages::paper::StageInstance;

/// Name of the matrix dimension that repeats an arm.
pub const SEED: &str = "seed";

/// An instance of the graph that was run, as stored in `graph.json`.
#[derive(Clone, Debug, Deserialize)]
pub struct Instance {
    pub name: String,
    /// (dimension, label)
    pub matrix: Vec<(String, String)>,
    pub kind: String,
    pub params: Value,
    /// `None` for kinds that are not seeded.
    #[serde(default)]
    pub seed: Option<u64>,
    /// The artifact type of its output.
    pub output: String,
    pub inputs: Vec<PortInputs>,
}

/// Names of the instances at one port.
#[derive(Clone, Debug, Deserialize)]
pub struct PortInputs {
    pub port: String,
    pub from: Vec<String>,
}

impl Instance {
    /// The stage's name, without the matrix labels.
    pub fn stage(&self) -> &str {
        self.name.split('[').next().unwrap_or(&self.name)
    }

    /// The matrix labels without the seed's, which identify an arm; the stage's name if there are none.
    fn arm(&self) -> String {
        let labels = self.matrix.iter().filter(|(dimension, _)| dimension != SEED);
        let labels: Vec<&str> = labels.map(|(_, label)| label.as_str()).collect();
        if labels.is_empty() { self.stage().to_owned() } else { labels.join(", ") }
    }
}

/// Each instance with the name of its arm, prefixed by the stage's name if the instances belong to several stages.
pub fn with_arms<'a>(
    instances: impl Iterator<Item = &'a Instance> + Clone,
) -> impl Iterator<Item = (String, &'a Instance)> {
    let stages: BTreeSet<&str> = instances.clone().map(Instance::stage).collect();
    instances.map(move |instance| {
        let (stage, arm) = (instance.stage(), instance.arm());
        (if stages.len() > 1 && arm != stage { format!("{stage}: {arm}") } else { arm }, instance)
    })
}

/// The outcome of an instance in this run.
#[derive(Clone, Debug, Default)]
pub struct InstanceResult {
    pub state: InstanceState,
    pub key: Option<Key>,
    pub digest: Option<Digest>,
    pub seconds: Option<f64>,
    pub peak_bytes: u64,
    /// Seconds since 1970 at which its last attempt in this run started; `ended`: at which it ended.
    pub started: Option<f64>,
    pub ended: Option<f64>,
    /// Its last progress: (done, total, unit).
    pub progress: Option<(u64, u64, String)>,
    /// The earlier run's attempt whose result this run reused.
    pub earlier: Option<EarlierAttempt>,
    pub error: Option<Error>,
    pub tail: Vec<String>,
    /// Seconds by activity, summed over the attempt's timings.
    pub spent: BTreeMap<String, f64>,
    /// Requests paid for by this run.
    pub paid: ApiUsage,
}

/// An attempt of an earlier run, from its action record.
#[derive(Clone, Debug)]
pub struct EarlierAttempt {
    pub run: String,
    pub seconds: f64,
    /// 0 in records of older versions.
    pub peak_bytes: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum InstanceState {
    #[default]
    NotReached,
    Reused,
    Ran,
    Failed,
    /// Started, but neither finished nor failed.
    Interrupted,
    Skipped,
}

impl InstanceState {
    pub fn word(self) -> &'static str {
        match self {
            Self::NotReached => "not reached",
            Self::Reused => "reused",
            Self::Ran => "ran",
            Self::Failed => "failed",
            Self::Interrupted => "interrupted",
            Self::Skipped => "skipped",
        }
    }
}

/// One run, read from its folder and the store.
pub struct RunData {
    pub id: String,
    pub pipeline: String,
    pub profiles: Vec<String>,
    pub instances: Vec<Instance>,
    /// Names of the instances that the run was to make.
    pub targets: Vec<String>,
    pub results: BTreeMap<String, InstanceResult>,
    pub warnings: Vec<(Option<String>, String)>,
    /// Seconds since 1970 of the run's first event; `last_event`: of its last one.
    pub started: f64,
    pub last_event: f64,
    /// The command line with secrets redacted; empty for runs of older versions.
    pub command: Vec<String>,
    /// Path of the pipeline file as given on the command line.
    pub file: Option<String>,
    /// Hosts of the finished attempts of this run.
    pub hosts: BTreeSet<String>,
    /// `None` if the journal has no end: the run is still going, or was killed.
    pub seconds: Option<f64>,
    pub interrupted: bool,
    /// The pipeline file's `report:` section.
    pub settings: document::ReportSettings,
    /// The pipeline's own seed; `None` for runs of older versions, which did not store it.
    pub seed: Option<u64>,
    /// The store's folder.
    store: PathBuf,
    /// Folders of the existing artifacts, by instance.
    folders: BTreeMap<String, PathBuf>,
    /// Metrics of the existing artifacts, by instance.
    metrics: BTreeMap<String, BTreeMap<String, f64>>,
}

#[derive(Deserialize)]
struct GraphFile {
    name: String,
    #[serde(default)]
    seed: Option<u64>,
    /// Absent for runs of older versions whose pipeline file had none.
    report: Option<document::ReportSettings>,
    instances: Vec<Instance>,
    #[serde(default)]
    targets: Vec<String>,
}

impl RunData {
    /// # Errors
    /// If the folder has no graph or journal.
    pub fn read(folder: &Path, store: &Store) -> Result<Self> {
        let path = folder.join("graph.json");
        if !path.is_file() {
            return Err(Error::environment(format!("{}: not a file", path.display())));
        }
        let text = std::fs::read(&path).at(&path)?;
        let graph: GraphFile =
            serde_json::from_slice(&text).map_err(|e| Error::environment(format!("{}: {e}", path.display())))?;
        let id = folder.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        let mut run = Self {
            id,
            pipeline: graph.name,
            profiles: Vec::new(),
            instances: graph.instances,
            targets: graph.targets,
            results: BTreeMap::new(),
            warnings: Vec::new(),
            started: 0.0,
            last_event: 0.0,
            command: Vec::new(),
            file: None,
            hosts: BTreeSet::new(),
            seconds: None,
            interrupted: false,
            settings: graph.report.unwrap_or_default(),
            seed: graph.seed,
            store: store.root().to_owned(),
            folders: BTreeMap::new(),
            metrics: BTreeMap::new(),
        };
        for line in journal::read(folder)? {
            run.apply(line.at, line.event);
        }
        for (name, result) in &mut run.results {
            let Some(digest) = result.digest else { continue };
            // An artifact that has since been deleted or damaged leaves a gap in the report, but is no error.
            if let Ok(Some(artifact)) = store.intact_artifact(&digest) {
                run.folders.insert(name.clone(), artifact.folder);
                run.metrics.insert(name.clone(), artifact.manifest.facts.metrics);
            }
            let Some(Ok(Some(record))) = result.key.map(|key| store.action(&key)) else { continue };
            let provenance = record.provenance;
            if result.state != InstanceState::Reused {
                if provenance.run == run.id {
                    run.hosts.insert(provenance.host);
                }
                continue;
            }
            // The journal has the warnings of this run's attempts; warnings of the earlier attempt still apply.
            run.warnings.extend(provenance.warnings.into_iter().map(|message| (Some(name.clone()), message)));
            result.earlier = Some(EarlierAttempt {
                run: provenance.run,
                seconds: provenance.seconds,
                peak_bytes: provenance.peak_bytes,
            });
        }
        Ok(run)
    }

    fn apply(&mut self, at: f64, event: Event) {
        self.last_event = at;
        match event {
            Event::Started { profiles, command, file, .. } => {
                (self.started, self.profiles, self.command, self.file) = (at, profiles, command, file);
            }
            Event::StageStarted { stage, .. } => {
                let result = self.results.entry(stage).or_default();
                // Counts as interrupted until its end is read.
                result.state = InstanceState::Interrupted;
                (result.started, result.ended, result.progress) = (Some(at), None, None);
            }
            Event::Progress { stage, done, total, unit, .. } => {
                self.results.entry(stage).or_default().progress = Some((done, total, unit));
            }
            Event::StageFinished { stage, key, digest, seconds, peak_bytes } => {
                let result = self.results.entry(stage).or_default();
                result.state = InstanceState::Ran;
                result.ended = Some(at);
                (result.key, result.digest) = (Some(key), Some(digest));
                (result.seconds, result.peak_bytes) = (Some(seconds), peak_bytes);
            }
            Event::StageReused { stage, key, digest, .. } => {
                let result = self.results.entry(stage).or_default();
                result.state = InstanceState::Reused;
                (result.key, result.digest) = (Some(key), Some(digest));
            }
            Event::StageFailed { stage, error, tail, .. } => {
                let result = self.results.entry(stage).or_default();
                result.state = InstanceState::Failed;
                result.ended = Some(at);
                (result.error, result.tail) = (Some(error), tail);
            }
            Event::StageSkipped { stage, .. } => {
                let result = self.results.entry(stage).or_default();
                // The run ended during the attempt.
                if result.state != InstanceState::Interrupted {
                    result.state = InstanceState::Skipped;
                }
            }
            Event::Timing { stage, seconds, .. } => {
                let spent = &mut self.results.entry(stage).or_default().spent;
                for (what, s) in seconds {
                    *spent.entry(what).or_default() += s;
                }
            }
            Event::Paid { stage, paid } => self.results.entry(stage).or_default().paid.add(paid),
            Event::Warning { stage, message } => self.warnings.push((stage, message)),
            Event::Finished { seconds, interrupted, .. } => {
                self.seconds = Some(seconds);
                self.interrupted = interrupted;
            }
            Event::Planned { .. }
            | Event::Probing { .. }
            | Event::Job { .. }
            | Event::Waiting { .. }
            | Event::Activity { .. }
            | Event::Checkpoint { .. }
            | Event::Resumed { .. }
            | Event::Retrying { .. }
            | Event::Transfer { .. }
            | Event::Transferred { .. } => {}
        }
    }

    pub fn result(&self, instance: &Instance) -> InstanceResult {
        self.results.get(&instance.name).cloned().unwrap_or_default()
    }

    /// The folder of the instance's artifact, if it exists.
    pub fn folder(&self, instance: &Instance) -> Option<PathBuf> {
        self.folders.get(&instance.name).cloned()
    }

    /// Like [`Self::folder`], relative to the store's folder.
    pub fn relative_folder(&self, instance: &Instance) -> Option<String> {
        let folder = self.folders.get(&instance.name)?;
        Some(folder.strip_prefix(&self.store).unwrap_or(folder).display().to_string())
    }

    /// The metrics of the instance's artifact; empty if it does not exist.
    pub fn metrics(&self, instance: &Instance) -> BTreeMap<String, f64> {
        self.metrics.get(&instance.name).cloned().unwrap_or_default()
    }

    /// The graph in the form used by the list of deviations.
    pub fn held(&self) -> Vec<StageInstance<'_>> {
        self.instances
            .iter()
            .map(|instance| StageInstance {
                name: &instance.name,
                kind: &instance.kind,
                params: &instance.params,
                inputs: instance
                    .inputs
                    .iter()
                    .map(|port| (port.port.as_str(), port.from.iter().map(String::as_str).collect()))
                    .collect(),
                metrics: self.metrics(instance),
            })
            .collect()
    }

    /// The first instance at a port.
    pub fn input(&self, instance: &Instance, port: &str) -> Option<&Instance> {
        let name = instance.inputs.iter().find(|p| p.port == port)?.from.first()?;
        self.instances.iter().find(|i| i.name == *name)
    }
}

#[cfg(test)]
pub mod tests {
    use engine::journal::Journal;
    use serde_json::json;

    use super::*;

    /// A run of the instances `(name, kind)` whose journal has these events; its store is empty.
    pub fn run(instances: &[(&str, &str)], events: &[Event]) -> Result<RunData> {
        let dir = tempfile::tempdir().at("a temporary folder")?;
        let mut journal = Journal::create(dir.path())?;
        let instances: Vec<Value> = instances
            .iter()
            .map(|(name, kind)| json!({ "name": name, "matrix": [], "kind": kind, "params": {}, "output": "Files", "inputs": [] }))
            .collect();
        let graph = json!({ "name": "test", "seed": 3, "report": null, "instances": instances });
        let path = journal.folder().join("graph.json");
        std::fs::write(&path, graph.to_string()).at(&path)?;
        events.iter().try_for_each(|event| journal.write(event))?;
        RunData::read(journal.folder(), &Store::open(&dir.path().join("store"))?)
    }

    pub fn started(stage: &str) -> Event {
        let key = Key::of(stage.as_bytes());
        Event::StageStarted { stage: stage.into(), key, threads: 1, attempt: "1".into(), log: PathBuf::new() }
    }

    pub fn skipped(stage: &str, because: Option<&str>) -> Event {
        Event::StageSkipped { stage: stage.into(), because: because.map(str::to_owned) }
    }

    #[test]
    fn a_stage_that_started_and_did_not_end_is_interrupted() -> Result<()> {
        let error = Error::user("no rows");
        let events = [
            started("a"),
            started("b"),
            Event::StageFailed { stage: "b".into(), error, log: None, tail: Vec::new() },
            Event::Progress { stage: "a".into(), done: 3, total: 9, unit: "steps".into(), headline: None },
            skipped("a", None),
            skipped("c", Some("b")),
        ];
        let run = run(&[("a", "sft"), ("b", "sft"), ("c", "sft"), ("d", "sft")], &events)?;
        let states: Vec<InstanceState> = run.instances.iter().map(|instance| run.result(instance).state).collect();
        assert_eq!(
            states,
            [InstanceState::Interrupted, InstanceState::Failed, InstanceState::Skipped, InstanceState::NotReached]
        );
        assert_eq!(run.result(&run.instances[0]).progress, Some((3, 9, "steps".into())));
        Ok(())
    }
}
