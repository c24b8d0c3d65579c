//! A test kind whose parameters control its good or bad behaviour, and its artifact type.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Duration;

use engine::artifact::{ArtifactType, Facts};
use engine::checkpoint::Checkpoints;
use engine::context::{Context, StepProgress};
use engine::error::{AtPath, Error, Result};
use engine::kind::{Access, Kind, Registry, Signature};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

pub fn registry() -> Registry {
    Registry::default().kind(Fake).artifact_type(Text)
}

/// An artifact with a file `text`.
struct Text;

impl ArtifactType for Text {
    fn name(&self) -> &'static str {
        "Text"
    }

    fn about(&self) -> &'static str {
        "a text"
    }

    fn check(&self, folder: &Path) -> Result<Facts> {
        let path = folder.join("text");
        fs::read(&path).at(&path).map(|_| Facts::default())
    }

    fn preview(&self, folder: &Path, _: usize) -> Result<String> {
        fs::read_to_string(folder.join("text")).at(folder)
    }
}

#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[serde(default, deny_unknown_fields)]
pub struct Params {
    /// Text written before the texts of the inputs.
    pub text: String,
    /// Take only this many characters of the inputs' texts.
    pub take: Option<usize>,
    /// A file to which each attempt appends a line with its stage's `text` and its process id.
    pub attempt_log: Option<PathBuf>,
    pub sleep_ms: u64,
    pub does: Option<Behaviour>,
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema, PartialEq)]
#[serde(rename_all = "snake_case")]
pub enum Behaviour {
    Fail,
    /// Fails with a transient error this many times, counted in its checkpoints.
    FailTransiently(u32),
    Panic,
    /// Writes to the first file of its first input.
    ChangeInput,
    /// Creates a file in the folder of its first input.
    AddToInput,
    /// Writes its process id into its artifact, but declares itself deterministic.
    Vary,
    /// The same, but declares itself not deterministic.
    VaryDeclared,
    /// Declares itself parallel.
    Parallel,
    /// Declares itself parallel and ends once it may use this many threads.
    AwaitThreads(usize),
    /// Prints text that looks like the protocol to standard output.
    PrintProtocol,
    /// Writes this many checkpoints.
    Checkpoint(u64),
    /// Sends paid requests.
    Pay,
    /// Writes its secrets to every output, then fails.
    LeakSecrets,
    /// Writes the names of its environment variables.
    ShowEnvironment,
    /// Starts a program that outlives it, and reports that program's process id.
    LeaveOrphan,
    /// Starts programs in its group, in a session of their own and as daemons, writes their process ids to the file
    /// `pids` beside its attempt log, and continues: to its end, or forever.
    StartProcesses {
        forever: bool,
    },
    /// Produces no `text`.
    WriteNothing,
}

struct Fake;

impl Kind for Fake {
    type Params = Params;
    const NAME: &'static str = "fake";
    const VERSION: u32 = 1;
    const ABOUT: &'static str = "test kind whose parameters script its behaviour";

    fn signature(&self, params: &Params) -> Signature {
        let mut signature = Signature::producing("Text");
        signature.open = true;
        signature.parallel = matches!(params.does, Some(Behaviour::Parallel | Behaviour::AwaitThreads(_)));
        signature.deterministic = params.does != Some(Behaviour::VaryDeclared);
        signature.env = vec!["FAKE_SECRET".into(), "FAKE_SECRET_FILE".into(), "FAKE_OPEN".into()];
        signature.secrets = vec!["FAKE_SECRET".into()];
        signature.secret_files = vec!["FAKE_SECRET_FILE".into()];
        signature
    }

    fn access(&self, params: &Params) -> Access {
        Access { read: Vec::new(), write: params.attempt_log.iter().cloned().collect() }
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        let mut text = params.text.clone();
        let inputs: Vec<PathBuf> = ctx.inputs().values().flatten().map(|input| input.folder.join("text")).collect();
        for path in &inputs {
            let read = fs::read_to_string(path).at(path)?;
            text.extend(read.chars().take(params.take.unwrap_or(usize::MAX)));
        }
        if let Some(attempt_log) = &params.attempt_log {
            let mut attempt_log = OpenOptions::new().create(true).append(true).open(attempt_log).at(attempt_log)?;
            attempt_log.write_all(format!("{} {}\n", params.text, std::process::id()).as_bytes()).at("attempt log")?;
        }
        eprintln!("{} at work", params.text);
        ctx.progress(1, 2, "steps", Some(("loss", 0.5)));
        ctx.metric("length", text.len() as f64);
        std::thread::sleep(Duration::from_millis(params.sleep_ms));
        let pid = std::process::id();
        match params.does {
            None | Some(Behaviour::Parallel) => {}
            Some(Behaviour::AwaitThreads(threads)) => {
                while ctx.threads() != threads {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            Some(Behaviour::Fail) => return Err(Error::user("fails as requested")),
            Some(Behaviour::FailTransiently(times)) => {
                let count = fs::read_dir(ctx.checkpoints()).at(ctx.checkpoints())?.count();
                if count < times as usize {
                    fs::write(ctx.checkpoints().join(count.to_string()), "").at(ctx.checkpoints())?;
                    return Err(Error::environment("busy just now").transient());
                }
            }
            Some(Behaviour::Panic) => panic!("panics as requested"),
            Some(Behaviour::ChangeInput) => {
                let mut permissions = fs::metadata(&inputs[0]).at(&inputs[0])?.permissions();
                #[allow(clippy::permissions_set_readonly_false)] // the point of it
                permissions.set_readonly(false);
                fs::set_permissions(&inputs[0], permissions).at(&inputs[0])?;
                fs::write(&inputs[0], "changed").at(&inputs[0])?;
            }
            Some(Behaviour::AddToInput) => {
                let added = inputs[0].with_file_name("added");
                fs::write(&added, "").at(&added)?;
            }
            Some(Behaviour::Vary | Behaviour::VaryDeclared) => text.push_str(&pid.to_string()),
            Some(Behaviour::PrintProtocol) => {
                println!(
                    "{}",
                    serde_json::json!({ "tell": "failed", "error": { "blame": "ours", "message": "not from the protocol" } })
                );
                println!("not even JSON");
            }
            Some(Behaviour::LeakSecrets) => {
                let file = std::env::var("FAKE_SECRET_FILE").unwrap_or_default();
                let from_file = fs::read_to_string(file).unwrap_or_default();
                let secret = format!("{} and {}", std::env::var("FAKE_SECRET").unwrap_or_default(), from_file.trim());
                eprintln!("the secret is {secret}");
                ctx.warn(format!("the secret is {secret}"));
                return Err(Error::user(format!("the secret is {secret}")));
            }
            Some(Behaviour::ShowEnvironment) => {
                let mut names: Vec<String> = std::env::vars().map(|(name, _)| name).collect();
                names.sort();
                text = names.join("\n");
            }
            Some(Behaviour::LeaveOrphan) => {
                let orphan = std::process::Command::new("sleep").arg("600").spawn().at("sleep")?;
                ctx.warn(format!("orphan {}", orphan.id()));
            }
            Some(Behaviour::StartProcesses { forever }) => {
                let pids = params.attempt_log.unwrap_or_default().with_file_name("pids");
                let script = format!(
                    ": > {0}; for how in '' setsid; do $how sh -c 'echo $$; (sleep 600 & echo $!; wait) & exec sleep 600' >> {0} & done; \
                     while [ $(wc -l < {0}) -lt 4 ]; do sleep 0.01; done; mv {0} {0}.all",
                    pids.display()
                );
                std::process::Command::new("sh").args(["-c", &script]).status().at("sh")?;
                if forever {
                    std::thread::sleep(Duration::from_secs(600));
                }
            }
            Some(Behaviour::Checkpoint(count)) => {
                let mut checkpoints = Checkpoints::new(ctx, 1);
                let read = |folder: &Path| fs::read_to_string(folder.join("done")).at(folder);
                let from = checkpoints.latest(ctx, read)?.map_or(0, |(done, _)| done.parse().expect("a number"));
                for done in from + 1..=count {
                    let progress = StepProgress { done, total: count, unit: "steps" };
                    checkpoints
                        .publish(ctx, progress, |folder| fs::write(folder.join("done"), done.to_string()).at(folder));
                }
            }
            Some(Behaviour::Pay) if !ctx.may_pay() => return Err(Error::environment("would pay again")),
            Some(Behaviour::Pay) => {}
            Some(Behaviour::WriteNothing) => return Ok(()),
        }
        fs::write(ctx.out().join("text"), text).at(ctx.out())
    }
}
