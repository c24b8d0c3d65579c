//! The environment of one test: a store, a graph written as a list of stages, and runs on them, in this process or
//! another.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use engine::error::Result;
use engine::graph::{Graph, InputSource, Instance, PortInputs};
use engine::journal::Event;
use engine::kind::Arity;
use engine::names::{Digest, InstanceName};
use engine::plan::{Flags, Plan, plan_with_view};
use engine::remote::{Address, CombinedStore, Remote};
use engine::run::{RunOptions, RunOutcome, run};
use engine::store::Store;
use serde::{Deserialize, Serialize};

use crate::cluster_space::Cluster;
use crate::fake::{Behaviour, Params, registry};

/// One stage of a test's pipeline. Its text is its name unless set otherwise.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Stage {
    pub name: String,
    pub needs: Vec<String>,
    pub params: Params,
}

pub fn stage(name: &str, needs: &[&str]) -> Stage {
    let needs = needs.iter().map(|need| (*need).to_owned()).collect();
    Stage { name: name.into(), needs, params: Params { text: name.into(), ..Params::default() } }
}

impl Stage {
    pub fn does(mut self, behaviour: Behaviour) -> Self {
        self.params.does = Some(behaviour);
        self
    }

    pub fn with(mut self, change: impl FnOnce(&mut Params)) -> Self {
        change(&mut self.params);
        self
    }
}

fn name(of: &str) -> InstanceName {
    let (stage, label) = of.split_once('/').unwrap_or((of, ""));
    let labels = if label.is_empty() { vec![] } else { vec![label.to_owned()] };
    InstanceName { stage: stage.to_owned().try_into().unwrap(), labels }
}

/// Stages in order, inputs first; all are targets except those whose name begins with `_`.
pub fn graph(stages: &[Stage]) -> Graph {
    let registry = registry();
    let kind = registry.get_kind("fake").unwrap();
    let instances = stages.iter().map(|stage| {
        let params = serde_json::to_value(&stage.params).unwrap();
        let inputs = stage.needs.iter().enumerate().map(|(i, need)| {
            let instance = stages.iter().position(|s| s.name == *need).unwrap();
            let from = vec![InputSource { instance, label: need.clone() }];
            PortInputs { port: format!("in{i:04}"), arity: Arity::One, from }
        });
        Instance {
            name: name(&stage.name),
            matrix: vec![],
            kind: "fake".into(),
            signature: kind.signature(&params).unwrap(),
            params,
            seed: 0,
            inputs: inputs.collect(),
            placement: Default::default(),
        }
    });
    let targets = (0..stages.len()).filter(|i| !stages[*i].name.starts_with('_')).collect();
    Graph {
        instances: instances.collect(),
        targets,
        not_needed: vec![],
        name: "test".into(),
        seed: 0,
        report: engine::document::ReportSettings::default(),
        remote: None,
        on_finish: Vec::new(),
        executors: Default::default(),
        pools: Default::default(),
    }
}

#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct RunRequest {
    pub store: PathBuf,
    pub stages: Vec<Stage>,
    pub jobs: usize,
    pub keep_going: bool,
    pub force: Vec<String>,
    pub pay: bool,
    /// Whether to confine attempts; most stages here do what confinement forbids, to show that it would be noticed.
    #[serde(default)]
    pub confine: bool,
    /// The folder of a remote store.
    #[serde(default)]
    pub remote: Option<PathBuf>,
    /// Where all stages run, if not here.
    #[serde(default)]
    pub cluster: Option<Cluster>,
}

impl RunRequest {
    pub fn execute(&self, listen: impl FnMut(&Event)) -> (RunOutcome, Plan) {
        self.try_execute(listen).unwrap()
    }

    pub fn try_execute(&self, mut listen: impl FnMut(&Event)) -> Result<(RunOutcome, Plan)> {
        let registry = registry();
        let store = Store::open(&self.store)?;
        let mut graph = graph(&self.stages);
        if let Some(cluster) = &self.cluster {
            graph.executors.insert("cluster".into(), cluster.settings());
            graph.place_on(if cluster.is_used { "cluster" } else { "local" })?;
            graph.instances.iter_mut().for_each(|instance| instance.placement.resources = cluster.resources());
        }
        let force: BTreeSet<InstanceName> = self.force.iter().map(|stage| name(stage)).collect();
        let flags = Flags { force, from: BTreeSet::new() };
        let remote = self.remote.clone().map(|path| Remote::open(&Address::Folder(path), &store, false));
        let remote = remote.transpose()?.map(Arc::new);
        let combined = CombinedStore { store: &store, remote: remote.as_deref() };
        let plan = plan_with_view(&graph, &registry, &store, &combined, &flags)?;
        let options = RunOptions {
            jobs: self.jobs,
            keep_going: self.keep_going,
            pay: self.pay,
            confine: self.confine,
            flags,
            command: std::env::current_exe().unwrap(),
            retry_delay: Duration::from_millis(5),
            // As if a secret had been given with `--set`.
            command_line: std::env::var("FAKE_SECRET").map(|secret| format!("text={secret}")).into_iter().collect(),
            remote,
            // Faults count the steps of all processes.
            env: std::env::var("TEMPER_FAULT").map(|fault| ("TEMPER_FAULT".to_owned(), fault)).into_iter().collect(),
            device: std::env::var("FAKE_DEVICE").unwrap_or_else(|_| "cpu".to_owned()),
            ..RunOptions::default()
        };
        let outcome = run(&graph, &plan, &store, &registry, &options, &mut listen)?;
        Ok((outcome, plan))
    }
}

pub struct TestSpace {
    pub dir: tempfile::TempDir,
    pub request: RunRequest,
}

/// The result of a run, with stages as names.
pub struct RunResult {
    pub outcome: RunOutcome,
    pub plan: Plan,
    pub events: Vec<Event>,
    pub ran: String,
    pub reused: String,
    pub failed: String,
    pub skipped: String,
}

impl TestSpace {
    pub fn new(stages: &[Stage]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = dir.path().join("cache");
        let request = RunRequest {
            store,
            stages: stages.to_vec(),
            jobs: 2,
            keep_going: false,
            force: vec![],
            pay: false,
            confine: false,
            remote: None,
            cluster: None,
        };
        let mut space = Self { dir, request };
        space.set_attempt_log();
        space
    }

    pub fn set_attempt_log(&mut self) {
        let attempt_log = self.dir.path().join("attempts");
        self.request.stages.iter_mut().for_each(|stage| stage.params.attempt_log = Some(attempt_log.clone()));
    }

    /// Replaces the stage with the same name.
    pub fn change(&mut self, stage: Stage) {
        let place = self.request.stages.iter().position(|s| s.name == stage.name).unwrap();
        self.request.stages[place] = stage;
        self.set_attempt_log();
    }

    pub fn store(&self) -> Store {
        Store::open(&self.request.store).unwrap()
    }

    pub fn run(&self) -> RunResult {
        let mut events = Vec::new();
        let (outcome, plan) = self.request.execute(|event| events.push(event.clone()));
        let names = |names: &[InstanceName]| names.iter().map(ToString::to_string).collect::<Vec<_>>().join(" ");
        let failed: Vec<InstanceName> = outcome.failed.iter().map(|failure| failure.stage.clone()).collect();
        let (ran, reused) = (names(&outcome.ran), names(&outcome.reused));
        let (failed, skipped) = (names(&failed), names(&outcome.skipped));
        RunResult { outcome, plan, events, ran, reused, failed, skipped }
    }

    /// Starts an orchestrator in its own process; its events appear on its standard output.
    pub fn start(&self) -> (Child, BufReader<ChildStdout>) {
        self.start_through(&[])
    }

    /// Writes the file for an orchestrator in its own process.
    pub fn write_request(&self) -> PathBuf {
        let file = tempfile::NamedTempFile::new_in(self.dir.path()).unwrap();
        serde_json::to_writer(&file, &self.request).unwrap();
        file.into_temp_path().keep().unwrap()
    }

    /// The same through another program, which gets the command line of this one as arguments.
    pub fn start_through(&self, through: &[&str]) -> (Child, BufReader<ChildStdout>) {
        let path = self.write_request();
        let this = std::env::current_exe().unwrap();
        let mut command = Command::new(through.first().map_or(this.as_os_str(), AsRef::as_ref));
        command.args(through.iter().skip(1)).args(through.first().map(|_| &this));
        let mut child = command.arg("orchestrate").arg(path).stdout(Stdio::piped()).spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        (child, stdout)
    }

    /// The stages with the process ids of their attempts, in order.
    pub fn attempt_log(&self) -> Vec<(String, i32)> {
        let text = std::fs::read_to_string(self.dir.path().join("attempts")).unwrap_or_default();
        let entries = text.lines().filter_map(|line| line.split_once(' '));
        entries.map(|(stage, pid)| (stage.to_owned(), pid.parse().unwrap())).collect()
    }

    /// The process id of a stage's attempt, once it is running.
    pub fn pid_of(&self, stage: &str) -> i32 {
        wait_for(|| self.attempt_log().iter().rev().find(|(name, _)| name == stage).map(|(_, pid)| *pid))
    }

    pub fn text(&self, digest: &Digest) -> String {
        std::fs::read_to_string(self.store().artifact_folder(digest).join("text")).unwrap()
    }

    pub fn count(&self, folder: &str) -> usize {
        std::fs::read_dir(self.request.store.join(folder)).unwrap().count()
    }
}

pub fn events(lines: BufReader<ChildStdout>) -> Vec<Event> {
    lines.lines().map_while(|line| serde_json::from_str(&line.ok()?).ok()).collect()
}

/// Polls until `there` returns a value; panics after a minute.
pub fn wait_for<T>(mut poll: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        match poll() {
            Some(found) => return found,
            None if start.elapsed() > Duration::from_secs(60) => panic!("waited for more than a minute"),
            None => std::thread::sleep(Duration::from_millis(5)),
        }
    }
}

pub fn is_alive(pid: i32) -> bool {
    // A zombie has no memory any more.
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    status.contains("VmSize")
}

/// The processes whose working folder lies below `folder`.
pub fn processes_below(folder: &Path) -> Vec<i32> {
    let below = |pid: &i32| std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(folder));
    let processes = std::fs::read_dir("/proc").unwrap().flatten();
    processes.filter_map(|process| process.file_name().to_str()?.parse().ok()).filter(below).collect()
}
