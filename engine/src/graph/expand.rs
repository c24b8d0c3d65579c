//! Expands stages into instances: the product of the matrix, with each label's changes merged and variables filled in.

use std::cell::Cell;
use std::collections::HashMap;

use serde_json::Value as Json;

use super::select::{Found, Selector};
use crate::diagnostics::{Diagnostics, Fault, Span};
use crate::names::{InstanceName, LONGEST_NAME};
use crate::spec::interpolate::{self, Variable, fill};
use crate::spec::matrix::Label;
use crate::spec::node::{Map, Node, Value};
use crate::spec::{Spec, Stage, merge, seed_of, texts};

/// Maximum number of instances of one stage.
pub const MAX_INSTANCES: usize = 100_000;
/// Maximum memory for the names, `with` and `needs` of all instances.
pub const MAX_BYTES: usize = 128 << 20;
/// Memory of one instance besides those.
const INSTANCE_BYTES: usize = 256;
/// Maximum number of connections, over all ports of all instances.
pub const MAX_NEEDED: usize = 2_000_000;

/// An instance before its parameters and wiring are checked.
#[derive(Debug)]
pub struct Draft {
    /// Index into [`Spec::stages`].
    pub stage: usize,
    pub name: InstanceName,
    /// (dimension, label)
    pub matrix: Vec<(String, String)>,
    /// `with` of this instance as a tree, for source positions; variables are not filled in.
    pub with: Map,
    /// `with` as JSON, variables filled in.
    pub json: Json,
    pub needs: Vec<Need>,
    pub seed: u64,
    /// Whether no fault has been found so far.
    pub sound: bool,
}

/// The inputs of one port.
#[derive(Debug)]
pub struct Need {
    pub port: String,
    pub span: Span,
    /// Indices of drafts, each with the position of its selector.
    pub from: Vec<(usize, Span)>,
    /// Whether the notation allows several inputs: a list, a wildcard, or a stage that has a matrix.
    pub several: bool,
    /// Whether every selector matched.
    pub sound: bool,
}

impl Draft {
    /// The instance's name for faults, if its stage has a matrix.
    pub fn told_as(&self) -> Option<String> {
        (!self.matrix.is_empty()).then(|| self.name.to_string())
    }
}

/// Maps stages to ranges of the list of drafts.
pub struct Layout<'a> {
    pub spec: &'a Spec,
    pub by_name: HashMap<&'a str, usize>,
    /// Index of each stage's first draft, followed by the total count.
    first: Vec<usize>,
    /// Number of connections made so far.
    needed: Cell<usize>,
}

impl<'a> Layout<'a> {
    pub fn new(spec: &'a Spec, faults: &mut Diagnostics) -> Self {
        let by_name = spec.stages.iter().enumerate().map(|(n, stage)| (stage.name.as_str(), n)).collect();
        let mut first = vec![0];
        let mut bytes = 0_usize;
        for stage in &spec.stages {
            let span = stage.matrix.first().map_or(stage.span, |dimension| dimension.span);
            let count = stage.matrix.iter().try_fold(1, |product: usize, d| product.checked_mul(d.labels.len()));
            let count = count.filter(|count| *count <= MAX_INSTANCES).unwrap_or_else(|| {
                let message = format!("the matrix of stage `{}` gives more than {MAX_INSTANCES} instances", stage.name);
                faults.push(Fault::new(span, message));
                0
            });
            bytes = bytes.saturating_add(bytes_of(stage, count));
            if bytes > MAX_BYTES {
                let message = format!(
                    "with the instances of stage `{}` the pipeline's parameters take more than {} MiB",
                    stage.name,
                    MAX_BYTES >> 20
                );
                let help = "put large values into a file that the instances share";
                faults.push(Fault::new(span, message).help(help));
                // Expand nothing.
                first = vec![0; spec.stages.len() + 1];
                break;
            }
            first.push(first[first.len() - 1] + count);
        }
        Self { spec, by_name, first, needed: Cell::new(0) }
    }

    pub fn drafts_of(&self, stage: usize) -> std::ops::Range<usize> {
        self.first[stage]..self.first[stage + 1]
    }
}

/// Approximate upper bound of the memory that `count` instances of a stage take.
fn bytes_of(stage: &Stage, count: usize) -> usize {
    let base = INSTANCE_BYTES + 2 * LONGEST_NAME + stage.with.bytes() + stage.needs.bytes();
    let dimensions = stage.matrix.iter().filter(|dimension| !dimension.labels.is_empty()).map(|dimension| {
        let label = |label: &Label| 2 * label.text.len() + dimension.name.len() + label.partial.bytes();
        let all: usize = dimension.labels.iter().map(label).sum();
        all.saturating_mul(count / dimension.labels.len())
    });
    dimensions.fold(base.saturating_mul(count), usize::saturating_add)
}

/// Every instance of every stage: stages in file order; of the labels, the last dimension varies fastest.
pub fn drafts(layout: &Layout, faults: &mut Diagnostics) -> Vec<Draft> {
    let mut drafts = Vec::with_capacity(layout.first[layout.spec.stages.len()]);
    for (n, stage) in layout.spec.stages.iter().enumerate() {
        let count = layout.drafts_of(n).len();
        for i in 0..count {
            let mut rest = i;
            let mut labels: Vec<&Label> = Vec::with_capacity(stage.matrix.len());
            for dimension in stage.matrix.iter().rev() {
                labels.push(&dimension.labels[rest % dimension.labels.len()]);
                rest /= dimension.labels.len();
            }
            labels.reverse();
            drafts.push(draft(layout, n, stage, &labels, faults));
        }
    }
    drafts
}

fn draft(layout: &Layout, at: usize, stage: &Stage, labels: &[&Label], faults: &mut Diagnostics) -> Draft {
    let (mut with, mut needs, mut seed) = (stage.with.clone(), stage.needs.clone(), stage.seed.as_ref());
    for label in labels {
        for (map, key) in [(&mut with, "with"), (&mut needs, "needs")] {
            match label.partial.get(key).map(|node| &node.value) {
                Some(Value::Map(changes)) => merge::plain(map, changes),
                Some(Value::Null) => map.0.clear(),
                _ => {}
            }
        }
        if let Some(node) = label.partial.get("seed") {
            seed = Some(node).filter(|node| !node.is_null());
        }
    }
    let variables: Vec<Variable> = stage
        .matrix
        .iter()
        .zip(labels)
        .map(|(dimension, label)| Variable { name: &dimension.name, text: &label.text, value: &label.value })
        .collect();
    let matrix = variables.iter().map(|v| (v.name.to_owned(), v.text.to_owned())).collect();
    let name = InstanceName { stage: stage.name.clone(), labels: labels.iter().map(|l| l.text.clone()).collect() };
    let json = with.0.iter().map(|e| (e.key.clone(), interpolate::json(&e.value, &variables))).collect();
    let mut draft =
        Draft { stage: at, name, matrix, with, json, needs: Vec::new(), seed: layout.spec.seed, sound: stage.sound };
    if let Some(node) = seed {
        let value = interpolate::value(&node.value, &variables);
        match seed_of(node, &value, &format!("stage `{}`", stage.name), faults) {
            Ok(seed) => draft.seed = seed,
            Err(fault) => {
                draft.sound = false;
                // A variable that was not filled in has been reported already.
                if !matches!(value.as_ref(), Value::Str(text) if text.contains("${")) {
                    faults.push(fault.of_instance(draft.told_as()));
                }
            }
        }
    }
    for entry in &needs.0 {
        let need = need(layout, entry.key.clone(), entry.key_span, &entry.value, &variables, &draft, faults);
        draft.sound &= need.sound;
        draft.needs.push(need);
    }
    draft
}

fn need(
    layout: &Layout,
    port: String,
    span: Span,
    node: &Node,
    variables: &[Variable],
    user: &Draft,
    faults: &mut Diagnostics,
) -> Need {
    let before = faults.count();
    let selectors = texts(node, &format!("`{port}`"), faults);
    let listed = matches!(node.value, Value::List(_));
    let mut need = Need { port, span, from: Vec::new(), several: listed, sound: faults.count() == before };
    for (text, span) in &selectors {
        if layout.needed.get() > MAX_NEEDED {
            need.sound = false;
            break;
        }
        let text = fill(text, variables);
        let found = Selector::parse(&text).and_then(|selector| layout.select(&selector));
        match found {
            Ok(Found::Instances { drafts, several }) => {
                need.several |= several;
                layout.needed.set(layout.needed.get() + drafts.len());
                if layout.needed.get() > MAX_NEEDED {
                    let message = format!("the ports of all instances are given more than {MAX_NEEDED} instances");
                    faults.push(Fault::new(*span, message));
                    need.sound = false;
                    break;
                }
                need.from.extend(drafts.into_iter().map(|draft| (draft, *span)));
            }
            Ok(Found::Faulty) => need.sound = false,
            Err((message, help)) => {
                faults.push(Fault::new(*span, message).maybe_help(help).of_instance(user.told_as()));
                need.sound = false;
            }
        }
    }
    need
}
