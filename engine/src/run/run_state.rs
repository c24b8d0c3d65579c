//! The state of a run: each instance's result, the failures in order, and the journal.

use std::time::Instant;

use serde_json::{Value, json};

use super::redact::Secrets;
use super::{Failure, RunOptions, RunOutcome};
use crate::disk;
use crate::error::{AtPath, Error, Result};
use crate::graph::Graph;
use crate::journal::{Event, Journal, PlannedAction, PlannedStage};
use crate::names::{Digest, InstanceName, Key};
use crate::plan::{DuplicateCheck, Flags, Plan, PlannedState};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum InstanceResult {
    Ran,
    Reused,
    Failed,
    /// Not run, because the instance `root` failed.
    Skipped {
        root: usize,
    },
}

pub(super) struct RunState<'a> {
    graph: &'a Graph,
    journal: Journal,
    listener: &'a mut dyn FnMut(&Event),
    keep_going: bool,
    clock: Instant,
    pub results: Vec<Option<InstanceResult>>,
    pub digests: Vec<Option<Digest>>,
    /// In order of time, each with its instance.
    failures: Vec<(usize, Failure)>,
    pub interrupted: bool,
    /// The keys known so far, by stage.
    pub duplicates: DuplicateCheck,
    /// Why the journal could not be written, which ends the run.
    journal_error: Option<Error>,
}

impl<'a> RunState<'a> {
    /// Records the start of the run, and writes its graph beside the journal.
    pub fn start(
        graph: &'a Graph,
        journal: Journal,
        options: &RunOptions,
        listener: &'a mut dyn FnMut(&Event),
    ) -> Result<Self> {
        let path = journal.folder().join("graph.json");
        let text = serde_json::to_vec(&describe(graph))
            .map_err(|e| Error::internal(format!("cannot serialise the graph: {e}")))?;
        disk::write(&path, text).at(&path)?;
        // A `--set` argument may contain a secret.
        let secrets = Secrets::of(graph.instances.iter().map(|instance| &instance.signature));
        let started = Event::Started {
            run: journal.id().to_owned(),
            pipeline: graph.name.clone(),
            profiles: options.profiles.clone(),
            targets: graph.targets.iter().map(|target| graph.instances[*target].name.to_string()).collect(),
            folder: journal.folder().to_owned(),
            command: options.command_line.iter().map(|word| secrets.redact(word)).collect(),
            file: options.file.as_deref().map(|file| secrets.redact(file)),
        };
        let (results, digests) = (vec![None; graph.instances.len()], vec![None; graph.instances.len()]);
        let mut run_state = Self {
            graph,
            journal,
            listener,
            keep_going: options.keep_going,
            clock: Instant::now(),
            results,
            digests,
            failures: Vec::new(),
            interrupted: false,
            duplicates: DuplicateCheck::default(),
            journal_error: None,
        };
        run_state.emit(started);
        Ok(run_state)
    }

    /// Writes an event to the journal and passes it to the listener. If writing fails, the run stops.
    pub fn emit(&mut self, event: Event) {
        if self.journal_error.is_none()
            && let Err(error) = self.journal.write(&event)
        {
            self.journal_error = Some(error);
        }
        (self.listener)(&event);
    }

    /// Whether no new work may start.
    pub fn stopping(&self) -> bool {
        self.interrupted || self.journal_error.is_some() || (!self.keep_going && !self.failures.is_empty())
    }

    pub fn planned(&mut self, plan: &Plan) {
        let name = |node: usize| self.graph.instances[node].name.to_string();
        let stages = plan.stages.iter().map(|stage| {
            let (action, reason, key, waits_on) = match &stage.state {
                PlannedState::Reuse { key, .. } => {
                    (PlannedAction::Reuse, "up to date".to_owned(), Some(*key), Vec::new())
                }
                PlannedState::Run { key, reason } => (PlannedAction::Run, reason.to_string(), Some(*key), Vec::new()),
                PlannedState::Pending { waits_on } => {
                    let waits_on: Vec<String> = waits_on.iter().map(|node| name(*node)).collect();
                    (PlannedAction::Pending, format!("key known after {}", waits_on.join(", ")), None, waits_on)
                }
            };
            let kind = self.graph.instances[stage.instance].kind.clone();
            let expected_seconds = stage.expected.seconds;
            PlannedStage { stage: name(stage.instance), kind, action, reason, key, waits_on, expected_seconds }
        });
        let stages = stages.collect();
        self.emit(Event::Planned { stages });
    }

    /// The flags without the forced stages that have already run.
    pub fn remaining_flags(&self, flags: &Flags) -> Flags {
        let ran = |name: &InstanceName| {
            let mut results = self.graph.instances.iter().zip(&self.results);
            results.any(|(instance, result)| instance.name == *name && *result == Some(InstanceResult::Ran))
        };
        let force = flags.force.iter().filter(|name| !ran(name)).cloned().collect();
        Flags { force, from: flags.from.clone() }
    }

    pub fn warn(&mut self, node: usize, message: String) {
        let stage = Some(self.name(node));
        self.emit(Event::Warning { stage, message });
    }

    /// Records the reuse of an instance. An instance that this run has made keeps its result.
    pub fn reuse(&mut self, node: usize, key: Key, digest: Digest, cutoff: bool) {
        if self.results[node].is_none() {
            self.results[node] = Some(InstanceResult::Reused);
            self.emit(Event::StageReused { stage: self.name(node), key, digest, cutoff });
        }
    }

    pub fn fail(&mut self, node: usize, failure: Failure) {
        self.results[node] = Some(InstanceResult::Failed);
        let (error, log, tail) = (failure.error.clone(), failure.log.clone(), failure.tail.clone());
        self.failures.push((node, failure));
        self.emit(Event::StageFailed { stage: self.name(node), error, log, tail });
    }

    pub fn skip(&mut self, node: usize, root: usize) {
        if self.results[node].is_none() {
            self.results[node] = Some(InstanceResult::Skipped { root });
            self.emit(Event::StageSkipped { stage: self.name(node), because: Some(self.name(root)) });
        }
    }

    /// Fails the instances whose damaged inputs this run will not make again.
    pub fn fail_damaged(&mut self, damaged: Vec<(usize, Digest, Error)>) {
        for (node, _, error) in damaged {
            let failure = Failure::without_log(&self.graph.instances[node].name, error.help("run again"));
            self.fail(node, failure);
        }
    }

    /// Records the instances without a result as skipped, and returns the outcome of the run.
    pub fn finish(mut self) -> Result<RunOutcome> {
        for node in 0..self.results.len() {
            if self.results[node].is_some() {
                continue;
            }
            let sources = self.graph.instances[node].inputs.iter().flat_map(|port| &port.from);
            let root = sources.map(|source| source.instance).find_map(|input| match self.results[input] {
                Some(InstanceResult::Failed) => Some(input),
                Some(InstanceResult::Skipped { root }) => Some(root),
                _ => None,
            });
            match root {
                Some(root) => self.skip(node, root),
                None => self.emit(Event::StageSkipped { stage: self.name(node), because: None }),
            }
        }
        let of = |is_selected: fn(&Option<InstanceResult>) -> bool| {
            let named = self.graph.instances.iter().zip(&self.results).filter(move |(_, result)| is_selected(result));
            named.map(|(instance, _)| instance.name.clone()).collect::<Vec<_>>()
        };
        let ran = of(|result| *result == Some(InstanceResult::Ran));
        let reused = of(|result| *result == Some(InstanceResult::Reused));
        let skipped = of(|result| matches!(result, None | Some(InstanceResult::Skipped { .. })));
        let failed: Vec<Failure> = std::mem::take(&mut self.failures).into_iter().map(|(_, failure)| failure).collect();
        let seconds = self.clock.elapsed().as_secs_f64();
        let names = |names: &[InstanceName]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
        let finished = Event::Finished {
            ran: names(&ran),
            reused: names(&reused),
            failed: failed.iter().map(|failure| failure.stage.to_string()).collect(),
            skipped: names(&skipped),
            interrupted: self.interrupted,
            seconds,
        };
        self.emit(finished);
        if let Some(error) = self.journal_error {
            return Err(error.context("the journal of the run"));
        }
        Ok(RunOutcome {
            run_id: self.journal.id().to_owned(),
            folder: self.journal.folder().to_owned(),
            ran,
            reused,
            failed,
            skipped,
            digests: self.digests,
            interrupted: self.interrupted,
            seconds,
        })
    }

    fn name(&self, node: usize) -> String {
        self.graph.instances[node].name.to_string()
    }
}

/// The content of graph.json: everything about the instances that a report needs, with inputs by name.
fn describe(graph: &Graph) -> Value {
    let name = |node: &usize| graph.instances[*node].name.to_string();
    let instances = graph.instances.iter().map(|instance| {
        let inputs = instance.inputs.iter().map(|port| {
            let from: Vec<String> = port.from.iter().map(|source| name(&source.instance)).collect();
            json!({ "port": port.port, "from": from })
        });
        json!({
            "name": instance.name.to_string(),
            "matrix": instance.matrix.iter().map(|(dimension, label)| json!([dimension, label])).collect::<Vec<_>>(),
            "kind": instance.kind,
            "params": instance.params,
            "seed": instance.signature.seeded.then_some(instance.seed),
            "output": instance.signature.output,
            "inputs": inputs.collect::<Vec<_>>(),
        })
    });
    json!({
        "name": graph.name,
        "seed": graph.seed,
        "instances": instances.collect::<Vec<_>>(),
        "targets": graph.targets.iter().map(name).collect::<Vec<_>>(),
        "not_needed": graph.not_needed.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "report": graph.report,
    })
}
