//! The parameters of the RL stages that differ between arms.

use std::collections::BTreeMap;

use super::html::{escape, table};
use super::load::{Instance, RunData, with_arms};
use crate::flatten::flatten;

/// The page's section; empty for a run without RL stages.
pub fn section(run: &RunData) -> String {
    let arms = by_arm(run.instances.iter().filter(|instance| instance.kind.starts_with("rl.")));
    if arms.is_empty() {
        return String::new();
    }
    let (differing, shared) = compare(&arms);
    let note = format!("<p class=\"soft\">{shared} parameters are the same in all arms.</p>");
    if differing.is_empty() {
        return note;
    }
    let head: Vec<&str> = ["parameter"].into_iter().chain(arms.iter().map(|(name, _)| name.as_str())).collect();
    let rows: Vec<Vec<String>> = differing
        .into_iter()
        .map(|(parameter, values)| [parameter].into_iter().chain(values).map(|cell| escape(&cell)).collect())
        .collect();
    note + &table(&head, head.len(), &rows)
}

/// Values by parameter path, such as `steps.n`; distinct values of all seeds of the arm.
type Parameters = BTreeMap<String, Vec<String>>;

fn by_arm<'a>(stages: impl Iterator<Item = &'a Instance> + Clone) -> Vec<(String, Parameters)> {
    let mut arms: Vec<(String, Parameters)> = Vec::new();
    for (name, instance) in with_arms(stages) {
        let at = arms.iter().position(|(arm, _)| *arm == name).unwrap_or_else(|| {
            arms.push((name, Parameters::new()));
            arms.len() - 1
        });
        let kind = ("kind".to_owned(), instance.kind.clone());
        for (path, value) in std::iter::once(kind).chain(flatten(&instance.params)) {
            let values = arms[at].1.entry(path).or_default();
            if !values.contains(&value) {
                values.push(value);
            }
        }
    }
    arms
}

/// Parameters that differ, with their value in each arm (a dash if absent), and the number of those that do not.
fn compare(arms: &[(String, Parameters)]) -> (Vec<(String, Vec<String>)>, usize) {
    let mut paths: Vec<&String> = arms.iter().flat_map(|(_, parameters)| parameters.keys()).collect();
    paths.sort_unstable();
    paths.dedup();
    let total = paths.len();
    let value = |parameters: &Parameters, path: &String| {
        parameters.get(path).map_or_else(|| "–".to_owned(), |values| values.join(" or "))
    };
    let differing: Vec<(String, Vec<String>)> = paths
        .into_iter()
        .map(|path| (path.clone(), arms.iter().map(|(_, parameters)| value(parameters, path)).collect::<Vec<_>>()))
        .filter(|(_, values)| values.iter().any(|value| *value != values[0]))
        .collect();
    let shared = total - differing.len();
    (differing, shared)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn instance(arm: &str, seed: &str, params: Value) -> Instance {
        Instance {
            name: format!("rl[{arm},{seed}]"),
            matrix: vec![("arm".into(), arm.into()), ("seed".into(), seed.into())],
            kind: "rl.ppo".into(),
            params,
            seed: None,
            output: "PolicyRun".into(),
            inputs: Vec::new(),
        }
    }

    #[test]
    fn only_what_differs_between_arms_is_listed() {
        let params = |objective: &str, n: u64| json!({ "objective": objective, "lr": 0.1, "steps": { "n": n } });
        let stages = [
            instance("mean", "1", params("mean", 4)),
            instance("mean", "2", params("mean", 4)),
            instance(
                "adaptive",
                "1",
                json!({ "objective": "adaptive", "lr": 0.1, "steps": { "n": 4 }, "scope": "batch" }),
            ),
        ];
        let arms = by_arm(stages.iter());
        assert_eq!(arms.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(), ["mean", "adaptive"]);
        let (differing, shared) = compare(&arms);
        let row = |name: &str, values: [&str; 2]| (name.to_owned(), values.map(str::to_owned).to_vec());
        assert_eq!(differing, [row("objective", ["mean", "adaptive"]), row("scope", ["–", "batch"])]);
        // kind, lr, steps.n
        assert_eq!(shared, 3);
    }
}
