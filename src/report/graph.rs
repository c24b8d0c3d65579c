//! The run's graph by stage: how many of its instances ran, were reused, failed or were not reached.

use std::collections::BTreeSet;

use super::load::{InstanceState, RunData};
use crate::graph_view::{GraphNode, layers_svg};

/// Draws one box per stage, since a matrix would only repeat the picture.
pub fn graph(run: &RunData) -> String {
    let mut stages: Vec<(GraphNode, Tally)> = Vec::new();
    for instance in &run.instances {
        let result = run.result(instance);
        let index = stages.iter().position(|(b, _)| b.name == instance.stage()).unwrap_or_else(|| {
            stages.push((GraphNode { name: instance.stage().to_owned(), ..GraphNode::default() }, Tally::default()));
            stages.len() - 1
        });
        let (entry, tally) = &mut stages[index];
        let from = instance.inputs.iter().flat_map(|port| &port.from);
        let from: BTreeSet<String> =
            from.map(|name| name.split('[').next().unwrap_or(name).to_owned()).filter(|s| *s != entry.name).collect();
        entry.from.extend(from);
        tally.states.push(result.state);
        tally.seconds += result.seconds.unwrap_or(0.0);
    }
    let nodes: Vec<GraphNode> = stages
        .into_iter()
        .map(|(entry, tally)| GraphNode {
            note: tally.note(),
            ran: tally.count(InstanceState::Ran) > 0,
            failed: tally.count(InstanceState::Failed) > 0,
            unreached: UNREACHED.iter().any(|state| tally.count(*state) > 0),
            ..entry
        })
        .collect();
    format!("<div class=\"wide\" tabindex=\"0\">{}</div>", layers_svg(&nodes))
}

const UNREACHED: [InstanceState; 3] = [InstanceState::Interrupted, InstanceState::Skipped, InstanceState::NotReached];

/// The final states of a stage's instances.
#[derive(Default)]
struct Tally {
    states: Vec<InstanceState>,
    seconds: f64,
}

impl Tally {
    fn count(&self, state: InstanceState) -> usize {
        self.states.iter().filter(|s| **s == state).count()
    }

    /// The worst state of any instance: the state itself if all share it, otherwise a count; the time if all succeeded.
    fn note(&self) -> String {
        let all = self.states.len();
        for state in [InstanceState::Failed].into_iter().chain(UNREACHED) {
            match self.count(state) {
                0 => {}
                n if n == all && n == 1 => return state.word().to_owned(),
                n if n == all => return format!("{n} × {}", state.word()),
                n => return format!("{n} of {all} {}", state.word()),
            }
        }
        match self.count(InstanceState::Ran) {
            0 if all == 1 => InstanceState::Reused.word().to_owned(),
            0 => format!("{all} × {}", InstanceState::Reused.word()),
            n if n == all && n == 1 => format!("{:.1} s", self.seconds),
            n if n == all => format!("{n} in {:.1} s", self.seconds),
            n => format!("{n} of {all} ran, {:.1} s", self.seconds),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unreached_stages_are_not_shown_as_reused() {
        use InstanceState::{Failed, Interrupted, NotReached, Ran, Reused, Skipped};
        let cases: &[(&[InstanceState], &str)] = &[
            (&[Reused], "reused"),
            (&[Reused, Reused], "2 × reused"),
            (&[Ran], "1.5 s"),
            (&[Ran, Ran], "2 in 1.5 s"),
            (&[Ran, Reused], "1 of 2 ran, 1.5 s"),
            (&[NotReached], "not reached"),
            (&[Skipped, Skipped], "2 × skipped"),
            (&[Ran, Skipped, NotReached], "1 of 3 skipped"),
            (&[Failed, Skipped], "1 of 2 failed"),
            (&[Interrupted], "interrupted"),
            (&[Ran, Interrupted, Skipped], "1 of 3 interrupted"),
        ];
        for (states, note) in cases {
            assert_eq!(Tally { states: states.to_vec(), seconds: 1.5 }.note(), *note);
        }
    }
}
