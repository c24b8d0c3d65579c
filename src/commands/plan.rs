//! `temper plan`: shows what a run would do, and why.

use engine::error::Error;
use engine::estimate::{Estimate, EstimateRange, ExpectedCost};
use engine::graph::Graph;
use engine::kind::Registry;
use engine::machine::Machine;
use engine::names::{InstanceName, StageName};
use engine::plan::{Flags, Plan, PlannedState};
use engine::remote::CombinedStore;
use engine::run::DeviceShare;
use serde_json::{Value, json};

use super::sweep::{Combination, combinations};
use super::{CommandResult, Failure, load_placed, open_store, print_json, remote};
use crate::args::{ExecutorArgs, PipelineArgs, RemoteArgs, UntilArgs};
use crate::output::counted;
use crate::progress::size;
use crate::report::terminal::table;

pub fn plan(
    pipeline: &PipelineArgs,
    until: &UntilArgs,
    at: &RemoteArgs,
    executor: &ExecutorArgs,
    sweep: bool,
    registry: &Registry,
) -> CommandResult {
    let as_json = pipeline.store.json;
    if !sweep {
        let plan = describe_plan(pipeline, until, at, executor, registry)?;
        plan.print(as_json);
        return Ok(0);
    }
    let mut plans = Vec::new();
    for (i, Combination { set, name }) in combinations(&pipeline.changes.set)?.into_iter().enumerate() {
        let mut one = pipeline.clone();
        one.changes.set = set;
        let plan = describe_plan(&one, until, at, executor, registry)?;
        if as_json {
            plans.push(json!({ "set": one.changes.set, "plan": plan.json() }));
        } else {
            outln!("{}--- {name}", if i == 0 { "" } else { "\n" });
            plan.print(false);
        }
    }
    if as_json {
        print_json(&json!({ "sweep": plans }));
    }
    Ok(0)
}

fn describe_plan(
    pipeline: &PipelineArgs,
    until: &UntilArgs,
    at: &RemoteArgs,
    executor: &ExecutorArgs,
    registry: &Registry,
) -> std::result::Result<PlanView, Failure> {
    let graph = load_placed(pipeline, &until.until, executor, registry)?;
    let store = open_store(pipeline)?;
    let flags = Flags::default();
    let address = remote::address(pipeline, at, &graph)?;
    let (plan, opened) = remote::plan_with_remote(&graph, registry, &store, &flags, address)?;
    let combined = CombinedStore { store: &store, remote: opened.as_ref() };
    let expected_costs = engine::plan::expected_costs(&graph, &plan, registry, &store)?;
    let mut missing = engine::plan::missing_environment(&graph, &plan, registry, &store, &combined, &flags)?;
    missing.extend(engine::run::missing_programs(&graph, &plan));
    let share = DeviceShare::Nothing;
    match Machine::detect(engine::run::needs_gpus(&graph, &plan, share)) {
        Ok(machine) => missing.extend(engine::run::unfit(&graph, &plan, &machine, share)),
        Err(error) => missing.push(error),
    }
    let from_remote = combined.reused_from_remote(&plan)?;
    Ok(PlanView { graph, plan, from_remote, expected_costs, missing })
}

/// A plan with what is printed beside it.
struct PlanView {
    graph: Graph,
    plan: Plan,
    from_remote: Vec<bool>,
    expected_costs: Vec<Option<ExpectedCost>>,
    missing: Vec<Error>,
}

impl PlanView {
    fn print(&self, as_json: bool) {
        print_plan(&self.graph, &self.plan, &self.from_remote, &self.expected_costs, &self.missing, as_json);
    }

    fn json(&self) -> Value {
        plan_json(&self.graph, &self.plan, &self.from_remote, &self.expected_costs, &self.missing)
    }
}

fn plan_json(
    graph: &Graph,
    plan: &Plan,
    from_remote: &[bool],
    expected_costs: &[Option<ExpectedCost>],
    missing: &[Error],
) -> Value {
    let mut object = describe(graph, plan, from_remote, expected_costs);
    object["warnings"] = missing.iter().map(|error| error.message.as_str()).collect();
    object
}

/// Prints a plan as text or JSON. `from_remote`: by stage, whether it is reused from the remote store; `missing`: failed
/// checks of the environment that stages need.
pub fn print_plan(
    graph: &Graph,
    plan: &Plan,
    from_remote: &[bool],
    expected_costs: &[Option<ExpectedCost>],
    missing: &[Error],
    as_json: bool,
) {
    if as_json {
        return print_json(&plan_json(graph, plan, from_remote, expected_costs, missing));
    }
    let some_elsewhere = graph.instances.iter().any(|instance| instance.placement.executor.is_some());
    let rows: Vec<Vec<String>> = plan
        .stages
        .iter()
        .zip(from_remote)
        .map(|(planned, from_remote)| {
            let line = line(graph, &planned.state);
            let instance = &graph.instances[planned.instance];
            let action = if *from_remote { "reuse (remote)" } else { line.action };
            let seconds = match planned.state {
                PlannedState::Reuse { .. } => String::new(),
                _ => planned.expected.seconds.map_or_else(|| "unknown".to_owned(), duration),
            };
            let mut row = vec![
                action.to_owned(),
                instance.name.to_string(),
                instance.kind.clone(),
                line.key.map_or_else(String::new, |k| k[..12].to_owned()),
                seconds,
                amount(planned.expected.memory),
                amount(planned.expected.disk),
            ];
            if some_elsewhere {
                let is_open = !matches!(planned.state, PlannedState::Reuse { .. });
                row.push(instance.placement.executor.clone().filter(|_| is_open).unwrap_or_default());
            }
            row.push(line.reason);
            row
        })
        .collect();
    let mut header = vec!["", "stage", "kind", "key", "expected", "memory", "disk", "reason"];
    if some_elsewhere {
        header.insert(7, "executor");
    }
    out!("{}", table(&header, header.len(), &rows));
    let expected: f64 = plan
        .stages
        .iter()
        .filter(|p| !matches!(p.state, PlannedState::Reuse { .. }))
        .filter_map(|p| p.expected.seconds)
        .sum();
    let open = plan.stages.iter().filter(|p| !matches!(p.state, PlannedState::Reuse { .. })).count();
    let all = plan.stages.len();
    outln!("\n{}: {open} to run or pending, {} reused", counted(all, "stage"), all - open);
    let unknown = plan
        .stages
        .iter()
        .filter(|p| !matches!(p.state, PlannedState::Reuse { .. }) && p.expected.seconds.is_none())
        .count();
    match unknown {
        0 if open > 0 => outln!("expected: {} of stage time, according to earlier runs", duration(expected)),
        _ if expected > 0.0 => {
            let of = counted(unknown, "stage");
            outln!(
                "expected: {} of stage time, according to earlier runs, and that of {of} unknown",
                duration(expected)
            );
        }
        0 => {}
        _ => outln!("expected: unknown, as no comparable stage has run here"),
    }
    for (planned, expected_cost) in plan.stages.iter().zip(expected_costs) {
        if let Some(expected_cost) = expected_cost {
            outln!("{}: {}", graph.instances[planned.instance].name, cost_line(expected_cost));
        }
    }
    for planned in plan.stages.iter().filter(|planned| !planned.notes.is_empty()) {
        outln!("{}: {}", graph.instances[planned.instance].name, planned.notes.join("; "));
    }
    if !graph.not_needed.is_empty() {
        outln!("not needed: {}", not_needed(graph));
    }
    missing.iter().for_each(|error| errln!("warning: {error}"));
}

fn amount(bytes: Option<u64>) -> String {
    bytes.map_or_else(String::new, |bytes| size(bytes as f64))
}

/// Seconds up to ten minutes, then minutes, then hours.
fn duration(seconds: f64) -> String {
    match seconds {
        ..600.0 => format!("{seconds:.0} s"),
        ..36_000.0 => format!("{:.0} min", seconds / 60.0),
        _ => format!("{:.0} h", seconds / 3600.0),
    }
}

/// The instances that no target needs, by stage: `pairs, sft (3 of 7)`.
fn not_needed(graph: &Graph) -> String {
    let mut stages: Vec<(&StageName, usize)> = Vec::new();
    for InstanceName { stage, .. } in &graph.not_needed {
        match stages.iter_mut().find(|(name, _)| *name == stage) {
            Some((_, count)) => *count += 1,
            None => stages.push((stage, 1)),
        }
    }
    let parts = stages.iter().map(|(stage, count)| {
        let needed = graph.instances.iter().filter(|instance| instance.name.stage == **stage).count();
        if needed == 0 { stage.to_string() } else { format!("{stage} ({count} of {})", count + needed) }
    });
    parts.collect::<Vec<_>>().join(", ")
}

/// The expected cost of a stage, with each note on its own line.
fn cost_line(expected_cost: &ExpectedCost) -> String {
    let Estimate { requests, input_tokens, output_tokens, dollars, notes } = match expected_cost {
        ExpectedCost::Unknown(why) => return format!("cost unknown: {why}"),
        ExpectedCost::Known(estimate) => estimate,
    };
    let tokens = |range: &EstimateRange| format_range(range, |n| with_thousands(n.round() as u64));
    let mut text = format!("{} request{}", with_thousands(*requests), if *requests == 1 { "" } else { "s" });
    if *requests > 0 {
        text += &format!(", {} tokens in, {} out", tokens(input_tokens), tokens(output_tokens));
        let money = |dollars: &EstimateRange| format_range(dollars, |d| format!("{d:.2}"));
        text += &dollars.as_ref().map_or_else(|| ", no price known".to_owned(), |d| format!(", ${}", money(d)));
    }
    notes.iter().fold(text, |text, note| text + "\n    " + note)
}

fn format_range(range: &EstimateRange, format: impl Fn(f64) -> String) -> String {
    let (low, high) = (format(range.low), format(range.high));
    if low == high { low } else { format!("{low} to {high}") }
}

/// Formats a count with commas between thousands.
fn with_thousands(n: u64) -> String {
    let digits = n.to_string();
    let groups: Vec<&str> =
        (0..digits.len()).rev().step_by(3).map(|end| &digits[end.saturating_sub(2)..=end]).collect();
    groups.into_iter().rev().collect::<Vec<_>>().join(",")
}

struct PlanLine {
    action: &'static str,
    reason: String,
    key: Option<String>,
    waits_on: Vec<String>,
}

fn line(graph: &Graph, state: &PlannedState) -> PlanLine {
    match state {
        PlannedState::Reuse { key, .. } => {
            PlanLine { action: "reuse", reason: String::new(), key: Some(key.to_string()), waits_on: Vec::new() }
        }
        PlannedState::Run { key, reason } => {
            PlanLine { action: "run", reason: reason.to_string(), key: Some(key.to_string()), waits_on: Vec::new() }
        }
        PlannedState::Pending { waits_on } => {
            let names: Vec<String> = waits_on.iter().map(|i| graph.instances[*i].name.to_string()).collect();
            let shown = if names.len() > 3 {
                format!("{}, … ({})", names[..3].join(", "), names.len())
            } else {
                names.join(", ")
            };
            PlanLine { action: "pending", reason: format!("waiting for {shown}"), key: None, waits_on: names }
        }
    }
}

fn describe(graph: &Graph, plan: &Plan, from_remote: &[bool], expected_costs: &[Option<ExpectedCost>]) -> Value {
    let stages: Vec<Value> = plan
        .stages
        .iter()
        .zip(expected_costs)
        .zip(from_remote)
        .map(|((planned, expected_cost), from_remote)| {
            let instance = &graph.instances[planned.instance];
            let line = line(graph, &planned.state);
            let mut object = json!({
                "stage": instance.name.to_string(),
                "kind": instance.kind,
                "action": line.action,
                "reason": line.reason,
                "key": line.key,
                "waits_on": line.waits_on,
                "expected_seconds": planned.expected.seconds,
                "expected_memory_bytes": planned.expected.memory,
                "expected_disk_bytes": planned.expected.disk,
            });
            if let Some(expected_cost) = expected_cost {
                object["cost"] = json!(expected_cost);
            }
            if let Some(executor) = &instance.placement.executor {
                object["executor"] = json!(executor);
            }
            if *from_remote {
                object["remote"] = json!(true);
            }
            if !planned.notes.is_empty() {
                object["notes"] = json!(planned.notes);
            }
            object
        })
        .collect();
    json!({ "stages": stages, "not_needed": graph.not_needed.iter().map(ToString::to_string).collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_have_commas_and_an_equal_range_is_one_number() {
        let shown = [0, 999, 1_000, 12_345, 1_234_567].map(with_thousands);
        assert_eq!(shown, ["0", "999", "1,000", "12,345", "1,234,567"]);
        let money = |low, high| format_range(&EstimateRange::new(low, high), |d| format!("{d:.2}"));
        assert_eq!([money(1.0, 1.001), money(0.5, 2.0)], ["1.00", "0.50 to 2.00"]);
    }

    #[test]
    fn a_cost_is_shown_with_its_notes() {
        let range = EstimateRange::new(1_000.0, 2_000.0);
        let notes = vec!["prices of a day".to_owned()];
        let estimate = Estimate {
            requests: 5,
            input_tokens: range,
            output_tokens: range,
            dollars: Some(EstimateRange::new(1.0, 2.0)),
            notes,
        };
        let shown = cost_line(&ExpectedCost::Known(estimate.clone()));
        assert_eq!(
            shown,
            "5 requests, 1,000 to 2,000 tokens in, 1,000 to 2,000 out, $1.00 to 2.00\n    prices of a day"
        );
        let unpriced = cost_line(&ExpectedCost::Known(Estimate { dollars: None, ..estimate }));
        assert!(unpriced.contains("out, no price known\n"), "{unpriced}");
        assert_eq!(cost_line(&ExpectedCost::Unknown("known after pairs".into())), "cost unknown: known after pairs");
    }
}
