//! Builds the graph from a pipeline file: runs every check in turn; each skips what an earlier check found faulty.

use std::collections::{BTreeMap, HashMap};
use std::io::Read;
use std::path::Path;

use super::draft_index::DraftIndex;
use super::expand::{self, InstanceDraft};
use super::params::{self, CheckedParams, KindSchema};
use super::select::{Selection, Selector};
use super::{Graph, InputSource, Instance, LoadOptions, Placement, PortInputs, order, wiring};
use crate::diagnostics::{Diagnostic, Diagnostics, Span, did_you_mean};
use crate::document::executors::LOCAL;
use crate::document::{self, Document};
use crate::kind::{Arity, ConnectedInput, Registry, Signature};
use crate::names::Digest;
use crate::text::strip_bom;

/// Maximum size of a pipeline file in bytes.
pub const MAX_BYTES: u64 = 8 << 20;

pub fn load_file(file: &Path, options: &LoadOptions, registry: &Registry, faults: &mut Diagnostics) -> Option<Graph> {
    let text = read(file, faults)?;
    let source = faults.add_source(file.display().to_string(), text);
    let document = document::read(source, &options.profiles, &options.set, faults)?;
    let whole = std::path::absolute(file).unwrap_or_else(|_| file.to_owned());
    let folder = whole.parent().unwrap_or(Path::new("/"));
    let name = file.file_stem().map_or_else(String::new, |stem| stem.to_string_lossy().into_owned());

    let index = DraftIndex::new(&document, faults);
    let mut drafts = expand::drafts(&index, faults);
    let (checked, signatures) = check_params(&document, &mut drafts, folder, registry, faults);
    let wired: Vec<bool> =
        (0..drafts.len()).map(|at| wiring::check(at, &drafts, &signatures, &index, faults)).collect();
    for (draft, wired) in drafts.iter_mut().zip(wired) {
        draft.valid &= wired;
    }
    check_duplicates(&index, &drafts, &checked, faults);
    check_wiring(&index, &drafts, &checked, registry, faults);
    let needs: Vec<Vec<usize>> = drafts
        .iter()
        .map(|draft| draft.needs.iter().flat_map(|need| need.from.iter().map(|(at, _)| *at)).collect())
        .collect();
    let sorted = order::sort(&needs);
    if let Err(left) = &sorted {
        report_cycles(&needs, left, &drafts, faults);
    }
    let targets = targets(&index, options, faults);
    let needed = order::needed(&needs, &targets);
    check_paths(&checked, &needed, faults);
    if targets.is_empty() && faults.faults().is_empty() {
        let at = Span { source, start: 0, length: 0 };
        faults.push(Diagnostic::new(at, "nothing to run: the file has no stages, or its list of targets is empty"));
    }
    if !faults.faults().is_empty() {
        return None;
    }
    Some(build_graph(&document, name, drafts, checked, &sorted.ok()?, &targets, &needed))
}

pub fn read_profile_names(file: &Path, faults: &mut Diagnostics) -> Option<Vec<String>> {
    let text = read(file, faults)?;
    let source = faults.add_source(file.display().to_string(), text.clone());
    let root = document::yaml::parse(source, &text, 0, faults)?;
    let profiles = root.as_map().and_then(|root| root.get("profiles")).and_then(|profiles| profiles.as_map());
    Some(profiles.map_or_else(Vec::new, |profiles| profiles.keys().map(str::to_owned).collect()))
}

fn read(file: &Path, faults: &mut Diagnostics) -> Option<String> {
    let mut bytes = Vec::new();
    let message = match std::fs::File::open(file).and_then(|f| f.take(MAX_BYTES + 1).read_to_end(&mut bytes)) {
        Err(e) => format!("cannot read the pipeline file `{}`: {e}", file.display()),
        Ok(_) if bytes.len() as u64 > MAX_BYTES => {
            format!("the pipeline file `{}` has more than {} MiB", file.display(), MAX_BYTES >> 20)
        }
        Ok(_) => match String::from_utf8(strip_bom(&bytes).to_vec()) {
            Ok(text) => return Some(text),
            Err(e) => {
                let good = &e.as_bytes()[..e.utf8_error().valid_up_to()];
                let line = 1 + good.iter().filter(|byte| **byte == b'\n').count();
                format!("the pipeline file `{}` is not UTF-8 text: line {line}", file.display())
            }
        },
    };
    faults.push(Diagnostic::without_span(message));
    None
}

/// Parameters and signature of an instance whose parameters are valid.
struct CheckedInstance {
    values: CheckedParams,
    signature: Signature,
}

/// Checks the parameters of all valid drafts and unsets `valid` where they have faults. Also returns every signature
/// that can be determined: for parameters with faults, the signature of the remaining ones, so that the same run can
/// check the wiring.
fn check_params(
    document: &Document,
    drafts: &mut [InstanceDraft],
    folder: &Path,
    registry: &Registry,
    faults: &mut Diagnostics,
) -> (Vec<Option<CheckedInstance>>, Vec<Option<Signature>>) {
    let mut kinds: HashMap<&str, KindSchema> = HashMap::new();
    for stage in &document.stages {
        let Some((kind, span)) = &stage.uses else { continue };
        match registry.get_kind(kind) {
            Some(found) => {
                kinds.entry(kind).or_insert_with(|| KindSchema { kind: found, schema: found.schema().to_value() });
            }
            None => {
                let help = did_you_mean(kind, registry.kinds().map(|kind| kind.name()));
                faults.push(Diagnostic::new(*span, format!("unknown kind `{kind}`")).maybe_help(help));
            }
        }
    }
    let (mut checked, mut signatures) = (Vec::with_capacity(drafts.len()), Vec::with_capacity(drafts.len()));
    for draft in drafts {
        let stage = &document.stages[draft.stage];
        let kind_schema = stage.uses.as_ref().and_then(|(kind, _)| kinds.get(kind.as_str()));
        let (mut found, mut signature) = (None, None);
        if let Some(kind_schema) = kind_schema.filter(|_| stage.valid) {
            match params::check(draft, stage, kind_schema, folder, faults) {
                Ok(values) => {
                    found = resolve_signature(draft, stage, kind_schema, values, registry, faults);
                    signature = found.as_ref().map(|checked| checked.signature.clone());
                }
                Err(rest) => signature = rest.and_then(|rest| kind_schema.kind.signature(&rest).ok()),
            }
        }
        draft.valid &= found.is_some();
        checked.push(found);
        signatures.push(signature);
    }
    (checked, signatures)
}

fn resolve_signature(
    draft: &InstanceDraft,
    stage: &document::Stage,
    kind_schema: &KindSchema,
    values: CheckedParams,
    registry: &Registry,
    faults: &mut Diagnostics,
) -> Option<CheckedInstance> {
    let span = draft.with.entry("output").map_or(stage.with_span, |entry| entry.value.span);
    match kind_schema.kind.signature(&values.params) {
        Ok(signature) if registry.get_type(&signature.output).is_none() => {
            let message =
                format!("stage `{}` produces `{}`, which is not an artifact type", stage.name, signature.output);
            let help = did_you_mean(&signature.output, registry.types().map(|t| t.name()));
            faults.push(Diagnostic::new(span, message).maybe_help(help).of_instance(draft.display_name()));
            None
        }
        Ok(signature) => Some(CheckedInstance { values, signature }),
        Err(e) => {
            let fault =
                Diagnostic::new(stage.with_span, format!("stage `{}`: {}", stage.name, e.message)).maybe_help(e.help);
            faults.push(fault.of_instance(draft.display_name()));
            None
        }
    }
}

/// Reports the faults that kinds find in their inputs, for instances whose inputs are all valid.
fn check_wiring(
    index: &DraftIndex,
    drafts: &[InstanceDraft],
    checked: &[Option<CheckedInstance>],
    registry: &Registry,
    faults: &mut Diagnostics,
) {
    let kind_of =
        |at: usize| index.document.stages[drafts[at].stage].uses.as_ref().map_or("", |(kind, _)| kind.as_str());
    for (at, draft) in drafts.iter().enumerate().filter(|(_, draft)| draft.valid) {
        let (Some(CheckedInstance { values, .. }), Some(kind)) = (&checked[at], registry.get_kind(kind_of(at))) else {
            continue;
        };
        let sources = draft.needs.iter().flat_map(|need| need.from.iter().map(|(source, _)| (&need.port, *source)));
        let wired = sources.map(|(port, source)| {
            let CheckedInstance { values, signature } = checked[source].as_ref()?;
            Some(ConnectedInput { port, kind: kind_of(source), output: &signature.output, params: &values.params })
        });
        let Some(wired) = wired.collect::<Option<Vec<_>>>() else { continue };
        // Normalised parameters always parse.
        for (port, error) in kind.check_wiring(&values.params, &wired).unwrap_or_default() {
            let selector = draft.needs.iter().find(|need| need.port == port).and_then(|need| need.from.first());
            let stage = &index.document.stages[draft.stage];
            let span = selector.map_or(stage.span, |(_, span)| *span);
            let fault = Diagnostic::new(span, format!("stage `{}`: {}", stage.name, error.message));
            faults.push(fault.maybe_help(error.help).of_instance(draft.display_name()));
        }
    }
}

/// Reports instances of one stage that would have the same key.
fn check_duplicates(
    index: &DraftIndex,
    drafts: &[InstanceDraft],
    checked: &[Option<CheckedInstance>],
    faults: &mut Diagnostics,
) {
    for (n, stage) in index.document.stages.iter().enumerate() {
        let range = index.drafts_of(n);
        if range.len() < 2 || !stage.all_used {
            continue;
        }
        let mut alike: BTreeMap<Digest, Vec<usize>> = BTreeMap::new();
        for at in range {
            let (draft, Some(checked)) = (&drafts[at], &checked[at]) else { continue };
            if draft.valid {
                let seed = checked.signature.seeded.then_some(draft.seed);
                let inputs: BTreeMap<&str, Vec<usize>> = draft
                    .needs
                    .iter()
                    .map(|need| (need.port.as_str(), need.from.iter().map(|(at, _)| *at).collect()))
                    .collect();
                let text = format!("{} {seed:?} {inputs:?}", checked.values.params);
                alike.entry(Digest::of(text.as_bytes())).or_default().push(at);
            }
        }
        let mut groups: Vec<Vec<usize>> = alike.into_values().filter(|group| group.len() > 1).collect();
        groups.sort();
        for group in groups {
            let names: Vec<String> = group.iter().take(4).map(|at| format!("`{}`", drafts[*at].name)).collect();
            let more = if group.len() > 4 { format!(" and {} more", group.len() - 4) } else { String::new() };
            let message =
                format!("instances {}{more} are equal: same kind, parameters, seed and inputs", names.join(", "));
            let (kind, seeded) = (
                stage.uses.as_ref().map_or("", |(k, _)| k),
                checked[group[0]].as_ref().is_some_and(|t| t.signature.seeded),
            );
            let seeds_differ = group.iter().any(|at| drafts[*at].seed != drafts[group[0]].seed);
            let help = if !seeded && seeds_differ {
                format!("they differ only in their seed, and {kind} draws no random numbers with these parameters")
            } else {
                "make them differ, for example by `seed`, or remove the values that change nothing".to_owned()
            };
            faults.push(Diagnostic::new(stage.matrix.first().map_or(stage.span, |d| d.span), message).help(help));
        }
    }
}

fn report_cycles(needs: &[Vec<usize>], left: &[usize], drafts: &[InstanceDraft], faults: &mut Diagnostics) {
    const MAX_SHOWN: usize = 12;
    let mut reported: Vec<Vec<usize>> = Vec::new();
    for cycle in order::cycles(needs, left) {
        // Several instances of one matrix often form the same cycle of stages: report it once.
        let mut stages: Vec<usize> = cycle.iter().map(|at| drafts[*at].stage).collect();
        let least = (0..stages.len()).min_by_key(|n| stages[*n]).unwrap_or(0);
        stages.rotate_left(least);
        if reported.contains(&stages) {
            continue;
        }
        reported.push(stages);
        let mut names: Vec<String> = cycle.iter().chain(&cycle[..1]).map(|at| drafts[*at].name.to_string()).collect();
        if names.len() > MAX_SHOWN {
            let hidden = names.len() - MAX_SHOWN;
            names.splice(MAX_SHOWN / 2..MAX_SHOWN / 2 + hidden, [format!("({hidden} more)")]);
        }
        let first = &drafts[cycle[0]];
        let next = cycle.get(1).copied().unwrap_or(cycle[0]);
        let span = first.needs.iter().flat_map(|need| &need.from).find(|(at, _)| *at == next).map(|(_, span)| *span);
        let fault = Diagnostic { span, ..Diagnostic::without_span(format!("cycle: {}", names.join(" -> "))) };
        faults.push(fault.help("each stage needs the next one: remove one of these inputs"));
    }
}

fn targets(index: &DraftIndex, options: &LoadOptions, faults: &mut Diagnostics) -> Vec<usize> {
    let mut position = |name: &str, text: &String| {
        let source = faults.add_source(name, text);
        (text.clone(), Some(Span { source, start: 0, length: text.len() as u32 }))
    };
    let (stage, until) = (&options.stage, &options.until);
    let given: Vec<(String, Option<Span>)> = match stage {
        Some(stage) => vec![position("STAGE", stage)],
        None if until.is_empty() => index.document.targets.clone(),
        None => until.iter().map(|text| position("--until", text)).collect(),
    };
    let label = if stage.is_some() { "" } else { "target: " };
    let mut targets = Vec::new();
    for (text, span) in given {
        match Selector::parse(&text).and_then(|selector| index.select(&selector)) {
            Ok(Selection::Instances { drafts, .. }) => targets.extend(drafts),
            Ok(Selection::Faulty) => {}
            Err((message, help)) => {
                let fault = Diagnostic { span, ..Diagnostic::without_span(format!("{label}{message}")) };
                faults.push(fault.maybe_help(help));
            }
        }
    }
    targets.sort_unstable();
    targets.dedup();
    targets
}

/// Reports paths that do not exist and that the targets need.
fn check_paths(checked: &[Option<CheckedInstance>], needed: &[bool], faults: &mut Diagnostics) {
    for checked in checked.iter().zip(needed).filter(|(_, needed)| **needed).filter_map(|(checked, _)| checked.as_ref())
    {
        for (external, span) in &checked.values.paths {
            // Patterns are matched later, when their digest is needed.
            if let Some(path) = external.missing() {
                let help = "relative paths start from the folder of the pipeline file";
                faults.push(Diagnostic::new(*span, format!("no file or folder at `{}`", path.display())).help(help));
            }
        }
    }
}

/// Turns the checked drafts into a graph. `sorted` has each draft once, inputs first.
fn build_graph(
    document: &Document,
    name: String,
    drafts: Vec<InstanceDraft>,
    checked: Vec<Option<CheckedInstance>>,
    sorted: &[usize],
    targets: &[usize],
    needed: &[bool],
) -> Graph {
    let mut position = vec![usize::MAX; drafts.len()];
    for (n, at) in sorted.iter().filter(|at| needed[**at]).enumerate() {
        position[*at] = n;
    }
    let labels: Vec<String> = drafts
        .iter()
        .map(|d| if d.name.labels.is_empty() { d.name.stage.to_string() } else { d.name.labels.join(",") })
        .collect();
    let mut instances: Vec<Option<Instance>> = Vec::new();
    instances.resize_with(needed.iter().filter(|needed| **needed).count(), || None);
    let mut not_needed = Vec::new();
    for (at, (draft, checked)) in drafts.into_iter().zip(checked).enumerate() {
        // Without faults every needed draft has parameters and a signature.
        let Some(CheckedInstance { values, signature }) = checked.filter(|_| needed[at]) else {
            not_needed.push(draft.name);
            continue;
        };
        let mut inputs: Vec<PortInputs> = Vec::with_capacity(draft.needs.len());
        for need in draft.needs.into_iter().filter(|need| !need.from.is_empty()) {
            let declared = signature.ports.iter().find(|port| port.name == need.port).map(|port| port.arity);
            let arity = declared.unwrap_or(if need.allows_many { Arity::Many } else { Arity::One });
            let from = need
                .from
                .iter()
                .map(|(at, _)| InputSource { instance: position[*at], label: labels[*at].clone() })
                .collect();
            inputs.push(PortInputs { port: need.port, arity, from });
        }
        inputs.sort_by(|a, b| a.port.cmp(&b.port));
        let stage = &document.stages[draft.stage];
        let kind = stage.uses.as_ref().map_or_else(String::new, |(kind, _)| kind.clone());
        let executor = stage.executor.as_ref().map(|(name, _)| name.clone()).filter(|name| name != LOCAL);
        let (timeout, retries) = (stage.timeout, stage.retries);
        let placement = Placement { executor, resources: stage.resources.clone(), timeout, retries };
        let (name, matrix, seed) = (draft.name, draft.matrix, draft.seed);
        instances[position[at]] =
            Some(Instance { name, matrix, kind, params: values.params, seed, signature, inputs, placement });
    }
    Graph {
        instances: instances.into_iter().flatten().collect(),
        targets: targets.iter().map(|at| position[*at]).collect(),
        not_needed,
        name,
        seed: document.seed,
        report: document.report.clone(),
        remote: document.remote.clone(),
        on_finish: document.on_finish.clone(),
        executors: document.executors.clone(),
        pools: document.pools.clone(),
    }
}
