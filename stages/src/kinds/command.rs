//! `command`: runs any program as a stage.

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

/// Further files and folders of a program: absolute paths, or paths in the home directory such as `~/.triton`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Access {
    /// Only for reading.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub read: Vec<String>,
    /// For reading and writing.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub write: Vec<String>,
}

impl Access {
    fn is_empty(&self) -> bool {
        self.read.is_empty() && self.write.is_empty()
    }
}

/// `~` stands for the home directory.
fn expanded(path: &str) -> PathBuf {
    match (path.strip_prefix("~/"), std::env::var_os("HOME")) {
        (Some(rest), Some(home)) => PathBuf::from(home).join(rest),
        _ => PathBuf::from(path),
    }
}

/// What a program reads to start: itself with its installation (a virtual environment has its own and its interpreter's), and
/// the files that its arguments name by absolute paths.
fn started_from(run: &[String]) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> =
        run.iter().map(PathBuf::from).filter(|path| path.is_absolute() && path.exists()).collect();
    let program = Path::new(run.first().map_or("", String::as_str));
    let places: Vec<PathBuf> = match program.components().count() {
        1 => {
            std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default()).map(|dir| dir.join(program)).collect()
        }
        _ => vec![program.to_owned()],
    };
    if let Some(place) = places.into_iter().find(|place| place.is_absolute() && place.is_file()) {
        let real = place.canonicalize().unwrap_or_else(|_| place.clone());
        for place in [place, real] {
            let bin = place.parent().filter(|parent| parent.ends_with("bin")).and_then(Path::parent);
            // Not the root directory, which `/bin` lies in.
            found.push(bin.filter(|prefix| prefix.parent().is_some()).map_or(place.clone(), Path::to_owned));
        }
    }
    found
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
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;
    use crate::table;
    use crate::testing::{Bench, run, toys};
    use crate::types::{Files, Pair, Pairs, Preference, Preferences, Split};

    #[test]
    fn access_is_no_part_of_the_key_and_takes_absolute_paths() {
        let access = json!({ "write": ["~/x", "/y", "z"] });
        let params = json!({ "run": ["sh"], "output": "Files", "env": { "DATA": "/data" }, "access": access });
        let params: Params = serde_json::from_value(params).unwrap();
        let fault = "`z`: expected an absolute path, or one that starts with `~/`".to_owned();
        assert_eq!(Command.check(&params), [("access.write".to_owned(), fault)]);
        assert_eq!(Command.signature(&params).excluded_from_key, ["access"]);
        let found = Command.access(&params);
        assert!(found.read.contains(&"/data".into()) && found.write.contains(&"/y".into()), "{found:?}");
        assert!(found.read.iter().any(|path| path.ends_with("usr") || path.ends_with("sh")), "{found:?}");
    }

    #[test]
    fn a_program_finds_its_inputs_parameters_and_output() {
        let mut bench = Bench::new();
        bench.input("posts", "Files", |folder| {
            std::fs::write(folder.join("x.txt"), "from the input").map_err(|e| Error::internal(e.to_string()))
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
        assert!(error.message.ends_with("the output folder was removed"), "{error}");
    }

    const ROW: &str = r#"{"id": "p", "post_id": "t3_x", "prompt": "POST", "chosen_text": "a", "chosen_ended": true, "rejected_text": "b", "rejected_ended": true, "rejected_ids": [7], "outcome": "labelled", "annotator": "me", "confidence": 0.1}"#;

    /// Runs a program that writes `text` as `preferences.jsonl`.
    fn written(text: &str) -> Result<crate::testing::Out> {
        let bench = Bench::new();
        let rows = bench.write("rows", text);
        let with = json!({ "run": ["sh", "-c", "cp \"$0\" \"$TEMPER_OUTPUT/preferences.jsonl\"", rows], "output": "Preferences" });
        run(&Command, with, bench.inputs())
    }

    #[test]
    fn json_lines_become_the_table_that_the_output_type_asks_for() {
        let out = written(&format!("{ROW}\n{}\n", ROW.replace("labelled", "tie"))).unwrap();
        let rows: Vec<Preference> = table::read(&out.path().join(Preferences::FILE)).unwrap();
        assert_eq!(rows.iter().map(|row| row.outcome.as_str()).collect::<Vec<_>>(), ["labelled", "tie"]);
        assert_eq!(
            (rows[0].confidence, rows[0].rejected_ids.as_deref(), &rows[0].facts),
            (Some(0.1), Some(&[7][..]), &None)
        );
        assert!(!out.path().join("preferences.jsonl").exists());
    }

    #[test]
    fn every_error_of_a_line_is_reported_with_its_line_number() {
        let message_of = |text: &str| written(text).map(drop).unwrap_err().message;
        let bad =
            ROW.replace("\"post_id\"", "\"post\"").replace("\"prompt\": \"POST\", ", "").replace("labelled", "good");
        let bad = bad.replace("\"chosen_ended\": true", "\"chosen_ended\": 1");
        let message = message_of(&format!("{ROW}\n{bad}\n"));
        let faults = "preferences.jsonl, line 2: columns `post_id` (utf8), `prompt` (utf8) are missing; column `chosen_ended`: \
                      expected bool, found 1; column `outcome`: `good` is none of labelled, tie, refused, truncated, unparsable, \
                      failed; unexpected column `post`; found id, post, chosen_text,";
        assert!(message.contains(faults), "{message}");
        for (text, fault) in [("[1]", "line 1: expected one JSON object a line"), ("{\"id\": NaN}", "line 1: ")] {
            assert!(message_of(text).contains(fault), "{text}");
        }
    }

    #[test]
    fn a_table_in_parquet_is_kept_and_so_are_json_lines_beside_it() {
        let bench = Bench::new();
        table::write(&bench.path(Preferences::FILE), Vec::<Preference>::new()).unwrap();
        let folder = bench.path("");
        let script =
            "cp \"$0/preferences.parquet\" \"$TEMPER_OUTPUT\"; echo kept > \"$TEMPER_OUTPUT/preferences.jsonl\"";
        let with = json!({ "run": ["sh", "-c", script, folder], "output": "Preferences" });
        let out = run(&Command, with, bench.inputs()).unwrap();
        let bytes = |folder: &Path| std::fs::read(folder.join(Preferences::FILE)).unwrap();
        assert_eq!(bytes(&out.path()), bytes(&folder));
        assert_eq!(std::fs::read_to_string(out.path().join("preferences.jsonl")).unwrap(), "kept\n");
    }

    #[test]
    fn tables_that_are_read_and_written_as_json_lines_come_back_byte_by_byte() {
        let mut bench = Bench::new();
        bench.input("pairs", Pairs::NAME, |folder| {
            std::fs::write(folder.join("metrics.json"), "{}").at(folder)?;
            let pairs = toys::pairs(3, Split::Gold).into_iter();
            toys::write_pairs(folder, pairs.map(|pair| Pair { facts: Some("\"\n".to_owned()), ..pair }))
        });
        let script = "cp \"$TEMPER_INPUT_pairs/pairs.jsonl\" \"$TEMPER_INPUT_pairs/metrics.json\" \"$TEMPER_OUTPUT\"; \
                      test ! -e \"$TEMPER_INPUT_pairs/pairs.parquet\"";
        let with = json!({ "run": ["sh", "-c", script], "output": "Pairs", "tables": "jsonl" });
        let out = run(&Command, with, bench.inputs()).unwrap();
        let bytes = |folder: &Path| std::fs::read(folder.join(Pairs::FILE)).unwrap();
        assert_eq!(bytes(&out.path()), bytes(&bench.inputs()["pairs"][0].folder));
        assert!(!out.path().parent().unwrap().join("inputs").exists());
    }

    #[test]
    fn the_form_of_tables_is_in_the_key_only_if_it_is_set() {
        let normal = |with: Value| (&Command as &dyn engine::kind::AnyKind).normalise(&with).unwrap();
        let plain = normal(json!({ "run": ["x"], "output": "Files" }));
        assert!(plain.get("tables").is_none(), "older keys would change: {plain}");
        assert_eq!(normal(json!({ "run": ["x"], "output": "Files", "tables": "jsonl" }))["tables"], "jsonl");
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
    fn long_parameters_come_by_file_and_short_ones_by_variable_too() {
        let script = "cat \"$TEMPER_PARAMS_FILE\" > \"$TEMPER_OUTPUT/p\"; echo \"${TEMPER_PARAMS-none}\" > \"$TEMPER_OUTPUT/v\"; \
                      cat \"$TEMPER_INPUTS_FILE\" > \"$TEMPER_OUTPUT/i\"";
        let mut bench = Bench::new();
        for _ in 0..2 {
            bench.input("parts", "Files", |_| Ok(()));
        }
        for (length, by_variable) in [(10, true), (4 << 20, false)] {
            let params = json!({ "text": "x".repeat(length) });
            let with = json!({ "run": ["sh", "-c", script], "output": "Files", "params": params });
            let out = run(&Command, with, bench.inputs()).unwrap();
            let read = |name: &str| std::fs::read_to_string(out.path().join(name)).unwrap();
            assert_eq!(read("p"), params.to_string());
            assert_eq!(read("v").trim(), if by_variable { params.to_string() } else { "none".into() }, "{length}");
            let inputs: BTreeMap<String, Vec<String>> = serde_json::from_str(&read("i")).unwrap();
            assert_eq!(inputs["parts"].len(), 2);
        }
    }

    #[test]
    fn what_no_program_can_be_given_is_a_fault_of_the_file() {
        let long = "x".repeat(LONGEST + 1);
        let many = vec!["x".repeat(LONGEST); 10];
        for (with, field) in [
            (json!({ "run": ["x", long], "output": "Files" }), "run"),
            (json!({ "run": ["x"], "output": "Files", "env": { "A": long } }), "env.A"),
            (json!({ "run": many, "output": "Files" }), "run"),
        ] {
            let faults = (&Command as &dyn engine::kind::AnyKind).normalise(&with).unwrap_err();
            assert_eq!(faults[0].0, field);
        }
        let params = serde_json::from_value(json!({ "run": ["x"], "output": "Files" })).unwrap();
        let wired = |port| ConnectedInput { port, kind: "command", output: "Files", params: &Value::Null };
        let faults = Command.check_wiring(&params, &[wired("a-b"), wired("c"), wired("a_b")]);
        assert_eq!(faults[0].1.message, "inputs `a-b` and `a_b` would both be TEMPER_INPUT_a_b");
        assert!(Command.check_wiring(&params, &[wired("a-b"), wired("a-b"), wired("c")]).is_empty());
    }

    #[test]
    fn an_output_folder_replaced_by_a_link_is_refused() {
        let bench = Bench::new();
        let mine = bench.write("mine", "data");
        let folder = mine.parent().unwrap().to_str().unwrap();
        let script = "rmdir \"$TEMPER_OUTPUT\" && ln -s \"$0\" \"$TEMPER_OUTPUT\"";
        let with = json!({ "run": ["sh", "-c", script, folder], "output": "Files" });
        let error = run(&Command, with, bench.inputs()).map(drop).unwrap_err();
        assert!(
            error.exit_code() == 2 && error.message.ends_with("the output folder was replaced by a link"),
            "{error}"
        );
        assert!(!std::fs::metadata(mine).unwrap().permissions().readonly());
    }

    #[test]
    fn a_pipe_under_the_name_of_a_copy_stops_nothing() {
        // The program's parent process is the attempt.
        let script =
            "for at in . ..; do mkfifo \"$TEMPER_OUTPUT/$at/.copy-$PPID\"; done; echo x > \"$TEMPER_OUTPUT/x\"";
        let out = run(&Command, json!({ "run": ["sh", "-c", script], "output": "Files" }), Bench::new().inputs());
        assert_eq!(std::fs::read_to_string(out.unwrap().path().join("x")).unwrap(), "x\n");
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
