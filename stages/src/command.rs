//! `command`: any program as a stage. Knows no artifact type but by name.

use std::collections::{BTreeMap, BTreeSet};
use std::env::VarError;
use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};
use std::process::Stdio;

use engine::context::Context;
use engine::error::{At, Error, Result};
use engine::external::InputFiles;
use engine::kind::{Kind, Signature};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub struct Command;

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Params {
    /// The program and its arguments. An argument that names one of `files` becomes that file's absolute path.
    pub run: Vec<String>,
    /// The artifact type that it fills `TEMPER_OUTPUT` with; `Files` for anything.
    pub output: String,
    /// Scripts and data that belong to the key, by content: files, folders, patterns. Hidden files of a folder do not belong to it.
    #[serde(default)]
    pub files: InputFiles,
    /// Environment variables, part of the key.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Environment variables to pass on; their values are secrets, not part of the key and redacted everywhere.
    #[serde(default)]
    pub pass_env: Vec<String>,
    /// Given to the program as JSON in `TEMPER_PARAMS`.
    #[serde(default)]
    pub params: Value,
    /// Whether the same inputs always give the same bytes.
    #[serde(default = "yes")]
    pub deterministic: bool,
    /// Whether the stage's seed is part of the key and given in `TEMPER_SEED`.
    #[serde(default)]
    pub seeded: bool,
}

fn yes() -> bool {
    true
}

/// What the program's environment has of ours.
const KEPT: [&str; 4] = ["PATH", "HOME", "LANG", "TMPDIR"];

fn is_variable(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(|c: char| c.is_ascii_digit())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

impl Kind for Command {
    type Params = Params;

    const NAME: &'static str = "command";
    const VERSION: u32 = 1;
    const ABOUT: &'static str = "runs any program on its inputs";

    fn signature(&self, params: &Params) -> Signature {
        let mut signature = Signature::gives(params.output.clone());
        signature.open = true;
        signature.seeded = params.seeded;
        signature.deterministic = params.deterministic;
        signature.env.clone_from(&params.pass_env);
        signature.secrets.clone_from(&params.pass_env);
        signature
    }

    fn check(&self, params: &Params) -> Vec<(String, String)> {
        let mut faults = Vec::new();
        if params.run.first().is_none_or(|program| program.is_empty()) {
            faults.push(("run".to_owned(), "expected a program and its arguments".to_owned()));
        }
        if params.run.iter().any(|arg| arg.contains('\0')) {
            faults.push(("run".to_owned(), "an argument holds a NUL".to_owned()));
        }
        for name in params.env.keys().chain(&params.pass_env) {
            let field = if params.env.contains_key(name) { "env" } else { "pass_env" };
            if !is_variable(name) {
                faults.push((field.to_owned(), format!("`{name}` is no name of an environment variable")));
            } else if name.starts_with("TEMPER_") {
                faults.push((field.to_owned(), format!("`{name}`: names in TEMPER_ are ours")));
            }
        }
        for (name, value) in &params.env {
            if value.contains('\0') {
                faults.push((format!("env.{name}"), "the value holds a NUL".to_owned()));
            }
        }
        faults
    }

    fn check_environment(&self, params: &Params) -> Result<()> {
        params.pass_env.iter().try_for_each(|name| passed(name).map(drop))
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        let mut files: Vec<PathBuf> = params.files.written().filter(|path| path.exists()).collect();
        files.extend_from_slice(params.files.files()?);
        let argv = params.run.iter().map(|arg| resolve(arg, &files)).collect::<Result<Vec<_>>>()?;
        let [program, args @ ..] = argv.as_slice() else { return Err(Error::ours("command: no program")) };
        let secrets = params.pass_env.iter().map(|name| passed(name)).collect::<Result<Vec<_>>>()?;

        let mut command = std::process::Command::new(program);
        command.args(args).env_clear().envs(KEPT.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
        command.envs(&params.env).envs(secrets.iter().map(|(name, value)| (name, value)));
        for (port, inputs) in ctx.inputs() {
            // Folders of several inputs at one port: a line each.
            let folders: Vec<String> = inputs.iter().map(|input| input.folder.display().to_string()).collect();
            command.env(format!("TEMPER_INPUT_{}", port.replace('-', "_")), folders.join("\n"));
        }
        command.env("TEMPER_OUTPUT", ctx.out()).env("TEMPER_PARAMS", params.params.to_string());
        command.env("TEMPER_THREADS", ctx.threads().to_string());
        if params.seeded {
            command.env("TEMPER_SEED", ctx.seed().to_string());
        }
        // The folder to fill lies in the attempt's folder.
        command.current_dir(ctx.out().parent().unwrap_or_else(|| ctx.out()));
        // Our standard output speaks to the orchestrator: the program's goes to the log, as its standard error does. The
        // orchestrator shows the end of the log beside an error.
        let log = std::io::stderr().as_fd().try_clone_to_owned();
        let log = log.map_err(|e| Error::surroundings(format!("no log for the program: {e}")))?;
        command.stdin(Stdio::null()).stdout(log);

        let mut child = command.spawn().map_err(|e| {
            let error = Error::yours(format!("`{program}` cannot be started: {e}"));
            error.help("the program must be on PATH, or be one of `files` with its executable bit set")
        })?;
        let status = child.wait().map_err(|e| Error::surroundings(format!("`{program}`: {e}")))?;
        let called = redact(params.run.join(" "), &secrets);
        if !status.success() {
            return Err(Error::yours(format!("`{called}` failed with {status}")));
        }
        if !ctx.out().is_dir() {
            return Err(Error::yours(format!("`{called}`: the program removed its output folder"))
                .help("it must leave TEMPER_OUTPUT where it is, and fill it"));
        }
        own(ctx.out())
    }
}

/// A variable of ours that the program is given.
fn passed(name: &str) -> Result<(String, String)> {
    match std::env::var(name) {
        Ok(value) => Ok((name.to_owned(), value)),
        Err(e) => {
            let what = if e == VarError::NotPresent { "not set" } else { "not UTF-8" };
            Err(Error::surroundings(format!("`pass_env`: {name} is {what}"))
                .help("set it in the environment that `temper` runs in, or take it out of `pass_env`"))
        }
    }
}

/// Puts a copy of each file in its place: a process that the program left behind may hold the file itself open.
fn own(folder: &Path) -> Result<()> {
    let entries = std::fs::read_dir(folder).and_then(Iterator::collect::<std::io::Result<Vec<_>>>).at(folder)?;
    let copy = folder.join(format!(".copy-{}", std::process::id()));
    for entry in entries {
        let (path, kind) = (entry.path(), entry.file_type().at(folder)?);
        if kind.is_dir() {
            own(&path)?;
        } else if kind.is_file() {
            std::fs::copy(&path, &copy).and_then(|_| std::fs::rename(&copy, &path)).at(&path)?;
        }
    }
    Ok(())
}

fn redact(mut text: String, secrets: &[(String, String)]) -> String {
    for (name, value) in secrets.iter().filter(|(_, value)| !value.is_empty()) {
        text = text.replace(value.as_str(), &format!("<{name}>"));
    }
    text
}

/// The absolute path of the one of `files` that `arg` names, by its whole relative path or the end of it; else `arg` itself.
fn resolve(arg: &str, files: &[PathBuf]) -> Result<String> {
    let relative: PathBuf = Path::new(arg).components().filter(|part| *part != Component::CurDir).collect();
    if relative.as_os_str().is_empty() || relative.is_absolute() {
        return Ok(arg.to_owned());
    }
    // What leads out of the pipeline's folder was resolved in `files` too: its end still tells which it is.
    let end: PathBuf = relative.components().skip_while(|part| *part == Component::ParentDir).collect();
    let found: BTreeSet<&PathBuf> = files.iter().filter(|path| path.ends_with(&end)).collect();
    match Vec::from_iter(found).as_slice() {
        [] => Ok(arg.to_owned()),
        [path] => {
            path.to_str().map(str::to_owned).ok_or_else(|| Error::yours(format!("{}: not UTF-8", path.display())))
        }
        [a, b, ..] => Err(Error::yours(format!("`run`: `{arg}` may be {} or {}", a.display(), b.display()))
            .help("name the file by a longer path")),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use crate::testing::{Bench, run};
    use crate::types::Files;

    #[test]
    fn a_program_finds_its_inputs_parameters_and_output() {
        let mut bench = Bench::new();
        bench.input("posts", "Files", |folder| {
            std::fs::write(folder.join("x.txt"), "from the input").map_err(|e| Error::ours(e.to_string()))
        });
        let script = bench.write(
            "s.sh",
            "cat \"$TEMPER_INPUT_posts/x.txt\" > \"$TEMPER_OUTPUT/y.txt\"; echo \"$TEMPER_PARAMS|$MINE|$1|${USER-none}\" >> \"$TEMPER_OUTPUT/y.txt\"; pwd > \"$TEMPER_OUTPUT/cwd\"; echo out",
        );
        let with = json!({ "run": ["sh", "./s.sh", "arg"], "output": Files::NAME, "files": script, "env": { "MINE": "a b" }, "params": { "n": 3 } });
        let out = run(&Command, with, bench.inputs()).unwrap();
        let text = std::fs::read_to_string(out.path().join("y.txt")).unwrap();
        assert_eq!(text, "from the input{\"n\":3}|a b|arg|none\n");
        let cwd = std::fs::read_to_string(out.path().join("cwd")).unwrap();
        assert_eq!(Path::new(cwd.trim()).canonicalize().unwrap(), out.path().parent().unwrap().canonicalize().unwrap());
    }

    #[test]
    fn a_program_that_fails_is_told_without_its_log_and_without_secrets() {
        let secret = std::env::var("HOME").expect("tests run with a home");
        let with =
            json!({ "run": ["sh", "-c", "echo said >&2; exit 3", &secret], "output": "Files", "pass_env": ["HOME"] });
        let error = run(&Command, with, Bench::new().inputs()).map(drop).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert_eq!(error.message, "`sh -c echo said >&2; exit 3 <HOME>` failed with exit status: 3");
    }

    #[test]
    fn a_variable_that_is_not_set_and_a_removed_folder_are_told() {
        let with = json!({ "run": ["true"], "output": "Files", "pass_env": ["NO_SUCH_VARIABLE_HERE"] });
        let error = run(&Command, with, Bench::new().inputs()).map(drop).unwrap_err();
        assert_eq!((error.exit_code(), error.message.as_str()), (3, "`pass_env`: NO_SUCH_VARIABLE_HERE is not set"));
        let params = |names: Value| {
            serde_json::from_value(json!({ "run": ["true"], "output": "Files", "pass_env": names })).unwrap()
        };
        assert_eq!(Kind::check_environment(&Command, &params(json!(["HOME", "NO_SUCH_VARIABLE_HERE"]))), Err(error));
        assert_eq!(Kind::check_environment(&Command, &params(json!(["HOME"]))), Ok(()));
        let with = json!({ "run": ["sh", "-c", "rm -r \"$TEMPER_OUTPUT\""], "output": "Files" });
        let error = run(&Command, with, Bench::new().inputs()).map(drop).unwrap_err();
        assert_eq!(error.exit_code(), 2);
        assert!(error.message.ends_with("the program removed its output folder"), "{error}");
    }

    #[test]
    fn a_process_left_behind_does_not_hold_the_stage() {
        let started = std::time::Instant::now();
        let with = json!({ "run": ["sh", "-c", "sleep 20 & exit 0"], "output": "Files" });
        run(&Command, with, Bench::new().inputs()).unwrap();
        assert!(started.elapsed() < Duration::from_secs(15));
    }

    #[test]
    fn a_process_left_behind_cannot_change_what_was_made() {
        let script = "exec 3>\"$TEMPER_OUTPUT/x\"; echo made >&3; (sleep 0.2; echo late >&3; echo x > \"$TEMPER_OUTPUT/../late\") &";
        let out =
            run(&Command, json!({ "run": ["sh", "-c", script], "output": "Files" }), Bench::new().inputs()).unwrap();
        let late = out.path().parent().unwrap().join("late");
        while !late.exists() {
            std::thread::sleep(Duration::from_millis(20));
        }
        assert_eq!(std::fs::read_to_string(out.path().join("x")).unwrap(), "made\n");
    }

    #[test]
    fn what_cannot_run_is_told() {
        let error = run(&Command, json!({ "run": ["no-such-program-here"], "output": "Files" }), Bench::new().inputs())
            .map(drop)
            .unwrap_err();
        assert!(error.message.starts_with("`no-such-program-here` cannot be started"), "{error}");
        for with in [
            json!({ "run": [], "output": "Files" }),
            json!({ "run": ["x"], "output": "Files", "env": { "A=B": "c" } }),
            json!({ "run": ["x"], "output": "Files", "pass_env": ["TEMPER_OUTPUT"] }),
        ] {
            assert!(run(&Command, with, Bench::new().inputs()).is_err());
        }
    }

    #[test]
    fn arguments_that_name_files_become_their_paths() {
        let files = ["/p/tools/a.py", "/p/b.py", "/q/b.py"].map(PathBuf::from);
        assert_eq!(resolve("tools/a.py", &files).unwrap(), "/p/tools/a.py");
        assert_eq!(resolve("./a.py", &files).unwrap(), "/p/tools/a.py");
        assert_eq!(resolve("../tools/a.py", &files).unwrap(), "/p/tools/a.py");
        assert_eq!(resolve("--x", &files).unwrap(), "--x");
        assert_eq!(resolve("/abs/b.py", &files).unwrap(), "/abs/b.py");
        assert!(resolve("b.py", &files).unwrap_err().message.contains("`b.py` may be /p/b.py or /q/b.py"));
    }
}
