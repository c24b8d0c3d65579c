//! A case: a pipeline, what its store went through, and the arguments of a command, drawn from a seed.

use std::collections::BTreeSet;
use std::fmt::Write;
use std::path::Path;

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

use crate::graph::{Graph, LoadOptions, load};
use crate::kind::Registry;

pub const LABELS: [&str; 3] = ["a", "b", "c"];

struct Draw(ChaCha8Rng);

impl Draw {
    /// A number below `end`, which is not 0.
    fn below(&mut self, end: usize) -> usize {
        self.0.next_u32() as usize % end
    }

    fn percent(&mut self, chance: usize) -> bool {
        self.below(100) < chance
    }

    /// Some of the numbers below `end`.
    fn some(&mut self, end: usize, chance: usize) -> BTreeSet<usize> {
        (0..end).filter(|_| self.percent(chance)).collect()
    }
}

/// How a stage names an input.
#[derive(Clone, Copy, Debug)]
pub enum Need {
    /// `s0`: with a matrix, every instance.
    Stage(usize),
    /// `s0[a]`
    Label(usize, usize),
    /// `s0[${k}]`: the instance with the same label.
    SameLabel(usize),
    /// `s0[*]`
    Any(usize),
}

#[derive(Debug)]
pub struct Stage {
    /// How many labels its matrix has; 0: no matrix.
    pub labels: usize,
    /// Whether the label is among its parameters.
    pub label_in_params: bool,
    /// A port with several needs lists them.
    pub ports: Vec<Vec<Need>>,
}

/// A pipeline with its earlier versions, what happened to the store since, and the arguments of a command.
#[derive(Debug)]
pub struct Case {
    pub stages: Vec<Stage>,
    /// The parameter of each stage, by version; the command is given the last one.
    pub versions: Vec<Vec<usize>>,
    pub targets: Vec<String>,
    pub until: Vec<String>,
    pub force: Vec<String>,
    pub from: Vec<String>,
    /// Positions among the records and artifacts that the earlier versions left.
    pub lost_records: BTreeSet<usize>,
    pub lost_artifacts: BTreeSet<usize>,
    pub damaged_artifacts: BTreeSet<usize>,
    /// Whether a forced stage makes other bytes than before.
    pub surprising: bool,
}

impl Case {
    pub fn draw(seed: u64) -> Self {
        let draw = &mut Draw(ChaCha8Rng::seed_from_u64(seed));
        let mut stages: Vec<Stage> = Vec::new();
        for n in 0..1 + draw.below(7) {
            let labels = if draw.percent(30) { 2 + draw.below(2) } else { 0 };
            let mut ports = Vec::new();
            for _ in 0..if n == 0 { 0 } else { draw.below(3) } {
                let sources = if draw.percent(20) { draw.some(n, 50) } else { BTreeSet::from([draw.below(n)]) };
                let needs = sources.into_iter().map(|source| match stages[source].labels {
                    0 => Need::Stage(source),
                    count => match draw.below(4) {
                        0 => Need::Stage(source),
                        1 => Need::Any(source),
                        2 if labels > 0 && labels <= count => Need::SameLabel(source),
                        _ => Need::Label(source, draw.below(count)),
                    },
                });
                let needs: Vec<Need> = needs.collect();
                if !needs.is_empty() {
                    ports.push(needs);
                }
            }
            // A variable of the matrix that changes nothing is a fault of the file.
            let used = ports.iter().flatten().any(|need| matches!(need, Need::SameLabel(_)));
            let label_in_params = labels > 0 && (!used || draw.percent(40));
            stages.push(Stage { labels, label_in_params, ports });
        }
        let versions = 1 + draw.below(3);
        let selectors = |draw: &mut Draw, chance| -> Vec<String> {
            let chosen = draw.some(stages.len(), chance);
            chosen.into_iter().map(|stage| selector(stage, stages[stage].labels, draw)).collect()
        };
        let mut targets = selectors(draw, 40);
        if targets.is_empty() {
            targets.push(format!("s{}", stages.len() - 1));
        }
        let until = if draw.percent(30) { selectors(draw, 40) } else { Vec::new() };
        let force = if draw.percent(40) { selectors(draw, 25) } else { Vec::new() };
        let from = if draw.percent(30) { selectors(draw, 25) } else { Vec::new() };
        let (lost, damaged) = ([0, 0, 10, 30][draw.below(4)], [0, 0, 10][draw.below(3)]);
        Self {
            versions: (0..versions).map(|_| (0..stages.len()).map(|_| draw.below(4) / 3).collect()).collect(),
            targets,
            until,
            force,
            from,
            lost_records: draw.some(40, lost),
            lost_artifacts: draw.some(40, lost),
            damaged_artifacts: draw.some(40, damaged),
            surprising: draw.percent(30),
            stages,
        }
    }

    pub fn text(&self, version: usize) -> String {
        let mut text = format!("version: 1\ntargets: [{}]\nstages:\n", quoted(&self.targets));
        for (n, stage) in self.stages.iter().enumerate() {
            let label = if stage.label_in_params { ", '${k}'" } else { "" };
            let value = self.versions[version][n];
            write!(text, "  s{n}: {{ uses: command, with: {{ run: ['{n}', '{value}'{label}] }}").unwrap();
            if stage.labels > 0 {
                write!(text, ", matrix: {{ k: [{}] }}", LABELS[..stage.labels].join(", ")).unwrap();
            }
            text.push_str(", needs: {");
            for (p, needs) in stage.ports.iter().enumerate() {
                let needs: Vec<String> = needs.iter().map(|need| need.to_string()).collect();
                match needs.as_slice() {
                    [one] => write!(text, " p{p}: '{one}',").unwrap(),
                    many => write!(text, " p{p}: [{}],", quoted(many)).unwrap(),
                }
            }
            text.push_str(" } }\n");
        }
        text
    }

    pub fn load(&self, version: usize, folder: &Path, registry: &Registry) -> Graph {
        let file = folder.join("p.yaml");
        // A new file, whose bytes need not reach the disk; those of one that is overwritten would.
        let _ = std::fs::remove_file(&file);
        std::fs::write(&file, self.text(version)).unwrap();
        let options = LoadOptions { until: self.until.clone(), ..LoadOptions::default() };
        load(&file, &options, registry).unwrap_or_else(|faults| panic!("{faults}"))
    }
}

impl std::fmt::Display for Need {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Stage(stage) => write!(f, "s{stage}"),
            Self::Label(stage, label) => write!(f, "s{stage}[{}]", LABELS[*label]),
            Self::SameLabel(stage) => write!(f, "s{stage}[${{k}}]"),
            Self::Any(stage) => write!(f, "s{stage}[*]"),
        }
    }
}

fn quoted(words: &[String]) -> String {
    words.iter().map(|word| format!("'{word}'")).collect::<Vec<_>>().join(", ")
}

fn selector(stage: usize, labels: usize, draw: &mut Draw) -> String {
    match draw.below(3) {
        0 if labels > 0 => format!("s{stage}[*]"),
        1 if labels > 0 => format!("s{stage}[{}]", LABELS[draw.below(labels)]),
        _ => format!("s{stage}"),
    }
}
