//! The position of every instance in the list of drafts, before the drafts exist.

use std::cell::Cell;
use std::collections::HashMap;

use crate::diagnostics::{Diagnostic, Diagnostics};
use crate::document::matrix::Label;
use crate::document::{Document, Stage};
use crate::names::MAX_NAME_BYTES;

/// Maximum number of instances of one stage.
pub const MAX_INSTANCES: usize = 100_000;
/// Maximum memory for the names, `with` and `needs` of all instances.
pub const MAX_BYTES: usize = 128 << 20;
/// Memory of one instance besides those.
const INSTANCE_BYTES: usize = 256;
/// Maps stages to ranges of the list of drafts.
pub struct DraftIndex<'a> {
    pub document: &'a Document,
    pub by_name: HashMap<&'a str, usize>,
    /// Index of each stage's first draft, followed by the total count.
    first: Vec<usize>,
    /// Number of connections made so far.
    pub connections: Cell<usize>,
}

impl<'a> DraftIndex<'a> {
    pub fn new(document: &'a Document, faults: &mut Diagnostics) -> Self {
        let by_name = document.stages.iter().enumerate().map(|(n, stage)| (stage.name.as_str(), n)).collect();
        let mut first = vec![0];
        let mut bytes = 0_usize;
        for stage in &document.stages {
            let span = stage.matrix.first().map_or(stage.span, |dimension| dimension.span);
            let count = stage.matrix.iter().try_fold(1, |product: usize, d| product.checked_mul(d.labels.len()));
            let count = count.filter(|count| *count <= MAX_INSTANCES).unwrap_or_else(|| {
                let message = format!("the matrix of stage `{}` gives more than {MAX_INSTANCES} instances", stage.name);
                faults.push(Diagnostic::new(span, message));
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
                faults.push(Diagnostic::new(span, message).help(help));
                // Expand nothing.
                first = vec![0; document.stages.len() + 1];
                break;
            }
            first.push(first[first.len() - 1] + count);
        }
        Self { document, by_name, first, connections: Cell::new(0) }
    }

    pub fn drafts_of(&self, stage: usize) -> std::ops::Range<usize> {
        self.first[stage]..self.first[stage + 1]
    }

    pub fn draft_count(&self) -> usize {
        self.first[self.document.stages.len()]
    }
}

/// Approximate upper bound of the memory that `count` instances of a stage take.
fn bytes_of(stage: &Stage, count: usize) -> usize {
    let base = INSTANCE_BYTES + 2 * MAX_NAME_BYTES + stage.with.bytes() + stage.needs.bytes();
    let dimensions = stage.matrix.iter().filter(|dimension| !dimension.labels.is_empty()).map(|dimension| {
        let label = |label: &Label| 2 * label.text.len() + dimension.name.len() + label.changes.bytes();
        let all: usize = dimension.labels.iter().map(label).sum();
        all.saturating_mul(count / dimension.labels.len())
    });
    dimensions.fold(base.saturating_mul(count), usize::saturating_add)
}
