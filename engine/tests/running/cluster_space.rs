//! The environment of a test with a batch system: orchestrators in processes of their own, and a fake Slurm.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use engine::document::{ExecutorSettings, Resources, SlurmSettings, SubmitSettings, SystemSettings};
use engine::error::Error;
use engine::journal::Event;
use engine::names::Digest;
use engine::store::Store;
use serde::{Deserialize, Serialize};

use crate::space::{Stage, TestSpace, is_alive, wait_for};

/// The batch system of a test.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Cluster {
    pub slurm: bool,
    pub submit: String,
    pub max_jobs: usize,
    pub probe: bool,
    /// Whether all stages run there; otherwise it is only defined.
    pub is_used: bool,
    /// Threads, MiB, GPUs, seconds.
    pub resources: Option<[u64; 4]>,
}

/// A process in the background; its id is the job's.
const BACKGROUND: &str = "setsid sh {script} >> {log} 2>&1 < /dev/null & echo $!";

impl Cluster {
    pub fn background() -> Self {
        Self { slurm: false, submit: BACKGROUND.into(), max_jobs: 10, probe: false, is_used: true, resources: None }
    }

    pub fn slurm() -> Self {
        Self { slurm: true, ..Self::background() }
    }

    pub fn settings(&self) -> ExecutorSettings {
        let system = match self.slurm {
            true => SystemSettings::Slurm(SlurmSettings {
                partition: Some("p1".into()),
                account: None,
                flags: vec!["--qos=low".into()],
                signal: Duration::from_secs(60),
                requeue: true,
            }),
            false => SystemSettings::Submit(SubmitSettings {
                submit: self.submit.clone(),
                // A zombie counts as gone.
                status: "for p in {jobs}; do grep -qs '^State:.[^Z]' /proc/$p/status && echo $p; done; true".into(),
                cancel: "kill {job}".into(),
            }),
        };
        ExecutorSettings {
            system,
            max_jobs: self.max_jobs,
            interval: Duration::from_millis(50),
            grace: Duration::from_millis(400),
            retries: 2,
            backoff: Duration::from_millis(5),
            probe: self.probe,
            resources: Resources::default(),
        }
    }

    pub fn resources(&self) -> Resources {
        self.resources.map_or_else(Resources::default, |[threads, memory, gpus, seconds]| Resources {
            threads: Some(threads),
            memory: Some(memory),
            gpus: Some(gpus),
            time: Some(Duration::from_secs(seconds)),
            ..Resources::default()
        })
    }
}

/// A test space with a batch system, and orchestrators in processes of their own.
pub struct ClusterSpace {
    pub space: TestSpace,
    /// The folder of the fake Slurm.
    pub slurm: PathBuf,
}

/// A run in another process.
pub struct ClusterRun {
    pub events: Vec<Event>,
    pub code: Option<i32>,
    pub stderr: String,
}

impl ClusterSpace {
    pub fn new(stages: &[Stage], cluster: Cluster) -> Self {
        let mut space = TestSpace::new(stages);
        space.request.cluster = Some(cluster);
        let slurm = space.dir.path().join("slurm");
        fs::create_dir(&slurm).unwrap();
        Self { space, slurm }
    }

    pub fn start(&self) -> Child {
        let file = self.space.write_request();
        let fakes = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/running/fake_slurm");
        let path = format!("{}:{}", fakes.display(), std::env::var("PATH").unwrap());
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .arg("orchestrate")
            .arg(file)
            .env("PATH", path)
            .env("FAKE_SLURM", &self.slurm)
            .env("FAKE_SECRET", "hush-hush");
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap()
    }

    pub fn run(&self) -> ClusterRun {
        self.end(self.start())
    }

    pub fn end(&self, orchestrator: Child) -> ClusterRun {
        let output = orchestrator.wait_with_output().unwrap();
        let stdout = String::from_utf8(output.stdout).unwrap();
        let events = stdout.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
        let code = output.status.code().or(output.status.signal().map(|signal| 128 + signal));
        ClusterRun { events, code, stderr: String::from_utf8_lossy(&output.stderr).into_owned() }
    }

    /// Starts an orchestrator and kills it when `stage` is at work; returns the process id of the attempt.
    pub fn killed_during(&self, stage: &str) -> i32 {
        let mut orchestrator = self.start();
        let attempt = self.space.pid_of(stage);
        wait_for(|| self.leases().iter().all(|lease| lease.contains(r#""job": ""#)).then_some(()));
        orchestrator.kill().unwrap();
        orchestrator.wait().unwrap();
        assert!(is_alive(attempt));
        attempt
    }

    pub fn leases(&self) -> Vec<String> {
        let locks = fs::read_dir(self.space.request.store.join("locks")).unwrap().flatten();
        let leases = locks.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "lease"));
        leases.filter_map(|path| fs::read_to_string(path).ok()).collect()
    }

    pub fn lease_file(&self) -> PathBuf {
        let locks = fs::read_dir(self.space.request.store.join("locks")).unwrap().flatten();
        let mut leases = locks.map(|entry| entry.path()).filter(|path| path.extension().is_some_and(|e| e == "lease"));
        leases.next().expect("a lease")
    }

    /// What the fake Slurm recorded.
    pub fn recorded(&self, name: &str) -> String {
        fs::read_to_string(self.slurm.join(name)).unwrap_or_default()
    }

    /// Runs a command of the fake Slurm.
    pub fn slurm(&self, command: &str, arguments: &[&str]) {
        let fakes = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/running/fake_slurm");
        let mut command = Command::new(fakes.join(command));
        assert!(command.args(arguments).env("FAKE_SLURM", &self.slurm).status().unwrap().success());
    }

    pub fn store(&self) -> Store {
        self.space.store()
    }
}

impl ClusterRun {
    /// The digests of the stages that ran, in order of the stages' names.
    pub fn digests(&self) -> Vec<Digest> {
        let mut made: Vec<(&String, Digest)> = self
            .events
            .iter()
            .filter_map(|event| match event {
                Event::StageFinished { stage, digest, .. } => Some((stage, *digest)),
                _ => None,
            })
            .collect();
        made.sort();
        made.into_iter().map(|(_, digest)| digest).collect()
    }

    /// Stage and whether an earlier run submitted it, for each job.
    pub fn jobs(&self) -> Vec<(&str, bool)> {
        let jobs = self.events.iter().filter_map(|event| match event {
            Event::Job { stage, attached, .. } => Some((stage.as_str(), *attached)),
            _ => None,
        });
        jobs.collect()
    }

    pub fn failure(&self) -> &Error {
        let failed = self.events.iter().find_map(|event| match event {
            Event::StageFailed { error, .. } => Some(error),
            _ => None,
        });
        failed.unwrap_or_else(|| panic!("nothing failed: {:?}\n{}", self.events, self.stderr))
    }

    pub fn retries(&self) -> Vec<&str> {
        let retries = self.events.iter().filter_map(|event| match event {
            Event::Retrying { error, .. } => Some(error.message.as_str()),
            _ => None,
        });
        retries.collect()
    }

    pub fn assert_ok(&self) {
        assert_eq!(self.code, Some(0), "{:?}\n{}", self.events, self.stderr);
    }
}
