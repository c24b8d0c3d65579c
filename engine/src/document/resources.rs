//! Resources that the attempts of a stage need, and how they are written in a pipeline file.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::Serialize;

use super::node::{Node, Value};
use super::{Stage, check_names, known_keys};
use crate::diagnostics::{Diagnostic, Diagnostics, did_you_mean};
use crate::names::is_name;

pub const RESOURCE_KEYS: &[&str] = &["threads", "memory", "gpus", "time", "pools"];

/// What an attempt gets from this machine, or a job from its batch system. Never part of a key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Resources {
    pub threads: Option<u64>,
    /// MiB.
    pub memory: Option<u64>,
    pub gpus: Option<u64>,
    /// Maximum wall time of a job.
    pub time: Option<Duration>,
    /// Units of named pools; only on this machine.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub pools: BTreeMap<String, u64>,
}

impl Resources {
    /// These resources, with a time of at most `timeout`.
    #[must_use]
    pub fn within(&self, timeout: Option<Duration>) -> Self {
        Self { time: self.time.into_iter().chain(timeout).min(), ..self.clone() }
    }

    /// These resources, with those of `defaults` where this has none.
    #[must_use]
    pub fn or(&self, defaults: &Self) -> Self {
        Self {
            threads: self.threads.or(defaults.threads),
            memory: self.memory.or(defaults.memory),
            gpus: self.gpus.or(defaults.gpus),
            time: self.time.or(defaults.time),
            pools: self.pools.clone(),
        }
    }
}

/// Bytes.
pub const MIB: u64 = 1 << 20;

/// Parses `resources`; null means none.
pub fn read(node: &Node, faults: &mut Diagnostics) -> Resources {
    let mut resources = Resources::default();
    let map = match &node.value {
        Value::Null => return resources,
        Value::Map(map) => map,
        _ => {
            let message = format!("`resources` must be a map; this is {}", node.type_name());
            faults.push(Diagnostic::new(node.span, message));
            return resources;
        }
    };
    known_keys(map, RESOURCE_KEYS, "`resources`", faults);
    for entry in map.0.iter().filter(|entry| !entry.value.is_null()) {
        let (node, what) = (&entry.value, format!("resources: `{}`", entry.key));
        match entry.key.as_str() {
            "threads" => resources.threads = count(node, 1, &what, faults),
            "gpus" => resources.gpus = count(node, 0, &what, faults),
            "memory" => resources.memory = memory(node, &what, faults),
            "time" => resources.time = duration(node, &what, faults),
            "pools" => resources.pools = units(node, &what, faults),
            _ => {}
        }
    }
    resources
}

/// Parses a map of pools to their units, such as `{ scratch: 2 }`; null means none.
pub fn units(node: &Node, what: &str, faults: &mut Diagnostics) -> BTreeMap<String, u64> {
    let map = match &node.value {
        Value::Null => return BTreeMap::new(),
        Value::Map(map) => map,
        _ => {
            let message = format!("{what}: expected a map of pools to numbers, found {}", node.type_name());
            faults.push(Diagnostic::new(node.span, message).help("for example `{ scratch: 2 }`"));
            return BTreeMap::new();
        }
    };
    check_names(map.0.iter().map(|e| (e.key.as_str(), e.key_span)), "pool", is_name, faults);
    let entries = map.0.iter().filter_map(|entry| {
        let number = count(&entry.value, 1, &format!("{what}: `{}`", entry.key), faults)?;
        Some((entry.key.clone(), number))
    });
    entries.collect()
}

/// Reports stages that need pools that do not exist, or more of one than it has.
pub fn check_pools(pools: &BTreeMap<String, u64>, stages: &[Stage], faults: &mut Diagnostics) {
    for stage in stages {
        for (pool, units) in &stage.resources.pools {
            let what = format!("stage `{}`: resources", stage.name);
            let fault = match pools.get(pool) {
                Some(size) if units <= size => continue,
                Some(size) => {
                    let message =
                        format!("{what}: {units} of pool `{pool}`, which has {size}: the stage can never run");
                    Diagnostic::new(stage.span, message).help("raise the number under `pools`, or lower the stage's")
                }
                None => {
                    let help = did_you_mean(pool, pools.keys().map(String::as_str));
                    let help = help.unwrap_or_else(|| format!("define it: `pools: {{ {pool}: {units} }}`"));
                    Diagnostic::new(stage.span, format!("{what}: unknown pool `{pool}`")).help(help)
                }
            };
            faults.push(fault);
        }
    }
}

/// A whole number from `least` to a million.
pub fn count(node: &Node, least: u64, what: &str, faults: &mut Diagnostics) -> Option<u64> {
    const MOST: u64 = 1_000_000;
    let number = match node.value {
        Value::Int(n) => u64::try_from(n).ok().filter(|n| (least..=MOST).contains(n)),
        _ => None,
    };
    if number.is_none() {
        let message = format!("{what}: expected a whole number from {least} to {MOST}, found {}", shown(node, faults));
        faults.push(Diagnostic::new(node.span, message));
    }
    number
}

/// An amount of memory, such as `16G`, in MiB.
fn memory(node: &Node, what: &str, faults: &mut Diagnostics) -> Option<u64> {
    let mebibytes = match &node.value {
        Value::Str(text) => parse_memory(text),
        _ => None,
    };
    if mebibytes.is_none() {
        let message = format!("{what}: expected a size such as `500M` or `16G`, found {}", shown(node, faults));
        faults.push(Diagnostic::new(node.span, message));
    }
    mebibytes
}

/// An amount of memory in MiB as it is written in a pipeline file, rounded.
pub fn size(mebibytes: u64) -> String {
    match mebibytes {
        ..10_240 => format!("{mebibytes}M"),
        _ => format!("{}G", (mebibytes + 512) >> 10),
    }
}

/// The MiB of a size such as `500M` or `16G`.
pub fn parse_memory(text: &str) -> Option<u64> {
    let (number, factor) = [("M", 1), ("G", 1 << 10), ("T", 1 << 20)]
        .into_iter()
        .find_map(|(unit, factor)| Some((text.trim().strip_suffix(unit)?, factor)))?;
    let number: u64 = number.trim().parse().ok()?;
    number.checked_mul(factor).filter(|mebibytes| (1..=1 << 40).contains(mebibytes))
}

/// A positive duration: a number of seconds, `30s`, `90m`, `2h`, `1d`, or `[DAYS-]HH:MM:SS`.
pub fn duration(node: &Node, what: &str, faults: &mut Diagnostics) -> Option<Duration> {
    const MOST: f64 = 86_400.0 * 366.0;
    let seconds = match &node.value {
        Value::Int(n) => Some(*n as f64),
        Value::Float(seconds) => Some(*seconds),
        Value::Str(text) => parse_seconds(text.trim()),
        _ => None,
    };
    let seconds = seconds.filter(|seconds| *seconds > 0.0 && *seconds <= MOST);
    if seconds.is_none() {
        let message = format!(
            "{what}: expected a duration such as `30s`, `90m`, `2h`, `1d` or `12:00:00`, found {}",
            shown(node, faults)
        );
        faults.push(Diagnostic::new(node.span, message));
    }
    seconds.map(Duration::from_secs_f64)
}

fn parse_seconds(text: &str) -> Option<f64> {
    for (unit, factor) in [("s", 1.0), ("m", 60.0), ("h", 3600.0), ("d", 86_400.0)] {
        if let Some(number) = text.strip_suffix(unit) {
            return Some(number.trim().parse::<f64>().ok()? * factor);
        }
    }
    let (days, clock) = text.split_once('-').unwrap_or(("0", text));
    let parts: Vec<u32> = clock.split(':').map(|part| part.parse().ok()).collect::<Option<_>>()?;
    let [hours, minutes, seconds] = parts[..] else { return None };
    Some(
        f64::from(days.parse::<u32>().ok()?) * 86_400.0
            + f64::from(hours) * 3600.0
            + f64::from(minutes) * 60.0
            + f64::from(seconds),
    )
}

/// A value as written in the file.
fn shown(node: &Node, faults: &Diagnostics) -> String {
    match node.value {
        Value::List(_) | Value::Map(_) | Value::Null => node.type_name().to_owned(),
        _ => format!("`{}`", faults.slice(node.span)),
    }
}

/// A duration as `HH:MM:SS`, rounded up to a whole second; hours may have more than two digits.
pub fn clock(duration: Duration) -> String {
    let seconds = duration.as_secs() + u64::from(duration.subsec_nanos() > 0);
    format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_and_sizes_have_units() {
        let seconds = ["30s", "90m", "2h", "1.5d", "01:30:00", "1-00:00:01"].map(parse_seconds);
        assert_eq!(seconds, [30.0, 5400.0, 7200.0, 129_600.0, 5400.0, 86_401.0].map(Some));
        assert_eq!(["", "s", "2", "1:30", "two h", "-1:00:00"].map(parse_seconds), [None; 6]);
        let sizes = ["500M", "16G", "2T", " 3 G "].map(parse_memory);
        assert_eq!(sizes, [500, 16 << 10, 2 << 20, 3 << 10].map(Some));
        assert_eq!(["", "G", "16", "1.5G", "0M", "16GB"].map(parse_memory), [None; 6]);
        assert_eq!(clock(Duration::from_millis(359_999_001)), "100:00:00");
    }
}
