//! The oracle: the definitions of planning and running as plain recursion.

use std::collections::{BTreeMap, BTreeSet};

use super::case::{Case, LABELS, Need};
use crate::names::Digest;
use crate::plan::tests::MemoryStore;
use crate::plan::{Reason, Recipe};

/// One instance of a stage as the oracle sees it.
pub struct Node {
    pub name: String,
    pub stage: usize,
    pub label: Option<usize>,
    /// Its parameters, as words.
    pub words: Vec<String>,
    pub ports: Vec<Port>,
}

pub struct Port {
    pub from: Vec<usize>,
    /// Whether labels distinguish its inputs.
    pub many: bool,
}

impl Node {
    fn inputs(&self) -> impl Iterator<Item = usize> + '_ {
        self.ports.iter().flat_map(|port| port.from.iter().copied())
    }

    pub fn matches(&self, selector: &str) -> bool {
        let any = self.label.map(|_| format!("s{}[*]", self.stage));
        self.name == selector || selector == format!("s{}", self.stage) || any.as_deref() == Some(selector)
    }
}

/// Every instance of the pipeline's last version.
pub fn nodes(case: &Case) -> Vec<Node> {
    let mut nodes: Vec<Node> = Vec::new();
    for (n, stage) in case.stages.iter().enumerate() {
        let labels = if stage.labels == 0 { vec![None] } else { (0..stage.labels).map(Some).collect() };
        for label in labels {
            let of = |wanted: &Need| -> Vec<usize> {
                let fits = |node: &Node| match *wanted {
                    Need::Stage(stage) | Need::Any(stage) => node.stage == stage,
                    Need::Label(stage, label) => node.stage == stage && node.label == Some(label),
                    Need::SameLabel(stage) => node.stage == stage && node.label == label,
                };
                (0..nodes.len()).filter(|i| fits(&nodes[*i])).collect()
            };
            let has_matrix = |source: &usize| case.stages[*source].labels > 0;
            let many = |needs: &Vec<Need>| match needs.as_slice() {
                [Need::Stage(source)] => has_matrix(source),
                [Need::Label(..) | Need::SameLabel(_)] => false,
                _ => true,
            };
            let ports = stage.ports.iter();
            let ports = ports.map(|needs| Port { from: needs.iter().flat_map(of).collect(), many: many(needs) });
            let ports = ports.collect();
            let mut words = vec![n.to_string(), case.versions[case.versions.len() - 1][n].to_string()];
            words.extend(label.filter(|_| stage.label_in_params).map(|label| LABELS[label].to_owned()));
            let name = label.map_or_else(|| format!("s{n}"), |label| format!("s{n}[{}]", LABELS[label]));
            nodes.push(Node { name, stage: n, label, words, ports });
        }
    }
    nodes
}

/// Everything that an attempt knows, as text: the oracle's replacement for keys.
fn recipe_text(words: &[String], ports: &[Vec<(Option<String>, Digest)>]) -> String {
    format!("{words:?} {ports:?}")
}

/// The same of a real recipe.
pub fn text_of(recipe: &Recipe) -> String {
    let words = recipe.params["run"].as_array().unwrap().iter().map(|word| word.as_str().unwrap().to_owned());
    let ports = recipe.inputs.iter().map(|port| port.from.iter().map(|i| (i.label.clone(), i.digest)).collect());
    recipe_text(&words.collect::<Vec<_>>(), &ports.collect::<Vec<_>>())
}

/// The bytes that an attempt makes: so few values that different recipes often give the same bytes.
pub fn outcome(recipe: &str, surprising: bool) -> Digest {
    let stage = recipe.split('"').nth(1).unwrap_or_default();
    Digest::of(format!("{stage} {} {surprising}", Digest::of(recipe.as_bytes()).as_bytes()[0] % 3).as_bytes())
}

/// The definitions.
pub struct Oracle<'a> {
    pub nodes: Vec<Node>,
    pub records: BTreeMap<String, Digest>,
    pub store: &'a MemoryStore,
    pub targets: BTreeSet<usize>,
    pub forced: BTreeSet<usize>,
    pub surprising: bool,
}

#[derive(Debug, PartialEq)]
pub enum State {
    Reuse(Digest),
    Run(Reason),
    Pending(BTreeSet<String>),
}

impl Oracle<'_> {
    /// Whether a target needs the instance.
    pub fn kept(&self, i: usize) -> bool {
        self.targets.contains(&i) || (0..self.nodes.len()).any(|j| self.needs(j, i) && self.kept(j))
    }

    fn needs(&self, user: usize, input: usize) -> bool {
        self.nodes[user].inputs().any(|i| i == input)
    }

    fn any_user(&self, i: usize, is: impl Fn(usize) -> bool) -> bool {
        (0..self.nodes.len()).any(|j| self.needs(j, i) && self.kept(j) && is(j))
    }

    /// `None` if the digest of an input is not known.
    fn recipe(&self, i: usize, digest: &dyn Fn(usize) -> Option<Digest>) -> Option<String> {
        let node = &self.nodes[i];
        let input = |port: &Port, i: usize| {
            let label = self.nodes[i].label.map_or_else(|| self.nodes[i].name.clone(), |l| LABELS[l].to_owned());
            Some((port.many.then_some(label), digest(i)?))
        };
        let ports = node.ports.iter().map(|port| port.from.iter().map(|i| input(port, *i)).collect());
        Some(recipe_text(&node.words, &ports.collect::<Option<Vec<Vec<_>>>>()?))
    }

    fn damage(&self, digest: &Digest) -> Option<Reason> {
        match (self.store.damaged.contains(digest), self.store.intact.contains(digest)) {
            (true, _) => Some(Reason::ArtifactDamaged { file: "x".into() }),
            (false, false) => Some(Reason::ArtifactMissing),
            (false, true) => None,
        }
    }

    /// What the instance's record says, if everything above has one too.
    fn recorded(&self, i: usize) -> Option<Digest> {
        let recipe = self.recipe(i, &|input| self.recorded(input))?;
        if self.forced.contains(&i) { None } else { self.records.get(&recipe).copied() }
    }

    /// Whether the instance must run for itself, not because its bytes are lost.
    fn starts(&self, i: usize) -> bool {
        self.recipe(i, &|input| self.recorded(input)).is_some() && self.recorded(i).is_none()
    }

    /// Why the bytes of a recorded artifact must be made again.
    pub fn lost(&self, i: usize) -> Option<Reason> {
        let damage = self.damage(&self.recorded(i)?)?;
        let needed = self.targets.contains(&i) || self.any_user(i, |j| self.starts(j) || self.lost(j).is_some());
        needed.then_some(damage)
    }

    /// The state before the run.
    pub fn state(&self, i: usize) -> State {
        let unknown = self.nodes[i].inputs().filter(|input| !matches!(self.state(*input), State::Reuse(_)));
        let unknown: BTreeSet<String> = unknown.map(|input| self.nodes[input].name.clone()).collect();
        match (self.recorded(i), self.lost(i)) {
            _ if !unknown.is_empty() => State::Pending(unknown),
            _ if self.forced.contains(&i) => State::Run(Reason::Forced),
            (None, _) => State::Run(Reason::NoRecord),
            (Some(_), Some(reason)) => State::Run(reason),
            (Some(digest), None) => State::Reuse(digest),
        }
    }

    /// The digest after the run.
    pub fn result(&self, i: usize) -> Digest {
        let recipe = self.recipe_of_run(i);
        match self.records.get(&recipe) {
            Some(digest) if !self.forced.contains(&i) => *digest,
            _ => outcome(&recipe, self.surprising && self.forced.contains(&i)),
        }
    }

    pub fn recipe_of_run(&self, i: usize) -> String {
        self.recipe(i, &|input| Some(self.result(input))).unwrap()
    }

    /// Why the instance is among those that the run executes.
    pub fn runs(&self, i: usize) -> Option<Reason> {
        if self.forced.contains(&i) {
            return Some(Reason::Forced);
        }
        let Some(digest) = self.records.get(&self.recipe_of_run(i)) else { return Some(Reason::NoRecord) };
        let damage = self.damage(digest)?;
        let needed = self.targets.contains(&i) || self.any_user(i, |j| self.runs(j).is_some());
        needed.then_some(damage)
    }

    /// Whether two instances of one stage have the same recipe; an input that is not known counts by its name.
    pub fn has_duplicates(&self, recipe: &dyn Fn(usize) -> String) -> bool {
        let mut seen = BTreeSet::new();
        (0..self.nodes.len()).filter(|i| self.kept(*i)).any(|i| !seen.insert((self.nodes[i].stage, recipe(i))))
    }

    /// Whether two instances have the same artifact and it is lost: the one that makes it first does so for both, and
    /// which one that is depends on the order of work.
    pub fn shares_lost_artifact(&self) -> bool {
        let mut seen = BTreeSet::new();
        let kept = (0..self.nodes.len()).filter(|i| self.kept(*i)).map(|i| self.result(i));
        kept.filter(|digest| self.damage(digest).is_some()).any(|digest| !seen.insert(digest))
    }

    /// As far as records say.
    pub fn planned_recipe(&self, i: usize) -> String {
        let unknown = |input: usize| Digest::of(self.nodes[input].name.as_bytes());
        self.recipe(i, &|input| Some(self.recorded(input).unwrap_or_else(|| unknown(input)))).unwrap()
    }

    /// Whether every instance above those of `--from` is reused.
    pub fn allows_from(&self, from: &BTreeSet<usize>) -> bool {
        let above = |i: usize| from.iter().any(|start| self.is_above(i, *start));
        (0..self.nodes.len()).all(|i| from.contains(&i) || !above(i) || matches!(self.state(i), State::Reuse(_)))
    }

    fn is_above(&self, i: usize, below: usize) -> bool {
        self.nodes[below].inputs().any(|input| input == i || self.is_above(i, input))
    }
}
