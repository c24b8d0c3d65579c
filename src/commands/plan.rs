//! `temper plan`: shows what a run would do, and why.

use engine::error::Error;
use engine::estimate::{Estimate, Prospect, Range};
use engine::graph::Graph;
use engine::kind::Registry;
use engine::plan::{Flags, Plan, State};
use engine::remote::Shared;
use serde_json::{Value, json};

use super::{Done, load, open_store, print_json, remote};
use crate::args::{Cut, Pipeline, RemoteAt};
use crate::report::terminal::table;

pub fn plan(pipeline: &Pipeline, cut: &Cut, at: &RemoteAt, registry: &Registry) -> Done {
    let graph = load(pipeline, &cut.until, registry)?;
    let store = open_store(pipeline)?;
    let flags = Flags::default();
    let address = remote::address(pipeline, at, &graph)?;
    let (plan, opened) = remote::plan(&graph, registry, &store, &flags, address)?;
    let shared = Shared { store: &store, remote: opened.as_ref() };
    let prospects = engine::plan::prospects(&graph, &plan, registry, &store)?;
    let missing = engine::plan::missing(&graph, &plan, registry, &store, &shared, &flags)?;
    tell(&graph, &plan, &shared.from_remote(&plan)?, &prospects, &missing, pipeline.store.json);
    Ok(0)
}

/// Prints a plan as text or JSON. `from_remote`: by stage, whether it is reused from the remote store; `missing`: failed
/// checks of the environment that stages need.
pub fn tell(
    graph: &Graph,
    plan: &Plan,
    from_remote: &[bool],
    prospects: &[Option<Prospect>],
    missing: &[Error],
    for_machines: bool,
) {
    if for_machines {
        let mut told = describe(graph, plan, from_remote, prospects);
        told["warnings"] = missing.iter().map(|error| error.message.as_str()).collect();
        return print_json(&told);
    }
    let rows: Vec<Vec<String>> = plan
        .stages
        .iter()
        .zip(from_remote)
        .map(|(planned, from_remote)| {
            let line = line(graph, &planned.state);
            let instance = &graph.instances[planned.instance];
            let action = if *from_remote { "reuse (remote)" } else { line.action };
            let seconds = match planned.state {
                State::Reuse { .. } => String::new(),
                _ => planned.expected_seconds.map_or_else(String::new, |s| format!("{s:.0} s")),
            };
            vec![
                action.to_owned(),
                instance.name.to_string(),
                instance.kind.clone(),
                line.key.map_or_else(String::new, |k| k[..12].to_owned()),
                seconds,
                line.reason,
            ]
        })
        .collect();
    put!("{}", table(&["", "stage", "kind", "key", "expected", "reason"], 6, &rows));
    let expected: f64 =
        plan.stages.iter().filter(|p| !matches!(p.state, State::Reuse { .. })).filter_map(|p| p.expected_seconds).sum();
    let open = plan.stages.iter().filter(|p| !matches!(p.state, State::Reuse { .. })).count();
    say!("\n{} stages: {open} to run or pending, {} reused", plan.stages.len(), plan.stages.len() - open);
    if expected > 0.0 {
        say!("expected: {expected:.0} s of stage time, by earlier runs");
    }
    for (planned, prospect) in plan.stages.iter().zip(prospects) {
        if let Some(prospect) = prospect {
            say!("{}: {}", graph.instances[planned.instance].name, cost(prospect));
        }
    }
    for planned in plan.stages.iter().filter(|planned| !planned.notes.is_empty()) {
        say!("{}: {}", graph.instances[planned.instance].name, planned.notes.join("; "));
    }
    if !graph.not_needed.is_empty() {
        let names: Vec<String> = graph.not_needed.iter().map(ToString::to_string).collect();
        say!("not needed: {}", names.join(", "));
    }
    missing.iter().for_each(|error| note!("warning: {error}"));
}

/// The expected cost of a stage, with each note on its own line.
fn cost(prospect: &Prospect) -> String {
    let Estimate { requests, input_tokens, output_tokens, dollars, notes } = match prospect {
        Prospect::Unknown(why) => return format!("cost not known: {why}"),
        Prospect::Known(estimate) => estimate,
    };
    let tokens = |range: &Range| between(range, |n| count(n.round() as u64));
    let mut text = format!("{} requests", count(*requests));
    if *requests > 0 {
        text += &format!(", {} tokens in, {} out", tokens(input_tokens), tokens(output_tokens));
        let money = |dollars: &Range| between(dollars, |d| format!("{d:.2}"));
        text += &dollars.as_ref().map_or_else(|| ", no price known".to_owned(), |d| format!(", ${}", money(d)));
    }
    notes.iter().fold(text, |text, note| text + "\n    " + note)
}

fn between(range: &Range, word: impl Fn(f64) -> String) -> String {
    let (low, high) = (word(range.low), word(range.high));
    if low == high { low } else { format!("{low} to {high}") }
}

/// Formats a count with commas between thousands.
fn count(n: u64) -> String {
    let digits = n.to_string();
    let groups: Vec<&str> =
        (0..digits.len()).rev().step_by(3).map(|end| &digits[end.saturating_sub(2)..=end]).collect();
    groups.into_iter().rev().collect::<Vec<_>>().join(",")
}

struct Line {
    action: &'static str,
    reason: String,
    key: Option<String>,
    waits_on: Vec<String>,
}

fn line(graph: &Graph, state: &State) -> Line {
    match state {
        State::Reuse { key, .. } => {
            Line { action: "reuse", reason: String::new(), key: Some(key.to_string()), waits_on: Vec::new() }
        }
        State::Run { key, reason } => {
            Line { action: "run", reason: reason.to_string(), key: Some(key.to_string()), waits_on: Vec::new() }
        }
        State::Pending { waits_on } => {
            let names: Vec<String> = waits_on.iter().map(|i| graph.instances[*i].name.to_string()).collect();
            let shown = if names.len() > 3 {
                format!("{}, … ({})", names[..3].join(", "), names.len())
            } else {
                names.join(", ")
            };
            Line { action: "pending", reason: format!("waits on {shown}"), key: None, waits_on: names }
        }
    }
}

fn describe(graph: &Graph, plan: &Plan, from_remote: &[bool], prospects: &[Option<Prospect>]) -> Value {
    let stages: Vec<Value> = plan
        .stages
        .iter()
        .zip(prospects)
        .zip(from_remote)
        .map(|((planned, prospect), from_remote)| {
            let instance = &graph.instances[planned.instance];
            let line = line(graph, &planned.state);
            let mut told = json!({
                "stage": instance.name.to_string(),
                "kind": instance.kind,
                "action": line.action,
                "reason": line.reason,
                "key": line.key,
                "waits_on": line.waits_on,
                "expected_seconds": planned.expected_seconds,
            });
            if let Some(prospect) = prospect {
                told["cost"] = json!(prospect);
            }
            if *from_remote {
                told["remote"] = json!(true);
            }
            if !planned.notes.is_empty() {
                told["notes"] = json!(planned.notes);
            }
            told
        })
        .collect();
    json!({ "stages": stages, "not_needed": graph.not_needed.iter().map(ToString::to_string).collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_have_their_thousands_apart_and_a_range_of_one_is_one() {
        let told = [0, 999, 1_000, 12_345, 1_234_567].map(count);
        assert_eq!(told, ["0", "999", "1,000", "12,345", "1,234,567"]);
        let money = |low, high| between(&Range::new(low, high), |d| format!("{d:.2}"));
        assert_eq!([money(1.0, 1.001), money(0.5, 2.0)], ["1.00", "0.50 to 2.00"]);
    }

    #[test]
    fn a_cost_is_told_with_what_it_rests_on() {
        let range = Range::new(1_000.0, 2_000.0);
        let notes = vec!["prices of a day".to_owned()];
        let estimate = Estimate {
            requests: 5,
            input_tokens: range,
            output_tokens: range,
            dollars: Some(Range::new(1.0, 2.0)),
            notes,
        };
        let told = cost(&Prospect::Known(estimate.clone()));
        assert_eq!(
            told,
            "5 requests, 1,000 to 2,000 tokens in, 1,000 to 2,000 out, $1.00 to 2.00\n    prices of a day"
        );
        let unpriced = cost(&Prospect::Known(Estimate { dollars: None, ..estimate }));
        assert!(unpriced.contains("out, no price known\n"), "{unpriced}");
        assert_eq!(cost(&Prospect::Unknown("known after pairs".into())), "cost not known: known after pairs");
    }
}
