//! `command`: runs any program as a stage.

mod access;

use std::collections::{BTreeMap, BTreeSet};
use std::env::VarError;
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::ErrorKind;
use std::os::fd::AsFd;
use std::path::{Component, Path, PathBuf};
use std::process::Stdio;

use engine::artifact::{check_holes, check_root};
use engine::context::Context;
use engine::error::{AtPath, Error, Result};
use engine::external::InputFiles;
use engine::kind::{ConnectedInput, Kind, Registry, Signature};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

pub use self::access::Access;
use self::access::{expanded, started_from};
use crate::types::{self, json_lines};

pub struct Command;

crate::words! {
    /// The form of tables.
    pub enum Tables {
        /// Parquet, as the store holds them.
        Parquet = "parquet",
        /// JSON lines: `pairs.jsonl` in place of `pairs.parquet`.
        Jsonl = "jsonl",
    }
}

#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Params {
    /// The program and its arguments. The program must fill the folder `TEMPER_OUTPUT`. `TEMPER_INPUT_<port>` lists the
    /// input folders of a port, one per line, and the file `TEMPER_INPUTS_FILE` lists all of them as JSON by port. An
    /// argument that names one of `files` is replaced by that file's absolute path.
    pub run: Vec<String>,
    /// The artifact type of the output in `TEMPER_OUTPUT`; `Files` accepts any files. `temper kinds --type TYPE` lists
    /// the files of a type and their columns. The program may write a table as JSON lines: `preferences.jsonl` in place
    /// of `preferences.parquet`.
    pub output: String,
    /// The form in which the program reads the tables of its inputs.
    // Left out of the key unless it is set, so that keys of pipelines without it stay.
    #[serde(default = "parquet", skip_serializing_if = "is_parquet")]
    #[schemars(extend("default" = "parquet"))]
    pub tables: Tables,
    /// Scripts and data whose contents are part of the key: files, folders, patterns. Hidden files of a folder are not
    /// part of it.
    #[serde(default)]
    pub files: InputFiles,
    /// Environment variables for the program; part of the key.
    #[serde(default)]
    pub env: BTreeMap<String, String>,
    /// Names of environment variables to pass on. Their values are secrets: not part of the key, and redacted
    /// everywhere.
    #[serde(default)]
    pub pass_env: Vec<String>,
    /// Parameters for the program, as JSON in the file `TEMPER_PARAMS_FILE` and, unless they are long, in
    /// `TEMPER_PARAMS`.
    #[serde(default)]
    pub params: Value,
    /// Whether the same inputs always produce the same bytes.
    #[serde(default = "yes")]
    pub deterministic: bool,
    /// Whether the stage's seed is part of the key and passed in `TEMPER_SEED`.
    #[serde(default)]
    pub seeded: bool,
    /// Files and folders that the program may use besides its inputs, `files`, installed software and TMPDIR, where the kernel
    /// has Landlock. Not part of the key.
    #[serde(default, skip_serializing_if = "Access::is_empty")]
    pub access: Access,
}

fn yes() -> bool {
    true
}

fn parquet() -> Tables {
    Tables::Parquet
}

fn is_parquet(tables: &Tables) -> bool {
    *tables == Tables::Parquet
}

fn is_variable(name: &str) -> bool {
    !name.is_empty()
        && !name.starts_with(|c: char| c.is_ascii_digit())
        && name.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
}

impl Kind for Command {
    type Params = Params;

    const NAME: &'static str = "command";
    const VERSION: u32 = 2;
    const ABOUT: &'static str = "runs any program on its inputs";

    fn signature(&self, params: &Params) -> Signature {
        let mut signature = Signature::producing(params.output.clone());
        signature.open = true;
        signature.seeded = params.seeded;
        signature.deterministic = params.deterministic;
        signature.env.clone_from(&params.pass_env);
        signature.secrets.clone_from(&params.pass_env);
        signature.excluded_from_key = vec!["access".to_owned()];
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
        for (field, paths) in [("access.read", &params.access.read), ("access.write", &params.access.write)] {
            for path in paths.iter().filter(|path| !path.starts_with('/') && !path.starts_with("~/")) {
                faults.push((
                    field.to_owned(),
                    format!("`{path}`: expected an absolute path, or one that starts with `~/`"),
                ));
            }
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
            if value.len() > LONGEST {
                faults.push((format!("env.{name}"), format!("{LONG}: pass it by `params` or a file")));
            }
        }
        if params.run.iter().any(|arg| arg.len() > LONGEST) {
            faults.push(("run".to_owned(), format!("an argument has {LONG}: pass it by `params` or a file")));
        }
        let all = params.run.iter().chain(params.env.values()).map(String::len).sum::<usize>();
        if all > ALL {
            let most = ALL >> 10;
            faults.push((
                "run".to_owned(),
                format!("arguments and `env` have more than {most} KiB: pass them by `params`"),
            ));
        }
        faults
    }

    fn check_wiring(&self, _: &Params, inputs: &[ConnectedInput<'_>]) -> Vec<(&'static str, Error)> {
        let mut names: BTreeMap<String, &str> = BTreeMap::new();
        for input in inputs {
            let name = variable_of(input.port);
            let first = *names.entry(name.clone()).or_insert(input.port);
            if first != input.port {
                let message = format!("inputs `{first}` and `{}` would both be {name}", input.port);
                return vec![("", Error::user(message).help("call one of them otherwise"))];
            }
        }
        Vec::new()
    }

    fn check_environment(&self, params: &Params) -> Result<()> {
        params.pass_env.iter().try_for_each(|name| passed(name).map(drop))
    }

    fn access(&self, params: &Params) -> engine::kind::Access {
        let paths = |paths: &[String]| paths.iter().map(|path| expanded(path)).collect::<Vec<PathBuf>>();
        let mut read = [started_from(&params.run), paths(&params.access.read)].concat();
        read.extend(params.env.values().map(PathBuf::from));
        engine::kind::Access { read, write: paths(&params.access.write) }
    }

    fn run(&self, params: Params, ctx: &mut Context) -> Result<()> {
        let mut files: Vec<PathBuf> = params.files.absolute_paths().filter(|path| path.exists()).collect();
        files.extend_from_slice(params.files.files()?);
        let argv = params.run.iter().map(|arg| resolve(arg, &files)).collect::<Result<Vec<_>>>()?;
        let [program, args @ ..] = argv.as_slice() else { return Err(Error::internal("command: no program")) };
        let secrets = params.pass_env.iter().map(|name| passed(name)).collect::<Result<Vec<_>>>()?;

        let mut command = std::process::Command::new(program);
        let inherited = engine::run::passed_variables().filter_map(|name| Some((name, std::env::var_os(name)?)));
        command.args(args).env_clear().envs(inherited);
        command.envs(&params.env).envs(secrets.iter().map(|(name, value)| (name, value)));
        // The output folder is a direct child of the attempt's folder.
        let attempt = ctx.out().parent().unwrap_or_else(|| ctx.out()).to_owned();
        let mut folders: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        let views = attempt.join("inputs");
        for (port, inputs) in ctx.inputs() {
            for (n, input) in inputs.iter().enumerate() {
                let mut folder = input.folder.clone();
                if params.tables == Tables::Jsonl {
                    folder = views.join(format!("{port}-{n}"));
                    json_lines::view(&input.folder, &folder)?;
                }
                folders.entry(port).or_default().push(folder.display().to_string());
            }
        }
        // Files take values of any size; variables only values that the system accepts.
        for (name, value) in [("params", params.params.to_string()), ("inputs", json!(folders).to_string())] {
            let path = attempt.join(format!("{name}.json"));
            std::fs::write(&path, &value).at(&path)?;
            command.env(format!("TEMPER_{}_FILE", name.to_uppercase()), path);
            if name == "params" && value.len() <= LONGEST {
                command.env("TEMPER_PARAMS", value);
            }
        }
        for (port, folders) in &folders {
            // A port with several inputs lists one folder per line.
            let lines = folders.join("\n");
            if lines.len() <= LONGEST {
                command.env(variable_of(port), lines);
            }
        }
        command.env("TEMPER_OUTPUT", ctx.out()).env("TEMPER_THREADS", ctx.threads().to_string());
        if params.seeded {
            command.env("TEMPER_SEED", ctx.seed().to_string());
        }
        command.current_dir(&attempt);
        // This process's standard output carries messages to the orchestrator, so the program's standard output goes to
        // the log, together with its standard error. The orchestrator shows the end of the log with an error.
        let log = std::io::stderr().as_fd().try_clone_to_owned();
        let log = log.map_err(|e| Error::environment(format!("no log for the program: {e}")))?;
        command.stdin(Stdio::null()).stdout(log);

        let mut child = command.spawn().map_err(|e| {
            let what = format!("`{program}` cannot be started: {e}");
            match e.kind() {
                // The system is out of processes, memory or file descriptors.
                ErrorKind::WouldBlock | ErrorKind::OutOfMemory | ErrorKind::QuotaExceeded => Error::environment(what),
                ErrorKind::ArgumentListTooLong => {
                    Error::user(what).help("pass long arguments by `params` (TEMPER_PARAMS_FILE) or a file")
                }
                _ => Error::user(what)
                    .help("the program must be on PATH, or be one of `files` with its executable bit set"),
            }
        })?;
        let status = child.wait().map_err(|e| Error::environment(format!("`{program}`: {e}")))?;
        if views.exists() {
            std::fs::remove_dir_all(&views).at(&views)?;
        }
        let called = redact(params.run.join(" "), &secrets);
        if !status.success() {
            return Err(Error::user(format!("`{called}` failed with {status}")));
        }
        check_root(ctx.out()).map_err(|e| e.context(format!("`{called}`")))?;
        // A random name, so that the program cannot have created it beforehand.
        let name = format!(".copy-{:x}", RandomState::new().build_hasher().finish());
        own(ctx.out(), &attempt.join(name))?;
        match types::register(Registry::default()).get_type(&params.output) {
            Some(output) => json_lines::convert(ctx.out(), output),
            None => Ok(()),
        }
    }
}

/// Maximum bytes of one argument or variable; the system's limit is 128 KiB.
const LONGEST: usize = 120 << 10;
const LONG: &str = "more than 120 KiB";
/// Maximum bytes of all arguments and variables together; the system's limit is 2 MiB, including inputs and secrets.
const ALL: usize = 1 << 20;

/// The variable that lists the input folders of a port.
fn variable_of(port: &str) -> String {
    format!("TEMPER_INPUT_{}", port.replace('-', "_"))
}

/// The value of a `pass_env` variable in temper's own environment.
fn passed(name: &str) -> Result<(String, String)> {
    match std::env::var(name) {
        Ok(value) => Ok((name.to_owned(), value)),
        Err(e) => {
            let what = if e == VarError::NotPresent { "not set" } else { "not UTF-8" };
            Err(Error::environment(format!("`pass_env`: {name} is {what}"))
                .help("set it in the environment that `temper` runs in, or take it out of `pass_env`"))
        }
    }
}

/// Replaces each file by a copy of itself, written to the temporary path `copy`: a process that the program left behind
/// may still hold the original file open.
fn own(folder: &Path, copy: &Path) -> Result<()> {
    let entries = std::fs::read_dir(folder).and_then(Iterator::collect::<std::io::Result<Vec<_>>>).at(folder)?;
    for entry in entries {
        let (path, metadata) = (entry.path(), entry.metadata().at(entry.path())?);
        if metadata.is_dir() {
            own(&path, copy)?;
        } else if metadata.is_file() {
            check_holes(&path, &metadata)?;
            let mut to = File::create_new(copy).at(copy)?;
            let copied = File::open(&path).and_then(|mut from| std::io::copy(&mut from, &mut to));
            copied.and_then(|_| to.set_permissions(metadata.permissions())).at(&path)?;
            std::fs::rename(copy, &path).at(&path)?;
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

/// The absolute path of the only entry of `files` that ends with `arg`; `arg` itself if there is none.
fn resolve(arg: &str, files: &[PathBuf]) -> Result<String> {
    let relative: PathBuf = Path::new(arg).components().filter(|part| *part != Component::CurDir).collect();
    if relative.as_os_str().is_empty() || relative.is_absolute() {
        return Ok(arg.to_owned());
    }
    // `files` already has leading `..` resolved, so only the rest of the path is compared.
    let end: PathBuf = relative.components().skip_while(|part| *part == Component::ParentDir).collect();
    let found: BTreeSet<&PathBuf> = files.iter().filter(|path| path.ends_with(&end)).collect();
    match Vec::from_iter(found).as_slice() {
        [] => Ok(arg.to_owned()),
        [path] => path.to_str().map(str::to_owned).ok_or_else(|| Error::user(format!("{}: not UTF-8", path.display()))),
        [a, b, ..] => Err(Error::user(format!("`run`: `{arg}` may be {} or {}", a.display(), b.display()))
            .help("name the file by a longer path")),
    }
}

#[cfg(test)]
mod tests;
