//! The `executors` of a pipeline file: the batch systems that stages can run on.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::node::{Map, Node, Value};
use super::resources::{self, Resources};
use super::{Stage, check_names, known_keys};
use crate::diagnostics::{Diagnostic, Diagnostics, did_you_mean};
use crate::names::is_name;

/// The name of the executor of child processes, which needs no settings.
pub const LOCAL: &str = "local";
/// An executor with this name exists even if the file does not define it: Slurm with default settings.
pub const SLURM: &str = "slurm";

const COMMON_KEYS: [&str; 8] = ["type", "max_jobs", "interval", "grace", "retries", "backoff", "probe", "resources"];
const SLURM_KEYS: [&str; 5] = ["partition", "account", "flags", "signal", "requeue"];
const SUBMIT_KEYS: [&str; 3] = ["submit", "status", "cancel"];

/// The executors of a pipeline, by name.
pub type Executors = BTreeMap<String, ExecutorSettings>;

/// Settings of an executor that submits jobs to a batch system. Never part of a key.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ExecutorSettings {
    pub system: SystemSettings,
    /// Maximum number of submitted jobs at a time.
    pub max_jobs: usize,
    /// Time between two queries of the state of all jobs.
    pub interval: Duration,
    /// Time after the end of a job in which its result may still appear on the shared file system.
    pub grace: Duration,
    /// Further tries after a job vanished, lost its node, or reached its time limit, and after transient failures.
    pub retries: u32,
    /// Pause before the second try; before each further one it is four times as long.
    pub backoff: Duration,
    /// Whether to submit a job that checks the shared file system before the first run.
    pub probe: bool,
    /// Resources of stages that do not set their own.
    pub resources: Resources,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "type", rename_all = "lowercase")]
pub enum SystemSettings {
    Slurm(SlurmSettings),
    Submit(SubmitSettings),
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SlurmSettings {
    pub partition: Option<String>,
    pub account: Option<String>,
    /// Further arguments of sbatch.
    pub flags: Vec<String>,
    /// Time before its limit at which a job gets SIGTERM.
    pub signal: Duration,
    /// Whether Slurm may start a preempted job again.
    pub requeue: bool,
}

/// Shell commands with placeholders such as `{script}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct SubmitSettings {
    /// Prints the job's id.
    pub submit: String,
    /// Prints the ids of all live jobs.
    pub status: String,
    pub cancel: String,
}

/// Placeholders of a job's time limit.
const TIME: [&str; 2] = ["time", "seconds"];

impl SubmitSettings {
    fn uses(&self, names: &[&str]) -> bool {
        placeholders(&self.submit).any(|name| names.contains(&name))
    }

    /// The resource that the submit command needs and `resources` does not give.
    pub fn missing_resource(&self, resources: &Resources) -> Option<&'static str> {
        if self.uses(&["memory_mb"]) && resources.memory.is_none() {
            Some("memory")
        } else if self.uses(&TIME) && resources.time.is_none() {
            Some("time")
        } else {
            None
        }
    }
}

impl Default for ExecutorSettings {
    fn default() -> Self {
        Self {
            system: SystemSettings::Slurm(SlurmSettings {
                partition: None,
                account: None,
                flags: Vec::new(),
                signal: Duration::from_secs(60),
                requeue: true,
            }),
            max_jobs: 100,
            interval: Duration::from_secs(10),
            grace: Duration::from_secs(60),
            retries: 2,
            backoff: Duration::from_secs(10),
            probe: true,
            resources: Resources::default(),
        }
    }
}

/// Parses `executors`. Returns the valid ones, and the names of all.
pub fn read(node: &Node, faults: &mut Diagnostics) -> (Executors, Vec<String>) {
    let map = match &node.value {
        Value::Null => return (Executors::new(), Vec::new()),
        Value::Map(map) => map,
        _ => {
            let message = format!("`executors` must be a map; this is {}", node.type_name());
            faults.push(Diagnostic::new(node.span, message));
            return (Executors::new(), Vec::new());
        }
    };
    check_names(map.0.iter().map(|e| (e.key.as_str(), e.key_span)), "executor", is_name, faults);
    let mut executors = Executors::new();
    for entry in &map.0 {
        let before = faults.count();
        if entry.key == LOCAL {
            let fault = Diagnostic::new(entry.key_span, "the executor `local` is built in and has no settings");
            faults.push(fault.help("give this executor another name"));
            continue;
        }
        let Value::Map(settings) = &entry.value.value else {
            let message = format!("executor `{}` must be a map; this is {}", entry.key, entry.value.type_name());
            faults
                .push(Diagnostic::new(entry.value.span, message).help("say at least `type: slurm` or `type: submit`"));
            continue;
        };
        let settings = Reader { map: settings, executor: &entry.key, faults }.settings(&entry.value);
        if let Some(settings) = settings.filter(|_| faults.count() == before) {
            executors.insert(entry.key.clone(), settings);
        }
    }
    (executors, map.keys().map(str::to_owned).collect())
}

/// Checks the keys of `executors` of a profile, which may change only a part of an executor.
pub fn check_overlay(node: &Node, faults: &mut Diagnostics) {
    let all = [&COMMON_KEYS[..], &SLURM_KEYS, &SUBMIT_KEYS].concat();
    for entry in node.as_map().into_iter().flat_map(|map| &map.0) {
        if let Value::Map(settings) = &entry.value.value {
            known_keys(settings, &all, &format!("executor `{}`", entry.key), faults);
        }
    }
}

/// Reports stages whose executor does not exist or lacks something, and adds the built-in one if a stage uses it.
/// `names`: those that the file defines.
pub fn check_stages(executors: &mut Executors, names: &[String], stages: &[Stage], faults: &mut Diagnostics) {
    for stage in stages {
        let Some((name, span)) = &stage.executor else { continue };
        match find(executors, name) {
            Ok(Some(settings)) => {
                if let Some((message, help)) = mismatch(name, settings, &stage.resources, stage.timeout) {
                    let fault = Diagnostic::new(*span, format!("stage `{}`: {message}", stage.name));
                    faults.push(fault.help(help));
                }
            }
            Ok(None) => {}
            // Its own faults have been reported.
            Err(_) if names.contains(name) => {}
            Err(help) => {
                let fault = Diagnostic::new(*span, format!("stage `{}`: unknown executor `{name}`", stage.name));
                faults.push(fault.maybe_help(Some(help)));
            }
        }
    }
}

/// The settings of an executor; `None` for `local`. Adds the built-in `slurm` at its first use.
///
/// # Errors
/// Says which names exist.
pub fn find<'a>(executors: &'a mut Executors, name: &str) -> Result<Option<&'a ExecutorSettings>, String> {
    if name == LOCAL {
        return Ok(None);
    }
    if name == SLURM {
        executors.entry(SLURM.to_owned()).or_default();
    }
    match executors.contains_key(name) {
        true => Ok(executors.get(name)),
        false => {
            let built_in = [LOCAL, SLURM].into_iter().filter(|name| !executors.contains_key(*name));
            let known = executors.keys().map(String::as_str).chain(built_in);
            Err(did_you_mean(name, known).unwrap_or_else(|| "define it under `executors`".to_owned()))
        }
    }
}

/// What a stage lacks for this executor, or what the executor cannot do for it, and what to do.
pub fn mismatch(
    name: &str,
    settings: &ExecutorSettings,
    of_stage: &Resources,
    timeout: Option<Duration>,
) -> Option<(String, &'static str)> {
    let SystemSettings::Submit(submit) = &settings.system else { return None };
    if let Some(missing) = submit.missing_resource(&of_stage.within(timeout).or(&settings.resources)) {
        let message = format!("the `submit` command of executor `{name}` needs `{missing}`, which is not set");
        return Some((message, "set it in `resources` of the stage, or of the executor"));
    }
    (timeout.is_some() && !submit.uses(&TIME)).then(|| {
        let message = format!("`timeout` has no effect: the `submit` command of executor `{name}` sets no time limit");
        (message, "use `{time}` or `{seconds}` in the command, or remove `timeout`")
    })
}

/// Reads the settings of one executor.
struct Reader<'a> {
    map: &'a Map,
    executor: &'a str,
    faults: &'a mut Diagnostics,
}

impl Reader<'_> {
    fn settings(mut self, node: &Node) -> Option<ExecutorSettings> {
        let own = match self.text("type").as_deref() {
            Some("slurm") => &SLURM_KEYS[..],
            Some("submit") => &SUBMIT_KEYS[..],
            found => {
                let span = self.map.get("type").map_or(node.span, |node| node.span);
                let found = found.map_or("nothing".to_owned(), |found| format!("`{found}`"));
                let message =
                    format!("executor `{}`: `type`: expected `slurm` or `submit`, found {found}", self.executor);
                self.faults.push(Diagnostic::new(span, message));
                return None;
            }
        };
        known_keys(self.map, &[&COMMON_KEYS, own].concat(), &format!("executor `{}`", self.executor), self.faults);
        let defaults = ExecutorSettings::default();
        let system = if own == SLURM_KEYS { self.slurm(&defaults) } else { self.submit(node)? };
        Some(ExecutorSettings {
            system,
            max_jobs: self.count("max_jobs", 1).map_or(defaults.max_jobs, |n| n as usize),
            interval: self.duration("interval").unwrap_or(defaults.interval),
            grace: self.duration("grace").unwrap_or(defaults.grace),
            retries: self.count("retries", 0).map_or(defaults.retries, |n| n as u32),
            backoff: self.duration("backoff").unwrap_or(defaults.backoff),
            probe: self.flag("probe").unwrap_or(defaults.probe),
            resources: self.map.get("resources").map_or_else(Resources::default, |n| resources::read(n, self.faults)),
        })
    }

    fn slurm(&mut self, defaults: &ExecutorSettings) -> SystemSettings {
        let SystemSettings::Slurm(defaults) = defaults.system.clone() else { unreachable!("the default is Slurm") };
        SystemSettings::Slurm(SlurmSettings {
            partition: self.text("partition"),
            account: self.text("account"),
            flags: self.texts("flags"),
            signal: self.duration("signal").unwrap_or(defaults.signal),
            requeue: self.flag("requeue").unwrap_or(defaults.requeue),
        })
    }

    fn submit(&mut self, node: &Node) -> Option<SystemSettings> {
        const IN_SUBMIT: [&str; 9] =
            ["script", "name", "log", "env", "threads", "memory_mb", "gpus", "time", "seconds"];
        let submit = self.template("submit", &IN_SUBMIT, "script", node);
        let status = self.template("status", &["jobs"], "", node);
        let cancel = self.template("cancel", &["job"], "job", node);
        Some(SystemSettings::Submit(SubmitSettings { submit: submit?, status: status?, cancel: cancel? }))
    }

    /// A command with placeholders; `needed` must be among them.
    fn template(&mut self, key: &str, known: &[&str], needed: &str, node: &Node) -> Option<String> {
        let text = self.text(key);
        let span = self.map.get(key).map_or(node.span, |node| node.span);
        let message = match &text {
            None if self.map.get(key).is_some_and(|node| !node.is_null()) => return None,
            None => format!("executor `{}` has no `{key}` command", self.executor),
            Some(text) => {
                let unknown = placeholders(text).find(|name| !known.contains(name));
                let lacks = !needed.is_empty() && !placeholders(text).any(|name| name == needed);
                match unknown {
                    Some(name) => format!("executor `{}`: `{key}`: unknown placeholder `{{{name}}}`", self.executor),
                    None if lacks => format!("executor `{}`: `{key}` does not use `{{{needed}}}`", self.executor),
                    None => return Some(text.clone()),
                }
            }
        };
        let known = known.iter().map(|name| format!("{{{name}}}")).collect::<Vec<_>>().join(", ");
        self.faults.push(Diagnostic::new(span, message).help(format!("placeholders of `{key}`: {known}")));
        None
    }

    fn get(&self, key: &str) -> Option<&Node> {
        self.map.get(key).filter(|node| !node.is_null())
    }

    fn what(&self, key: &str) -> String {
        format!("executor `{}`: `{key}`", self.executor)
    }

    fn expected(&mut self, node: &Node, key: &str, expected: &str) {
        let message = format!("{}: expected {expected}, found {}", self.what(key), node.type_name());
        self.faults.push(Diagnostic::new(node.span, message));
    }

    fn text(&mut self, key: &str) -> Option<String> {
        let node = self.get(key)?.clone();
        match node.value {
            // A NUL ends an argument; a line break would start another command.
            Value::Str(text) if !text.is_empty() && !text.contains(['\0', '\n']) => Some(text),
            _ => {
                self.expected(&node, key, "text on one line");
                None
            }
        }
    }

    fn texts(&mut self, key: &str) -> Vec<String> {
        let Some(node) = self.get(key).cloned() else { return Vec::new() };
        let items = match &node.value {
            Value::List(items) => &items[..],
            _ => std::slice::from_ref(&node),
        };
        let texts = items.iter().map(|item| match &item.value {
            Value::Str(text) if text.starts_with('-') && !text.contains(['\0', '\n']) => Some(text.clone()),
            _ => None,
        });
        match texts.collect::<Option<Vec<_>>>() {
            Some(texts) => texts,
            None => {
                self.expected(&node, key, "a list of flags, each starting with `-`");
                Vec::new()
            }
        }
    }

    fn count(&mut self, key: &str, least: u64) -> Option<u64> {
        let (node, what) = (self.get(key)?.clone(), self.what(key));
        resources::count(&node, least, &what, self.faults)
    }

    fn duration(&mut self, key: &str) -> Option<Duration> {
        let (node, what) = (self.get(key)?.clone(), self.what(key));
        resources::duration(&node, &what, self.faults)
    }

    fn flag(&mut self, key: &str) -> Option<bool> {
        let node = self.get(key)?.clone();
        match node.value {
            Value::Bool(flag) => Some(flag),
            _ => {
                self.expected(&node, key, "true or false");
                None
            }
        }
    }
}

/// The names of the placeholders of a template: words in braces. Other braces belong to the shell.
pub fn placeholders(template: &str) -> impl Iterator<Item = &str> {
    let is_word = |name: &&str| !name.is_empty() && name.bytes().all(|b| b.is_ascii_lowercase() || b == b'_');
    let opened = template.match_indices('{').filter(|(at, _)| !template[..*at].ends_with('$'));
    opened.filter_map(|(at, _)| template[at + 1..].split_once('}').map(|(name, _)| name)).filter(is_word)
}
