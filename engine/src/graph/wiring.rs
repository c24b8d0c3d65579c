//! Checks the inputs of each port: names, counts, artifact types.

use super::draft_index::DraftIndex;
use super::expand::{InstanceDraft, Need};
use crate::diagnostics::{Diagnostic, Diagnostics, did_you_mean};
use crate::kind::{Arity, Port, Signature};
use crate::names::is_name;

/// Checks the inputs of each port of `drafts[at]` and returns whether there are no faults. `signatures` has those that
/// could be determined.
pub fn check(
    at: usize,
    drafts: &[InstanceDraft],
    signatures: &[Option<Signature>],
    index: &DraftIndex,
    faults: &mut Diagnostics,
) -> bool {
    let draft = &drafts[at];
    let Some(signature) = &signatures[at] else { return false };
    let before = faults.count();
    for need in &draft.needs {
        match signature.ports.iter().find(|port| port.name == need.port) {
            Some(port) => check_port(port, need, draft, drafts, signatures, faults),
            None if signature.open && is_name(&need.port) => check_repeats(need, draft, drafts, faults),
            None => {
                let kind = kind_of(draft, index);
                let message = format!("stage `{}`: {kind} has no port `{}`", draft.name.stage, need.port);
                let help = did_you_mean(&need.port, signature.ports.iter().map(|port| port.name.as_str()));
                let help = help.or_else(|| Some(format!("{kind} takes no inputs")));
                faults.push(Diagnostic::new(need.span, message).maybe_help(help).of_instance(draft.display_name()));
            }
        }
    }
    for port in signature.ports.iter().filter(|port| port.arity != Arity::Optional) {
        let connected = draft.needs.iter().any(|need| need.port == port.name && !(need.from.is_empty() && need.valid));
        if !connected {
            let stage = &index.document.stages[draft.stage];
            let message = format!(
                "stage `{}` has no input at port `{}`, which {} requires",
                stage.name,
                port.name,
                kind_of(draft, index)
            );
            let help = suggest_input(port, at, drafts, signatures);
            faults.push(Diagnostic::new(stage.span, message).help(help).of_instance(draft.display_name()));
        }
    }
    faults.count() == before
}

fn kind_of<'a>(draft: &InstanceDraft, index: &DraftIndex<'a>) -> &'a str {
    index.document.stages[draft.stage].uses.as_ref().map_or("", |(kind, _)| kind)
}

/// Checks the inputs of one declared port.
fn check_port(
    port: &Port,
    need: &Need,
    draft: &InstanceDraft,
    drafts: &[InstanceDraft],
    signatures: &[Option<Signature>],
    faults: &mut Diagnostics,
) {
    let stage = &draft.name.stage;
    if port.arity != Arity::Many && need.from.len() > 1 {
        let first = &drafts[need.from[0].0].name;
        let message =
            format!("port `{}` of stage `{stage}` takes one input, but is connected to {}", port.name, need.from.len());
        let help = format!("choose one of them, such as `{first}`");
        faults.push(Diagnostic::new(need.from[0].1, message).help(help).of_instance(draft.display_name()));
        return;
    }
    check_repeats(need, draft, drafts, faults);
    for (source, span) in &need.from {
        let Some(signature) = &signatures[*source] else { continue };
        let output = signature.output.as_str();
        if !port.accepts.is_empty() && !port.accepts.contains(&output) {
            let message = format!(
                "port `{}` of stage `{stage}` takes {}, but `{}` produces {output}",
                port.name,
                port.accepts.join(" or "),
                drafts[*source].name,
            );
            faults.push(Diagnostic::new(*span, message).of_instance(draft.display_name()));
        }
    }
}

fn check_repeats(need: &Need, draft: &InstanceDraft, drafts: &[InstanceDraft], faults: &mut Diagnostics) {
    let mut seen = std::collections::HashSet::with_capacity(need.from.len());
    for (source, span) in &need.from {
        if !seen.insert(*source) {
            let message = format!(
                "port `{}` of stage `{}` is connected to `{}` twice",
                need.port, draft.name.stage, drafts[*source].name
            );
            faults.push(Diagnostic::new(*span, message).of_instance(draft.display_name()));
        }
    }
}

/// Suggests where a missing input could come from.
fn suggest_input(port: &Port, at: usize, drafts: &[InstanceDraft], signatures: &[Option<Signature>]) -> String {
    const MAX_SUGGESTED: usize = 3;
    let mut stages: Vec<&str> = Vec::new();
    for (draft, signature) in drafts.iter().zip(signatures) {
        let fits = signature.as_ref().is_some_and(|s| port.accepts.contains(&s.output.as_str()));
        if fits && draft.stage != drafts[at].stage && !stages.contains(&draft.name.stage.as_str()) {
            stages.push(draft.name.stage.as_str());
            if stages.len() == MAX_SUGGESTED {
                break;
            }
        }
    }
    let expected = if port.accepts.is_empty() { "an artifact".to_owned() } else { port.accepts.join(" or ") };
    match stages.as_slice() {
        [] => format!("connect {expected}: `needs: {{ {}: … }}`", port.name),
        [one, ..] => {
            format!("{expected} is produced by `{}`: `needs: {{ {}: {one} }}`", stages.join("`, `"), port.name)
        }
    }
}
