//! A run's folder read back: its instances, what became of each, warnings and timings. Knows no artifact's content.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use engine::context::Paid;
use engine::error::{At, Error, Result};
use engine::journal::{self, Event};
use engine::names::{Digest, Key};
use engine::spec;
use engine::store::{Presence, Store};
use serde::Deserialize;
use serde_json::Value;
use stages::paper::Held;

/// An instance of the graph that was run, as `graph.json` tells it.
#[derive(Clone, Debug, Deserialize)]
pub struct Instance {
    pub name: String,
    /// (dimension, label)
    pub matrix: Vec<(String, String)>,
    pub kind: String,
    pub params: Value,
    /// The artifact type that it gives.
    pub output: String,
    pub inputs: Vec<Port>,
}

/// Names of instances at one port.
#[derive(Clone, Debug, Deserialize)]
pub struct Port {
    pub port: String,
    pub from: Vec<String>,
}

impl Instance {
    /// The stage's name, without the matrix labels.
    pub fn stage(&self) -> &str {
        self.name.split('[').next().unwrap_or(&self.name)
    }
}

/// What became of an instance in this run.
#[derive(Clone, Debug, Default)]
pub struct Fate {
    pub state: State,
    pub key: Option<Key>,
    pub digest: Option<Digest>,
    pub seconds: Option<f64>,
    pub peak_bytes: u64,
    pub error: Option<Error>,
    pub tail: Vec<String>,
    /// Seconds by what they were spent on, summed over the attempt's timings.
    pub spent: BTreeMap<String, f64>,
    /// Requests that this run paid for.
    pub paid: Paid,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum State {
    #[default]
    NotReached,
    Reused,
    Ran,
    Failed,
    Skipped,
}

impl State {
    pub fn word(self) -> &'static str {
        match self {
            Self::NotReached => "not reached",
            Self::Reused => "reused",
            Self::Ran => "ran",
            Self::Failed => "failed",
            Self::Skipped => "skipped",
        }
    }
}

/// One run, as its folder and the store tell it.
pub struct RunData {
    pub id: String,
    pub pipeline: String,
    pub profiles: Vec<String>,
    pub instances: Vec<Instance>,
    pub fates: BTreeMap<String, Fate>,
    pub warnings: Vec<(Option<String>, String)>,
    pub seconds: Option<f64>,
    pub interrupted: bool,
    /// The pipeline file's `report:` section.
    pub settings: spec::Report,
    /// The pipeline's own seed; runs of an older temper did not keep it.
    pub seed: Option<u64>,
    /// Folders of the artifacts that are there, by instance.
    folders: BTreeMap<String, PathBuf>,
    /// Their metrics.
    metrics: BTreeMap<String, BTreeMap<String, f64>>,
}

#[derive(Deserialize)]
struct GraphFile {
    name: String,
    #[serde(default)]
    seed: Option<u64>,
    /// None in runs of an older temper whose pipeline file had none.
    report: Option<spec::Report>,
    instances: Vec<Instance>,
}

impl RunData {
    /// # Errors
    /// When the folder holds no graph or journal.
    pub fn read(folder: &Path, store: &Store) -> Result<Self> {
        let path = folder.join("graph.json");
        if !path.is_file() {
            return Err(Error::surroundings(format!("{}: not a file", path.display())));
        }
        let text = std::fs::read(&path).at(&path)?;
        let graph: GraphFile =
            serde_json::from_slice(&text).map_err(|e| Error::surroundings(format!("{}: {e}", path.display())))?;
        let id = folder.file_name().map_or_else(String::new, |n| n.to_string_lossy().into_owned());
        let mut run = Self {
            id,
            pipeline: graph.name,
            profiles: Vec::new(),
            instances: graph.instances,
            fates: BTreeMap::new(),
            warnings: Vec::new(),
            seconds: None,
            interrupted: false,
            settings: graph.report.unwrap_or_default(),
            seed: graph.seed,
            folders: BTreeMap::new(),
            metrics: BTreeMap::new(),
        };
        for line in journal::read(folder)? {
            run.take(line.event);
        }
        for (name, fate) in &run.fates {
            let Some(digest) = fate.digest else { continue };
            // An artifact that is gone or damaged by now is a gap in the report, not an error of it.
            if let Ok(Presence::Whole) = store.presence(&digest)
                && let Ok(artifact) = store.open_artifact(&digest)
            {
                run.folders.insert(name.clone(), artifact.folder);
                run.metrics.insert(name.clone(), artifact.manifest.facts.metrics);
            }
            // The journal has the warnings of this run's own attempts; what an earlier one warned of still holds.
            if let (State::Reused, Some(key)) = (fate.state, &fate.key)
                && let Ok(Some(record)) = store.action(key)
            {
                let warnings = record.provenance.warnings.into_iter();
                run.warnings.extend(warnings.map(|message| (Some(name.clone()), message)));
            }
        }
        Ok(run)
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Started { profiles, .. } => self.profiles = profiles,
            Event::StageFinished { stage, key, digest, seconds, peak_bytes } => {
                let fate = self.fates.entry(stage).or_default();
                fate.state = State::Ran;
                (fate.key, fate.digest) = (Some(key), Some(digest));
                (fate.seconds, fate.peak_bytes) = (Some(seconds), peak_bytes);
            }
            Event::StageReused { stage, key, digest, .. } => {
                let fate = self.fates.entry(stage).or_default();
                fate.state = State::Reused;
                (fate.key, fate.digest) = (Some(key), Some(digest));
            }
            Event::StageFailed { stage, error, tail, .. } => {
                let fate = self.fates.entry(stage).or_default();
                fate.state = State::Failed;
                (fate.error, fate.tail) = (Some(error), tail);
            }
            Event::StageSkipped { stage, .. } => self.fates.entry(stage).or_default().state = State::Skipped,
            Event::Timing { stage, seconds, .. } => {
                let spent = &mut self.fates.entry(stage).or_default().spent;
                for (what, s) in seconds {
                    *spent.entry(what).or_default() += s;
                }
            }
            Event::Paid { stage, paid } => self.fates.entry(stage).or_default().paid.add(paid),
            Event::Warning { stage, message } => self.warnings.push((stage, message)),
            Event::Finished { seconds, interrupted, .. } => {
                self.seconds = Some(seconds);
                self.interrupted = interrupted;
            }
            Event::Planned { .. }
            | Event::StageStarted { .. }
            | Event::Waiting { .. }
            | Event::Progress { .. }
            | Event::Checkpoint { .. }
            | Event::Resumed { .. }
            | Event::Retrying { .. } => {}
        }
    }

    pub fn fate(&self, instance: &Instance) -> Fate {
        self.fates.get(&instance.name).cloned().unwrap_or_default()
    }

    /// Where the instance's artifact lies, if it is there.
    pub fn folder(&self, instance: &Instance) -> Option<PathBuf> {
        self.folders.get(&instance.name).cloned()
    }

    /// The graph as the list of deviations reads it.
    pub fn held(&self) -> Vec<Held<'_>> {
        self.instances
            .iter()
            .map(|instance| Held {
                name: &instance.name,
                kind: &instance.kind,
                params: &instance.params,
                inputs: instance
                    .inputs
                    .iter()
                    .map(|port| (port.port.as_str(), port.from.iter().map(String::as_str).collect()))
                    .collect(),
                metrics: self.metrics.get(&instance.name).cloned().unwrap_or_default(),
            })
            .collect()
    }

    /// The first instance at a port.
    pub fn input(&self, instance: &Instance, port: &str) -> Option<&Instance> {
        let name = instance.inputs.iter().find(|p| p.port == port)?.from.first()?;
        self.instances.iter().find(|i| i.name == *name)
    }
}
