//! What a kind has while it runs: inputs, an output folder, a seeded generator, progress reporting.

use std::collections::BTreeMap;
use std::num::NonZeroU64;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::SeedableRng;
use serde::{Deserialize, Serialize};

use crate::disk;
use crate::error::{AtPath, Error, Result};
use crate::names::Digest;

/// One artifact connected to a port.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Input {
    /// The matrix labels of the instance that produced it, joined by commas; the stage's name if it has no matrix.
    pub label: String,
    #[serde(rename = "type")]
    pub artifact_type: String,
    pub digest: Digest,
    /// Folder with its files; must not be written to.
    pub folder: PathBuf,
}

/// A message that an attempt sends while it runs. Never part of an artifact.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "tell", rename_all = "lowercase")]
pub enum StageEvent {
    /// How far the stage has come, and its headline metric.
    Progress { done: u64, total: u64, unit: String, headline: Option<(String, f64)> },
    /// What the stage does now, such as `sampling`, while its progress stands still.
    Activity { what: String },
    /// Seconds spent, by name, for the journal: for example sampling, scoring and update of one PPO phase.
    Timing { what: String, seconds: BTreeMap<String, f64> },
    /// A checkpoint has been written: the next attempt at this key resumes from it.
    Checkpoint { done: u64, total: u64, unit: String },
    /// The stage resumes from the checkpoint of an earlier attempt.
    Resumed { done: u64, total: u64, unit: String },
    /// Paid requests since the previous `Paid` message.
    Paid(ApiUsage),
    /// A message for the user.
    Warning { message: String },
}

/// The number and cost of requests to an API.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct ApiUsage {
    pub requests: u64,
    /// Tokens sent.
    pub input_tokens: u64,
    /// Tokens received.
    pub output_tokens: u64,
    /// Computed from the known prices; `None` if there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dollars: Option<f64>,
}

impl ApiUsage {
    /// Adds `other`; an unknown cost stays unknown.
    pub fn add(&mut self, other: Self) {
        let dollars = match (self.requests, self.dollars, other.dollars) {
            (0, None, dollars) => dollars,
            (_, Some(a), Some(b)) => Some(a + b),
            _ => None,
        };
        self.requests += other.requests;
        self.input_tokens += other.input_tokens;
        self.output_tokens += other.output_tokens;
        self.dollars = dollars;
    }
}

/// When a stage writes a checkpoint. Not part of any key, because it changes no result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cadence {
    /// About once a minute, but at most 5% of the time is spent writing checkpoints.
    #[default]
    Timed,
    /// After this many of the stage's own steps.
    Steps(NonZeroU64),
}

/// Asks an attempt to write a checkpoint, after which it is ended.
#[derive(Clone, Debug, Default)]
pub(crate) struct StopRequest(Arc<StopState>);

#[derive(Debug, Default)]
struct StopState {
    requested: AtomicBool,
    writes_checkpoints: AtomicBool,
}

impl StopRequest {
    /// Returns whether the attempt writes checkpoints.
    pub fn request(&self) -> bool {
        self.0.requested.store(true, Ordering::Relaxed);
        self.0.writes_checkpoints.load(Ordering::Relaxed)
    }

    /// For the attempt: it writes checkpoints from now on.
    pub fn follow(&self) {
        self.0.writes_checkpoints.store(true, Ordering::Relaxed);
    }

    pub fn is_requested(&self) -> bool {
        self.0.requested.load(Ordering::Relaxed)
    }
}

/// A stage's progress, such as 120 of 600 steps.
#[derive(Clone, Copy, Debug)]
pub struct StepProgress<'a> {
    pub done: u64,
    pub total: u64,
    pub unit: &'a str,
}

/// The inputs and services that a running kind can use.
pub struct Context {
    pub(crate) kind: &'static str,
    pub(crate) seed: u64,
    pub(crate) inputs: BTreeMap<String, Vec<Input>>,
    pub(crate) out: PathBuf,
    pub(crate) checkpoints: PathBuf,
    pub(crate) requests: PathBuf,
    pub(crate) may_pay: bool,
    pub(crate) may_pay_again: bool,
    pub(crate) threads: Arc<AtomicUsize>,
    pub(crate) stop: StopRequest,
    pub(crate) cadence: Cadence,
    pub(crate) device: String,
    pub(crate) sink: Box<dyn FnMut(StageEvent) + Send>,
    metrics: BTreeMap<String, f64>,
}

impl Context {
    /// For attempts, and for tests of kinds. Call the `with_…` methods to override the defaults.
    pub fn new(
        kind: &'static str,
        seed: u64,
        inputs: BTreeMap<String, Vec<Input>>,
        out: PathBuf,
        checkpoints: PathBuf,
    ) -> Self {
        Self {
            kind,
            seed,
            inputs,
            out,
            requests: checkpoints.join("requests"),
            may_pay: true,
            may_pay_again: false,
            checkpoints,
            threads: Arc::new(AtomicUsize::new(1)),
            stop: StopRequest::default(),
            cadence: Cadence::default(),
            device: "cpu".to_owned(),
            sink: Box::new(|_| ()),
            metrics: BTreeMap::new(),
        }
    }

    /// Folder for the answers to paid requests; by default `requests` in the checkpoint folder.
    #[must_use]
    pub fn with_requests(mut self, requests: PathBuf) -> Self {
        self.requests = requests;
        self
    }

    /// Whether the kind may send paid requests; by default, it may.
    #[must_use]
    pub fn with_pay(mut self, may_pay: bool) -> Self {
        self.may_pay = may_pay;
        self
    }

    /// Whether the kind may pay again for lost answers; by default, it may not.
    #[must_use]
    pub fn with_pay_again(mut self, may_pay_again: bool) -> Self {
        self.may_pay_again = may_pay_again;
        self
    }

    #[must_use]
    pub fn with_threads(mut self, threads: Arc<AtomicUsize>) -> Self {
        self.threads = threads;
        self
    }

    #[must_use]
    pub(crate) fn with_stop(mut self, stop: StopRequest) -> Self {
        self.stop = stop;
        self
    }

    #[must_use]
    pub fn with_device(mut self, device: &str) -> Self {
        device.clone_into(&mut self.device);
        self
    }

    #[must_use]
    pub fn with_cadence(mut self, cadence: Cadence) -> Self {
        self.cadence = cadence;
        self
    }

    #[must_use]
    pub fn with_sink(mut self, sink: impl FnMut(StageEvent) + Send + 'static) -> Self {
        self.sink = Box::new(sink);
        self
    }

    /// The artifact at a port that takes exactly one.
    pub fn one(&self, port: &str) -> Result<&Input> {
        self.optional(port).ok_or_else(|| Error::internal(format!("{}: no input at port `{port}`", self.kind)))
    }

    pub fn optional(&self, port: &str) -> Option<&Input> {
        self.inputs.get(port).and_then(|inputs| inputs.first())
    }

    /// The artifacts at a port that takes many, in the order of the pipeline file.
    pub fn many(&self, port: &str) -> &[Input] {
        self.inputs.get(port).map_or(&[], Vec::as_slice)
    }

    /// Every input, by port.
    pub fn inputs(&self) -> &BTreeMap<String, Vec<Input>> {
        &self.inputs
    }

    /// The folder to fill; exists and is empty.
    pub fn out(&self) -> &Path {
        &self.out
    }

    /// Folder where checkpoints of this key are kept between attempts.
    pub fn checkpoints(&self) -> &Path {
        &self.checkpoints
    }

    /// Folder for the answers to paid requests: shared by all pipelines and processes of the store, and never deleted.
    /// May not exist.
    pub fn requests(&self) -> &Path {
        &self.requests
    }

    /// Whether the kind may send paid requests. It may not when an artifact that was already paid for is only being
    /// rebuilt and the user has not given `--pay`; answers kept in the store are free.
    pub fn may_pay(&self) -> bool {
        self.may_pay
    }

    /// Whether the user allowed (`--pay`) paying again for answers that were paid for and lost.
    pub fn may_pay_again(&self) -> bool {
        self.may_pay_again
    }

    /// When to write a checkpoint. Never changes a result.
    pub fn cadence(&self) -> Cadence {
        self.cadence
    }

    pub fn seed(&self) -> u64 {
        self.seed
    }

    /// Number of threads that the attempt may use now. Never changes a result.
    pub fn threads(&self) -> usize {
        self.thread_limit().load(Ordering::Relaxed).max(1)
    }

    /// The number of threads that the attempt may use, which the orchestrator changes as threads become free or are
    /// needed by others.
    pub fn thread_limit(&self) -> &Arc<AtomicUsize> {
        &self.threads
    }

    /// The key of a random generator for one purpose: BLAKE3 of (seed, kind, purpose).
    pub fn generator_key(&self, purpose: &str) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("temper generator v1");
        hasher.update(&self.seed.to_le_bytes());
        for part in [self.kind, purpose] {
            hasher.update(&(part.len() as u64).to_le_bytes());
            hasher.update(part.as_bytes());
        }
        *hasher.finalize().as_bytes()
    }

    /// A counter-based random generator for one purpose, keyed by (seed, kind, purpose).
    pub fn generator(&self, purpose: &str) -> ChaCha12Rng {
        ChaCha12Rng::from_seed(self.generator_key(purpose))
    }

    pub fn progress(&mut self, done: u64, total: u64, unit: &str, headline: Option<(&str, f64)>) {
        let headline = headline.map(|(name, value)| (name.to_owned(), value));
        (self.sink)(StageEvent::Progress { done, total, unit: unit.to_owned(), headline });
    }

    /// Reports what the stage does now, such as `sampling`, until the next progress or activity.
    pub fn activity(&mut self, what: &str) {
        (self.sink)(StageEvent::Activity { what: what.to_owned() });
    }

    /// Records seconds in the journal; never in artifacts.
    pub fn timing(&mut self, what: &str, seconds: &[(&str, f64)]) {
        let seconds = seconds.iter().map(|(name, s)| ((*name).to_owned(), *s)).collect();
        (self.sink)(StageEvent::Timing { what: what.to_owned(), seconds });
    }

    pub(crate) fn checkpointed(&mut self, StepProgress { done, total, unit }: StepProgress<'_>) {
        (self.sink)(StageEvent::Checkpoint { done, total, unit: unit.to_owned() });
    }

    /// Reports that the stage resumes from a checkpoint.
    pub fn resumed(&mut self, StepProgress { done, total, unit }: StepProgress<'_>) {
        (self.sink)(StageEvent::Resumed { done, total, unit: unit.to_owned() });
    }

    /// Reports requests that were paid for since the previous call. Never part of an artifact.
    pub fn paid(&mut self, paid: ApiUsage) {
        (self.sink)(StageEvent::Paid(paid));
    }

    pub fn warn(&mut self, message: impl Into<String>) {
        (self.sink)(StageEvent::Warning { message: message.into() });
    }

    /// Records a metric; after the kind has run, all metrics are written to the artifact's `metrics.json`.
    pub fn metric(&mut self, name: impl Into<String>, value: f64) {
        self.metrics.insert(name.into(), value);
    }

    /// Writes `metrics.json`, if there are metrics; called by the attempt after the kind has run.
    pub fn write_metrics(&self) -> Result<()> {
        if self.metrics.is_empty() {
            return Ok(());
        }
        let path = self.out.join("metrics.json");
        let mut text = serde_json::to_vec_pretty(&self.metrics).expect("a map of numbers is plain data");
        text.push(b'\n');
        disk::write(&path, text).at(&path)
    }

    /// Puts a file of an input into the output under the relative path `to`: as a hard link if the file system and
    /// Landlock allow it, else as a copy.
    pub fn link_or_copy(&self, from: &Path, to: &str) -> Result<()> {
        let to = self.out.join(to);
        if let Some(parent) = to.parent() {
            std::fs::create_dir_all(parent).at(parent)?;
        }
        if std::fs::hard_link(from, &to).is_err() {
            std::fs::copy(from, &to).at(from)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_cost_makes_the_sum_unknown() {
        let paid = |dollars: Option<f64>| ApiUsage { requests: 2, input_tokens: 3, output_tokens: 4, dollars };
        let sum = |parts: &[Option<f64>]| {
            let mut sum = ApiUsage::default();
            parts.iter().for_each(|dollars| sum.add(paid(*dollars)));
            sum
        };
        let both = sum(&[Some(0.5), Some(0.25)]);
        assert_eq!(both, ApiUsage { requests: 4, input_tokens: 6, output_tokens: 8, dollars: Some(0.75) });
        assert_eq!(sum(&[Some(0.5), None, Some(1.0)]).dollars, None);
        assert_eq!(sum(&[None, Some(1.0)]).dollars, None);
    }
}
