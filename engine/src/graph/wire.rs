//! Checks the inputs of each port: names, counts, artifact types.

use super::expand::{Draft, Layout, Need};
use crate::diagnostics::{Diagnostics, Fault, did_you_mean};
use crate::kind::{Arity, Port, Signature};
use crate::names::is_name;

/// Checks the inputs of each port of `drafts[at]` and returns whether there are no faults. `signatures` has those that
/// could be determined.
pub fn check(
    at: usize,
    drafts: &[Draft],
    signatures: &[Option<Signature>],
    layout: &Layout,
    faults: &mut Diagnostics,
) -> bool {
    let draft = &drafts[at];
    let Some(signature) = &signatures[at] else { return false };
    let before = faults.count();
    for need in &draft.needs {
        match signature.ports.iter().find(|port| port.name == need.port) {
            Some(port) => given(port, need, draft, drafts, signatures, faults),
            None if signature.open && is_name(&need.port) => twice(need, draft, drafts, faults),
            None => {
                let kind = kind_of(draft, layout);
                let message = format!("stage `{}`: {kind} has no port `{}`", draft.name.stage, need.port);
                let help = did_you_mean(&need.port, signature.ports.iter().map(|port| port.name.as_str()));
                let help = help.or_else(|| Some(format!("{kind} takes no inputs")));
                faults.push(Fault::new(need.span, message).maybe_help(help).of_instance(draft.told_as()));
            }
        }
    }
    for port in signature.ports.iter().filter(|port| port.arity != Arity::Optional) {
        let fed = draft.needs.iter().any(|need| need.port == port.name && !(need.from.is_empty() && need.sound));
        if !fed {
            let stage = &layout.spec.stages[draft.stage];
            let message =
                format!("stage `{}` lacks an input: {} needs `{}`", stage.name, kind_of(draft, layout), port.name);
            let help = whence(port, at, drafts, signatures);
            faults.push(Fault::new(stage.span, message).help(help).of_instance(draft.told_as()));
        }
    }
    faults.count() == before
}

fn kind_of<'a>(draft: &Draft, layout: &Layout<'a>) -> &'a str {
    layout.spec.stages[draft.stage].uses.as_ref().map_or("", |(kind, _)| kind)
}

/// Checks the inputs of one declared port.
fn given(
    port: &Port,
    need: &Need,
    draft: &Draft,
    drafts: &[Draft],
    signatures: &[Option<Signature>],
    faults: &mut Diagnostics,
) {
    let stage = &draft.name.stage;
    if port.arity != Arity::Many && need.from.len() > 1 {
        let first = &drafts[need.from[0].0].name;
        let message = format!("port `{}` of stage `{stage}` takes one, and is given {}", port.name, need.from.len());
        let help = format!("name one of them, such as `{first}`");
        faults.push(Fault::new(need.from[0].1, message).help(help).of_instance(draft.told_as()));
        return;
    }
    twice(need, draft, drafts, faults);
    for (source, span) in &need.from {
        let Some(signature) = &signatures[*source] else { continue };
        let output = signature.output.as_str();
        if !port.accepts.is_empty() && !port.accepts.contains(&output) {
            let message = format!(
                "port `{}` of stage `{stage}` takes {}; `{}` gives {output}",
                port.name,
                port.accepts.join(" or "),
                drafts[*source].name,
            );
            faults.push(Fault::new(*span, message).of_instance(draft.told_as()));
        }
    }
}

fn twice(need: &Need, draft: &Draft, drafts: &[Draft], faults: &mut Diagnostics) {
    let mut seen = std::collections::HashSet::with_capacity(need.from.len());
    for (source, span) in &need.from {
        if !seen.insert(*source) {
            let message = format!(
                "port `{}` of stage `{}` is given `{}` twice",
                need.port, draft.name.stage, drafts[*source].name
            );
            faults.push(Fault::new(*span, message).of_instance(draft.told_as()));
        }
    }
}

/// Suggests where a missing input could come from.
fn whence(port: &Port, at: usize, drafts: &[Draft], signatures: &[Option<Signature>]) -> String {
    const TOLD: usize = 3;
    let mut stages: Vec<&str> = Vec::new();
    for (draft, signature) in drafts.iter().zip(signatures) {
        let fits = signature.as_ref().is_some_and(|s| port.accepts.contains(&s.output.as_str()));
        if fits && draft.stage != drafts[at].stage && !stages.contains(&draft.name.stage.as_str()) {
            stages.push(draft.name.stage.as_str());
            if stages.len() == TOLD {
                break;
            }
        }
    }
    let wanted = if port.accepts.is_empty() { "an artifact".to_owned() } else { port.accepts.join(" or ") };
    match stages.as_slice() {
        [] => format!("give it {wanted}: `needs: {{ {}: … }}`", port.name),
        [one, ..] => format!("{wanted} is given by `{}`: `needs: {{ {}: {one} }}`", stages.join("`, `"), port.name),
    }
}
