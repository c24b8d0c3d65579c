//! The `report:` section of a pipeline file: additions to the generated report.

use serde::{Deserialize, Serialize};

use super::interpolate::substitute;
use super::known_keys;
use super::node::{Map, Node, Value};
use crate::diagnostics::{Diagnostic, Diagnostics};

pub const REPORT_KEYS: &[&str] = &["notes", "tuning_seeds", "deviations"];

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ReportSettings {
    /// Notes shown in the report.
    pub notes: Vec<String>,
    /// Seeds on which settings were chosen: the report warns about results from one of them.
    pub tuning_seeds: Vec<u64>,
    /// Notes for the list of deviations from the paper.
    pub deviations: Vec<String>,
}

/// Parses the section. Reports faults and omits the keys that have one.
pub fn read(node: &Node, faults: &mut Diagnostics) -> ReportSettings {
    let empty = Map::default();
    let map = match &node.value {
        Value::Map(map) => map,
        Value::Null => &empty,
        _ => {
            faults.push(Diagnostic::new(node.span, format!("`report` must be a map; this is {}", node.type_name())));
            &empty
        }
    };
    known_keys(map, REPORT_KEYS, "`report`", faults);
    let seed = |value: &Value| match value {
        Value::Int(n) => u64::try_from(*n).ok(),
        _ => None,
    };
    let text = |value: &Value| match value {
        Value::Str(text) => Some(substitute(text, &[]).into_owned()),
        _ => None,
    };
    ReportSettings {
        notes: list(map, "notes", "text", text, faults),
        tuning_seeds: list(map, "tuning_seeds", "a whole number from 0 to 2^64 - 1", seed, faults),
        deviations: list(map, "deviations", "text", text, faults),
    }
}

/// The list under `key`; empty if the key is missing or null.
fn list<T>(
    map: &Map,
    key: &str,
    expected: &str,
    read: impl Fn(&Value) -> Option<T>,
    faults: &mut Diagnostics,
) -> Vec<T> {
    let Some(node) = map.get(key).filter(|node| !node.is_null()) else { return Vec::new() };
    let Value::List(items) = &node.value else {
        let wrapped = read(&node.value).is_some().then(|| format!("write `{key}: [{}]`", faults.slice(node.span)));
        let message = format!("report: `{key}`: expected a list, found {}", node.type_name());
        faults.push(Diagnostic::new(node.span, message).maybe_help(wrapped));
        return Vec::new();
    };
    let mut found = Vec::with_capacity(items.len());
    for item in items {
        match read(&item.value) {
            Some(value) => found.push(value),
            None => {
                let message = format!("report: `{key}`: expected {expected}, found `{}`", faults.slice(item.span));
                faults.push(Diagnostic::new(item.span, message));
            }
        }
    }
    found
}
