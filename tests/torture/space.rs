//! A folder with a pipeline and a store, runs of the real binary in it, and the claims about the store.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use engine::names::Key;
use engine::store::{Presence, Store, verify};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

/// Programs, and a stage that trains and leaves checkpoints. `variant` changes everything below `start`, but not the bytes of
/// `cut`. The programs stop at the first failure, as those of a pipeline must: one of theirs may be killed.
pub const PIPELINE: &str = r#"
version: 1
seed: 3
stages:
  start: { uses: command, with: { run: [sh, -ec, 'seq 1 300 > $TEMPER_OUTPUT/x; echo $0 >> $TEMPER_OUTPUT/x', '0'], output: Files } }
  cut: { uses: command, needs: { x: start }, with: { run: [sh, -ec, 'head -n 200 $TEMPER_INPUT_x/x > $TEMPER_OUTPUT/x'], output: Files } }
  part:
    uses: command
    matrix: { k: [1, 2, 3] }
    needs: { x: start, y: cut }
    with: { run: [sh, -ec, 'sed "s/$/ $0/" $TEMPER_INPUT_x/x > $TEMPER_OUTPUT/x; mkdir $TEMPER_OUTPUT/y; cat $TEMPER_INPUT_y/x > $TEMPER_OUTPUT/y/z', '${k}'], output: Files }
  end: { uses: command, needs: { parts: 'part[*]' }, with: { run: [sh, -ec, 'for p in $TEMPER_INPUT_parts; do cat $p/x; done > $TEMPER_OUTPUT/x'], output: Files } }
  posts: { uses: dataset.tinytldr, with: { posts: 60 } }
  tokenizer: { uses: tokenizer.train, needs: { posts: posts }, with: { vocab_size: 300 } }
  base:
    uses: model.pretrain
    needs: { posts: posts, tokenizer: tokenizer }
    with: { n_embd: 8, n_layer: 1, n_head: 1, n_positions: 128, steps: 12, batch: 2, warmup: 1, lr: 1.0e-3 }
"#;

pub struct Options {
    pub seed: u64,
    pub count: u64,
    pub processes: u64,
    pub seconds: u64,
    pub all: bool,
}

impl Options {
    /// `None`: not understood.
    pub fn parse(args: &[&str]) -> Option<Self> {
        let mut options = Self { seed: 1, count: 100, processes: 8, seconds: 60, all: false };
        let mut args = args.iter();
        while let Some(arg) = args.next() {
            let number = match *arg {
                "--seed" => &mut options.seed,
                "--count" => &mut options.count,
                "--processes" => &mut options.processes,
                "--seconds" => &mut options.seconds,
                "--all" => {
                    options.all = true;
                    continue;
                }
                _ => return None,
            };
            *number = args.next()?.parse().ok()?;
        }
        Some(options)
    }
}

/// The digests of a run by stage.
pub type Digests = BTreeMap<String, String>;

pub struct Space {
    folder: tempfile::TempDir,
}

impl Space {
    pub fn new(pipeline: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder can be made");
        std::fs::write(folder.path().join("p.yaml"), pipeline).expect("the temporary folder can be written to");
        Self { folder }
    }

    pub fn path(&self) -> &Path {
        self.folder.path()
    }

    pub fn store_folder(&self) -> PathBuf {
        self.path().join("cache")
    }

    pub fn store(&self) -> Store {
        Store::open(&self.store_folder()).unwrap_or_else(|e| panic!("the store cannot be opened: {e}"))
    }

    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_temper"));
        command.args(arguments).current_dir(self.path()).env("TEMPER_STORE", self.store_folder());
        command
    }

    pub fn temper(&self, arguments: &[&str]) -> Output {
        self.command(arguments).output().expect("the binary starts")
    }

    /// Starts a run in a process group of its own.
    pub fn start(&self, arguments: &[&str]) -> Child {
        let mut command =
            self.command(&[&["run", "p.yaml", "-j", "2", "--json", "--checkpoint-every", "2"], arguments].concat());
        command.process_group(0).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("the binary starts")
    }

    /// Runs to the end.
    pub fn run(&self, arguments: &[&str]) -> Output {
        self.start(arguments).wait_with_output().expect("the output can be read")
    }

    /// Runs to the end, which must be a good one.
    pub fn complete(&self, arguments: &[&str]) -> Digests {
        let output = self.run(arguments);
        assert!(output.status.success(), "{}", told(&output));
        digests(&output)
    }

    /// The processes at work in the store, besides the orchestrator.
    pub fn attempts(&self) -> Vec<i32> {
        let store = self.store_folder();
        let below = |pid: &i32| std::fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd.starts_with(&store));
        let processes = std::fs::read_dir("/proc").expect("/proc can be read").flatten();
        processes.filter_map(|process| process.file_name().to_str()?.parse().ok()).filter(below).collect()
    }

    /// Waits until no attempt is alive.
    pub fn wait_for_attempts(&self) {
        let clock = Instant::now();
        while !self.attempts().is_empty() {
            assert!(clock.elapsed() < Duration::from_secs(60), "processes outlive their run: {:?}", self.attempts());
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Checks that nothing is damaged, and that every record is whole; returns their keys.
    pub fn check(&self) -> BTreeSet<Key> {
        let store = self.store();
        let report = verify(&store).unwrap_or_else(|e| panic!("verify: {e}"));
        assert!(report.is_intact(), "{report:?}");
        let records = store.actions().unwrap_or_else(|e| panic!("{e}"));
        for record in &records {
            let presence = store.presence(&record.digest).unwrap_or_else(|e| panic!("{e}"));
            assert_eq!(presence, Presence::Intact, "the artifact of {}", record.provenance.stage);
        }
        let quarantined = std::fs::read_dir(store.root().join("quarantine")).expect("a folder of the store").count();
        assert_eq!(quarantined, 0, "something counted as damaged");
        records.into_iter().map(|record| record.key).collect()
    }
}

pub fn told(output: &Output) -> String {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    format!("{}\n{}{}", output.status, text(&output.stdout), text(&output.stderr))
}

/// The digests that a run of `--json` printed.
pub fn digests(output: &Output) -> Digests {
    let text = String::from_utf8_lossy(&output.stdout);
    let events = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let digest = |event: Value| Some((event["stage"].as_str()?.to_owned(), event["digest"].as_str()?.to_owned()));
    events.filter_map(digest).collect()
}

/// Sends SIGKILL; the process may be gone.
pub fn kill(pid: i32) {
    if let Some(pid) = Pid::from_raw(pid) {
        let _ = kill_process(pid, Signal::KILL);
    }
}
