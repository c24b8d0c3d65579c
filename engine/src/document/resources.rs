//! Resources that a stage asks a batch system for, and how they are written in a pipeline file.

use std::time::Duration;

use serde::Serialize;

use super::known_keys;
use super::node::{Node, Value};
use crate::diagnostics::{Diagnostic, Diagnostics};

pub const RESOURCE_KEYS: &[&str] = &["threads", "memory", "gpus", "time"];

/// What a job gets from its batch system. Never part of a key.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Resources {
    pub threads: Option<u64>,
    /// MiB.
    pub memory: Option<u64>,
    pub gpus: Option<u64>,
    /// Maximum wall time.
    pub time: Option<Duration>,
}

impl Resources {
    /// These resources, with those of `defaults` where this has none.
    #[must_use]
    pub fn or(&self, defaults: &Self) -> Self {
        Self {
            threads: self.threads.or(defaults.threads),
            memory: self.memory.or(defaults.memory),
            gpus: self.gpus.or(defaults.gpus),
            time: self.time.or(defaults.time),
        }
    }
}

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
            _ => {}
        }
    }
    resources
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

fn parse_memory(text: &str) -> Option<u64> {
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
